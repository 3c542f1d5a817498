"""Which files are vdrop's own: those it may remove or overwrite. All others stay as they are."""

import fcntl
import os
import re
import stat
import struct
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from vdrop_cli import files
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.files import Damaged, printable
from vdrop_cli.lock import Lock

LOCK = "lock"  # in the run folder, while a process trains there
CHECKPOINT = r"checkpoint-\d{4,}(?:-\d{5,})?\.pt"
EVALUATION = (
    r"eval-\d{4,}(?:-\d{5,})?-(?:standard|mc\d+(?:-word|-no_word)?-s\d+|ensemble\d+-[0-9a-f]{8})"
    r"(?:-(?:fp32|bf16))?"
)
# what training writes, TensorBoard's events aside
TRAINING = rf"config\.yaml|log\.jsonl|result\.json|stuck\.json|{CHECKPOINT}"
EVENTS = r"events\.out\.tfevents\.\d+\..+"
RUN = rf"(?:{TRAINING}|{EVALUATION}\.(?:json|partial))(?:\.\d+\.tmp)?|{EVALUATION}\.lock|{EVENTS}|{LOCK}"
OUTCOMES = ("result.json", "stuck.json")  # how a run has ended, so that it is not trained again
APPENDED = ("log.jsonl",)  # written in place: a link there leads to a file that is not the run's
READ_FLAGS = 0x80006601 | struct.calcsize("l") << 16  # Linux: FS_IOC_GETFLAGS
UNREMOVABLE = 0x10 | 0x20  # FS_IMMUTABLE_FL, FS_APPEND_FL
LISTED = 5  # names in a message, at most


def fits(names: str, path: Path) -> bool:
    return re.fullmatch(names, path.name, re.ASCII) is not None


def is_of_run(path: Path) -> bool:
    """Whether it has a name that training or evaluation gives its files."""
    return fits(RUN, path)


def entries(folder: Path) -> list[Path]:
    """What is in a run folder; nothing where there is none yet. Raises ConfigError where it cannot be
    listed.
    """
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):  # who makes the folder says what is in its way
        return []
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be read ({error.strerror}); move it away, or choose another outputs="
        ) from None


def events_in(folder: Path) -> list[Path]:
    """TensorBoard's files of a run."""
    return [path for path in entries(folder) if fits(EVENTS, path)]


def require_regular_files(folder: Path, before_writing: bool = False) -> None:
    """Raises ConfigError where a file of a run is something else: a FIFO, a device, a folder, or a link that
    leads to none.

    Nothing is opened. `before_writing` also refuses links in place of the files that a run appends to.
    """
    for path in filter(is_of_run, entries(folder)):
        try:
            if path.name == LOCK or (before_writing and path.name in APPENDED):
                files.require_regular(path.lstat())
            else:
                files.require_regular(path.stat())
        except Damaged as damage:
            raise ConfigError(f"{path} is in the way: {damage}; move it away") from None
        except OSError as error:
            if not path.is_symlink():
                continue  # removed in between
            raise ConfigError(
                f"{path} is in the way: a link that leads nowhere ({error.strerror}); move it away"
            ) from None


def removal_order(folder: Path) -> list[Path]:
    """Files of a run as `clear` removes them.

    Its result, or that it is stuck, comes first, so that what is left is never taken for a run that has
    ended; then its evaluations; then its checkpoints from the newest to the oldest, each of which finds all
    that it needs in the older ones and in the log. So after every removal the folder holds a run that resumes
    to the same result, or none.
    """

    def place(path: Path) -> tuple[int, int, int]:
        if path.name in OUTCOMES:
            return 0, 0, 0
        if fits(rf"{EVALUATION}\.(?:json|partial)", path):
            return 1, 0, 0
        if fits(CHECKPOINT, path):
            epoch, _, batch = path.stem.removeprefix("checkpoint-").partition("-")
            return 2, -int(epoch), -int(batch or 0)
        return (4 if fits(TRAINING, path) else 3), 0, 0

    own = [path for path in entries(folder) if is_of_run(path) and path.name != LOCK]
    return sorted((path for path in own if not is_lock(path)), key=place)


def is_lock(path: Path) -> bool:
    """Of an evaluation. A link or FIFO of that name locks nothing, and is removed like any other file."""
    return (
        fits(rf"{EVALUATION}\.lock", path)
        and (status := status_of(path)) is not None
        and stat.S_ISREG(status.st_mode)
    )


def status_of(path: Path) -> os.stat_result | None:
    """Of a file or a link; None where it is no longer there, as another process may remove it at any time."""
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def clear(folder: Path) -> None:
    """Removes an earlier run from its folder, and says what it leaves there. Links are removed, never
    followed.

    Raises ConfigError, with nothing removed, while the run is evaluated or where one of its files cannot be
    removed.
    """
    found = entries(folder)
    others = [path.name for path in found if not is_of_run(path)]
    with ExitStack() as evaluations:
        for path in filter(is_lock, filter(is_of_run, found)):
            evaluations.enter_context(Lock(path, str(path.with_suffix(".json"))))
        own = removal_order(folder)
        mounts = mount_points()
        for path in own:
            if reason := obstacle(path, mounts):
                raise ConfigError(
                    f"force=true: {path} {reason}, so nothing was removed; remove it or move it away"
                )
        for path in own:
            try:
                path.unlink(missing_ok=True)
                if path.name in OUTCOMES:
                    files.flush_folder(folder)  # on the disk, too, before anything else goes
            except OSError as error:
                raise RunError(
                    f"force=true: {path} cannot be removed ({error.strerror}); see to it that it can, and "
                    "give the same command again"
                ) from None
    if others:
        more = f" and {len(others) - LISTED} more" if len(others) > LISTED else ""
        listed = ", ".join(map(printable, others[:LISTED]))
        print(
            f"vdrop: force=true leaves what is not the run's in {printable(folder)}: {listed}{more}",
            file=sys.stderr,
        )


def obstacle(path: Path, mounts: set[str]) -> str:
    """Why a file could not be removed, as far as that can be seen; nothing where it can, or where it is
    gone.
    """
    status = status_of(path)
    if status is None:
        return ""
    if os.path.join(os.path.realpath(path.parent), path.name) in mounts:
        return "is mounted"
    if stat.S_ISDIR(status.st_mode):
        return "is a folder"
    if stat.S_ISREG(status.st_mode):
        with suppress(OSError):  # where the file system has no flags, or the file cannot be read
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                (flags,) = struct.unpack_from(
                    "I", fcntl.ioctl(handle, READ_FLAGS, bytes(struct.calcsize("l")))
                )
            finally:
                os.close(handle)
            if flags & UNREMOVABLE:
                return "is immutable"
    return ""


def mount_points() -> set[str]:
    """Paths at which something is mounted, on Linux."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return set()
    return {
        re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), line.split(" ")[4]) for line in lines
    }


def require_own(path: Path, is_own: Callable[[bytes], bool], way_out: str, size: int | None = None) -> None:
    """Raises ConfigError where a file is there that vdrop did not write, going by its content, or by its
    first `size` bytes.
    """
    try:
        content = files.read(path) if size is None else files.read_start(path, size)
    except (FileNotFoundError, NotADirectoryError):  # writing it says what is in the way
        return
    except Damaged as damage:
        raise ConfigError(f"{printable(path)} would be overwritten, and {damage}; {way_out}") from None
    except OSError as error:
        raise ConfigError(
            f"{printable(path)} would be overwritten, and cannot be read ({error.strerror}); {way_out}"
        ) from None
    if not is_own(content):
        raise ConfigError(f"{printable(path)} was not written by vdrop, and would be overwritten; {way_out}")


def require_record(folder: Path) -> None:
    """Raises ConfigError where a record would take the place of files that are none: a folder of them has
    only names of a run.
    """
    for path in entries(folder):
        if is_of_run(path) and (status := status_of(path)) is not None:
            try:
                files.require_regular(status)
            except Damaged as damage:
                raise ConfigError(f"{path} would be overwritten, and {damage}; move it away") from None
