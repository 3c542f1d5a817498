"""Names of the files in a run folder."""

import re

import pytest

from vdrop_cli import run_files


@pytest.mark.parametrize(
    ("progress", "name"),
    [
        ((3, 0), "checkpoint-0003.pt"),
        ((3, 812), "checkpoint-0003-00812.pt"),
        ((0, 1), "checkpoint-0000-00001.pt"),
        ((12345, 1234567), "checkpoint-12345-1234567.pt"),
    ],
)
def test_the_name_of_a_checkpoint_is_read_as_it_is_written(progress: tuple[int, int], name: str) -> None:
    assert run_files.checkpoint_name(*progress) == name
    assert run_files.parse_checkpoint(name) == progress
    evaluation = name.replace("checkpoint", "eval").replace(".pt", "-standard.json")
    match = re.match(run_files.EVALUATION_PREFIX_PATTERN, evaluation)
    assert match is not None and match.end() == len(evaluation) - len("standard.json")


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint.pt",
        "checkpoint-003.pt",
        "checkpoint-0003-012.pt",
        "checkpoint-0003.pt.1.tmp",
        "checkpoint-٠٠٠٣.pt",
    ],
)
def test_other_names_are_no_checkpoints(name: str) -> None:
    assert run_files.parse_checkpoint(name) is None
