"""Writes the tables of docs/speed.md, and that of README.md, from records of `vdrop bench`, each after its
`<!-- table NAME -->`.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from vdrop_cli.bench.report import Measurement, Rates, measurement_limit, speed_ratio

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "docs" / "speed.md", ROOT / "README.md")
MARK = re.compile(r"(<!-- table (\w+) -->\n\n)(?:\|.*\n)*\n*")
PRECISIONS = ("fp32", "bf16")
TORCH, LOOP = "torch_lstm", "cell_loop"
POLICIES = ("variational", "variational_untied", "naive", "none")
CASES = {
    "step": "training step, {}",
    "layer": "one layer alone, {}",
    "ratings": "training step of the model of ratings",
    "mc": "MC evaluation, 64 passes together, {}",
}
SIZES = ("small", "medium", "large")
CELL_STEPS = {  # name in the table: cell, and torch's
    "`LSTMCell`, `variational`": ("variational", "torch_lstm"),
    "`GRUCell`, `variational`": ("gru", "torch_gru"),
}


@dataclass(frozen=True)
class Machine:
    """Records of one machine; its precisions are those that its processor multiplies in."""

    records: tuple[str, ...]
    precisions: tuple[str, ...] = PRECISIONS


MACHINES = {
    "xeon": Machine(("20261128-061728",)),
    "xeon_later": Machine(("20261128-065234",)),
    "xeon_starts": Machine(("20261201-034340",)),
    "xeon_configured": Machine(("20261201-034634",)),
    "epyc": Machine(("20261130-033739", "20261130-033832")),
    "slow_epyc": Machine(("20261130-123503", "20261130-124621")),
    "slow_epyc_configured": Machine(("20261130-124449", "20261130-124825")),
    "avx2": Machine(("20261129-194823", "20261129-195828"), ("fp32",)),
    "avx2_later": Machine(("20261129-195734",), ("fp32",)),
    "h200": Machine(("20261129-225406", "20261129-225507"), ("bf16",)),
}
AS_IMPORTED = Machine(("20261130-205832",))  # layers as in a program that imports them
CONFIGURED = Machine(("20261130-210607",))  # the same with the settings of vdrop's commands
HEAD = {  # rows of the first table: where they are from
    "xeon": ("[an Intel Xeon with AMX](#intel-xeon-with-amx)", "as shipped"),
    "xeon_later": ("the same, half an hour later", "as shipped"),
    "xeon_starts": ("the same kind, three starts", "as shipped"),
    "xeon_configured": ("the same", "with vdrop's settings"),
    "epyc": ("[an AMD EPYC](#amd-epyc-with-avx-512), AVX-512 with bf16", "as shipped"),
    "slow_epyc": ("[another, half as fast](#amd-epyc-half-as-fast)", "as shipped"),
    "slow_epyc_configured": ("the same", "with vdrop's settings"),
    "avx2": ("[an AMD EPYC with AVX2 only](#amd-epyc-with-avx2)", "as shipped"),
    "avx2_later": ("the same, ten minutes later", "as shipped"),
}
README = {  # rows of README's table: where they are from
    "xeon": "two cores of an Intel Xeon with AMX",
    "xeon_starts": "the same kind, three starts",
    "xeon_configured": "the same; the other two with vdrop's settings",
    "epyc": "two cores of an AMD EPYC with AVX-512",
    "slow_epyc": "two of another, half as fast",
    "slow_epyc_configured": "the same; the other two with vdrop's settings",
    "avx2": "two cores of an AMD EPYC with AVX2 only",
    "h200": "NVIDIA H200; too high, the other two waited for the GPU",
}


@cache
def record(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / "outputs" / "record" / "bench" / f"{name}.json").read_text())
    return content


def measurements(machine: Machine) -> dict[tuple[str, str, str, str], tuple[Measurement, Rates]]:
    """What was measured, and the best rates at that time, by size, part, cell and precision."""
    by_case = {}
    for name in machine.records:
        content = record(name)
        for values in content["measured"]:
            timed = Measurement(**{field: values[field] for field in Measurement.__dataclass_fields__})
            by_case[timed.size, timed.part, timed.cell, timed.precision] = timed, Rates(**content["rates"])
    return by_case


def ratio(key: str, size: str, part: str, cell: str, other: str, precision: str) -> str:
    """How many times as fast a cell is as another; a dash where one was not measured."""
    return ratio_on(MACHINES[key], size, part, cell, other, precision)


def ratio_on(machine: Machine, size: str, part: str, cell: str, other: str, precision: str) -> str:
    by_case = measurements(machine)
    ours, theirs = (by_case.get((size, part, name, precision)) for name in (cell, other))
    return "–" if ours is None or theirs is None else f"{speed_ratio(ours[0], theirs[0]):.2f}"


def cases(key: str) -> Iterator[tuple[str, str]]:
    """Sizes and parts of which this library was measured, in the order of tables."""
    by_case = measurements(MACHINES[key])
    for part in CASES:
        for size in ("sentiment",) if part == "ratings" else SIZES:
            if any((size, part, cell, p) in by_case for cell in POLICIES for p in PRECISIONS):
                yield size, part


def table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def both(texts: list[str]) -> str:
    """The texts of all precisions, or a single dash."""
    return "–" if set(texts) == {"–"} else " / ".join(texts)


def ratios(key: str, other: str) -> str:
    """The speed of every policy and case, relative to another cell."""
    machine = MACHINES[key]
    by_case = measurements(machine)
    cells = [
        cell
        for cell in (*POLICIES, "fused")
        if any(measured_cell == cell for _, _, measured_cell, _ in by_case)
    ]
    names = {cell: f"`{cell}`" for cell in POLICIES} | {"fused": "`variational`, `backend=fused`"}
    rows = []
    for size, part in cases(key):
        values = [
            both([ratio(key, size, part, cell, other, p) for p in machine.precisions]) for cell in cells
        ]
        if set(values) != {"–"}:
            rows.append([CASES[part].format(size), *values])
    unit = " / ".join(machine.precisions)
    return table([f"× `{other}`, {unit}", *(names[cell] for cell in cells)], rows)


def rates(key: str) -> str:
    """Words a second and the share of the limit, of `variational` and of its products alone."""
    machine = MACHINES[key]
    by_case = measurements(machine)
    rows = []
    for size, part in cases(key):
        row = [CASES[part].format(size)]
        for cell in ("variational", "products"):
            timed = [by_case.get((size, part, cell, p)) for p in machine.precisions]
            if cell == "variational":
                row.append(both(["–" if t is None else f"{t[0].words_per_second:,.0f}" for t in timed]))
            row.append(both(["–" if t is None else share_of_limit(*t) for t in timed]))
        rows.append(row)
    unit = " / ".join(machine.precisions)
    return table([unit, "`variational`: words/s", "of the limit", "`products`: of the limit"], rows)


def share_of_limit(timed: Measurement, best: Rates) -> str:
    return f"{measurement_limit(timed, best) / timed.step_seconds:.2f}"


def head() -> str:
    """The medium step of every machine."""
    rows = []
    for key, (name, alternatives) in HEAD.items():
        for place, precision in enumerate(MACHINES[key].precisions):
            timed, _ = measurements(MACHINES[key])["medium", "step", "variational", precision]
            rows.append(
                [
                    *((name, alternatives) if place == 0 else ("", "")),
                    precision,
                    f"{timed.words_per_second:,.0f}",
                    *(
                        ratio(key, "medium", "step", "variational", other, precision)
                        for other in (TORCH, LOOP)
                    ),
                ]
            )
    headings = ["two cores of", "alternatives", "precision", "words/s", "× `torch.nn.LSTM`", "× the loop"]
    return table(headings, rows)


def readme() -> str:
    """The medium step, and one layer of its size alone, of every machine."""
    columns = (("step", TORCH), ("step", LOOP), ("layer", TORCH))
    rows = [
        [
            name,
            *(
                both([ratio(key, "medium", part, "variational", other, p) for p in PRECISIONS])
                for part, other in columns
            ),
        ]
        for key, name in README.items()
    ]
    names = ["step, × `torch.nn.LSTM`", "step, × the loop", "one layer, × `torch.nn.LSTM`"]
    return table([" / ".join(PRECISIONS), *names], rows)


def h200() -> str:
    by_case, rows = measurements(MACHINES["h200"]), []
    for cell in ("variational", "variational_untied", "none", TORCH, LOOP):
        row = [f"`{cell}`"]
        for size in ("medium", "large"):
            timed, _ = by_case[size, "step", cell, "bf16"]
            row += [f"{timed.words_per_second:,.0f}", f"{timed.step_seconds * 1e3:.1f}"]
            row += [ratio("h200", size, "step", cell, other, "bf16") for other in (TORCH, LOOP)]
        rows.append(row)
    columns = [f"{size} step: words/s" for size in ("medium", "large")]
    return table(
        ["cell", columns[0], "ms", "× torch", "× the loop", columns[1], "ms", "× torch", "× the loop"], rows
    )


def cell_steps() -> str:
    """One step of a cell for one sequence, in µs."""
    by_case = {
        (values["size"], values["cell"]): values["seconds"]
        for values in record("20261128-123829")["measured"]
        if values["part"] == "cell_step"
    }
    rows = []
    for name, (cell, other) in CELL_STEPS.items():
        for size, units in (("sentiment", 128), ("small", 200), ("medium", 650)):
            ours, theirs = by_case[size, cell], by_case[size, other]
            times = [f"{median(seconds) * 1e6:.0f} µs" for seconds in (ours, theirs)]
            faster = median(there / here for here, there in zip(ours, theirs, strict=True))
            rows.append([name, str(units), *times, f"{faster:.2f}"])
    return table(["cell", "units", "time", "torch's", "× torch's"], rows)


def imported_ratios(machine: Machine, cell: str, other: str, size: str) -> str:
    """The speed of a layer relative to torch's, in both precisions."""
    return both([ratio_on(machine, size, "directions", cell, other, p) for p in PRECISIONS])


def imported() -> str:
    """Layers as a user's own model calls them, beside torch's."""
    rows = []
    for name, cell, other in (("`LSTM`", "variational", "torch_lstm"), ("`GRU`", "gru", "torch_gru")):
        for size, units in (("small", 200), ("medium", 650)):
            ratios = [imported_ratios(one, cell, other, size) for one in (AS_IMPORTED, CONFIGURED)]
            rows.append([name, str(units), *ratios])
    unit = " / ".join(PRECISIONS)
    return table(["layer", "units", f"after an import, {unit}", f"with vdrop's settings, {unit}"], rows)


def named(name: str) -> str:
    """Returns a table by its name: `head`, `readme`, `h200`, `cell_steps`, `imported`, or a machine's, as
    `xeon_torch`. Raises KeyError.
    """
    whole = {"head": head, "readme": readme, "h200": h200, "cell_steps": cell_steps, "imported": imported}
    if name in whole:
        return whole[name]()
    key, _, kind = name.rpartition("_")
    return rates(key) if kind == "rates" else ratios(key, {"torch": TORCH, "loop": LOOP}[kind])


def with_tables(page: Path) -> str:
    """Returns a page with its tables as the records have them. Raises KeyError for an unknown table."""
    return MARK.sub(lambda match: f"{match[1]}{named(match[2])}\n", page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page), encoding="utf-8")
