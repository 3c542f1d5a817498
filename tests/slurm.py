"""A SLURM cluster of one node, this machine: munged, slurmctld and slurmd on loopback, in a folder, as root.

Needs Debian's packages slurm-wlm and munge. `python -m tests.slurm FOLDER COMMAND …` runs a command with it,
then stops it.
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
CONFIGURATION = """
ClusterName=vdrop
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
MailProg=/bin/true
KillWait=10
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,sched_interval=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why it cannot run here; empty where it can."""
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    lacking = [program for program in PROGRAMS if shutil.which(program) is None]
    if lacking:
        return f"needs {', '.join(lacking)}: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "needs to be root"


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Cluster:
    """Ready for jobs while it lasts; SLURM_CONF in the environment leads its programs to it."""

    def __init__(self, folder: Path, cpus: int | None = None) -> None:
        self.folder, self.daemons = folder.absolute(), list[subprocess.Popen[bytes]]()
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)  # munged looks at who may write where its socket is
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (self.folder / "munge.key").chmod(0o400)
        values = {
            "host": socket.gethostname(),
            "ports": free_ports(2),
            "folder": self.folder,
            "cpus": cpus or os.cpu_count(),
        }
        self.configuration = self.folder / "slurm.conf"
        self.configuration.write_text(CONFIGURATION.format(**values))
        os.environ["SLURM_CONF"] = str(self.configuration)

    def __enter__(self) -> Self:
        munge = {
            name: f"--{name}={self.folder}/munge.{name.removesuffix('-file')}"
            for name in ("key-file", "pid-file", "log-file", "seed-file")
        }
        self.start(
            "munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *munge.values()
        )
        self.start("slurmctld", "-D", "-c")
        self.start("slurmd", "-D")
        self.wait_until_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel_jobs()
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def cancel_jobs(self) -> None:
        """Without this, the processes of a failed test's jobs would outlive the cluster."""
        subprocess.run(["scancel", "--user=root"])
        until = time.monotonic() + 20
        while (
            time.monotonic() < until and subprocess.run(["squeue", "--noheader"], capture_output=True).stdout
        ):
            time.sleep(0.5)

    def start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("wb") as out:
            self.daemons.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))

    def wait_until_ready(self) -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            asked = subprocess.run(["sinfo", "--noheader", "--format=%T"], capture_output=True, text=True)
            if asked.stdout.strip() == "idle":
                return
            time.sleep(0.5)
        logs = "".join(
            path.read_text()[-2000:]
            for path in sorted(self.folder.glob("*.out")) + sorted(self.folder.glob("*.log"))
        )
        raise RuntimeError(f"the cluster did not get ready: {logs}")


if __name__ == "__main__":
    if why := missing():
        sys.exit(f"SLURM {why}")
    with Cluster(Path(sys.argv[1])):
        sys.exit(subprocess.run(sys.argv[2:]).returncode)
