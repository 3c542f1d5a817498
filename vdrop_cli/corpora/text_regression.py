"""Texts with a number each: two columns of a CSV file, or of a data set of the Hugging Face Hub."""

import sys
from pathlib import Path

from vdrop_cli.corpora import hub
from vdrop_cli.corpora.rated import Rated, number, words
from vdrop_cli.corpora.tables import Table, default_delimiter
from vdrop_cli.corpora.text import decode, read_file
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.data import RatedTable


def read(data: RatedTable) -> Rated:
    return from_csv(data, Path(data.csv)) if data.csv is not None else from_hub(data)


def from_csv(data: RatedTable, path: Path) -> Rated:
    """Reads the two named columns; every row must fit the header."""
    where = f"data.csv={path}"
    table = Table(
        decode(read_file(path, where, "a CSV file"), where),
        data.delimiter or default_delimiter(path.name),
        where,
    )
    text, rating = (
        table.column_index(str(getattr(data, name)), f"data.{name}") for name in ("column", "rating_column")
    )
    texts = []
    ratings = []
    places = []
    for line, fields in table.rows():
        ratings.append(number(fields[rating], f"{where}: line {line}"))
        texts.append(words(fields[text]))
        places.append(f"line {line}")
    return Rated(texts, ratings, str(path), places=places)


def from_hub(data: RatedTable) -> Rated:
    """Reads the splits train, validation and test as the parts; a single split has no parts.

    Prints which other splits are left out. Raises ConfigError where several splits include no test, or none
    of the three.
    """
    loaded = hub.load(data)
    part_of = {split: part for part, split in hub.SPLITS.items()}
    splits = [split for split in loaded if split in part_of] or list(loaded)
    if len(splits) > 1 and not part_of.keys() & {*splits}:
        raise ConfigError(
            f"data.name={data.name} has the splits {', '.join(splits)}, and none of train, validation and "
            "test; rename them, or use a CSV file, which is split here"
        )
    if others := [split for split in loaded if split not in splits]:
        print(
            f"vdrop: data.name={data.name}: {', '.join(others)} left out; only the splits train, validation "
            "and test are read",
            file=sys.stderr,
        )
    if len(splits) > 1 and hub.SPLITS["test"] not in splits:
        raise ConfigError(
            f"data.name={data.name} has the splits {' and '.join(splits)}, but no split test; add one, or "
            "use a CSV file, which is split here"
        )
    texts: list[list[str]] = []
    ratings = []
    parts = []
    places = []
    for split in splits:
        texts += map(words, hub.texts(data, loaded[split]))
        for row, value in enumerate(loaded[split].column("data.rating_column", data.rating_column)):
            places.append(loaded[split].place(row))
            ratings.append(number(value, f"data.rating_column={data.rating_column}: {places[-1]}"))
            parts.append(part_of.get(split, "train"))
    return Rated(texts, ratings, hub.origin(data), parts if len(splits) > 1 else [], places)
