"""`vdrop bench`: how fast the cells are, beside what people use today and beside the machine's limit.

Every case has a process of its own, with its own allocator and peak of memory; they take turns, so that a
machine whose speed changes changes all of them. One process works at a time, the others wait. Each case is
started several times.
"""

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import torch
from hydra import compose

from vdrop_cli import environment, evaluate, files, kernels, output, prefetch, rivals
from vdrop_cli.cells import GRUCell, LSTMCell
from vdrop_cli.commands.train import Run
from vdrop_cli.config import (
    Backend,
    Bench,
    BenchCell,
    BenchPart,
    Checkpoints,
    ConfigError,
    Precision,
    RunError,
    Size,
    Train,
    parse,
    plain,
)
from vdrop_cli.corpora import Corpus
from vdrop_cli.dropout import ModelMasks, draw
from vdrop_cli.kernels import native
from vdrop_cli.kernels.products import Weights
from vdrop_cli.layers import GRU, LSTM
from vdrop_cli.model import LanguageModel, Regressor
from vdrop_cli.random_streams import Stream
from vdrop_cli.schedule import Optimiser
from vdrop_cli.tasks import LanguageModelling

VOCABULARY = 10_000  # that of Penn Treebank
RATINGS_VOCABULARY = 20_002  # that of the Cornell reviews
SECONDS_A_TURN = 0.4
# of steps before each turn, until clock and caches are as in a training: others had the processor before
UNTIMED_SECONDS = 0.4
MC_WORDS = {
    "cpu": 70,
    "cuda": 700,
}  # of the text that the passes of MC evaluation read: on a GPU long enough for graphs to be replayed
LATENCY = (
    "mc: of limit says little here: latency bounds it, as each word waits for the one before it and "
    "the products are small"
)
FORWARD_ONLY = (BenchPart.mc.name, BenchPart.cell_step.name)
LINES = (
    BenchPart.checkpoint.name,
    BenchPart.cell_step.name,
)  # parts that a line tells better than a row of the table
WARM_UP = 3  # steps, and as many more as take so long:
WARM_UP_SECONDS = 2.0


@dataclass(frozen=True)
class Rates:
    """Best rates of a product of large matrices, operations a second."""

    fp32: float
    bf16: float

    def or_faster(self, others: "Rates") -> "Rates":
        return Rates(max(self.fp32, others.fp32), max(self.bf16, others.bf16))


def limit(recurrent: int, head: int, products: int, words: int, precision: Precision, rates: Rates) -> float:
    """Seconds that the matrix products alone take at the best rate: 2 · parameters · words operations each.

    `products` is 3 in training (forward, and two backward), 1 in evaluation. The forward logits are always
    fp32.
    """
    low = rates.bf16 if precision is Precision.bf16 else rates.fp32
    forward_logits = 2 * head * words
    return forward_logits / rates.fp32 + (2 * products * (recurrent + head) * words - forward_logits) / low


RIVALS = (BenchCell.torch_lstm, BenchCell.cell_loop, BenchCell.keras, BenchCell.torch_gru)
OTHER_CELLS = {  # those of the parts that are not of a language model
    BenchPart.directions: (
        BenchCell.variational,
        BenchCell.bidirectional,
        BenchCell.gru,
        BenchCell.bidirectional_gru,
    ),
    BenchPart.cell_step: (BenchCell.variational, BenchCell.gru, BenchCell.torch_lstm, BenchCell.torch_gru),
}
BIDIRECTIONAL = {  # each with the same of one direction
    BenchCell.bidirectional: BenchCell.variational,
    BenchCell.bidirectional_gru: BenchCell.gru,
}
GRUS = (BenchCell.gru, BenchCell.bidirectional_gru, BenchCell.torch_gru)
NO_POLICY = (
    BenchCell.products,
    *RIVALS,
    *BIDIRECTIONAL,
    BenchCell.gru,
)  # measured with the sizes and probabilities of the tied row


@dataclass(frozen=True)
class Case:
    """What is measured."""

    size: Size
    part: BenchPart
    cell: BenchCell
    precision: Precision

    @property
    def exists(self) -> bool:
        if self.part is BenchPart.cell_step:
            return self.cell in OTHER_CELLS[self.part] and self.precision is Precision.fp32
        if (self.part is BenchPart.ratings) != (self.size is Size.sentiment):
            return False
        if self.part is BenchPart.directions:
            return self.cell in OTHER_CELLS[self.part]
        if self.cell in BIDIRECTIONAL or self.cell in GRUS:
            return False
        if self.part is BenchPart.ratings:
            return self.cell is not BenchCell.keras
        if self.cell is BenchCell.keras:
            return self.part is BenchPart.step and self.precision is Precision.fp32
        if self.cell is BenchCell.products:
            return self.part is BenchPart.step
        if self.part is BenchPart.checkpoint:
            return self.cell is BenchCell.variational
        return self.part is not BenchPart.mc or self.cell not in (BenchCell.none, *RIVALS)

    def __str__(self) -> str:
        return f"{self.size} {self.part} {self.cell} {self.precision}"


@dataclass(frozen=True)
class Measured:
    """One case, timed over all turns."""

    size: str
    part: str
    cell: str
    precision: str
    words: int  # a step
    recurrent: int  # parameters that are multiplied in the layers
    head: int  # and in the head
    seconds: list[float]  # a step, one number a turn of every start
    limit_seconds: float
    peak_megabytes: float

    @property
    def step_seconds(self) -> float:
        return median(self.seconds)

    @property
    def words_per_second(self) -> float:
        return self.words / self.step_seconds

    @property
    def share(self) -> float:
        """Of a training's time that checkpoints take, written as often as they are by default."""
        return self.step_seconds / (60 * Checkpoints().minutes + self.step_seconds)

    @property
    def fraction(self) -> float:
        return self.limit_seconds / self.step_seconds


def ratio(one: Measured, other: Measured) -> float:
    """How many times as fast one is as the other: the median over the turns, in which both ran within
    seconds.
    """
    return median(theirs / ours for ours, theirs in zip(one.seconds, other.seconds, strict=True))


def drawn(draw: Callable[[int], ModelMasks], train: Train) -> Iterator[ModelMasks]:
    """The masks of one step after another, as `vdrop train` draws them."""
    return (
        masks
        for _, masks in prefetch.with_masks(
            count(1), draw, train.dropout.for_layers(), torch.device(train.device)
        )
    )


def our_step(train: Train, precision: Precision) -> Callable[[], object]:
    """A training step as `vdrop train` makes it."""
    time_steps, batch = train.task.steps, train.task.batch_size
    model = language_model(train, precision)
    optimiser, ids, state = Optimiser(model, train.schedule), random_ids(train), model.zero_state(batch)
    masks_of_steps = drawn(
        lambda number: model.host_masks(time_steps, batch, Stream(("bench", number))), train
    )

    def step() -> object:
        nonlocal state
        masks = next(masks_of_steps)
        nll_TB, last = model.nll(ids[:-1], ids[1:], state, masks)
        state = tuple(part.detach() for part in last)
        loss = nll_TB.sum() / batch
        return optimiser.step(loss, 1)

    return step


def our_ratings(train: Train, precision: Precision) -> Callable[[], object]:
    """A training step of the model of ratings."""
    model = Regressor(
        train.model,
        train.dropout.for_layers(),
        RATINGS_VOCABULARY,
        train.backend.name,
        environment.COMPUTE_DTYPES[precision],
    )
    model.initialise(train.model.init, Stream(("bench",)), train.model.forget_bias)
    model.to(train.device)
    optimiser, (ids_TB, lengths_B, targets_B) = Optimiser(model, train.schedule), random_ratings(train)
    masks_of_steps = drawn(
        lambda number: model.host_masks(len(ids_TB), len(lengths_B), Stream(("bench", number))), train
    )

    def step() -> object:
        masks = next(masks_of_steps)
        loss = torch.nn.functional.mse_loss(model(ids_TB, lengths_B, masks), targets_B)
        return optimiser.step(loss, 1)

    return step


def random_ratings(train: Train) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words [T, B], lengths and ratings [B], as of the Cornell reviews: five chunks of eight are full, others
    shorter, longest first.
    """
    assert train.task.chunk_words is not None
    time_steps, batch, draws = train.task.chunk_words, train.task.batch_size, torch.Generator().manual_seed(1)
    lengths_B = torch.randint(1, time_steps, (batch,), generator=draws)
    lengths_B[: 5 * batch // 8] = time_steps
    lengths_B = lengths_B.sort(descending=True).values
    ids_TB = torch.randint(RATINGS_VOCABULARY, (time_steps, batch), generator=draws)
    ids_TB[0, 0] = RATINGS_VOCABULARY - 1
    return (
        ids_TB.to(train.device),
        lengths_B.to(train.device),
        torch.randn(batch, generator=draws).to(train.device),
    )


def our_layer(train: Train, precision: Precision) -> Callable[[], object]:
    """Forward and backward of one layer, masks drawn anew."""
    layers = language_model(train, precision).layers
    x_TBH, number = random_input(train).requires_grad_(), 0
    weights, shape = layers.weights(0), layers.mask_shape(train.task.steps, train.task.batch_size)
    h_BH, c_BH = (part[0] for part in layers.zero_state(train.task.batch_size))

    def step() -> object:
        nonlocal number
        number += 1
        masks = draw(
            layers.dropout,
            replace(shape, input_sizes=shape.input_sizes[:1]),
            Stream(("bench", number)),
            train.device,
        ).layers[0]
        y_TBH, *_ = kernels.lstm(x_TBH, h_BH, c_BH, *weights, masks=masks, **layers.options)
        return torch.autograd.grad(y_TBH, [x_TBH, *weights], x_TBH.detach())

    return step


def layer_of_directions(cell: BenchCell, train: Train, precision: Precision) -> Callable[[], object]:
    """Forward and backward of one layer as it is imported, with masks of its own."""
    kind, size = GRU if cell in GRUS else LSTM, train.model.hidden_size
    layer = kind(
        size,
        size,
        bidirectional=cell in BIDIRECTIONAL,
        dropout=replace(train.dropout.for_layers(), p_word=0.0),
        backend=train.backend.name,
        compute_dtype=environment.COMPUTE_DTYPES[precision],
    ).to(train.device)
    x_TBH, weights = random_input(train).requires_grad_(), list(layer.parameters())

    def step() -> object:
        y_TBH, _ = layer(x_TBH)
        return torch.autograd.grad(y_TBH, [x_TBH, *weights], torch.ones_like(y_TBH))

    return step


def step_of_cell(cell: BenchCell, train: Train) -> Callable[[], object]:
    """One step of one sequence, as in a decoder; masks are drawn beforehand, since they are held over the
    sequence.
    """
    torch.set_grad_enabled(False)  # of this process, which measures nothing else
    size, is_gru = train.model.hidden_size, cell in GRUS
    x_BD, h_BH = (torch.rand(1, size, device=train.device) for _ in range(2))
    state = h_BH if is_gru else (h_BH, torch.rand_like(h_BH))
    if cell in (BenchCell.torch_lstm, BenchCell.torch_gru):
        theirs = (torch.nn.GRUCell if is_gru else torch.nn.LSTMCell)(size, size, device=train.device)
        return lambda: theirs(x_BD, state)
    dropout = replace(train.dropout.for_layers(), p_word=0.0, p_out=0.0)  # a cell has neither
    ours = (GRUCell if is_gru else LSTMCell)(size, size, dropout=dropout, device=train.device)
    masks = ours.masks(1)
    return lambda: ours(x_BD, state, masks=masks)


def our_mc(train: Train, precision: Precision, passes: int) -> Callable[[], object]:
    """MC evaluation of a short text, all passes together."""
    model = language_model(train, precision)
    device = torch.device(train.device)
    stream_N = torch.randint(VOCABULARY, (MC_WORDS[device.type] + 1,)).to(device)
    return lambda: evaluate.mc_perplexity(model, stream_N, passes, passes, 1, word_dropout=False)


def our_checkpoint(train: Train, precision: Precision) -> Callable[[], object]:
    """Writing a checkpoint in the middle of an epoch, as `vdrop train` does."""
    stream_N = torch.randint(VOCABULARY, (2 * train.task.batch_size * (train.task.steps + 1),))
    corpus = Corpus(
        [str(word) for word in range(VOCABULARY)], stream_N, stream_N, stream_N, "random words", "bench"
    )
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
        assert Path(folder.name).exists()  # it lasts as long as this function
        training.save()

    return step


def rows_of_steps(train: Train, part: BenchPart) -> list[int]:
    """How many words each time step of a training step reads."""
    if part is BenchPart.cell_step:
        return [1]
    if part is not BenchPart.ratings:
        return [train.task.batch_size] * train.task.steps
    ids_TB, lengths_B, _ = random_ratings(train)
    return [int((lengths_B > t).sum()) for t in range(len(ids_TB))]


def products(train: Train, precision: Precision, rows: list[int], vocabulary: int) -> Callable[[], object]:
    """The matrix products of a training step and nothing else, of the shapes and layouts that the cells
    multiply in, by torch.

    Where bf16 products have results in fp32 (AMX), the forward logits are three of them, as in the cells.
    """
    in_halves = precision is Precision.bf16 and is_native(torch.device("cpu")) and native.has_amx()
    if in_halves:
        torch.set_float32_matmul_precision("medium")  # of this process, which measures nothing else
    words, hidden = sum(rows), train.model.hidden_size
    dtype = environment.COMPUTE_DTYPES[precision] or torch.float32

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape).sub_(0.5).to(train.device, dtype)

    x_NH, gates_NG, w_GH, head_VH = (
        random(*s) for s in ((words, hidden), (words, 4 * hidden), (4 * hidden, hidden), (vocabulary, hidden))
    )
    forward, back, d_logits_NV = (
        Weights(w_GH, max(rows)),
        Weights(w_GH.T, max(rows)),
        random(words, vocabulary),
    )
    exact_x_NH, exact_head_VH, logits_NV = x_NH.float(), head_VH.float(), d_logits_NV.float()
    dx_NH, dw_GH, d_head_VH = (torch.empty_like(t) for t in (x_NH, w_GH, head_VH))

    def step() -> None:
        for _ in range(train.model.layers):
            torch.mm(x_NH, w_GH.T, out=gates_NG)
            for number in rows:
                forward.product(x_NH[:number])
                back.product(gates_NG[:number])
            torch.mm(gates_NG.T, x_NH, out=dw_GH)  # of the weights that multiply the input
            torch.mm(gates_NG.T, x_NH, out=dw_GH)  # and of the recurrent ones
            torch.mm(gates_NG, w_GH, out=dx_NH)
        if vocabulary:
            for _ in range(3 if in_halves else 1):
                torch.mm(exact_x_NH, exact_head_VH.T, out=logits_NV)
            torch.mm(d_logits_NV, head_VH, out=dx_NH)
            torch.mm(d_logits_NV.T, x_NH, out=d_head_VH)

    return step


def language_model(train: Train, precision: Precision) -> LanguageModel:
    model = LanguageModel(
        train.model,
        train.dropout.for_layers(),
        VOCABULARY,
        train.backend.name,
        environment.COMPUTE_DTYPES[precision],
    )
    model.initialise(train.model.init, Stream(("bench",)))
    return model.to(train.device)


def random_ids(train: Train) -> torch.Tensor:
    """Words of a chunk and their successors, [T + 1, B]; the last word of the vocabulary is among them."""
    ids_TB = torch.randint(VOCABULARY, (train.task.steps + 1, train.task.batch_size))
    ids_TB[0, 0] = VOCABULARY - 1
    return ids_TB.to(train.device)


def random_input(train: Train) -> torch.Tensor:
    return (torch.rand(train.task.steps, train.task.batch_size, train.model.hidden_size) - 0.5).to(
        train.device
    )


def build(case: Case, train: Train, passes: int) -> Callable[[], object]:
    """The step of a case, ready to be called again and again."""
    name, precision = case.cell.name, case.precision
    if case.part is BenchPart.cell_step:
        return step_of_cell(case.cell, train)
    if case.part is BenchPart.directions:
        return layer_of_directions(case.cell, train, precision)
    if case.cell is BenchCell.products:
        return products(
            train,
            precision,
            rows_of_steps(train, case.part),
            0 if case.part is BenchPart.ratings else VOCABULARY,
        )
    if case.part is BenchPart.ratings:
        if name in rivals.LAYERS:
            return rivals.rating_step(
                name, train.model, train.dropout, train.schedule, precision, *random_ratings(train)
            )
        return our_ratings(train, precision)
    ids = random_ids(train)
    if case.cell is BenchCell.keras:
        return rivals.keras_step(train.model, train.dropout, train.schedule, ids[:-1], ids[1:])
    if name in rivals.LAYERS and case.part is BenchPart.step:
        return rivals.training_step(
            name, train.model, train.dropout, train.schedule, precision, ids[:-1], ids[1:]
        )
    if name in rivals.LAYERS:
        return rivals.layer_step(name, train.model, train.dropout, precision, random_input(train))
    if case.part is BenchPart.checkpoint:
        return our_checkpoint(train, precision)
    if case.part is BenchPart.mc:
        return our_mc(train, precision, passes)
    return our_step(train, precision) if case.part is BenchPart.step else our_layer(train, precision)


def work(pipe: Connection, case: Case, train: Train, passes: int, ready: bool) -> None:
    """The life of a case's process: a message when it is ready, then on every message a turn of so many
    steps, after some that are not timed, answered by the seconds and the peak of memory.
    """
    device = torch.device(train.device)
    torch.manual_seed(1)
    if ready:
        environment.make_ready(device)
    step = build(case, train, passes)
    pipe.send(None)
    while (steps := pipe.recv()) > 0:
        came = time.perf_counter()
        while time.perf_counter() - came < UNTIMED_SECONDS:
            step()
            environment.wait_for(device)
        began = time.perf_counter()
        for _ in range(steps):
            step()
        environment.wait_for(device)
        pipe.send((time.perf_counter() - began, environment.peak_megabytes(device)))


class Worker:
    """A case in its own process."""

    def __init__(self, case: Case, train: Train, passes: int, ready: bool) -> None:
        self.case, self.steps, self.peak = case, 1, 0.0
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, case, train, passes, ready), daemon=True)
        self.process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.pipe.send(0)
            self.process.join()
        else:
            self.process.terminate()

    def ask(self, steps: int | None = None) -> Any:
        """Its answer to a turn of so many steps; without one, its message that it is ready."""
        try:
            if steps is not None:
                self.pipe.send(steps)
            return self.pipe.recv()
        except (EOFError, BrokenPipeError):
            raise ConfigError(
                f"{self.case} could not run, see above; leave it out of cells, parts or sizes"
            ) from None

    def turn(self) -> float:
        """Seconds a step."""
        seconds, self.peak = self.ask(self.steps)
        return float(seconds / self.steps)

    def warm_up(self) -> None:
        """Until memory and code are there; and how many steps make a turn."""
        began, taken = time.perf_counter(), [self.turn() for _ in range(WARM_UP)]
        while time.perf_counter() - began < WARM_UP_SECONDS:
            taken.append(self.turn())
        self.steps = max(1, round(SECONDS_A_TURN / min(taken)))


def side(device: torch.device) -> int:
    """Of the square matrices whose product shows a device's best rate."""
    return 2048 if device.type == "cpu" else 8192


def measure_rates(device: torch.device, seconds: float = 2.0) -> Rates:
    """The best of many products of each precision, with the library that the cells use."""

    def best(dtype: torch.dtype) -> float:
        a, b = (torch.rand(side(device), side(device)).to(device, dtype) for _ in range(2))
        fastest, until = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < until:
            environment.wait_for(device)
            began = time.perf_counter()
            a @ b
            environment.wait_for(device)
            fastest = min(fastest, time.perf_counter() - began)
        return 2 * side(device) ** 3 / fastest

    return Rates(best(torch.float32), best(torch.bfloat16))


def cases(settings: Bench) -> list[list[Case]]:
    """All cases, in groups that take turns."""
    groups = []
    for size in settings.sizes:
        for part in settings.parts:
            for precision in settings.precisions:
                group = [Case(size, part, cell, precision) for cell in settings.cells or BenchCell]
                groups.append([case for case in group if case.exists])
    return [group for group in groups if group]


def train_settings(case: Case, settings: Bench) -> Train:
    """The published settings of the size, with the dropout that a case is named after, on the device that is
    measured.
    """
    task = ["task=sentiment"] if case.size is Size.sentiment else []
    dropout = "variational" if case.cell in (BenchCell.fused, *NO_POLICY) else case.cell
    overrides = [*task, f"model=lstm_{case.size}", f"dropout={dropout}"]
    backend = (
        Backend.fused
        if case.cell is BenchCell.fused
        else environment.backend(Backend.auto, torch.device(settings.device))
    )
    return replace(
        parse(compose("train", overrides), Train),
        outputs=settings.outputs,
        device=settings.device,
        backend=backend,
    )


def run(settings: Bench) -> None:
    device = environment.device(settings.device)
    settings = replace(settings, device=str(device))
    left_out = {}
    if device.type != "cpu":
        left_out = dict.fromkeys(
            (BenchCell.keras, BenchCell.products), "is measured on the CPU alone; leave it out"
        )
    if importlib.util.find_spec("keras") is None:
        left_out[BenchCell.keras] = "is not installed; pip install 'vdrop[keras]', or leave it out"
    for cell in settings.cells or ():
        if cell in left_out:
            raise ConfigError(f"cells holds {cell}, which {left_out[cell]}")
    settings = replace(settings, cells=settings.cells or [cell for cell in BenchCell if cell not in left_out])
    groups = cases(settings)
    if not groups:
        raise ConfigError(
            "parts, cells and precisions together leave nothing to measure; take more of one of them"
        )
    environment.make_ready(device)
    found, rates = [], measure_rates(device)
    for group in groups:
        more, rates = measure(group, settings, rates)
        found += more
    found = [replace(m, limit_seconds=limit_of(m, rates)) for m in found]
    path = write(settings, found, rates)
    tell(found, rates, device)
    print(f"\nwritten to {path}", file=sys.stderr)


def measure(group: list[Case], settings: Bench, rates: Rates) -> tuple[list[Measured], Rates]:
    """A group of cases in turns; the machine's best rates so far are measured in between, too."""
    seconds: dict[Case, list[float]] = {case: [] for case in group}
    peaks, device = dict.fromkeys(group, 0.0), torch.device(settings.device)
    for _ in range(settings.starts):
        with ExitStack() as stack:
            ready = {case: settings.rivals_ready or case.cell not in RIVALS for case in group}
            trains = {case: train_settings(case, settings) for case in group}
            workers = [
                stack.enter_context(Worker(case, trains[case], settings.mc_passes, ready[case]))
                for case in group
            ]
            for worker in workers:
                worker.ask()  # all are ready before the first is timed
            for worker in workers:
                worker.warm_up()
            for _ in range(settings.turns):
                for worker in workers:
                    seconds[worker.case].append(worker.turn())
            rates = rates.or_faster(measure_rates(device, 0.5))
        peaks |= {worker.case: max(worker.peak, peaks[worker.case]) for worker in workers}
    for case in group:
        print(f"{case}: {median(seconds[case]) * 1e3:.1f} ms", file=sys.stderr, flush=True)
    return [measured(case, settings, seconds[case], peaks[case]) for case in group], rates


def measured(case: Case, settings: Bench, seconds: list[float], peak: float) -> Measured:
    """What was found of a case; the limit is worked out when the best rates of all groups are known."""
    train = train_settings(case, settings)
    layers, head = train.model.layers, VOCABULARY * train.model.hidden_size
    words = sum(rows_of_steps(train, case.part))
    if case.part is BenchPart.ratings:
        head = 0
    if case.part is BenchPart.mc:
        words = MC_WORDS[torch.device(settings.device).type] * settings.mc_passes
    if case.part in (BenchPart.layer, BenchPart.directions, BenchPart.cell_step):
        layers, head = 1, 0
    if case.part is BenchPart.checkpoint:
        words, layers, head = 0, 0, 0
    gates, directions = 3 if case.cell in GRUS else 4, 2 if case.cell in BIDIRECTIONAL else 1
    recurrent = 2 * gates * train.model.hidden_size**2 * layers * directions
    names = (str(case.size), str(case.part), str(case.cell), str(case.precision))
    return Measured(*names, words, recurrent, head, seconds, 0.0, peak)


def limit_of(m: Measured, rates: Rates) -> float:
    return limit(
        m.recurrent, m.head, 1 if m.part in FORWARD_ONLY else 3, m.words, Precision[m.precision], rates
    )


def is_native(device: torch.device) -> bool:
    return environment.backend(Backend.auto, device) is Backend.native


def tell(measured: list[Measured], rates: Rates, device: torch.device) -> None:
    """A table for a person."""
    products = f"{side(device)}³ product: fp32 {rates.fp32 / 1e9:.0f}, bf16 {rates.bf16 / 1e9:.0f} GFLOP/s"
    uses = f"; native uses {', '.join(native.features()) or 'no extension'}" if is_native(device) else ""
    print(f"{device}, {torch.get_num_threads()} threads; {products}{uses}")
    columns = f"{'words/s':>9}{'ms':>10}{'of limit':>10}{'× torch_lstm':>14}{'× cell_loop':>13}{'peak MB':>9}"
    print(f"{'size':<10}{'part':<12}{'cell':<20}{'':<6}{columns}")
    usual = {(m.cell, m.size, m.part, m.precision): m for m in measured}

    def beside(m: Measured, cell: BenchCell) -> str:
        other = usual.get((cell.name, m.size, m.part, m.precision))
        return f"{ratio(m, other):.2f}" if other else "–"

    for m in [m for m in measured if m.part not in LINES]:
        print(
            f"{m.size:<10}{m.part:<12}{m.cell:<20}{m.precision:<6}{m.words_per_second:>9,.0f}{m.step_seconds * 1e3:>10.1f}"
            f"{m.fraction:>10.2f}{beside(m, BenchCell.torch_lstm):>14}{beside(m, BenchCell.cell_loop):>13}{m.peak_megabytes:>9,.0f}"
        )
    if device.type == "cuda" and any(m.part == BenchPart.mc.name for m in measured):
        print(LATENCY)
    for m in [m for m in measured if m.part == BenchPart.directions.name]:
        one_direction = BIDIRECTIONAL.get(BenchCell[m.cell])
        if one_direction and (one := usual.get((one_direction.name, m.size, m.part, m.precision))):
            print(f"{m.size} {m.precision}: {m.cell} takes {ratio(one, m):.2f} times as long as {one.cell}")
    for m in [m for m in measured if m.part == BenchPart.cell_step.name]:
        print(f"{m.size}: one step of a cell, {m.cell}, takes {m.step_seconds * 1e6:.1f} µs")
    for m in [m for m in measured if m.part == BenchPart.checkpoint.name]:
        print(
            f"{m.size}: writing a checkpoint takes {m.step_seconds * 1e3:.0f} ms, every "
            f"{Checkpoints().minutes:g} minutes "
            f"{100 * m.share:.2f} % of the time"
        )


def write(settings: Bench, measured: list[Measured], rates: Rates) -> Path:
    device = torch.device(settings.device)
    described = environment.describe(
        device, environment.backend(Backend.auto, device).name, " and ".join(map(str, settings.precisions))
    )
    told: dict[str, Any] = {"settings": plain(settings), "environment": described, "rates": asdict(rates)}
    told["measured"] = [
        {**asdict(m), "step_seconds": m.step_seconds}
        | (
            {"share": m.share}
            if m.part == BenchPart.checkpoint.name
            else {"words_per_second": m.words_per_second, "fraction": m.fraction}
        )
        for m in measured
    ]
    folder = Path(settings.outputs) / "bench"
    try:
        path = reserved(folder, time.strftime("%Y%m%d-%H%M%S"))
        try:
            files.replace(path, (json.dumps(told, indent=1) + "\n").encode())
        except RunError:
            path.unlink(missing_ok=True)
            raise
    except (OSError, RunError) as error:
        reason = error if isinstance(error, RunError) else f"{folder} cannot be written ({error.strerror})"
        above = "; the table is above" if output.is_shown(lambda: tell(measured, rates, device)) else ""
        raise ConfigError(f"outputs={settings.outputs}: {reason}{above}") from None
    return path


def reserved(folder: Path, stamp: str) -> Path:
    """A new file, named by the time and counted where several benches end in the same second."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        path = folder / f"{stamp}{f'-{number}' if number > 1 else ''}.json"
        with suppress(FileExistsError):
            path.open("x").close()
            break
    return path
