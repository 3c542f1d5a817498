"""Recognises files that vdrop wrote and may remove or overwrite; all others stay as they are."""

import os
import re
import stat
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from vdrop_cli import evaluation_files, files
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.files import Damaged, printable
from vdrop_cli.lock import Lock
from vdrop_cli.run_files import (
    CHECKPOINT_PATTERN,
    CONFIG,
    EVALUATION_PREFIX_PATTERN,
    LOG,
    PROGRESS,
    RESULT,
    SHARED_DEVICE,
    STUCK,
    parse_checkpoint,
)

LOCK = "lock"  # in the run folder, while a process trains there
EVALUATION = f"{EVALUATION_PREFIX_PATTERN}{evaluation_files.PATTERN}"
# what training writes, TensorBoard's events aside
TRAINING = "|".join([*map(re.escape, (CONFIG, LOG, RESULT, STUCK, SHARED_DEVICE)), CHECKPOINT_PATTERN])
EVENTS = r"events\.out\.tfevents\.\d+\..+"
RUN = rf"(?:{TRAINING}|{EVALUATION}\.(?:json|partial))(?:\.\d+\.tmp)?|{EVALUATION}\.lock|{EVENTS}|{LOCK}"
OUTCOMES = (RESULT, STUCK)  # of a run that has ended and is not trained again
APPENDED = (LOG,)  # written in place, so a link there would change another file
MAX_NAMES = 5  # in a message


def matches(names: str, path: Path) -> bool:
    return re.fullmatch(names, path.name, re.ASCII) is not None


def is_run_file(path: Path) -> bool:
    """Whether training or evaluation gives its files such a name."""
    return matches(RUN, path)


def entries(folder: Path) -> list[Path]:
    """Lists a run folder, empty if it does not exist; raises ConfigError where it cannot be listed."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):  # the reason is reported when the folder is made
        return []
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be read ({error.strerror}); move it away, or choose another outputs="
        ) from None


def events_in(folder: Path) -> list[Path]:
    """Lists TensorBoard's files of a run."""
    return [path for path in entries(folder) if matches(EVENTS, path)]


def require_regular_files(folder: Path, before_writing: bool = False) -> None:
    """Raises ConfigError where a file of a run is a FIFO, a device, a folder or a broken link.

    Nothing is opened. `before_writing` also refuses links in place of the files that a run appends to.
    """
    for path in filter(is_run_file, entries(folder)):
        try:
            if path.name == LOCK or (before_writing and path.name in APPENDED):
                files.require_regular(path.lstat())
            else:
                files.require_regular(path.stat())
        except Damaged as damage:
            raise ConfigError(f"{path} is in the way: {damage}; move it away") from None
        except OSError as error:
            if not path.is_symlink():
                continue  # another process removed it
            raise ConfigError(
                f"{path} is in the way: a link that leads nowhere ({error.strerror}); move it away"
            ) from None


def require_nothing_newer(folder: Path, progress: tuple[int, int]) -> None:
    """Raises ConfigError if a run that has made this progress would train again what was measured before.

    `progress` is finished epochs, and batches of the next one. The weights may come out differently, as with
    another number of threads, so an evaluation of a later epoch would stand for other weights.
    """
    for path in entries(folder):
        if matches(rf"{EVALUATION}\.(?:json|partial)", path):
            evaluated = parse_checkpoint(re.sub(rf"^eval-({PROGRESS})-.*", r"checkpoint-\1.pt", path.name))
            if evaluated is not None and evaluated > progress:
                raise ConfigError(
                    f"{path} is of weights that {folder} no longer has; put the checkpoint back, move the "
                    "file away, or start over with force=true"
                )


def removal_order(folder: Path) -> list[Path]:
    """Lists the files of a run in the order in which `clear` removes them.

    The result, or the stuck start, comes first, so that the rest is never taken for a run that has ended;
    then evaluations; then checkpoints from the newest to the oldest, since each needs only older ones and the
    log. So after every removal the folder holds a run that resumes to the same result, or the log of a
    finished run, which training does not overwrite without force=true, or no run.
    """

    def rank(path: Path) -> tuple[int, int, int]:
        if path.name in OUTCOMES:
            return 0, 0, 0
        if matches(rf"{EVALUATION}\.(?:json|partial)", path):
            return 1, 0, 0
        if (progress := parse_checkpoint(path.name)) is not None:
            epoch, batch = progress
            return 2, -epoch, -batch
        return (4 if matches(TRAINING, path) else 3), 0, 0

    own = [path for path in entries(folder) if is_run_file(path) and path.name != LOCK]
    return sorted((path for path in own if not is_lock(path)), key=rank)


def is_lock(path: Path) -> bool:
    """Whether a path is the lock file of an evaluation.

    A link or FIFO with that name locks nothing, and is removed like any other file.
    """
    return (
        matches(rf"{EVALUATION}\.lock", path)
        and (status := file_status(path)) is not None
        and stat.S_ISREG(status.st_mode)
    )


def file_status(path: Path) -> os.stat_result | None:
    """Returns the status of a file or link, or None where another process has removed it."""
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def clear(folder: Path) -> None:
    """Removes an earlier run from its folder, and prints which other files stay.

    Links are removed, never followed. Raises ConfigError, with nothing removed, while the run is evaluated or
    where a folder has the name of one of its files; RunError where a file cannot be removed.
    """
    content = entries(folder)
    others = [path.name for path in content if not is_run_file(path)]
    with ExitStack() as locks:
        for path in filter(is_lock, filter(is_run_file, content)):
            locks.enter_context(Lock(path, str(path.with_suffix(".json"))))
        own = removal_order(folder)
        for path in own:
            if path.is_dir() and not path.is_symlink():
                raise ConfigError(
                    f"force=true: {path} is a folder, so nothing was removed; remove it or move it away"
                )
        for path in own:
            try:
                path.unlink(missing_ok=True)
                if path.name in OUTCOMES:
                    files.flush_folder(folder)  # before other files are removed
            except OSError as error:
                raise RunError(
                    f"force=true: {path} cannot be removed ({error.strerror}); make it removable, and "
                    "give the same command again"
                ) from None
    if others:
        names = first_names([printable(name) for name in others], ", ")
        print(f"vdrop: force=true leaves other files in {printable(folder)}: {names}", file=sys.stderr)


def first_names(names: Sequence[str], separator: str) -> str:
    """Returns the first `MAX_NAMES` names for a message, and how many more there are."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return separator.join(names[:MAX_NAMES]) + more


def require_own(path: Path, is_own: Callable[[bytes], bool], advice: str, size: int | None = None) -> None:
    """Raises ConfigError where a file exists that vdrop did not write.

    `is_own` judges the content, or its first `size` bytes.
    """
    try:
        content = files.read(path) if size is None else files.read_start(path, size)
    except (FileNotFoundError, NotADirectoryError):  # writing the file reports the reason
        return
    except Damaged as damage:
        raise ConfigError(f"{printable(path)} would be overwritten, and {damage}; {advice}") from None
    except OSError as error:
        raise ConfigError(
            f"{printable(path)} would be overwritten, and cannot be read ({error.strerror}); {advice}"
        ) from None
    if not is_own(content):
        raise ConfigError(f"{printable(path)} was not written by vdrop, and would be overwritten; {advice}")


def require_record(folder: Path) -> None:
    """Raises ConfigError where a record would overwrite something other than files.

    Only names of a run's files are checked, since a record contains no others.
    """
    for path in entries(folder):
        if is_run_file(path) and (status := file_status(path)) is not None:
            try:
                files.require_regular(status)
            except Damaged as damage:
                raise ConfigError(f"{path} would be overwritten, and {damage}; move it away") from None
