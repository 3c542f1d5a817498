"""The server of tests.processes.ForkServer: a process that has imported everything and forks commands."""

import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import threading
from typing import Any, NoReturn

from hydra.core.plugins import Plugins

import vdrop_cli
from tests import quick_hydra
from tests.processes import NUMBER, WITHOUT_RECORDS, Forked
from vdrop_cli import cli

LIBRARIES = (
    "datasets",
    "joblib",
    "matplotlib.figure",
    "sklearn.linear_model",
    "torch.utils.tensorboard.summary",
)
NOT_IMPORTED = (  # the commands import what this machine can run
    "vdrop_cli.__main__",
    "vdrop_cli.kernels.",
    *(f"vdrop_cli.sinks.{logger}" for logger in ("mlflow", "trackio", "wandb")),
)


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """subprocess.Popen within a command: `vdrop …` is forked by the server, too."""

    address: str

    def __new__(cls, args: Any, *more: Any, **options: Any) -> Any:
        if not more and not options and args[:3] == [sys.executable, "-m", "vdrop_cli"]:
            return Forked(cls.address, os.getcwd(), args[3:], (1, 2), dict(os.environ))
        return super().__new__(cls)


def run(request: dict[str, Any], outputs: list[int]) -> NoReturn:
    """Becomes the command."""
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, descriptor in enumerate(outputs, start=1):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    if WITHOUT_RECORDS in os.environ:
        for name in [name for name in sys.modules if name.startswith("vdrop_cli")]:
            if hasattr(sys.modules[name], "RECORDS"):
                setattr(sys.modules[name], "RECORDS", None)  # noqa: B010
    sys.argv = ["vdrop", *request["arguments"]]
    cli.main()
    sys.exit()


def supervise(connection: socket.socket) -> None:
    """Forks a command and reports its process id and exit code; ends with the process that asked for it."""
    length, outputs, _, _ = socket.recv_fds(connection, NUMBER.size, 2)
    content = connection.recv(NUMBER.unpack(length)[0], socket.MSG_WAITALL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        connection.close()
        run(json.loads(content), outputs)
    for descriptor in outputs:
        os.close(descriptor)
    connection.sendall(NUMBER.pack(pid))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    connection.sendall(NUMBER.pack(code))


def serve() -> None:
    """Serves until standard input is closed."""
    modules = [module.name for module in pkgutil.walk_packages(vdrop_cli.__path__, "vdrop_cli.")]
    for name in (*LIBRARIES, *(name for name in modules if not name.startswith(NOT_IMPORTED))):
        importlib.import_module(name)
    quick_hydra.install()
    Plugins.instance()  # finds the launchers
    gc.freeze()  # leaves memory shared with the commands
    Popen.address = sys.argv[1]
    subprocess.Popen = Popen  # type: ignore[misc]
    for number in (signal.SIGCHLD, signal.SIGINT):  # children end unwaited for; Ctrl-C is for the tests
        signal.signal(number, signal.SIG_IGN)
    assert threading.active_count() == 1, "a fork has only the thread that forks"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0{sys.argv[1]}")
        server.listen()
        print("ready", flush=True)
        while server in select.select([server, sys.stdin], [], [])[0]:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                os.close(0)
                os.open(os.devnull, os.O_RDONLY)
                supervise(connection)
                os._exit(0)
            connection.close()
