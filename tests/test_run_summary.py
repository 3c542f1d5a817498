"""What a run prints at its start."""

from pathlib import Path

import pytest

from tests.conftest import TINY, TINY_SENTIMENT, settings
from vdrop_cli import corpora
from vdrop_cli.commands import train


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_language_models_start_names_its_corpus_size_and_length(
    text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(*TINY, *text, "schedule.epochs=3", "schedule.max_steps=20", "dropout=naive")
    train.run(config)
    corpus = corpora.load_text(config.data)
    about = {line.partition(":")[0]: line for line in capsys.readouterr().err.splitlines()}
    sizes = ", ".join(
        f"{name} {len(part_N):,} tokens"
        for name, part_N in zip(("training", "validation", "test"), corpus.parts.values(), strict=True)
    )
    assert about["corpus"] == f"corpus: {corpus.origin}; {sizes}; vocabulary {len(corpus.vocabulary):,}"
    assert "1,866 parameters" in about["model"] and "p_word" not in about["model"]
    assert "p_x 0.25, p_h 0.25, p_out 0.25" in about["model"]
    assert "epochs: 3, 36 steps per epoch, 20 steps in all" in about["training"]


def test_a_start_with_ratings_counts_sequences(rated: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    train.run(settings(*TINY_SENTIMENT, *rated, "task.chunk_words=null", "task.protocol=clean"))
    (line,) = (one for one in capsys.readouterr().err.splitlines() if one.startswith("corpus: "))
    assert "training 42 sequences of " in line and "validation 6 seq" in line and "test 12 seq" in line
