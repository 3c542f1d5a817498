"""How long the parts of a training take here."""

from pathlib import Path

import pytest

from tests.conftest import TINY, TINY_SENTIMENT, settings
from tests.studies.test_plan import row_of
from vdrop_cli.model import LanguageModel
from vdrop_cli.settings.choices import Precision
from vdrop_cli.settings.commands import Reproduce
from vdrop_cli.studies.cost import Cost
from vdrop_cli.studies.plan import RunFactory
from vdrop_cli.tasks import Sentiment


def test_reading_costs_in_proportion_to_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rated: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    factory = RunFactory(Reproduce(precision=Precision.fp32))
    training = factory.training(row_of(settings(*TINY_SENTIMENT, *rated)), 1)
    cost, task = Cost(training.settings, training.task), training.task
    assert isinstance(task, Sentiment)
    words = sum(task.parts["train"].lengths) + sum(task.parts["test"].lengths)
    assert cost.reading(task.parts.values()) == pytest.approx(cost.per_word * words)
    assert cost.mc(10, None) == pytest.approx(10 * cost.mc(1, None)) and cost.epoch > 0


def test_the_time_of_passes_is_measured_with_as_many_as_run_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    factory = RunFactory(Reproduce(precision=Precision.fp32))
    training = factory.training(row_of(settings(*TINY, *text)), 1)
    cost = Cost(training.settings, training.task)
    batches: list[int] = []
    zero_state = LanguageModel.zero_state
    monkeypatch.setattr(
        LanguageModel, "zero_state", lambda model, batch: batches.append(batch) or zero_state(model, batch)
    )
    for samples, mc_batch in ((1000, None), (1000, 7), (5, 7)):
        cost.mc(samples, mc_batch)
    assert batches == [50, 7, 5]
