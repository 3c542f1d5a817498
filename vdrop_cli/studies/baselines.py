"""Small models of later years on Penn Treebank, beside the paper's: what a test perplexity costs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean

from vdrop_cli import markdown, pictures, published
from vdrop_cli.arguments import prepared
from vdrop_cli.errors import ConfigError, nearest
from vdrop_cli.settings.choices import Size
from vdrop_cli.settings.commands import Reproduce
from vdrop_cli.studies import study, table1
from vdrop_cli.studies.rows import Collected, train_settings
from vdrop_cli.studies.study import Column, Drawing, Line, Row, Section, Study

HEADING = "Stronger baselines"
ABOUT = """Models of later years on Penn Treebank, single and without MC dropout, with the rows of
Table 1 below them as far as they are measured. `vdrop reproduce study=baselines` makes the runs and this
section; the settings are explained in `docs/baselines.md`. *hours*: of training, on the device below.
*valid*, *test*: every token but the first, in one pass over the text. The sources of the published numbers
are in `conf/published/baselines.yaml`."""


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
        changes = content.get("changes", ())
        choices = (f"experiment={content.get('experiment', name)}", *prepared("train", changes))
        return Row(
            name=name,
            headings=(HEADING,),
            labels=(content["title"],),
            settings=train_settings(choices, self.overrides),
            choices=choices,
            reference=table1.reference(content),
        )

    def lines(self, collected: Collected) -> list[Line]:
        """The lines of every row, then those of Table 1 that are measured."""
        own = [line for row in self.rows for line in lines_of(row, collected)]
        return own + [line for row in rows_of_table1() for line in lines_of(row, collected) if line.runs]

    def record_names(self, lines: list[Line]) -> dict[str, str]:
        every = published.baselines()["rows"]
        return {line.row.key: f"baselines/{line.row.name}" for line in lines if line.row.name in every}

    def introduction(self) -> list[str]:
        return []

    def sections(self, lines: list[Line]) -> list[Section]:
        changed = f" All runs with `{self.overrides}`." if self.overrides else ""
        return [Section((HEADING,), ABOUT + changed, lines, COLUMNS, UNMEASURED, lambda: draw(lines))]


def rows_of_table1() -> list[Row]:
    """Rows of Table 1, with their size in the label. Their published validation is of another computation."""
    chosen = [(Size[size], name) for size, names in published.baselines()["table1"].items() for name in names]
    return [in_this_study(table1.make_row(size, name, "")) for size, name in chosen]


def in_this_study(row: Row) -> Row:
    size = str(row.settings.model.size)
    label = f"Table 1, {size}: {row.labels[0]}"
    return replace(row, headings=(HEADING,), labels=(label,), reference=replace(row.reference, valid=None))


def lines_of(row: Row, collected: Collected) -> list[Line]:
    return table1.lines_of(row, collected.finished.get(row.key, []), collected.stuck.get(row.key, []))


def parameters(row: Row) -> float:
    """In millions."""
    content = published.baselines()
    if row.name in content["rows"]:
        return float(content["rows"][row.name]["parameters"])
    size, name = row.name.removeprefix(f"{published.TABLE_1}_").split("_", 1)
    return float(content["table1"][size][name])


def hours(line: Line) -> list[float]:
    """Of each run's training, validations included."""
    return [measured.run.result["seconds"] / 3600 for measured in line.runs]


NAMED: list[Column] = [
    ("experiment", lambda line: f"`{' '.join(line.row.choices).removeprefix('experiment=')}`"),
    ("million parameters", lambda line: f"{parameters(line.row):g}"),
]
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
        f"{line.row.labels[0]}, {line.made[0]}, {line.made[1]}": (
            fmean(hours(line)),
            fmean(line.values("test")),
        )
        for line in lines
        if line.runs
    }
    if points:
        figure = pictures.by_hours(points, published.baselines()["systems"])
        yield Drawing("Test perplexity against hours of training", "baselines_hours", figure)
