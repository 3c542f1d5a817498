"""`vdrop reproduce`: the rows of the paper's Table 1: what is missing is run or resumed, evaluated, and written down."""

import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from vdrop_cli import checkpoint, corpora, environment, evaluate, experiments, interruption, runs
from vdrop_cli.commands import table
from vdrop_cli.commands.train import Run
from vdrop_cli.config import Backend, ConfigError, Eval, Reproduce, RunError, Table, Train
from vdrop_cli.evaluate import MonteCarlo
from vdrop_cli.experiments import Row
from vdrop_cli.kernels import choose
from vdrop_cli.sinks import duration
from vdrop_cli.tasks import LanguageModelling


@dataclass(frozen=True)
class Training:
    """A run that rows need."""

    row: Row  # the first that needs it
    settings: Train  # with its seed, device and precision
    folder: Path
    corpus: corpora.Corpus

    @property
    def is_finished(self) -> bool:
        return (self.folder / "result.json").exists()

    @property
    def epochs_done(self) -> float:
        try:
            held = checkpoint.newest(self.folder)
        except ConfigError as error:  # which training will say, too, and leave the run alone
            print(f"vdrop: {error}", file=sys.stderr)
            held = None
        return held.epoch + held.batch / self.task.batches_an_epoch if held else 0.0

    @property
    def task(self) -> LanguageModelling:
        return LanguageModelling(self.settings.task, self.corpus, torch.device(self.settings.device))


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that a row needs beyond that of its training."""

    row: Row
    trainings: list[Training]  # one, or the members of an ensemble

    @property
    def arguments(self) -> list[str]:
        first, *others = (str(training.folder) for training in self.trainings)
        published, settings = self.row.published, self.trainings[0].settings
        how = [f"members=[{','.join(others)}]"] if others else [f"mc_samples={published.mc_samples}"]
        return [f"checkpoint={first}", *how, f"device={settings.device}", f"precision={settings.precision}"]

    @property
    def is_finished(self) -> bool:
        finished = runs.read(self.trainings[0].folder) if self.trainings[0].is_finished else None
        return finished is not None and runs.evaluation_of(finished, self.row.published) is not None


def run(settings: Reproduce) -> None:
    rows = experiments.rows(settings.sizes, settings.rows, settings.overrides)
    if not rows:
        raise ConfigError("sizes and rows leave nothing to run; vdrop reproduce plan=true sizes=[small] shows what there is")
    trainings, evaluations = needed(rows, settings)
    if not trainings:
        raise ConfigError(f"seeds must be more for any of these rows, got {settings.seeds}")
    announce(trainings, evaluations)
    if settings.plan:
        return
    todo = [training for training in trainings if not training.is_finished]
    if todo:
        vdrop("train", *sweep(todo, settings))
    for evaluation in evaluations:
        if all(training.is_finished for training in evaluation.trainings) and not evaluation.is_finished:
            vdrop("eval", *evaluation.arguments)
    table.run(Table(settings.sizes, settings.rows, settings.overrides, settings.outputs, settings.file))
    lacking = [str(t.folder) for t in trainings if not t.is_finished] + [e.row.experiment for e in evaluations if not e.is_finished]
    if lacking:
        others = f", nor are {len(lacking) - 1} others" if len(lacking) > 1 else ""
        raise RunError(f"{lacking[0]} is not finished{others}; the same command goes on")


def needed(rows: list[Row], settings: Reproduce) -> tuple[list[Training], list[Evaluation]]:
    """Each once, however many rows need it."""
    device = environment.device("auto")
    environment.make_ready(device)
    precision = environment.precision(settings.precision, device)
    trainings: dict[Path, Training] = {}
    loaded: dict[str, corpora.Corpus] = {}
    evaluations: dict[tuple[Path, int, int], Evaluation] = {}
    for row in rows:
        if row.published.members > settings.seeds:
            print(f"{row.experiment} is left out: it takes seeds={row.published.members}", file=sys.stderr)
            continue
        data = str(row.settings.data)
        corpus = loaded[data] = loaded.get(data) or corpora.load(row.settings.data)
        of_row = []
        for seed in range(1, settings.seeds + 1):
            resolved = replace(
                row.settings,
                seed=seed,
                outputs=settings.outputs,
                device=str(device),
                backend=Backend[choose(row.settings.backend.name)],
                precision=precision,
            )
            folder = checkpoint.run_folder(resolved, corpus.fingerprint)
            of_row.append(trainings.setdefault(folder, Training(row, resolved, folder, corpus)))
        members, samples = row.published.members, row.published.mc_samples
        for evaluated in [of_row[:members]] if members > 1 else [[training] for training in of_row if samples]:
            evaluations.setdefault((evaluated[0].folder, members, samples), Evaluation(row, evaluated))
    return list(trainings.values()), list(evaluations.values())


def announce(trainings: list[Training], evaluations: list[Evaluation]) -> None:
    """What there is to do, and how long it takes, measured on this machine by a few steps of each."""
    costs: dict[str, Cost] = {}

    def cost(training: Training) -> Cost:
        if training.row.key not in costs:
            costs[training.row.key] = Cost(training)
        return costs[training.row.key]

    total = 0.0
    print("what is needed, and how long it takes here, one after the other:", file=sys.stderr)
    for training in trainings:
        told = f"{training.row.experiment} seed {training.settings.seed}"
        if training.is_finished:
            print(f"  {told}: finished", file=sys.stderr)
            continue
        epochs, done = training.settings.schedule.epochs, training.epochs_done
        left = (epochs - done) * cost(training).epoch + cost(training).result
        early = ", or less, as it stops early" if training.settings.schedule.patience is not None else ""
        print(f"  {told}: {duration(left)}{early} ({done:.3g} of {epochs} epochs are done)", file=sys.stderr)
        total += left
    for evaluation in evaluations:
        first = evaluation.trainings[0]
        told = f"{evaluation.row.experiment} seed {first.settings.seed}"
        if evaluation.is_finished:
            print(f"  {told}: finished", file=sys.stderr)
            continue
        samples = evaluation.row.published.mc_samples
        left = cost(first).mc(samples) if samples else cost(first).result * len(evaluation.trainings)
        print(f"  {told}: {duration(left)}", file=sys.stderr)
        total += left
    print(f"  together: {duration(total)}", file=sys.stderr, flush=True)


class Cost:
    """Seconds that parts of a training take, from a few of their steps."""

    STEPS = 5  # at most; a short text has fewer

    def __init__(self, training: Training) -> None:
        self.task = training.task
        with TemporaryDirectory() as folder:
            run = Run(training.settings, self.task, Path(folder))
        self.model, batch = run.model, training.settings.task.batch_size
        chunks = list(islice(self.task.valid_chunks(), self.STEPS))
        evaluated = timed(lambda: evaluate.batched_loss(self.model, chunks, batch)) / len(chunks)
        speed = median(step.words_per_second for step in islice(run.train_epoch(), self.STEPS))
        words = self.task.words(next(self.task.batches()))
        of_training = self.task.batches_an_epoch * words / speed
        self.epoch = of_training + len(list(self.task.valid_chunks())) * evaluated
        stretch_N = self.task.streams["test"][: evaluate.STEPS_AT_ONCE + 1]
        read = timed(lambda: evaluate.stream_perplexity(self.model, stretch_N)) / len(stretch_N)
        self.result = self.task.batches_an_epoch * evaluated + read * sum(len(self.task.streams[part]) for part in ("valid", "test"))

    def mc(self, samples: int) -> float:
        together, stream_N = min(samples, Eval.mc_batch), self.task.streams["test"]
        passes = MonteCarlo(self.model, stream_N, together, together, 1, False).run()
        begun = time.perf_counter()
        words = sum(islice(passes, self.STEPS))
        return (time.perf_counter() - begun) / words * samples * len(stream_N)


def timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def sweep(todo: list[Training], settings: Reproduce) -> list[str]:
    """The command line that trains all of these; of runs that are finished it says so."""
    names = dict.fromkeys(training.row.experiment for training in todo)
    seeds = dict.fromkeys(str(training.settings.seed) for training in todo)
    launcher = shlex.split(f"hydra/launcher={settings.launcher}") if settings.launcher else []
    of_each = [f"precision={todo[0].settings.precision}", f"outputs={settings.outputs}"]
    return ["-m", f"experiment={','.join(names)}", f"seed={','.join(seeds)}", *launcher, *of_each, *shlex.split(settings.overrides)]


def vdrop(command: str, *arguments: str) -> None:
    """Runs a command as a process of its own, which is asked to stop when this one is; how it ends shows in what it leaves."""
    line = ["vdrop", command, *arguments]
    print(f"\n{shlex.join(line)}", file=sys.stderr, flush=True)
    process = subprocess.Popen([sys.executable, "-m", "vdrop_cli", *line[1:]])
    with interruption.listening(process.terminate):
        process.wait()
        interruption.check()
