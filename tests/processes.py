"""The command line as a process: started as a user does, or forked from a server with all imports done."""

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Self
from uuid import uuid4

from vdrop_cli.kernels import compiler, native_library

ROOT = Path(__file__).parent.parent
NUMBER = struct.Struct("q")  # what the server and those who ask it exchange
LIMIT = 300  # seconds that a command may take
WITHOUT_RECORDS = "VDROP_TESTS_WITHOUT_RECORDS"  # forked commands read no shipped records where this is set


def environment(root: Path = ROOT, **changes: str) -> dict[str, str]:
    """The variables of a process that imports the package from `root` and uses one processor.

    The PYTHONPATH of the tests follows `root`: packages may lie there.
    """
    python_path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path, **changes}


def spawn(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Starts `vdrop …` in a folder as a user does; its messages can be read."""
    return subprocess.Popen(
        [sys.executable, "-m", "vdrop_cli", *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A runner in the background ignores SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@cache
def compiler_error() -> str:
    """Why `native` cannot be compiled here; empty where it can, whatever it then computes."""
    try:
        native_library.feature_bits()
    except compiler.CompilerError as error:
        return str(error)
    return ""


def without_notice(messages: str) -> str:
    """The messages of a command without the line that `native` cannot run, where there is no C compiler."""
    if not compiler_error():
        return messages
    notice = "vdrop: backend=auto is fused on cpu, which is slower than native: "
    return "".join(line for line in messages.splitlines(keepends=True) if not line.startswith(notice))


class Forked:
    """A `vdrop …` process forked by a ForkServer, with the methods of subprocess.Popen that tests use.

    `outputs` are the file descriptors of its standard output and error.
    """

    def __init__(
        self,
        address: str,
        folder: Path | str,
        arguments: list[str],
        outputs: tuple[int, int],
        variables: dict[str, str],
    ) -> None:
        self.args = ["vdrop", *arguments]
        self.returncode: int | None = None
        self.stderr: IO[str] | None = None
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(f"\0{address}")
        request = {"folder": str(folder), "arguments": arguments, "environment": variables}
        content = json.dumps(request).encode()
        socket.send_fds(self.connection, [NUMBER.pack(len(content))], list(outputs))
        self.connection.sendall(content)
        self.pid = self.answer()

    def answer(self) -> int:
        return int(NUMBER.unpack(self.connection.recv(NUMBER.size, socket.MSG_WAITALL))[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        if self.stderr is not None:
            self.stderr.close()

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None while the process runs."""
        if self.returncode is None and select.select([self.connection], [], [], 0)[0]:
            self.returncode = self.answer()
            self.connection.close()
        return self.returncode

    def wait(self, timeout: float | None = LIMIT) -> int:
        """Waits until the process has ended; raises subprocess.TimeoutExpired after `timeout` seconds."""
        if self.returncode is None:
            select.select([self.connection], [], [], timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def communicate(self, timeout: float = LIMIT) -> tuple[None, str]:
        """Waits until the process has ended; its messages."""
        assert self.stderr is not None
        with self.stderr:
            errors = without_notice(self.stderr.read())
        self.wait(timeout)
        return None, errors

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            send(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """Forks `vdrop …` processes from one that has imported everything, which saves each of them seconds.

    A command that starts `vdrop …` itself does it in the same way.
    """

    def __init__(self, folder: Path) -> None:
        """Starts the server. `folder` is for what commands print.

        The socket has a name of Linux's abstract namespace, because the path of a folder may be too long.
        """
        self.folder = folder
        self.address = f"vdrop-tests-{uuid4()}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from tests.fork_server import serve; serve()", self.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def start(self, folder: Path, *arguments: str) -> Forked:
        """Starts a process that appends all that it prints to the file `out` in its folder."""
        out = os.open(folder / "out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            return Forked(self.address, folder, list(arguments), (out, out), environment())
        finally:
            os.close(out)

    def run(
        self, folder: Path, *arguments: str, variables: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs a process to its end; `variables` are its environment, if not that of the tests."""
        with (self.folder / "stdout").open("w+") as out, (self.folder / "stderr").open("w+") as errors:
            outputs = (out.fileno(), errors.fileno())
            process = Forked(self.address, folder, list(arguments), outputs, variables or environment())
            try:
                code = process.wait()
            except subprocess.TimeoutExpired:
                process.kill()
                raise
            out.seek(0)
            errors.seek(0)
            messages = without_notice(errors.read())
            return subprocess.CompletedProcess(process.args, code, out.read(), messages)

    def spawn(self, folder: Path, *arguments: str) -> Forked:
        """Starts a process whose messages can be read."""
        reader, writer = os.pipe()
        with open(os.devnull, "w") as nothing:
            outputs = (nothing.fileno(), writer)
            process = Forked(self.address, folder, list(arguments), outputs, environment())
        os.close(writer)
        process.stderr = os.fdopen(reader)
        return process


def is_alive(pid: int) -> bool:
    """Whether a process has not ended; a zombie has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter if it ends between opening and reading
        return False


def send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
