"""The steps that `vdrop bench` times: each function prepares one case and returns a function without
arguments that does the work of one step.

T time  B batch  N words of a chunk  H hidden size  G gates and units  V vocabulary
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from vdrop_cli import kernels, prefetch
from vdrop_cli.bench import alternatives
from vdrop_cli.bench.cases import BIDIRECTIONAL, GRUS, Case
from vdrop_cli.cells import GRUCell, LSTMCell
from vdrop_cli.corpora import Corpus
from vdrop_cli.device import COMPUTE_DTYPES, choose_backend
from vdrop_cli.dropout import ModelMasks, draw
from vdrop_cli.gradient_step import GradientStep, graphs_of_steps
from vdrop_cli.kernels import native_library
from vdrop_cli.kernels.products import WeightMatrix, operand
from vdrop_cli.layers import GRU, LSTM, State
from vdrop_cli.mc_passes import PassOptions
from vdrop_cli.model import LanguageModel, Regressor
from vdrop_cli.monte_carlo import mc_perplexity
from vdrop_cli.optimizer import Optimizer
from vdrop_cli.random_streams import Stream
from vdrop_cli.settings.choices import Backend, BenchCell, BenchPart, Precision
from vdrop_cli.settings.task import LanguageModelTask, SentimentTask
from vdrop_cli.settings.train import Train
from vdrop_cli.tasks import LanguageModelling
from vdrop_cli.tasks.language_model import Chunk
from vdrop_cli.tasks.objective import Objective
from vdrop_cli.training import Run

Step = Callable[[], object]

VOCABULARY = 10_000  # that of Penn Treebank
RATINGS_VOCABULARY = 20_002  # that of the Cornell reviews
# Words of the text that MC evaluation reads: on a GPU enough for CUDA graphs to be replayed.
MC_WORDS = {"cpu": 70, "cuda": 700}


def build(case: Case, train: Train, mc_passes: int) -> Step:
    """The step of a case."""
    name, precision = case.cell.name, case.precision
    if case.part is BenchPart.cell_step:
        return cell_step(case.cell, train)
    if case.part is BenchPart.directions:
        return directions_step(case.cell, train, precision)
    if case.part is BenchPart.checkpoint:
        return checkpoint_step(train, precision)
    if case.part is BenchPart.mc:
        return mc_step(train, precision, mc_passes)
    is_ratings = case.part is BenchPart.ratings
    if case.cell is BenchCell.products:
        vocabulary = 0 if is_ratings else VOCABULARY
        return products_step(train, precision, words_per_time_step(train, case.part), vocabulary)
    if name in alternatives.LAYERS:
        return alternative_step(case, train)
    if case.cell is BenchCell.keras:
        ids_TB = random_ids(train)
        return alternatives.keras_step(train.model, train.dropout, train.schedule, ids_TB[:-1], ids_TB[1:])
    if is_ratings:
        return ratings_step(train, precision)
    return training_step(train, precision) if case.part is BenchPart.step else layer_step(train, precision)


def alternative_step(case: Case, train: Train) -> Step:
    """The step of torch's LSTM or of the loop over its cell."""
    name, precision = case.cell.name, case.precision
    options = (train.model, train.dropout, train.schedule, precision)
    if case.part is BenchPart.ratings:
        return alternatives.rating_step(name, *options, *random_ratings(train))
    if case.part is BenchPart.step:
        ids_TB = random_ids(train)
        return alternatives.training_step(name, *options, ids_TB[:-1], ids_TB[1:])
    return alternatives.layer_step(name, train.model, train.dropout, precision, random_input(train))


def training_step(train: Train, precision: Precision) -> Step:
    """A training step as `vdrop train` makes it."""
    time_steps, batch = chunk_shape(train)
    model = language_model(train, precision)
    optimizer = Optimizer(model, train.schedule)
    ids_TB = random_ids(train)
    state = model.zero_state(batch)
    masks_by_step = prefetched(
        lambda number: model.host_masks(time_steps, batch, Stream(("bench", number))), train
    )

    def loss(chunk: Chunk, state: State, masks: ModelMasks) -> Objective:
        nll_TB, last = model.nll(chunk.ids_TB, chunk.targets_TB, state, masks)
        nats = nll_TB.sum() / batch
        return Objective(nats, nats, tuple(part.detach() for part in last))

    graphs = graphs_of_steps(can_be_captured=True, backend=train.backend, device=ids_TB.device)
    gradient_step = GradientStep(loss, optimizer, graphs)
    chunk = Chunk(0, ids_TB[:-1], ids_TB[1:])

    def step() -> object:
        nonlocal state
        loss_and_norm_2, state = gradient_step(chunk, state, next(masks_by_step))
        return optimizer.descend(loss_and_norm_2, train.schedule.lr)

    return step


def ratings_step(train: Train, precision: Precision) -> Step:
    """A training step of the model of ratings."""
    model = Regressor(
        train.model,
        train.dropout.to_policy(),
        RATINGS_VOCABULARY,
        train.backend.name,
        COMPUTE_DTYPES[precision],
    )
    model.initialise(train.model.init, Stream(("bench",)), train.model.forget_bias)
    model.to(train.device)
    optimizer, (ids_TB, lengths_B, targets_B) = Optimizer(model, train.schedule), random_ratings(train)
    masks_by_step = prefetched(
        lambda number: model.host_masks(len(ids_TB), len(lengths_B), Stream(("bench", number))), train
    )

    def step() -> object:
        predicted_B = model(ids_TB, lengths_B, next(masks_by_step))
        return optimizer.step(torch.nn.functional.mse_loss(predicted_B, targets_B), train.schedule.lr)

    return step


def layer_step(train: Train, precision: Precision) -> Step:
    """Forward and backward of one layer; masks are drawn at every step."""
    layers = language_model(train, precision).layers
    x_TBH, numbers = random_input(train).requires_grad_(), count(1)
    weights, shape = layers.weights(0), layers.mask_shape(*chunk_shape(train))
    shape = replace(shape, input_sizes=shape.input_sizes[:1])
    h_BH, c_BH = (part[0] for part in layers.zero_state(train.task.batch_size))

    def step() -> object:
        masks = draw(layers.dropout, shape, Stream(("bench", next(numbers))), train.device).layers[0]
        y_TBH, *_ = kernels.lstm(x_TBH, h_BH, c_BH, *weights, masks=masks, **layers.options)
        return torch.autograd.grad(y_TBH, [x_TBH, *weights], x_TBH.detach())

    return step


def directions_step(cell: BenchCell, train: Train, precision: Precision) -> Step:
    """Forward and backward of one layer of one or two directions, as a user's own model calls it. A layer of
    this project draws its own masks; one of torch has no dropout, and multiplies bf16 under autocast.
    """
    size, is_torch = train.model.hidden_size, cell in (BenchCell.torch_lstm, BenchCell.torch_gru)
    layer: torch.nn.Module
    if is_torch:
        layer = (torch.nn.GRU if cell in GRUS else torch.nn.LSTM)(size, size)
    else:
        layer = (GRU if cell in GRUS else LSTM)(
            size,
            size,
            bidirectional=cell in BIDIRECTIONAL,
            dropout=replace(train.dropout.to_policy(), p_word=0.0),
            backend=train.backend.name,
            compute_dtype=COMPUTE_DTYPES[precision],
        )
    layer.to(train.device)
    x_TBH, weights = random_input(train).requires_grad_(), list(layer.parameters())

    def step() -> object:
        with alternatives.autocast(precision, x_TBH.device) if is_torch else nullcontext():
            y_TBH, _ = layer(x_TBH)
        return torch.autograd.grad(y_TBH, [x_TBH, *weights], torch.ones_like(y_TBH))

    return step


def cell_step(cell: BenchCell, train: Train) -> Step:
    """One step of one sequence, as in a decoder; masks are drawn before, since they are held over the
    sequence.
    """
    torch.set_grad_enabled(False)  # of this process, which measures nothing else
    size, is_gru = train.model.hidden_size, cell in GRUS
    x_BD, h_BH = (torch.rand(1, size, device=train.device) for _ in range(2))
    state = h_BH if is_gru else (h_BH, torch.rand_like(h_BH))
    if cell in (BenchCell.torch_lstm, BenchCell.torch_gru):
        torch_cell = (torch.nn.GRUCell if is_gru else torch.nn.LSTMCell)(size, size, device=train.device)
        return lambda: torch_cell(x_BD, state)
    dropout = replace(train.dropout.to_policy(), p_word=0.0, p_out=0.0)  # a cell has neither
    vdrop_cell = (GRUCell if is_gru else LSTMCell)(size, size, dropout=dropout, device=train.device)
    masks = vdrop_cell.masks(1)
    return lambda: vdrop_cell(x_BD, state, masks=masks)


def mc_step(train: Train, precision: Precision, passes: int) -> Step:
    """MC evaluation of a short text, all passes together."""
    model, device = language_model(train, precision), torch.device(train.device)
    ids_N = torch.randint(VOCABULARY, (MC_WORDS[device.type] + 1,)).to(device)
    options = PassOptions(passes, passes, seed=1, word_dropout=False)
    return lambda: mc_perplexity(model, ids_N, options)


def checkpoint_step(train: Train, precision: Precision) -> Step:
    """Writing a checkpoint in the middle of an epoch, as `vdrop train` does."""
    assert isinstance(train.task, LanguageModelTask)
    ids_N = torch.randint(VOCABULARY, (2 * train.task.batch_size * (train.task.bptt + 1),))
    corpus = Corpus([str(word) for word in range(VOCABULARY)], ids_N, ids_N, ids_N, "random words", "bench")
    outputs = Path(train.outputs) / "bench"
    outputs.mkdir(parents=True, exist_ok=True)
    folder = TemporaryDirectory(dir=outputs)
    training = Run(
        replace(train, precision=precision),
        LanguageModelling(train.task, corpus, torch.device(train.device)),
        Path(folder.name),
    )
    next(training.train_epoch())
    list(training.finish_steps())

    def step() -> None:
        training.save()

    weakref.finalize(step, folder.cleanup)
    return step


def products_step(train: Train, precision: Precision, rows: list[int], vocabulary: int) -> Step:
    """The matrix products of a training step alone, by torch, in the shapes and layouts of the cells.

    `rows` are the words of each time step; `vocabulary` 0 leaves the head out. Where bf16 products have
    results in fp32 (AMX), the forward logits are three of them, as in the cells.
    """
    in_halves = precision is Precision.bf16 and is_native(torch.device("cpu")) and native_library.has_amx()
    if in_halves:
        torch.set_float32_matmul_precision("medium")  # of this process, which measures nothing else
    words, hidden = sum(rows), train.model.hidden_size
    dtype = COMPUTE_DTYPES[precision] or torch.float32

    def random(*shape: int) -> Tensor:
        return operand(torch.rand(shape).sub_(0.5).to(train.device, dtype))

    x_NH = random(words, hidden)
    gates_NG = random(words, 4 * hidden)
    w_GH = random(4 * hidden, hidden)
    head_VH, d_logits_NV = random(vocabulary, hidden), random(words, vocabulary)
    forward, backward = WeightMatrix(w_GH, max(rows)), WeightMatrix(w_GH.T, max(rows))
    exact_x_NH, exact_head_VH = x_NH.float(), head_VH.float()
    logits_NV = d_logits_NV.float()
    dx_NH, dw_GH, d_head_VH = (torch.empty_like(t) for t in (x_NH, w_GH, head_VH))

    def step() -> None:
        for _ in range(train.model.layers):
            torch.mm(x_NH, w_GH.T, out=gates_NG)
            for number in rows:
                forward.product(x_NH[:number])
                backward.product(gates_NG[:number])
            torch.mm(gates_NG.T, x_NH, out=dw_GH)  # of the weights that multiply the input
            torch.mm(gates_NG.T, x_NH, out=dw_GH)  # and of the recurrent ones
            torch.mm(gates_NG, w_GH, out=dx_NH)
        if vocabulary:
            for _ in range(3 if in_halves else 1):
                torch.mm(exact_x_NH, exact_head_VH.T, out=logits_NV)
            torch.mm(d_logits_NV, head_VH, out=dx_NH)
            torch.mm(d_logits_NV.T, x_NH, out=d_head_VH)

    return step


def is_native(device: torch.device) -> bool:
    """Whether the back end `native` runs on a device by default."""
    return choose_backend(Backend.auto, device) is Backend.native


def prefetched(draw_masks: Callable[[int], ModelMasks], train: Train) -> Iterator[ModelMasks]:
    """The masks of one step after another, as `vdrop train` draws them."""
    policy, device = train.dropout.to_policy(), torch.device(train.device)
    return (masks for _, masks in prefetch.with_masks(count(1), draw_masks, policy, device))


def language_model(train: Train, precision: Precision) -> LanguageModel:
    model = LanguageModel(
        train.model, train.dropout.to_policy(), VOCABULARY, train.backend.name, COMPUTE_DTYPES[precision]
    )
    model.initialise(train.model.init, Stream(("bench",)))
    return model.to(train.device)


def chunk_shape(train: Train) -> tuple[int, int]:
    """Time steps and columns of a chunk of a language model."""
    assert isinstance(train.task, LanguageModelTask)
    return train.task.bptt, train.task.batch_size


def random_ids(train: Train) -> Tensor:
    """Words of a chunk and their successors, [T + 1, B], with the last word of the vocabulary among them."""
    time_steps, batch = chunk_shape(train)
    ids_TB = torch.randint(VOCABULARY, (time_steps + 1, batch))
    ids_TB[0, 0] = VOCABULARY - 1
    return ids_TB.to(train.device)


def random_input(train: Train) -> Tensor:
    """Input of one layer, [T, B, H]."""
    x_TBH = torch.rand(*chunk_shape(train), train.model.hidden_size) - 0.5
    return x_TBH.to(train.device)


def random_ratings(train: Train) -> tuple[Tensor, Tensor, Tensor]:
    """Words [T, B], lengths and ratings [B], like those of the Cornell reviews: five chunks of eight are
    full, the others shorter, the longest first.
    """
    assert isinstance(train.task, SentimentTask) and train.task.chunk_words is not None
    time_steps, batch = train.task.chunk_words, train.task.batch_size
    generator = torch.Generator().manual_seed(1)
    lengths_B = torch.randint(1, time_steps, (batch,), generator=generator)
    lengths_B[: 5 * batch // 8] = time_steps
    lengths_B = lengths_B.sort(descending=True).values
    ids_TB = torch.randint(RATINGS_VOCABULARY, (time_steps, batch), generator=generator)
    ids_TB[0, 0] = RATINGS_VOCABULARY - 1
    ratings_B = torch.randn(batch, generator=generator)
    return ids_TB.to(train.device), lengths_B.to(train.device), ratings_B.to(train.device)


def words_per_time_step(train: Train, part: BenchPart) -> list[int]:
    """How many words each time step of a step reads."""
    if part is BenchPart.cell_step:
        return [1]
    if part is not BenchPart.ratings:
        time_steps, batch = chunk_shape(train)
        return [batch] * time_steps
    ids_TB, lengths_B, _ = random_ratings(train)
    return [int((lengths_B > t).sum()) for t in range(len(ids_TB))]
