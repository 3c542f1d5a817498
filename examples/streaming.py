"""magahub/songrnn: two layers of GRU with CTC, which write down a song while they hear it.

songrnn tried dropout on outputs only, with one mask for a minibatch, and rejected it. Here each stream has
masks of its own, on the inputs of both layers, the recurrence and the output. They are held over all
windows of the stream, as the state is carried: windows of any size give what the whole song gives.

T time  B batch  D features  N notes of a song  V notes, with CTC's blank
"""

import torch
from torch import Tensor, nn

from vdrop_cli.layers import GRU

PITCHES = 6
FEATURES = 8
NOTES = 10
FRAMES = 4
SIZE = 48
WINDOW = 20
HISS = 0.6
SLIP = 0.1
P = 0.2


def sample(songs: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sound [T, B, D], notes as written and as sung [B, N]. One of ten is sung wrong; each ends in a rest."""
    sound_VD = torch.randn(PITCHES + 1, FEATURES, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    written_BN, other_BN = torch.randint(1, PITCHES + 1, (2, songs, NOTES), generator=generator)
    sung_BN = torch.where(torch.rand(songs, NOTES, generator=generator) < SLIP, other_BN, written_BN)
    frame_BNF = torch.arange(FRAMES) < torch.randint(1, FRAMES, (songs, NOTES, 1), generator=generator)
    x_TBD = sound_VD[(sung_BN[:, :, None] * frame_BNF).flatten(1).T]
    return x_TBD + HISS * torch.randn(x_TBD.shape, generator=generator), written_BN, sung_BN


class Listener(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.layers, self.head = GRU(FEATURES, SIZE, 2, variational=p), nn.Linear(SIZE, PITCHES + 1)

    def forward(self, x_TBD: Tensor, window: int = WINDOW) -> Tensor:
        """Log probabilities [T, B, V], window by window."""
        masks = self.layers.masks(window, x_TBD.shape[1])
        h_LBH, y_TBH = None, []
        for part_TBD in x_TBD.split(window):
            part_TBH, h_LBH = self.layers(part_TBD, h_LBH, masks=masks)
            y_TBH.append(part_TBH)
        return self.head(torch.cat(y_TBH)).log_softmax(-1)


def edits(prediction: list[int], notes: list[int]) -> int:
    """The least number of notes to be put in, taken out or changed."""
    row = list(range(len(notes) + 1))
    for i, one in enumerate(prediction, 1):
        before, row[0] = row[:], i
        for j, other in enumerate(notes, 1):
            row[j] = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (one != other))
    return row[-1]


def decoded(log_p_TBV: Tensor) -> list[list[int]]:
    """The notes of each stream: its most probable path, without repetitions and blanks."""
    paths = log_p_TBV.argmax(-1).T
    return [[note for note in path.unique_consecutive().tolist() if note > 0] for path in paths]


def trained(p: float, steps: int) -> Listener:
    torch.manual_seed(0)
    model, (x_TBD, written_BN, _) = Listener(p), sample(48, seed=1)
    time, optimizer = [len(x_TBD)] * 16, torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        rows = slice(step % 3 * 16, step % 3 * 16 + 16)
        optimizer.zero_grad()
        log_p_TBV = model(x_TBD[:, rows])
        nn.functional.ctc_loss(log_p_TBV, written_BN[rows], time, [NOTES] * 16).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def main(steps: int = 150) -> dict[str, float]:
    """Edits per note in new songs; the floor is that of the notes as sung against the notes as written."""
    x_TBD, written_BN, sung_BN = sample(200, seed=2)
    with torch.enable_grad():
        models = {"none": trained(0.0, steps), "variational": trained(P, steps)}
    predictions = {"floor": sung_BN.tolist()} | {
        name: decoded(model(x_TBD)) for name, model in models.items()
    }
    notes = written_BN.tolist()
    return {name: sum(map(edits, songs, notes)) / written_BN.numel() for name, songs in predictions.items()}


if __name__ == "__main__":
    for name, figure in main().items():
        print(f"{name:<12}{figure:8.3f}")
