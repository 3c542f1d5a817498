"""A model with the weights of a checkpoint, and the task that it was trained on."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY
from tests.test_checkpoint import at_epoch
from vdrop_cli.corpora.text import FIRST_ENCODING, compute_fingerprint
from vdrop_cli.errors import ConfigError
from vdrop_cli.trained_model import task_of


def test_the_refusal_names_data_sets_that_earlier_versions_read_differently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that end in a line end, to each of which another was added; of files nothing
    is said.
    """
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = ["a b c d\n"] * 20
    contents = b"a b c d\n\n" * 20
    parts = ("train", "validation", "test")
    (tmp_path / "set").mkdir()
    for split in parts:
        datasets.Dataset.from_dict({"text": rows}).to_parquet(str(tmp_path / "set" / f"{split}.parquet"))
        (tmp_path / split).write_text("".join(rows))
    old = compute_fingerprint([contents] * 3, FIRST_ENCODING, 2)
    hub = ["data=hub", f"data.name={tmp_path}/set", "data.column=text"]
    files_of = [
        "data=text",
        *(
            f"data.{part}={tmp_path}/{split}"
            for part, split in zip(("train", "valid", "test"), parts, strict=True)
        ),
    ]
    for data, ending in (
        (
            hub,
            r" trained on, or, if it is that, train again: earlier .* two line ends where a row ends in one$",
        ),
        (files_of, r" trained on$"),
    ):
        original = replace(at_epoch(1, 1, *TINY, *data), corpus=old, learned={})
        with pytest.raises(
            ConfigError,
            match=r"^checkpoint=old was trained on another corpus than .*; give it the text that it "
            rf"was{ending}",
        ):
            task_of(Path("old"), original, original.train.data, torch.device("cpu"))
