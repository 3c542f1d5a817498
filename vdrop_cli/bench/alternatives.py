"""Other implementations that `vdrop bench` measures beside this one: `torch.nn.LSTM`, a loop over
`nn.LSTMCell`, Keras.

On CUDA they run with torch's defaults: cuDNN multiplies in tf32 without an autocast to bf16, and with one in
fp16, which is as fast.

T time  B batch  H hidden size  V vocabulary
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from vdrop_cli.settings.choices import Precision
from vdrop_cli.settings.train import DropoutSettings, Model, Schedule

State = tuple[Tensor, Tensor]


class TorchLayers(nn.Module):
    """`torch.nn.LSTM`, which has no dropout on the recurrence, without any dropout."""

    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(hidden, hidden, layers)

    def forward(self, x_TBH: Tensor, state: State, dropout: DropoutSettings) -> tuple[Tensor, State]:
        y_TBH, state = self.lstm(x_TBH, state)
        return y_TBH, state


class CellLoop(nn.Module):
    """The usual implementation of dropout on the recurrence: a loop over `nn.LSTMCell` with masks on each
    layer's input and state that are held over the sequence.

    It has no masks of words and of the output, which vdrop's cells draw in the same step.
    """

    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        self.cells = nn.ModuleList(nn.LSTMCell(hidden, hidden) for _ in range(layers))

    def forward(self, x_TBH: Tensor, state: State, dropout: DropoutSettings) -> tuple[Tensor, State]:
        def mask(p: float) -> Tensor:
            return torch.empty_like(x_TBH[0]).bernoulli_(1 - p).div_(1 - p)

        last = []
        for cell, h, c in zip(self.cells, *state, strict=True):
            mask_x = mask(dropout.p_x)
            mask_h = mask(dropout.p_h)
            outputs = []
            for x_BH in x_TBH * mask_x:
                h, c = cell(x_BH, (h * mask_h, c))
                outputs.append(h)
            x_TBH = torch.stack(outputs)
            last.append((h, c))
        h, c = (torch.stack(part) for part in zip(*last, strict=True))
        return x_TBH, (h, c)


LAYERS: dict[str, type[TorchLayers] | type[CellLoop]] = {"torch_lstm": TorchLayers, "cell_loop": CellLoop}


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision is Precision.bf16 else nullcontext()


def training_step(
    name: str,
    model: Model,
    dropout: DropoutSettings,
    schedule: Schedule,
    precision: Precision,
    ids_TB: Tensor,
    targets_TB: Tensor,
) -> Callable[[], object]:
    """A whole training step in the usual form: embedding, layers, `nn.Linear`, `cross_entropy`,
    `clip_grad_norm_`, `optim.SGD`.
    """
    batch = ids_TB.shape[1]
    vocabulary = int(ids_TB.max()) + 1
    device = ids_TB.device
    embedding = nn.Embedding(vocabulary, model.hidden_size)
    layers = LAYERS[name](model.hidden_size, model.layers)
    head = nn.Linear(model.hidden_size, vocabulary)
    parameters = [p for part in (embedding, layers, head) for p in part.to(device).parameters()]
    sgd = torch.optim.SGD(parameters, lr=schedule.lr)
    state = zero_state(model.layers, batch, model.hidden_size, device)

    def step() -> Tensor:
        nonlocal state
        with autocast(precision, device):
            y_TBH, last = layers(embedding(ids_TB), state, dropout)
            logits_NV = head(y_TBH).flatten(0, 1)
        state = tuple(part.detach().float() for part in last)
        loss = nn.functional.cross_entropy(logits_NV.float(), targets_TB.flatten(), reduction="sum") / batch
        sgd.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, schedule.max_grad_norm)
        sgd.step()
        return loss.detach()  # without a wait for the device, as the steps of vdrop

    return step


def rating_step(
    name: str,
    model: Model,
    dropout: DropoutSettings,
    schedule: Schedule,
    precision: Precision,
    ids_TB: Tensor,
    lengths_B: Tensor,
    targets_B: Tensor,
) -> Callable[[], object]:
    """A training step of a regression in the usual form: the layers read padding, the head reads the output
    at each last word; `optim.Adam`.
    """
    batch, device = ids_TB.shape[1], ids_TB.device
    embedding = nn.Embedding(int(ids_TB.max()) + 1, model.hidden_size)
    layers = LAYERS[name](model.hidden_size, model.layers)
    head = nn.Linear(model.hidden_size, 1)
    parameters = [p for part in (embedding, layers, head) for p in part.to(device).parameters()]
    adam = torch.optim.Adam(parameters, lr=schedule.lr, weight_decay=schedule.weight_decay)

    def step() -> Tensor:
        with autocast(precision, device):
            y_TBH, _ = layers(
                embedding(ids_TB), zero_state(model.layers, batch, model.hidden_size, device), dropout
            )
            predicted_B = head(y_TBH[lengths_B - 1, torch.arange(batch, device=device)])[:, 0]
        loss = nn.functional.mse_loss(predicted_B.float(), targets_B)
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        return loss.detach()  # without a wait for the device, as the steps of vdrop

    return step


def layer_step(
    name: str, model: Model, dropout: DropoutSettings, precision: Precision, x_TBH: Tensor
) -> Callable[[], object]:
    """Forward and backward of one layer, with gradients of its input and weights."""
    layer = LAYERS[name](model.hidden_size, 1).to(x_TBH.device)
    state = zero_state(1, x_TBH.shape[1], model.hidden_size, x_TBH.device)
    x_TBH = x_TBH.clone().requires_grad_()

    def step() -> object:
        with autocast(precision, x_TBH.device):
            y_TBH, _ = layer(x_TBH, state, dropout)
        return torch.autograd.grad(y_TBH.float(), [x_TBH, *layer.parameters()], x_TBH.detach())

    return step


def zero_state(layers: int, batch: int, hidden: int, device: torch.device | str = "cpu") -> State:
    shape = (layers, batch, hidden)
    return torch.zeros(shape, device=device), torch.zeros(shape, device=device)


def keras_step(
    model: Model, dropout: DropoutSettings, schedule: Schedule, ids_TB: Tensor, targets_TB: Tensor
) -> Callable[[], object]:
    """A training step of Keras's `LSTM(dropout=…, recurrent_dropout=…)` in fp32, with the torch back end
    unless KERAS_BACKEND names another. With both, Keras has a mask for each gate, as `variational_untied`.
    """
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    vocabulary = int(ids_TB.max()) + 1
    layers = [
        keras.layers.LSTM(
            model.hidden_size, return_sequences=True, dropout=dropout.p_x, recurrent_dropout=dropout.p_h
        )
        for _ in range(model.layers)
    ]
    network = keras.Sequential(
        [keras.layers.Embedding(vocabulary, model.hidden_size), *layers, keras.layers.Dense(vocabulary)]
    )
    network.compile(
        keras.optimizers.SGD(schedule.lr, global_clipnorm=schedule.clip),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    ids_BT, targets_BT = ids_TB.T.contiguous().numpy(), targets_TB.T.contiguous().numpy()
    return lambda: network.train_on_batch(ids_BT, targets_BT)
