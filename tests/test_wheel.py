"""The built package, away from the checkout."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.processes import environment
from vdrop_cli import __version__

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the checkout, unpacked as an installer would."""
    for package in ("build", "hatchling"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("vdrop-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_it_carries_conf_and_nothing_of_the_tests(unpacked: Path) -> None:
    inside = {
        str(path.relative_to(unpacked / "vdrop_cli" / "conf"))
        for path in (unpacked / "vdrop_cli" / "conf").rglob("*.yaml")
    }
    assert inside == {str(path.relative_to(ROOT / "conf")) for path in (ROOT / "conf").rglob("*.yaml")}
    assert {path.name.split("-")[0] for path in unpacked.iterdir()} == {"vdrop_cli", "vdrop"}


def test_it_is_pure_python_and_carries_the_source_that_is_compiled_on_first_use(unpacked: Path) -> None:
    """A run from it says so, too: the library is built from the source in the wheel."""
    assert (unpacked / "vdrop_cli" / "kernels" / "native.c").read_bytes() == (
        ROOT / "vdrop_cli" / "kernels" / "native.c"
    ).read_bytes()
    assert not [path for suffix in ("so", "o", "pyd") for path in unpacked.rglob(f"*.{suffix}")]
    (tags,) = unpacked.glob("vdrop-*.dist-info/WHEEL")
    assert "Root-Is-Purelib: true" in tags.read_text() and "Tag: py3-none-any" in tags.read_text()


def test_it_runs_from_another_folder(unpacked: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "vdrop_cli", *arguments],
            cwd=tmp_path,
            env=environment(unpacked),
            capture_output=True,
            text=True,
        )

    ran = run("train", "experiment=demo", "model.hidden_size=4", "task.batch_size=100", "schedule.epochs=1")
    assert ran.returncode == 0, ran.stderr
    (result,) = tmp_path.rglob("result.json")
    assert result.is_relative_to(tmp_path / "outputs" / "demo")
    code = "import vdrop_cli.cli; print(vdrop_cli.cli.CONF)"
    where = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(unpacked), capture_output=True, text=True
    )
    assert where.stdout.strip() == str(unpacked / "vdrop_cli" / "conf")


def test_the_source_distribution_has_every_file_of_the_checkout(tmp_path: Path) -> None:
    """So its tests run, and its pages and records are there."""
    pytest.importorskip("hatchling")
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("these tests are not in a git checkout")
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (archive,) = tmp_path.glob("vdrop-*.tar.gz")
    assert archive.name == f"vdrop-{__version__}.tar.gz"
    with tarfile.open(archive) as content:
        inside = {name.partition("/")[2] for name in content.getnames()}
    assert set(listed.stdout.splitlines()) <= inside
    assert not [
        name for name in inside if name.startswith((".venv/", ".hypothesis/", "data/cache", "outputs/train"))
    ]


def test_the_version_is_the_same_wherever_it_is_stated(unpacked: Path) -> None:
    (metadata,) = unpacked.glob("vdrop-*.dist-info/METADATA")
    assert f"\nVersion: {__version__}\n" in metadata.read_text()
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
