"""`vdrop table`: what was measured beside what was published, from run folders and records; no number is
typed by hand.
"""

import csv
import io
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

from vdrop_cli import (
    CONF,
    RECORDS,
    experiments,
    files,
    markdown,
    ownership,
    pictures,
    ratings,
    results_page,
    runs,
)
from vdrop_cli.errors import ConfigError
from vdrop_cli.experiments import Row
from vdrop_cli.runs import Finished, Logged, Stuck
from vdrop_cli.settings.choices import Pictures, Size
from vdrop_cli.settings.commands import Figures, Table

Run = TypeVar("Run", bound=Logged)
SIZES = {Size.small: "small (200 units)", Size.medium: "medium (650 units)", Size.large: "large (1500 units)"}


class Evaluated(NamedTuple):
    """A run, and what it came to in the way that its row is evaluated."""

    run: Finished
    valid: float | None  # perplexity as published
    exact: float | None  # perplexity
    test: float  # perplexity
    speed: float | None  # words a second
    told: dict[str, Any]  # of an evaluation beyond the standard one

    @property
    def environments(self) -> list[dict[str, Any]]:
        """In which it came to that, one after the other."""
        return [self.told.get("environment", {})] if self.told else self.run.environments

    @property
    def seeds(self) -> str:
        members = [
            int(Path(member).parent.name.rpartition("-s")[2]) for member in self.told.get("members", ())
        ]
        return markdown.ranges(members) if members else str(self.run.train.seed)


@dataclass(frozen=True)
class Line:
    """A row of the table: runs of one experiment, in one precision, on one device; `runs` may be none yet."""

    row: Row
    runs: list[Evaluated]

    def values(self, of: Callable[[Evaluated], float | None]) -> list[float]:
        return [value for value in map(of, self.runs) if value is not None]


@dataclass(frozen=True)
class Work:
    """What is to be done before a page is written: the rows that get their numbers by it."""

    figures: Figures  # that the page will have
    rows: list[Row]
    on_reviews: list[ratings.Row]


def require_that_it_can_be_written(settings: Table, work: Work | None = None) -> None:
    """Raises ConfigError where it cannot; before hours of `work` also where the page that is there would lose
    numbers by it.
    """
    if settings.pictures is not Pictures.none:
        pictures.require_matplotlib()
    for name in ("file", "csv", "latex"):
        path = getattr(settings, name)
        if path is not None and not Path(path).parent.is_dir():
            raise ConfigError(
                f"{name}={path} is in a folder that does not exist; make it, or choose another one"
            )
    for name, is_own in (("csv", is_csv), ("latex", is_latex)):
        path = getattr(settings, name)
        if path is not None:
            ownership.require_own(Path(path), is_own, f"choose another {name}=", 1000)
    results_page.require_own(results_page.path_of(settings.file, settings.outputs))
    if work is not None:
        compose(settings, work.figures, work)


def run(settings: Table) -> None:
    write(settings, Figures(outputs=settings.outputs, file=settings.file))


@dataclass(frozen=True)
class Composed:
    """What a page is made of."""

    found: dict[str, list[Finished]]
    stuck: dict[str, list[Stuck]]
    lines: list[Line]
    on_reviews: list[ratings.Line]


def compose(settings: Table, figures: Figures, work: Work | None = None) -> Composed:
    """Reads the runs; writes nothing. Raises ConfigError where the page, after `work`, would lose numbers of
    the one that is there.
    """
    rows = experiments.rows(settings.sizes, settings.rows, settings.overrides)
    if not rows:
        raise ConfigError("sizes and rows leave nothing; vdrop table shows all there is")
    found = collect(Path(settings.outputs))
    stuck = collect_stuck(Path(settings.outputs), found)
    lines = [line for row in rows for line in of_row(row, found.get(row.key, []), stuck.get(row.key, []))]
    on_reviews = ratings.all_lines(figures, every(found))
    path = results_page.path_of(settings.file, settings.outputs)

    def without_pictures(lines: list[Line], on_reviews: list[ratings.Line]) -> str:
        return page(
            lines, settings, {}, ratings.section(figures, on_reviews, Path(), Pictures.none, path), stuck
        )

    planned = list[results_page.Name]()
    if work is not None:
        of_work = without_pictures(
            [Line(row, []) for row in work.rows], [ratings.Line(row, [], []) for row in work.on_reviews]
        )
        planned = [name for name, _ in results_page.rows(of_work)]
    results_page.require_nothing_lost(path, without_pictures(lines, on_reviews), planned)
    return Composed(found, stuck, lines, on_reviews)


def write(settings: Table, figures: Figures) -> tuple[list[Line], list[ratings.Line]]:
    """Returns what the page holds of Table 1, and of the runs on film reviews, which `figures` chooses."""
    require_that_it_can_be_written(settings)
    composed = compose(settings, figures)
    lines, on_reviews = composed.lines, composed.on_reviews
    outputs, path = Path(settings.outputs), results_page.path_of(settings.file, settings.outputs)
    if settings.record:
        names = {
            line.row.key: f"{experiments.TABLE}/{line.row.size}_{line.row.name}" for line in reversed(lines)
        }
        record(names | ratings.record_names(on_reviews), composed.found, outputs / "record", composed.stuck)
    drawn = draw(lines, outputs / "record" / "pictures", settings.pictures)
    section = ratings.section(figures, on_reviews, outputs / "record" / "pictures", settings.pictures, path)
    if settings.file is None:
        path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(
        Path(os.path.realpath(path)), page(lines, settings, drawn, section, composed.stuck).encode()
    )
    for name, made in ((settings.csv, as_csv), (settings.latex, as_latex)):
        if name is not None:
            files.replace(Path(os.path.realpath(name)), made(lines).encode())
    print(
        "\n\n".join(
            [
                plain_table(lines),
                *(["\n".join(of_stuck)] if (of_stuck := stuck_starts(lines, composed.stuck)) else []),
            ]
        )
    )
    print(f"\nwritten to {path}", file=sys.stderr)
    return lines, on_reviews


Same = tuple[str, int, str, str]  # settings, seed, precision and device


def same(run: Logged) -> Same:
    return experiments.key(run.numbers), run.train.seed, str(run.train.precision), run.environment["device"]


def collect(outputs: Path) -> dict[str, list[Finished]]:
    """The finished runs and records, by what makes them runs of a row; of the same run twice, the one with
    more evaluations.

    A run stands in place of its record, and of one that was made before it with the same settings; it is
    evaluated as these were until it is itself. Records that come with a checkout count for other outputs,
    too.
    """
    found: dict[Same, Finished] = {}
    for folder in (*results_page.record_folders(outputs), outputs / "train"):
        of_part: dict[Same, Finished] = {}
        for finished in runs.below(folder):
            known = of_part.get(same(finished))
            if known is None or len(finished.evaluations) > len(known.evaluations):
                of_part[same(finished)] = finished
        found |= {of: replace(finished, record=found.get(of)) for of, finished in of_part.items()}
    return by_key(found)


def collect_stuck(outputs: Path, found: dict[str, list[Finished]]) -> dict[str, list[Stuck]]:
    """The stuck runs and records in the same way, but for those of which there is a finished run: it was not
    judged, or otherwise.
    """
    finished = {same(run) for run in every(found)}
    stuck = {
        same(run): run
        for folder in (*results_page.record_folders(outputs), outputs / "train")
        for run in runs.stuck_below(folder)
    }
    return by_key({of: run for of, run in stuck.items() if of not in finished})


def by_key(found: dict[Same, Run]) -> dict[str, list[Run]]:
    """In order of seeds."""
    by_key: dict[str, list[Run]] = {}
    for (key, *_), run in sorted(found.items(), key=lambda item: item[0][1]):
        by_key.setdefault(key, []).append(run)
    return by_key


def every(found: dict[str, list[Finished]]) -> Iterator[Finished]:
    return (finished for of_key in found.values() for finished in of_key)


def made_with(run: Logged) -> tuple[str, str]:
    """Precision and device."""
    return str(run.train.precision), run.environment["device"]


def of_row(row: Row, found: list[Finished], stuck: Iterable[Stuck] = ()) -> list[Line]:
    """A line for each precision and device that runs of it were made with, or one that says that none
    were.
    """
    groups: dict[tuple[str, str], list[Evaluated]] = {}
    for finished in found:
        seeds = experiments.seeds(
            row.published.members, [run.train.seed for run in stuck if made_with(run) == made_with(finished)]
        )
        evaluated = evaluate(row, finished, seeds)
        if evaluated is not None:
            groups.setdefault(made_with(finished), []).append(evaluated)
    return [Line(row, group) for group in groups.values()] or [Line(row, [])]


def evaluate(row: Row, finished: Finished, members: Collection[int]) -> Evaluated | None:
    """What a run came to in the row's way; None where that has not been evaluated. `members` are the seeds of
    averaged runs.
    """
    published, result = row.published, finished.result
    if not (published.mc_samples or published.members > 1):
        runs.require_parts(result, finished.folder / "result.json", "valid_ppl", "test_ppl")
        exact, as_published = (
            result["valid_ppl"],
            result.get("valid_ppl_as_published"),
        )  # of Penn Treebank alone
        return Evaluated(finished, as_published, exact, result["test_ppl"], finished.words_per_second, {})
    told = runs.evaluation_of(finished, published, members)
    if told is None:
        return None
    metrics = told["metrics"]
    name = f"test_ppl_mc{published.mc_samples}" if published.mc_samples else "test_ppl"
    runs.require_parts(metrics, finished.folder, name, *(() if published.mc_samples else ("valid_ppl",)))
    test = metrics[name]
    return Evaluated(finished, None, None if published.mc_samples else metrics["valid_ppl"], test, None, told)


def record(
    names: dict[str, str], found: dict[str, list[Finished]], folder: Path, stuck: dict[str, list[Stuck]]
) -> None:
    """Copies what is small of the runs of rows, whose names are given by their keys.

    Raises ConfigError, with nothing copied, where somebody else's files are in the place of a record, or
    evaluations would be lost.
    """
    targets: dict[Path, Finished | Stuck] = {}
    for key, name in names.items():
        ended: list[Finished | Stuck] = [*found.get(key, []), *stuck.get(key, [])]
        for run in ended:
            device = re.sub(r"\W+", "_", str(run.environment["device"])).lower()
            there = folder / f"{name}-{run.train.precision}-{device}" / f"s{run.train.seed}"
            if there.resolve() != run.folder.resolve() and not is_shipped(run, folder):
                ownership.require_record(there)
                if isinstance(run, Finished):
                    require_evaluations_kept(run, there)
                elif (there / "result.json").exists():  # which could not be read
                    raise ConfigError(
                        f"{there} holds a result, and would be overwritten by a run that is stuck; move it "
                        "away"
                    )
                targets[there] = run
    for there, run in targets.items():
        copy_record(run, there)


def is_shipped(run: Logged, folder: Path) -> bool:
    """Whether it is a record that comes with a checkout, and `folder` is that of other outputs."""
    return (
        RECORDS is not None and folder.resolve() != RECORDS and run.folder.resolve().is_relative_to(RECORDS)
    )


def require_evaluations_kept(finished: Finished, there: Path) -> None:
    """Raises ConfigError where a record holds evaluations that the run in its place lacks, and is not of the
    same training.
    """
    parts = [(there / name, finished.folder / name) for name in ("log.jsonl", "result.json")]
    if all(files.read(old) == files.read(new) for old, new in parts if old.exists()):
        return
    own = set(map(runs.kind, finished.evaluations))
    if lacking := [path.name for path in evaluations_in(there) if runs.kind(path) not in own]:
        how = f"evaluate it in the same way (vdrop eval checkpoint={finished.folder} …), or move them away"
        raise ConfigError(f"{there} would lose {', '.join(lacking)}, which {finished.folder} lacks; {how}")


def evaluations_in(record: Path) -> list[Path]:
    """Of any epoch."""
    return [
        path
        for path in ownership.entries(record)
        if ownership.matches(rf"{ownership.EVALUATION}\.json", path)
    ]


def copy_record(run: Finished | Stuck, there: Path) -> None:
    """In place of an older one, of which evaluations stay that the run lacks.

    What is cut off half-way is no run that has ended: how it did goes first, and comes last.
    """
    there.mkdir(parents=True, exist_ok=True)
    for name in ownership.OUTCOMES:
        (there / name).unlink(missing_ok=True)
    evaluations, outcome = (
        (run.evaluations, "result.json") if isinstance(run, Finished) else ([], "stuck.json")
    )
    own = set(map(runs.kind, evaluations))
    for old in evaluations_in(there):
        if runs.kind(old) in own:
            old.unlink()
    for path in (run.folder / "config.yaml", run.folder / "log.jsonl", *evaluations, run.folder / outcome):
        files.replace(there / path.name, files.read(path))


def as_published(value: float | None, deviation: float | None, mark: str) -> str:
    return "–" if value is None else f"{value}" + (f" ± {deviation}" if deviation is not None else "") + mark


def difference(values: list[float], published: float | None) -> str:
    return f"{fmean(values) - published:+.2f}" if values and published is not None else "–"


HEADINGS = (
    "row",
    "valid, published",
    "valid, as published",
    "difference",
    "valid, exact",
    "test, published",
    "test",
    "difference",
    "words/s, published",
    "words/s",
    "seeds",
    *runs.MADE,
)


def cells(line: Line) -> list[str]:
    """The line, a text for each of HEADINGS."""
    published = line.row.published
    mark = ("" if published.confirmed else "†") + ("" if published.same_settings else "‡")
    valid, exact, test = (line.values(of) for of in (lambda e: e.valid, lambda e: e.exact, lambda e: e.test))
    told = [
        published.row,
        as_published(published.valid, published.valid_deviation, mark),
        markdown.mean(valid, 2),
        difference(valid, published.valid if published.same_settings else None),
        markdown.mean(exact, 2),
        as_published(published.test, published.test_deviation, mark),
        markdown.mean(test, 2),
        difference(test, published.test if published.same_settings else None),
        "–" if published.words_per_second is None else f"{published.words_per_second:,.0f}{mark}",
    ]
    if not line.runs:
        return [told[0], told[1], "not yet run", "–", "–", told[5], "not yet run", "–", told[8], *["–"] * 6]
    speeds = line.values(lambda e: e.speed)
    seeds = " ".join(evaluated.seeds for evaluated in line.runs)
    environments = (environment for evaluated in line.runs for environment in evaluated.environments)
    return [*told, f"{fmean(speeds):,.0f}" if speeds else "–", seeds, *runs.made(environments)]


def by_size(lines: list[Line]) -> Iterator[tuple[Size, list[Line]]]:
    for size in dict.fromkeys(line.row.size for line in lines):
        yield size, [line for line in lines if line.row.size is size]


LEGEND = f"""{results_page.MARK} from run folders and the records in `outputs/record/`.

- *valid, as published*: validation as the authors' code computes it, about 1.4 % low at 35 steps a chunk; it compares with the
  published column.
- *valid, exact* and *test*: every token but the first, in one pass over the text. ±: deviation over seeds; of published numbers, theirs.
- †: not confirmed from a copy of the paper. ‡: of other settings, see the file of the experiment. *: the code differed from the commit.
  Published words/s: on a GPU of 2015.
- ?: it is unknown whether the code differed from the commit.
- MC rows evaluate the runs of the row above. The small size has the schedule of the medium one (39 epochs), with which it is published
  nowhere."""

HOW = """`make reproduce-table` makes those of the medium size, resumes what was stopped, and writes this page; `SIZE`, `SEEDS`,
`ROWS`, `LAUNCHER` and `PRECISION` choose. The ten averaged models take `SIZE=large SEEDS=10`."""


STUCK = (
    "Stuck starts, which other seeds replace, with their mean training loss in nats a word "
    "(`stuck.steps`, `stuck.loss`):"
)


def stuck_starts(lines: list[Line], stuck: dict[str, list[Stuck]]) -> list[str]:
    """Of the rows of these lines: a heading, and a line of text for each precision and device; nothing where
    there are none.
    """
    names: dict[str, str] = {}
    for line in lines:
        names.setdefault(line.row.key, line.row.published.row)
    groups: dict[str, list[Stuck]] = {}
    for key, name in names.items():
        for run in stuck.get(key, []):
            groups.setdefault(f"{name} ({', '.join(made_with(run))})", []).append(run)
    items = [f"- {of}: {', '.join(map(stuck_seed, group))}" for of, group in groups.items()]
    return [STUCK, *items] if items else []


def stuck_seed(run: Stuck) -> str:
    return f"seed {run.train.seed} ({run.start.loss:.2f} after {run.start.step} steps)"


def page(
    lines: list[Line],
    settings: Table,
    drawn: dict[Size, list[tuple[str, Path]]],
    on_reviews: list[str],
    stuck: dict[str, list[Stuck]],
) -> str:
    """RESULTS.md."""
    changed = (
        f" All runs with `{settings.overrides}`, which is not what was published."
        if settings.overrides
        else ""
    )
    path = results_page.path_of(settings.file, settings.outputs)
    parts = [
        "# Results",
        "Table 1 of Gal & Ghahramani (2016): perplexities on Penn Treebank, measured beside "
        f"published.{changed} {LEGEND}",
    ]
    for size, of_size in by_size(lines):
        parts += [f"## {SIZES[size].capitalize()}", markdown.table(HEADINGS, map(cells, of_size))]
        parts += ["\n".join(of_stuck)] if (of_stuck := stuck_starts(of_size, stuck)) else []
        parts += [markdown.picture(title, picture, path) for title, picture in drawn.get(size, [])]
    made = dict.fromkeys((line.row.experiment, command(line.row, settings.overrides)) for line in lines)
    parts += [
        "## How each row is made",
        "\n".join(
            ["| experiment | command |", "|---|---|", *(f"| {name} | `{how}` |" for name, how in made)]
        ),
    ]
    parts += [
        HOW,
        *on_reviews,
        "## Deviations and settings that were not published",
        "In docs/deviations.md. Settings that were not published, by file:\n" + unpublished(),
        *choices([folder / "choices" for folder in results_page.record_folders(Path(settings.outputs))]),
    ]
    findings = [folder / "findings.md" for folder in results_page.record_folders(Path(settings.outputs))]
    if there := [path for path in findings if path.exists()]:
        parts += [results_page.FINDINGS, files.read(there[-1]).decode().strip()]
    return "\n\n".join(parts) + "\n"


def command(row: Row, overrides: str) -> str:
    """That makes one run of it, and evaluates it."""
    train = f"vdrop train experiment={row.experiment} {overrides} seed=1".replace("  ", " ")
    if row.published.mc_samples:
        return f"{train}; vdrop eval checkpoint=RUN mc_samples={row.published.mc_samples}"
    if row.published.members > 1:
        return f"{train},2,…,{row.published.members} -m; vdrop eval checkpoint=RUN members=[RUN,…]"
    return train


def unpublished() -> str:
    """What the files of settings say of where their numbers come from, where that is not a publication."""
    paths = [path for group in ("dropout", "schedule") for path in sorted((CONF / group).glob("*.yaml"))]
    sources = ((path, path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")) for path in paths)
    theirs = re.compile("not published|project's", re.IGNORECASE)
    return "\n".join(
        f"- `conf/{path.relative_to(CONF)}`: {source}" for path, source in sources if theirs.search(source)
    )


def choices(folders: Iterable[Path]) -> list[str]:
    """How settings were chosen: the validation perplexity by value, from records in `<what it is
    of>/<setting>/<value>/`.
    """
    by_setting: dict[Path, list[Finished]] = {}
    for folder in folders:
        for run in runs.below(folder):
            by_setting.setdefault(run.folder.parent.relative_to(folder), []).append(run)
    told = []
    for setting, of_setting in by_setting.items():
        found = {run.settings[setting.name]: run for run in of_setting}
        first = next(iter(found.values())).train
        values = ", ".join(f"{value:g}: {found[value].result['valid_ppl']:.2f}" for value in sorted(found))
        best = min(found, key=lambda value: found[value].result["valid_ppl"])
        of = f"{setting.parent.name}, {first.model.name}, {first.schedule.epochs} epochs"
        told.append(f"- `{setting.name}` ({of}): {values}; the lowest at {best:g}")
    return (
        [
            "How they were chosen, by validation perplexity (one seed each; records in "
            "`outputs/record/choices/`):\n" + "\n".join(told)
        ]
        if told
        else []
    )


def plain_table(lines: list[Line]) -> str:
    """For a terminal, the columns that matter most."""
    names = (
        "row",
        "valid, published",
        "valid, as published",
        "test, published",
        "test",
        "words/s",
        "seeds",
        "precision",
    )
    kept = [HEADINGS.index(name) for name in names]
    told = [names, *([cells(line)[place] for place in kept] for line in lines)]
    widths = [max(len(row[place]) for row in told) for place in range(len(names))]
    texts = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in told
    ]
    sizes = [line.row.size for line in lines]
    return "\n".join(
        [
            texts[0],
            *(
                f"\n{SIZES[size]}\n{text}" if size not in sizes[:n] else text
                for n, (size, text) in enumerate(zip(sizes, texts[1:], strict=True))
            ),
        ]
    )


def as_csv(lines: list[Line]) -> str:
    """A record for each run, or for each row that was not run, numbers in full."""
    held = io.StringIO()
    writer = csv.writer(held, lineterminator="\n")
    of_published = (
        "row",
        "source",
        "confirmed",
        "valid",
        "valid_deviation",
        "test",
        "test_deviation",
        "words_per_second",
    )
    measured = (
        "seeds",
        "mc_samples",
        "members",
        "precision",
        "device",
        "date",
        "commit",
        "dirty",
        "valid_ppl_as_published",
        "valid_ppl",
        "test_ppl",
        "words_per_second",
    )
    writer.writerow(["experiment", *(f"published_{name}" for name in of_published), *measured])
    for line in lines:
        told = [line.row.experiment, *(getattr(line.row.published, name) for name in of_published)]
        for evaluated in line.runs:
            published, environments = line.row.published, evaluated.environments
            how = [evaluated.seeds, published.mc_samples, published.members]
            of_run = [
                *how,
                *(environments[-1].get(name) for name in ("precision", "device", "date", "commit")),
            ]
            of_run.append(runs.code_differed(environments))
            writer.writerow(
                [*told, *of_run, evaluated.valid, evaluated.exact, evaluated.test, evaluated.speed]
            )
        if not line.runs:
            writer.writerow([*told, *[""] * len(measured)])
    return held.getvalue()


def is_csv(content: bytes) -> bool:
    """Whether a file starts as those that `as_csv` makes, or is empty."""
    return not content or content.startswith(b"experiment,published_row,")


def is_latex(content: bytes) -> bool:
    """Whether a file starts as those that `as_latex` makes, or is empty."""
    return not content or re.match(rb"% [^\n]+\n\\begin\{tabular\}", content) is not None


def as_latex(lines: list[Line]) -> str:
    """A tabular environment for each size."""
    parts = []
    for size, of_size in by_size(lines):
        kept = [
            HEADINGS.index(name)
            for name in ("row", "valid, published", "valid, as published", "test, published", "test", "seeds")
        ]
        rows = [[cells(line)[place] for place in kept] for line in of_size]
        told = [[HEADINGS[place] for place in kept], *rows]
        body = "".join("  " + " & ".join(map(escaped, row)) + r" \\" + "\n" for row in told)
        parts.append(
            f"% {SIZES[size]}\n\\begin{{tabular}}{{l{'r' * (len(kept) - 1)}}}\n{body}\\end{{tabular}}\n"
        )
    return "\n".join(parts)


def escaped(text: str) -> str:
    for plain, theirs in (
        ("±", r"$\pm$"),
        ("–", "--"),
        ("†", r"$^\dagger$"),
        ("‡", r"$^\ddagger$"),
        ("&", r"\&"),
        ("_", r"\_"),
    ):
        text = text.replace(plain, theirs)
    return text


def draw(lines: list[Line], folder: Path, kind: Pictures) -> dict[Size, list[tuple[str, Path]]]:
    """Pictures of each size of which there are runs: titles and paths."""
    drawn: dict[Size, list[tuple[str, Path]]] = {}
    for size, of_size in by_size(lines):
        made = [line for line in of_size if line.runs]
        if kind is Pictures.none or not made:
            continue
        machines = [", ".join(runs.made(line.runs[0].environments)[:2]) for line in made]
        named = list(
            zip(pictures.labels([line.row.published.row for line in made], machines), made, strict=True)
        )
        timed = [(label, line) for label, line in named if line.runs[0].speed is not None]
        curves = {label: line.runs[0].run for label, line in timed}
        samples = {label: line.runs[0].told["mc"] for label, line in named if line.row.published.mc_samples}
        speeds = {label: fmean(line.values(lambda e: e.speed)) for label, line in timed}
        published = {
            line.row.published.row: speed
            for line in of_size
            if (speed := line.row.published.words_per_second) is not None
        }
        figures = [
            (
                "Validation perplexity by epoch, first seed",
                "validation",
                curves and pictures.learning_curves(curves, training=False),
            ),
            (
                "MC dropout: test perplexity by number of passes, first seed",
                "mc",
                samples and pictures.by_samples(samples),
            ),
            ("Words a second", "speed", speeds and pictures.speeds(speeds, published)),
        ]
        for title, what, figure in figures:
            if figure:
                path = folder / f"{experiments.TABLE}_{size}_{what}.{kind}"
                pictures.save(figure, path)
                drawn.setdefault(size, []).append((title, path))
    return drawn
