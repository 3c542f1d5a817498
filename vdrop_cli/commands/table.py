"""`vdrop table`: the page of results, from run folders and records."""

from vdrop_cli.settings.commands import Table
from vdrop_cli.studies import page
from vdrop_cli.studies.baselines import Baselines
from vdrop_cli.studies.film_reviews import FilmReviews
from vdrop_cli.studies.table1 import Table1


def run(settings: Table) -> None:
    page.write(settings, [Table1.from_table(settings), FilmReviews(), Baselines()])
