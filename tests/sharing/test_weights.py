"""`vdrop export`: what another program reads, and vdrop itself."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY, settings
from tests.sharing import exports
from vdrop_cli import checkpoint, files, trained_model
from vdrop_cli.commands import eval as evaluation
from vdrop_cli.commands import export, predict, train
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.compose import restore
from vdrop_cli.sharing import weights

safe_open = pytest.importorskip("safetensors").safe_open
load_file = pytest.importorskip("safetensors.torch").load_file
save_file = pytest.importorskip("safetensors.torch").save_file
encode = pytest.importorskip("safetensors.torch").save


def test_the_weights_are_those_of_the_checkpoint_and_the_settings_are_with_them(
    text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train.run(settings(*TINY, *text))
    folder = next(Path().rglob("result.json")).parent
    original = checkpoint.load(checkpoint.all_in(folder)[0])
    for more, target in (
        ([], folder / "checkpoint-0001.safetensors"),
        (["file=there.safetensors"], Path("there.safetensors")),
    ):
        export.run(settings(f"checkpoint={folder}", *more, command="export"))
        weights = load_file(target)
        assert weights.keys() == original.model.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in original.model.items())
        with safe_open(target, "pt") as file:
            metadata = file.metadata()
        assert restore(json.loads(metadata["config"])) == original.train and metadata["epoch"] == "1"


def test_one_model_has_one_file(text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of evaluations hold its checksum, and safetensors writes metadata in random order."""
    monkeypatch.chdir(tmp_path)
    train.run(settings(*TINY, *text))
    snapshot = checkpoint.load(next(Path().rglob("checkpoint-*.pt")))
    written = [weights.encode(snapshot) for _ in range(5)]
    assert len(set(written)) == 1 and int.from_bytes(written[0][:8], "little") % 8 == 0


def evaluated(named: Path, *overrides: str) -> dict[str, Any]:
    """The results of an evaluation, which it removes."""
    evaluation.run(
        settings(f"checkpoint={named}", "stored_data=true", "device=cpu", *overrides, command="eval")
    )
    (path,) = (path for path in Path().rglob("*-mc3-s1*.json"))
    results: dict[str, Any] = json.loads(path.read_text())
    path.unlink()
    return results


@pytest.mark.parametrize("task", ["language_model", "sentiment"])
def test_an_export_predicts_and_is_evaluated_as_its_checkpoint_is(
    task: str,
    text: list[str],
    rated: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the file and by the folder; also with the average of the weights, and with an infinite setting."""
    monkeypatch.chdir(tmp_path)
    if task == "language_model":
        more = [
            "schedule.average_decay=0.9",
            "schedule.average_from=1",
            "schedule.epochs=2",
            "schedule.clip=inf",
        ]
        run = exports.language_model(text, "dropout=variational", *more)
        assert checkpoint.load(checkpoint.find(str(run))).average
    else:
        run = exports.model_of_ratings(rated, "dropout=variational")
    export.run(settings(f"checkpoint={run}", "file=one.safetensors", command="export"))
    export.run(settings(f"checkpoint={run}", "folder=shared", command="export"))
    row = exports.predicted(run, "w1 w2 good1", capsys, "mc_samples=3")
    results = evaluated(run, "mc_samples=3")
    paths = data_paths(run)
    for named in (Path("one.safetensors"), Path("shared"), Path("shared/model.safetensors")):
        assert exports.predicted(named, "w1 w2 good1", capsys, "mc_samples=3") == row
        is_file = named.name == "one.safetensors"
        export_results = evaluated(named, "mc_samples=3", *([] if is_file else ["stored_data=false", *paths]))
        assert export_results["metrics"] == results["metrics"] and export_results["mc"] == results["mc"]
        assert export_results["epoch"] == results["epoch"]


def data_paths(run: Path) -> list[str]:
    """The overrides that name the data of a run."""
    data = vars(checkpoint.load(checkpoint.find(str(run))).train.data)
    return [f"data.{name}={data[name]}" for name in ("train", "valid", "test", "csv") if data.get(name)]


def test_members_can_be_exports_and_each_model_counts_once(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All exports have the same name, so their content names the results."""
    monkeypatch.chdir(tmp_path)
    for name, folder in zip(("a", "b"), runs, strict=True):
        export.run(settings(f"checkpoint={folder}", f"folder={name}", command="export"))
    Path("other.txt").write_text("w1 w2 w3\n" * 20)

    def together(first: Path, second: Path) -> tuple[str, Any]:
        before = set(first.glob("*-ensemble2-*.json"))
        command = (f"checkpoint={first}", f"members=[{second}]", "file=other.txt", "device=cpu")
        evaluation.run(settings(*command, command="eval"))
        (path,) = set(first.glob("*-ensemble2-*.json")) - before
        results = json.loads(path.read_text())
        assert len(results["models"]) == 2
        path.unlink()
        return path.name, results["metrics"]["file_ppl"]

    a, b = Path("a"), Path("b")
    name, value = together(a, b)
    assert name.startswith("model.safetensors-ensemble2-")
    copies = tuple(shutil.copytree(folder, tmp_path / "copies" / folder.name) for folder in runs)
    assert together(a, copies[1])[1] == value == together(copies[0], b)[1]
    for twice in (copies[0], a / "model.safetensors"):
        with pytest.raises(ConfigError, match=r"^members(:| must be) .*(is the same model as|each once)"):
            together(a, twice)


def test_results_of_an_export_are_its_own_and_those_of_its_content(
    run: Path, rated: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default file lies in the run folder, and a later export may have the same name."""
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(run, tmp_path / "copy")
    export.run(settings(f"checkpoint={copy}", command="export"))
    Path("other.txt").write_text("w1 w2 w3\n" * 20)
    path = copy / "checkpoint-0001.safetensors"
    evaluation.run(settings(f"checkpoint={path}", "file=other.txt", "device=cpu", command="eval"))
    (results,) = copy.glob("*-file_*.json")
    assert results.name.startswith("eval-0001.safetensors-standard-file_")
    assert trained_model.find(str(copy)).suffix == ".pt", "a run folder is its checkpoint"
    noises = []
    for seed in (1, 2):
        critic = exports.model_of_ratings(rated, f"seed={seed}", "dropout=variational", "task.protocol=clean")
        export.run(settings(f"checkpoint={critic}", "folder=shared", command="export"))
        named = ("checkpoint=shared", "mc_samples=3", "device=cpu")
        if seed == 2:
            with pytest.raises(
                ConfigError, match=r"^interval=conformal takes the errors .*data\.csv=… first"
            ):
                predict.run(settings(*named, "text=good1", "interval=conformal", command="predict"))
        evaluation.run(settings(*named, *data_paths(critic), command="eval"))
        content = json.loads(Path("shared/model.safetensors-mc3-s1.json").read_text())
        noises.append(content["metrics"]["noise_mc3"])
        predict.run(settings(*named, "text=good1", command="predict"))
    assert noises[0] != noises[1]


def test_a_file_that_is_no_export_is_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    export.run(settings(f"checkpoint={run}", "file=good.safetensors", command="export"))
    content = load_file("good.safetensors")
    with safe_open("good.safetensors", "pt") as file:
        metadata = file.metadata()
    double = content | {"head_bias": content["head_bias"].double()}
    broken = content | {"head_bias": content["head_bias"] * float("nan")}
    fewer = {name: weight for name, weight in content.items() if name != "head_bias"}
    good = Path("good.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(good[:-4])
    Path("bit.safetensors").write_bytes(good[:-2] + bytes([good[-2] ^ 1]) + good[-1:])
    for name, tensors, texts, reason in (
        ("foreign", content, {"format": "pt"}, "config is missing"),
        ("bare", content, None, "__metadata__ is missing"),
        ("lacks", content, metadata | {"vocabulary": "[]"}, "what it has learned of its text is not as"),
        ("settings", content, metadata | {"config": '{"model": 3}'}, "its settings are not those of"),
        ("epoch", content, metadata | {"epoch": "-1"}, "epoch and batch must be whole numbers"),
        ("double", double, metadata, "a weight is no tensor of float32"),
        ("nan", broken, metadata, "a weight is not finite"),
        ("cut", None, None, "damaged, or no export of vdrop"),
        ("bit", None, None, "its numbers do not fit its checksum"),
        ("missing", None, None, "does not exist; name a file or a folder of vdrop export"),
        ("fewer", fewer, metadata, "it does not hold the weights that its settings describe"),
    ):
        if tensors is not None:
            if "sha256" in (texts or {}):
                numbers = weights.split(encode(tensors))[1]
                texts = texts | {"sha256": hashlib.sha256(numbers).hexdigest()}
            save_file(tensors, f"{name}.safetensors", texts)
        with pytest.raises(ConfigError, match=rf"^checkpoint={name}\.safetensors .*{reason}"):
            predict.run(settings(f"checkpoint={name}.safetensors", "text=w1", command="predict"))
    with pytest.raises(
        ConfigError, match=r"^checkpoint=good\.safetensors is an export already; name a checkpoint"
    ):
        export.run(settings("checkpoint=good.safetensors", "file=again.safetensors", command="export"))
    with pytest.raises(ConfigError, match=r"^file must end with \.safetensors, .* got again\.bin"):
        export.run(settings(f"checkpoint={run}", "file=again.bin", command="export"))
    entry = {"dtype": "X", "shape": [], "data_offsets": [0, 0]}
    start = {"a\x1b[31m": entry, "__metadata__": {"config": "{}", "epoch": "1"}}
    header = json.dumps(start).encode()
    Path("colour.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ConfigError) as error:
        predict.run(settings("checkpoint=colour.safetensors", "text=w1", command="predict"))
    assert "\x1b" not in str(error.value)


def test_it_is_whole_whatever_the_weights_memory_is_like(
    text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that share memory or are not in order; a vocabulary beside them; names that are not the model's
    are refused.
    """
    monkeypatch.chdir(tmp_path)
    train.run(settings(*TINY, *text))
    (path,) = Path().rglob("checkpoint-0001.pt")
    original = checkpoint.load(path)
    changed = original.model | {
        "head_weight": original.model["embedding"],
        "layers.weight_hh_l0": original.model["layers.weight_hh_l0"].t().contiguous().t(),
    }
    assert not changed["layers.weight_hh_l0"].is_contiguous()
    files.write_tensors(
        Path("shared.pt"), {"format": checkpoint.FORMAT, **vars(replace(original, model=changed))}
    )
    export.run(settings("checkpoint=shared.pt", command="export"))
    weights = load_file("shared.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in changed.items())
    with safe_open("shared.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["vocabulary"]) == original.learned["vocabulary"] and len(
        original.learned["vocabulary"]
    ) == len(weights["embedding"])
    assert json.loads(metadata["line_end"]) == "<eos>" and all(
        isinstance(value, str) for value in metadata.values()
    )
    for wrong in (
        {f"{name}_": weight for name, weight in original.model.items()},
        original.model | {"embedding": original.model["embedding"][1:]},
    ):
        files.write_tensors(
            Path("wrong.pt"), {"format": checkpoint.FORMAT, **vars(replace(original, model=wrong))}
        )
        with pytest.raises(ConfigError, match=r"^checkpoint=wrong\.pt cannot be used: "):
            export.run(settings("checkpoint=wrong.pt", command="export"))
        assert not Path("wrong.safetensors").exists()


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_written(
    text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train.run(settings(*TINY, *text))
    (path,) = Path().rglob("checkpoint-0001.pt")
    before = path.read_bytes()
    for file in ("''", ".", "/", "..", str(path.parent)):
        with pytest.raises(ConfigError, match="file must name a file, not a folder"):
            export.run(settings(f"checkpoint={path}", f"file={file}", command="export"))
    with pytest.raises(ConfigError, match="another one than the checkpoint"):
        export.run(settings(f"checkpoint={path.parent}", f"file={path}", command="export"))
    assert path.read_bytes() == before
    export.run(settings(f"checkpoint={path}", "file=new/a.safetensors", command="export"))
    assert Path("new/a.safetensors").is_file()


def test_only_what_it_has_written_is_overwritten(
    text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train.run(settings(*TINY, *text))
    (path,) = Path().rglob("checkpoint-0001.pt")
    save_file({"w": torch.zeros(2)}, "theirs.safetensors")
    for name, content in (
        ("mine.safetensors", b"mine"),
        ("short.safetensors", b"\x05"),
        ("list.safetensors", (2).to_bytes(8, "little") + b"[]"),
    ):
        Path(name).write_bytes(content)
    for name in ("mine.safetensors", "short.safetensors", "list.safetensors", "theirs.safetensors"):
        before = Path(name).read_bytes()
        with pytest.raises(ConfigError, match=rf"{name} was not written by vdrop, .*; choose another file="):
            export.run(settings(f"checkpoint={path}", f"file={name}", command="export"))
        assert Path(name).read_bytes() == before
    Path("empty.safetensors").touch()
    Path("link.safetensors").symlink_to("empty.safetensors")
    for name in ("empty.safetensors", "empty.safetensors", "link.safetensors"):
        export.run(settings(f"checkpoint={path}", f"file={name}", command="export"))
    assert (
        Path("link.safetensors").is_symlink()
        and load_file("empty.safetensors").keys() == checkpoint.load(path).model.keys()
    )


@pytest.mark.parametrize("word", ["é" * 6_000_000, "half \ud800"])
def test_what_it_has_written_is_its_own_whatever_the_vocabulary(
    word: str, text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long: words are written as they are, but for what is no character."""
    monkeypatch.chdir(tmp_path)
    train.run(settings(*TINY, *text))
    original = checkpoint.load(next(Path().rglob("checkpoint-0001.pt")))
    vocabulary = [word, *original.learned["vocabulary"][1:]]
    files.write_tensors(
        Path("a.pt"),
        {
            "format": checkpoint.FORMAT,
            **vars(replace(original, learned=original.learned | {"vocabulary": vocabulary})),
        },
    )
    for _ in range(2):
        export.run(settings("checkpoint=a.pt", command="export"))
    with safe_open("a.safetensors", "pt") as file:
        stored_vocabulary = file.metadata()["vocabulary"]
    assert json.loads(stored_vocabulary) == vocabulary and len(stored_vocabulary) < 1.1 * len(word) + 1000


def test_without_a_checkpoint_it_says_so() -> None:
    with pytest.raises(ConfigError, match="checkpoint must be"):
        settings(command="export")
    with pytest.raises(ConfigError, match="checkpoint=nowhere does not exist"):
        export.run(settings("checkpoint=nowhere", command="export"))
