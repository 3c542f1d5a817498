"""Words that are drawn, and their probabilities."""

import pytest
import torch

from tests.test_perplexity import trained
from vdrop_cli.generation import probabilities, sample_words

LOGITS_V = torch.tensor([0.5, -1.0, 3.0, 2.0, 2.0, -7.0])


@pytest.mark.parametrize("temperature", [0.1, 1.0, 7.0])
def test_a_temperature_raises_probabilities_to_a_power(temperature: float) -> None:
    """p^(1 / temperature), normalised."""
    powers_V = torch.softmax(LOGITS_V.double(), 0) ** (1 / temperature)
    expected_V = powers_V / powers_V.sum()
    torch.testing.assert_close(probabilities(LOGITS_V, temperature, None).double(), expected_V)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 6, 100])
def test_top_k_leaves_so_many_words_in_their_proportions(top_k: int) -> None:
    """Two words share the second place; one of them counts where there is place for one."""
    p_V, all_V = probabilities(LOGITS_V, 1.0, top_k), probabilities(LOGITS_V, 1.0, None)
    chosen_V = p_V > 0
    assert chosen_V.sum() == min(top_k, len(LOGITS_V))
    assert (all_V[chosen_V].min() >= all_V[~chosen_V]).all()
    torch.testing.assert_close(p_V[chosen_V], all_V[chosen_V] / all_V[chosen_V].sum())


@pytest.mark.parametrize("prompt", [[], [3], [3, 1, 4, 1, 5]])
def test_each_word_is_drawn_given_all_words_before_it(prompt: list[int]) -> None:
    """As where the whole text up to it is read anew; of no text the head's bias decides."""
    model, prompt_N = trained()[0], torch.tensor(prompt, dtype=torch.int64)
    for seed in range(20):
        draws, own = (torch.Generator().manual_seed(seed) for _ in range(2))
        words = list(prompt)
        for drawn in sample_words(model, prompt_N, 4, draws):
            logits_V = model.head_bias
            if words:
                x_TBE, _ = model(torch.tensor(words)[:, None], model.zero_state(1), model.mean_masks())
                logits_V = model.logits(x_TBE[-1, 0])
            assert drawn == torch.multinomial(logits_V.softmax(0), 1, generator=own)
            words.append(drawn)
        assert len(words) == len(prompt) + 4


@pytest.mark.parametrize("temperature", [1e-6, 1e30])
def test_extreme_temperatures_give_probabilities(temperature: float) -> None:
    p_V = probabilities(LOGITS_V, temperature, None)
    assert p_V.isfinite().all() and p_V.sum().item() == pytest.approx(1)
    assert p_V.argmax() == 2 or p_V.amax() == p_V.amin()
