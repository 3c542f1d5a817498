"""Where on this machine a corpus may lie, and how one that was fetched is kept there."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from vdrop_cli import files as disk
from vdrop_cli import ownership
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.settings.train import Data

DOWNLOADS = Path("data")  # below the working directory; a folder a corpus


def places(data: Data, name: str) -> list[tuple[str, Path]]:
    """Where to look, each with the name of the setting behind it. `data.dir` is the only place where it is
    set.
    """
    if data.dir is not None:
        return [("data.dir", Path(data.dir))]
    told = os.environ.get("VDROP_DATA")
    return [*([("VDROP_DATA", Path(told) / name)] if told else []), (f"data/{name}", DOWNLOADS / name)]


def missing(folder: Path, files: Iterable[str]) -> list[str]:
    return [file for file in files if not (folder / file).is_file()]


def local(data: Data, name: str, files: Sequence[str]) -> tuple[str, Path] | None:
    """The first place that holds all files, if there is one. Raises ConfigError where `data.dir` is set and
    does not.
    """
    looked = places(data, name)
    found = next((place for place in looked if not missing(place[1], files)), None)
    if found is None and data.dir is not None:
        raise ConfigError(
            f"data.dir={data.dir} has no {missing(Path(data.dir), files)[0]}; point data.dir at a folder "
            f"with {' and '.join(files)}, "
            f"set VDROP_DATA to a folder with {name}/ in it, or leave both unset to fetch them"
        )
    return found


def check_md5(
    contents: dict[str, bytes], sums: dict[str, str], where: str, what: str, otherwise: str
) -> None:
    """Raises ConfigError where a content is not what it is known to be; `{name}` in `where` stands for its
    name.
    """
    for name, content in contents.items():
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != sums[name]:
            told = where.format(name=name)
            raise ConfigError(
                f"{told} is not {what}: MD5 {found}, expected {sums[name]}; get the file again, or use "
                f"data={otherwise}"
            )


def keep(name: str, contents: dict[str, bytes]) -> Path:
    """Below `data/`. Raises ConfigError, with nothing written, where files of these names and other content
    are there.
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
