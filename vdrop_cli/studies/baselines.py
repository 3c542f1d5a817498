"""Newer models on Penn Treebank beside the paper's: parameters, hours of training and perplexities."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean

from vdrop_cli import markdown, pictures, published
from vdrop_cli.errors import ConfigError, nearest
from vdrop_cli.settings.choices import Size
from vdrop_cli.settings.commands import Reproduce
from vdrop_cli.studies import study, table1
from vdrop_cli.studies.rows import Collected, train_settings
from vdrop_cli.studies.study import Column, Drawing, Line, Row, Section, Study

HEADING = "Stronger baselines"
ABOUT = """Newer models on Penn Treebank, single and without MC dropout. `vdrop reproduce study=baselines`
trains them; `docs/baselines.md` explains their settings. *hours*: time that passed in training, on the device
below and beside other programs in some runs. *valid*, *test*: every token but the first, in one pass over the
text. ‡: read or evaluated in another way, see `conf/published/baselines.yaml`. The picture has rows of
Table 1, too."""


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
        return [self.row(name) for name in every if self.names is None or name in self.names]

    def row(self, name: str) -> Row:
        content = published.baselines()["rows"][name]
        choices = (f"experiment={name}",)
        return Row(
            name=name,
            headings=(HEADING,),
            labels=(content["title"],),
            settings=train_settings(choices, self.overrides),
            choices=choices,
            reference=table1.reference(content),
        )

    def lines(self, collected: Collected) -> list[Line]:
        """The lines of every row; without overrides also those of Table 1, for the picture."""
        chosen = self.rows if self.overrides else [*self.rows, *rows_of_table1()]
        return [
            line
            for row in chosen
            for line in table1.lines_of(
                row, collected.finished.get(row.key, []), collected.stuck.get(row.key, [])
            )
        ]

    def record_names(self, lines: list[Line]) -> dict[str, str]:
        return {line.row.key: f"baselines/{line.row.name}" for line in own(lines)}

    def introduction(self) -> list[str]:
        return []

    def sections(self, lines: list[Line]) -> list[Section]:
        changed = ""
        if self.overrides:
            changed = f" All runs with `{self.overrides}`, which is not what was published."
        return [Section((HEADING,), ABOUT + changed, own(lines), COLUMNS, UNMEASURED, lambda: draw(lines))]


def own(lines: list[Line]) -> list[Line]:
    """Without those of Table 1."""
    return [line for line in lines if line.row.name in published.baselines()["rows"]]


def rows_of_table1() -> list[Row]:
    """With their size in the label."""
    chosen = [(Size[size], name) for size, names in published.baselines()["table1"].items() for name in names]
    return [in_picture(table1.make_row(size, name, ""), size) for size, name in chosen]


def in_picture(row: Row, size: Size) -> Row:
    return replace(row, labels=(f"Table 1, {size}: {row.labels[0]}",))


def parameters(line: Line) -> str:
    """In millions."""
    return f"{published.baselines()['rows'][line.row.name]['parameters']:.1f}"


def hours(line: Line) -> list[float]:
    """Of each run's training, with its validations but without the evaluation at the end."""
    return [measured.run.result["seconds"] / 3600 for measured in line.runs]


NAMED: list[Column] = [("experiment", lambda line: f"`{line.row.name}`"), ("million parameters", parameters)]
COLUMNS: list[Column] = [
    *NAMED,
    ("hours", lambda line: markdown.mean(hours(line), 1)),
    ("valid, published", table1.published_number("valid")),
    ("valid", study.mean("valid", 2)),
    ("test, published", table1.published_number("test")),
    ("test", study.mean("test", 2)),
    ("difference", table1.difference("test", "test")),
]
UNMEASURED: list[Column] = [
    *NAMED,
    ("valid, published", table1.published_number("valid")),
    ("test, published", table1.published_number("test")),
]


def draw(lines: list[Line]) -> Iterator[Drawing]:
    """Test perplexity against hours of training: a point for each line."""
    points = {
        label: (fmean(hours(line)), fmean(line.values("test")))
        for label, line in table1.by_label([line for line in lines if line.runs]).items()
    }
    if points:
        figure = pictures.by_hours(points, published.baselines()["systems"])
        yield Drawing("Test perplexity against hours of training", "baselines_hours", figure)
