"""A text other than the corpus of a language model, for its evaluation; the training text is not needed."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vdrop_cli import corpora
from vdrop_cli.errors import ConfigError
from vdrop_cli.learned import LINE_END_WORD
from vdrop_cli.measured import Measured
from vdrop_cli.model import LanguageModel
from vdrop_cli.next_word import Groups
from vdrop_cli.perplexity import stream_perplexity
from vdrop_cli.settings.data import Data
from vdrop_cli.tasks.predictors import WordPredictor, is_unknown_untrained
from vdrop_cli.tasks.text_evaluation import TextEvaluation


class OtherText(TextEvaluation):
    """The text of a file as the test part, read by the rules of the parts of a corpus."""

    def __init__(self, path: str, predictor: WordPredictor, data: Data) -> None:
        """`data`: the settings of the training text. Raises ConfigError where the file is no text, has fewer
        than two tokens, or has a word that the model cannot read.
        """
        self.path, self.predictor, self.device = path, predictor, predictor.device
        self.is_unknown_untrained = is_unknown_untrained(predictor, data)
        words, self.fingerprint = corpora.read_tokens(Path(path), self.origin)
        ids, unknown = predictor.ids, predictor.learned.unknown
        if predictor.learned.line_end is None:
            words = [word for word in words if word != LINE_END_WORD]
        self.unknown_words = [word for word in words if word not in ids]
        if self.unknown_words and unknown is None:
            raise ConfigError(
                f"{self.origin} has the word {self.unknown_words[0]!r}, which the training text does not "
                "have, and the model has no <unk>; leave the word out"
            )
        if len(words) < 2:
            raise ConfigError(f"{self.origin} has no second word to predict; take a longer text")
        read_N = [word if word in ids else str(unknown) for word in words]
        self.unknown_share = sum(word == unknown for word in read_N) / len(words)
        self.streams = {"test": torch.tensor([ids[word] for word in read_N], device=self.device)}

    @property
    def origin(self) -> str:
        return f"file={self.path}"

    @property
    def size(self) -> str:
        """Returns the size of the text, in words for a person."""
        return f"{len(self.streams['test']):,} tokens, {100 * self.unknown_share:.3g} % of them <unk>"

    @property
    def details(self) -> dict[str, Any]:
        """Returns what the file of results says of the text."""
        return {
            "path": self.path,
            "sha256": self.fingerprint,
            "tokens": len(self.streams["test"]),
            "unknown_share": self.unknown_share,
        }

    @property
    def warnings(self) -> list[str]:
        """Returns warnings about words that are known in lower case, and about an <unk> without training."""
        warnings = []
        lower = sum(word.lower() in self.predictor.ids for word in self.unknown_words)
        if lower:
            warnings.append(
                f"words of {self.origin} that the model knows in lower case only: {lower:,}; they are read "
                "as <unk>; write the text as the training text is written"
            )
        if self.unknown_words and self.is_unknown_untrained:
            warnings.append(
                f"words of {self.origin} that the model does not know: {len(self.unknown_words):,}; they are "
                "read as <unk>, which is not trained: no word of training is <unk>"
            )
        return warnings

    @cached_property
    def test_groups(self) -> Groups:
        return Groups.from_text(self.streams["test"].cpu(), None, self.predictor.line_end_id)

    def evaluate(self, model: LanguageModel) -> Measured:
        return Measured({"test_ppl": stream_perplexity(model, self.streams["test"])}, {})
