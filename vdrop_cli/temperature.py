"""The temperature of the softmax at which a text is the most probable.

T time  N predicted tokens  V vocabulary
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from vdrop_cli import interruption
from vdrop_cli.model import LanguageModel
from vdrop_cli.perplexity import perplexity, segments

LOGIT_STEPS = 500  # time steps whose logits [T, V] are in memory at once
TOLERANCE = 1e-4  # relative
MAX_ITERATIONS = 50  # it takes about five
LIMIT = 4.0  # a best temperature above LIMIT or below 1 / LIMIT: the model does not suit the text


class NoTemperature(ValueError):
    """No temperature between 1 / LIMIT and LIMIT is the best."""


def logits_and_targets(model: LanguageModel, stream_N: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the logits [T, V] and the next words [T] of successive segments: batch 1, state carried."""
    state = model.zero_state(1)
    for _, ids_T, targets_T in segments(stream_N, LOGIT_STEPS):
        interruption.check()
        x_TBE, state = model(ids_T[:, None], state, model.mean_masks())
        yield model.logits(x_TBE[:, 0]), targets_T


@torch.no_grad()
def best_temperature(model: LanguageModel, stream_N: Tensor) -> float:
    """Returns the temperature with the lowest perplexity, to four digits.

    The loss is convex in the inverse temperature b, with the slope E[z] - z of the target and the curvature
    Var[z] under softmax(b·z), so that Newton's method finds the minimum. Raises NoTemperature.
    """
    inverse = 1.0
    for _ in range(MAX_ITERATIONS):
        slope = curvature = 0.0
        for logits_TV, targets_T in logits_and_targets(model, stream_N):
            p_TV = torch.softmax(inverse * logits_TV, -1)
            mean_T = (p_TV * logits_TV).sum(-1)
            variance_T = (p_TV * (logits_TV - mean_T[:, None]) ** 2).sum(-1)
            target_T = logits_TV.gather(-1, targets_T[:, None])[:, 0]
            slope += (mean_T - target_T).double().sum().item()
            curvature += variance_T.double().sum().item()
        # the inverse changes by a factor of 2 at most: far from the minimum, the curvature may differ
        step = -slope / curvature if curvature > 0 else math.inf
        change = min(max(step, -inverse / 2), inverse)
        inverse += change
        if not 1 / LIMIT <= inverse <= LIMIT:
            break
        if abs(change) <= TOLERANCE * inverse:
            return 1 / inverse
    raise NoTemperature(f"the best temperature is not between {1 / LIMIT} and {LIMIT}")


@torch.no_grad()
def tempered_perplexity(model: LanguageModel, stream_N: Tensor, temperature: float) -> float:
    """Returns the perplexity of a text by softmax(z / temperature)."""
    losses = [
        torch.nn.functional.cross_entropy(logits_TV / temperature, targets_T, reduction="none")
        for logits_TV, targets_T in logits_and_targets(model, stream_N)
    ]
    return perplexity(torch.cat(losses))
