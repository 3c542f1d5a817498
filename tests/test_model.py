"""The models: what enters them, where their masks act, how they start."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.conftest import settings
from vdrop_cli.dropout import WordMasks
from vdrop_cli.kernels import Masks
from vdrop_cli.model import LanguageModel, Regressor
from vdrop_cli.random_streams import Stream


def small(*overrides: str, cell: str = "lstm") -> LanguageModel:
    config = settings(f"model={cell}_small", "model.hidden_size=6", *overrides)
    model = LanguageModel(config.model, config.dropout.to_policy(), 11)
    model.initialise(0.5, Stream((0,)))
    return model


def test_the_medium_model_has_the_published_number_of_parameters() -> None:
    """Embedding 6.5 M, two layers of 4·(2·650²) + 8·650, head 6.51 M: 19.8 M (Zaremba et al. 2014: «20M»)."""
    config = settings()
    model = LanguageModel(config.model, config.dropout.to_policy(), 10_000)
    assert (
        sum(p.numel() for p in model.parameters())
        == 10_000 * 650 + 2 * (4 * 2 * 650**2 + 8 * 650) + 10_000 * 651
    )


def test_parameters_start_uniform_biases_too_and_as_a_function_of_the_stream() -> None:
    model = small()
    same = small()
    other = small()
    other.initialise(0.5, Stream((1,)))
    for name, parameter in model.named_parameters():
        assert -0.5 <= parameter.min() < -0.1 and 0.1 < parameter.max() <= 0.5
        assert torch.equal(parameter, same.get_parameter(name)) and not torch.equal(
            parameter, other.get_parameter(name)
        )


def test_word_vectors_start_normal_and_nothing_else_changes() -> None:
    config = settings("model.hidden_size=6")
    model, other = (LanguageModel(config.model, config.dropout.to_policy(), 5_000) for _ in range(2))
    other.initialise(0.5, Stream((1,)))
    model.initialise(0.5, Stream((1,)), embedding_std=3.0)
    words = model.embedding.detach()
    assert words.mean().item() == pytest.approx(0, abs=0.07)
    assert words.std().item() == pytest.approx(3, rel=0.02)
    assert (words.abs() > 6).double().mean().item() == pytest.approx(0.0455, rel=0.1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)) == (name != "embedding")


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_state_is_carried_between_calls(cell: str) -> None:
    model = small(cell=cell)
    ids, targets = torch.randint(11, (9, 2)), torch.randint(11, (9, 2))
    whole, _ = model.nll(ids, targets, model.zero_state(2), model.mean_masks())
    first, state = model.nll(ids[:4], targets[:4], model.zero_state(2), model.mean_masks())
    second, _ = model.nll(ids[4:], targets[4:], state, model.mean_masks())
    torch.testing.assert_close(torch.cat([first, second]), whole)


def test_the_future_is_not_seen() -> None:
    model = small()
    ids = torch.randint(11, (6, 1))
    changed = ids.clone()
    changed[4] = (ids[4] + 1) % 11
    before, after = (model(text, model.zero_state(1), model.mean_masks())[0] for text in (ids, changed))
    assert torch.equal(before[:4], after[:4]) and not torch.equal(before[4], after[4])


def test_a_dropped_word_has_no_embedding_and_gets_no_gradient() -> None:
    model = small()
    ids = torch.arange(11)[:, None].expand(-1, 2)
    word = WordMasks(0.5, by_type_B=torch.tensor([5, 6]))
    masks = replace(model.mean_masks(), word=word)
    loss = model.nll(ids, ids, model.zero_state(2), masks)[0].sum()
    touched = torch.autograd.grad(loss, model.embedding)[0].abs().sum(1) > 0
    is_used = (word.keep(ids) > 0).any(1)
    assert torch.equal(touched, is_used) and 0 < is_used.sum() < 11


def test_the_output_mask_acts_before_the_head() -> None:
    model = small()
    ids = torch.randint(11, (3, 2))
    masks = replace(model.mean_masks(), out=torch.zeros(1, 2, 6))
    nll, _ = model.nll(ids, ids, model.zero_state(2), masks)
    torch.testing.assert_close(nll, -model.head_bias.log_softmax(0)[ids])
    assert masks.layers == [Masks()] * 2


def test_the_forget_gates_bias_is_raised_and_no_other() -> None:
    plain, raised = small("model.layers=2"), small("model.layers=2")
    raised.initialise(0.5, Stream((0,)), forget_bias=1.0)
    for name, parameter in plain.named_parameters():
        change = raised.get_parameter(name) - parameter
        expected = torch.zeros_like(change)
        if "bias_ih" in name:
            expected[6:12] = 1
        assert torch.allclose(change, expected, atol=1e-6), name


@pytest.mark.parametrize("size", [6, 4, 9])
def test_a_tied_embedding_gets_the_gradients_of_both_its_uses(size: int) -> None:
    """Those that embedding and head of a model without ties get at the same weights; the projection is a
    part of the head.
    """
    tied = small("model.tie_embeddings=true", f"model.embedding_size={size}")
    other = small(f"model.embedding_size={size}")
    assert hasattr(tied, "head_projection") == (size != 6)
    projection_EH = tied.head_projection.detach() if size != 6 else torch.eye(6)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            expected = tied.embedding @ projection_EH if name == "head_weight" else tied.get_parameter(name)
            parameter.copy_(expected)
    ids, targets = torch.randint(11, (9, 2)), torch.randint(11, (9, 2))
    losses = [
        model.nll(ids, targets, model.zero_state(2), model.masks(9, 2, Stream((1,))))[0].sum()
        for model in (tied, other)
    ]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    assert tied.embedding.grad is not None and other.embedding.grad is not None
    as_head_VH = other.head_weight.grad
    assert as_head_VH is not None
    torch.testing.assert_close(tied.embedding.grad, other.embedding.grad + as_head_VH @ projection_EH.T)
    torch.testing.assert_close(tied.layers.weight_hh_l0.grad, other.layers.weight_hh_l0.grad)
    if size != 6:
        torch.testing.assert_close(tied.head_projection.grad, tied.embedding.detach().T @ as_head_VH)


def test_the_mask_of_the_head_is_on_the_projected_output() -> None:
    """By hand, in the loss, the logits and the loss with penalties."""
    tied = ("model.tie_embeddings=true", "model.embedding_size=4")
    model = small(*tied, "dropout.p_out=0.3", "dropout.p_head=0.5", "dropout.new_each_step=[p_head]")
    ids, targets, state = torch.randint(11, (9, 2)), torch.randint(11, (9, 2)), model.zero_state(2)
    masks = model.masks(9, 2, Stream((1,)))
    assert masks.head is not None and masks.head.shape == (9, 2, 4)
    y_TBH, _ = model.read(ids, state, masks)
    logits_TBV = (y_TBH @ model.head_projection.T * masks.head) @ model.embedding.T + model.head_bias
    expected = nn.functional.cross_entropy(logits_TBV.flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(model.logits(model(ids, state, masks)[0]), logits_TBV)
    x_TBE, *_ = model.head_input_and_squares(ids, state, masks)
    for nll_TB in (model.nll(ids, targets, state, masks)[0], model.nll_of_input(x_TBE, targets)):
        torch.testing.assert_close(nll_TB, expected.view(9, 2))
    without, _ = model.nll(ids, targets, state, replace(masks, head=None))
    assert not torch.allclose(without, expected.view(9, 2))


@pytest.mark.parametrize("options", [(), ("model.tie_embeddings=true", "model.embedding_size=4")])
def test_the_augmented_loss_compares_the_logits_with_the_word_vectors(options: tuple[str, ...]) -> None:
    """Also where the head has weights of its own, and where the output is projected."""
    model = small(*options)
    ids, targets = torch.randint(11, (9, 2)), torch.randint(11, (9, 2))
    x_TBE, _ = model(ids, model.zero_state(2), model.mean_masks())
    similarity_TBV = torch.softmax(model.embedding[targets] @ model.embedding.T / 3, -1)
    expected = -(similarity_TBV * torch.log_softmax(model.logits(x_TBE) / 3, -1)).sum()
    loss, nll = model.augmented_nll(x_TBE, targets, 5.0, 3.0)
    torch.testing.assert_close(nll, model.nll_of_input(x_TBE, targets).sum().detach())
    torch.testing.assert_close(loss, nll + 5 * expected)


@pytest.mark.parametrize("options", [(), ("model.tie_embeddings=true", "model.embedding_size=4")])
def test_logits_are_those_of_the_loss(options: tuple[str, ...]) -> None:
    model = small(*options)
    ids, targets = torch.randint(11, (9, 2)), torch.randint(11, (9, 2))
    nll, _ = model.nll(ids, targets, model.zero_state(2), model.mean_masks())
    y_TBH, _ = model(ids, model.zero_state(2), model.mean_masks())
    log_p_TBV = model.logits(y_TBH).log_softmax(-1)
    torch.testing.assert_close(nll, -log_p_TBV.gather(-1, targets[..., None])[..., 0])


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("melis_10m", 10_000 * (268 + 1) + 4 * 1194 * (268 + 1194 + 2) + 268 * 1194),
        ("quick_tied", 10_000 * (512 + 1) + 2 * 4 * 512 * (512 + 512 + 2)),
        ("inan_medium_tied", 10_000 * (650 + 1) + 2 * 4 * 650 * (650 + 650 + 2)),
        ("awd_lstm", 10_000 * (400 + 1) + 4 * (1150 * (400 + 1152 + 1150 + 1152) + 400 * (1150 + 402))),
    ],
)
def test_recipes_have_the_parameters_and_masks_of_their_source(recipe: str, expected: int) -> None:
    """Melis et al. 2018: one layer of 1,194 units, an embedding of 268; held masks on the recurrence alone.
    The quick one has none there, and none on the words. Merity et al. 2018: all held, the recurrent weights
    masked; 24 million parameters. Inan et al. 2017: all held, none on the words.
    """
    config = settings(f"experiment={recipe}")
    model = LanguageModel(config.model, config.dropout.to_policy(), 10_000)
    assert sum(p.numel() for p in model.parameters()) == expected
    masks = model.masks(5, 3, Stream((1,)))
    kinds = [None if mask is None else len(mask) for mask in (*masks.layers[0][:2], masks.out, masks.head)]
    assert (
        kinds
        == {
            "melis_10m": [5, 1, 5, 5],
            "quick_tied": [None, None, 5, None],
            "inan_medium_tied": [1, 1, 1, None],
            "awd_lstm": [1, None, 1, None],
        }[recipe]
    )
    assert (masks.word is not None) == (recipe == "awd_lstm")
    steps = 1 if recipe in ("awd_lstm", "inan_medium_tied") else 5
    assert [layer.x is not None and len(layer.x) for layer in masks.layers[1:]] == [steps] * (
        config.model.layers - 1
    )
    weights = [list(mask.shape) for mask in masks.weights or () if mask is not None]
    assert weights == ([[4600, 1150], [4600, 1150], [1600, 400]] if recipe == "awd_lstm" else [])


def regressor(cell: str = "lstm", policy: str = "variational") -> Regressor:
    config = settings(f"model={cell}_small", "model.hidden_size=6", f"dropout={policy}")
    model = Regressor(config.model, config.dropout.to_policy(), 11)
    model.initialise(0.5, Stream((0,)))
    return model


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("policy", ["variational", "variational_untied", "naive"])
def test_a_text_is_read_the_same_beside_longer_ones(cell: str, policy: str) -> None:
    """With its own masks, too; padding gets no gradient, whatever stands there."""
    model = regressor(cell, policy)
    ids_TB, lengths_B = torch.randint(1, 11, (9, 3)), torch.tensor([9, 2, 5])
    for b, length in enumerate(lengths_B.tolist()):
        ids_TB[length:, b] = 0  # a word that stands nowhere else
    masks = model.masks(9, 3, Stream((1,)))
    together_B = model(ids_TB, lengths_B, masks)
    together_B.sum().backward()
    assert (
        model.embedding.grad is not None
        and model.embedding.grad[0].abs().max() == 0 < model.embedding.grad[1:].abs().max()
    )
    for b, length in enumerate(lengths_B.tolist()):
        own = masks.rows([b])
        if policy == "naive":
            own = replace(
                own,
                layers=[Masks(*(m if m is None else m[:length] for m in layer)) for layer in own.layers],
                time=length,
            )
        alone_B = model(ids_TB[:length, b : b + 1], torch.tensor([length]), own)
        assert torch.allclose(alone_B, together_B[b : b + 1], atol=1e-6)


@pytest.mark.parametrize("option", ["model.lower_sizes=[9,7]", "model.residual=true"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_number_is_linear_in_the_output_after_the_last_word(cell: str, option: str) -> None:
    """Of layers whose sizes differ that of the last one; of residual layers the sum, not the state."""
    config = settings(f"model={cell}_small", "model.layers=3", "model.hidden_size=6", option)
    model = Regressor(config.model, config.dropout.to_policy(), 11)
    model.initialise(0.5, Stream((0,)))
    ids_TB, lengths_B = torch.randint(11, (4, 2)), torch.tensor([4, 3])
    masks = model.masks(4, 2, Stream((1,)))
    inner = replace(masks, word=None, out=None)
    y_TBH, _ = model.layers(model.embed(ids_TB, masks), lengths=lengths_B, masks=inner)
    assert masks.out is not None
    h_BH = torch.stack([y_TBH[3, 0], y_TBH[2, 1]]) * masks.out[0]
    expected = h_BH @ model.head_weight[0] + model.head_bias
    assert torch.allclose(model(ids_TB, lengths_B, masks), expected, atol=1e-6)


def test_the_number_is_linear_in_the_masked_state_after_the_last_word() -> None:
    model = regressor()
    ids_TB, lengths_B = torch.randint(11, (4, 2)), torch.tensor([4, 3])
    _, (h, _) = model.layers(model.embedding[ids_TB], lengths=lengths_B, masks=model.mean_masks())
    mask = torch.tensor([0.0, 2, 0, 2, 2, 0]).expand(1, 2, 6)
    expected = (h[-1] * mask[0]) @ model.head_weight[0] + model.head_bias
    assert torch.allclose(
        model(ids_TB, lengths_B, replace(model.mean_masks(), out=mask)), expected, atol=1e-6
    )
