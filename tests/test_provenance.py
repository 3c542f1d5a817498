"""What is recorded of the machine and the code."""

import subprocess
from pathlib import Path

import pytest
import torch

from vdrop_cli import provenance
from vdrop_cli.kernels import compiler, native_library


def test_backend_versions_device_and_commit_are_described() -> None:
    description = provenance.describe(torch.device("cpu"), "fused", "bf16")
    assert (description["backend"], description["precision"]) == ("fused", "bf16")
    assert description["torch"] == torch.__version__ and description["threads"] == torch.get_num_threads()
    assert description["device"], "the processor has a name"
    root = Path(provenance.__file__).parent.parent
    if (root / ".git").exists():
        asked = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
        if asked.returncode == 0:  # git reads no checkout of another user
            assert description["commit"] == asked.stdout.strip() and isinstance(description["dirty"], bool)


def test_the_processor_has_its_model_as_numbers() -> None:
    """As /proc/cpuinfo has them."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    reported = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    description = provenance.describe(torch.device("cpu"), "fused", "fp32")
    if reported.get("cpu family") and reported.get("model"):
        expected = f"family {reported['cpu family']}, model {reported['model']}"
    elif reported.get("CPU implementer") and reported.get("CPU part"):
        expected = f"implementer {reported['CPU implementer']}, part {reported['CPU part']}"
    else:
        expected = None
    assert description.get("processor_model") == expected


@pytest.mark.parametrize(
    ("reported", "expected"),
    [
        ({"cpu family": "26", "model": "2"}, {"processor_model": "family 26, model 2"}),
        (
            {"CPU implementer": "0x41", "CPU part": "0xd40"},
            {"processor_model": "implementer 0x41, part 0xd40"},
        ),
        ({"model": "0"}, {}),
        ({}, {}),
    ],
)
def test_numbers_that_the_system_does_not_report_are_left_out(
    reported: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "cpuinfo", lambda name: reported.get(name, ""))
    assert provenance.processor_details() == expected


@pytest.mark.parametrize("backend", ["native"])
def test_compiler_and_extensions_of_a_compiled_back_end_are_described(backend: str) -> None:
    description = provenance.describe(torch.device("cpu"), backend, "bf16")
    assert (
        description["processor_features"] == ", ".join(native_library.features())
        and description["compiler"]
        and compiler.version(*compiler.compiler()).startswith(description["compiler"])
    )
    assert "compiler" not in provenance.describe(torch.device("cpu"), "fused", "bf16")


def test_without_a_checkout_the_commit_is_the_stated_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the code differs from it is then unknown. A folder named .git that git cannot read is no
    checkout.
    """
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "vdrop_cli" / "provenance.py"))
    monkeypatch.delenv("VDROP_COMMIT", raising=False)
    assert provenance.commit().keys() == {"files"}
    for stated in ("0123abc", "ABCDEF" * 6 + "abcd", "f" * 64):
        monkeypatch.setenv("VDROP_COMMIT", stated)
        description = provenance.describe(torch.device("cpu"), "fused", "fp32")
        assert (description["commit"], description["dirty"]) == (
            stated.lower(),
            None,
        ) and "code" not in description
    (tmp_path / ".git").mkdir()
    assert provenance.commit()["commit"] == "f" * 64


def test_an_installed_copy_is_known_by_its_files_and_the_commit_that_pip_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "vdrop_cli" / "provenance.py"))
    monkeypatch.delenv("VDROP_COMMIT", raising=False)
    digests = []
    for name, content in (
        ("vdrop_cli/provenance.py", "a"),
        ("vdrop_cli/provenance.py", "b"),
        ("vdrop_cli/kernels/native.c", "a"),
        ("vdrop_cli/conf/train.yaml", "a"),
        ("vdrop_cli/conf/eval.yaml", "a"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
        digests.append(provenance.commit()["files"])
    (tmp_path / "vdrop_cli" / "provenance.pyc").write_text("compiled")
    assert len(set(digests)) == 5 and provenance.commit() == {"files": digests[-1]}
    metadata = tmp_path / "vdrop-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vdrop\nVersion: 0.1.0\n")
    (metadata / "direct_url.json").write_text('{"url": "file:///a", "dir_info": {}}')
    assert provenance.commit() == {"files": digests[-1]}
    (metadata / "direct_url.json").write_text(
        '{"url": "a", "vcs_info": {"vcs": "git", "commit_id": "0123abc"}}'
    )
    assert provenance.commit() == {"files": digests[-1], "commit": "0123abc", "dirty": None}
    monkeypatch.setenv("VDROP_COMMIT", "abcdef0")
    assert provenance.commit()["commit"] == "abcdef0"


def test_a_checkout_knows_its_commit_better_than_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VDROP_COMMIT", raising=False)
    before = provenance.commit()
    if "code" not in before:
        pytest.skip("these tests are not in a git checkout")
    monkeypatch.setenv("VDROP_COMMIT", "0123abc")
    assert provenance.commit() == before


def test_pages_and_records_are_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a repository of this test's own, with a page and code."""

    def git(*arguments: str) -> str:
        own = ("user.name=a", "user.email=a@example.org", "commit.gpgsign=false", "core.hooksPath=/dev/null")
        who = [word for setting in own for word in ("-c", setting)]
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    for name in ("vdrop_cli/provenance.py", "conf/train.yaml", "pyproject.toml", "RESULTS.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "a")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "vdrop_cli" / "provenance.py"))
    first = provenance.commit()
    (tmp_path / "RESULTS.md").write_text("b\n")
    assert provenance.commit() == first and not first["dirty"]
    git("commit", "-qam", "b")
    second = provenance.commit()
    assert second["commit"] != first["commit"] and second["code"] == first["code"] == git(
        "rev-parse", "HEAD:vdrop_cli"
    )
    changed = []
    for content in ("b\n", "c\n", "b\n"):
        (tmp_path / "conf" / "train.yaml").write_text(content)
        changed.append(provenance.commit())
    assert all(one["dirty"] for one in changed) and "changes" not in second
    assert changed[0] == changed[2] != changed[1], "what is different has a digest"
    git("checkout", "-q", "conf")
    assert provenance.commit() == second
    (tmp_path / "conf" / "mine.yaml").write_text("lr: 1\n")
    assert provenance.commit() == second, "settings of one's own are no code"
    for content in ("a\n", "b\n"):
        (tmp_path / "vdrop_cli" / "new.py").write_text(content)
        changed.append(provenance.commit())
    assert changed[-1]["dirty"] and changed[-2]["dirty"] and changed[-1] != changed[-2]
    (tmp_path / ".gitignore").write_text("new.py\n")
    assert provenance.commit() == second
