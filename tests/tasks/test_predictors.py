"""Texts from elsewhere are read as the training text was."""

import pytest
import torch

from vdrop_cli.corpora.text import PARTS, Raw, load_encoded
from vdrop_cli.learned import Words
from vdrop_cli.settings.data import HubText
from vdrop_cli.tasks import WordPredictor


@pytest.mark.parametrize("text", ["a b", "a\rb", "a\r\nb\nc\r", "a\n\n\rb", "a\x0bb\x0cc\u2028d\x85e"])
def test_a_text_is_read_as_in_training(text: str) -> None:
    """With the end of its last line."""
    corpus = load_encoded(
        Raw(dict.fromkeys(PARTS, text.encode()), "here"), HubText(name="a", column="b", cache=None)
    )
    predictor = WordPredictor(Words.from_vocabulary(corpus.vocabulary), torch.device("cpu"))
    assert torch.equal(predictor.encode([*predictor.words(text), *predictor.line_end]), corpus.train_N)
