"""bhaddow/dev-nematus and samihadouaj/siyanWork: translation by GRU, with attention and beam search.

The encoder reads both ways. A step of the decoder is a GRU cell, attention, a second cell that reads its
result, and a third without an input (a deep transition). With `tie="gates"` the sigmoid gates share a
mask and the proposal has its own; attention and readout have masks, too.

dev-nematus searches without masks only, and siyanWork's recipe leaves dropout switched off. Here one step
serves training and search, with masks where they are needed, as for MC dropout. Masks belong to sentences:
they are repeated for the beam, and stay in their rows when hypotheses are reordered.

T time of the source  U time of the translation  B batch  N hypotheses  S passes  V words
D size of a vector  H hidden size  J both directions
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vdrop_cli.cells import GRUCell
from vdrop_cli.layers import GRU, Dropout, ModelMasks
from vdrop_cli.modules import LockedDropout
from vdrop_cli.sampling import mc_dropout

WORDS = 16
LONGEST = 5
SIZE = 64
NOISE = 0.1
P_X = 0.2
P_H = 0.3
END = 0  # stands before a translation, too
LEXICON_V = 1 + torch.randperm(WORDS - 1, generator=torch.Generator().manual_seed(0))


def sample(sentences: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sentences [T, B], lengths [B], translations with noise and without [U, B]: first word last."""
    generator = torch.Generator().manual_seed(seed)
    place_U1 = torch.arange(LONGEST + 1)[:, None]
    lengths_B = torch.randint(2, LONGEST + 1, (sentences,), generator=generator)
    source_UB, other_UB = torch.randint(1, WORDS, (2, LONGEST + 1, sentences), generator=generator)
    right_UB = LEXICON_V[source_UB.gather(0, (place_U1 + 1) % lengths_B) - 1]
    noisy_UB = torch.where(torch.rand(right_UB.shape, generator=generator) < NOISE, other_UB, right_UB)
    return (
        source_UB[:-1],
        lengths_B,
        *(part.where(place_U1 < lengths_B, END) for part in (noisy_UB, right_UB)),
    )


class Sentences(NamedTuple):
    """What the decoder has of each sentence at every step, masks included."""

    states_TBJ: Tensor
    keys_TBH: Tensor
    padding_TB: Tensor
    query_1BH: Tensor  # a mask, ones in evaluation mode
    readout_1BH: Tensor
    cells: list[ModelMasks]

    def repeat(self, n: int) -> "Sentences":
        *tensors, cells = self
        repeated = (part.repeat_interleave(n, 1) for part in tensors)
        return Sentences(*repeated, [masks.repeat(n) for masks in cells])


class Translator(nn.Module):
    def __init__(self, p_x: float, p_h: float) -> None:
        super().__init__()
        dropout, deep = (Dropout("variational", tie="gates", p_x=p, p_h=p_h) for p in (p_x, 0.0))
        self.embedding, self.target = nn.Embedding(WORDS, SIZE), nn.Embedding(WORDS, SIZE)
        self.encoder = GRU(SIZE, SIZE, bidirectional=True, dropout=dropout, reset_after=True)
        sizes = [(SIZE, dropout), (2 * SIZE, dropout), (1, deep)]  # the third has no input: it reads a zero
        self.cells = nn.ModuleList(
            GRUCell(size, SIZE, dropout=dropout, reset_after=True) for size, dropout in sizes
        )
        self.drop_states, self.drop_query, self.drop_readout = (LockedDropout(p_x) for _ in range(3))
        self.start, self.keys = nn.Linear(2 * SIZE, SIZE), nn.Linear(2 * SIZE, SIZE)
        self.query, self.score = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 1)
        self.readout, self.head = nn.Linear(4 * SIZE, SIZE), nn.Linear(SIZE, WORDS)

    def encode(self, source_TB: Tensor, lengths_B: Tensor) -> tuple[Sentences, Tensor]:
        """The sentences, with new masks in training mode, and the decoder's first state [B, H]."""
        states_TBJ, h_2BH = self.encoder(self.embedding(source_TB), lengths=lengths_B)
        padding_TB, batch = torch.arange(len(source_TB))[:, None] >= lengths_B, len(lengths_B)
        device = states_TBJ.device
        locked = (drop.masks(batch, SIZE, device) for drop in (self.drop_query, self.drop_readout))
        cells = [cell.masks(batch) for cell in self.cells]
        sentences = Sentences(states_TBJ, self.keys(self.drop_states(states_TBJ)), padding_TB, *locked, cells)
        return sentences, self.start(torch.cat([*h_2BH], -1)).tanh()

    def step(self, word_B: Tensor, h_BH: Tensor, sentences: Sentences) -> tuple[Tensor, Tensor]:
        """Log probabilities [B, V] of the word after `word_B`, and the new state."""
        y_BD, (first, second, deep) = self.target(word_B), sentences.cells
        h_BH = self.cells[0](y_BD, h_BH, masks=first)
        query_1BH = self.query(self.drop_query(h_BH[None], sentences.query_1BH))
        score_TB = self.score((sentences.keys_TBH + query_1BH).tanh())[..., 0]
        weight_TB = score_TB.masked_fill(sentences.padding_TB, -torch.inf).softmax(0)
        context_BJ = (weight_TB[..., None] * sentences.states_TBJ).sum(0)
        h_BH = self.cells[1](context_BJ, h_BH, masks=second)
        h_BH = self.cells[2](h_BH.new_zeros(len(h_BH), 1), h_BH, masks=deep)
        readout_BH = self.readout(torch.cat([h_BH, y_BD, context_BJ], -1)).tanh()
        return self.head(self.drop_readout(readout_BH[None], sentences.readout_1BH)[0]).log_softmax(-1), h_BH

    def forward(self, source_TB: Tensor, lengths_B: Tensor, target_UB: Tensor) -> Tensor:
        """Log probabilities [U, B, V] of each word of a translation, after those before it."""
        (sentences, h_BH), outputs = self.encode(source_TB, lengths_B), []
        for word_B in torch.cat([torch.full_like(target_UB[:1], END), target_UB[:-1]]):
            log_p_BV, h_BH = self.step(word_B, h_BH, sentences)
            outputs.append(log_p_BV)
        return torch.stack(outputs)

    def search(self, source_TB: Tensor, lengths_B: Tensor, n: int = 3, passes: int = 1) -> Tensor:
        """Translations [U, B], each the best of `n` hypotheses by the mean probability of `passes`."""
        batch = len(lengths_B)
        repeated = source_TB.repeat_interleave(passes, 1), lengths_B.repeat_interleave(passes)
        sentences, h_BH = self.encode(*repeated)
        sentences, h_BH = sentences.repeat(n), h_BH.repeat_interleave(n, 0)
        row_BS1 = n * torch.arange(batch * passes).view(batch, passes, 1)
        words_UBN, total_BN = torch.full((1, batch, n), END), torch.full((batch, n), -torch.inf)
        total_BN[:, 0] = 0.0  # all hypotheses are alike at first
        end_V = torch.full((WORDS,), -torch.inf).index_fill(0, torch.tensor(END), 0.0)
        for step in range(LONGEST + 1):
            word_BSN = words_UBN[-1][:, None].expand(-1, passes, -1)
            log_p_BV, h_BH = self.step(word_BSN.flatten(), h_BH, sentences)
            log_p_BNV = log_p_BV.view(batch, passes, n, WORDS).logsumexp(1) - math.log(passes)
            ended_BN1 = (words_UBN[-1] == END)[..., None] & (step > 0)
            total_BNV = total_BN[..., None] + torch.where(ended_BN1, end_V, log_p_BNV)
            total_BN, best_BN = total_BNV.flatten(1).topk(n)
            parent_BN, word_BN = best_BN // WORDS, best_BN % WORDS
            h_BH = h_BH[(row_BS1 + parent_BN[:, None]).flatten()]  # masks stay in their rows
            words_UBN = torch.cat([words_UBN.gather(2, parent_BN.expand(words_UBN.shape)), word_BN[None]])
        return words_UBN[1:, :, 0]


def trained(p_x: float, p_h: float, steps: int) -> Translator:
    torch.manual_seed(0)
    model, data = Translator(p_x, p_h), sample(640, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(steps):
        rows = slice(step % 20 * 32, step % 20 * 32 + 32)
        source_TB, lengths_B, target_UB, _ = (part[..., rows] for part in data)
        word_UB = torch.arange(LONGEST + 1)[:, None] <= lengths_B  # and the end
        optimizer.zero_grad()
        log_p_UBV = model(source_TB, lengths_B, target_UB)
        nn.functional.nll_loss(log_p_UBV[word_UB], target_UB[word_UB]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def main(steps: int = 560) -> dict[str, float]:
    """The share of words in new translations that beam search gets wrong; the floor is that of the noise."""
    *source, target_UB, right_UB = sample(300, seed=2)
    with torch.enable_grad():
        models = {"none": trained(0.0, 0.0, steps), "variational": trained(P_X, P_H, steps)}
    predictions = {"floor": right_UB} | {name: model.search(*source) for name, model in models.items()}
    with mc_dropout(models["variational"]) as model:
        predictions["mc"] = model.search(*source, passes=8)
    wrong = {
        name: (predicted_UB != target_UB)[target_UB != END] for name, predicted_UB in predictions.items()
    }
    return {name: float(wrong_W.float().mean()) for name, wrong_W in wrong.items()}


if __name__ == "__main__":
    for name, figure in main().items():
        print(f"{name:<12}{figure:8.3f}")
