"""What submitit's launcher lacks: waiting for the other jobs after one is lost."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra.core.utils import JobReturn, JobStatus


@contextmanager
def waiting_for_all() -> Iterator[list[str]]:
    """Within it, submitit's launcher waits for every job; otherwise it stops waiting when a job is lost.

    Yields a list that receives, for each job in order, how it was lost, or an empty text.
    """
    import submitit

    original, losses = submitit.Job.results, list[str]()

    def results(job: Any) -> list[Any]:
        try:
            returned = original(job)
        except Exception:
            losses.append(f"its process was lost; see {job.paths.stderr}")
            return [JobReturn(status=JobStatus.COMPLETED)]
        losses.append("")
        return returned

    submitit.Job.results = results  # type: ignore[method-assign,assignment]
    try:
        yield losses
    finally:
        submitit.Job.results = original  # type: ignore[method-assign]
