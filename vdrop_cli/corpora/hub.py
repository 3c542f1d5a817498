"""Reads data sets of the Hugging Face Hub, or a local folder like one, with a text column and splits.

The library `datasets` locates the files of each split. This project parses tables and text files itself, by
the rules of `data.csv` and `data=text`. `datasets` reads all other formats.
"""

import os
from collections.abc import Iterable
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vdrop_cli.corpora.tables import Lines, Row, Table, default_delimiter, require_column
from vdrop_cli.corpora.text import PARTS, Raw, decode, from_rows, read_file
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.data import HubData, HubText

SPLITS = {"train": "train", "valid": "validation", "test": "test"}
READ_HERE = ("csv", "text")  # names of readers of `datasets`, whose files are parsed here instead
# Options of these readers that are accepted. Some change nothing here; others, such as `sep`, are followed.
# Text that is not UTF-8 is refused in any case.
ACCEPTED_OPTIONS = (
    "sep",
    "delimiter",
    "features",
    "encoding",
    "chunksize",
    "keep_linebreaks",
    "keep_default_na",
    "na_filter",
)


class LibrarySplit:
    """A split that the library has read."""

    def __init__(self, rows: Any, split: str, where: str) -> None:
        self.rows = rows
        self.split = split
        self.where = where

    def column(self, setting: str, name: str | None) -> list[Any]:
        """Returns a column; `setting` is the setting that chose it."""
        require_column(name, self.rows.column_names, setting, self.where)
        return list(self.rows[name])

    def place(self, row: int) -> str:
        """Describes the position of a row for a message."""
        return f"row {row} of {self.split}"


class ParsedSplit:
    """A split that is parsed here, from tables by the name of their file."""

    def __init__(self, tables: dict[str, Table | Lines]) -> None:
        self.tables = tables

    @cached_property
    def rows(self) -> dict[str, list[Row]]:
        return {name: list(table.rows()) for name, table in self.tables.items()}

    def column(self, setting: str, name: str | None) -> list[Any]:
        """Returns a column; `setting` is the setting that chose it."""
        indices = {file: table.column_index(str(name), setting) for file, table in self.tables.items()}
        return [row.fields[indices[file]] for file, rows in self.rows.items() for row in rows]

    def place(self, row: int) -> str:
        """Describes the position of a row for a message."""
        for file, rows in self.rows.items():
            if row < len(rows):
                return f"line {rows[row].line} of {file}"
            row -= len(rows)
        raise IndexError(row)


Split = LibrarySplit | ParsedSplit


def load(data: HubData) -> dict[str, Split]:
    """Returns the splits of a data set by name; raises ConfigError where it cannot be loaded."""
    with TemporaryDirectory() as folder:
        return read_splits(data, folder)


def read_splits(data: HubData, folder: str) -> dict[str, Split]:
    """Does what `load` does; files of this machine are unpacked into `folder`."""
    import datasets  # slow to import
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.text.text import Text
    from huggingface_hub import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # the exception is enough
    datasets.disable_progress_bars()
    assert data.name is not None
    where = f"data.name={data.name}"
    is_local = os.path.isdir(data.name)
    if is_local and data.revision is not None:
        raise ConfigError(f"data.revision must be null, {data.name} is a folder, got {data.revision}")
    try:
        # The library's cache identifies files of this machine by path and time, not by content.
        builder = datasets.load_dataset_builder(
            data.name, data.config, revision=data.revision, cache_dir=folder if is_local else None
        )
        if isinstance(builder, Csv | Text):
            root = str(Path(data.name).resolve()) if is_local else builder.base_path
            paths = {
                str(split): local_paths(files, root, folder)
                for split, files in builder.config.data_files.items()
            }
        else:
            builder.download_and_prepare()
            prepared = builder.as_dataset(in_memory=is_local)  # `folder` is removed afterwards
    except Exception as error:  # the library raises many types; the message has the reason
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        source = "from this folder" if is_local else "from the Hub"
        raise ConfigError(f"{where} cannot be loaded {source} ({reason[:300]})") from None
    if isinstance(builder, Csv | Text):
        require_plain(builder.config, where)
        return read_files(paths, getattr(builder.config, "sep", None), where)
    if builder.info.builder_name in READ_HERE:
        raise ConfigError(
            f"{where}: the Hub cannot be reached, and its files were read by other rules before; name a "
            "folder that has them"
        )
    return {str(split): LibrarySplit(rows, str(split), where) for split, rows in prepared.items()}


def local_paths(files: Iterable[object], root: str, folder: str) -> dict[str, str]:
    """Returns the paths of a split's unpacked files, by their names below the data set's root.

    Files of a local folder are unpacked into `folder`, not into the cache of `datasets`. That cache
    identifies a file by its path alone, and other processes may read from it.
    """
    import datasets

    config = datasets.DownloadConfig(cache_dir=folder if Path(root).is_dir() else None)
    manager, paths = datasets.DownloadManager(download_config=config), {}
    for file in map(str, files):
        unpacked = str(manager.download_and_extract(file))
        for path in map(str, manager.iter_files(unpacked)):
            paths[file.removeprefix(root).lstrip("/") + path.removeprefix(unpacked)] = path
    return paths


def require_plain(options: Any, where: str) -> None:
    """Raises ConfigError where a data set's description changes how its files are read.

    Only the separator of columns may be set.
    """
    import datasets

    defaults = type(options)()
    common = {option.name for option in fields(datasets.BuilderConfig)}
    own = [
        option.name
        for option in fields(options)
        if option.name not in common and option.name not in ACCEPTED_OPTIONS
    ]
    changed = [name for name in sorted(own) if getattr(options, name) != getattr(defaults, name)]
    if len(getattr(options, "sep", ",")) != 1:
        changed.append("sep")
    if changed:
        raise ConfigError(
            f"{where}: its description sets {changed[0]}, which is not supported; write its files without "
            "it, and name their folder"
        )


def read_files(paths: dict[str, dict[str, str]], separator: str | None, where: str) -> dict[str, Split]:
    """Parses text files, for which `separator` is None, and tables.

    If `separator` is one that names of these files imply, each table has the separator that its own name
    implies. Otherwise all tables have `separator`.
    """
    defaults = {default_delimiter(name) for files in paths.values() for name in files}
    splits: dict[str, Split] = {}
    for split, files in paths.items():
        tables: dict[str, Table | Lines] = {}
        for name, path in files.items():
            where_file = f"{where}: {name}"
            text = decode(read_file(Path(path), where_file), where_file)
            delimiter = separator if separator not in defaults else default_delimiter(name)
            if delimiter is None:
                tables[name] = Lines(text, where_file)
            else:
                tables[name] = Table(
                    text, delimiter, where_file, "write the file with commas, or with tabs as .tsv"
                )
        splits[split] = ParsedSplit(tables)
    return splits


def texts(data: HubData, split: Split) -> list[str]:
    """Returns the column `data.column` as texts."""
    values = split.column("data.column", data.column)
    return [
        read_as_text(value, f"data.column={data.column}: {split.place(row)}")
        for row, value in enumerate(values)
    ]


def read_as_text(value: object, where: str) -> str:
    """Returns a value as text, empty for None; raises ConfigError for anything else."""
    if value is None or isinstance(value, str):
        return value or ""
    raise ConfigError(f"{where} holds {str(value)[:40]!r}, which is not text; choose another column")


def rows(data: HubText) -> dict[str, list[str]]:
    """Returns the texts of each part."""
    splits = load(data)
    parts = {}
    for part in PARTS:
        if SPLITS[part] not in splits:
            raise ConfigError(
                f"data.name={data.name} has no split {SPLITS[part]}, only {', '.join(splits)}; use data=text "
                "with files"
            )
        parts[part] = texts(data, splits[SPLITS[part]])
    return parts


def origin(data: HubData) -> str:
    """Names the source for messages."""
    if os.path.isdir(str(data.name)):
        return f"folder {data.name}"
    return f"Hub: {data.name}{f'@{data.revision}' if data.revision else ''}"


def read(data: HubText) -> Raw:
    return Raw({part: from_rows(texts) for part, texts in rows(data).items()}, origin(data))
