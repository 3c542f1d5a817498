"""A number from a text: the rating of a film review.

T time steps of a batch  B sequences of a batch  N sequences of a part  R texts of a part  S passes of MC
dropout
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from vdrop_cli import corpora, interruption, ridge
from vdrop_cli.assessment import Assessment
from vdrop_cli.corpora import Rated
from vdrop_cli.dropout import ModelMasks, draw, to_device
from vdrop_cli.errors import ConfigError
from vdrop_cli.intervals import conformal_scores
from vdrop_cli.layers import State
from vdrop_cli.learned import Ratings
from vdrop_cli.measured import Measured
from vdrop_cli.model import Regressor
from vdrop_cli.monte_carlo import sample_counts, std
from vdrop_cli.policies import Dropout, WordMask
from vdrop_cli.random_streams import Stream
from vdrop_cli.settings.choices import SplitProtocol
from vdrop_cli.settings.data import CornellReviews, RatedData
from vdrop_cli.settings.task import SentimentTask
from vdrop_cli.settings.train import Model
from vdrop_cli.tasks.objective import Objective
from vdrop_cli.tasks.predictors import START, UNKNOWN, RatingPredictor, cut
from vdrop_cli.uncertainty import MIN_NOISE, Predictive, fit_noise, rmse

TEST, VALID = 0.2, 0.1  # of the texts
READ_AT_ONCE = 256  # sequences, without gradients


class Batch(NamedTuple):
    """Sequences side by side, each as long as its length says; targets are standardised ratings.

    `words` is the sum of the lengths, which cannot be read from a GPU without a wait for it.
    """

    number: int
    ids_TB: Tensor
    lengths_B: Tensor
    targets_B: Tensor
    words: int


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
        """The length of each text."""
        sums_R = torch.zeros(len(self.ratings_R), dtype=torch.int64)
        return sums_R.index_add(0, self.text_N, torch.tensor(self.lengths))


class Doubt(NamedTuple):
    """Why the ratings of a part say little."""

    message: str
    is_of_measures: bool  # whether likelihood and coverage lose their meaning, too


def shuffled(texts: int, seed: int) -> list[int]:
    """Their numbers in the order of the authors' code, which shuffles with NumPy's generator, seeded with
    0.
    """
    order = list(range(texts))
    numpy.random.RandomState(seed).shuffle(order)
    return order


def split(rated: Rated, seed: int) -> dict[str, list[int]]:
    """The texts of each part: 70 % train, 10 % valid, 20 % test, or the source's own, a missing valid part
    being taken from train.
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
    """Ids of the vocabulary's words in order of frequency; equally frequent words in order of appearance."""
    counts = Counter(word for text in texts for word in text)
    words = [word for word, count in counts.most_common(data.vocabulary_size) if count >= data.min_count]
    return {word: number for number, word in enumerate(words, UNKNOWN + 1)}


class Sentiment:
    """The ratings of texts. How texts are split, and what is reported, are the protocol's: see
    `SplitProtocol`.
    """

    word_dropout = True

    def __init__(self, task: SentimentTask, data: RatedData, rated: Rated, device: torch.device) -> None:
        self.protocol = task.protocol
        self.batch_size = task.batch_size
        self.pool = task.length_pool
        self.device = device
        self.chunk_words = task.chunk_words
        self.origin = corpora.with_fraction(rated.origin, data.fraction)
        as_read = (
            f"{rated.fingerprint} {data.vocabulary_size} {data.min_count} {task.protocol} "
            f"{task.split_seed} {task.chunk_words}"
        )
        as_read += f" fraction {data.fraction}" if data.fraction != 1 else ""
        self.fingerprint = hashlib.sha256(as_read.encode()).hexdigest()
        self.selection_metric = "test_rmse" if self.protocol is SplitProtocol.paper else "valid_rmse"
        if self.protocol is SplitProtocol.paper and rated.parts:
            raise ConfigError(
                f"task.protocol must be clean with {rated.origin}, which has parts of its own, got paper"
            )
        if self.protocol is SplitProtocol.paper:
            # that chunks of the text at the border may lie on both sides, and that all texts give the
            # vocabulary, is the authors'
            self.ids = vocabulary(rated.texts, data)
            order = shuffled(len(rated.texts), task.split_seed)
            chunks = [(text, [chunk]) for text in order for chunk in self.cut(rated.texts[text])]
            train = int(len(chunks) * (1 - TEST))
            texts_by_part = {"train": chunks[:train], "test": chunks[train:]}
        else:
            texts = split(rated, task.split_seed)
            self.ids = vocabulary([rated.texts[text] for text in texts["train"]], data)
            texts_by_part = {
                part: [(text, self.cut(rated.texts[text])) for text in texts[part]] for part in texts
            }
        train_texts = texts_by_part["train"]  # in random order
        texts_by_part["train"] = train_texts[: corpora.first_part(len(train_texts), data.fraction)]
        self.parts = {part: part_of(texts, rated) for part, texts in texts_by_part.items()}
        for part, part_content in self.parts.items():
            if not part_content.sequences:
                raise ConfigError(
                    f"data: the {part} part of {self.origin} is empty, of {len(rated.texts)} texts; give "
                    "it more"
                )
            if all(sequence.tolist() == [START] for sequence in part_content.sequences):
                raise ConfigError(
                    f"data: no text of the {part} part of {self.origin} has words; choose another data.column"
                )
        ratings_R = self.parts["train"].ratings_R
        self.mean, self.deviation = ratings_R.mean().item(), ratings_R.std(correction=0).item()
        if ratings_R.min() == ratings_R.max():
            raise ConfigError(
                f"data: the train part of {self.origin} has one rating, {self.mean:g}, for all; there is "
                "nothing to learn"
            )
        doubts = [
            doubt
            for part in self.parts
            if part != "train" and (doubt := self.doubt(part, part in rated.parts))
        ]
        self.are_measures_in_doubt = any(doubt.is_of_measures for doubt in doubts)
        self.warnings = [*without_words(rated), *(doubt.message for doubt in doubts)]
        splitting = "cornell" if isinstance(data, CornellReviews) else "plain"
        learned = Ratings(
            list(self.ids), self.mean, self.deviation, self.chunk_words, splitting, self.noise_part
        )
        self.predictor = RatingPredictor(learned, device)

    def doubt(self, part: str, own: bool) -> Doubt | None:
        """Why the ratings of a part say little. `own`: the source says which texts it has; else they were
        drawn here, and it is chance.

        Raises ConfigError where the best epoch would be chosen by ratings that cannot be meant.
        """
        train_R, ratings_R = self.parts["train"].ratings_R, self.parts[part].ratings_R
        low = train_R.min().item()
        high = train_R.max().item()
        first = ratings_R[0].item()
        named = f"ratings of the {part} part of {self.origin}"
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

    def assess(self, passes: dict[str, Tensor], suffix: str) -> Measured:
        """What passes, [S, R] by part, say of the test part beside its error; names of metrics end with
        `suffix`. The noise is fitted to as many texts as there are passes of `noise_part`.

        Without what loses its meaning where its ratings are in doubt, or those that the noise is fitted to.
        """
        test, fitted = self.parts["test"], self.parts[self.noise_part]
        fitted_R = fitted.ratings_R[: passes[self.noise_part].shape[1]]
        noise = fit_noise(passes[self.noise_part], fitted_R)
        if self.are_measures_in_doubt:
            return Measured({f"noise{suffix}": noise}, {})
        has_validation = self.noise_part == "valid"
        assessment = Assessment(
            Predictive(passes["test"], noise),
            test.ratings_R,
            test.tokens_R,
            conformal_scores(Predictive(passes["valid"], noise), fitted_R) if has_validation else None,
            test.sources,
        )
        return Measured(assessment.metrics(suffix), assessment.tables(), assessment)

    def cut(self, words: list[str]) -> list[Tensor]:
        return cut(words, self.ids, self.chunk_words)

    def learned(self, measured: dict[str, float] | None) -> Ratings:
        """The error of the standard approximation on the part for it is what `fit_noise` makes of that
        alone.
        """
        noise = max(measured[f"{self.noise_part}_rmse"], MIN_NOISE) if measured is not None else None
        return replace(self.predictor.learned, noise=noise)

    @property
    def can_be_captured(self) -> bool:
        """Whether `loss` can be a CUDA graph: no, as a batch is as long as its longest text."""
        return False

    @property
    def part_sizes(self) -> dict[str, str]:
        return {
            name: f"{len(part.sequences):,} sequences of {sum(part.lengths):,} tokens"
            for name, part in self.parts.items()
        }

    @property
    def batches_an_epoch(self) -> int:
        return -(-len(self.parts["train"].sequences) // self.batch_size)

    def batches(self, order: Stream) -> Iterator[Batch]:
        """Sequences in random order; of `length_pool` batches that are drawn together, those of like length
        are read together.

        Within a batch the longest comes first, which saves the cells sorting them.
        """
        train, generator = self.parts["train"], order.generator()
        shuffled, lengths = torch.randperm(len(train.sequences), generator=generator).tolist(), train.lengths
        size, number = self.batch_size, 0
        for start in range(0, len(shuffled), size * self.pool):
            pool = sorted(shuffled[start : start + size * self.pool], key=lengths.__getitem__, reverse=True)
            groups = [pool[first : first + size] for first in range(0, len(pool), size)]
            for group in (
                torch.randperm(len(groups), generator=generator).tolist()
                if self.pool > 1
                else range(len(groups))
            ):
                yield self.batch(train, groups[group], number)
                number += 1

    def batch(self, part: Part, group: list[int], number: int) -> Batch:
        chosen = [part.sequences[n] for n in group]
        lengths = [len(sequence) for sequence in chosen]
        ratings_B = part.ratings_R[part.text_N[group]]
        return Batch(
            number,
            to_device(torch.nn.utils.rnn.pad_sequence(chosen), self.device),
            to_device(torch.tensor(lengths), self.device),
            to_device(((ratings_B - self.mean) / self.deviation).float(), self.device),
            sum(lengths),
        )

    def words(self, batch: Batch) -> int:
        return batch.words

    def model(
        self, model: Model, dropout: Dropout, backend: str, compute_dtype: torch.dtype | None
    ) -> Regressor:
        return self.predictor.model(model, dropout, backend, compute_dtype)

    def zero_state(self, model: Regressor) -> State:
        return ()

    def masks(self, model: Regressor, batch: Batch, stream: Stream) -> ModelMasks:
        time, sequences = batch.ids_TB.shape
        return model.host_masks(time, sequences, stream)

    def loss(self, model: Regressor, batch: Batch, state: State, masks: ModelMasks) -> Objective:
        """Mean squared error of standardised ratings."""
        predicted_B = model(batch.ids_TB, batch.lengths_B, masks)
        loss = torch.nn.functional.mse_loss(predicted_B, batch.targets_B)
        return Objective(loss, loss, ())

    def reported_loss(self, loss: float, words: int) -> float:
        return loss

    def train_metrics(self, loss: float) -> dict[str, float]:
        """In rating units; with dropout."""
        return {"train_rmse_dropout": loss**0.5 * self.deviation}

    def epoch_metrics(self, loss: float, measured: dict[str, float]) -> dict[str, float]:
        return self.train_metrics(loss) | measured

    def by_length(self, part: Part) -> Iterator[tuple[list[int], Batch]]:
        """All sequences of a part and their numbers, those of like length together, which saves padding and
        changes nothing.
        """
        order = sorted(range(len(part.sequences)), key=part.lengths.__getitem__, reverse=True)
        for number, first in enumerate(range(0, len(order), READ_AT_ONCE)):
            group = order[first : first + READ_AT_ONCE]
            yield group, self.batch(part, group, number)

    def ratings(self, values_N: Tensor, part: Part) -> Tensor:
        """What the model gave for sequences as a rating for each text [R]: the mean over its sequences."""
        return self.mean + self.deviation * mean_of_texts(values_N, part)

    @torch.no_grad()
    def predict(self, model: Regressor, part: Part) -> Tensor:
        """A rating for each text [R], by the standard approximation."""
        output_N = torch.empty(len(part.sequences))
        for group, batch in self.by_length(part):
            interruption.check()
            output_N[group] = model(batch.ids_TB, batch.lengths_B, model.mean_masks()).float().cpu()
        return self.ratings(output_N, part)

    def rmse(self, model: Regressor, part: Part) -> float:
        return rmse(self.predict(model, part), part.ratings_R)

    @property
    def noise_part(self) -> str:
        """On which the observation noise is fitted; Deviation: the authors set τ by hand."""
        return "train" if self.protocol is SplitProtocol.paper else "valid"

    def sample(self, name: str) -> Part:
        """A part; of the training part only as many texts as the test part has, the first ones."""
        return (
            head(self.parts[name], len(self.parts["test"].ratings_R)) if name == "train" else self.parts[name]
        )

    def validate(self, model: Regressor) -> dict[str, float]:
        """The training part as a sample."""
        return {f"{name}_rmse": self.rmse(model, self.sample(name)) for name in self.parts}

    @cached_property
    def baselines(self) -> dict[str, float]:
        """What predicting the training part's mean gives, and ridge regression on TF-IDF, where scikit-learn
        is.
        """
        test_R = self.parts["test"].ratings_R
        metrics = {"test_rmse_of_mean": rmse(torch.full_like(test_R, self.mean), test_R)}
        if ridge.is_available():
            texts = {name: (texts_of(part), part.ratings_R) for name, part in self.parts.items()}
            metrics["test_rmse_of_ridge"] = rmse(
                ridge.ridge(texts["train"], texts["test"], texts.get("valid")), test_R
            )
        else:
            print(
                "vdrop: ridge regression is left out, it takes pip install 'vdrop[baselines]'",
                file=sys.stderr,
            )
        return metrics

    def evaluate(self, model: Regressor) -> Measured:
        """Everything the standard approximation gives, beside the baselines."""
        predicted = {name: self.predict(model, part) for name, part in self.parts.items()}
        errors = {f"{name}_rmse": rmse(predicted[name], part.ratings_R) for name, part in self.parts.items()}
        texts = len(self.sample(self.noise_part).ratings_R)
        passes = {self.noise_part: predicted[self.noise_part][None, :texts], "test": predicted["test"][None]}
        assessed = self.assess(passes, "")
        return assessed._replace(metrics=errors | self.baselines | assessed.metrics)

    def result(self, model: Regressor, best_epoch: int, best: float) -> dict[str, float]:
        """With the paper's protocol the best epoch on the test part, too."""
        measured = self.evaluate(model).metrics
        if self.protocol is SplitProtocol.paper:
            measured |= {"test_rmse_chosen_on_test": best, "epoch_chosen_on_test": best_epoch}
        return measured

    def passes(
        self, model: Regressor, samples: int, together: int, seed: int, word_dropout: bool
    ) -> "Passes":
        return Passes(self, [model], samples, seed, word_dropout)

    def pooled_passes(self, models: list[Regressor], samples: int, seed: int, word_dropout: bool) -> "Passes":
        """MC dropout with `samples` passes of each model."""
        return Passes(self, models, samples, seed, word_dropout)

    def ensemble(self, models: Iterable[Regressor]) -> Measured:
        """Of the mean of the ratings that all models give, with their spread as the model's uncertainty."""
        parts = {name: self.sample(name) for name in (self.noise_part, "test")}
        predicted = [{name: self.predict(model, part) for name, part in parts.items()} for model in models]
        passes = {name: torch.stack([member[name] for member in predicted]) for name in parts}
        errors = {
            f"{name}_rmse": rmse(passes[name].mean(0), part.ratings_R)
            for name, part in parts.items()
            if name != "train"
        }
        assessed = self.assess(passes, "")
        return assessed._replace(metrics=errors | self.baselines | assessed.metrics)


class Passes:
    """MC dropout (Gal & Ghahramani 2016, section 5.2): so many passes with masks of their own for each
    sequence.

    The models of an ensemble make `samples` passes each, in turn, so that a group of successive passes
    spreads over all models.

    `word_dropout` keeps the word masks on, as the authors do here. It can be stopped after any batch and
    resumes to the same result bit for bit, from what `state_dict` gives.
    """

    def __init__(
        self, task: Sentiment, models: list[Regressor], samples: int, seed: int, word_dropout: bool
    ) -> None:
        self.dropouts = [
            model.dropout if word_dropout else replace(model.dropout, p_word=0.0, word_mask=WordMask.type)
            for model in models
        ]
        self.task = task
        self.models = models
        self.samples = samples  # of each model
        self.pooled = samples * len(models)  # S, passes of all models
        self.stream = Stream((seed, "mc"))
        self.parts = {name: task.sample(name) for name in (task.noise_part, "test")}
        self.work = [(name, *batch) for name, part in self.parts.items() for batch in task.by_length(part)]
        self.done = 0  # batches, over all passes
        self.values_SN = {
            name: torch.zeros(self.pooled, len(part.sequences)) for name, part in self.parts.items()
        }

    @property
    def words(self) -> int:
        """How many were read, over all passes."""
        whole, rest = divmod(self.done, len(self.work))
        return whole * sum(self.task.words(batch) for _, _, batch in self.work) + sum(
            self.task.words(b) for _, _, b in self.work[:rest]
        )

    @property
    def total(self) -> int:
        """How many there are to read."""
        return self.pooled * sum(self.task.words(batch) for _, _, batch in self.work)

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "values": self.values_SN}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Raises ValueError, and changes nothing, where it is not a state of such passes."""
        done, values = saved.get("done"), saved.get("values")
        if (
            type(done) is not int
            or not 0 <= done <= self.pooled * len(self.work)
            or not isinstance(values, dict)
        ):
            raise ValueError("its passes are not counted")
        if set(values) != set(self.values_SN):
            raise ValueError("its passes are of other parts")
        for name, value_SN in self.values_SN.items():
            stored_SN = values[name]
            fits = (
                isinstance(stored_SN, Tensor)
                and stored_SN.shape == value_SN.shape
                and stored_SN.dtype == value_SN.dtype
            )
            if not (fits and bool(stored_SN.isfinite().all())):
                raise ValueError("its passes are of other texts, or not finite")
        self.done, self.values_SN = done, values

    @torch.no_grad()
    def run(self) -> Iterator[int]:
        """Reads on to the end; yields how many words a batch had."""
        while self.done < self.pooled * len(self.work):
            number, at = divmod(self.done, len(self.work))
            name, group, batch = self.work[at]
            member = number % len(self.models)
            model, dropout = self.models[member], self.dropouts[member]
            shape = model.mask_shape(*batch.ids_TB.shape)
            stream = self.stream.at(number, name, batch.number)
            masks = draw(dropout, shape, stream, self.task.device, outputs=model.outputs)
            self.values_SN[name][number, group] = model(batch.ids_TB, batch.lengths_B, masks).float().cpu()
            self.done += 1
            yield self.task.words(batch)

    def ratings(self, name: str) -> Tensor:
        """Of every pass and text of a part, [S, R]."""
        return torch.stack(
            [self.task.ratings(values_N, self.parts[name]) for values_N in self.values_SN[name]]
        )

    def results(self) -> Measured:
        """The metrics, and the error by number of passes."""
        test_SR = self.ratings("test")
        test_R = self.parts["test"].ratings_R
        suffix = f"_mc{self.samples}"
        rows = []
        for number in sample_counts(self.pooled):
            groups = [
                rmse(group_SR.mean(0), test_R)
                for group_SR in torch.split(test_SR, number)
                if len(group_SR) == number
            ]
            rows.append(
                {
                    "samples": number,
                    "rmse": sum(groups) / len(groups),
                    "deviation": std(groups),
                    "groups": len(groups),
                }
            )
        assessed = self.task.assess({name: self.ratings(name) for name in self.parts}, suffix)
        metrics = {f"test_rmse{suffix}": rmse(test_SR.mean(0), test_R)} | assessed.metrics
        return Measured(metrics, {"mc": rows} | assessed.tables, assessed.assessment)


def without_words(rated: Rated) -> list[str]:
    """A warning where there are such texts."""
    wordless = rated.without_words
    if not wordless:
        return []
    first = rated.places[wordless[0]] if rated.places else f"text {wordless[0] + 1}"
    return [
        f"{len(wordless):,} of {len(rated.texts):,} texts of {rated.origin} have no words, first {first}; "
        "all are predicted the same rating"
    ]


def texts_of(part: Part) -> list[list[int]]:
    """The ids of each text, its sequences one after the other."""
    texts: list[list[int]] = [[] for _ in part.ratings_R]
    for sequence, text in zip(part.sequences, part.text_N.tolist(), strict=True):
        texts[text] += sequence.tolist()
    return texts


def part_of(texts: list[tuple[int, list[Tensor]]], rated: Rated) -> Part:
    """`texts` are sequences with the number of their text in `rated`."""
    sequences = [sequence for _, group in texts for sequence in group]
    text_N = torch.tensor([text for text, (_, group) in enumerate(texts) for _ in group])
    ratings = [rated.ratings[number] for number, _ in texts]
    sources = [rated.sources[number] for number, _ in texts] if rated.sources else []
    return Part(sequences, text_N, torch.tensor(ratings, dtype=torch.float64), sources)


def head(part: Part, texts: int) -> Part:
    """The first texts of a part."""
    sequences = int((part.text_N < texts).sum())
    return Part(
        part.sequences[:sequences], part.text_N[:sequences], part.ratings_R[:texts], part.sources[:texts]
    )


def mean_of_texts(values_N: Tensor, part: Part) -> Tensor:
    """The mean over each text's sequences [R]."""
    sums_R = torch.zeros(len(part.ratings_R), dtype=torch.float64).index_add(
        0, part.text_N, values_N.double()
    )
    return sums_R / part.text_N.bincount(minlength=len(sums_R))
