"""Any data set of the Hugging Face Hub that has a text column and splits train, validation and test; or a
folder of this machine like one.

The library finds the files of each split. Tables and text files are read here, as those that are given by
themselves are; all others by the library.
"""

from collections.abc import Iterable
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

from vdrop_cli.corpora.tables import Lines, Row, Table, delimiter_of, require_column
from vdrop_cli.corpora.text import PARTS, Raw, decoded, from_rows, read_file
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.train import Data

SPLITS = {"train": "train", "valid": "validation", "test": "test"}
READ_HERE = ("csv", "text")  # by the library's names for readers
# options of theirs that need no refusal: they change nothing here, or, as `sep`, are followed; what is not
# UTF-8 is refused anyway
WITHOUT_EFFECT = (
    "sep",
    "delimiter",
    "features",
    "encoding",
    "chunksize",
    "keep_linebreaks",
    "keep_default_na",
    "na_filter",
)


class Prepared:
    """A split that the library has read."""

    def __init__(self, rows: Any, split: str, where: str) -> None:
        self.rows, self.split, self.where = rows, split, where

    def column(self, setting: str, name: str | None) -> list[Any]:
        """`setting` is what chose the column."""
        require_column(name, self.rows.column_names, setting, self.where)
        return list(self.rows[name])

    def place(self, row: int) -> str:
        """For a person."""
        return f"row {row} of {self.split}"


class Files:
    """A split that is read here, from the files of these names."""

    def __init__(self, tables: dict[str, Table | Lines]) -> None:
        self.tables = tables

    @cached_property
    def rows(self) -> dict[str, list[Row]]:
        return {name: list(table.rows()) for name, table in self.tables.items()}

    def column(self, setting: str, name: str | None) -> list[Any]:
        """`setting` is what chose the column."""
        places = {file: table.place(str(name), setting) for file, table in self.tables.items()}
        return [row.fields[places[file]] for file, rows in self.rows.items() for row in rows]

    def place(self, row: int) -> str:
        """For a person."""
        for file, rows in self.rows.items():
            if row < len(rows):
                return f"line {rows[row].line} of {file}"
            row -= len(rows)
        raise IndexError(row)


Split = Prepared | Files


def load(data: Data) -> dict[str, Split]:
    """The splits of a data set, by name."""
    import datasets  # slow to import, so only where it is used
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.text.text import Text
    from huggingface_hub import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # of what fails, the last word is enough
    datasets.disable_progress_bars()
    assert data.name is not None
    where = f"data.name={data.name}"
    try:
        builder = datasets.load_dataset_builder(data.name, data.config, revision=data.revision)
        if isinstance(builder, Csv | Text):
            root = str(Path(data.name).resolve()) if Path(data.name).is_dir() else builder.base_path
            paths = {
                str(split): paths_of(of_split, root) for split, of_split in builder.config.data_files.items()
            }
        else:
            builder.download_and_prepare()
            prepared = builder.as_dataset()
    except Exception as error:  # the library raises what its many parts raise; the reason is in the message
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{where} cannot be loaded from the Hub ({reason[:300]})") from None
    if isinstance(builder, Csv | Text):
        require_plain(builder.config, where)
        return read_here(paths, getattr(builder.config, "sep", None), where)
    if builder.info.builder_name in READ_HERE:
        raise ConfigError(
            f"{where}: the Hub cannot be reached, and its files were read by other rules before; name a "
            "folder that has them"
        )
    return {str(split): Prepared(rows, str(split), where) for split, rows in prepared.items()}


def paths_of(files: Iterable[object], root: str) -> dict[str, str]:
    """Where the files of a split are on this machine, unpacked, by their names below the root of the data
    set.
    """
    import datasets

    manager, paths = datasets.DownloadManager(), {}
    for file in map(str, files):
        unpacked = str(manager.download_and_extract(file))
        for path in map(str, manager.iter_files(unpacked)):
            paths[file.removeprefix(root).lstrip("/") + path.removeprefix(unpacked)] = path
    return paths


def require_plain(options: Any, where: str) -> None:
    """Raises ConfigError where the description of a data set says how its files are to be read, but for the
    sign between columns.
    """
    import datasets

    usual, of_all = type(options)(), {option.name for option in fields(datasets.BuilderConfig)}
    own = [
        option.name
        for option in fields(options)
        if option.name not in of_all and option.name not in WITHOUT_EFFECT
    ]
    changed = [name for name in sorted(own) if getattr(options, name) != getattr(usual, name)]
    if len(getattr(options, "sep", ",")) != 1:
        changed.append("sep")
    if changed:
        raise ConfigError(
            f"{where}: its description sets {changed[0]}, which is not read; write its files without, and "
            "name their folder"
        )


def read_here(paths: dict[str, dict[str, str]], separator: str | None, where: str) -> dict[str, Split]:
    """Text files, or tables whose columns are separated as their names say, or else by `separator`."""
    usual = {delimiter_of(name) for of_split in paths.values() for name in of_split}
    found: dict[str, Split] = {}
    for split, of_split in paths.items():
        tables: dict[str, Table | Lines] = {}
        for name, path in of_split.items():
            of_file = f"{where}: {name}"
            text = decoded(read_file(Path(path), of_file), of_file)
            delimiter = separator if separator not in usual else delimiter_of(name)
            tables[name] = (
                Lines(text, of_file) if delimiter is None else Table(text, delimiter, of_file, settable=False)
            )
        found[split] = Files(tables)
    return found


def texts(data: Data, split: Split) -> list[str]:
    """The column `data.column`."""
    values = split.column("data.column", data.column)
    return [
        read_as_text(value, f"data.column={data.column}: {split.place(row)}")
        for row, value in enumerate(values)
    ]


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
                f"data.name={data.name} has no split {SPLITS[part]}, only {', '.join(found)}; use data=text "
                "with files"
            )
        of_parts[part] = texts(data, found[SPLITS[part]])
    return of_parts


def origin(data: Data) -> str:
    """For a person."""
    return f"Hub: {data.name}{f'@{data.revision}' if data.revision else ''}"


def read(data: Data) -> Raw:
    return Raw({part: from_rows(of_part) for part, of_part in rows(data).items()}, origin(data))
