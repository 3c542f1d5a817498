"""A text of elsewhere, read as the parts of a corpus are."""

from pathlib import Path

import pytest
import torch

from vdrop_cli.errors import ConfigError
from vdrop_cli.learned import Words
from vdrop_cli.settings.data import PennTreebank, TextData, TextFiles
from vdrop_cli.tasks import OtherText, WordPredictor

CPU = torch.device("cpu")


def other(path: Path, *vocabulary: str, data: TextData | None = None) -> OtherText:
    predictor = WordPredictor(Words.from_vocabulary(list(vocabulary)), CPU)
    return OtherText(str(path), predictor, PennTreebank() if data is None else data)


def test_words_are_ids_of_the_vocabulary_and_lines_end_with_a_word(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("b a\n\nc A b")
    text = other(path, "<unk>", "<eos>", "a", "b")
    assert text.streams["test"].tolist() == [3, 2, 1, 1, 0, 0, 3, 1]
    assert text.unknown_share == 2 / 8 and text.size == "8 tokens, 25 % of them <unk>"
    assert text.test_groups.position_N is not None
    assert text.test_groups.position_N.tolist() == [2, 3, 1, 1, 2, 3, 4]
    one_line = other(path, "<unk>", "a", "b")
    assert one_line.streams["test"].tolist() == [2, 1, 0, 0, 2], "a training text of one line has no <eos>"
    assert one_line.test_groups.position_N is None


def test_words_that_the_model_does_not_read_as_they_are_give_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("b A c\n")
    words = ("<eos>", "a", "b", "c")
    (lower,) = other(path, "<unk>", *words).warnings
    assert (
        lower.startswith("words of file=") and "knows in lower case only: 1; they are read as <unk>" in lower
    )
    assert other(path, "<unk>", *words, data=TextFiles()).warnings == [lower], "<unk> is a word of training"
    untrained = other(path, *words, "<unk>", data=TextFiles())
    assert untrained.warnings[0] == lower
    assert "does not know: 1; they are read as <unk>, which is not trained" in untrained.warnings[1]
    assert other(path, *words, "<unk>").warnings == [lower], "Penn Treebank has <unk> wherever it stands"
    path.write_text("b a <unk>\n")
    own = other(path, *words, "<unk>", data=TextFiles())
    assert own.warnings == [] and own.unknown_share == 1 / 4, "<unk> as it stands in the text"


def test_a_text_that_the_model_cannot_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a c\n")
    with pytest.raises(
        ConfigError, match=r"has the word 'c', which the training text does not have, and the"
    ):
        other(path, "<eos>", "a", "b")
    path.write_text("a")
    with pytest.raises(ConfigError, match=r"has no second word to predict; take a longer text"):
        other(path, "<unk>", "a", "b")
