"""Laws of dropout: what is shared over time, gates, sequences and words, and that masks average to one."""

from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from tests.conftest import CELLS_AND_POLICIES, POLICIES, settings
from vdrop_cli import dropout as drawing
from vdrop_cli.dropout import (
    KEEP_BLOCK,
    MaskShape,
    ModelMasks,
    WordMasks,
    concat_batch,
    draw,
    draw_traceable,
    drop_threshold,
    keep_mask,
    new_mask,
    no_masks,
    traceable_keep_mask,
)
from vdrop_cli.kernels import Masks
from vdrop_cli.layer_dropout import describe
from vdrop_cli.policies import Dropout, Policy, WordMask
from vdrop_cli.random_streams import Stream

TIME = 6
BATCH = 5
INPUT = 30
HIDDEN = 40
GATES = {"lstm": 4, "gru": 3}


def drawn(cell: str, policy: str, step: int = 0) -> ModelMasks:
    dropout = settings(f"model={cell}_small", f"dropout={policy}").dropout.to_policy()
    return draw(
        dropout, MaskShape(TIME, BATCH, (INPUT, HIDDEN), HIDDEN, GATES[cell]), Stream((1, "test", step))
    )


def tensors(masks: ModelMasks) -> list[Tensor]:
    """All that there are."""
    word = [] if masks.word is None else [masks.word.by_type_B, masks.word.by_token_TB]
    layer_masks = (mask for layer in masks.layers for mask in layer)
    return [mask for mask in (*layer_masks, masks.out, masks.head, *word) if mask is not None]


def varies(mask: Tensor, dim: int) -> bool:
    return mask.shape[dim] > 1 and not bool((mask == mask.select(dim, 0).unsqueeze(dim)).all())


@pytest.mark.parametrize(("cell", "policy"), CELLS_AND_POLICIES)
def test_each_policy_masks_what_the_table_says(cell: str, policy: str) -> None:
    """Input, recurrence, cell state, words, output; new every step or not; a mask a gate or one for all."""
    masked, new_every_step, by_gate = {
        "none": ("", False, False),
        "zaremba": ("x out", True, False),
        "naive": ("x h out", True, True),
        "moon": ("c", False, False),
        "moon_word": ("c word", False, False),
        "variational": ("x h word out", False, False),
        "variational_untied": ("x h word out", False, True),
    }[policy]
    masks = drawn(cell, policy)
    assert (masks.word is not None) == ("word" in masked)
    assert (masks.out is not None) == ("out" in masked)
    for layer, width in zip(masks.layers, (INPUT, HIDDEN), strict=True):
        for name, size in (("x", width), ("h", HIDDEN)):
            mask = getattr(layer, name)
            assert (mask is not None) == (name in masked.split())
            if mask is not None:
                assert mask.shape == (
                    TIME if new_every_step else 1,
                    GATES[cell] if by_gate else 1,
                    BATCH,
                    size,
                )
                assert varies(mask, 0) == new_every_step
                assert varies(mask, 1) == by_gate
                assert varies(mask, 2), "every sequence of the batch has its own mask"
        assert (layer.c is not None) == ("c" in masked.split())
        if layer.c is not None:
            assert layer.c.shape == (1, BATCH, HIDDEN) and varies(layer.c, 1)
            assert set(layer.c.unique().tolist()) == {0.0, 1.0}, (
                "what is divided at every step would grow without bound"
            )
    if masks.out is not None:
        assert varies(masks.out, 0) == new_every_step and varies(masks.out, 1)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("places", [("p_x",), ("p_between", "p_out"), ("p_h",)])
def test_each_place_has_held_masks_or_new_ones(places: tuple[str, ...], traced: bool) -> None:
    dropout = Dropout("variational", p_x=0.5, p_h=0.5, p_out=0.5, p_between=0.25, new_each_step=places)
    shape = MaskShape(TIME, BATCH, (INPUT, HIDDEN, HIDDEN), HIDDEN, 4)
    if traced:
        masks = draw_traceable(dropout, shape, torch.device("cpu"), torch.float32)
    else:
        masks = draw(dropout, shape, Stream((0,)))
    first, *others = masks.layers
    by_place = {
        "p_x": [first.x],
        "p_between": [layer.x for layer in others],
        "p_h": [layer.h for layer in masks.layers],
        "p_out": [masks.out],
    }
    for place, place_masks in by_place.items():
        for mask in place_masks:
            assert mask is not None and mask.shape[0] == (TIME if place in places else 1)
            assert varies(mask, 0) == (place in places)
    assert masks.time == TIME
    assert others[0].x is not None and others[0].x.max() == pytest.approx(1 / 0.75, rel=1e-4)
    assert first.x is not None and first.x.max() == 2


@pytest.mark.parametrize(
    "dropout",
    [
        Dropout("variational", p_x=0.1, p_h=0.35, p_out=0.65, p_weight=0.2),
        Dropout("naive", p_x=0.35, p_h=0.1, p_out=0.2),
        Dropout("moon", p_c=0.35),
    ],
    ids=describe,
)
def test_masks_that_a_compiler_traces_are_distributed_as_the_others(dropout: Dropout) -> None:
    """In each place as many are dropped, and the others have the same factor."""
    shape = MaskShape(2, 100, (100, 100), 100, 4, directions=2)
    torch.manual_seed(0)
    usual = draw(dropout, shape, Stream((0,))).tensors
    traced = draw_traceable(dropout, shape, torch.device("cpu"), torch.float32).tensors
    assert usual.keys() == traced.keys()
    for name, mask in usual.items():
        other = traced[name]
        if mask is None or other is None:
            assert mask is other, name
            continue
        assert other.shape == mask.shape and other.unique().tolist() == pytest.approx(mask.unique().tolist())
        share, other_share = ((m == 0).float().mean().item() for m in (mask, other))
        assert other_share == pytest.approx(share, abs=0.03), name


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("gates", [3, 4])
def test_with_tie_gates_the_candidate_alone_has_a_mask_of_its_own(gates: int, traced: bool) -> None:
    """That is g of i f g o, and n of r z n."""
    dropout = Dropout("variational", p_x=0.5, p_h=0.5, tie="gates")
    shape = MaskShape(TIME, BATCH, (INPUT,), HIDDEN, gates)
    if traced:
        masks = draw_traceable(dropout, shape, torch.device("cpu"), torch.float32)
    else:
        masks = draw(dropout, shape, Stream((0,)))
    for mask in (masks.layers[0].x, masks.layers[0].h):
        assert mask is not None and mask.shape[1] == gates
        shared = [torch.equal(mask[:, gate], mask[:, 0]) for gate in range(gates)]
        assert shared == [True, True, False, True][:gates]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("sizes", [(HIDDEN,), (HIDDEN, 70, 20)])
def test_one_mask_on_a_state_wherever_it_enters(sizes: tuple[int, ...], traced: bool) -> None:
    """The recurrence, the next layer and the output; inputs of the first layer have their own."""
    dropout = Dropout("variational", p_x=0.25, p_h=0.5, one_state_mask=True)
    shape = MaskShape(TIME, BATCH, (INPUT, *sizes[:-1]), sizes, 4)
    if traced:
        masks = draw_traceable(dropout, shape, torch.device("cpu"), torch.float32)
    else:
        masks = draw(dropout, shape, Stream((0,)))
    first = masks.layers[0].x
    assert first is not None and first.shape == (1, 1, BATCH, INPUT)
    assert sorted(first.unique().tolist()) == pytest.approx([0, 4 / 3], rel=1e-4)
    uses = [*(layer.x for layer in masks.layers[1:]), masks.out]
    for size, layer, use in zip(sizes, masks.layers, uses, strict=True):
        assert layer.h is not None and layer.h.shape == (1, 1, BATCH, size)
        assert use is not None and torch.equal(use.view_as(layer.h), layer.h) and use.dim() in (3, 4)
        assert varies(layer.h, 2) and set(layer.h.unique().tolist()) == {0, 2}
    assert masks.out is not None and masks.out.shape == (1, BATCH, sizes[-1]) and masks.time is None
    by_layer = replace(dropout, p_h=(*[0.5] * (len(sizes) - 1), 0.0) if len(sizes) > 1 else 0.5)
    assert (draw(by_layer, shape, Stream((0,))).out is None) == (len(sizes) > 1)


@pytest.mark.parametrize("new", [False, True])
def test_the_mask_of_the_head_is_held_or_new_and_follows_its_sequences(new: bool) -> None:
    places = ["p_head"] if new else []
    dropout = Dropout("variational", p_x=0.5, p_out=0.5, p_head=0.25, p_weight=0.5, new_each_step=places)
    shape = MaskShape(TIME, BATCH, (INPUT,), HIDDEN, 4, head_size=400)
    masks = draw(dropout, shape, Stream((0,)))
    head = masks.head
    assert head is not None and head.shape == (TIME if new else 1, BATCH, 400)
    assert varies(head, 0) == new and varies(head, 1)
    assert sorted(head.unique().tolist()) == pytest.approx([0, 4 / 3], rel=1e-4)
    assert head.mean().item() == pytest.approx(1, abs=0.1)
    for changed, expected in (
        (masks.rows([2, 0]), head[:, [2, 0]]),
        (masks.repeat(2), head.repeat_interleave(2, 1)),
        (masks.to("cpu", torch.float64), head.double()),
    ):
        assert changed.head is not None and torch.equal(changed.head, expected)
    without = draw(replace(dropout, p_head=0.0, new_each_step=()), shape, Stream((0,)))
    if not new:  # other places but the weights have the same masks with and without it
        assert all(map(torch.equal, tensors(replace(masks, head=None)), tensors(without)))
    joined = concat_batch([replace(one, weights=None) for one in (masks, draw(dropout, shape, Stream((1,))))])
    assert joined.head is not None and torch.equal(joined.head[:, :BATCH], head)
    with pytest.raises(ValueError, match="masks must be for one batch"):
        replace(masks, head=head[:, :1].expand(-1, BATCH + 1, -1))


@pytest.mark.parametrize("policy", ["zaremba", "naive"])
def test_the_mask_of_the_head_is_new_at_every_step_with_policies_that_are(policy: str) -> None:
    shape = MaskShape(TIME, BATCH, (INPUT,), HIDDEN, 4, head_size=400)
    masks = draw(Dropout(policy, p_head=0.5), shape, Stream((0,)))
    assert masks.head is not None and varies(masks.head, 0) and masks.time == TIME
    with pytest.raises(ValueError, match=r"p_head must be 0 without a projection of the output, got 0\.5"):
        draw(Dropout(policy, p_head=0.5), replace(shape, head_size=0), Stream((0,)))


def test_words_can_be_dropped_beside_naive_masks() -> None:
    """By type, held for the sequence, as in the authors' scripts."""
    masks = draw(
        settings("dropout=naive_word", "dropout.p_word=0.5").dropout.to_policy(),
        MaskShape(TIME, BATCH, (INPUT,), HIDDEN, 4),
        Stream((0,)),
    )
    assert masks.word is not None and varies(masks.layers[0].x, 0)
    keep = masks.word.keep(torch.tensor([*range(50), 3])[:, None].expand(-1, BATCH))
    assert torch.equal(keep[3], keep[50]) and varies(keep, 0) and varies(keep, 1)


@pytest.mark.parametrize("of", ["model=lstm_small", "model=gru_medium", "model=lstm_large", "task=sentiment"])
@pytest.mark.parametrize(
    ("changed", "other", "differ"),
    [
        ("naive_word", "variational", {"name", "policy"}),
        ("naive_word", "naive", {"name", "p_word"}),
        ("variational_no_word", "variational", {"name", "p_word"}),
        ("variational_no_word", "naive", {"name", "policy"}),
    ],
)
def test_choices_of_dropout_that_are_compared_differ_in_one_thing(
    of: str, changed: str, other: str, differ: set[str]
) -> None:
    """And their schedules in nothing."""
    one, two = (settings(of, f"dropout={name}") for name in (changed, other))
    assert one.schedule == two.schedule
    first, second = (asdict(run.dropout) for run in (one, two))
    assert {key for key in first if first[key] != second[key]} == differ


@pytest.mark.parametrize("policy", ["moon", "naive", "none"])
def test_the_mean_of_each_mask_is_one_where_it_is_divided(policy: str) -> None:
    """That on the cell state is divided where the hidden state is read, by `cell_scales`."""
    dropout = settings(f"dropout={policy}").dropout.to_policy()
    masks = draw(dropout, MaskShape(1, 1000, (100,), 100, 4), Stream((0,)))
    for place, mask in masks.layers[0]._asdict().items():
        scale = masks.cell_scales[0] if masks.cell_scales is not None and place == "c" else 1.0
        assert mask is None or scale * mask.mean().item() == pytest.approx(1.0, abs=0.01)
    assert (masks.layers[0].c is None) == (masks.cell_scales is None) == (policy != "moon")


def test_masks_on_cell_states_carry_their_scale() -> None:
    """Through every change of the masks; so a layer that is given them needs no policy of its own."""
    dropout = Dropout("moon", p_c=(0.25, 0.5))
    shape = MaskShape(1, 3, (5, 7), 7, 4, directions=2)
    masks = draw(dropout, shape, Stream((0,)))
    assert masks.cell_scales == pytest.approx([1 / 0.75, 1 / 0.75, 2, 2], rel=1e-4)
    changed = (
        masks.rows([0]),
        masks.repeat(2),
        masks.to("cpu", torch.float64),
        masks.replaced(masks.tensors),
        concat_batch([masks, masks]),
        draw_traceable(dropout, shape, torch.device("cpu"), torch.float32),
    )
    assert all(one.cell_scales == masks.cell_scales for one in changed)
    for other in (no_masks(2, 2), draw(dropout.scaled(0.5), shape, Stream((0,)))):
        with pytest.raises(ValueError, match="masks to be joined must have the same cell_scales"):
            concat_batch([masks, other])
    with pytest.raises(ValueError, match="cell_scales must be for 1 layers like the masks, got 2"):
        ModelMasks([Masks()], cell_scales=(1.0, 2.0))


@pytest.mark.parametrize("p", [0.1, 0.35, 0.65])
def test_masks_are_one_on_average_and_drop_as_often_as_they_should(p: float) -> None:
    dropout = Dropout(Policy.variational, p_x=p, p_h=p, p_out=p, p_word=p)
    masks = draw(dropout, MaskShape(1, 400, (100,), 100, 4), Stream((0,)))
    ids = torch.arange(200)[:, None].expand(-1, 400)
    assert masks.word is not None and masks.out is not None
    for mask in (masks.layers[0].x, masks.layers[0].h, masks.out, masks.word.keep(ids)):
        assert mask is not None
        assert mask.numel() >= 40_000
        assert sorted(mask.unique().tolist()) == pytest.approx([0, 1 / (1 - p)], rel=1e-4), (
            "p comes in steps of 2^-16"
        )
        assert mask.mean().item() == pytest.approx(
            1, abs=5 * (p / (1 - p) / 40_000) ** 0.5
        )  # five standard errors


def test_elements_are_dropped_independently_of_their_neighbours() -> None:
    mask = (
        draw(Dropout(Policy.variational, p_x=0.5), MaskShape(1, 400, (1000,), 100, 4), Stream((0,)))
        .layers[0]
        .x
    )
    assert mask is not None
    centred = (mask.flatten() > 0).double() - 0.5
    for distance in range(1, 9):
        assert (
            abs((centred[distance:] * centred[:-distance]).mean()) < 0.25 * 5 / 400_000**0.5
        )  # five standard errors


def test_the_smallest_probabilities_drop_something() -> None:
    """No mask has a finer step than 2^-16; what lies below is not taken for none."""
    assert [drop_threshold(p, 16) for p in (1e-9, 2**-16, 0.5, 1 - 1e-9)] == [1, 1, 2**15, 2**16 - 1]


def test_probability_zero_is_no_mask() -> None:
    dropout = Dropout(Policy.variational)
    masks = draw(dropout, MaskShape(2, 3, (4,), 5, 4), Stream((0,)))
    assert (masks.layers, masks.word, masks.out) == ([Masks()], None, None)


@pytest.mark.parametrize("policy", ["variational_untied", "moon_word"])
def test_masks_are_drawn_on_the_cpu_whatever_torchs_default_device_is(policy: str) -> None:
    """On a GPU the same random numbers would be others; the device "meta" has none at all."""
    dropout, shape = settings(f"dropout={policy}").dropout.to_policy(), MaskShape(3, 2, (5,), 7, 4)
    expected = draw(dropout, shape, Stream((1,)))
    with torch.device("meta"):
        masks = draw(dropout, shape, Stream((1,)))
    for a, b in zip(tensors(masks), tensors(expected), strict=True):
        assert torch.equal(a, b)


def test_a_word_meets_the_same_fate_wherever_it_stands() -> None:
    """«the dog and the cat» becomes «– dog and – cat», never «– dog and the cat»; another sequence has a
    mask of its own.
    """
    ids = torch.tensor([0, 1, 2, 0, 3, 0, 1])[:, None].expand(-1, 500)
    keep = WordMasks(
        0.5, by_type_B=torch.randint(2**62, (500,), generator=torch.Generator().manual_seed(0))
    ).keep(ids)
    assert torch.equal(keep[0], keep[3]) and torch.equal(keep[0], keep[5]) and torch.equal(keep[1], keep[6])
    fates = torch.stack([keep[0], keep[1], keep[2], keep[4]]) > 0
    assert (
        torch.corrcoef(fates.double()).fill_diagonal_(0).abs().max() < 0.2
    )  # words decide independently: standard error 0.045
    assert 180 < fates[0].sum() < 320  # sequences too


def test_the_fates_of_neighbouring_words_and_keys_are_independent() -> None:
    """The hash leaves no trace of the order of ids or keys."""
    keep = WordMasks(0.3, by_type_B=torch.arange(300)).keep(torch.arange(300)[:, None].expand(-1, 300)) > 0
    for one, other in ((keep[:-1], keep[1:]), (keep[:, :-1], keep[:, 1:])):
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]).double())[0, 1]
        assert abs(correlation) < 5 / 300


def test_word_masks_by_token_decide_place_by_place() -> None:
    dropout = Dropout(Policy.variational, p_word=0.5, word_mask=WordMask.token)
    masks = draw(dropout, MaskShape(50, 4, (3,), 3, 4), Stream((0,)))
    assert masks.word is not None
    assert varies(masks.word.keep(torch.zeros(50, 4, dtype=torch.long)), 0)


def test_masks_are_a_function_of_their_stream() -> None:
    """The same whatever was drawn before, others at every other step."""
    torch.rand(7)
    first = drawn("lstm", "variational")
    again = drawn("lstm", "variational")
    other = drawn("lstm", "variational", step=1)
    assert first.layers[0].x is not None and again.layers[0].x is not None and other.layers[0].x is not None
    assert torch.equal(first.layers[0].x, again.layers[0].x)
    assert not torch.equal(first.layers[0].x, other.layers[0].x)


@pytest.mark.parametrize("policy", POLICIES)
def test_masks_of_batches_that_are_joined_are_the_masks_of_each(policy: str) -> None:
    parts = [drawn("lstm", policy, step) for step in range(3)]
    joined = concat_batch(parts)
    for number, part in enumerate(parts):
        here = slice(number * BATCH, (number + 1) * BATCH)
        for layer, expected in zip(joined.layers, part.layers, strict=True):
            for mask, want, dim in (
                (layer.x, expected.x, 2),
                (layer.h, expected.h, 2),
                (layer.c, expected.c, 1),
            ):
                assert (mask is None) == (want is None)
                if mask is not None and want is not None:
                    assert torch.equal(mask.narrow(dim, here.start, BATCH), want)
        assert (joined.out is None) == (part.out is None) and (joined.word is None) == (part.word is None)
        if joined.out is not None and part.out is not None:
            assert torch.equal(joined.out[:, here], part.out)
        if part.word is not None and joined.word is not None:
            ids = torch.arange(TIME)[:, None]
            whole = joined.word.keep(ids.expand(-1, 3 * BATCH))
            assert torch.equal(whole[:, here], part.word.keep(ids.expand(-1, BATCH)))


def test_rows_are_whole_numbers() -> None:
    masks = drawn("lstm", "variational")
    assert masks.rows([]).batch == 0
    for index in (torch.tensor([1, 0], dtype=torch.uint8), [1, 0]):
        chosen = masks.rows(index)
        assert chosen.word is not None and masks.word is not None
        assert torch.equal(chosen.word.by_type_B, masks.word.by_type_B[[1, 0]])
    for wrong in ([0.5], torch.tensor([True, False]), torch.zeros(1, 1, dtype=torch.long)):
        for part in (masks, masks.word):
            with pytest.raises(ValueError, match="index must be a list of whole numbers"):
                part.rows(wrong)


def test_masks_on_weights_cannot_be_joined() -> None:
    """A batch has one of each."""
    dropout = Dropout("variational", p_weight=0.5)
    masks = [draw(dropout, MaskShape(2, 1, (4,), 5, 4), Stream((number,))) for number in range(2)]
    assert concat_batch(masks[:1]).weights is masks[0].weights
    with pytest.raises(ValueError, match="masks on weights cannot be joined"):
        concat_batch(masks)


def test_masks_of_batches_that_lack_some_are_joined_with_ones() -> None:
    with_x = ModelMasks([Masks(x=torch.full((1, 1, 2, 3), 2.0))])
    joined = concat_batch([ModelMasks([Masks()], batch=1), with_x])
    assert joined.batch == 3 and joined.layers[0].x is not None
    assert joined.layers[0].x[0, 0, :, 0].tolist() == [1, 2, 2]
    with pytest.raises(ValueError, match="batch=…"):
        concat_batch([ModelMasks([Masks()]), with_x])
    with pytest.raises(ValueError, match="masks must be for one batch, got masks for 2 and 3 sequences"):
        ModelMasks([Masks(x=torch.ones(1, 1, 2, 3), h=torch.ones(1, 1, 3, 3))])


@pytest.mark.parametrize(
    "count", [1, 4 * KEEP_BLOCK - 1, 4 * KEEP_BLOCK, 4 * KEEP_BLOCK + 5, 3 * 4 * KEEP_BLOCK]
)
def test_a_mask_is_the_same_in_whatever_blocks_it_is_drawn(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = []
    for block in (KEEP_BLOCK, 10 * KEEP_BLOCK, 3):
        monkeypatch.setattr(drawing, "KEEP_BLOCK", block)
        masks.append(keep_mask(0.25, (1, count), torch.Generator().manual_seed(1)))
    assert masks[0].shape == (1, count)
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])


def test_traced_masks_have_their_probability_in_any_default_dtype() -> None:
    """Random numbers of bf16 would have 8 bits."""
    p, count = 0.001, 400_000
    torch.set_default_dtype(torch.bfloat16)
    try:
        mask = traceable_keep_mask(p, (count,), torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert abs((mask == 0).double().mean().item() - p) < 5 * (p / count) ** 0.5


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_new_masks_have_one_dtype_in_any_default_dtype(p: float) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert new_mask(p, (2, 3), "cpu").dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
