"""The models: embedding, stacked layers, and a head over the vocabulary or with one number.

T time  B batch  E size of a word's vector  H hidden size  V vocabulary  L layers
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vdrop_cli import kernels
from vdrop_cli.dropout import MaskShape, ModelMasks, draw
from vdrop_cli.kernels.augmented import augmented_cross_entropy
from vdrop_cli.kernels.products import operand
from vdrop_cli.layers import GRU, LSTM, Recurrent, State
from vdrop_cli.policies import Cell, Dropout
from vdrop_cli.random_streams import Stream
from vdrop_cli.settings.train import Model


class Encoder(nn.Module):
    """Embedding, stacked layers and the weights of a head.

    The embedding has the size of the hidden layers (Zaremba et al. 2014), unless the settings have another.
    With `tie_embeddings` the word vectors are the weights of the head (Press & Wolf 2017). Where their size
    differs from that of the output, `head_projection [E, H]` projects the output before the head.
    """

    outputs: int | None = None  # number of last steps whose output the head reads; None: all
    head_rows: int | None = None  # numbers that the head computes; None: one for each word

    def __init__(
        self,
        model: Model,
        dropout: Dropout,
        vocabulary_size: int,
        backend: str = "auto",
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden, size = model.hidden_size, model.word_size
        rows = vocabulary_size if self.head_rows is None else self.head_rows
        self.dropout = dropout
        # masks on words and on the head's input are applied by this module, not by the layers
        layer_places = tuple(place for place in dropout.new_each_step if place != "p_head")
        in_layers = replace(dropout.without_words(), p_head=0.0, new_each_step=layer_places)
        options: dict[str, Any] = {
            "num_layers": model.layers,
            "residual": model.residual,
            "dropout": in_layers,
            "backend": backend,
            "compute_dtype": compute_dtype,
        }
        self.embedding = nn.Parameter(torch.empty(vocabulary_size, size))
        self.layers: Recurrent = (
            LSTM(size, model.hidden_sizes, **options)
            if model.cell is Cell.lstm
            else GRU(size, model.hidden_sizes, reset_after=model.reset_after, **options)
        )
        self.tie_embeddings = model.tie_embeddings
        if not model.tie_embeddings:
            self.head_weight = nn.Parameter(torch.empty(rows, hidden))
        elif model.has_projection:
            self.head_projection = nn.Parameter(torch.empty(size, hidden))
        self.head_bias = nn.Parameter(torch.empty(rows))

    @torch.no_grad()
    def initialise(
        self, init: float, stream: Stream, forget_bias: float = 0.0, embedding_std: float | None = None
    ) -> None:
        """Draws every parameter, biases too, uniformly from [-init, init].

        `forget_bias` is added to the bias of an LSTM's forget gates. With `embedding_std` the word vectors
        are normal with that standard deviation.
        """
        generator = stream.generator()
        for parameter in self.parameters():
            parameter.copy_(
                torch.empty(parameter.shape, device="cpu").uniform_(-init, init, generator=generator)
            )
        if embedding_std is not None:
            words = torch.empty(self.embedding.shape, device="cpu")
            self.embedding.copy_(words.normal_(0, embedding_std, generator=generator))
        if self.layers.cell is Cell.lstm:
            for layer in range(self.layers.num_layers):
                _, forget, _, _ = self.layers.weights(layer)[2].chunk(4)
                forget.add_(forget_bias)

    def zero_state(self, batch: int) -> State:
        return self.layers.zero_state(batch)

    def mask_shape(self, time: int, batch: int) -> MaskShape:
        """The sizes of the masks for `time` steps of `batch` sequences."""
        shape = self.layers.mask_shape(time, batch)
        return (
            replace(shape, head_size=self.embedding.shape[1]) if hasattr(self, "head_projection") else shape
        )

    def masks(self, time: int, batch: int, stream: Stream) -> ModelMasks:
        """Draws masks for `time` steps of `batch` sequences, as a function of the stream."""
        return self.host_masks(time, batch, stream).to(self.embedding.device)

    def host_masks(self, time: int, batch: int, stream: Stream) -> ModelMasks:
        """Draws the same masks on the CPU, page-locked where the model is on a GPU."""
        shape = self.mask_shape(time, batch)
        masks = draw(self.dropout, shape, stream, outputs=self.outputs).to("cpu", self.embedding.dtype)
        return masks.pin_memory() if self.embedding.is_cuda else masks

    def mean_masks(self) -> ModelMasks:
        """Returns the masks of the standard approximation."""
        return self.layers.mean_masks()

    def embed(self, ids_TB: Tensor, masks: ModelMasks) -> Tensor:
        """Returns the vectors of the words, [T, B, E]; those of dropped words are zero."""
        x_TBE = nn.functional.embedding(ids_TB, self.embedding)
        return x_TBE if masks.word is None else x_TBE * masks.word.keep(ids_TB)[..., None].to(x_TBE.dtype)


class Squares(NamedTuple):
    """Means of squares of the last layer's output, for penalties."""

    output: Tensor  # of the masked output
    change: Tensor  # of the differences between successive steps, not masked; 0 for one step


class LanguageModel(Encoder):
    """Predicts the next word."""

    def forward(self, ids_TB: Tensor, state: State, masks: ModelMasks) -> tuple[Tensor, State]:
        """Returns the input of the head and the state after it.

        The input is the masked output of the last layer, [T, B, H], or its masked projection, [T, B, E].
        """
        y_TBH, state = self.read(ids_TB, state, masks)
        return self.head_input(y_TBH, masks.head), state

    def read(self, ids_TB: Tensor, state: State, masks: ModelMasks) -> tuple[Tensor, State]:
        """Returns the masked output of the last layer, [T, B, H], and the state after it."""
        in_layers = replace(masks, word=None, head=None)
        y_TBH, last = self.layers(self.embed(ids_TB, masks), state, masks=in_layers)
        return y_TBH, last if isinstance(last, tuple) else (last,)

    @property
    def word_weights(self) -> Tensor:
        """The weights of the head, [V, H], or [V, E] where they are the word vectors."""
        return self.embedding if self.tie_embeddings else self.head_weight

    def head_input(self, y_TBH: Tensor, mask: Tensor | None) -> Tensor:
        """Returns what the head multiplies: the output itself, or its projection [T, B, E], masked."""
        x_TBE = y_TBH
        if hasattr(self, "head_projection"):
            dtype = self.layers.compute_dtype or y_TBH.dtype
            y_lowp_TBH, w_EH = operand(y_TBH.to(dtype)), operand(self.head_projection.to(dtype))
            x_TBE = nn.functional.linear(y_lowp_TBH, w_EH).to(y_TBH.dtype)
        return x_TBE if mask is None else x_TBE * mask

    def logits(self, x_TBE: Tensor) -> Tensor:
        """Returns the logits of the next word, [T, B, V], from the input of the head."""
        return nn.functional.linear(x_TBE, self.word_weights, self.head_bias)

    def nll(
        self, ids_TB: Tensor, targets_TB: Tensor, state: State, masks: ModelMasks
    ) -> tuple[Tensor, State]:
        """Returns the negative log-likelihood of each target in nats, [T, B], and the state after it."""
        x_TBE, state = self(ids_TB, state, masks)
        return self.nll_of_input(x_TBE, targets_TB), state

    def head_input_and_squares(
        self, ids_TB: Tensor, state: State, masks: ModelMasks
    ) -> tuple[Tensor, State, Squares]:
        """Returns the input of the head and the state after it, and the squares of the output."""
        raw_TBH, state = self.read(ids_TB, state, replace(masks, out=None))
        y_TBH = raw_TBH if masks.out is None else raw_TBH * masks.out
        change_TBH = raw_TBH[1:] - raw_TBH[:-1]
        change = change_TBH.square().mean() if len(change_TBH) else raw_TBH.new_zeros(())
        return self.head_input(y_TBH, masks.head), state, Squares(y_TBH.square().mean(), change)

    def nll_of_input(self, x_TBE: Tensor, targets_TB: Tensor) -> Tensor:
        """Returns the negative log-likelihood of each target in nats, [T, B], from the input of the head."""
        nll_N = kernels.linear_cross_entropy(
            x_TBE.flatten(0, 1),
            self.word_weights,
            self.head_bias,
            targets_TB.flatten(),
            backend=self.layers.backend,
            compute_dtype=self.layers.compute_dtype,
        )
        return nll_N.view_as(targets_TB)

    def augmented_nll(
        self, x_TBE: Tensor, targets_TB: Tensor, factor: float, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss with the augmented loss of Inan et al. (2017), and the loss without it.

        Both are in nats, summed over the targets. The first is the negative log-likelihood plus `factor`
        times the augmented loss. The second is the negative log-likelihood, without a gradient. The head is
        computed by torch's operations, whatever the back end.
        """
        head, dtype = (self.word_weights, self.head_bias, self.embedding), self.layers.compute_dtype
        inputs = (x_TBE.flatten(0, 1), *head, targets_TB.flatten())
        return augmented_cross_entropy(*inputs, factor, temperature, dtype)


class Regressor(Encoder):
    """Predicts a number from a text.

    The number is a linear function of the last layer's output after the text's last word.
    """

    outputs = head_rows = 1

    def forward(self, ids_TB: Tensor, lengths_B: Tensor, masks: ModelMasks) -> Tensor:
        """Returns the numbers [B]; words beyond a text's length are never read."""
        y_TBH, last = self.layers(
            self.embed(ids_TB, masks), lengths=lengths_B, masks=replace(masks, word=None, out=None)
        )
        if self.layers.residual:  # the output is not the state
            h_BH = y_TBH[lengths_B - 1, torch.arange(len(lengths_B), device=lengths_B.device)]
        else:
            h_BH = (last[0] if isinstance(last, tuple) else last)[-1][:, -self.layers.output_size :]
        if masks.out is not None:
            h_BH = h_BH * masks.out[0]
        return nn.functional.linear(h_BH, self.head_weight, self.head_bias)[:, 0]
