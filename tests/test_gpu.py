"""On a GPU (`make test-gpu`): the cells at the sizes that people train, memory, graphs, whole runs."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import CELLS_AND_POLICIES, TINY, Vdrop, settings
from tests.kernels.test_fused import relative_errors
from tests.processes import ROOT, environment
from vdrop_cli import kernels, prefetch, tasks, training
from vdrop_cli.commands import train
from vdrop_cli.dropout import GATES, MaskShape, ModelMasks, draw
from vdrop_cli.kernels import halves, head
from vdrop_cli.layers import GRU, LSTM, Recurrent
from vdrop_cli.mc_passes import PassOptions
from vdrop_cli.model import LanguageModel
from vdrop_cli.monte_carlo import MonteCarlo
from vdrop_cli.policies import Dropout, Policy
from vdrop_cli.random_streams import Stream
from vdrop_cli.settings.choices import Backend

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
ON_CUDA = [override for override in TINY if not override.startswith("device")] + ["device=cuda"]


@pytest.fixture(autouse=True)
def there_is_one() -> None:
    if not torch.cuda.is_available():
        pytest.fail("torch finds no CUDA device here")


def test_small_cells_agree_with_the_definition_and_replay_as_graphs() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-m",
        "long or not long",
        "tests/kernels/triton_cells.py",
    ]
    variables = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert ran.returncode == 0 and "skipped" not in ran.stdout, ran.stdout[-4000:]


def layers_of(cell: str, policy: str, hidden: int, **options: Any) -> tuple[Recurrent, ModelMasks, Tensor]:
    """Two layers, masks for 35 steps of 20 sequences, and inputs, from a fixed seed."""
    torch.manual_seed(0)
    settings_of_model = settings("model=lstm_medium", f"dropout={policy}", "dropout.p_word=0")
    dropout: Dropout = settings_of_model.dropout.to_policy()
    layers = {"lstm": LSTM, "gru": GRU}[cell](hidden, hidden, 2, dropout=dropout, **options)
    masks = draw(
        dropout, MaskShape(35, 20, (hidden, hidden), hidden, GATES[layers.cell]), Stream((1, policy))
    )
    return layers, masks, torch.randn(35, 20, hidden)


def results(layers: Recurrent, masks: ModelMasks, x_TBD: Tensor) -> list[Tensor]:
    """Outputs, states and all gradients."""
    x_TBD = x_TBD.detach().requires_grad_()
    y_TBH, state = layers(x_TBD, masks=masks)
    states = list(state) if isinstance(state, tuple) else [state]
    weights = torch.linspace(-1, 1, y_TBH.shape[-1], device=y_TBH.device, dtype=y_TBH.dtype)
    loss = (y_TBH * weights).sum() + sum((s * weights).sum() for s in states)
    return [y_TBH, *states, *torch.autograd.grad(loss, [x_TBD, *layers.parameters()])]


@pytest.mark.parametrize("hidden", [650, 1500])
@pytest.mark.parametrize(("cell", "policy"), CELLS_AND_POLICIES)
@pytest.mark.parametrize("how", ["fp32", "tf32", "bf16"])
def test_cells_of_published_sizes_agree_with_the_definition(
    cell: str, policy: str, hidden: int, how: str
) -> None:
    """In float64 on the same device; three times, so that graphs are captured and replayed."""
    compute_dtype, tolerance = {"fp32": (None, 1e-4), "tf32": (None, 5e-3), "bf16": (torch.bfloat16, 3e-2)}[
        how
    ]
    layers, masks, x_TBD = layers_of(cell, policy, hidden, backend="triton", compute_dtype=compute_dtype)
    torch.set_float32_matmul_precision("high" if how == "tf32" else "highest")
    layers.to(CUDA)
    runs = [results(layers, masks.to(CUDA), x_TBD.to(CUDA)) for _ in range(3)]
    layers.double().backend, layers.compute_dtype = "reference", None
    expected = results(layers, masks.to(CUDA, torch.float64), x_TBD.to(CUDA).double())
    for each in runs:
        assert max(relative_errors(each, expected)) < tolerance
    if how == "bf16":
        assert max(relative_errors(runs[0], expected)) > 1e-5, "these products were not bf16"


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_layer_norm_agrees_with_the_definition(compute_dtype: torch.dtype | None) -> None:
    """`auto` must not choose `triton`, which does not compute it. Few steps: errors grow with each."""
    layers, masks, x_TBD = layers_of(
        "lstm", "variational", 64, backend="auto", compute_dtype=compute_dtype, layer_norm=True
    )
    x_TBD = x_TBD[:4]
    torch.set_float32_matmul_precision("highest")
    layers.to(CUDA)
    ours = results(layers, masks.to(CUDA), x_TBD.to(CUDA))
    layers.double().backend, layers.compute_dtype = "reference", None
    expected = results(layers, masks.to(CUDA, torch.float64), x_TBD.to(CUDA).double())
    assert max(relative_errors(ours, expected)) < (0.1 if compute_dtype else 1e-4)


def test_masks_are_those_of_the_cpu() -> None:
    for policy in ("naive", "variational_untied", "moon_word"):
        dropout = settings("model=lstm_medium", f"dropout={policy}").dropout.to_policy()
        here, there = (
            draw(dropout, MaskShape(3, 2, (5,), 7, 4), Stream((1,)), device) for device in ("cpu", CUDA)
        )
        for a, b in zip(here.layers[0], there.layers[0], strict=True):
            assert (a is None and b is None) or (b.is_cuda and torch.equal(a, b.cpu()))
        assert there.to(CUDA).layers[0].x is there.layers[0].x, "what is there already stays"


def test_masks_drawn_ahead_are_those_that_are_drawn_in_time(
    tmp_path: Path, text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From pinned memory, by another thread, while graphs are captured and replayed."""
    losses = []
    for ahead in (True, False):
        monkeypatch.setattr(prefetch, "is_worthwhile", lambda dropout, device, ahead=ahead: ahead)
        config = settings(
            *ON_CUDA,
            *text,
            "dropout=naive_word",
            "model.hidden_size=64",
            "log_every=1",
            f"outputs={tmp_path}/{ahead}",
        )
        train.run(config)
        losses.append(step_losses(tmp_path / str(ahead)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) > 10
    model = LanguageModel(config.model, config.dropout.to_policy(), 10).to(CUDA)
    assert all(m is None or m.is_pinned() for m in model.host_masks(3, 2, Stream((1,))).layers[0])


def peak(run: Callable[[], object]) -> int:
    """Bytes that it takes beyond what is there already."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def test_recomputing_takes_less_memory_and_gives_the_same() -> None:
    saving, masks, x_TBD = layers_of("lstm", "variational", 650, backend="triton")
    less, *_ = layers_of("lstm", "variational", 650, backend="triton", recompute=True)
    masks, x_TBD = masks.to(CUDA), x_TBD.to(CUDA)
    ours, theirs = (results(layers.to(CUDA), masks, x_TBD) for layers in (less, saving))
    assert max(relative_errors(ours, theirs)) < 1e-4

    def allocated(layers: Recurrent) -> int:
        before = torch.cuda.memory_allocated()
        output = layers(x_TBD, masks=masks)
        after = torch.cuda.memory_allocated()
        del output
        return after - before

    assert allocated(less) < 0.6 * allocated(saving)


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_the_logits_of_many_words_are_never_all_in_memory(
    compute_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "LOGITS_AT_ONCE_ON_GPU", 2**22)
    rows = 20_000
    words = 10_000
    hidden = 64
    x = torch.randn(rows, hidden, device=CUDA, requires_grad=True)
    w = torch.randn(words, hidden, device=CUDA, requires_grad=True)
    b = torch.zeros(words, device=CUDA, requires_grad=True)
    targets = torch.randint(words, (rows,), device=CUDA)

    def step(x: Tensor = x, w: Tensor = w, b: Tensor = b, backend: str = "auto") -> list[Tensor]:
        nll = kernels.linear_cross_entropy(x, w, b, targets, backend=backend, compute_dtype=compute_dtype)
        return [nll.detach(), *torch.autograd.grad(nll.sum(), [x, w, b])]

    assert peak(step) < 0.25 * rows * words * 4
    errors = relative_errors(
        step(), step(*(t.detach().double().requires_grad_() for t in (x, w, b)), backend="reference")
    )
    assert errors[0] < 1e-5 and max(errors) < (1e-4 if compute_dtype is None else 3e-2)


def test_products_by_halves_are_exact_where_torch_has_them() -> None:
    """Those of the forward logits; torch has a product of bf16 with results in fp32 from 2.8 on."""
    has_product = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)
    assert halves.is_exact_on(torch.device("cuda", torch.cuda.current_device())) is has_product


def test_a_users_own_graph_can_hold_a_layer() -> None:
    layers, masks, x_TBD = layers_of("lstm", "variational", 64, backend="triton")
    layers.to(CUDA)
    masks, x_TBD = masks.to(CUDA), x_TBD.to(CUDA)
    with torch.no_grad():
        layers(x_TBD, masks=masks)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y_TBH, _ = layers(x_TBD, masks=masks)
        x_TBD.mul_(0.5)
        graph.replay()
        torch.testing.assert_close(y_TBH, layers(x_TBD, masks=masks)[0])


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_a_compiled_model_gives_what_it_gave() -> None:
    layers, masks, x_TBD = layers_of("gru", "variational_untied", 64, backend="triton")
    layers.to(CUDA)
    masks, x_TBD = masks.to(CUDA), x_TBD.to(CUDA)

    def model(x: Tensor) -> Tensor:
        return layers(x, masks=masks)[0].square().sum()

    for mode in ("default", "reduce-overhead"):
        compiled = torch.compile(model, fullgraph=True, mode=mode)
        for _ in range(4):
            losses = [f(x_TBD) for f in (compiled, model)]
            torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
            gradients = [torch.autograd.grad(loss, list(layers.parameters())) for loss in losses]
            assert max(relative_errors([g.clone() for g in gradients[0]], list(gradients[1]))) < 1e-3


def test_graphs_outlive_others_and_cublass_memory() -> None:
    """A graph that stays, through captures of a hundred others and what torch does to cuBLAS's workspaces
    around its own graphs.
    """
    layers, masks, x_TBD = layers_of("lstm", "variational", 64, backend="triton")
    layers.to(CUDA)
    masks, x_TBD = masks.to(CUDA), x_TBD.to(CUDA)
    expected = results(layers, masks, x_TBD)
    for time in range(1, 36):
        for _ in range(3):
            results(layers, masks, x_TBD[:time])
        filled = [torch.full((1024, 1024), torch.nan, device=CUDA) for _ in range(16)]
        actual = results(layers, masks, x_TBD)
        assert max(relative_errors(actual, expected)) < 1e-4, time
        del filled
        if time % 5 == 0:
            torch._C._cuda_clearCublasWorkspaces()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_programs_run_where_the_tensors_are() -> None:
    """Not on the device that happens to be the current one."""
    layers, masks, x_TBD = layers_of("lstm", "variational", 64, backend="triton")
    where = torch.device("cuda:1")
    layers.backend = "reference"
    expected = results(layers, masks, x_TBD)
    layers.backend = "triton"
    actual = results(layers.to(where), masks.to(where), x_TBD.to(where))
    assert (
        all(t.device == where for t in actual)
        and max(relative_errors([t.cpu() for t in actual], expected)) < 1e-3
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ["dropout=variational_untied"],
        ["dropout=zaremba", "schedule.optimiser=adam", "schedule.lr=0.01"],
        ["dropout=variational", "model.tie_embeddings=true", "task.reset=0.5", "task.ar=2", "task.tar=1"],
        ["dropout=variational", "dropout.p_weight=0.4", "dropout.p_h=0"],
        ["model=gru_small", "dropout=variational", "model.hidden_size=8"],
        ["model=gru_small", "dropout=naive_word", "model.hidden_size=7", "model.reset_after=true"],
        ["dropout=moon_word", "model.hidden_size=650", "precision=bf16"],
        ["dropout=variational_untied", "dropout.word_mask=token", "model.hidden_size=650", "precision=bf16"],
        [
            *("dropout=variational", "model.tie_embeddings=true", "model.embedding_size=6"),
            *("dropout.p_head=0.3", "dropout.new_each_step=[p_head]"),
        ],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_training_steps_are_one_graph(
    overrides: list[str], tmp_path: Path, text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which gives the same losses, gradients and weights as steps without one, over epochs with validations
    in between. In bf16, the logits are products by halves.
    """
    monkeypatch.setattr(head, "MIN_ROWS_BY_HALVES", 1)
    runs = []
    for has_graph in (True, False):
        config = settings(*ON_CUDA, *text, *overrides)
        config.backend = Backend.triton
        run = training.Run(config, tasks.load(config, CUDA), tmp_path / str(has_graph))
        if not has_graph:
            run.gradient_step.graphs = None
        losses = []
        for _ in range(2):
            losses += [(step.loss, step.grad_norm) for step in run.train_epoch()]
            run.finish_epoch()
        runs.append((losses, list(run.model.parameters())))
        graphs = run.gradient_step.graphs
        assert (graphs is not None and len(graphs.entries) == 1) is has_graph, "the checks found nothing"
    (graphed, plain), (weights, plain_weights) = zip(*runs, strict=True)
    assert len(plain) > 20 and torch.allclose(torch.tensor(graphed), torch.tensor(plain), rtol=1e-3)
    assert max(relative_errors(weights, plain_weights)) < 1e-3


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def step_losses(folder: Path) -> list[float]:
    """Losses of the steps of the only run in a folder."""
    (log,) = folder.rglob("log.jsonl")
    return [record["loss"] for record in log_of(log.parent) if record["kind"] == "step"]


@pytest.mark.parametrize(
    "options",
    [
        ["model.embedding_size=6", "dropout.p_head=0.3", "dropout.new_each_step=[p_head]", "task.ar=2"],
        [
            "dropout.one_state_mask=true",
            "dropout.p_out=0",
            "task.augmented_loss=13",
            "task.augmented_temperature=20",
        ],
    ],
    ids=["p_head", "one_state_mask"],
)
def test_settings_of_the_stronger_baselines_train_as_on_the_cpu(
    options: list[str], tmp_path: Path, text: list[str]
) -> None:
    tied = [*text, "dropout=variational", "model.tie_embeddings=true", *options, "log_every=1"]
    for device, overrides in (("cpu", TINY), ("cuda", ON_CUDA)):
        train.run(settings(*overrides, *tied, f"outputs={tmp_path}/{device}"))
    here, there = (step_losses(tmp_path / device) for device in ("cpu", "cuda"))
    assert there == pytest.approx(here, rel=1e-3)


def test_a_run_trains_and_evaluates_and_says_with_what(vdrop: Vdrop, tmp_path: Path, text: list[str]) -> None:
    """The same losses as on the CPU, MC evaluation of a run of either on both."""
    for device in ("cpu", "cuda"):
        overrides = [o for o in TINY if not o.startswith("device")]
        ran = vdrop(
            "train",
            *overrides,
            *text,
            "dropout=variational",
            "log_every=1",
            f"device={device}",
            f"outputs={device}",
        )
        assert ran.returncode == 0, ran.stderr
        assert f"{device}, back end {'triton' if device == 'cuda' else 'native'}, fp32" in ran.stderr
    here, there = (next((tmp_path / device / "train").glob("*/*")) for device in ("cpu", "cuda"))
    environments = [log_of(folder)[0]["environment"] for folder in (here, there)]
    assert [e["backend"] for e in environments] == ["native", "triton"] and environments[1][
        "device"
    ] == torch.cuda.get_device_name()
    losses = [step_losses(folder) for folder in (here, there)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    every_metrics = []
    for folder in (here, there):
        for device in ("cpu", "cuda"):
            ran = vdrop(
                "eval",
                f"checkpoint={folder}",
                "stored_data=true",
                "mc_samples=3",
                f"device={device}",
                "precision=fp32",
            )
            assert ran.returncode == 0, ran.stderr
            every_metrics.append(
                json.loads(max(folder.glob("eval*.json"), key=os.path.getmtime).read_text())["metrics"]
            )
    for metrics in every_metrics[1:]:
        assert metrics == pytest.approx(every_metrics[0], rel=1e-2)


def test_mc_evaluation_on_a_gpu_resumes_where_it_was_stopped() -> None:
    """From passes saved on the CPU, in the middle of a pass and after some."""
    train = settings("model=lstm_small", "model.hidden_size=16", "dropout=variational")
    model = LanguageModel(train.model, train.dropout.to_policy(), 50)
    model.initialise(0.5, Stream((1,)))
    model.to(CUDA)
    stream_N = (torch.arange(400) * 7 % 50).to(CUDA)
    options = PassOptions(6, 2, 1, word_dropout=False)
    whole, first, second = (MonteCarlo(model, stream_N, options) for _ in range(3))
    list(whole.run())
    assert len(list(islice(first.run(), 14))) == 14
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, map_location="cpu"))
    list(second.run())
    assert second.averages.ppl == pytest.approx(whole.averages.ppl, rel=1e-5)


def test_layers_take_the_back_end_of_the_device_that_they_are_moved_to() -> None:
    layers = LSTM(5, 7, dropout=Dropout(Policy.variational, p_h=0.5))
    layers(torch.zeros(2, 1, 5))
    assert kernels.choose(layers.backend, CUDA) == "triton"
    layers.to(CUDA)(torch.zeros(2, 1, 5, device=CUDA))[0].sum().backward()
