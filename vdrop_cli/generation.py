"""Words that a language model draws one after the other.

V vocabulary  N words
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from vdrop_cli.model import LanguageModel


@torch.no_grad()
def sample_words(
    model: LanguageModel,
    prompt_N: Tensor,
    count: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Iterator[int]:
    """Yields the ids of `count` words that continue `prompt_N`, each drawn given all words before it.

    With an empty prompt, the first word is drawn from the bias of the head, which is the prediction of the
    zero state. Raises ValueError if a probability is not finite.
    """
    state, ids_TB = model.zero_state(1), prompt_N[:, None]
    for _ in range(count):
        logits_V: Tensor = model.head_bias
        if len(ids_TB):
            x_TBE, state = model(ids_TB, state, model.mean_masks())
            logits_V = model.logits(x_TBE[-1, 0])
        p_V = probabilities(logits_V, temperature, top_k)
        if not bool(p_V.isfinite().all()):
            raise ValueError("the probabilities of the next word are not finite")
        ids_TB = torch.multinomial(p_V, 1, generator=generator)[None]
        yield int(ids_TB)


def probabilities(logits_V: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """Returns the softmax of `logits_V / temperature` over the `top_k` most probable words, 0 elsewhere.

    If several words share the last of these places, the number of words is still `top_k`.
    """
    if top_k is not None and top_k < len(logits_V):
        top_K, words_K = logits_V.topk(top_k)
        logits_V = torch.full_like(logits_V, float("-inf")).scatter(0, words_K, top_K)
    # The largest logit is subtracted first: a tiny temperature must not overflow.
    return torch.softmax((logits_V - logits_V.max()) / temperature, 0)
