"""A training run as a generator of log records. It resumes from its newest good checkpoint."""

import json
import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from vdrop_cli import checkpoint, continuation, files, interruption, learned, prefetch, stuck_starts
from vdrop_cli.averaging import Average, average_begins
from vdrop_cli.checkpoint import Checkpoint, TrainingState, Unusable
from vdrop_cli.device import COMPUTE_DTYPES, choose_backend, choose_precision
from vdrop_cli.dropout import ModelMasks
from vdrop_cli.errors import ConfigError, RunError, require
from vdrop_cli.gradient_step import GradientStep, graphs_of_steps
from vdrop_cli.interruption import Interrupted
from vdrop_cli.learning_rate import LearningRate, falls_after
from vdrop_cli.optimizer import LossAndNorm, Optimizer
from vdrop_cli.provenance import describe
from vdrop_cli.random_streams import Stream
from vdrop_cli.run_files import RESULT
from vdrop_cli.settings.choices import LoggerName, LrShape
from vdrop_cli.settings.fields import plain
from vdrop_cli.settings.train import Train
from vdrop_cli.sinks import (
    PACKAGES,
    Epoch,
    Evaluating,
    Failure,
    JsonLines,
    Logger,
    Progress,
    Record,
    Result,
    Saving,
    Sink,
    Start,
    Step,
    TensorBoard,
    to_dict,
)
from vdrop_cli.stuck_starts import StuckError
from vdrop_cli.tasks import Task


class Diverged(RunError):
    """The loss, its gradient, the weights or a validation is no longer a finite number."""


class Run:
    """One training run, from its start or from its newest good checkpoint."""

    def __init__(self, settings: Train, task: Task, folder: Path) -> None:
        self.settings = settings
        self.task = task
        self.folder = folder
        self.model = task.model(
            settings.model,
            settings.dropout.to_policy(),
            settings.backend.name,
            COMPUTE_DTYPES[settings.precision],
        )
        self.model.initialise(
            settings.model.init,
            Stream((settings.seed, "init")),
            settings.model.forget_bias,
            settings.model.embedding_std,
        )
        self.progress = TrainingState.at_start()
        self.measured: dict[str, float] | None = None  # by the last validation; None after a further step
        self.model.to(task.device)
        self.optimiser = Optimizer(self.model, settings.schedule)
        self.gradient_step = GradientStep(
            partial(self.task.loss, self.model),
            self.optimiser,
            graphs_of_steps(task.can_be_captured, settings.backend, task.device),
        )
        self.average = Average(self.model, settings.schedule.average_decay or 1.0)
        self.learning_rate = LearningRate(settings.schedule, task.batches_an_epoch, self.total_steps)
        self.state = task.zero_state(self.model)
        # launched steps whose loss was not read yet, and the number of words of each
        self.in_flight = deque[tuple[LossAndNorm, int]]()
        self.best_saved = 0  # the best epoch in the newest checkpoint
        self.clock = self.saved = time.perf_counter()
        if (snapshot := checkpoint.newest(folder, self.require_resumable)) is not None:
            self.restore(snapshot)

    def restore(self, snapshot: Checkpoint) -> None:
        """Continues from a checkpoint of its folder."""
        if self.settings.reports_best and snapshot.best_epoch > 0:
            # read now rather than after all epochs, so that an error comes before training
            self.best_checkpoint(snapshot.best_epoch)
        self.model.load_state_dict(snapshot.model)
        self.progress = snapshot.progress
        self.best_saved = self.progress.best_epoch
        self.optimiser.load_state_dict(snapshot.optimiser, self.step)
        self.average.load_state_dict(snapshot.average, snapshot.averaged)
        check, theirs = self.settings.stuck, snapshot.train.stuck
        is_stricter = check.steps is not None and (check.steps != theirs.steps or check.loss < theirs.loss)
        if snapshot.epoch > 0 and is_stricter:
            print(
                f"vdrop: by its last checkpoint, the start of the run in {self.folder} was not judged by "
                f"stuck.steps={check.steps} and stuck.loss={check.loss:g}, and its first epoch is finished; "
                "force=true trains it from the start",
                file=sys.stderr,
            )
        self.state = (
            tuple(part.to(self.task.device) for part in snapshot.state) if snapshot.state else self.state
        )
        self.clock = self.saved = time.perf_counter()

    def continue_shorter(self) -> Path | None:
        """Continues a shorter run beside this run, and returns its folder.

        Returns None, and does nothing, where this run has a checkpoint or where no shorter run can be used.
        """
        if checkpoint.all_in(self.folder):
            return None
        beginning = continuation.find(
            self.folder, self.settings, self.task, self.model, self.require_resumable
        )
        if beginning is None:
            return None
        continuation.copy(beginning, self.folder)
        self.restore(beginning.newest)
        return beginning.folder

    def require_resumable(self, snapshot: Checkpoint) -> None:
        """Raises ConfigError for a checkpoint of another run, ValueError for one that does not fit."""
        if snapshot.train.run_identity(snapshot.corpus) != self.settings.run_identity(self.task.fingerprint):
            raise ConfigError(
                f"{self.folder} holds a checkpoint of other settings; start over with force=true"
            )
        checkpoint.require_fitting(snapshot.model, self.model)
        steps = self.steps_after(snapshot.epoch) + snapshot.batch
        self.optimiser.require_fitting(snapshot.optimiser, steps)
        shapes = [part.shape for part in self.task.zero_state(self.model)] if snapshot.batch else []
        checkpoint.require_that(
            [part.shape for part in snapshot.state] == shapes,
            "its carried state is of another model, or at another place",
        )
        checkpoint.require_that(
            snapshot.batch <= self.task.batches_an_epoch, "it has more batches than an epoch"
        )

    @property
    def step(self) -> int:
        """Updates made so far."""
        return self.steps_after(self.progress.epoch) + self.progress.batch

    @property
    def lr_falls(self) -> int:
        """How often the learning rate of lr_shape=plateau has fallen by the start of the next epoch."""
        return falls_after(self.settings.schedule, self.progress.validations)

    def steps_after(self, epochs: int) -> int:
        """Returns the number of updates in the first `epochs` epochs."""
        return self.settings.schedule.steps_after(epochs, self.task.batches_an_epoch)

    @property
    def total_steps(self) -> int:
        """Updates of the whole training, unless it stops early."""
        return self.steps_after(self.settings.schedule.epochs)

    @property
    def batches_in_epoch(self) -> int:
        """Batches of the next epoch, which `max_steps` may shorten."""
        epochs = self.progress.epoch
        return self.steps_after(epochs + 1) - self.steps_after(epochs)

    @property
    def place(self) -> str:
        """Returns step and epoch of the last update, for messages."""
        return f"step {self.step} of epoch {self.progress.epoch + (self.progress.batch > 0)}"

    @property
    def should_continue(self) -> bool:
        """Whether there is an epoch left to train, and patience for it."""
        patience = self.settings.schedule.patience
        patient = patience is None or self.progress.epoch - self.progress.best_epoch < patience
        return self.steps_after(self.progress.epoch) < self.total_steps and patient

    def tick(self) -> float:
        """Seconds since the last tick, which are added to those of the run."""
        now = time.perf_counter()
        passed, self.clock = now - self.clock, now
        self.progress.seconds += passed
        self.progress.epoch_seconds += passed
        return passed

    def train_epoch(self) -> Iterator[Step]:
        """Trains for one epoch, or for the rest of an interrupted epoch; yields the finished steps.

        Deviation: an epoch starts from a zero state. The authors' code starts it from the last state of the
        validation pass.
        """
        epoch = self.progress.epoch + 1
        stream = Stream((self.settings.seed, "masks", epoch))
        averages = average_begins(self.settings.schedule, self.progress.validations)
        falls = self.lr_falls

        def draw(batch: Any) -> ModelMasks:
            return self.task.masks(self.model, batch, stream.at(batch.number))

        batches = islice(
            self.task.batches(Stream((self.settings.seed, "order", epoch))),
            self.progress.batch,
            self.batches_in_epoch,
        )
        for batch, masks in prefetch.with_masks(
            batches, draw, self.settings.dropout.to_policy(), self.task.device
        ):
            loss_and_norm_2, self.state = self.gradient_step(batch, self.state, masks)
            self.measured = None
            lr = self.learning_rate.at(self.step + len(self.in_flight), falls)
            numbers = self.optimiser.descend(loss_and_norm_2, lr)
            self.in_flight.append((numbers, self.task.words(batch)))
            if averages:
                self.average.update()
                self.progress.averaged = self.average.count
            yield from self.finish_steps(1 if self.optimiser.delayed else 0)
        yield from self.finish_steps()

    def finish_steps(self, in_flight: int = 0) -> Iterator[Step]:
        """Reads the losses of launched steps until `in_flight` steps are left; yields the finished steps.

        A step is finished once its loss was read, so nothing may be saved while a step is in flight. Raises
        Diverged where a loss or a gradient's norm is not finite.
        """
        epoch, falls = self.progress.epoch + 1, self.lr_falls
        while len(self.in_flight) > in_flight:
            numbers, words = self.in_flight.popleft()
            total, norm = numbers.read()
            loss = self.task.reported_loss(total, words)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise Diverged(
                    f"the loss is {loss} and its gradient's norm {norm} at epoch {epoch}, step "
                    f"{self.step + 1}"
                )
            lr = self.learning_rate.at(self.step, falls)
            self.progress.batch += 1
            self.progress.losses.append(loss)
            self.progress.epoch_words += words
            yield Step(epoch, self.step, loss, norm, lr, words / self.tick())

    def finish_epoch(self) -> Epoch:
        """Validates, records the best epoch, and prepares the next epoch. Raises Diverged."""
        trained, falls = self.progress.epoch_seconds, self.lr_falls
        with self.average.in_model():
            measured = self.task.validate(self.model)
        raw = raw_metrics(self.task.validate(self.model)) if self.average.count else {}
        selected = measured[self.task.selection_metric]
        for name, value in (measured | raw).items():
            if not math.isfinite(value):
                raise Diverged(f"{name} is {value} after epoch {self.progress.epoch + 1}, step {self.step}")
        self.measured = measured
        self.tick()
        loss = sum(self.progress.losses) / len(self.progress.losses)
        seconds = self.progress.epoch_seconds
        speed = self.progress.epoch_words / trained
        self.progress.finish_epoch(selected)
        self.state = self.task.zero_state(self.model)
        if selected < self.progress.best:
            self.progress.best_epoch, self.progress.best = self.progress.epoch, selected
        metrics = self.task.epoch_metrics(loss, measured) | raw
        lr = self.learning_rate.at(self.step - 1, falls)
        return Epoch(self.progress.epoch, self.step, loss, metrics, lr, speed, seconds)

    @property
    def should_save_epoch(self) -> bool:
        """Whether the epoch that has just ended gets a checkpoint."""
        is_best = self.settings.reports_best and self.progress.best_epoch == self.progress.epoch
        return (
            self.progress.epoch % self.settings.checkpoint.epochs == 0 or is_best or not self.should_continue
        )

    @property
    def should_save(self) -> bool:
        """Whether a checkpoint is due within an epoch, because the last one is too old."""
        launched = self.progress.batch + len(self.in_flight)
        return (
            time.perf_counter() - self.saved >= 60 * self.settings.checkpoint.minutes
            and launched < self.batches_in_epoch
        )

    def require_good_start(self) -> None:
        """Raises StuckError if the losses of the first steps show that the start is stuck.

        These losses are known only until the end of the first epoch. After it, the start is not judged.
        """
        start = (
            stuck_starts.judge(self.progress.losses, self.settings.stuck)
            if self.progress.epoch == 0
            else None
        )
        if start is not None:
            raise StuckError(self.folder, start)

    def save(self) -> None:
        """Writes the checkpoint.

        Raises Diverged where a weight is not finite; the earlier checkpoints then stay.
        """
        assert not self.in_flight, "the weights are those of a step whose loss was not read"
        model = {name: t.cpu() for name, t in self.model.state_dict().items()}
        broken = [name for name, tensor in model.items() if not tensor.isfinite().all()]
        if broken:
            raise Diverged(f"{broken[0]} holds a number that is not finite after step {self.step}")
        self.tick()
        checkpoint.save(
            Checkpoint(
                config=self.config,
                corpus=self.task.fingerprint,
                environment=self.environment,
                **vars(self.progress),
                state=[part.cpu() for part in self.state] if self.progress.batch else [],
                model=model,
                optimiser=self.optimiser.state_dict(),
                average={name: tensor.cpu() for name, tensor in self.average.state_dict().items()},
                learned=learned.to_dict(self.task.learned(self.measured)),
            ),
            self.folder,
            self.best_saved,
        )
        self.best_saved, self.saved = self.progress.best_epoch, time.perf_counter()

    @cached_property
    def config(self) -> dict[str, Any]:
        return plain(self.settings)

    @cached_property
    def environment(self) -> dict[str, Any]:
        """The environment at the start: later commits and changes of files do not affect the running code."""
        return describe(self.task.device, self.model.layers.backend, self.settings.precision.name)

    def best_checkpoint(self, epoch: int) -> Checkpoint:
        """Returns the checkpoint of the epoch that is reported.

        Raises ConfigError where it is damaged or gone, or cannot be read now.
        """
        try:
            return checkpoint.at_end_of_epoch(self.folder, epoch, self.model)
        except (Unusable, ValueError):
            path = checkpoint.path_of(self.folder, epoch)
            raise ConfigError(
                f"{path} holds the best epoch so far, and cannot be used; start over with force=true"
            ) from None

    def result(self) -> Result:
        """The metrics of the epoch that is reported."""
        epoch = self.progress.best_epoch if self.settings.reports_best else self.progress.epoch
        if epoch != self.progress.epoch:
            best = self.best_checkpoint(epoch)
            self.model.load_state_dict(best.model)
            self.average.load_state_dict(best.average, best.averaged)
        with self.average.in_model():
            metrics = self.task.result(self.model, self.progress.best_epoch, self.progress.best)
        if self.average.count:
            metrics |= raw_metrics(self.task.evaluate(self.model).metrics)
        if self.settings.schedule.average_decay is not None:
            metrics["averaged"] = self.average.count
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise Diverged(f"{name} is {value} after epoch {epoch}")
        max_steps = self.settings.schedule.max_steps
        return Result(
            epoch,
            self.progress.epoch,
            metrics,
            self.progress.seconds,
            self.task.warnings,
            max_steps if self.step == max_steps else None,
        )


def raw_metrics(measured: dict[str, float]) -> dict[str, float]:
    """Perplexities or errors of the last weights, beside those of their average."""
    return {
        f"{name}_raw": value for name, value in measured.items() if "_ppl" in name or name.endswith("_rmse")
    }


def records(run: Run) -> Iterator[Record]:
    """Trains to the end; yields a record for the start, every step, every epoch, and the result.

    It also yields `Saving` before it writes a checkpoint, and `Evaluating` before the final evaluation. Where
    the process was asked to stop, it saves and raises Interrupted. Raises Diverged, StuckError, and RunError
    where the disk fails.
    """

    def judged(steps: Iterator[Step]) -> Iterator[Step]:
        for step in steps:
            yield step
            if step.step == run.settings.stuck.steps:
                run.require_good_start()

    yield Start(run.config, run.task.fingerprint, run.progress.epoch, run.step, run.environment)
    saved_at = run.step
    run.require_good_start()  # of a resumed run, by steps that were not judged then
    try:
        while run.should_continue:
            for step in judged(run.train_epoch()):
                yield step
                interruption.check()
                if run.should_save:
                    yield from judged(run.finish_steps())
                    yield Saving()
                    run.save()
                    saved_at = run.step
            yield run.finish_epoch()
            if run.should_save_epoch:
                yield Saving()
                run.save()
                saved_at = run.step
            interruption.check()
        yield Evaluating()
        run.gradient_step.close()
        yield run.result()
    except Interrupted as stop:
        yield from run.finish_steps()
        if run.step > saved_at:
            yield Saving()
            run.save()
        raise Interrupted(stop.number, f"saved after {run.place} in {run.folder}") from None


def resolve_auto(settings: Train, device: torch.device) -> Train:
    """Returns the settings with `auto` replaced by the device, back end and precision that are used."""
    backend = choose_backend(settings.backend, device)
    precision = choose_precision(settings.precision, device)
    return replace(settings, device=str(device), backend=backend, precision=precision)


def require_fitting_schedule(settings: Train, task: Task) -> None:
    """Raises ConfigError for a schedule that does not fit the length of the training.

    The start must be judged within the first epoch, since a checkpoint stores the losses of one epoch only.
    Before training ends, the warm-up must end, a learning rate that falls to the end or at a plateau must be
    able to fall, and an average must be able to begin. This is checked here rather than in the settings, so
    that runs which ended before the check can still be read.
    """
    schedule, judged = settings.schedule, settings.stuck.steps
    limit = task.batches_an_epoch
    require(
        judged is None or judged <= limit,
        "stuck.steps",
        f"at most {limit:,}, the batches of an epoch of {task.origin}, or null",
        judged,
    )
    steps = schedule.steps_after(schedule.epochs, limit)
    training = f"{steps:,}, the steps of the training on {task.origin}"
    require(schedule.warmup < steps, "schedule.warmup", f"below {training}", schedule.warmup)
    epochs = f"so many epochs that they have fewer steps than {training}"
    if schedule.falls_to_the_end:
        enough = schedule.max_epoch * limit < steps
        require(enough, "schedule.max_epoch", epochs, schedule.max_epoch)
    # if every gain counts, the first fall needs so many epochs without a better one
    if schedule.lr_shape is LrShape.plateau and schedule.patience is not None and not schedule.plateau_gain:
        require(
            schedule.plateau_epochs < schedule.patience,
            "schedule.plateau_epochs",
            f"below schedule.patience={schedule.patience} (or make that larger), since the run would end "
            "before the learning rate falls",
            schedule.plateau_epochs,
        )
    if schedule.average_from is not None:
        enough = schedule.average_from * limit < steps
        require(enough, "schedule.average_from", epochs, schedule.average_from)
    if schedule.average_is_triggered:
        least = (schedule.average_trigger + 2) * limit
        begins = f"an average can begin within {training} (or schedule.max_steps above {least:,})"
        trigger = schedule.average_trigger
        require(least < steps, "schedule.average_trigger", f"so few epochs that {begins}", trigger)


def last_good(training: Run) -> str:
    """Returns a sentence that says where a run that failed would resume."""
    try:
        snapshot = checkpoint.newest(training.folder, training.require_resumable)
    except ConfigError as error:
        return str(error)
    if snapshot is None:
        return "no checkpoint was written yet"
    return (
        f"the last good checkpoint is {checkpoint.path_of(training.folder, snapshot.epoch, snapshot.batch)}"
    )


def make_folder(folder: Path, settings: Train) -> None:
    """Makes the run folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"outputs={settings.outputs}: {folder} cannot be written ({error.strerror}); choose another "
            "folder"
        ) from None


def chosen_logger(training: Run) -> list[Sink]:
    """The sink of the setting `logger`; an empty list for none."""
    settings, folder = training.settings, training.folder
    config, measures, step = plain(settings), training.task.train_metrics, training.step
    if settings.logger is LoggerName.none:
        return []
    if settings.logger is LoggerName.tensorboard:
        return [TensorBoard(folder, config, settings.log_every, training.progress.epoch, step, measures)]
    package = PACKAGES[settings.logger.name]
    return [Logger(package.name, package.open, folder, config, step > 0, measures)]


def log_to_sinks(training: Run) -> dict[str, Any]:
    """Trains to the end, hands every record to every sink, writes the result and returns it."""
    settings, folder = training.settings, training.folder
    first = training.step
    measures = training.task.train_metrics
    listeners: list[Sink] = [
        JsonLines(folder, settings.log_every, training.progress.epoch, first),
        *chosen_logger(training),
        Progress(training.total_steps, settings.schedule.epochs, first, measures),
    ]
    with ExitStack() as stack:
        stack.callback(training.gradient_step.close)  # a run that fails must not hold the GPU's memory
        sinks = [stack.enter_context(sink) for sink in listeners]
        try:
            for record in records(training):
                for sink in sinks:
                    sink(record)
        except Interrupted:
            raise
        except Exception as error:
            with suppress(RunError):  # the error may be of the disk that the log is on
                for sink in sinks:
                    sink(
                        Failure(
                            f"{type(error).__name__}: {error}", training.progress.epoch + 1, training.step
                        )
                    )
            if isinstance(error, StuckError):
                stuck_starts.remember(error.start, folder)
                raise
            if isinstance(error, RunError):
                advice = (
                    ". Try a smaller schedule.lr or schedule.clip, or another seed"
                    if isinstance(error, Diverged)
                    else ""
                )
                raise RunError(f"{error}; {last_good(training)}{advice}") from None
            raise
    assert isinstance(record, Result)
    result = to_dict(record)
    files.replace(folder / RESULT, (json.dumps(result, indent=2) + "\n").encode())
    return result
