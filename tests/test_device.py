"""The device, precision and process settings that a command chooses."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import mark_long
from vdrop_cli import device
from vdrop_cli.errors import ConfigError
from vdrop_cli.kernels import compiler, operators
from vdrop_cli.kernels.graphs import Graphs
from vdrop_cli.settings.choices import Precision


def test_auto_takes_cuda_where_there_is_one() -> None:
    assert device.choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert device.choose_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["cuda:99", "mps", "cpu:7", "tpu", ""])
def test_a_device_that_is_not_there_is_an_error_that_lists_those_that_are(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device={name} is not .*cpu"):
        device.choose_device(name)


def test_auto_is_bf16_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for flags, chosen in (
        ("fpu avx512f avx512_bf16", Precision.bf16),
        ("fpu avx2", Precision.fp32),
        ("asimd bf16", Precision.bf16),
    ):
        monkeypatch.setattr(compiler, "cpuinfo", lambda name, flags=flags: flags)
        assert device.choose_precision(Precision.auto, cpu) is chosen
        assert device.choose_precision(Precision.fp32, cpu) is Precision.fp32
        assert device.choose_precision(Precision.bf16, cpu) is Precision.bf16


def test_a_gpu_has_500_passes_run_together_the_cpu_50() -> None:
    """The paper's 1,000 are two batches there."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda:1")
    assert [device.choose_mc_batch(None, on, 0.0) for on in (cpu, gpu)] == [50, 500]
    assert [device.choose_mc_batch(3, on, 0.0) for on in (cpu, gpu)] == [3, 3]
    assert [device.choose_mc_batch(setting, cpu, 0.5) for setting in (None, 1)] == [1, 1]
    with pytest.raises(ConfigError, match=r"mc_batch must be 1 or null with dropout\.p_weight=0\.5, got 3"):
        device.choose_mc_batch(3, cpu, 0.5)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel"])
def test_the_library_for_fp32_goes_by_the_processor_and_its_error(
    vendor: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "cpuinfo", lambda name: vendor)
    monkeypatch.setattr(device, "products_are_exact", lambda setting: exact)
    calls = []
    monkeypatch.setattr(device, "retain_freed_memory", lambda: calls.append(True))
    device.configure_process(torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == (
        "medium" if exact and vendor == "AuthenticAMD" else "highest"
    )
    device.configure_process(torch.device("cuda"))
    assert torch.get_float32_matmul_precision() == "highest", "on CUDA that setting is tf32"
    assert calls == [True, True]


def test_exact_products_are_those_of_fp32_and_no_less() -> None:
    a, before = torch.randn(300, 300), torch.get_float32_matmul_precision()
    exact = a.double() @ a.double()
    assert device.is_exact((a @ a).double(), exact)
    assert not device.is_exact((a.bfloat16() @ a.bfloat16()).double(), exact)
    tf32 = (a.view(torch.int32) & -(2**13)).view(torch.float32)  # ten bits of the mantissa
    assert not device.is_exact(tf32.double() @ tf32.double(), exact)
    assert device.products_are_exact("highest")
    assert torch.get_float32_matmul_precision() == before, "it is left as it was"


GROWTH = """
from pathlib import Path
import torch
from tests.conftest import settings
from vdrop_cli import device
from vdrop_cli.bench.steps import training_step
from vdrop_cli.settings.choices import Precision

def memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

device.configure_process(torch.device('cpu'))
overrides = "model=lstm_small", "dropout=variational_untied", "model.hidden_size=64", "device=cpu"
step = training_step(settings(*overrides), Precision.PRECISION)
marks = []
for _ in range(5):
    marks.append(memory())
    for _ in range(STEPS):
        step()
print(min(after - before for before, after in zip(marks[1:], marks[2:])))
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="this system does not report the memory of a process"
)
@pytest.mark.parametrize(
    ("precision", "steps"),
    mark_long([(precision, steps) for precision in ("fp32", "bf16") for steps in (20, 70)], [("bf16", 20)]),
)
def test_a_warm_training_step_asks_for_no_more_memory(precision: str, steps: int) -> None:
    """One that stored its logits would take 16 MB a step. What comes once, when a thread first waits, is
    no growth.
    """
    root = Path(device.__file__).parent.parent
    ran = subprocess.run(
        [sys.executable, "-c", GROWTH.replace("PRECISION", precision).replace("STEPS", str(steps))],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 1024, "kilobytes"


def test_a_gpu_gets_its_memory_back_once_no_loop_uses_the_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied = list[object]()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(operators.ACTIVE_GRAPHS.get()))
    with device.memory_returned(torch.device("cuda")):
        assert isinstance(operators.ACTIVE_GRAPHS.get(), Graphs) and not emptied
    assert emptied == [None]


@pytest.mark.parametrize("stated", ["HEAD", "123456", "f" * 65, "0123abc\n", "0123abg", " "])
def test_a_stated_commit_that_is_none_is_an_error_before_any_work(
    stated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VDROP_COMMIT", stated)
    with pytest.raises(ConfigError, match=r"^VDROP_COMMIT must be a git commit"):
        device.configure_process(torch.device("cpu"))
