"""The cases of `vdrop bench`: which exist, in which groups they take turns, and their training settings."""

from dataclasses import dataclass, replace

import torch
from hydra import compose

from vdrop_cli.device import choose_backend, choose_device, choose_precision
from vdrop_cli.settings.choices import Backend, BenchCell, BenchPart, BenchSize, Precision
from vdrop_cli.settings.commands import Bench
from vdrop_cli.settings.compose import parse
from vdrop_cli.settings.train import Train

ALTERNATIVES = (BenchCell.torch_lstm, BenchCell.cell_loop, BenchCell.keras, BenchCell.torch_gru)
CELLS_BY_PART = {  # of the parts that measure no whole model
    BenchPart.directions: (
        BenchCell.variational,
        BenchCell.bidirectional,
        BenchCell.gru,
        BenchCell.bidirectional_gru,
        BenchCell.torch_lstm,
        BenchCell.torch_gru,
    ),
    BenchPart.cell_step: (BenchCell.variational, BenchCell.gru, BenchCell.torch_lstm, BenchCell.torch_gru),
}
BIDIRECTIONAL = {  # each with its cell of one direction
    BenchCell.bidirectional: BenchCell.variational,
    BenchCell.bidirectional_gru: BenchCell.gru,
}
GRUS = (BenchCell.gru, BenchCell.bidirectional_gru, BenchCell.torch_gru)
# Cells that are named after no policy have the sizes and probabilities of the tied variational one.
NO_POLICY = (BenchCell.fused, BenchCell.products, *ALTERNATIVES, *BIDIRECTIONAL, BenchCell.gru)


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    size: BenchSize
    part: BenchPart
    cell: BenchCell
    precision: Precision

    @property
    def exists(self) -> bool:
        """Whether the cell, the part, the size and the precision go together."""
        if self.part is BenchPart.cell_step:
            return self.cell in CELLS_BY_PART[self.part] and self.precision is Precision.fp32
        if (self.part is BenchPart.ratings) != (self.size is BenchSize.sentiment):
            return False
        if self.part is BenchPart.directions:
            return self.cell in CELLS_BY_PART[self.part]
        if self.cell in BIDIRECTIONAL or self.cell in GRUS:
            return False
        if self.part is BenchPart.ratings:
            return self.cell is not BenchCell.keras
        if self.cell is BenchCell.keras:
            return self.part is BenchPart.step and self.precision is Precision.fp32
        if self.cell is BenchCell.products:
            return self.part is BenchPart.step
        if self.part is BenchPart.checkpoint:
            return self.cell is BenchCell.variational
        return self.part is not BenchPart.mc or self.cell not in (BenchCell.none, *ALTERNATIVES)

    def __str__(self) -> str:
        return f"{self.size} {self.part} {self.cell} {self.precision}"


def measured_precisions(settings: Bench) -> list[Precision]:
    """The precisions to measure: those of the settings, or fp32 and what `precision=auto` is here."""
    fastest = choose_precision(Precision.auto, choose_device(settings.device))
    return settings.precisions or list(dict.fromkeys((Precision.fp32, fastest)))


def cases(settings: Bench) -> list[list[Case]]:
    """All cases, in groups that take turns."""
    groups = []
    for size in settings.sizes:
        for part in settings.parts:
            for precision in measured_precisions(settings):
                group = [Case(size, part, cell, precision) for cell in settings.cells or BenchCell]
                groups.append([case for case in group if case.exists])
    return [group for group in groups if group]


def train_settings(case: Case, settings: Bench) -> Train:
    """The published settings of the size, with the dropout that the case is named after, on the measured
    device.
    """
    task = ["task=sentiment"] if case.size is BenchSize.sentiment else []
    dropout = "variational" if case.cell in NO_POLICY else case.cell
    train = parse(compose("train", [*task, f"model=lstm_{case.size}", f"dropout={dropout}"]), Train)
    if case.cell is BenchCell.fused:
        backend = Backend.fused
    else:
        backend = choose_backend(Backend.auto, torch.device(settings.device))
    return replace(train, outputs=settings.outputs, device=settings.device, backend=backend)
