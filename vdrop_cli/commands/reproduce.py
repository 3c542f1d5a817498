"""`vdrop reproduce`: makes the runs and evaluations that the rows of a study lack, and writes the page."""

import sys
from collections.abc import Sequence
from dataclasses import replace

from vdrop_cli.device import memory_returned
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.choices import StudyName
from vdrop_cli.settings.commands import Reproduce, Table
from vdrop_cli.studies import page, plan
from vdrop_cli.studies.baselines import Baselines
from vdrop_cli.studies.film_reviews import FilmReviews
from vdrop_cli.studies.plan import RunFactory
from vdrop_cli.studies.processes import Commands, require_launcher, train_arguments
from vdrop_cli.studies.study import Row, Study
from vdrop_cli.studies.table1 import Table1


def run(settings: Reproduce) -> None:
    require_launcher(settings)
    settings.require_place()
    commands = Commands(settings)
    rows = enough_seeds(study_of(settings).rows, settings.seeds)
    studies, on_page = page_of(settings), Table(outputs=settings.outputs, file=settings.file)
    if not settings.plan:
        page.require_writable(on_page)
        page.compose(on_page, studies, rows)
    factory = RunFactory(settings)
    planned = plan.make_plan(rows, settings, factory)
    with memory_returned(factory.device):  # other processes make the runs
        plan.print_plan(planned, factory)
    if settings.plan:
        return
    while sweeps := list(planned.sweeps()):
        for trainings in sweeps:
            commands.vdrop("train", *train_arguments(trainings, settings))
        before, planned = planned, plan.make_plan(rows, settings, factory)
        stuck = [name for folder, (name, _) in planned.stuck.items() if folder not in before.stuck]
        if not stuck:
            break
        print(f"vdrop: {', '.join(stuck)}: stuck; other seeds replace them", file=sys.stderr)
    commands.evaluate_all(planned.evaluations.values())
    lines = page.write(on_page, studies, rows)
    planned.require_finished()
    planned.require_seeds()
    planned.require_on_page(lines)


def study_of(settings: Reproduce) -> Study:
    if settings.study is StudyName.film_reviews:
        return FilmReviews.from_reproduce(settings)
    if settings.study is StudyName.baselines:
        return Baselines.from_reproduce(settings)
    return Table1.from_reproduce(settings)


def page_of(settings: Reproduce) -> list[Study]:
    """The studies of the page. They have all rows, so that the page loses none; with `overrides` the chosen
    study has only the chosen rows.
    """
    chosen = study_of(settings)
    table1, film_reviews, baselines = Table1(), FilmReviews(), Baselines()
    if isinstance(chosen, FilmReviews):
        film_reviews = chosen if settings.overrides else replace(film_reviews, epochs=chosen.epochs)
    elif settings.overrides and isinstance(chosen, Table1):
        table1 = chosen
    elif settings.overrides and isinstance(chosen, Baselines):
        baselines = chosen
    return [table1, film_reviews, baselines]


def enough_seeds(rows: Sequence[Row], seeds: int) -> list[Row]:
    """The rows that need at most `seeds` runs for an average. Raises ConfigError if no row remains."""
    for row in rows:
        if row.evaluation.members > seeds:
            print(f"{row.name} is left out: it takes seeds={row.evaluation.members}", file=sys.stderr)
    enough = [row for row in rows if row.evaluation.members <= seeds]
    if not enough:
        raise ConfigError(f"seeds must be more for any of these rows, got {seeds}")
    return enough
