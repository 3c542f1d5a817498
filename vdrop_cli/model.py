"""The language model: embedding, stacked layers, a linear head over the vocabulary.

T time  B batch  H hidden size  V vocabulary  L layers
"""

from typing import Any

import torch
from torch import Tensor, nn

from vdrop_cli import kernels
from vdrop_cli.config import Cell, Dropout, Model
from vdrop_cli.dropout import ModelMasks, Stream, draw
from vdrop_cli.layers import GRU, LSTM, Recurrent, State


class LanguageModel(nn.Module):
    """Predicts the next word; the embedding has the size of the hidden layers (Zaremba et al. 2014)."""

    def __init__(
        self, model: Model, dropout: Dropout, vocabulary_size: int, backend: str = "auto", compute_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        hidden = model.hidden_size
        options: dict[str, Any] = {"num_layers": model.layers, "dropout": dropout, "backend": backend, "compute_dtype": compute_dtype}
        self.embedding = nn.Parameter(torch.empty(vocabulary_size, hidden))
        self.layers: Recurrent = (
            LSTM(hidden, hidden, **options) if model.cell is Cell.lstm else GRU(hidden, hidden, reset_after=model.reset_after, **options)
        )
        self.head_weight = nn.Parameter(torch.empty(vocabulary_size, hidden))
        self.head_bias = nn.Parameter(torch.empty(vocabulary_size))

    @torch.no_grad()
    def initialise(self, init: float, stream: Stream) -> None:
        """Every parameter, biases too, uniform in [-init, init]."""
        generator = stream.generator()
        for parameter in self.parameters():
            parameter.copy_(torch.empty(parameter.shape).uniform_(-init, init, generator=generator))

    def zero_state(self, batch: int) -> State:
        return self.layers.zero_state(batch)

    def masks(self, time: int, batch: int, stream: Stream) -> ModelMasks:
        """New masks for `time` steps of `batch` sequences, as a function of the stream."""
        return draw(self.layers.dropout, self.layers.mask_shape(time, batch), stream, self.embedding.device)

    def forward(self, ids_TB: Tensor, state: State, masks: ModelMasks) -> tuple[Tensor, State]:
        """The masked output of the last layer [T, B, H], and the state to go on from."""
        x_TBH = nn.functional.embedding(ids_TB, self.embedding)
        if masks.word is not None:
            x_TBH = x_TBH * masks.word.keep(ids_TB)[..., None].to(x_TBH.dtype)
        y_TBH, last = self.layers(x_TBH, state, masks=masks)
        return y_TBH, last if isinstance(last, tuple) else (last,)

    def nll(self, ids_TB: Tensor, targets_TB: Tensor, state: State, masks: ModelMasks) -> tuple[Tensor, State]:
        """Negative log-likelihood of each target in nats, [T, B], and the state to go on from."""
        y_TBH, state = self(ids_TB, state, masks)
        nll_N = kernels.linear_cross_entropy(
            y_TBH.flatten(0, 1),
            self.head_weight,
            self.head_bias,
            targets_TB.flatten(),
            backend=self.layers.backend,
            compute_dtype=self.layers.compute_dtype,
        )
        return nll_N.view_as(targets_TB), state

    def no_masks(self) -> ModelMasks:
        """Evaluation by the standard approximation: every mask is replaced by its mean, one."""
        return ModelMasks([kernels.Masks()] * self.layers.num_layers)
