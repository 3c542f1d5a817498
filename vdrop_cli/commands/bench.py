"""`vdrop bench`: how fast the cells are, beside other implementations and beside the machine's limit."""

import importlib.util
import sys
from dataclasses import replace

import torch

from vdrop_cli.bench import worker
from vdrop_cli.bench.cases import ALTERNATIVES, cases
from vdrop_cli.bench.report import Measurement, measurement_limit, print_results, write
from vdrop_cli.bench.worker import measure, measure_rates
from vdrop_cli.device import choose_device, configure_process
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.choices import BenchCell
from vdrop_cli.settings.commands import Bench


def run(settings: Bench) -> None:
    device = choose_device(settings.device)
    settings = replace(settings, device=str(device), cells=available_cells(settings, device))
    groups = cases(settings)
    if not groups:
        raise ConfigError(
            "parts, cells and precisions together leave nothing to measure; take more of one of them"
        )
    configure_process(device)
    measurements, rates, path = list[Measurement](), measure_rates(device, worker.TIMING.rates), None
    try:
        for group in groups:
            results, rates = measure(group, settings, rates)
            measurements = [
                replace(m, limit_seconds=measurement_limit(m, rates)) for m in (*measurements, *results)
            ]
            path = write(settings, measurements, rates, path)
    except BaseException:
        if path is not None:
            print(f"vdrop: {path} has what was measured before", file=sys.stderr)
        raise
    print_results(measurements, rates, device)
    has_alternatives = not set(ALTERNATIVES).isdisjoint(settings.cells or ())
    if (
        device.type == "cpu"
        and has_alternatives
        and not (settings.configure_alternatives or settings.as_imported)
    ):
        print(
            "\nThe alternatives ran as shipped; configure_alternatives=true gives them vdrop's allocator and "
            "library of fp32 products."
        )
    print(f"\nwritten to {path}", file=sys.stderr)


def available_cells(settings: Bench, device: torch.device) -> list[BenchCell]:
    """The cells to measure, by default all that can run here.

    Raises a ConfigError for one that is named and cannot.
    """
    unavailable = {}
    if device.type != "cpu":
        reason = "is measured on the CPU alone; leave it out"
        unavailable = dict.fromkeys((BenchCell.keras, BenchCell.products), reason)
    if importlib.util.find_spec("keras") is None:
        unavailable[BenchCell.keras] = "is not installed; pip install 'vdrop[keras]', or leave it out"
    for cell in settings.cells or ():
        if cell in unavailable:
            raise ConfigError(f"cells contains {cell}, which {unavailable[cell]}")
    return settings.cells or [cell for cell in BenchCell if cell not in unavailable]
