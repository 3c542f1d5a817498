"""Twenty losses of each cell and policy, as recorded: training does what it did."""

import json
from itertools import combinations, islice
from pathlib import Path

import pytest
import torch

from tests.conftest import CELLS_AND_POLICIES, TINY, settings
from vdrop_cli.corpora import Corpus
from vdrop_cli.tasks import LanguageModelling
from vdrop_cli.training import Run

TOLERANCE = 1e-4
RECORDED = Path(__file__).parent / "golden.json"
WHY = """These losses changed. If the change was meant to alter training, renew them with `make golden`
and say why in the commit; if not, it is a bug."""


def losses(cell: str, policy: str, folder: Path, *more: str, steps: int = 20) -> list[float]:
    """On numbers that no Python version and no way of reading a text changes: ids that count in a few ways.
    The weights are large, so that every mask matters, and the steps small, so that rounding does not.
    `more` are overrides.
    """
    words = [(i * i + i // 7) % 23 for i in range(600)]
    ids = {word: number for number, word in enumerate(dict.fromkeys(words))}
    train_N, short_N = (torch.tensor([ids[word] for word in words[:length]]) for length in (600, 60))
    corpus = Corpus([str(word) for word in ids], train_N, short_N, short_N, "here", "f")
    config = settings(
        *TINY, f"model={cell}_small", "model.init=1", "schedule.lr=0.1", f"dropout={policy}", *more
    )
    config.model.hidden_size = 8
    run = Run(config, LanguageModelling(config.task, corpus, torch.device(config.device)), folder)
    return [step.loss for step in islice(run.train_epoch(), steps)]


@pytest.mark.parametrize(("cell", "policy"), CELLS_AND_POLICIES)
def test_twenty_steps(cell: str, policy: str, tmp_path: Path) -> None:
    """Recorded on x86-64; other processors may draw other masks."""
    assert losses(cell, policy, tmp_path) == pytest.approx(
        json.loads(RECORDED.read_text())[f"{cell} {policy}"], rel=TOLERANCE
    ), WHY


def test_the_recorded_policies_differ() -> None:
    recorded = json.loads(RECORDED.read_text())
    assert recorded.keys() == {f"{cell} {policy}" for cell, policy in CELLS_AND_POLICIES}
    for one, other in combinations(recorded.values(), 2):
        assert max(abs(a / b - 1) for a, b in zip(one, other, strict=True)) > 50 * TOLERANCE


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        recorded = {
            f"{cell} {policy}": losses(cell, policy, Path(folder)) for cell, policy in CELLS_AND_POLICIES
        }
    RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
