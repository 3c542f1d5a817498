"""zhangyaoyuan/GAN-Simplification: a Transformer that simplifies sentences.

Its README repeats the list of features of Nematus, but its code has none of those masks. Here torch's own
Transformer marks the words that a simpler sentence would leave out. In evaluation mode torch's fast path
skips dropout. `predict_mc` turns on the dropout of attention and layers all the same, and restores the mode
of every module.

B batch  T time  D size of a vector
"""

import torch
from torch import Tensor, nn

from vdrop_cli.sampling import predict_mc

WORDS = 60
TIME = 16
SIZE = 32
NOISE = 0.1
P = 0.4


def sample(sentences: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sentences, marks with noise, right marks, [B, T]: 1 where a word weighs more than the mean of all."""
    weight_V = torch.randn(WORDS, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(WORDS, (sentences, TIME), generator=generator)
    right_BT = weight_V[ids_BT] > weight_V[ids_BT].mean(1, keepdim=True)
    wrong_BT = torch.rand(sentences, TIME, generator=generator) < NOISE
    return ids_BT, (right_BT ^ wrong_BT).float(), right_BT.float()


class Marker(nn.Module):
    """The probability of each word's mark."""

    def __init__(self, p: float) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(SIZE, 4, 2 * SIZE, p, batch_first=True)
        self.embedding, self.dropout = nn.Embedding(WORDS, SIZE), nn.Dropout(p)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(SIZE, 1)

    def forward(self, ids_BT: Tensor) -> Tensor:
        y_BTD = self.layers(self.dropout(self.embedding(ids_BT)))
        return self.head(y_BTD).squeeze(-1).sigmoid()


def trained(p: float, steps: int) -> Marker:
    torch.manual_seed(0)
    model, (ids_BT, marks_BT, _) = Marker(p), sample(80, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(steps):
        rows = slice(step % 5 * 16, step % 5 * 16 + 16)
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy(model(ids_BT[rows]), marks_BT[rows]).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def main(steps: int = 250) -> dict[str, float]:
    """Nats a mark; the floor is the entropy of the noise."""
    ids_BT, marks_BT, right_BT = sample(500, seed=2)

    def loss(probability_BT: Tensor) -> float:
        return float(nn.functional.binary_cross_entropy(probability_BT, marks_BT))

    with torch.enable_grad():
        none, dropout = trained(0.0, steps), trained(P, steps)
    floor = loss(NOISE + (1 - 2 * NOISE) * right_BT)
    mean_BT, _, _ = predict_mc(dropout, ids_BT, samples=20)
    return {"floor": floor, "none": loss(none(ids_BT)), "dropout": loss(dropout(ids_BT)), "mc": loss(mean_BT)}


if __name__ == "__main__":
    for name, figure in main().items():
        print(f"{name:<10}{figure:8.3f}")
