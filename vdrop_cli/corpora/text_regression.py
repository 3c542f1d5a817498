"""Any texts with a number each: two columns of a CSV file, or of a data set of the Hugging Face Hub."""

import csv
from pathlib import Path

from vdrop_cli.config import ConfigError, Data
from vdrop_cli.corpora import hub
from vdrop_cli.corpora.rated import Rated, number, words

LONGEST = 2**31 - 1  # characters of a field


def read(data: Data) -> Rated:
    return from_csv(data, Path(data.csv)) if data.csv is not None else from_hub(data)


def from_csv(data: Data, path: Path) -> Rated:
    """The first line names the columns; they are separated by commas, in a file `.tsv` by tabs."""
    csv.field_size_limit(LONGEST)
    texts, ratings = [], []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
            names = rows.fieldnames or []
            for setting, name in (("data.column", data.column), ("data.rating_column", data.rating_column)):
                if name not in names:
                    raise ConfigError(f"{setting}={name} is not a column of {path}; there are {', '.join(names) or 'none'}")
            for row in rows:
                ratings.append(number(row[str(data.rating_column)], f"data.csv={path}: line {rows.line_num}"))
                texts.append(words(row[str(data.column)] or ""))
    except OSError as error:
        raise ConfigError(f"data.csv={path} cannot be read ({error.strerror}); name a CSV file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"data.csv={path} is not UTF-8 ({error.reason} at byte {error.start}); convert the file to UTF-8") from None
    except csv.Error as error:
        raise ConfigError(
            f"data.csv={path}: line {rows.line_num} is not as in a CSV file ({error}); quotes within quotes are doubled"
        ) from None
    return Rated(texts, ratings, str(path))


def from_hub(data: Data) -> Rated:
    """The data set's own parts, of its splits train, validation and test; others are left out. One split alone is in no parts.

    Raises ConfigError where there are several, but none to test on.
    """
    found = hub.load(data)
    part_of = {split: part for part, split in hub.SPLITS.items()}
    splits = [split for split in found if split in part_of] or list(found)[:1]
    if len(splits) > 1 and hub.SPLITS["test"] not in splits:
        raise ConfigError(
            f"data.name={data.name} has no split test beside {' and '.join(splits)}; make it one, or a CSV file to be split here"
        )
    texts: list[list[str]] = []
    ratings, parts = [], []
    for split in splits:
        numbers = hub.column(data, found[split], "data.rating_column", data.rating_column)
        texts += map(words, hub.texts(data, found, split))
        ratings += [number(value, f"data.rating_column={data.rating_column}: row {row} of {split}") for row, value in enumerate(numbers)]
        parts += [part_of.get(split, "train")] * len(numbers)
    return Rated(texts, ratings, hub.origin(data), parts if len(splits) > 1 else [])
