"""`vdrop reproduce`: the rows of the paper's Table 1: what is missing is run or resumed, evaluated, and written down."""

import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from vdrop_cli import checkpoint, corpora, environment, evaluate, experiments, interruption
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
        held = checkpoint.newest(self.folder) if self.folder.is_dir() else None
        return held.epoch + held.chunk / self.task.chunks_an_epoch if held else 0.0

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
        kind = f"ensemble{len(self.trainings)}" if len(self.trainings) > 1 else f"mc{self.row.published.mc_samples}-s1"
        return self.trainings[0].is_finished and any(self.trainings[0].folder.glob(f"eval-*-{kind}.json"))


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
    """Each run once, however many rows evaluate it."""
    device = environment.device("auto")
    environment.make_ready(device)
    trainings: dict[Path, Training] = {}
    evaluations = []
    for row in rows:
        seeds = range(1, settings.seeds + 1)
        if row.published.members > settings.seeds:
            print(f"{row.experiment} is left out: it takes seeds={row.published.members}", file=sys.stderr)
            continue
        of_row = []
        for seed in seeds:
            resolved = replace(
                row.settings,
                seed=seed,
                outputs=settings.outputs,
                device=str(device),
                backend=Backend[choose(row.settings.backend.name)],
                precision=environment.precision(settings.precision, device),
            )
            corpus = corpora.load(resolved.data)
            folder = checkpoint.run_folder(resolved, corpus.fingerprint)
            of_row.append(trainings.setdefault(folder, Training(row, resolved, folder, corpus)))
        if row.published.members > 1:
            evaluations.append(Evaluation(row, of_row[: row.published.members]))
        elif row.published.mc_samples:
            evaluations += [Evaluation(row, [training]) for training in of_row]
    return list(trainings.values()), evaluations


def announce(trainings: list[Training], evaluations: list[Evaluation]) -> None:
    """What there is to do, and how long it takes, measured on this machine by a few steps of each."""
    costs: dict[str, Cost] = {}

    def cost(training: Training) -> Cost:
        return costs.get(training.row.key) or costs.setdefault(training.row.key, Cost(training))

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

    STEPS = 5

    def __init__(self, training: Training) -> None:
        self.task = training.task
        with TemporaryDirectory() as folder:
            run = Run(training.settings, self.task, Path(folder))
        self.model, batch = run.model, training.settings.task.batch_size
        chunks = list(islice(self.task.valid_chunks(), self.STEPS))
        evaluated = timed(lambda: evaluate.batched_loss(self.model, chunks, batch)) / len(chunks)
        steps = run.train_epoch()
        next(steps)
        trained = timed(lambda: [next(steps) for _ in range(self.STEPS)]) / self.STEPS
        self.epoch = self.task.chunks_an_epoch * trained + len(list(self.task.valid_chunks())) * evaluated
        words = evaluate.STEPS_AT_ONCE
        read = timed(lambda: evaluate.stream_perplexity(self.model, self.task.streams["test"][: words + 1])) / words
        self.result = self.task.chunks_an_epoch * evaluated + read * sum(len(self.task.streams[part]) for part in ("valid", "test"))

    def mc(self, samples: int) -> float:
        together = min(samples, Eval.mc_batch)
        stream_N = self.task.streams["test"]
        passes = MonteCarlo(self.model, stream_N, together, together, 1, False).run()
        next(passes)
        words = 0

        def read() -> None:
            nonlocal words
            words = sum(next(passes) for _ in range(2))

        return timed(read) / words * samples * len(stream_N)


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
