"""Any data set of the Hugging Face Hub that has a text column and splits train, validation and test."""

import csv
from pathlib import Path
from typing import Any

from vdrop_cli.config import ConfigError, Data
from vdrop_cli.corpora.tables import shown
from vdrop_cli.corpora.text import PARTS, Raw, from_rows

SPLITS = {"train": "train", "valid": "validation", "test": "test"}


def load(data: Data) -> Any:
    """The splits of a data set, by name."""
    import datasets  # slow to import, so only where it is used
    from huggingface_hub import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # of what fails, the last word is enough
    datasets.disable_progress_bars()
    assert data.name is not None
    try:
        return datasets.load_dataset(data.name, data.config, revision=data.revision, **options(Path(data.name)))
    except Exception as error:  # the library raises what its many parts raise; the reason is in the message
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"data.name={data.name} cannot be loaded from the Hub ({reason[:300]})") from None


def options(folder: Path) -> dict[str, Any]:
    """For the library's reader of a local folder: in TSV files quotation marks are text, as in `data.csv`."""
    endings = {path.suffix.lower() for path in folder.rglob("*") if path.is_file()} if folder.is_dir() else set()
    return {"quoting": csv.QUOTE_NONE} if endings == {".tsv"} else {}


def column(data: Data, split: Any, setting: str, name: str | None) -> list[Any]:
    """Of one split; `setting` is what chose the column."""
    if name not in split.column_names:
        raise ConfigError(f"{setting}={shown(name)} is not a column of {data.name}; there are {', '.join(map(shown, split.column_names))}")
    return list(split[name])


def texts(data: Data, found: Any, split: str) -> list[str]:
    """The column `data.column`."""
    values = column(data, found[split], "data.column", data.column)
    return [read_as_text(value, f"data.column={data.column}: row {row} of {split}") for row, value in enumerate(values)]


def read_as_text(value: object, where: str) -> str:
    """What is not there is a text without words."""
    if value is None or isinstance(value, str):
        return value or ""
    raise ConfigError(f"{where} holds {str(value)[:40]!r}, which is no text; choose another column")


def rows(data: Data) -> dict[str, list[str]]:
    """The texts of each part."""
    found = load(data)
    of_parts = {}
    for part in PARTS:
        if SPLITS[part] not in found:
            raise ConfigError(
                f"data.name={data.name} has no split {SPLITS[part]}, only {', '.join(map(str, found))}; use data=text with files"
            )
        of_parts[part] = texts(data, found, SPLITS[part])
    return of_parts


def origin(data: Data) -> str:
    """For a person."""
    return f"Hub: {data.name}{f'@{data.revision}' if data.revision else ''}"


def read(data: Data) -> Raw:
    return Raw({part: from_rows(of_part) for part, of_part in rows(data).items()}, origin(data))
