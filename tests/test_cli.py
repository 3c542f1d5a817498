"""The command line as a process: help, composition, completion, and one line for every mistake."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY, Vdrop
from tests.processes import ForkServer, environment
from vdrop_cli import cli
from vdrop_cli.sinks import read_log

SMALL_TEXT = ["data=text", "data.train=t", "data.valid=t", "data.test=t"]


def test_help_lists_the_commands_and_does_not_import_torch(vdrop: Vdrop) -> None:
    ran = vdrop("--help")
    assert ran.returncode == 0 and all(command in ran.stdout for command in cli.COMMANDS)
    code = (
        "import sys; sys.argv[1:] = ['--help']; from vdrop_cli.cli import main; main(); assert not "
        "{'torch', 'hydra'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    assert vdrop().stdout == ran.stdout


def test_windows_is_refused_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit) as caught:
        cli.run("train", [])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("vdrop: the commands need Linux or macOS; use WSL, or import")


@pytest.mark.parametrize("command", ["train", "eval", "data"])
def test_help_of_a_command_shows_examples_groups_and_settings_without_torch(
    vdrop: Vdrop, command: str
) -> None:
    code = (
        f"import sys; sys.argv = ['vdrop', '{command}', '--help']; from vdrop_cli.cli import main\n"
        "try: main()\nexcept SystemExit as e: assert not e.code\nassert 'torch' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert f"vdrop {command}" in ran.stdout and "examples:" in ran.stdout and "hydra." not in ran.stdout
    if command == "train":
        assert "dropout: moon, moon_word, naive, naive_word, none, variational, " in ran.stdout
        assert "model.hidden_size=650 " in ran.stdout
    groups = set(re.findall(r"^  ([a-z/]+): .*,", ran.stdout, re.MULTILINE))
    taken = {
        "train": {"model", "dropout", "data", "schedule", "task", "experiment"},
        "eval": set(),
        "data": {"data"},
    }
    assert groups == taken[command], "those that it takes, and no others"


def test_a_reader_who_has_seen_enough_is_no_fault(tmp_path: Path) -> None:
    """As `head -1`, which closes its end of the pipe."""
    command = [sys.executable, "-m", "vdrop_cli", "data"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        stderr = process.stderr.read()
    assert process.returncode == 141 and stderr == "", stderr


def test_cfg_job_shows_the_settings_resolved(vdrop: Vdrop) -> None:
    ran = vdrop("train", "model=lstm_large", "dropout=variational", "schedule.epochs=7", "--cfg", "job")
    assert ran.returncode == 0
    for line in ("p_h: 0.3", "p_x: 0.5", "max_epoch: 10", "epochs: 7", "hidden_size: 1500", "bptt: 35"):
        assert f"  {line}\n" in ran.stdout
    assert "${" not in ran.stdout


def test_a_config_folder_of_ones_own_adds_choices(vdrop: Vdrop, tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "short.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /dropout: naive\nschedule:\n  epochs: 7\n"
    )
    for options in (["--config-dir", "mine"], ["--config-dir=mine"], ["-cd", "mine"]):
        for words in (["train", *options], [*options, "train"]):
            ran = vdrop(*words, "experiment=short", "--cfg", "job")
            assert ran.returncode == 0 and "policy: naive\n" in ran.stdout and "epochs: 7\n" in ran.stdout
    (tmp_path / "mine" / "dropout").mkdir()
    (tmp_path / "mine" / "dropout" / "naive.yaml").write_text("name: naive\npolicy: naive\np_h: 0.9\n")
    ran = vdrop("train", "--config-dir", "mine", "model=lstm_small", "dropout=naive", "--cfg", "job")
    assert ran.returncode == 0 and "  p_h: 0.25\n" in ran.stdout, "one of vdrop's name is vdrop's"
    ran = vdrop("train", "experiment=short", "--cfg", "job")
    assert ran.returncode == 2 and "experiment=short" in ran.stderr


MISTAKES = {  # what is typed: what the one line must say
    ("trian",): "trian is not a command; did you mean train?",
    ("train", "model.hiden=10"): "model.hiden is not a setting; did you mean model.hidden_size?",
    ("train", "--epochs", "5"): "epochs=…",
    ("train", "lstm_small"): "lstm_small is not key=value; did you mean model=lstm_small?",
    ("train", "naive"): "did you mean dropout=naive?",
    ("train", "model=small"): "model=small is an unknown choice; choose from gru_small, lstm_small",
    ("train", "dropout=0.5"): "dropout takes the name of a choice",
    ("train", "data=my/text.txt"): "data=my/text.txt is an unknown choice; a text of your own is data=text",
    ("generate",): "vdrop predict sample=50",
    ("train", "learning_rat=1"): "learning_rat is not a setting; did you mean schedule.lr?",
    ("train", "num_layer=1"): "num_layer is not a setting; did you mean model.layers?",
    ("reproduce", "lr=1"): "vdrop train has schedule.lr; here, overrides='schedule.lr=…' sets it",
    ("train", "+model.hiden=10"): "model.hiden is not a setting; did you mean model.hidden_size?",
    ("train", "model.layers=two"): "model.layers must be a whole number, got two",
    ("train", "seed=1-3"): "vdrop: seed must be a whole number, got 1-3",
    ("train", "dropout.p_x=50%"): "dropout.p_x must be a number, got 50%",
    ("train", "drpout=naive"): "drpout is not a setting; did you mean dropout?",
    (
        "train",
        "schedule.optimiser=adam",
    ): "schedule.lr must be at most 0.1 with schedule.optimiser=adam, for ex",
    ("train", "data.train=a.txt"): "data.train must be unset with data=ptb, got a.txt; it is for data=text",
    ("predict", "checkpoint=x", "level=0.95"): "level must be in [1, 100), or null, got 0.95",
    ("train", "model=lstm_huge"): "model=lstm_huge is an unknown choice; did you mean lstm_large?",
    ("train", "dropout=variatonal"): "dropout=variatonal is an unknown choice; did you mean variational",
    ("train", "experiment=typo"): "experiment=typo is an unknown choice",
    ("train", "dropout.p_h=1.5"): "dropout.p_h must be in [0, 1), got 1.5",
    ("train", "dropout=moon", "model=gru_small"): "dropout must be another policy than moon with a GRU",
    (
        "train",
        "backend=cudnn",
    ): "backend=cudnn: Invalid value 'cudnn', expected one of [auto, reference, fused, native, triton]",
    ("train", "device=cuda:99", "data=pydoc"): "device=cuda:99 is not on this machine",
    ("train", "data.dir=nowhere"): "data.dir=nowhere has no ptb.train.txt; set data.dir",
    (
        "train",
        "data=text",
        "data.train=no",
        "data.valid=no",
        "data.test=no",
    ): "data.train=no cannot be read (No such file or directory)",
    ("train", "model.layers"): "model.layers is not key=value; give it a value: model.layers=…",
    (
        "train",
        "data=pydoc",
        "task.batch_size=5000",
    ): "task.batch_size=5000 × task.bptt=35 does not fit the train part of pydoc_data.topics",
    (
        "train",
        *TINY,
        "data=pydoc",
        "outputs=file",
    ): "outputs=file: file/train/language_model-lstm_small-variational/",
    ("eval",): "checkpoint must be a checkpoint file or a run folder",
    ("eval", "checkpoint=nowhere"): "checkpoint=nowhere does not exist",
    ("eval", "checkpoint=file"): "checkpoint=file is damaged or not a checkpoint",
    ("eval", "model=lstm_large"): "is not a setting",
    ("eval", "checkpoint=file", "batch_size=9"): "vdrop train has task.batch_size",
    ("data", "data=no"): "data=no is an unknown choice",
    ("train", "model=null"): "a group takes the name of a choice, not null or a number",
    ("train", "--nope"): "--nope is not an option",
    ("train", "dropout.name=../../x"): "dropout.name must be letters, digits, _ . and -",
    ("train", "schedule.lr=1e42"): "schedule.lr must be above 0",
    ("data", "data.dir=x"): "needs a corpus to belong to; choose it too",
    ("train", "published.row=x"): "published.row is not a setting",
    ("train", "experiment=table1_medium_untie"): r"unknown choice; did you mean table1_medium_untied?",
    ("reproduce", "protocols=[clean]"): "protocols must be null with study=table1",
    ("reproduce", "study=film_reviews", "sizes=[small]"): "sizes must be null with study=film_reviews",
    ("reproduce", "study=baselines", "mc_batch=5"): "mc_batch must be null with study=baselines",
    (
        "reproduce",
        "study=baselines",
        "rows=[quick]",
    ): "quick is not a row of study=baselines; did you mean quick_tied",
    ("eval", "checkpoint=file", "word_dropout=true"): "word_dropout must be null without mc_samples",
    (
        "eval",
        "checkpoint=file",
        "mc_batch=9",
    ): "mc_batch must be null without mc_samples, which it is for, got 9",
    ("eval", "checkpoint=file", "seed=2"): "seed must be 1 without mc_samples",
    ("compare", "file", "outputs=here"): "outputs must be outputs without tags, or with runs, got here",
    ("export", "checkpoint=file", "private=false"): "private must be true without push",
    ("train", f"model.hidden_size={'9' * 5000}"): "model.hidden_size must be a number with fewer digits",
    ("train", f"schedule.lr={'9' * 350}"): "schedule.lr must be a number with fewer digits",
    ("compare",): "runs must be folders of runs",
    ("compare", "nowhere"): "nowhere is not a run folder",
    ("compare", "nowhere", "--picture", "curves.png"): "picture=…",
    ("train", "--seed", "3"): "seed=…",
    ("train", "--cfg"): "--cfg must be one of job, hydra, all",
    ("train", "--resolve=yes"): "--resolve=yes is not an option",
    ("train", "--config-dir"): "--config-dir needs a folder",
    ("train", "--config-dir", "nowhere"): "nowhere",
    ("train", "-m", "hydra/sweeper=basic", "seed=1,2"): "hydra/sweeper must be",
    ("train", "hydra/launcher=joblib", "seed=1"): "hydra/launcher=joblib: a launcher is for sweeps; add -m",
    ("reproduce", "hydra/launcher=joblib"): "a launcher is for sweeps; use launcher=",
    ("reproduce", "launcher=joblibb"): "launcher=joblibb: hydra/launcher=joblibb is an unknown choice",
    ("reproduce", "launcher=joblib hydra.launcher.jobs=2"): "hydra.launcher.jobs is not a setting",
    ("reproduce", "launcher=submitit_slurm"): "device must be that of the runs, not auto, with launcher=subm",
    ("reproduce", "seed=5"): "vdrop reproduce takes seeds=…",
    ("reproduce", "force=true"): "remove the run folders, or use vdrop train",
    ("reproduce", "overrides=seed=5"): "seed must be unset in overrides=seed=5; vdrop reproduce takes seeds",
    ("reproduce", "overrides=precision=fp32"): "precision must be unset in overrides=precision=fp32; give",
    ("train", "-m", "experiment=glob(typo_*)"): "experiment=glob(typo_*)': there is nothing to run",
    ("train", "-m", "seed=range(1,1)"): "there is nothing to run",
    ("train", "-m", "model=lstm_small", "seed=1,2,2"): "model=lstm_small seed=2 is listed twice",
}


@pytest.mark.parametrize("typed", MISTAKES, ids=lambda typed: " ".join(typed)[:100])
def test_a_mistake_gets_one_line_and_exit_code_2(
    vdrop: Vdrop, tmp_path: Path, typed: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("in the way\n")
    ran = vdrop(*typed)
    assert ran.returncode == 2
    assert ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert line.startswith("vdrop: ") and MISTAKES[typed] in line
    assert not (tmp_path / "outputs").exists(), "nothing is left behind"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the train part of t, t, t is empty"),
        (b"ab\xff", "the train part of t, t, t is not UTF-8 (invalid start byte at byte 2)"),
    ],
)
def test_a_bad_text_gets_one_line_and_exit_code_2(
    vdrop: Vdrop, tmp_path: Path, content: bytes, said: str
) -> None:
    (tmp_path / "t").write_bytes(content)
    ran = vdrop("train", *TINY, *SMALL_TEXT)
    assert (ran.returncode, len(ran.stderr.splitlines())) == (2, 1) and said in ran.stderr


@pytest.mark.native
def test_train_eval_and_again(vdrop: Vdrop, text: list[str], tmp_path: Path) -> None:
    """The whole way a user goes: train, the same again, evaluate the folder and the file, evaluate
    wrongly.
    """
    ran = vdrop("train", *TINY, *text)
    assert ran.returncode == 0, ran.stderr
    (folder,) = (tmp_path / "outputs" / "train").glob("*/*")
    names = {path.name for path in folder.iterdir() if not path.name.startswith("events")}
    assert names == {"config.yaml", "log.jsonl", "result.json", "checkpoint-0001.pt"}
    assert (
        "test_ppl" in ran.stdout
        and "epoch 1/1: valid_ppl_batched" in ran.stderr
        and "back end native" in ran.stderr
    )
    again = vdrop("train", *TINY, *text)
    assert (
        again.returncode == 0
        and "is finished; force=true starts over" in again.stdout
        and "epoch 1/1" not in again.stderr
    )
    trained = [line for line in ran.stdout.splitlines() if line.startswith(("valid_ppl", "test_ppl"))]
    for name in (folder, folder / "checkpoint-0001.pt"):
        evaluated = vdrop("eval", f"checkpoint={name}", "mc_samples=3", "stored_data=true")
        assert evaluated.returncode == 0, evaluated.stderr
        assert [line.split() for line in evaluated.stdout.splitlines()[: len(trained)]] == [
            line.split() for line in trained
        ]
        assert "test_ppl_mc3" in evaluated.stdout
    assert (folder / "eval-0001-mc3-s1.json").exists()
    wrong = vdrop("eval", f"checkpoint={folder}", "data.dir=.", "stored_data=true")
    assert wrong.returncode == 2 and "data.dir must be unset with data=text" in wrong.stderr
    changed = Path(text[-1].split("=")[1])
    original = changed.read_text()
    try:
        changed.write_text(original + "w1 w2\n")
        other = vdrop("eval", f"checkpoint={folder}", "stored_data=true")
    finally:
        changed.write_text(original)
    assert (
        other.returncode == 2
        and "was trained on another corpus" in other.stderr
        and len(other.stderr.splitlines()) == 1
    )
    assert not torch.load(folder / "checkpoint-0001.pt", weights_only=True)["config"]["force"]


def test_a_sweep_runs_every_combination(vdrop: Vdrop, text: list[str], tmp_path: Path) -> None:
    ran = vdrop("train", "-m", *TINY, *text, "dropout=none,variational", "seed=1,2")
    assert ran.returncode == 0, ran.stderr
    folders = {path.parent.relative_to(tmp_path).parts[2:] for path in tmp_path.rglob("result.json")}
    assert len(folders) == 4 and {row for row, _ in folders} == {
        "language_model-lstm_small-none",
        "language_model-lstm_small-variational",
    }
    assert {folder[-3:] for _, folder in folders} == {"-s1", "-s2"}
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}, "nothing lies about"


def test_in_a_sweep_a_failed_run_does_not_take_the_others_along(
    vdrop: Vdrop, text: list[str], tmp_path: Path
) -> None:
    """One diverges, one is impossible, one works: it is run, and the exit code is that of the worst."""
    ran = vdrop("train", "-m", *TINY, *text, "outputs=runs", "schedule.clip=inf", "schedule.lr=2e38,1,-1")
    assert ran.returncode == 2
    assert len(list(tmp_path.rglob("result.json"))) == 1
    lines = [line for line in ran.stderr.splitlines() if line.startswith("vdrop: ")]
    assert "the loss is" in lines[0] or "the validation perplexity is" in lines[0]
    assert "schedule.lr must be above 0" in lines[1] and lines[2] == "vdrop: 3 runs: 1 done, 2 failed"
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("vdrop ", set(cli.COMMANDS)),
        (
            "vdrop train dropout=var",
            {"dropout=variational", "dropout=variational_no_word", "dropout=variational_untied"},
        ),
        (
            "vdrop train dropout.p_",
            {f"dropout.p_{place}=" for place in ("word", "x", "between", "h", "c", "out", "head", "weight")},
        ),
        ("vdrop eval checkpoint=v", {"checkpoint=vdrop"}),
    ],
)
def test_bash_completes_commands_groups_and_keys(line: str, expected: set[str], tmp_path: Path) -> None:
    """A real bash with the real script."""
    program = tmp_path / "vdrop"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m vdrop_cli "$@"\n')
    program.chmod(0o755)
    words = line.split(" ")
    script = (
        f'eval "$(vdrop completion)"; COMP_LINE="{line}"; COMP_POINT={len(line)}; COMP_WORDS=({line} ""); '
        f"COMP_CWORD={len(words) - 1}\n"
        '_vdrop; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    ran = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=environment(PATH=path), cwd=tmp_path
    )
    assert set(ran.stdout.split()) == expected, ran.stderr


@pytest.mark.parametrize(
    ("limit", "more", "named"),
    [
        (90_000, ["model.hidden_size=64", "schedule.epochs=2"], "checkpoint-0001.pt"),
        (30_000, ["model.hidden_size=2", "schedule.epochs=4"], ""),
    ],
)
def test_a_disk_that_is_full_stops_a_run_by_name_and_what_was_there_stays_good(
    limit: int, more: list[str], named: str, text: list[str], fork_server: ForkServer, tmp_path: Path
) -> None:
    """Files may not grow beyond a limit: the checkpoint does at once, or the log and TensorBoard's events
    when they have got long.
    """
    command = ["train", *TINY, *text, *more, "log_every=1"]
    with fork_server.spawn(tmp_path, *command) as process:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        _, stderr = process.communicate()
    (said,) = [line for line in stderr.splitlines() if line.startswith("vdrop: ")]
    assert process.returncode == 1 and "Traceback" not in stderr, stderr
    assert (
        f"{named} cannot be written (File too large); make room, or check the disk" in said
        and "outputs/train/" in said
    )
    assert read_log(next(tmp_path.rglob("log.jsonl")))
    again = fork_server.run(tmp_path, *command)
    assert again.returncode == 0 and "is damaged" not in again.stderr
    steps = [
        record["step"] for record in read_log(next(tmp_path.rglob("log.jsonl"))) if record["kind"] == "step"
    ]
    assert steps == list(range(1, len(steps) + 1))
