"""RESULTS.md: the tables of all studies, from run folders and records; no number is typed by hand."""

import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vdrop_cli import files, markdown, ownership, pictures, runs
from vdrop_cli.runs import Finished, Stuck
from vdrop_cli.settings.choices import Pictures
from vdrop_cli.settings.commands import Table
from vdrop_cli.studies import exports, records, rows, written_page
from vdrop_cli.studies.rows import Collected, precision_and_device
from vdrop_cli.studies.study import Column, Line, Row, Section, Study

SEEDS: Column = ("seeds", lambda line: line.seeds)
FINDINGS = "docs/findings/index.md"  # beside the page, in a checkout
# of runs.ENVIRONMENT_COLUMNS; the precision is in the first table, the others are in the second
COLUMNS_IN_FIRST_TABLE = 1
LEGEND = f"""{written_page.MARK} from run folders and the records in `outputs/record/`. A second table says
how the runs were made; *: the code differed from the commit; ?: it is unknown whether it did."""


@dataclass(frozen=True)
class Composed:
    """What a page shows: the lines of each study, in their order."""

    studies: Sequence[Study]
    collected: Collected
    lines: list[list[Line]]


def require_writable(settings: Table) -> None:
    """Raises ConfigError where a file of the page could not be written, or is not vdrop's."""
    if settings.pictures is not Pictures.none:
        pictures.require_matplotlib()
    for name in ("file", "csv", "latex"):
        path = getattr(settings, name)
        if path is not None:
            files.make_output_folder(Path(path), name)
    for name, is_own in (("csv", exports.is_csv), ("latex", exports.is_latex)):
        path = getattr(settings, name)
        if path is not None:
            ownership.require_own(Path(path), is_own, f"choose another {name}=", 1000)
    written_page.require_own(written_page.path_of(settings.file, settings.outputs))


def compose(settings: Table, studies: Sequence[Study], planned: Collection[Row] = ()) -> Composed:
    """Reads the runs and returns what the page shows; writes nothing.

    Raises ConfigError if the page would lose numbers of the existing page. Rows in `planned` are exempt: they
    will get their numbers later.
    """
    for study in studies:
        _ = study.rows  # a mistake in the choice is an error before runs are read
    collected = rows.collect(Path(settings.outputs))
    composed = Composed(studies, collected, [study.lines(collected) for study in studies])
    names = [(*row.headings, *row.labels) for row in planned]
    path = written_page.path_of(settings.file, settings.outputs)
    written_page.require_nothing_lost(path, render(composed, settings, Pictures.none), names)
    return composed


def write(settings: Table, studies: Sequence[Study], planned: Collection[Row] = ()) -> list[Line]:
    """Writes the page, and what else the settings ask for. Returns the lines of all studies.

    Raises ConfigError as `compose` does.
    The first study is Table 1, which is also printed, and exported.
    """
    require_writable(settings)
    composed = compose(settings, studies, planned)
    if settings.record:
        names: dict[str, str] = {}
        for study, lines in zip(studies, composed.lines, strict=True):
            names |= study.record_names(lines)
        records.write(names, composed.collected, Path(settings.outputs) / "record")
    path = written_page.path_of(settings.file, settings.outputs)
    page = render(composed, settings, settings.pictures)
    files.write_output(path, page.encode(), "file" if settings.file is not None else "outputs")
    table1 = composed.lines[0]
    for key, export in (("csv", exports.as_csv), ("latex", exports.as_latex)):
        if (name := getattr(settings, key)) is not None:
            files.write_output(Path(name), export(table1).encode(), key)
    print("\n\n".join([exports.as_text(table1), *stuck_starts(table1, composed.collected)]))
    print(f"\nwritten to {path}", file=sys.stderr)
    return [line for lines in composed.lines for line in lines]


def render(composed: Composed, settings: Table, kind: Pictures) -> str:
    """The page; its pictures are drawn, unless their kind is `none`."""
    outputs, path = Path(settings.outputs), written_page.path_of(settings.file, settings.outputs)
    parts = ["# Results", LEGEND]
    for study, lines in zip(composed.studies, composed.lines, strict=True):
        parts += study.introduction()
        for section in study.sections(lines):
            parts += tables(section, study.labels)
            parts += stuck_starts(section.lines, composed.collected)
            if kind is not Pictures.none:
                for title, name, figure in section.draw():
                    picture = outputs / "record" / "pictures" / f"{name}.{kind}"
                    pictures.save(figure, picture, "outputs")
                    parts.append(markdown.picture(title, picture, path))
    parts += choices([folder / "choices" for folder in rows.record_folders(outputs)])
    if (path.parent / FINDINGS).is_file():
        parts.append(f"What the runs show: [{FINDINGS}]({FINDINGS}).")
    return "\n\n".join(parts) + "\n"


def tables(section: Section, labels: Sequence[str]) -> list[str]:
    """The heading of a section; its metrics, the rows that have not been run, and how the runs were made."""
    named: list[Column] = [
        (label, lambda line, place=place: line.row.labels[place])  # type: ignore[misc]
        for place, label in enumerate(labels)
    ]
    environment_columns: list[Column] = [
        (heading, lambda line, place=place: line.environment_cells[place])  # type: ignore[misc]
        for place, heading in enumerate(runs.ENVIRONMENT_COLUMNS)
    ]
    measured = [line for line in section.lines if line.runs]
    others = [line for line in section.lines if not line.runs]
    parts = [f"{'#' * (1 + len(section.headings))} {section.headings[-1]}"]
    parts += [section.about] if section.about else []
    if measured:
        parts.append(
            table([*named, *section.columns, SEEDS, *environment_columns[:COLUMNS_IN_FIRST_TABLE]], measured)
        )
    if others:
        summary = f"{len(others)} row{'s' if len(others) > 1 else ''} not yet run"
        content = table([*named, *section.unmeasured], others)
        parts.append(f"<details><summary>{summary}</summary>\n\n{content}\n\n</details>")
    if measured:
        parts.append(table([*named, SEEDS, *environment_columns[COLUMNS_IN_FIRST_TABLE:]], measured))
    return parts


def table(columns: Sequence[Column], lines: Iterable[Line]) -> str:
    return markdown.table(
        [heading for heading, _ in columns], ([cell(line) for _, cell in columns] for line in lines)
    )


def stuck_starts(lines: Iterable[Line], collected: Collected) -> list[str]:
    """The part of the page that lists the stuck runs of these rows, as a list; empty if they have no stuck
    runs.
    """
    names: dict[str, str] = {}
    for line in lines:
        names.setdefault(line.row.key, " ".join(line.row.labels))
    groups: dict[str, list[Stuck]] = {}
    for key, name in names.items():
        for run in collected.stuck.get(key, []):
            groups.setdefault(f"{name} ({', '.join(precision_and_device(run))})", []).append(run)
    items = [f"- {name}: {', '.join(map(stuck_seed, group))}" for name, group in groups.items()]
    about = (
        "Stuck starts, which other seeds replace, with their mean training loss in nats a word "
        "(`stuck.steps`, `stuck.loss`):"
    )
    return ["\n".join([about, *items])] if items else []


def stuck_seed(run: Stuck) -> str:
    return f"seed {run.train.seed} ({run.start.loss:.2f} after {run.start.step} steps)"


def choices(folders: Iterable[Path]) -> list[str]:
    """How settings were chosen: the validation perplexity by value, from records in
    `<row>/<setting>/<value>/`.
    """
    by_setting: dict[Path, list[Finished]] = {}
    for folder in folders:
        for run in runs.below(folder):
            by_setting.setdefault(run.folder.parent.relative_to(folder), []).append(run)
    lines = []
    for setting, setting_runs in by_setting.items():
        perplexities = {run.settings[setting.name]: run.result["valid_ppl"] for run in setting_runs}
        train = setting_runs[0].train
        values = ", ".join(f"{value:g}: {perplexities[value]:.2f}" for value in sorted(perplexities))
        best = min(perplexities, key=lambda value: perplexities[value])
        name = f"{setting.parent.name}, {train.model.name}, {train.schedule.epochs} epochs"
        lines.append([f"`{setting.name}`", name, values, f"{best:g}"])
    if not lines:
        return []
    about = "Validation perplexity by value, one seed each; records in `outputs/record/choices/`."
    headings = ["setting", "runs", "validation perplexity", "lowest at"]
    return [
        "## Settings that were not published, chosen on validation",
        about,
        markdown.table(headings, lines),
    ]
