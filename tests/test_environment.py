"""Devices, and what is written down of the machine."""

import subprocess
from pathlib import Path

import pytest
import torch

from vdrop_cli import environment
from vdrop_cli.config import ConfigError, Precision


def test_auto_takes_cuda_where_there_is_one() -> None:
    assert environment.device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert environment.device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["cuda:99", "mps", "cpu:7", "tpu", ""])
def test_a_device_that_is_not_there_is_an_error_that_lists_those_that_are(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device={name} is not .*cpu"):
        environment.device(name)


def test_what_is_written_down() -> None:
    told = environment.describe(torch.device("cpu"), "fused", Precision.bf16)
    assert (told["backend"], told["precision"]) == ("fused", "bf16")
    assert told["torch"] == torch.__version__ and told["threads"] == torch.get_num_threads()
    assert told["device"], "the processor has a name"
    root = Path(environment.__file__).parent.parent
    if (root / ".git").exists():
        head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        assert told["commit"] == head and isinstance(told["dirty"], bool)
