"""yaringal/BayesianRNN, sentiment: one layer of LSTM, whose last state gives the rating; MC dropout.

The original code has one word mask for the minibatch. Here each text has masks of its own. With `lengths`,
the last state is the state after the last word of a text, whatever other texts are in the batch.

B batch  T time  D size of a vector  H hidden size
"""

import torch
from torch import Tensor, nn

from vdrop_cli.layers import LSTM, Dropout
from vdrop_cli.modules import WordDropout
from vdrop_cli.sampling import predict_mc

WORDS = 60
SIZE = 64
LONGEST = 20
NOISE = 0.5
P, P_WORD = 0.4, 0.1


def sample(texts: int, seed: int) -> tuple[Tensor, Tensor]:
    """Texts [B, T], 0 for padding, and ratings [B]: the sum of the words' values over the square root of the
    length, plus noise.
    """
    worth_V = torch.randn(WORDS, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    lengths_B1 = torch.randint(5, LONGEST + 1, (texts, 1), generator=generator)
    ids_BT = torch.randint(1, WORDS, (texts, LONGEST), generator=generator) * (
        torch.arange(LONGEST) < lengths_B1
    )
    worth_BT = worth_V[ids_BT] * (ids_BT > 0)
    clean_B = worth_BT.sum(1) / lengths_B1[:, 0].sqrt()
    return ids_BT, clean_B + NOISE * torch.randn(texts, generator=generator)


class Rater(nn.Module):
    def __init__(self, p: float, p_word: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, SIZE)
        self.words = WordDropout(p_word, by="type", batch_first=True)
        self.layer = LSTM(
            SIZE, SIZE, batch_first=True, dropout=Dropout("variational", tie="none", p_x=p, p_h=p)
        )
        self.dropout, self.head = nn.Dropout(p), nn.Linear(SIZE, 1)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Ratings [B]."""
        x_BTD = self.words(self.embedding(ids_BT), ids_BT)
        _, (h_1BH, _) = self.layer(x_BTD, lengths=(ids_BT > 0).sum(1))
        return self.head(self.dropout(h_1BH[0]))[:, 0]


def trained(p: float, p_word: float, steps: int) -> Rater:
    torch.manual_seed(0)
    model, (ids_BT, rating_B) = Rater(p, p_word), sample(640, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(steps):
        rows = slice(step % 20 * 32, step % 20 * 32 + 32)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(ids_BT[rows]), rating_B[rows]).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def main(steps: int = 240) -> dict[str, float]:
    """Errors (root mean square) on new texts; the floor is the noise of the ratings."""
    ids_BT, rating_B = sample(500, seed=2)
    with torch.enable_grad():
        none, variational = trained(0.0, 0.0, steps), trained(P, P_WORD, steps)
    predictions = {"none": none(ids_BT), "variational": variational(ids_BT)}
    predictions["mc"] = predict_mc(variational, ids_BT, samples=30, batch=3, dim=0).mean
    return {"floor": NOISE} | {
        name: float((y_B - rating_B).square().mean().sqrt()) for name, y_B in predictions.items()
    }


if __name__ == "__main__":
    for name, figure in main().items():
        print(f"{name:<12}{figure:8.3f}")
