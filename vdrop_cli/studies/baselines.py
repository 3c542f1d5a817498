"""Newer models on Penn Treebank beside the paper's: parameters, hours of training and perplexities."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from vdrop_cli import markdown, pictures, published
from vdrop_cli.errors import ConfigError, nearest
from vdrop_cli.settings.choices import Size
from vdrop_cli.settings.commands import Reproduce
from vdrop_cli.settings.fields import flatten
from vdrop_cli.settings.train import Train
from vdrop_cli.studies import study, table1
from vdrop_cli.studies.rows import Collected, conditions, train_settings
from vdrop_cli.studies.study import Column, Drawing, Line, Row, Section, Study

HEADING = "Stronger baselines"
ABLATIONS = """`{base}` with one part changed, for as many epochs. *test, raw*: with the last weights
instead of their average. *difference*: the test perplexity minus that of `{base}` in the same precision on
the same device. Above zero, `{base}` is better; with one seed, a difference of a point may be chance."""
ABOUT = """Newer models on Penn Treebank, single and without MC dropout. `vdrop reproduce study=baselines`
trains them; `docs/baselines.md` explains their settings. *hours*: time that passed in training, on the device
below; ≤: beside other programs, so the run alone takes less. *valid*, *test*: every token but the first, in
one pass over the text. ‡: of other settings, or read or evaluated in another way, see
`conf/published/baselines.yaml`. The picture also has the rows of Table 1; its open markers are the runs
beside other programs."""


@dataclass(frozen=True)
class Baselines(Study):
    labels = ("row",)
    names: list[str] | None = None  # of rows; None: all
    overrides: str = ""

    @classmethod
    def from_reproduce(cls, settings: Reproduce) -> "Baselines":
        return cls(settings.rows, settings.overrides)

    def compose_rows(self) -> list[Row]:
        every = list(published.baselines()["rows"])
        for name in self.names or []:
            if name not in every:
                raise ConfigError(f"rows: {name} is not a row of study=baselines{nearest(name, every)}")
        return [make_row(name, self.overrides) for name in every if self.names is None or name in self.names]

    def lines(self, collected: Collected) -> list[Line]:
        """The lines of every row, and of the rows that they are ablations of; without overrides also those of
        Table 1, for the picture.
        """
        bases = dict.fromkeys(base for row in self.rows if (base := base_name(row.name)) is not None)
        chosen = [row.name for row in self.rows]
        rows = [make_row(name, self.overrides) for name in bases if name not in chosen] + self.rows
        rows += [] if self.overrides else rows_of_table1()
        return [
            line
            for row in rows
            for line in table1.lines_of(
                row, collected.finished.get(row.key, []), collected.stuck.get(row.key, [])
            )
        ]

    def record_names(self, lines: list[Line]) -> dict[str, str]:
        return {line.row.key: f"baselines/{line.row.name}" for line in lines_of_baselines(lines)}

    def introduction(self) -> list[str]:
        return []

    def sections(self, lines: list[Line]) -> list[Section]:
        changed = self.note_on_overrides
        groups: dict[str | None, list[Line]] = {}
        for line in lines:
            groups.setdefault(base_name(line.row.name), []).append(line)
        in_picture = groups.pop(None, [])
        recipes = lines_of_baselines(in_picture)
        return [
            Section((HEADING,), ABOUT + changed, recipes, COLUMNS, UNMEASURED, lambda: draw(in_picture)),
            *(
                ablation_section(
                    base, ablations, [line for line in recipes if line.row.name == base], changed
                )
                for base, ablations in groups.items()
                if base is not None
            ),
        ]


def ablation_section(base: str, lines: list[Line], unchanged: list[Line], changed: str) -> Section:
    """The ablations of the row `base`, whose own lines are `unchanged`."""
    about = ABLATIONS.format(base=base) + changed
    columns = [*ABLATION_COLUMNS, ("difference", difference(unchanged))]
    return Section(lines[0].row.headings, about, lines, columns, NAMED, lambda: ())


def difference(unchanged: list[Line]) -> Callable[[Line], str]:
    """Returns a function that writes the test perplexity of a line minus that of the unchanged row, in the
    same precision on the same device.
    """
    means = {conditions(line.runs[0].run): fmean(line.values("test")) for line in unchanged if line.runs}

    def cell(line: Line) -> str:
        other = means.get(conditions(line.runs[0].run))
        return "–" if other is None else f"{fmean(line.values('test')) - other:+.2f}"

    return cell


def make_row(name: str, overrides: str) -> Row:
    """Returns a row. Raises ConfigError if `overrides` are invalid for it, or undo the change that makes it
    an ablation.
    """
    content, base = published.baselines()["rows"][name], base_name(name)
    choices = (f"experiment={name}",)
    try:
        settings = train_settings(choices, overrides)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    if base is not None and overrides:
        ablated = changes(base, train_settings(choices, ""), "")
        if changes(base, settings, overrides) != ablated:
            raise ConfigError(
                f"overrides={overrides} must leave what {name} changes ({', '.join(ablated)}); "
                "give others, or choose other rows"
            )
    return Row(
        name=name,
        headings=(HEADING,) if base is None else (HEADING, f"{base} with one part changed"),
        labels=(content["title"],),
        settings=settings,
        choices=choices,
        reference=table1.reference(content),
        is_overridden=bool(overrides),
    )


def changes(base: str, settings: Train, overrides: str) -> dict[str, Any]:
    """The settings in which an ablation differs from the row `base` with the same overrides."""
    ours = flatten(settings.numbers())
    theirs = flatten(train_settings((f"experiment={base}",), overrides).numbers())
    return {
        name: value
        for name, value in ours.items()
        if name not in ("model.name", "dropout.name") and value != theirs.get(name)
    }


def base_name(name: str) -> str | None:
    """The row of which this one is an ablation; None where it is none."""
    content: dict[str, Any] = published.baselines()["rows"].get(name, {})
    return content.get("ablation_of")


def lines_of_baselines(lines: list[Line]) -> list[Line]:
    """Returns the lines without those of Table 1."""
    return [line for line in lines if line.row.name in published.baselines()["rows"]]


def rows_of_table1() -> list[Row]:
    """Returns the rows of Table 1 that the picture has, with their size in the label."""
    chosen = [(Size[size], name) for size, names in published.baselines()["table1"].items() for name in names]
    return [with_size(table1.make_row(size, name, ""), size) for size, name in chosen]


def with_size(row: Row, size: Size) -> Row:
    return replace(row, labels=(f"Table 1, {size}: {row.labels[0]}",))


def parameters(line: Line) -> str:
    """Returns the number of parameters in millions; a dash where settings differ, which may change it."""
    if line.row.is_overridden:
        return "–"
    return f"{published.baselines()['rows'][line.row.name]['parameters']:.1f}"


def hours(line: Line) -> str:
    """Returns the mean hours of training; as an upper bound where runs shared their device."""
    every = [measured.run.hours for measured in line.runs]
    return f"{'≤ ' if has_shared_device(line) else ''}{markdown.mean(every, 1)}"


def has_shared_device(line: Line) -> bool:
    return any(measured.run.has_shared_device for measured in line.runs)


NAMED: list[Column] = [("experiment", lambda line: f"`{line.row.name}`"), ("million parameters", parameters)]
COLUMNS: list[Column] = [
    *NAMED,
    ("hours", hours),
    ("valid, published", table1.published_number("valid")),
    ("valid", study.mean("valid", 2)),
    ("test, published", table1.published_number("test")),
    ("test", study.mean("test", 2)),
    ("difference", table1.difference("test", "test")),
]
ABLATION_COLUMNS: list[Column] = [
    *NAMED,
    ("hours", hours),
    ("valid", study.mean("valid", 2)),
    ("test", study.mean("test", 2)),
    ("test, raw", study.mean("test_raw", 2)),
]
UNMEASURED: list[Column] = [
    *NAMED,
    ("valid, published", table1.published_number("valid")),
    ("test, published", table1.published_number("test")),
]


def draw(lines: list[Line]) -> Iterator[Drawing]:
    """Test perplexity against hours of training: a point for each line."""
    points = {
        f"{line.row.labels[0]} ({table1.machine(line)})": pictures.TimedPerplexity(
            fmean(measured.run.hours for measured in line.runs),
            fmean(line.values("test")),
            has_shared_device(line),
        )
        for line in lines
        if line.runs
    }
    if points:
        figure = pictures.hours_figure(points, published.baselines()["systems"])
        yield Drawing("Test perplexity against hours of training", "baselines_hours", figure)
