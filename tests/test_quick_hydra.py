"""The composition that the tests use is the one of Hydra."""

import hydra
import pytest
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from tests import quick_hydra
from tests.conftest import TINY, register_once
from vdrop_cli import CONF

LINES: list[tuple[str, tuple[str, ...]]] = [
    ("train", ()),
    ("train", (*TINY, "dropout=naive", "seed=3", "tags=[a,b]")),
    ("train", ("seed=4", "model=gru_small", "dropout=none", "model.hidden_size=3", "schedule=zaremba")),
    ("train", ("task=sentiment", "data=vader", "task.protocol=clean", "schedule.lr=1e-3")),
    ("train", ("experiment=table1_large_moon", "dropout.p_c=0.1")),
    ("train", ("experiment=melis_10m", "dropout.new_each_step=[p_h]", "schedule.clip=null")),
    ("train", ("hydra.run.dir=elsewhere", "seed=2")),
    ("train", ("+model.hidden=3",)),
    ("eval", ("checkpoint=a", "data.train=b", "members=[c]")),
    ("data", ("data=text", "data.train=b")),
    ("bench", ("sizes=[small]", "starts=2")),
]


def by_hydra(command: str, overrides: tuple[str, ...]) -> object:
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return hydra.compose(command, list(overrides))


@pytest.mark.parametrize(("command", "overrides"), LINES)
def test_a_line_is_composed_as_by_hydra(command: str, overrides: tuple[str, ...]) -> None:
    """Twice, since it remembers."""
    register_once()
    expected = by_hydra(command, overrides)
    for _ in range(2):
        actual = quick_hydra.compose(command, overrides)
        assert actual == expected and OmegaConf.is_struct(actual) == OmegaConf.is_struct(expected)
        assert OmegaConf.to_yaml(actual) == OmegaConf.to_yaml(expected)


@pytest.mark.parametrize(
    "overrides",
    [
        ("+experiment=quick_tied",),
        ("model.hiden_size=3",),
        ("seed=a",),
        ("model=typo",),
        ("dropout.p_h=[1]", "seed=1"),
    ],
)
def test_a_mistake_is_the_error_of_hydra(overrides: tuple[str, ...]) -> None:
    register_once()
    with pytest.raises(Exception) as expected:
        by_hydra("train", overrides)
    with pytest.raises(type(expected.value)) as actual:
        quick_hydra.compose("train", overrides)
    assert str(actual.value) == str(expected.value)
