"""Dropout as data: what may be combined, and what is refused by name."""

import dataclasses
from typing import Any

import pytest

from vdrop_cli.policies import PLACES, Dropout, Policy, Tie, WordMask

USED = {  # written out, since the table of the code agrees with itself whatever it says
    "none": "",
    "zaremba": "p_x p_out p_head",
    "naive": "p_word p_x p_h p_out p_head",
    "moon": "p_word p_c",
    "variational": "p_word p_x p_h p_out p_head p_weight",
}


def test_names_stand_for_members() -> None:
    dropout = Dropout("variational", tie="gates", p_word=0.2, word_mask="token")
    assert (dropout.policy, dropout.tie, dropout.word_mask) == (Policy.variational, Tie.gates, WordMask.token)
    assert Dropout("naive").tie is Tie.none and Dropout(Policy.moon).tie is Tie.all


@pytest.mark.parametrize("policy", Policy)
def test_a_policy_takes_the_probabilities_that_it_uses(policy: Policy) -> None:
    for place in PLACES:
        if place in USED[policy.name].split():
            assert Dropout(policy, **{place: 0.3}).max_probability == 0.3
        else:
            with pytest.raises(
                ValueError,
                match=rf"^{place} must be 0 with policy={policy}, which does not use it, got 0\.3$",
            ):
                Dropout(policy, **{place: 0.3})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "gal"}, r"^policy must be a Policy: none, zaremba, naive, moon, variational; got 'gal'$"),
        ({"policy": "variational", "p_h": 1.0}, r"^p_h must be in \[0, 1\), got 1\.0$"),
        ({"policy": "variational", "p_x": (0.1, -0.1)}, r"^p_x must be in \[0, 1\), got -0\.1$"),
        ({"policy": "variational", "p_h": float("nan")}, r"^p_h must be in \[0, 1\), got nan$"),
        ({"policy": "variational", "p_h": "0.3"}, r"^p_h must be in \[0, 1\), got '0\.3'$"),
        ({"policy": "variational", "p_h": True}, r"^p_h must be in \[0, 1\), got True$"),
        ({"policy": "zaremba", "tie": "none"}, r"^tie must be all with policy=zaremba, got none$"),
        ({"policy": "variational", "word_mask": "token"}, r"^word_mask must be type where p_word=0"),
        ({"policy": "moon", "p_head": 0.3}, r"^p_head must be 0 with policy=moon"),
        ({"policy": "moon", "p_between": 0.3}, r"^p_between must be unset with policy=moon"),
        ({"policy": "variational", "p_between": 1}, r"^p_between must be in \[0, 1\), got 1$"),
        (
            {"policy": "variational", "p_x": (0.1, 0.2), "p_between": 0.3},
            r"^p_between must be unset where p_x has a probability for each layer$",
        ),
        (
            {"policy": "naive", "new_each_step": ["p_h"]},
            r"^new_each_step must be empty with policy=naive, got p_h$",
        ),
        (
            {"policy": "variational", "new_each_step": ["p_word"]},
            r"^new_each_step must be of p_x, p_between, p_h, p_out, p_head, got 'p_word'$",
        ),
        ({"policy": "variational", "new_each_step": "p_h"}, r"^new_each_step must be a list of places, got"),
        (
            {"policy": "naive", "one_state_mask": True},
            r"^one_state_mask must be False with policy=naive, got True$",
        ),
        (
            {"policy": "variational", "tie": "gates", "one_state_mask": True},
            r"^one_state_mask must be False with tie=gates, got True$",
        ),
        *(
            ({"policy": "variational", "p_h": 0.5, "one_state_mask": True, **other}, message)
            for other, message in (
                ({"p_out": 0.5}, r"^p_out must be 0 with one_state_mask=True, got 0\.5$"),
                ({"p_between": 0.5}, r"^p_between must be unset with one_state_mask=True, got 0\.5$"),
                (
                    {"p_x": (0.5, 0.5)},
                    r"^p_x must be one probability with one_state_mask=True, .*\(0\.5, 0\.5\)$",
                ),
                ({"p_h": 0}, r"^one_state_mask must be False with p_h=0, got True$"),
                ({"p_h": (0, 0)}, r"^one_state_mask must be False with p_h=0, got True$"),
            )
        ),
        (
            {"policy": "variational", "p_h": 0.5, "one_state_mask": True, "new_each_step": ["p_x", "p_h"]},
            r"^new_each_step must be without p_h with one_state_mask=True, which holds their mask$",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dropout(**arguments)


def test_probabilities_are_checked_for_good() -> None:
    """No change afterwards can go around the checks."""
    dropout = Dropout("variational", p_h=[0.1, 0.2])
    with pytest.raises(dataclasses.FrozenInstanceError):
        dropout.p_h = 1.0  # type: ignore[misc]
    assert (
        dropout.p_h == (0.1, 0.2)
        and dropout.layer_probabilities("p_h", 2) == (0.1, 0.2)
        and dropout.layer_probabilities("p_x", 3) == (0, 0, 0)
    )
    with pytest.raises(ValueError, match="p_h must be one probability or 3, one for each layer, got 2"):
        dropout.layer_probabilities("p_h", 3)
    assert dropout.drops and dropout.max_probability == 0.2 and not Dropout("variational").drops


def test_layers_after_the_first_may_have_a_probability_of_their_own() -> None:
    dropout = Dropout("variational", p_x=0.1, p_between=0.4)
    assert dropout.layer_probabilities("p_x", 3) == (0.1, 0.4, 0.4) and dropout.max_probability == 0.4
    assert Dropout("variational", p_between=0.4).drops
    assert Dropout("variational", p_x=0.1, p_between=0.0).layer_probabilities("p_x", 2) == (0.1, 0)
    one = Dropout("variational", p_x=0.1, p_h=(0.2, 0.3, 0.4), one_state_mask=True)
    assert one.layer_probabilities("p_x", 3) == (0.1, 0.2, 0.3)


def test_masks_are_held_or_new_every_step() -> None:
    assert {policy for policy in Policy if Dropout(policy).new_every_step} == {Policy.zaremba, Policy.naive}
    mixed = Dropout("variational", p_x=0.1, p_h=0.1, p_out=0.1, p_head=0.1, new_each_step=["p_out", "p_x"])
    assert mixed.new_every_step and mixed.new_each_step == ("p_x", "p_out")
    places = ("p_x", "p_between", "p_h", "p_out", "p_head")
    assert [mixed.is_new_each_step(place) for place in places] == [True, False, False, True, False]
    assert all(Dropout("naive").is_new_each_step(place) for place in places)
    assert not any(Dropout("moon").is_new_each_step(place) for place in places)
