"""Waino/hnmt: an LSTM encoder for translation, whose backward layer reads words and forward states.

In hnmt the encoder's mask stays on at test time, and the decoder's masks are never built. Here `eval()`
turns off all of them, and a cell in training refuses a step without masks. The backward layer is
`LSTM(reverse=True)`, which begins at each sentence's own last word; initial states are parameters.

T time  B batch  D size of a vector  H hidden size  V words
"""

import torch
from torch import Tensor, nn

from vdrop_cli.cells import LSTMCell
from vdrop_cli.layers import LSTM, Dropout
from vdrop_cli.modules import WordDropout

WORDS = 30
LONGEST = 7
SIZE = 48
NOISE = 0.1
P = 0.5
P_WORD = 0.1
LEXICON_V = torch.randperm(WORDS, generator=torch.Generator().manual_seed(0))


def sample(sentences: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sentences, their translations with noise and without, in reverse order, [T, B]; and lengths [B]."""
    generator = torch.Generator().manual_seed(seed)
    lengths_B = torch.randint(3, LONGEST + 1, (sentences,), generator=generator)
    source_TB = torch.randint(WORDS, (LONGEST, sentences), generator=generator)
    place_TB = (lengths_B - 1 - torch.arange(LONGEST)[:, None]).clamp(min=0)
    right_TB = LEXICON_V[source_TB.gather(0, place_TB)]
    other_TB = torch.randint(WORDS, right_TB.shape, generator=generator)
    noisy_TB = torch.where(torch.rand(right_TB.shape, generator=generator) < NOISE, other_TB, right_TB)
    return source_TB, noisy_TB, right_TB, lengths_B


class Translator(nn.Module):
    def __init__(self, p: float, p_word: float) -> None:
        super().__init__()
        dropout = Dropout("variational", p_h=p)
        self.embedding, self.words = nn.Embedding(WORDS, SIZE), WordDropout(p_word, by="token")
        self.forward_layer = LSTM(SIZE, SIZE, dropout=dropout)
        self.backward_layer = LSTM(2 * SIZE, SIZE, dropout=dropout, reverse=True)
        self.target, self.decoder = nn.Embedding(WORDS + 1, SIZE), LSTMCell(2 * SIZE, SIZE, dropout=dropout)
        self.start = nn.Parameter(torch.zeros(3, 2, 1, SIZE))  # h and c of both layers and the decoder
        self.keys, self.query = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.coverage, self.score = nn.Linear(1, SIZE), nn.Linear(SIZE, 1)
        self.head = nn.Linear(2 * SIZE, WORDS)

    def encode(self, source_TB: Tensor, lengths_B: Tensor) -> Tensor:
        """The states of both layers, added up, [T, B, H]."""
        start = self.start.expand(-1, -1, source_TB.shape[1], -1)
        x_TBD = self.words(self.embedding(source_TB), source_TB)
        y_TBH, _ = self.forward_layer(x_TBD, tuple(start[0][:, None]), lengths=lengths_B)
        z_TBH, _ = self.backward_layer(
            torch.cat([x_TBD, y_TBH], -1), tuple(start[1][:, None]), lengths=lengths_B
        )
        return y_TBH + z_TBH

    def forward(self, source_TB: Tensor, target_TB: Tensor, lengths_B: Tensor) -> Tensor:
        """Log probabilities [T, B, V] of each word of a translation, after those before it."""
        time, batch = source_TB.shape
        states_TBH = self.encode(source_TB, lengths_B)
        keys_TBH, padding_TB = self.keys(states_TBH), torch.arange(time)[:, None] >= lengths_B
        before_TBD = self.target(torch.cat([torch.full((1, batch), WORDS), target_TB[:-1]]))
        state, masks = tuple(self.start[2].expand(-1, batch, -1)), self.decoder.masks(batch)
        coverage_TB, outputs = torch.zeros(time, batch), []
        for before_BD in before_TBD:
            query_TBH = self.query(state[0]) + self.coverage(coverage_TB[..., None])
            score_TB = self.score((keys_TBH + query_TBH).tanh())[..., 0]
            weight_TB = score_TB.masked_fill(padding_TB, -torch.inf).softmax(0)
            coverage_TB = coverage_TB + weight_TB
            context_BH = (weight_TB[..., None] * states_TBH).sum(0)
            state = self.decoder(torch.cat([before_BD, context_BH], -1), state, masks=masks)
            outputs.append(torch.cat([state[0], context_BH], -1))
        return self.head(torch.stack(outputs)).log_softmax(-1)


def loss(log_p_TBV: Tensor, target_TB: Tensor, lengths_B: Tensor) -> Tensor:
    """Nats a word, without padding."""
    word_TB = torch.arange(LONGEST)[:, None] < lengths_B
    return nn.functional.nll_loss(log_p_TBV[word_TB], target_TB[word_TB])


def trained(p: float, p_word: float, steps: int) -> Translator:
    torch.manual_seed(0)
    model, (source_TB, target_TB, _, lengths_B) = Translator(p, p_word), sample(640, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(steps):
        rows = slice(step % 20 * 32, step % 20 * 32 + 32)
        batch = source_TB[:, rows], target_TB[:, rows], lengths_B[rows]
        optimizer.zero_grad()
        loss(model(*batch), *batch[1:]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def main(steps: int = 240) -> dict[str, float]:
    """Nats a word of new translations; the floor is that of the noise in them."""
    source_TB, target_TB, right_TB, lengths_B = sample(500, seed=2)
    with torch.enable_grad():
        models = {"none": trained(0.0, 0.0, steps), "variational": trained(P, P_WORD, steps)}
    right_TBV = nn.functional.one_hot(right_TB, WORDS)
    predictions = {"floor": ((1 - NOISE) * right_TBV + NOISE / WORDS).log()}
    predictions |= {name: model(source_TB, target_TB, lengths_B) for name, model in models.items()}
    return {name: float(loss(log_p_TBV, target_TB, lengths_B)) for name, log_p_TBV in predictions.items()}


if __name__ == "__main__":
    for name, figure in main().items():
        print(f"{name:<12}{figure:8.3f}")
