"""HKUST-KnowComp/R-Net: finds the answer to a question in a passage; GRU both ways, then a pointer network.

R-Net drops the inputs of its layers, of attention and of the pointer, never the recurrence. Here inputs and
recurrence of the GRUs have masks, different ones for each direction, and attention has none. One draw of
masks serves passage and question. Like cuDNN's GRU, which R-Net uses, the layers have `reset_after=True`;
the pointer of R-Net is another cell, with the reset gate before the product, as here.

B batch  T time  Q time of the question  H hidden size  J size of the joined states
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vdrop_cli.cells import GRUCell
from vdrop_cli.layers import GRU, Dropout, ModelMasks

KEYS = 10
WORDS = 20
STRETCHES = 4
LENGTH = 4
SIZE = 24
ERROR = 0.1
P_X = 0.3
P_H = 0.3
STOP, STATES = WORDS - 1, 3 * 2 * SIZE


def sample(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Passages [B, T], questions [B, Q], marked answers and right answers (start, end), each [B, 2].

    A passage consists of stretches: a key, other words, STOP, other words. A question has one of the keys in
    it. Its answer is the part of the passage from this key to STOP. One answer in ten is marked at random
    places.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, (count, *shape), generator=generator)

    keys_BS = torch.rand(count, KEYS, generator=generator).argsort(1)[:, :STRETCHES]
    stop_BS, asked_B1 = draw(LENGTH, STRETCHES, low=1), draw(STRETCHES, 1)
    passage_BSL = draw(STOP, STRETCHES, LENGTH, low=KEYS).scatter(2, stop_BS[..., None], STOP)
    passage_BSL[:, :, 0] = keys_BS
    question_BQ = draw(STOP, 3, low=KEYS).scatter(1, draw(3, 1), keys_BS.gather(1, asked_B1))
    right_B2 = LENGTH * asked_B1 + torch.cat([torch.zeros_like(asked_B1), stop_BS.gather(1, asked_B1)], 1)
    error_B1 = torch.rand(count, 1, generator=generator) < ERROR
    marked_B2 = torch.where(error_B1, draw(STRETCHES * LENGTH, 2), right_B2)
    return passage_BSL.flatten(1), question_BQ, marked_B2, right_B2


class Reader(nn.Module):
    def __init__(self, p_x: float, p_h: float) -> None:
        super().__init__()
        dropout = Dropout("variational", p_x=p_x, p_h=p_h)
        self.embedding = nn.Embedding(WORDS, SIZE)
        layers = {"batch_first": True, "bidirectional": True, "dropout": dropout, "reset_after": True}
        self.encoder = GRU(SIZE, SIZE, 3, **layers)
        self.matching = GRU(3 * STATES, SIZE, **layers)
        self.match, self.pool = nn.Linear(STATES, STATES), nn.Linear(STATES, 1)
        self.first, self.pointer = nn.Linear(STATES, SIZE), GRUCell(2 * SIZE, SIZE, dropout=dropout)
        self.keys, self.query = nn.Linear(2 * SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.score = nn.Linear(SIZE, 1)

    def encode(self, ids_BT: Tensor, masks: ModelMasks | None) -> Tensor:
        """The states of all layers and directions, joined, [B, T, J]."""
        _, _, states = self.encoder(self.embedding(ids_BT), masks=masks, return_states=True)
        return torch.cat([h_BTH for (h_BTH,) in states], -1)

    def forward(self, passage_BT: Tensor, question_BQ: Tensor) -> Tensor:
        """Logits of start and end, [B, T, 2]."""
        batch, time = passage_BT.shape
        masks = self.encoder.masks(time, batch)
        passage_BTJ, question_BQJ = self.encode(passage_BT, masks), self.encode(question_BQ, masks)
        weight_BTQ = (self.match(passage_BTJ) @ question_BQJ.mT / STATES**0.5).softmax(-1)
        attended_BTJ = weight_BTQ @ question_BQJ
        y_BTH, _ = self.matching(torch.cat([passage_BTJ, attended_BTJ, passage_BTJ * attended_BTJ], -1))
        h_BH = self.first((self.pool(question_BQJ).softmax(1) * question_BQJ).sum(1))
        start_BT1 = self.point(y_BTH, h_BH)
        h_BH = self.pointer((start_BT1.softmax(1) * y_BTH).sum(1), h_BH, masks=self.pointer.masks(batch))
        return torch.cat([start_BT1, self.point(y_BTH, h_BH)], -1)

    def point(self, y_BTH: Tensor, h_BH: Tensor) -> Tensor:
        """Logits of the place that the pointer chooses, [B, T, 1]."""
        return self.score((self.keys(y_BTH) + self.query(h_BH)[:, None]).tanh())


def trained(p_x: float, p_h: float, steps: int) -> Reader:
    torch.manual_seed(0)
    model, (passage_BT, question_BQ, marked_B2, _) = Reader(p_x, p_h), sample(256, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(steps):
        rows = slice(step % 8 * 32, step % 8 * 32 + 32)
        optimizer.zero_grad()
        F.cross_entropy(model(passage_BT[rows], question_BQ[rows]), marked_B2[rows]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def main(steps: int = 90) -> dict[str, float]:
    """The share of new answers that do not match exactly; the floor is that of wrong marks."""
    passage_BT, question_BQ, marked_B2, right_B2 = sample(500, seed=2)
    with torch.enable_grad():
        models = {"none": trained(0.0, 0.0, steps), "variational": trained(P_X, P_H, steps)}
    predictions = {name: model(passage_BT, question_BQ).argmax(1) for name, model in models.items()}
    answers = {"floor": right_B2} | predictions
    return {
        name: float((answer_B2 != marked_B2).any(1).float().mean()) for name, answer_B2 in answers.items()
    }


if __name__ == "__main__":
    for name, figure in main().items():
        print(f"{name:<12}{figure:8.3f}")
