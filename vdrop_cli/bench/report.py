"""The results of `vdrop bench`: seconds, the machine's limit, the printed table and the record as JSON."""

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vdrop_cli import files, output
from vdrop_cli.bench.cases import BIDIRECTIONAL, GRUS, Case, measured_precisions, train_settings
from vdrop_cli.bench.steps import MC_WORDS, VOCABULARY, is_native, words_per_time_step
from vdrop_cli.device import choose_backend
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.kernels import native_library
from vdrop_cli.provenance import describe
from vdrop_cli.settings.choices import Backend, BenchCell, BenchPart, Precision
from vdrop_cli.settings.commands import Bench
from vdrop_cli.settings.fields import plain
from vdrop_cli.settings.train import Checkpoints

FORWARD_ONLY = (BenchPart.mc.name, BenchPart.cell_step.name)
PARTS_AS_LINES = (BenchPart.checkpoint.name, BenchPart.cell_step.name)  # printed below the table
LATENCY_NOTE = (
    "mc: of limit says little here: latency bounds it, as each word waits for the one before it and "
    "the products are small"
)


@dataclass(frozen=True)
class Rates:
    """Best rates of a product of large matrices, in operations per second."""

    fp32: float
    bf16: float

    def or_faster(self, others: "Rates") -> "Rates":
        return Rates(max(self.fp32, others.fp32), max(self.bf16, others.bf16))


@dataclass(frozen=True)
class Measurement:
    """One case, timed over all turns."""

    size: str
    part: str
    cell: str
    precision: str
    words: int  # per step
    recurrent: int  # parameters of the layers that are multiplied
    head: int  # and of the head
    seconds: list[float]  # per step, one number for every turn of every start
    limit_seconds: float
    peak_megabytes: float

    @property
    def step_seconds(self) -> float:
        return median(self.seconds)

    @property
    def words_per_second(self) -> float:
        return self.words / self.step_seconds

    @property
    def share(self) -> float:
        """The fraction of a training's time that checkpoints take at the default interval."""
        return self.step_seconds / (60 * Checkpoints().minutes + self.step_seconds)

    @property
    def fraction(self) -> float:
        """The fraction of the machine's limit that is reached."""
        return self.limit_seconds / self.step_seconds


def speed_ratio(one: Measurement, other: Measurement) -> float:
    """The speed of `one` divided by that of `other`: the median over the turns. In a turn both ran within
    seconds of each other.
    """
    return median(theirs / ours for ours, theirs in zip(one.seconds, other.seconds, strict=True))


def limit(recurrent: int, head: int, products: int, words: int, precision: Precision, rates: Rates) -> float:
    """Seconds that the matrix products alone take at the best rate: 2 · parameters · words operations each.

    `products` is 3 in training (forward, and two backward), 1 in evaluation. The forward logits are exact: a
    product in fp32, or three in bf16 where that is faster.
    """
    in_bf16 = precision is Precision.bf16
    compute_rate = rates.bf16 if in_bf16 else rates.fp32
    logits_rate = max(rates.fp32, rates.bf16 / 3) if in_bf16 else rates.fp32
    forward_logits = 2 * head * words
    others = 2 * products * (recurrent + head) * words - forward_logits
    return forward_logits / logits_rate + others / compute_rate


def measurement_limit(m: Measurement, rates: Rates) -> float:
    """The limit of a measurement in seconds per step."""
    products = 1 if m.part in FORWARD_ONLY else 3
    return limit(m.recurrent, m.head, products, m.words, Precision[m.precision], rates)


def measurement(case: Case, settings: Bench, seconds: list[float], peak: float) -> Measurement:
    """The result of a case; its limit is set when the best rates of all groups are known."""
    train = train_settings(case, settings)
    layers, head = train.model.layers, VOCABULARY * train.model.hidden_size
    words = sum(words_per_time_step(train, case.part))
    if case.part is BenchPart.ratings:
        head = 0
    if case.part is BenchPart.mc:
        words = MC_WORDS[torch.device(settings.device).type] * settings.mc_passes
    if case.part in (BenchPart.layer, BenchPart.directions, BenchPart.cell_step):
        layers, head = 1, 0
    if case.part is BenchPart.checkpoint:
        words = layers = head = 0
    gates, directions = 3 if case.cell in GRUS else 4, 2 if case.cell in BIDIRECTIONAL else 1
    recurrent = 2 * gates * train.model.hidden_size**2 * layers * directions
    names = (str(case.size), str(case.part), str(case.cell), str(case.precision))
    return Measurement(*names, words, recurrent, head, seconds, 0.0, peak)


def product_size(device: torch.device) -> int:
    """Rows of the square matrices whose product shows a device's best rate."""
    return 2048 if device.type == "cpu" else 8192


def print_results(measurements: list[Measurement], rates: Rates, device: torch.device) -> None:
    """Prints the table, and a line for each comparison that is no row of it."""
    size = product_size(device)
    named = {
        name: rate for name, rate in asdict(rates).items() if name in {m.precision for m in measurements}
    }
    products = (
        f"{size}³ product: {', '.join(f'{name} {rate / 1e9:.0f}' for name, rate in named.items())} GFLOP/s"
    )
    uses = (
        f"; native uses {', '.join(native_library.features()) or 'no extension'}" if is_native(device) else ""
    )
    print(f"{device}, {torch.get_num_threads()} threads; {products}{uses}")
    columns = f"{'words/s':>9}{'ms':>10}{'of limit':>10}{'× torch':>14}{'× cell_loop':>13}{'peak MB':>9}"
    print(f"{'size':<10}{'part':<12}{'cell':<20}{'':<6}{columns}")
    by_name = {(m.cell, m.size, m.part, m.precision): m for m in measurements}

    def speed_over(m: Measurement, cell: BenchCell) -> str:
        if cell is BenchCell.torch_lstm and BenchCell[m.cell] in GRUS:
            cell = BenchCell.torch_gru
        other = by_name.get((cell.name, m.size, m.part, m.precision))
        return f"{speed_ratio(m, other):.2f}" if other else "–"

    for m in measurements:
        if m.part in PARTS_AS_LINES:
            continue
        over_torch, over_loop = (speed_over(m, c) for c in (BenchCell.torch_lstm, BenchCell.cell_loop))
        print(
            f"{m.size:<10}{m.part:<12}{m.cell:<20}{m.precision:<6}"
            f"{m.words_per_second:>9,.0f}{m.step_seconds * 1e3:>10.1f}{m.fraction:>10.2f}"
            f"{over_torch:>14}{over_loop:>13}{m.peak_megabytes:>9,.0f}"
        )
    if device.type == "cuda" and any(m.part == BenchPart.mc.name for m in measurements):
        print(LATENCY_NOTE)
    for m in measurements:
        if m.part != BenchPart.directions.name:
            continue
        one_direction = BIDIRECTIONAL.get(BenchCell[m.cell])
        if one_direction and (one := by_name.get((one_direction.name, m.size, m.part, m.precision))):
            times = f"{speed_ratio(one, m):.2f} times"
            print(f"{m.size} {m.precision}: {m.cell} takes {times} as long as {one.cell}")
    for m in measurements:
        if m.part == BenchPart.cell_step.name:
            print(f"{m.size}: one step of a cell, {m.cell}, takes {m.step_seconds * 1e6:.1f} µs")
    for m in measurements:
        if m.part == BenchPart.checkpoint.name:
            print(
                f"{m.size}: writing a checkpoint takes {m.step_seconds * 1e3:.0f} ms, every "
                f"{Checkpoints().minutes:g} minutes {100 * m.share:.2f} % of the time"
            )


def as_record(settings: Bench, measurements: list[Measurement], rates: Rates) -> dict[str, Any]:
    """The record of a bench: its settings but for the folder, the machine, the best rates, and all
    measurements.
    """
    device = torch.device(settings.device)
    backend = choose_backend(Backend.auto, device)
    precisions = " and ".join(map(str, measured_precisions(settings)))
    measured = []
    for m in measurements:
        if m.part == BenchPart.checkpoint.name:
            derived = {"share": m.share}
        else:
            derived = {"words_per_second": m.words_per_second, "fraction": m.fraction}
        measured.append({**asdict(m), "step_seconds": m.step_seconds, **derived})
    return {
        "settings": {name: value for name, value in plain(settings).items() if name != "outputs"},
        "environment": describe(device, backend.name, precisions),
        "rates": asdict(rates),
        "measured": measured,
    }


def write(
    settings: Bench, measurements: list[Measurement], rates: Rates, earlier: Path | None = None
) -> Path:
    """Writes the record into the file `earlier`, or into a new file of the folder `bench` in `outputs`.

    Returns the file. Where it cannot be written, prints the table and raises a ConfigError; an earlier record
    stays.
    """
    record = as_record(settings, measurements, rates)
    folder = Path(settings.outputs) / "bench"
    try:
        path = earlier or new_file(folder, time.strftime("%Y%m%d-%H%M%S"))
        try:
            files.replace(path, (json.dumps(record, indent=1) + "\n").encode())
        except RunError:
            if earlier is None:
                path.unlink(missing_ok=True)
            raise
    except (OSError, RunError) as error:
        reason = error if isinstance(error, RunError) else f"{folder} cannot be written ({error.strerror})"
        is_written = output.is_written(
            lambda: print_results(measurements, rates, torch.device(settings.device))
        )
        above = "; the table is above" if is_written else ""
        raise ConfigError(f"outputs={settings.outputs}: {reason}{above}") from None
    return path


def new_file(folder: Path, stamp: str) -> Path:
    """A new file, named by the time and counted where several benches end in the same second."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        path = folder / f"{stamp}{f'-{number}' if number > 1 else ''}.json"
        with suppress(FileExistsError):
            path.open("x").close()
            break
    return path
