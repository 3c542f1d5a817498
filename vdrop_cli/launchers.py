"""What Hydra's launchers lack: continuing without a job that is lost."""

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from typing import Any

from hydra.core.utils import JobReturn, JobStatus

from vdrop_cli import interruption

Launch = Callable[[Sequence[Sequence[str]], int], Sequence[JobReturn]]


def outliving(launch: Launch, status: Callable[[int], str]) -> Launch:
    """Launches jobs through joblib, whose pool of processes dies whole when one of them is killed, as where
    memory is short.

    The jobs that were at work then go on one after the other, each in a pool of its own, so that one that is
    killed again takes nobody along; then the rest as before.
    """

    def launched(job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        jobs, first = job_overrides, initial_job_idx
        if interruption.asked() or not jobs:
            return []
        try:
            return launch(jobs, first)
        except BrokenProcessPool:
            statuses = {number: status(number) for number in range(first, first + len(jobs))}
            last = max((number for number in statuses if statuses[number] == "begun"), default=None)
            if last is None or interruption.asked():
                raise
        at_work = [number for number in range(first, last + 1) if statuses[number] in ("begun", "not begun")]
        print(
            f"vdrop: a process was killed, which ended its pool; {len(at_work)} runs go on one after the "
            "other",
            file=sys.stderr,
        )
        for number in at_work:
            if not interruption.asked():
                with suppress(BrokenProcessPool):  # this one again: its outcome tells
                    launch([jobs[number - first]], number)
        return launched(jobs[last + 1 - first :], last + 1)

    return launched


@contextmanager
def waiting_for_all() -> Iterator[list[str]]:
    """submitit's launcher gives up at the first job that is lost; meanwhile it waits for each.

    Gives how each was lost, in their order; nothing where it was not.
    """
    import submitit

    theirs, lost = submitit.Job.results, list[str]()

    def results(job: Any) -> list[Any]:
        try:
            told = theirs(job)
        except Exception:
            lost.append(f"its process was lost; see {job.paths.stderr}")
            return [JobReturn(status=JobStatus.COMPLETED)]
        lost.append("")
        return told

    submitit.Job.results = results  # type: ignore[method-assign,assignment]
    try:
        yield lost
    finally:
        submitit.Job.results = theirs  # type: ignore[method-assign]
