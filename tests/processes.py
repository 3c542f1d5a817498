"""Runs of the command line as processes; and many of them, quickly: forked from one that has imported
everything.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Self

ROOT = Path(__file__).parent.parent
FORK = """
import json, os, sys
import hydra, torch
import torch.utils.tensorboard, torch.utils.tensorboard.summary
import vdrop_cli.commands.eval, vdrop_cli.commands.train, vdrop_cli.sweeps
from vdrop_cli.cli import main

for line in sys.stdin:
    told = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.chdir(told["folder"])
        out = os.open("out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.argv = ["vdrop", *told["arguments"]]
        main()
        sys.exit()
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def environment(root: Path = ROOT, **changes: str) -> dict[str, str]:
    """Of a process that imports the package from `root`, this checkout, and leaves the other processor to
    other tests.

    The PYTHONPATH of the tests stays behind it: packages may lie there.
    """
    python_path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path, **changes}


def spawn(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`vdrop …`, whose messages can be read."""
    return subprocess.Popen(
        [sys.executable, "-m", "vdrop_cli", *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a runner in the background ignores it
    )


class Processes:
    """One at a time; what they print goes to the file `out` in their folder."""

    def __init__(self) -> None:
        self.fork = subprocess.Popen(
            [sys.executable, "-c", FORK],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.fork.communicate()

    def start(self, folder: Path, *arguments: str) -> int:
        """The process's id."""
        assert self.fork.stdin is not None and self.fork.stdout is not None
        self.fork.stdin.write(json.dumps({"folder": str(folder), "arguments": arguments}) + "\n")
        self.fork.stdin.flush()
        return int(self.fork.stdout.readline())

    def wait(self) -> int:
        """Its exit code, or the signal that killed it, negative."""
        assert self.fork.stdout is not None
        return int(self.fork.stdout.readline())

    def run(self, folder: Path, *arguments: str) -> int:
        self.start(folder, *arguments)
        return self.wait()


def is_alive(pid: int) -> bool:
    """Whether it has not ended; one that has ended and was not waited for has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter if it goes between opening and reading
        return False


def send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
