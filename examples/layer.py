"""josephdviviano/lstm-variational-dropout: stacked LSTM, batch first, one mask for all gates.

The original layer is a loop over LSTMCell. It starts from zeros and takes no lengths. Here `LSTM` takes a
start state, which depends on the dialect of a sentence, and the lengths of the sentences, so it never reads
padding.

B batch  T time  V words  L layers  H hidden size  K dialects
"""

import torch
from torch import Tensor, nn

from vdrop_cli.layers import LSTM, Dropout

WORDS = 20
DIALECTS = 3
SIZE = 64
LAYERS = 2
LONGEST = 20
P = 0.3
CHAIN_KVV = (2 * torch.randn(DIALECTS, WORDS, WORDS, generator=torch.Generator().manual_seed(0))).softmax(2)


def sample(sentences: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Words [B, T + 1] of Markov chains, one for each dialect; dialects and numbers of steps, [B]."""
    generator = torch.Generator().manual_seed(seed)
    dialect_B = torch.randint(DIALECTS, (sentences,), generator=generator)
    lengths_B = torch.randint(5, LONGEST + 1, (sentences,), generator=generator)
    ids = [torch.randint(WORDS, (sentences,), generator=generator)]
    for _ in range(LONGEST):
        ids.append(torch.multinomial(CHAIN_KVV[dialect_B, ids[-1]], 1, generator=generator)[:, 0])
    return torch.stack(ids, 1), dialect_B, lengths_B


class Reader(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, SIZE)
        self.start = nn.Parameter(0.1 * torch.randn(2, LAYERS, DIALECTS, SIZE))  # h and c
        dropout = Dropout("variational", p_x=p, p_h=p)
        self.layers = LSTM(SIZE, SIZE, LAYERS, batch_first=True, dropout=dropout)
        self.head = nn.Linear(SIZE, WORDS)

    def forward(self, ids_BT: Tensor, dialect_B: Tensor, lengths_B: Tensor) -> Tensor:
        """Log probabilities [B, T, V] of what comes next."""
        h_LBH, c_LBH = self.start[:, :, dialect_B]
        y_BTH, _ = self.layers(self.embedding(ids_BT), (h_LBH, c_LBH), lengths=lengths_B)
        return self.head(y_BTH).log_softmax(-1)


def loss(log_p_BTV: Tensor, ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
    """Nats a word, without padding."""
    word_BT = torch.arange(LONGEST) < lengths_B[:, None]
    return nn.functional.nll_loss(log_p_BTV[word_BT], ids_BT[:, 1:][word_BT])


def trained(p: float, steps: int) -> Reader:
    torch.manual_seed(0)
    model, data = Reader(p), sample(192, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(steps):
        ids_BT, dialect_B, lengths_B = (part.chunk(6)[step % 6] for part in data)
        optimizer.zero_grad()
        loss(model(ids_BT[:, :-1], dialect_B, lengths_B), ids_BT, lengths_B).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def main(steps: int = 150) -> dict[str, float]:
    """Nats a word of new sentences; the floor is that of the chains themselves."""
    ids_BT, dialect_B, lengths_B = sample(400, seed=2)
    with torch.enable_grad():
        none, variational = trained(0.0, steps), trained(P, steps)
    predictions = {"floor": CHAIN_KVV.log()[dialect_B[:, None], ids_BT[:, :-1]]}
    for name, model in (("none", none), ("variational", variational)):
        predictions[name] = model(ids_BT[:, :-1], dialect_B, lengths_B)
    return {name: float(loss(log_p_BTV, ids_BT, lengths_B)) for name, log_p_BTV in predictions.items()}


if __name__ == "__main__":
    for name, figure in main().items():
        print(f"{name:<12}{figure:8.3f}")
