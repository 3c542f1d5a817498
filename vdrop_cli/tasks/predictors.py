"""Prediction from new texts. It needs a model and what the model learned of its training text, but no corpus.

T time steps  S passes of MC dropout
"""

from pathlib import Path

import torch
from torch import Tensor

from vdrop_cli import corpora, interruption
from vdrop_cli.corpora.text import LINE_END
from vdrop_cli.dropout import is_fixed, joined_masks
from vdrop_cli.errors import ConfigError
from vdrop_cli.learned import Learned, Ratings, Words
from vdrop_cli.model import LanguageModel, Regressor
from vdrop_cli.policies import Dropout
from vdrop_cli.random_streams import Stream
from vdrop_cli.settings.data import CountedText, Data, RatedData
from vdrop_cli.settings.train import Model

START, UNKNOWN = 0, 1  # ids in texts with ratings; those of words follow, the most frequent first
PASSES_AT_ONCE = 50  # of one text


class UnknownWord(ValueError):
    """A word that is not in the vocabulary of a model without a word for all others."""


class WordPredictor:
    """Texts as a language model reads them."""

    def __init__(self, learned: Words, device: torch.device) -> None:
        self.learned, self.device = learned, device
        self.vocabulary = learned.vocabulary
        self.ids = {word: number for number, word in enumerate(learned.vocabulary)}

    @property
    def vocabulary_size(self) -> int:
        return len(self.vocabulary)

    def model(
        self, model: Model, dropout: Dropout, backend: str, compute_dtype: torch.dtype | None
    ) -> LanguageModel:
        """Returns a model on the CPU, whose weights are not initialised."""
        return LanguageModel(model, dropout, self.vocabulary_size, backend, compute_dtype)

    @property
    def line_end(self) -> list[str]:
        """The word after every line, as a list that is empty where the training text had one line."""
        return [self.learned.line_end] if self.learned.line_end is not None else []

    @property
    def line_end_id(self) -> int | None:
        """The id of the word after every line; None where the training text had one line."""
        return None if self.learned.line_end is None else self.ids[self.learned.line_end]

    def words(self, text: str) -> list[str]:
        """Returns what white space separates; the end of a line is a word where the model knows one."""
        return LINE_END.sub(f" {' '.join(self.line_end)} ", text.strip()).split()

    def is_unknown(self, word: str) -> bool:
        """Whether a word is in the vocabulary neither as it is written nor in lower case."""
        return word not in self.ids and word.lower() not in self.ids

    def encode(self, words: list[str]) -> Tensor:
        """Returns the id of each word as it is written, else in lower case, else of the unknown word: [T].

        Raises UnknownWord if the model has none of these.
        """
        ids = []
        for word in words:
            known = next(
                (form for form in (word, word.lower(), self.learned.unknown) if form in self.ids), None
            )
            if known is None:
                raise UnknownWord(
                    f"{word!r} is not a word of the training text, and the model has no <unk>; leave it out"
                )
            ids.append(self.ids[known])
        return torch.tensor(ids, dtype=torch.int64, device=self.device)


class RatingPredictor:
    """Texts as a model of ratings reads them, and the scale of its ratings."""

    def __init__(self, learned: Ratings, device: torch.device) -> None:
        self.learned, self.device = learned, device
        self.ids = {word: number for number, word in enumerate(learned.vocabulary, UNKNOWN + 1)}

    @property
    def vocabulary_size(self) -> int:
        """The number of ids, <start> and <unknown> among them."""
        return UNKNOWN + 1 + len(self.ids)

    def model(
        self, model: Model, dropout: Dropout, backend: str, compute_dtype: torch.dtype | None
    ) -> Regressor:
        """Returns a model on the CPU, whose weights are not initialised."""
        return Regressor(model, dropout, self.vocabulary_size, backend, compute_dtype)

    def words(self, text: str) -> list[str]:
        return corpora.split_words(self.learned.splitting, text)

    def is_unknown(self, word: str) -> bool:
        """Whether a word is not in the vocabulary."""
        return word not in self.ids

    def require_validation_part(self, path: Path, choices: str) -> None:
        """Raises ConfigError where the observation noise is not of a validation part, which conformal
        intervals need. `path` is the checkpoint, `choices` are the other kinds of interval.
        """
        if self.learned.noise_part != "valid":
            raise ConfigError(
                f"interval must be {choices}, got conformal: {path} was trained by the paper's protocol, "
                "which has no validation part; train with task.protocol=clean"
            )

    def cut(self, words: list[str]) -> list[Tensor]:
        """Returns a text as the sequences of ids that the model reads."""
        return cut(words, self.ids, self.learned.chunk_words)

    @torch.no_grad()
    def passes_of(
        self, model: Regressor, words: list[str], samples: int, seed: int, member: int = 0
    ) -> Tensor:
        """Returns the ratings of a text by passes of MC dropout, [S].

        Without samples, it returns the rating by the standard approximation, [1]. The passes are side by side
        in a batch. Masks that are held over a sequence are the same for all sequences of the text in a pass.
        Each `member` of an ensemble has masks of its own. Masks on weights are the same for a whole batch, so
        with them every batch has only one pass.
        """
        at_once = 1 if model.dropout.p_weight > 0 else PASSES_AT_ONCE
        path_end = (member,) if member else ()
        group_ratings = []
        for first in range(0, max(samples, 1), at_once):
            passes, values = min(at_once, max(samples, 1) - first), []
            stream = Stream((seed, "predict", first, *path_end))
            text_masks = model.masks(1, passes, stream) if samples else model.mean_masks()
            for number, ids_T in enumerate(self.cut(words)):
                interruption.check()
                masks = text_masks
                if samples and not is_fixed(model.dropout):
                    drawn = model.masks(len(ids_T), passes, stream.at("sequence", number))
                    masks = joined_masks(drawn, text_masks, model.dropout)
                ids_TS = ids_T[:, None].expand(-1, passes).to(self.device)
                values.append(
                    model(ids_TS, torch.full((passes,), len(ids_T), device=self.device), masks).double().cpu()
                )
            group_ratings.append(torch.stack(values).mean(0))
        return self.learned.mean + self.learned.deviation * torch.cat(group_ratings)


Predictor = WordPredictor | RatingPredictor


def predictor_of(learned: Learned, device: torch.device) -> Predictor:
    """Returns the predictor of a model that has learned this beside its weights."""
    return (
        RatingPredictor(learned, device) if isinstance(learned, Ratings) else WordPredictor(learned, device)
    )


def is_unknown_untrained(predictor: Predictor, data: Data) -> bool:
    """Whether the parameters of the unknown word are still those of its initialisation.

    This is so if no word of the training text was unknown. `data`: the settings of the training text.
    """
    if isinstance(predictor, RatingPredictor):
        limit = data.vocabulary_size if isinstance(data, RatedData) else None
        keeps_all = limit is None or len(predictor.ids) < limit
        return isinstance(data, RatedData) and data.min_count == 1 and keeps_all
    # where training has no <unk>, a text whose words are counted has it at the end of the vocabulary
    return isinstance(data, CountedText) and predictor.learned.unknown == predictor.vocabulary[-1]


def cut(words: list[str], ids: dict[str, int], chunk_words: int | None) -> list[Tensor]:
    """Returns a text as sequences of `chunk_words` ids, the last one shorter; the text's first is <start>."""
    ids_N = torch.tensor([START, *(ids.get(word, UNKNOWN) for word in words)])
    return list(torch.split(ids_N, chunk_words or len(ids_N)))
