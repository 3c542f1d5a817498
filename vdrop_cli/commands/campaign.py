"""Many runs and evaluations as one piece of work: what of it is finished, how long the rest takes, and doing
it. No command of its own.
"""

import math
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from vdrop_cli import (
    checkpoint,
    continuation,
    experiments,
    interruption,
    results_page,
    runs,
    stuck_starts,
    tasks,
)
from vdrop_cli.arguments import literal, prepared
from vdrop_cli.device import choose_device, choose_mc_batch, configure_process, synchronize
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.monte_carlo import MonteCarlo
from vdrop_cli.perplexity import SEGMENT_STEPS, batched_loss, stream_perplexity
from vdrop_cli.provenance import device_name
from vdrop_cli.random_streams import Stream
from vdrop_cli.settings.choices import Precision
from vdrop_cli.settings.commands import Figures, Reproduce, seconds
from vdrop_cli.settings.train import Published, Train
from vdrop_cli.sinks import duration
from vdrop_cli.stuck_starts import StuckStart
from vdrop_cli.tasks import LanguageModelling, Sentiment, Task
from vdrop_cli.tasks.sentiment import Part, head
from vdrop_cli.training import Run, require_judged_in_first_epoch, resolved


@dataclass(frozen=True)
class Training:
    """A run that is needed, on the device and in the precision that it is to be made with."""

    name: str  # for a person
    settings: Train
    task: Task

    @property
    def told(self) -> str:
        return f"{self.name} seed {self.settings.seed}"

    @property
    def folder(self) -> Path:
        return checkpoint.run_folder(self.settings, self.task.fingerprint)

    @property
    def is_finished(self) -> bool:
        return (self.folder / "result.json").exists()

    @property
    def epochs_done(self) -> float:
        """Until its newest checkpoint, or until that of the shorter run that it continues."""
        try:
            held = checkpoint.newest(self.folder)
        except ConfigError as error:  # which training will say, too, and leave the run alone
            print(f"vdrop: {error}", file=sys.stderr)
            return 0.0
        if held is None:
            ends = continuation.ends_of_epochs(self.folder, self.settings, self.task.fingerprint)
            return float(ends[0][0]) if ends else 0.0
        return held.epoch + held.batch / self.task.batches_an_epoch


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that is needed beyond that of a training."""

    name: str
    published: Published  # how it is evaluated
    trainings: list[Training]  # one, or the members of an ensemble
    mc_batch: int | None = None  # as of vdrop eval

    @property
    def told(self) -> str:
        return f"{self.name} seed {self.trainings[0].settings.seed}"

    @property
    def arguments(self) -> list[str]:
        first, *others = (literal(str(training.folder)) for training in self.trainings)
        settings = self.trainings[0].settings
        how = [f"members=[{','.join(others)}]"] if others else [f"mc_samples={self.published.mc_samples}"]
        how += [f"mc_batch={self.mc_batch}"] if self.mc_batch is not None and not others else []
        # the runs are of this command's own settings, so the data that they name is, too
        return [
            f"checkpoint={first}",
            "stored_data=true",
            *how,
            f"device={settings.device}",
            f"precision={settings.precision}",
        ]

    @property
    def is_finished(self) -> bool:
        finished = runs.read(self.trainings[0].folder) if self.trainings[0].is_finished else None
        seeds = [training.settings.seed for training in self.trainings]
        return finished is not None and runs.evaluation_of(finished, self.published, seeds) is not None


class Maker:
    """Makes trainings of settings, for this machine; a text is loaded once."""

    def __init__(self, precision: Precision, outputs: str) -> None:
        self.device = choose_device("auto")
        configure_process(self.device)
        self.precision, self.outputs = precision, outputs
        self.tasks: dict[str, Task] = {}

    def training(self, name: str, settings: Train, seed: int) -> Training:
        made = resolved(
            replace(settings, seed=seed, outputs=self.outputs, precision=self.precision), self.device
        )
        of = str((made.task, made.data))
        self.tasks[of] = self.tasks.get(of) or tasks.load(made, self.device)
        require_judged_in_first_epoch(made, self.tasks[of])
        return Training(name, made, self.tasks[of])

    @cached_property
    def stuck_records(self) -> dict[Path, StuckStart]:
        """Starts of stuck runs that were made on such a device, of which there are records, by the folders of
        the runs.
        """
        device = device_name(self.device)
        found = [
            run
            for folder in results_page.record_folders(Path(self.outputs))
            for run in runs.stuck_below(folder)
        ]
        here = [run for run in found if run.environment["device"] == device]
        return {
            checkpoint.run_folder(replace(run.train, outputs=self.outputs), run.corpus): run.start
            for run in here
        }

    def stuck_start(self, training: Training) -> StuckStart | None:
        """That of a training which is known to be stuck: from its run folder, or from its record where it has
        not begun here.
        """
        if training.is_finished:
            return None
        check, folder = training.settings.stuck, training.folder
        record = None if checkpoint.all_in(folder) else self.stuck_records.get(folder)
        return stuck_starts.remembered(folder, check) or (
            record if record is not None and record.is_stuck(check) else None
        )


def announce(
    trainings: Iterable[Training], evaluations: Iterable[Evaluation], stuck: Iterable[tuple[str, StuckStart]]
) -> None:
    """What there is to do, and how long it takes, measured on this machine by a few steps of each kind of
    run.

    `stuck`: trainings that others replace, by name, and their starts.
    """
    costs: dict[str, Cost] = {}

    def cost(training: Training) -> Cost:
        kind = experiments.key(training.settings.numbers())
        if kind not in costs:
            costs[kind] = Cost(training)
        return costs[kind]

    total = 0.0
    print("what is needed, and how long it takes here, one after the other:", file=sys.stderr)
    for training in trainings:
        if training.is_finished:
            print(f"  {training.told}: finished", file=sys.stderr)
            continue
        schedule, done = training.settings.schedule, training.epochs_done
        left = (schedule.epochs - done) * cost(training).epoch + cost(training).result
        early = ", or less, as it stops early" if schedule.patience is not None else ""
        print(
            f"  {training.told}: {duration(left)}{early} ({done:.3g} of {schedule.epochs} epochs are done)",
            file=sys.stderr,
        )
        total += left
    for name, start in stuck:
        print(f"  {name}: stuck, {start}; another seed replaces it", file=sys.stderr)
    for evaluation in evaluations:
        first = evaluation.trainings[0]
        if evaluation.is_finished:
            print(f"  {evaluation.told}: finished", file=sys.stderr)
            continue
        samples = evaluation.published.mc_samples
        left = (
            cost(first).mc(samples, evaluation.mc_batch)
            if samples
            else cost(first).result * len(evaluation.trainings)
        )
        print(f"  {evaluation.told}: {duration(left)}", file=sys.stderr)
        total += left
    print(f"  together: {duration(total)}", file=sys.stderr, flush=True)


class Cost:
    """Seconds that parts of a training take, from a few of their steps."""

    STEPS = 5  # at most; a short text has fewer
    TEXTS = 100  # with ratings, that are read to see how long it takes

    def __init__(self, training: Training) -> None:
        self.task = training.task
        with TemporaryDirectory() as folder:
            run = Run(training.settings, self.task, Path(folder))
        self.model = run.model
        speed = median(step.words_per_second for step in islice(run.train_epoch(), self.STEPS))
        words = sum(self.task.words(batch) for batch in self.task.batches(Stream(("cost",))))
        if isinstance(self.task, Sentiment):
            validate, self.result = self.of_ratings(self.task)
        else:
            assert isinstance(self.task, LanguageModelling)
            validate, self.result = self.of_language_model(self.task)
        self.epoch = words / speed + validate

    def of_language_model(self, task: LanguageModelling) -> tuple[float, float]:
        """Of a validation, and of the result."""
        chunks = list(islice(task.valid_chunks(), self.STEPS))
        evaluated = self.timed(lambda: batched_loss(self.model, chunks, task.batch_size)) / len(chunks)
        stretch_N = task.streams["test"][: SEGMENT_STEPS + 1]
        read = self.timed(lambda: stream_perplexity(self.model, stretch_N)) / len(stretch_N)
        whole = task.batches_an_epoch * evaluated + read * sum(
            len(task.streams[part]) for part in ("valid", "test")
        )
        return len(list(task.valid_chunks())) * evaluated, whole

    def of_ratings(self, task: Sentiment) -> tuple[float, float]:
        sample = head(task.parts["test"], self.TEXTS)
        self.a_word = self.timed(lambda: task.predict(self.model, sample)) / sum(sample.lengths)
        result = self.reading(task.parts.values()) + self.timed(lambda: task.baselines)
        return self.reading([task.sample(name) for name in task.parts]), result

    def reading(self, parts: Iterable[Part]) -> float:
        return self.a_word * sum(sum(part.lengths) for part in parts)

    def mc(self, samples: int, mc_batch: int | None) -> float:
        if isinstance(self.task, Sentiment):
            return samples * self.reading(self.task.sample(name) for name in (self.task.noise_part, "test"))
        assert isinstance(self.task, LanguageModelling)
        together, stream_N = (
            min(samples, choose_mc_batch(mc_batch, self.task.device)),
            self.task.streams["test"],
        )
        passes = MonteCarlo(self.model, stream_N, together, together, 1, False).run()
        words: list[int] = []
        seconds = self.timed(lambda: words.extend(islice(passes, self.STEPS)))
        return seconds / sum(words) * samples * len(stream_N)

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds until the device has done it, too."""
        synchronize(self.task.device)
        begun = time.perf_counter()
        work()
        synchronize(self.task.device)
        return time.perf_counter() - begun


def sweep(
    choices: list[str], seeds: Iterable[int], precision: Precision, settings: Reproduce | Figures
) -> list[str]:
    """The rest of a `vdrop train` that trains all of these; of runs that are finished it says so."""
    launcher = settings.launcher or (
        f"joblib hydra.launcher.n_jobs={settings.jobs}" if settings.jobs > 1 else ""
    )
    how = shlex.split(f"hydra/launcher={launcher}") if launcher else []
    of_each = [
        f"precision={precision}",
        f"outputs={literal(settings.outputs)}",
        *prepared("train", shlex.split(settings.overrides)),
    ]  # no comma is a sweep there
    return ["-m", *choices, f"seed={','.join(map(str, seeds))}", *how, *of_each]


class Commands:
    """Other commands of vdrop, each run as a process of its own; where `until` is set, only until that time
    has passed.
    """

    def __init__(self, until: str | None) -> None:
        self.until, self.ends = until, math.inf if until is None else time.monotonic() + seconds(until)

    @property
    def time_is_up(self) -> bool:
        return time.monotonic() >= self.ends

    def vdrop(self, command: str, *arguments: str) -> None:
        """Runs a command, which is asked to stop when this one is, or the time is up; how it ends shows in
        what it leaves.
        """
        if self.time_is_up:
            return
        line = ["vdrop", command, *arguments]
        print(f"\n{shlex.join(line)}", file=sys.stderr, flush=True)
        process = subprocess.Popen([sys.executable, "-m", "vdrop_cli", *line[1:]])
        with interruption.listening(process.terminate):
            try:
                process.wait(None if self.until is None else max(0.0, self.ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                print(
                    f"vdrop: until={self.until} has passed; stopping what runs", file=sys.stderr, flush=True
                )
                process.terminate()
                process.wait()
            interruption.check()

    def evaluate_all(self, evaluations: Iterable[Evaluation]) -> None:
        """Those that can be and are not yet."""
        for evaluation in evaluations:
            if all(training.is_finished for training in evaluation.trainings) and not evaluation.is_finished:
                self.vdrop("eval", *evaluation.arguments)


def require_on_page(wanted: Iterable[tuple[str, int]], told: Collection[tuple[str, int]]) -> None:
    """Raises RunError where a run, by the name of its row and its seed, is not in the table though all is
    finished.
    """
    for name, seed in wanted:
        if (name, seed) not in told:
            raise RunError(
                f"{name} seed {seed} is finished, but not in the table; what was left out is reported above"
            )


def require_all(trainings: Iterable[Training], evaluations: Iterable[Evaluation]) -> None:
    """Raises RunError where something is not finished."""
    lacking = [str(t.folder) for t in trainings if not t.is_finished] + [
        e.told for e in evaluations if not e.is_finished
    ]
    if lacking:
        others = f", nor are {len(lacking) - 1} others" if len(lacking) > 1 else ""
        raise RunError(f"{lacking[0]} is not finished{others}; the same command resumes")
