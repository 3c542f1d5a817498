"""yaringal/BayesianRNN, language model: two layers of LSTM, a mask for each gate, word dropout, MC dropout.

Its code dropped each occurrence of a word by itself until January 2017. `WordDropout(by="type")` drops a
word wherever it stands in its window, as the paper says, and without a table of all words. As in its code, MC
dropout samples the masks of the layers and drops no words.

T time  B batch  V words  S passes  D size of a vector  H hidden size
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vdrop_cli.layers import LSTM, Dropout
from vdrop_cli.modules import WordDropout
from vdrop_cli.sampling import mc_dropout

WORDS = 40
SIZE = 64
TIME = 25
BATCH = 16
P, P_WORD = 0.4, 0.1
CHAIN_VV = (2 * torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(0))).softmax(1)


def sample(time: int, batch: int, seed: int) -> Tensor:
    """Text [T, B] of a Markov chain."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(WORDS, (batch,), generator=generator)]
    while len(ids) < time:
        ids.append(torch.multinomial(CHAIN_VV[ids[-1]], 1, generator=generator)[:, 0])
    return torch.stack(ids)


class LanguageModel(nn.Module):
    def __init__(self, p: float, p_word: float) -> None:
        super().__init__()
        self.embedding, self.words = nn.Embedding(WORDS, SIZE), WordDropout(p_word, by="type")
        self.layers = LSTM(SIZE, SIZE, 2, dropout=Dropout("variational", tie="none", p_x=p, p_h=p, p_out=p))
        self.head = nn.Linear(SIZE, WORDS)

    def forward(
        self, ids_TB: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Log probabilities [T, B, V] of what comes next, and the state after the window."""
        y_TBH, state = self.layers(self.words(self.embedding(ids_TB), ids_TB), state)
        return self.head(y_TBH).log_softmax(-1), state


def loss(log_p_TBV: Tensor, next_TB: Tensor) -> Tensor:
    return nn.functional.nll_loss(log_p_TBV.flatten(0, 1), next_TB.flatten())


def trained(build: Callable[[], nn.Module], steps: int) -> nn.Module:
    """A model that has read windows of one text, with the state carried from each to the next."""
    torch.manual_seed(0)
    model, text_TB = build(), sample(4 * TIME + 1, BATCH, seed=1)
    optimizer, state = torch.optim.Adam(model.parameters(), lr=5e-3), None
    for step in range(steps):
        start = step % 4 * TIME
        state = None if start == 0 else tuple(part.detach() for part in state)
        log_p_TBV, state = model(text_TB[start : start + TIME], state)
        optimizer.zero_grad()
        loss(log_p_TBV, text_TB[start + 1 : start + TIME + 1]).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def main(steps: int = 160, samples: int = 20) -> dict[str, float]:
    """Perplexities of new text; the floor is that of the Markov chain which made the text."""
    text_TB = sample(201, 20, seed=2)
    ids_TB, next_TB = text_TB[:-1], text_TB[1:]
    with torch.enable_grad():
        none = trained(lambda: LanguageModel(0.0, 0.0), steps)
        variational = trained(lambda: LanguageModel(P, P_WORD), steps)
    with mc_dropout(variational.layers):
        passes_STBV = torch.stack([variational(ids_TB)[0] for _ in range(samples)])
    predictions = {
        "floor": CHAIN_VV.log()[ids_TB],
        "none": none(ids_TB)[0],
        "variational": variational(ids_TB)[0],
        "mc": passes_STBV.logsumexp(0) - math.log(samples),
    }
    return {name: math.exp(loss(log_p_TBV, next_TB)) for name, log_p_TBV in predictions.items()}


if __name__ == "__main__":
    for name, figure in main().items():
        print(f"{name:<12}{figure:8.2f}")
