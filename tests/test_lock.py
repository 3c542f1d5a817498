"""Locks, with real processes and a full disk."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import environment
from vdrop_cli.errors import ConfigError
from vdrop_cli.lock import Lock, is_locked


def test_a_lock_works_where_the_disk_is_too_full_for_its_owner(tmp_path: Path) -> None:
    code = (
        "import resource, signal; from pathlib import Path; from vdrop_cli.lock import Lock\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "with Lock(Path('lock'), 'x'):\n    Lock(Path('lock'), 'x').__enter__()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert (
        "ConfigError: x is in use by another process; wait for it" in ran.stderr
        and os.listdir(tmp_path) == []
    )


def test_a_lock_file_that_cannot_be_removed_hides_no_finished_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where its folder was made read-only meanwhile; a file that stays blocks nobody."""

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch, Lock(tmp_path / "lock", "x"):
        patch.setattr(Path, "unlink", refuse)
    assert (tmp_path / "lock").exists() and not is_locked(tmp_path / "lock")
    with Lock(tmp_path / "lock", "x"):
        pass


OWNER = """
import sys
from pathlib import Path
from vdrop_cli.lock import Lock
with Lock(Path('lock'), 'x'):
    print('locked', flush=True)
    sys.stdin.read()
"""


def test_a_lock_names_its_owner_and_that_of_a_killed_process_blocks_nobody(tmp_path: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    for end in ("killed", "ended"):
        owner = subprocess.Popen([sys.executable, "-c", OWNER], cwd=tmp_path, env=environment(), **pipes)  # type: ignore[call-overload]
        assert owner.stdout.readline() == b"locked\n"
        host = os.uname().nodename
        with (
            pytest.raises(
                ConfigError, match=f"the run is in use by process {owner.pid} on {host}; wait for it"
            ),
            Lock(tmp_path / "lock", "the run"),
        ):
            pass
        if end == "killed":
            owner.send_signal(signal.SIGKILL)
        owner.communicate()
        assert (tmp_path / "lock").exists() == (end == "killed")
        with Lock(tmp_path / "lock", "the run"):
            assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()
        assert not (tmp_path / "lock").exists()
