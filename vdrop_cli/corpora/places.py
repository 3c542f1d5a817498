"""Locates a corpus on this machine, and stores one that was downloaded."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from vdrop_cli import files as disk
from vdrop_cli import ownership
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.settings.data import LocalData

DOWNLOADS = Path("data")  # below the working directory, with a folder for each corpus


def candidate_folders(data: LocalData, name: str) -> list[tuple[str, Path]]:
    """Returns the folders to search, each with the name of its setting.

    Where `data.dir` is set it is the only one.
    """
    if data.dir is not None:
        return [("data.dir", Path(data.dir))]
    root = os.environ.get("VDROP_DATA")
    return [*([("VDROP_DATA", Path(root) / name)] if root else []), (f"data/{name}", DOWNLOADS / name)]


def missing(folder: Path, files: Iterable[str]) -> list[str]:
    return [file for file in files if not os.path.isfile(folder / file)]


def local(data: LocalData, name: str, files: Sequence[str]) -> tuple[str, Path] | None:
    """Returns the first place with all files, and its setting; None where no place has them.

    Raises ConfigError where `data.dir` is set and lacks a file.
    """
    complete = [place for place in candidate_folders(data, name) if not missing(place[1], files)]
    if not complete and data.dir is not None:
        raise ConfigError(
            f"data.dir={data.dir} has no {missing(Path(data.dir), files)[0]}; set data.dir to a folder "
            f"with {' and '.join(files)}, or VDROP_DATA to a folder with {name}/ in it, or neither to "
            "download them"
        )
    return complete[0] if complete else None


def check_md5(
    contents: dict[str, bytes], sums: dict[str, str], where: str, what: str, alternative: str
) -> None:
    """Raises ConfigError where a content has another MD5; `{name}` in `where` stands for its name."""
    for name, content in contents.items():
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if md5 != sums[name]:
            raise ConfigError(
                f"{where.format(name=name)} is not {what}: MD5 {md5}, expected {sums[name]}; get the file "
                f"again, or use data={alternative}"
            )


def store(name: str, contents: dict[str, bytes]) -> Path:
    """Writes files below `data/` and returns their folder.

    Raises ConfigError, with nothing written, where files with these names and other content exist.
    """
    folder = DOWNLOADS / name
    for file, content in contents.items():
        is_own = (content, b"").__contains__
        ownership.require_own(folder / file, is_own, "move it away", len(content) + 1)
    try:
        for file, content in contents.items():
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            disk.replace(path, content)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}); run from a folder where data/ can be made"
        ) from None
    except RunError as error:
        raise ConfigError(f"{folder} cannot be written: {error}") from None
    return folder
