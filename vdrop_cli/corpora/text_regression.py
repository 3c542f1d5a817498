"""Any texts with a number each: two columns of a CSV file, or of a data set of the Hugging Face Hub."""

from pathlib import Path

from vdrop_cli.corpora import hub
from vdrop_cli.corpora.rated import Rated, number, words
from vdrop_cli.corpora.tables import Table, delimiter_of
from vdrop_cli.corpora.text import decoded, read_file
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.train import Data


def read(data: Data) -> Rated:
    return from_csv(data, Path(data.csv)) if data.csv is not None else from_hub(data)


def from_csv(data: Data, path: Path) -> Rated:
    """Of the two columns that are named; the others are left out, but they must fit the header, too."""
    where = f"data.csv={path}"
    table = Table(
        decoded(read_file(path, where, "a CSV file"), where), data.delimiter or delimiter_of(path.name), where
    )
    text, rating = (
        table.place(str(getattr(data, name)), f"data.{name}") for name in ("column", "rating_column")
    )
    texts, ratings, places = [], [], []
    for line, fields in table.rows():
        ratings.append(number(fields[rating], f"{where}: line {line}"))
        texts.append(words(fields[text]))
        places.append(f"line {line}")
    return Rated(texts, ratings, str(path), places=places)


def from_hub(data: Data) -> Rated:
    """The data set's own parts, of its splits train, validation and test; others are left out. One split
    alone is in no parts.

    Raises ConfigError where there are several, but none to test on.
    """
    found = hub.load(data)
    part_of = {split: part for part, split in hub.SPLITS.items()}
    splits = [split for split in found if split in part_of] or list(found)[:1]
    if len(splits) > 1 and hub.SPLITS["test"] not in splits:
        raise ConfigError(
            f"data.name={data.name} has no split test beside {' and '.join(splits)}; make it one, or a CSV "
            "file to be split here"
        )
    texts: list[list[str]] = []
    ratings, parts, places = [], [], []
    for split in splits:
        texts += map(words, hub.texts(data, found[split]))
        for row, value in enumerate(found[split].column("data.rating_column", data.rating_column)):
            places.append(found[split].place(row))
            ratings.append(number(value, f"data.rating_column={data.rating_column}: {places[-1]}"))
            parts.append(part_of.get(split, "train"))
    return Rated(texts, ratings, hub.origin(data), parts if len(splits) > 1 else [], places)
