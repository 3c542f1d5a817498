"""Texts with ratings as the sequences that a model of ratings reads.

This file splits the texts into parts, and checks whether the ratings of each part are meaningful.

N sequences of a part  R texts of a part  I ids of a part
"""

import hashlib
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from vdrop_cli import corpora
from vdrop_cli.corpora import Rated
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.choices import SplitProtocol
from vdrop_cli.settings.data import RatedData
from vdrop_cli.settings.task import SentimentTask
from vdrop_cli.tasks.predictors import START, UNKNOWN, cut

TEST, VALID = 0.2, 0.1  # of the texts


class Part(NamedTuple):
    """Texts cut into sequences."""

    sequences: list[Tensor]  # ids
    text_N: Tensor  # of which text each sequence is
    ratings_R: Tensor  # of the texts
    sources: list[str]  # of each text, such as its reviewer; empty: unknown

    @property
    def lengths(self) -> list[int]:
        return [len(sequence) for sequence in self.sequences]

    @property
    def tokens_R(self) -> Tensor:
        """The length of each text [R], in ids."""
        sums_R = torch.zeros(len(self.ratings_R), dtype=torch.int64)
        return sums_R.index_add(0, self.text_N, torch.tensor(self.lengths))

    @property
    def unknown_share(self) -> float:
        """The share of unknown words among the words."""
        ids_I = torch.cat(self.sequences)
        return int((ids_I == UNKNOWN).sum()) / max(1, int((ids_I != START).sum()))


def part_of(texts: list[tuple[int, list[Tensor]]], rated: Rated) -> Part:
    """Returns a part of some texts: the number of each in `rated`, and its sequences."""
    sequences = [sequence for _, group in texts for sequence in group]
    text_N = torch.tensor([text for text, (_, group) in enumerate(texts) for _ in group])
    ratings = [rated.ratings[number] for number, _ in texts]
    sources = [rated.sources[number] for number, _ in texts] if rated.sources else []
    return Part(sequences, text_N, torch.tensor(ratings, dtype=torch.float64), sources)


def first_texts(part: Part, texts: int) -> Part:
    """Returns the first texts of a part."""
    sequences = int((part.text_N < texts).sum())
    return Part(
        part.sequences[:sequences], part.text_N[:sequences], part.ratings_R[:texts], part.sources[:texts]
    )


def texts_of(part: Part) -> list[list[int]]:
    """Returns the ids of each text, its sequences one after the other."""
    texts: list[list[int]] = [[] for _ in part.ratings_R]
    for sequence, text in zip(part.sequences, part.text_N.tolist(), strict=True):
        texts[text] += sequence.tolist()
    return texts


def mean_of_texts(values_N: Tensor, part: Part) -> Tensor:
    """Returns the mean over each text's sequences [R]."""
    sums_R = torch.zeros(len(part.ratings_R), dtype=torch.float64).index_add(
        0, part.text_N, values_N.double()
    )
    return sums_R / part.text_N.bincount(minlength=len(sums_R))


def task_fingerprint(rated: Rated, data: RatedData, task: SentimentTask) -> str:
    """Returns a digest of the texts and of the settings that determine vocabulary, split and chunks."""
    as_read = (
        f"{rated.fingerprint} {data.vocabulary_size} {data.min_count} {task.protocol} "
        f"{task.split_seed} {task.chunk_words}"
    )
    as_read += f" fraction {data.fraction}" if data.fraction != 1 else ""
    return hashlib.sha256(as_read.encode()).hexdigest()


def shuffled(texts: int, seed: int) -> list[int]:
    """Returns the numbers of so many texts, shuffled by NumPy's generator with this seed. The authors' code
    does the same with the seed 0.
    """
    order = list(range(texts))
    numpy.random.RandomState(seed).shuffle(order)
    return order


def split(rated: Rated, seed: int) -> dict[str, list[int]]:
    """Returns the numbers of the texts of each part.

    The parts are 70 % train, 10 % valid and 20 % test, or those of the source. If the source has no valid
    part, an eighth of its train part becomes the valid part.
    """
    order = shuffled(len(rated.texts), seed)
    if rated.parts:
        own = {
            part: [text for text in order if rated.parts[text] == part] for part in ("train", "valid", "test")
        }
        if not own["valid"]:
            first = round(len(own["train"]) * VALID / (1 - TEST))
            own["valid"], own["train"] = own["train"][:first], own["train"][first:]
        return own
    test, valid = round(len(order) * TEST), round(len(order) * VALID)
    return {"train": order[: -test - valid], "valid": order[-test - valid : -test], "test": order[-test:]}


def vocabulary(texts: list[list[str]], data: RatedData) -> dict[str, int]:
    """Returns the ids of the vocabulary's words, the most frequent first; equally frequent words are in order
    of appearance.
    """
    counts = Counter(word for text in texts for word in text)
    words = [word for word, count in counts.most_common(data.vocabulary_size) if count >= data.min_count]
    return {word: number for number, word in enumerate(words, UNKNOWN + 1)}


def split_into_parts(
    rated: Rated, data: RatedData, task: SentimentTask
) -> tuple[dict[str, int], dict[str, Part]]:
    """Returns the ids of the vocabulary's words, and the parts.

    By the paper's protocol the parts are train and test, and they consist of chunks. The vocabulary is then
    that of all texts. The text at the border may have chunks in both parts, as in the authors' code. Raises
    ConfigError for the paper's protocol with a source that has parts of its own.
    """
    if task.protocol is SplitProtocol.paper and rated.parts:
        raise ConfigError(
            f"task.protocol must be clean with {rated.origin}, which has parts of its own, got paper"
        )
    if task.protocol is SplitProtocol.paper:
        ids = vocabulary(rated.texts, data)
        order = shuffled(len(rated.texts), task.split_seed)
        chunks = [
            (text, [chunk]) for text in order for chunk in cut(rated.texts[text], ids, task.chunk_words)
        ]
        train = int(len(chunks) * (1 - TEST))
        texts_by_part = {"train": chunks[:train], "test": chunks[train:]}
    else:
        texts = split(rated, task.split_seed)
        ids = vocabulary([rated.texts[text] for text in texts["train"]], data)
        texts_by_part = {
            part: [(text, cut(rated.texts[text], ids, task.chunk_words)) for text in texts[part]]
            for part in texts
        }
    train_texts = texts_by_part["train"]  # in random order
    texts_by_part["train"] = train_texts[: corpora.first_part(len(train_texts), data.fraction)]
    return ids, {part: part_of(texts, rated) for part, texts in texts_by_part.items()}


def require_vocabulary(ids: dict[str, int], data: RatedData, origin: str) -> None:
    """Raises ConfigError where all words are unknown."""
    if not ids:
        raise ConfigError(
            f"data.min_count={data.min_count}: no word of {origin} occurs so often, and all would be "
            "<unknown>; make it smaller"
        )


def require_usable(parts: dict[str, Part], origin: str, texts: int) -> None:
    """Raises ConfigError where a part has no texts or no words, or the training part has one rating for all.

    `texts` is the number of texts of all parts.
    """
    for name, part in parts.items():
        if not part.sequences:
            raise ConfigError(f"data: the {name} part of {origin} is empty, of {texts} texts; give it more")
        if all(sequence.tolist() == [START] for sequence in part.sequences):
            raise ConfigError(
                f"data: no text of the {name} part of {origin} has words; choose another data.column"
            )
    ratings_R = parts["train"].ratings_R
    if ratings_R.min() == ratings_R.max():
        raise ConfigError(
            f"data: the train part of {origin} has one rating, {ratings_R.mean().item():g}, for all; there "
            "is nothing to learn"
        )


class Doubt(NamedTuple):
    """Why the ratings of a part say little."""

    message: str
    is_of_measures: bool  # whether likelihood and coverage lose their meaning, too


def doubts_about(parts: dict[str, Part], origin: str, own: Collection[str]) -> list[Doubt]:
    """Returns the reasons why the ratings of parts other than the training part are not meaningful.

    `own` are the parts that the source has. Raises ConfigError as `doubt_about` does.
    """
    train_R = parts["train"].ratings_R
    doubts = (
        doubt_about(name, part.ratings_R, train_R, origin, name in own)
        for name, part in parts.items()
        if name != "train"
    )
    return [doubt for doubt in doubts if doubt is not None]


def doubt_about(part: str, ratings_R: Tensor, train_R: Tensor, origin: str, own: bool) -> Doubt | None:
    """Returns the reason why the ratings of a part are not meaningful, or None.

    `own`: whether the source itself has this part; otherwise its texts were drawn here at random. Raises
    ConfigError if the best epoch would be chosen by validation ratings that are all outside the range of the
    training ratings, as where labels are hidden.
    """
    low = train_R.min().item()
    high = train_R.max().item()
    first = ratings_R[0].item()
    named = f"ratings of the {part} part of {origin}"
    little, without = "an error on them says little", "log-likelihood and coverage are left out"
    hidden = f"as where labels are hidden: {little}, and {without}"
    if own and ((ratings_R < low) | (ratings_R > high)).all():
        message = (
            f"all {named} are outside the range of the training part, {low:g} to {high:g} (the first "
            f"is {first:g})"
        )
        if part == "valid":
            raise ConfigError(
                f"data: {message}, so the best epoch cannot be chosen by them; give data.csv a file of "
                "rated texts, to be split here"
            )
        return Doubt(f"{message}, {hidden}", True)
    if len(ratings_R) == 1 or not (ratings_R == first).all():
        return None
    if own:
        return Doubt(f"all {named} are {first:g}, {hidden}", True)
    lost = f", and {without}" if part == "test" else ""
    advice = "give more texts, or choose another task.split_seed"
    return Doubt(
        f"all {len(ratings_R):,} {named}, which was drawn here, are {first:g}: {little}{lost}; {advice}",
        part == "test",
    )


def untrained_unknown(parts: dict[str, Part], origin: str) -> list[str]:
    """Returns a warning where parts have unknown words and training has none, as a list of at most one."""
    shares = {name: part.unknown_share for name, part in parts.items()}
    if shares.pop("train") > 0 or not any(shares.values()):
        return []
    shown = " and ".join(f"{100 * share:.3g} % of the {name} part" for name, share in shares.items() if share)
    return [
        f"{shown} of {origin} are words that the training part does not have; they are read as <unknown>, "
        "which is not trained; data.min_count=2 or more makes it of words that are rare there"
    ]


def copies_in_training(rated: Rated, task: SentimentTask, train_texts: int) -> list[str]:
    """Returns a warning where texts of other parts are in the training part, too, as a list of at most one.

    `train_texts` is the size of the training part. By the paper's protocol the parts are chunks, which are
    not compared.
    """
    if task.protocol is SplitProtocol.paper:
        return []
    numbers = split(rated, task.split_seed)
    others = {tuple(rated.texts[text]) for part in ("valid", "test") for text in numbers[part]} - {()}
    in_both = others.intersection(tuple(rated.texts[text]) for text in numbers["train"][:train_texts])
    shown = []
    for part in ("valid", "test"):
        copies = sum(tuple(rated.texts[text]) in in_both for text in numbers[part])
        shown += [f"{copies:,} of the {len(numbers[part]):,} texts of the {part} part"] if copies else []
    if not shown:
        return []
    return [
        f"{' and '.join(shown)} of {rated.origin} are in the training part, too, word for word, so the error "
        "on them is no error on new texts; leave the copies out of the data if you can"
    ]


def unused_split_seed(rated: Rated, data: RatedData, task: SentimentTask) -> list[str]:
    """Returns a warning where `split_seed` does not decide on the parts, as a list of at most one."""
    if set(rated.parts) != {"train", "valid", "test"} or data.fraction < 1 or task.split_seed == 0:
        return []
    return [
        f"task.split_seed={task.split_seed} changes the order of training texts alone: {rated.origin} has "
        "parts of its own, so this is no other split"
    ]


def without_words(rated: Rated) -> list[str]:
    """Returns a warning where texts have no words, as a list of at most one."""
    wordless = rated.without_words
    if not wordless:
        return []
    first = rated.places[wordless[0]] if rated.places else f"text {wordless[0] + 1}"
    return [
        f"{len(wordless):,} of {len(rated.texts):,} texts of {rated.origin} have no words, first {first}; "
        "all are predicted the same rating"
    ]
