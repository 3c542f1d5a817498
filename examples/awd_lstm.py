"""AWD-LSTM: dropped recurrent weights, masks held over the sequence, words dropped by type.

The original code patches torch's LSTM from inside. Here `WeightDrop` is a parametrization, which torch itself
offers, and every part that drops is an `nn.Dropout`, so `mc_dropout` turns it on. The original code drops the
same words in all sequences of a minibatch; here each sequence drops words of its own. Text and training are
those of `language_model.py`, with more steps.

T time  B batch  V words  D size of a vector
"""

import math

import torch
from torch import Tensor, nn

from language_model import CHAIN_VV, SIZE, WORDS, loss, sample, trained
from vdrop_cli.layers import LSTM, Dropout
from vdrop_cli.modules import LockedDropout, WeightDrop, WordDropout

P = 0.3
P_WEIGHT = 0.5
P_WORD = 0.1


class AWD(nn.Module):
    """`layers` has one more held mask, between its two layers; the head's weight is that of the embedding."""

    def __init__(self, p: float, p_weight: float, p_word: float) -> None:
        super().__init__()
        self.embedding, self.words = nn.Embedding(WORDS, SIZE), WordDropout(p_word, by="type")
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.dropout_in, self.dropout_out = LockedDropout(p), LockedDropout(p)
        self.layers = WeightDrop(LSTM(SIZE, SIZE, 2, dropout=Dropout("variational", p_x=(0.0, p))), p_weight)
        self.bias_V = nn.Parameter(torch.zeros(WORDS))

    def forward(
        self, ids_TB: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x_TBD = self.dropout_in(self.words(self.embedding(ids_TB), ids_TB))
        y_TBD, state = self.layers(x_TBD, state)
        return nn.functional.linear(self.dropout_out(y_TBD), self.embedding.weight, self.bias_V).log_softmax(
            -1
        ), state


def main(steps: int = 240) -> dict[str, float]:
    """Perplexities of new text; the floor is that of the Markov chain which made the text."""
    text_TB = sample(201, 20, seed=2)
    ids_TB, next_TB = text_TB[:-1], text_TB[1:]
    models = {
        "none": trained(lambda: AWD(0.0, 0.0, 0.0), steps),
        "awd": trained(lambda: AWD(P, P_WEIGHT, P_WORD), steps),
    }
    with torch.no_grad():
        predictions = {"floor": CHAIN_VV.log()[ids_TB]} | {
            name: model(ids_TB)[0] for name, model in models.items()
        }
    return {name: math.exp(loss(log_p_TBV, next_TB)) for name, log_p_TBV in predictions.items()}


if __name__ == "__main__":
    for name, figure in main().items():
        print(f"{name:<12}{figure:8.2f}")
