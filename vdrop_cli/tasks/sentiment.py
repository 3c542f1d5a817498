"""Prediction of a number from a text, such as the rating of a film review.

T time steps of a batch  B sequences of a batch  N sequences of a part  R texts of a part  S passes of MC
dropout
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vdrop_cli import corpora, interruption, ridge
from vdrop_cli.assessment import Assessment
from vdrop_cli.corpora import Rated
from vdrop_cli.dropout import ModelMasks, draw, is_fixed, joined_masks, to_device
from vdrop_cli.errors import ConfigError
from vdrop_cli.intervals import conformal_scores
from vdrop_cli.layers import State
from vdrop_cli.learned import Ratings
from vdrop_cli.mc_passes import McPasses, PassOptions, is_numeric, mc_row, sample_counts
from vdrop_cli.measured import Measured
from vdrop_cli.model import Regressor
from vdrop_cli.policies import Dropout
from vdrop_cli.random_streams import Stream
from vdrop_cli.settings.choices import Interval, SplitProtocol
from vdrop_cli.settings.commands import Eval
from vdrop_cli.settings.data import CornellReviews, RatedData
from vdrop_cli.settings.task import SentimentTask
from vdrop_cli.settings.train import Model
from vdrop_cli.tasks.objective import Objective
from vdrop_cli.tasks.predictors import RatingPredictor
from vdrop_cli.tasks.rated_parts import (
    Part,
    copies_in_training,
    doubts_about,
    first_texts,
    mean_of_texts,
    require_usable,
    require_vocabulary,
    split_into_parts,
    task_fingerprint,
    texts_of,
    untrained_unknown,
    unused_split_seed,
    without_words,
)
from vdrop_cli.uncertainty import MIN_NOISE, Predictive, fit_noise, rmse

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


class Sentiment:
    """The ratings of texts. How texts are split, and what is reported, are the protocol's: see
    `SplitProtocol`.
    """

    word_dropout = True
    can_be_captured = False  # in a CUDA graph: a batch is as long as its longest text, so shapes differ

    def __init__(self, task: SentimentTask, data: RatedData, rated: Rated, device: torch.device) -> None:
        self.protocol = task.protocol
        self.batch_size = task.batch_size
        self.pool = task.length_pool
        self.device = device
        self.origin = corpora.with_fraction(rated.origin, data.fraction)
        self.fingerprint = task_fingerprint(rated, data, task)
        self.selection_metric = "test_rmse" if self.protocol is SplitProtocol.paper else "valid_rmse"
        self.ids, self.parts = split_into_parts(rated, data, task)
        require_usable(self.parts, self.origin, len(rated.texts))
        require_vocabulary(self.ids, data, self.origin)
        ratings_R = self.parts["train"].ratings_R
        self.mean, self.deviation = ratings_R.mean().item(), ratings_R.std(correction=0).item()
        doubts = doubts_about(self.parts, self.origin, rated.parts)
        self.are_measures_in_doubt = any(doubt.is_of_measures for doubt in doubts)
        self.warnings = [
            *without_words(rated),
            *unused_split_seed(rated, data, task),
            *untrained_unknown(self.parts, self.origin),
            *copies_in_training(rated, task, len(ratings_R)),
            *(doubt.message for doubt in doubts),
        ]
        splitting = "cornell" if isinstance(data, CornellReviews) else "plain"
        learned = Ratings(
            list(self.ids), self.mean, self.deviation, task.chunk_words, splitting, self.noise_part
        )
        self.predictor = RatingPredictor(learned, device)

    def assess(self, passes: dict[str, Tensor], suffix: str) -> Measured:
        """Returns the measures of the test part other than its error; names of metrics end with `suffix`.

        `passes` are the predictions for each part, [S, R]. The observation noise is fitted to those of
        `noise_part`, which may be only its first texts. If the ratings of the test part or of the validation
        part are in doubt, the result is only the noise, because the other measures lose their meaning.
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

    def learned(self, measured: dict[str, float] | None) -> Ratings:
        """Returns what prediction needs beside the weights. The noise is the error of the standard
        approximation on `noise_part`, as `fit_noise` gives it of a single pass.
        """
        noise = max(measured[f"{self.noise_part}_rmse"], MIN_NOISE) if measured is not None else None
        return replace(self.predictor.learned, noise=noise)

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
        """Yields batches of sequences in random order.

        `length_pool` batches are drawn together and sorted by length, so each of them has sequences of
        similar length. Within a batch the longest sequence comes first, so the cells need not sort them.
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
        """Returns the mean squared error of standardised ratings."""
        predicted_B = model(batch.ids_TB, batch.lengths_B, masks)
        loss = torch.nn.functional.mse_loss(predicted_B, batch.targets_B)
        return Objective(loss, loss, ())

    def reported_loss(self, loss: float, words: int) -> float:
        return loss

    def train_metrics(self, loss: float) -> dict[str, float]:
        """Returns the error on the training part with dropout, in rating units."""
        return {"train_rmse_dropout": loss**0.5 * self.deviation}

    def epoch_metrics(self, loss: float, measured: dict[str, float]) -> dict[str, float]:
        return self.train_metrics(loss) | measured

    def batches_by_length(self, part: Part) -> Iterator[tuple[list[int], Batch]]:
        """Yields all sequences of a part with their numbers, those of like length together, which saves
        padding and changes nothing.
        """
        order = sorted(range(len(part.sequences)), key=part.lengths.__getitem__, reverse=True)
        for number, first in enumerate(range(0, len(order), READ_AT_ONCE)):
            group = order[first : first + READ_AT_ONCE]
            yield group, self.batch(part, group, number)

    def ratings(self, values_N: Tensor, part: Part) -> Tensor:
        """Returns a rating for each text [R] from what the model gave for its sequences: their mean."""
        return self.mean + self.deviation * mean_of_texts(values_N, part)

    @torch.no_grad()
    def predict(self, model: Regressor, part: Part) -> Tensor:
        """Returns a rating for each text [R], by the standard approximation."""
        output_N = torch.empty(len(part.sequences))
        for group, batch in self.batches_by_length(part):
            interruption.check()
            output_N[group] = model(batch.ids_TB, batch.lengths_B, model.mean_masks()).float().cpu()
        return self.ratings(output_N, part)

    def rmse(self, model: Regressor, part: Part) -> float:
        return rmse(self.predict(model, part), part.ratings_R)

    @property
    def noise_part(self) -> str:
        """The part that the observation noise is fitted to. Deviation: the authors set τ by hand."""
        return "train" if self.protocol is SplitProtocol.paper else "valid"

    def sample(self, name: str) -> Part:
        """Returns a part; of the training part the first texts, as many as the test part has."""
        part = self.parts[name]
        return first_texts(part, len(self.parts["test"].ratings_R)) if name == "train" else part

    def validate(self, model: Regressor) -> dict[str, float]:
        """Returns the error on each part, of the training part on the texts of `sample`."""
        return {f"{name}_rmse": self.rmse(model, self.sample(name)) for name in self.parts}

    @cached_property
    def baselines(self) -> dict[str, float]:
        """Returns the test error of predicting the training part's mean, and of ridge regression on TF-IDF
        where scikit-learn is installed.
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
        """Returns all that the standard approximation gives, and the baselines."""
        predicted = {name: self.predict(model, part) for name, part in self.parts.items()}
        errors = {f"{name}_rmse": rmse(predicted[name], part.ratings_R) for name, part in self.parts.items()}
        texts = len(self.sample(self.noise_part).ratings_R)
        passes = {self.noise_part: predicted[self.noise_part][None, :texts], "test": predicted["test"][None]}
        assessed = self.assess(passes, "")
        return assessed._replace(metrics=errors | self.baselines | assessed.metrics)

    def result(self, model: Regressor, best_epoch: int, best: float) -> dict[str, float]:
        """Returns the metrics of `evaluate`; by the paper's protocol the best epoch on the test part, too."""
        measured = self.evaluate(model).metrics
        if self.protocol is SplitProtocol.paper:
            measured |= {"test_rmse_chosen_on_test": best, "epoch_chosen_on_test": best_epoch}
        return measured

    def require_evaluable(self, settings: Eval, path: Path) -> None:
        if settings.interval is Interval.conformal:
            self.predictor.require_validation_part(path, "gaussian, quantile or null")
        if settings.picture is not None and self.are_measures_in_doubt:
            raise ConfigError(
                "picture of ratings shows intervals, which are left out where test ratings say little (see "
                "the warnings of the training); leave it out"
            )

    def measure_standard(self, models: Iterable[Regressor], settings: Eval) -> Measured:
        return self.ensemble(models) if settings.members else self.evaluate(*models)

    def measure_calibration(self, model: Regressor, settings: Eval) -> Measured:
        return Measured({}, {})

    def passes(self, models: list[Regressor], options: PassOptions) -> "RatingPasses":
        """Returns MC dropout with `samples` passes of each model."""
        return RatingPasses(self, models, options)

    def ensemble(self, models: Iterable[Regressor]) -> Measured:
        """Evaluates the mean rating of all models. The spread of their ratings counts as the uncertainty of
        the model.
        """
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


class RatingPasses(McPasses):
    """MC dropout (Gal & Ghahramani 2016, section 5.2): `samples` passes of each model.

    Each text has masks of its own. A pass is a draw of the weights, so masks that are held over a sequence
    are the same for all sequences of a text. Masks on weights are the same for all texts.

    The models of an ensemble take turns, so a group of successive passes is spread over all models.

    With `word_dropout` words are dropped, too, as the authors do here. The passes can stop after any batch.
    """

    def __init__(self, task: Sentiment, models: list[Regressor], options: PassOptions) -> None:
        self.dropouts = [
            model.dropout if options.word_dropout else model.dropout.without_words() for model in models
        ]
        self.task = task
        self.models = models
        self.samples = options.samples  # of each model
        self.pooled = options.samples * len(models)  # S, passes of all models
        self.stream = Stream((options.seed, "mc"))
        self.parts = {name: task.sample(name) for name in (task.noise_part, "test")}
        self.work = [
            (name, *batch) for name, part in self.parts.items() for batch in task.batches_by_length(part)
        ]
        self.done = 0  # batches that are finished, over all passes
        # the last pass and part, and its masks for each text
        self.text_masks: tuple[tuple[int, str], ModelMasks] | None = None
        self.values_SN = {
            name: torch.zeros(self.pooled, len(part.sequences)) for name, part in self.parts.items()
        }

    @property
    def words(self) -> int:
        whole, rest = divmod(self.done, len(self.work))
        return whole * sum(self.task.words(batch) for _, _, batch in self.work) + sum(
            self.task.words(b) for _, _, b in self.work[:rest]
        )

    @property
    def total(self) -> int:
        return self.pooled * sum(self.task.words(batch) for _, _, batch in self.work)

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "values": self.values_SN}

    def require_fitting(self, state: dict[str, Any]) -> None:
        done, values = state.get("done"), state.get("values")
        if (
            type(done) is not int
            or not 0 <= done <= self.pooled * len(self.work)
            or not isinstance(values, dict)
        ):
            raise ValueError("its passes are not counted")
        if set(values) != set(self.values_SN):
            raise ValueError("its passes are of other parts")
        for name, own_SN in self.values_SN.items():
            if not (is_numeric(values[name], own_SN.shape, own_SN.dtype) and values[name].isfinite().all()):
                raise ValueError("its passes are of other texts, or not finite")

    def restore(self, state: dict[str, Any]) -> None:
        self.done, self.values_SN = state["done"], state["values"]

    @torch.no_grad()
    def run(self) -> Iterator[int]:
        while self.done < self.pooled * len(self.work):
            number, at = divmod(self.done, len(self.work))
            name, group, batch = self.work[at]
            model = self.models[number % len(self.models)]
            masks = self.masks(number, name, group, batch).to(self.task.device)
            self.values_SN[name][number, group] = model(batch.ids_TB, batch.lengths_B, masks).float().cpu()
            self.done += 1
            yield self.task.words(batch)

    def masks(self, number: int, name: str, group: list[int], batch: Batch) -> ModelMasks:
        """Returns the masks of a batch in a pass, on the CPU; `group` are the numbers of its sequences."""
        member, part = number % len(self.models), self.parts[name]
        model, dropout = self.models[member], self.dropouts[member]
        if self.text_masks is None or self.text_masks[0] != (number, name):
            shape = model.mask_shape(1, len(part.ratings_R))
            self.text_masks = ((number, name), draw(dropout, shape, self.stream.at(number, name)))
        masks = self.text_masks[1].rows(part.text_N[group])
        if is_fixed(dropout):
            return masks
        stream, shape = self.stream.at(number, name, batch.number), model.mask_shape(*batch.ids_TB.shape)
        return joined_masks(draw(dropout, shape, stream, outputs=model.outputs), masks, dropout)

    def ratings(self, name: str) -> Tensor:
        """Returns the ratings of every pass and text of a part, [S, R]."""
        return torch.stack(
            [self.task.ratings(values_N, self.parts[name]) for values_N in self.values_SN[name]]
        )

    def results(self) -> Measured:
        """Returns the metrics, and the error by number of passes."""
        test_SR = self.ratings("test")
        test_R = self.parts["test"].ratings_R
        suffix = f"_mc{self.samples}"
        rows = []
        for count in sample_counts(self.pooled):
            groups = [group_SR for group_SR in torch.split(test_SR, count) if len(group_SR) == count]
            rows.append(mc_row("rmse", count, [rmse(group_SR.mean(0), test_R) for group_SR in groups]))
        assessed = self.task.assess({name: self.ratings(name) for name in self.parts}, suffix)
        metrics = {f"test_rmse{suffix}": rmse(test_SR.mean(0), test_R)} | assessed.metrics
        return Measured(metrics, {"mc": rows} | assessed.tables, assessed.assessment)
