"""What rows need: trainings and evaluations, which of them are finished, how long the rest takes."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from vdrop_cli import checkpoint, continuation, runs, stuck_starts, tasks
from vdrop_cli.arguments import literal
from vdrop_cli.device import choose_device, configure_process
from vdrop_cli.errors import ConfigError, RunError, require
from vdrop_cli.evaluation_files import Evaluation
from vdrop_cli.provenance import device_name
from vdrop_cli.run_files import RESULT
from vdrop_cli.settings.choices import Backend
from vdrop_cli.settings.commands import Reproduce
from vdrop_cli.settings.train import Train
from vdrop_cli.sinks import time_in_words
from vdrop_cli.stuck_starts import StuckStart
from vdrop_cli.studies import rows
from vdrop_cli.studies.cost import Cost
from vdrop_cli.studies.study import Line, Row
from vdrop_cli.tasks import Task
from vdrop_cli.training import require_fitting_schedule, resolve_auto

BACKENDS_BY_DEVICE = {
    "cpu": (Backend.native, Backend.fused, Backend.reference),
    "cuda": (Backend.triton, Backend.fused, Backend.reference),
}
MORE_SEEDS = 10  # seeds of a row beyond those asked for that are tried if others are stuck


@dataclass
class Training:
    """A run that a row needs, on the device and in the precision that it is made with."""

    row: Row
    settings: Train
    task: Task

    @property
    def name(self) -> str:
        return f"{self.row.name} seed {self.settings.seed}"

    @property
    def folder(self) -> Path:
        return checkpoint.run_folder(self.settings, self.task.fingerprint)

    @property
    def is_finished(self) -> bool:
        return (self.folder / RESULT).exists()

    @property
    def epochs_done(self) -> float:
        """Epochs until its newest checkpoint, or until that of the shorter run that it continues."""
        try:
            newest = checkpoint.newest(self.folder)
        except ConfigError as error:  # training will say so, too, and leave the run alone
            print(f"vdrop: {error}", file=sys.stderr)
            return 0.0
        if newest is None:
            ends = continuation.ends_of_epochs(self.folder, self.settings, self.task.fingerprint)
            return float(ends[0][0]) if ends else 0.0
        return newest.epoch + newest.batch / self.task.batches_an_epoch

    @property
    def epochs(self) -> float:
        """Epochs of the whole training; `max_steps` may end it within one."""
        schedule, steps = self.settings.schedule, self.task.batches_an_epoch
        return schedule.steps_after(schedule.epochs, steps) / steps


@dataclass(frozen=True)
class PlannedEvaluation:
    """An evaluation that a row needs beyond that of a training."""

    row: Row
    trainings: list[Training]  # one, or the members of an ensemble
    mc_batch: int | None = None  # as of vdrop eval

    @property
    def how(self) -> Evaluation:
        return self.row.evaluation

    @property
    def name(self) -> str:
        return f"{self.row.name} seed {self.trainings[0].settings.seed}"

    @property
    def arguments(self) -> list[str]:
        """Returns the arguments of the `vdrop eval` that makes the evaluation."""
        first, *others = (literal(str(training.folder)) for training in self.trainings)
        settings = self.trainings[0].settings
        how = [f"members=[{','.join(others)}]"] if others else [f"mc_samples={self.how.samples}"]
        how += [f"mc_batch={self.mc_batch}"] if self.mc_batch is not None and not others else []
        # this command makes the runs, so their checkpoints name the data that this command named
        return [
            f"checkpoint={first}",
            "stored_data=true",
            *how,
            f"device={settings.device}",
            f"backend={settings.backend}",
            f"precision={settings.precision}",
        ]

    @property
    def is_finished(self) -> bool:
        run = runs.read(self.trainings[0].folder) if self.trainings[0].is_finished else None
        seeds = [training.settings.seed for training in self.trainings]
        return run is not None and runs.evaluation_of(run, self.how, seeds) is not None


class RunFactory:
    """Makes a `Training` of a row, for this machine or for the machines of a launcher. Each text is loaded
    once.
    """

    def __init__(self, request: Reproduce) -> None:
        self.request, self.outputs = request, request.outputs
        if request.uses_other_machines:
            require_known_device(request)
            self.device = torch.device("cpu")
        else:
            self.device = choose_device(request.device)
        configure_process(self.device)
        self.tasks: dict[str, Task] = {}

    def training(self, row: Row, seed: int) -> Training:
        request = self.request
        settings = replace(
            row.settings,
            seed=seed,
            outputs=request.outputs,
            device=request.device,
            backend=request.backend,
            precision=request.precision,
        )
        if not request.uses_other_machines:
            settings = resolve_auto(settings, self.device)
        text = str((settings.task, settings.data))
        if text not in self.tasks:
            self.tasks[text] = tasks.load(settings, self.device)
        require_fitting_schedule(settings, self.tasks[text])
        return Training(row, settings, self.tasks[text])

    @cached_property
    def stuck_records(self) -> dict[Path, StuckStart]:
        """The recorded stuck starts of runs that were made on a device of the same name as this one, by the
        folders of the runs.
        """
        if self.request.uses_other_machines:  # whose device has another name
            return {}
        device = device_name(self.device)
        folders = rows.record_folders(Path(self.outputs))
        stuck = [run for folder in folders for run in runs.stuck_below(folder)]
        return {
            checkpoint.run_folder(replace(run.train, outputs=self.outputs), run.corpus): run.start
            for run in stuck
            if run.environment["device"] == device
        }

    def stuck_start(self, training: Training) -> StuckStart | None:
        """The start of a training that is known to be stuck: from its run folder, or from its record where it
        has not begun here.
        """
        if training.is_finished:
            return None
        check, folder = training.settings.stuck, training.folder
        own = stuck_starts.remembered(folder, check)
        if own is not None:
            return own
        record = None if checkpoint.all_in(folder) else self.stuck_records.get(folder)
        return record if record is not None and record.is_stuck(check) else None


@dataclass
class Plan:
    """What rows need, each once however many of them need it."""

    trainings: dict[Path, Training] = field(default_factory=dict)  # by their folders
    # by the folder of the first run, members and samples
    evaluations: dict[tuple[Path, int, int], PlannedEvaluation] = field(default_factory=dict)
    stuck: dict[Path, tuple[str, StuckStart]] = field(default_factory=dict)  # trainings that others replace
    # names of rows and seeds, of averaged models the seed of the first
    on_page: list[tuple[Row, int]] = field(default_factory=list)
    # by name of the row: the stuck seeds, if they are too many
    without_seeds: dict[str, list[int]] = field(default_factory=dict)

    def add(self, row: Row, settings: Reproduce, factory: RunFactory) -> None:
        """Plans the first seeds of a row that are not known to be stuck."""
        chosen, stuck = list[Training](), list[int]()
        for seed in range(1, settings.seeds + MORE_SEEDS + 1):
            training = factory.training(row, seed)
            training = self.trainings.get(training.folder, training)
            if (start := factory.stuck_start(training)) is not None:
                self.stuck.setdefault(training.folder, (training.name, start))
                stuck.append(seed)
                continue
            chosen.append(self.trainings.setdefault(training.folder, training))
            if len(chosen) == settings.seeds:
                break
        else:
            self.without_seeds[row.name] = stuck
        samples, members = row.evaluation.samples, row.evaluation.members
        if len(chosen) < members:
            return
        together = [chosen[:members]] if members > 1 else [[training] for training in chosen if samples]
        for trainings in together:
            planned = PlannedEvaluation(row, trainings, settings.mc_batch)
            self.evaluations.setdefault((trainings[0].folder, members, samples), planned)
        shown = chosen if members == 1 else chosen[:1]
        self.on_page += [(row, training.settings.seed) for training in shown]

    def sweeps(self) -> Iterator[list[Training]]:
        """Trainings that are not finished, of rows with the same seeds together, so that every row of a sweep
        needs every seed of it.
        """
        by_row: dict[str, list[Training]] = {}
        for training in self.trainings.values():
            by_row.setdefault(training.row.name, []).append(training)
        groups: dict[tuple[int, ...], list[Training]] = {}
        for trainings in by_row.values():
            seeds = tuple(training.settings.seed for training in trainings)
            unfinished = [training for training in trainings if not training.is_finished]
            groups.setdefault(seeds, []).extend(unfinished)
        return filter(None, groups.values())

    def require_finished(self) -> None:
        """Raises RunError where something is not finished."""
        lacking = [str(t.folder) for t in self.trainings.values() if not t.is_finished]
        lacking += [e.name for e in self.evaluations.values() if not e.is_finished]
        if lacking:
            others = f", nor are {len(lacking) - 1} others" if len(lacking) > 1 else ""
            raise RunError(f"{lacking[0]} is not finished{others}; the same command resumes")

    def require_seeds(self) -> None:
        """Raises RunError where a row has too few that are not stuck."""
        for name, seeds in self.without_seeds.items():
            raise RunError(
                f"{name}: seeds {', '.join(map(str, seeds))} are stuck, and no more are tried; see whether "
                "stuck.steps and stuck.loss suit the row's other settings, and change them by overrides="
            )

    def require_on_page(self, lines: Iterable[Line]) -> None:
        """Raises RunError if a planned run is not on the page. Runs are compared by row and seed."""
        shown = {
            (line.row.name, rows.key(measured.run.numbers), measured.run.train.seed)
            for line in lines
            for measured in line.runs
        }
        for row, seed in self.on_page:
            if (row.name, row.key, seed) not in shown:
                raise RunError(
                    f"{row.name} seed {seed} is finished, but not in the table; what was left out is "
                    "reported above"
                )


def make_plan(chosen: Sequence[Row], settings: Reproduce, factory: RunFactory) -> Plan:
    plan = Plan()
    for row in chosen:
        plan.add(row, settings, factory)
    return plan


def print_plan(plan: Plan, factory: RunFactory) -> None:
    """Prints what there is to do, and how long it takes, measured here by a few steps of each kind of run."""
    if factory.request.uses_other_machines:
        print_list(plan, factory.request)
        return
    costs: dict[str, Cost] = {}

    def cost(training: Training) -> Cost:
        kind = rows.key(training.settings.numbers())
        if kind not in costs:
            costs[kind] = Cost(training.settings, training.task)
        return costs[kind]

    total = 0.0
    print(
        f"what is needed, and how long it takes on {machine(plan, factory)}, one after the other:",
        file=sys.stderr,
    )
    for training in plan.trainings.values():
        if training.is_finished:
            print(f"  {training.name}: finished", file=sys.stderr)
            continue
        done = min(training.epochs_done, training.epochs)
        left = (training.epochs - done) * cost(training).epoch + cost(training).result
        early = ", or less, as it stops early" if training.settings.schedule.patience is not None else ""
        progress = f"{done:.3g} of {training.epochs:.4g} epochs are done"
        print(f"  {training.name}: {time_in_words(left)}{early} ({progress})", file=sys.stderr)
        total += left
    for name, start in plan.stuck.values():
        print(f"  {name}: stuck, {start}; another seed replaces it", file=sys.stderr)
    for evaluation in plan.evaluations.values():
        if evaluation.is_finished:
            print(f"  {evaluation.name}: finished", file=sys.stderr)
            continue
        first, samples = evaluation.trainings[0], evaluation.how.samples
        left = cost(first).result * len(evaluation.trainings)
        if samples:
            left = cost(first).mc(samples, evaluation.mc_batch)
        how = f"MC, {samples} samples" if samples else f"average of {len(evaluation.trainings)} runs"
        print(f"  {evaluation.name} ({how}): {time_in_words(left)}", file=sys.stderr)
        total += left
    print(f"  together: {time_in_words(total)}", file=sys.stderr, flush=True)


def require_known_device(request: Reproduce) -> None:
    """Raises ConfigError for an unknown device, and for a back end that the device does not have."""
    kind = request.device.partition(":")[0]
    require(kind in BACKENDS_BY_DEVICE, "device", "cpu, cuda or cuda:N", request.device)
    known = BACKENDS_BY_DEVICE[kind]
    names = f"{known[0]}, {known[1]} or {known[2]}"
    require(request.backend in known, "backend", f"{names} with device={kind}", request.backend)


def print_list(plan: Plan, request: Reproduce) -> None:
    """Prints what there is to do on other machines."""
    print(f"what is needed, by launcher={request.launcher}:", file=sys.stderr)
    for training in plan.trainings.values():
        progress = "finished"
        if not training.is_finished:  # else its checkpoints are not read
            progress = f"{training.epochs_done:.3g} of {training.epochs:.4g} epochs are done"
        print(f"  {training.name}: {progress}", file=sys.stderr)
    for name, start in plan.stuck.values():
        print(f"  {name}: stuck, {start}; another seed replaces it", file=sys.stderr)
    for evaluation in plan.evaluations.values():
        how = f"MC, {evaluation.how.samples} samples" if evaluation.how.samples else "average"
        state = "finished" if evaluation.is_finished else "not done"
        print(f"  {evaluation.name} ({how}): {state}", file=sys.stderr, flush=True)


def machine(plan: Plan, factory: RunFactory) -> str:
    """Device, threads, back end and precision of the runs."""
    trained = [training.settings for training in plan.trainings.values()]
    threads = torch.get_num_threads()
    parts = [
        f"{threads} thread{'s' if threads != 1 else ''}",
        *dict.fromkeys(f"back end {settings.backend}" for settings in trained),
        *dict.fromkeys(str(settings.precision) for settings in trained),
    ]
    return f"{device_name(factory.device)} ({', '.join(parts)})"
