"""`vdrop predict`: ratings with intervals, surprises, words of its own; its lines for machines and for
people.
"""

import csv
import io
import itertools
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY, TINY_SENTIMENT, settings
from vdrop_cli import checkpoint, files, learned, output, word_prediction
from vdrop_cli.checkpoint import Checkpoint
from vdrop_cli.commands import eval as evaluation
from vdrop_cli.commands import predict, train
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.evaluation import load
from vdrop_cli.generation import sample_words
from vdrop_cli.learned import Ratings, Words
from vdrop_cli.mc_passes import PassOptions
from vdrop_cli.monte_carlo import mc_perplexity
from vdrop_cli.perplexity import stream_nll
from vdrop_cli.prediction import load as load_model
from vdrop_cli.prediction_inputs import content_of, lines
from vdrop_cli.tasks import Sentiment, WordPredictor

ADAM = ("schedule.optimiser=adam", "schedule.lr=0.02", "schedule.decay=1")
Rows = list[dict[str, Any]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train_in(folder: Path, *overrides: str) -> Path:
    """Trains with this working folder, and returns the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.run(settings(*overrides))
    return folder


def copy_of_run(trained: Path, here: Path) -> Path:
    """The run folder of a copy of the outputs, which a test can change."""
    shutil.copytree(trained / "outputs", here / "outputs")
    return next(here.rglob("result.json")).parent


@pytest.fixture(scope="module")
def trained_critic(rated: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    more = [
        "task.chunk_words=null",
        "task.protocol=clean",
        "schedule.epochs=30",
        "dropout.p_h=0.1",
        "dropout.p_word=0.1",
    ]
    return train_in(tmp_path_factory.mktemp("critic"), *TINY_SENTIMENT, *rated, *more)


@pytest.fixture
def critic(here: Path, trained_critic: Path) -> Path:
    """A run that has learned the share of good words."""
    return copy_of_run(trained_critic, here)


@pytest.fixture(scope="module")
def trained_writer(long_text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    more = ["dropout=none", "model.hidden_size=32", "schedule.epochs=8", *ADAM]
    return train_in(tmp_path_factory.mktemp("writer"), *TINY, *long_text, *more)


@pytest.fixture
def writer(here: Path, trained_writer: Path) -> Path:
    """A language model of the 40 words."""
    return copy_of_run(trained_writer, here)


def predict_rows(capsys: pytest.CaptureFixture[str], folder: Path, *overrides: str) -> Rows:
    capsys.readouterr()
    predict.run(settings(f"checkpoint={folder}", "device=cpu", "format=json", *overrides, command="predict"))
    return [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]


def test_a_good_text_is_rated_above_a_bad_one_with_an_interval_about_it(
    critic: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("texts.txt").write_text("Good1 good2 good3 good1 good0\n\nbad1 bad2 bad3 BAD1 bad0\n")
    good, blank, bad = predict_rows(capsys, critic, "file=texts.txt")
    assert [row["line"] for row in (good, blank, bad)] == [1, 2, 3] and (blank["text"], blank["rating"]) == (
        "",
        None,
    )
    assert good["rating"] > bad["rating"] + 0.3 and good["text"].startswith("Good1")
    for row in (good, bad):
        assert row["low"] < row["rating"] < row["high"] and row["std_model"] > 0
        assert row["high"] - row["rating"] == pytest.approx(row["rating"] - row["low"])
    (narrow,) = predict_rows(capsys, critic, "text='good1 good2 good3 good1 good0'", "level=50")
    assert narrow["rating"] == pytest.approx(good["rating"]), "the same words and the same masks"
    assert (narrow["high"] - narrow["low"]) / (good["high"] - good["low"]) == pytest.approx(
        0.6745 / 1.96, rel=1e-3
    )


def test_a_long_text_is_rated_by_the_mean_over_its_chunks(
    here: Path, rated: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train.run(settings(*TINY_SENTIMENT, *rated, "dropout=none"))
    folder = next(here.rglob("result.json")).parent
    loaded = load_model(settings(f"checkpoint={folder}", command="predict"), torch.device("cpu"))
    words, scale = ["good1"] * 4 + ["bad1"] * 7, loaded.checkpoint.knowledge
    assert isinstance(scale, Ratings)
    chunks = loaded.predictor.cut(words)
    assert [len(chunk) for chunk in chunks] == [6, 6], "with <start>"
    alone = [
        loaded.model(chunk[:, None], torch.tensor([6]), loaded.model.mean_masks()).item() for chunk in chunks
    ]
    (row,) = predict_rows(capsys, folder, f"text='{' '.join(words)}'")
    assert row["rating"] == pytest.approx(scale.mean + scale.deviation * sum(alone) / 2, rel=1e-5)
    with pytest.raises(
        ConfigError, match=r"^mc_samples must be 0 or null, .* was trained without dropout, got 3"
    ):
        predict_rows(capsys, folder, "text=good1", "mc_samples=3")


def test_texts_come_from_standard_input_too(
    critic: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\ufeffgood1\r\nbad1\u2028bad2\n".encode())))
    assert [row["text"] for row in predict_rows(capsys, critic)] == ["good1", "bad1\u2028bad2"]
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ConfigError, match=r"^there is no standard input; give text=… or file=…"):
        predict_rows(capsys, critic)


def test_every_setting_of_it_changes_something(critic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (base,) = predict_rows(capsys, critic, "text=good1 bad2")
    for change in ("mc_samples=3", "seed=2", "precision=bf16", "mc_samples=60"):
        (changed,) = predict_rows(capsys, critic, "text=good1 bad2", change)
        assert changed["rating"] != base["rating"], change
    (standard,) = predict_rows(capsys, critic, "text=good1 bad2", "mc_samples=0")
    assert standard["std_model"] is None and standard["rating"] != base["rating"]


def test_the_noise_is_that_of_the_evaluation_where_there_is_one(
    critic: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((critic / "result.json").read_text())
    predict.run(settings(f"checkpoint={critic}", "text=good1", "device=cpu", command="predict"))
    first = capsys.readouterr()
    assert f"observation noise {result['noise']:.4g}, fitted to the valid part, by the standard" in first.err
    assert (
        "50 passes of MC dropout" in first.err
        and "95 % of ratings in" in first.out
        and first.out.endswith("    good1\n")
    )
    evaluation.run(
        settings(f"checkpoint={critic}", "mc_samples=5", "stored_data=true", "device=cpu", command="eval")
    )
    noise = json.loads(next(critic.glob("eval-*-mc5-s1.json")).read_text())["metrics"]["noise_mc5"]
    (row,) = predict_rows(capsys, critic, "text=good1", "level=68.26894921370859", "mc_samples=5")
    assert row["high"] - row["rating"] == pytest.approx((row["std_model"] ** 2 + noise**2) ** 0.5, rel=1e-6)


def test_the_noise_is_found_whatever_the_name_of_the_checkpoint(
    critic: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where it is known from nothing but the evaluation."""
    original = checkpoint.load(checkpoint.find(str(critic)))
    for name, samples, made, metric in (
        ("best [1].pt", 5, "best [1]-mc5-s1.json", "noise_mc5"),
        ("my-checkpoint.pt", 0, "my-eval-standard.json", "noise"),
    ):
        path = critic / name
        files.write_tensors(
            path,
            {
                "format": checkpoint.FORMAT,
                **vars(replace(original, learned=original.learned | {"noise": None})),
            },
        )
        evaluation.run(
            settings(
                f"checkpoint='{path}'",
                f"mc_samples={samples}",
                "stored_data=true",
                "device=cpu",
                command="eval",
            )
        )
        evaluation_file = json.loads((critic / made).read_text())
        (critic / made).write_text(
            json.dumps(evaluation_file | {"metrics": evaluation_file["metrics"] | {metric: 0.25}})
        )
        (row,) = predict_rows(capsys, critic, f"checkpoint='{path}'", "text=good1", f"mc_samples={samples}")
        assert row["std_noise"] == 0.25
        (critic / made).write_text(json.dumps(evaluation_file | {"models": ["0" * 64]}))
        with pytest.raises(ConfigError, match="first, which fits the observation noise"):
            predict_rows(capsys, critic, f"checkpoint='{path}'", "text=good1", f"mc_samples={samples}")


def test_the_noise_of_another_precision_is_not_taken(
    critic: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation.run(
        settings(f"checkpoint={critic}", "mc_samples=5", "stored_data=true", "device=cpu", command="eval")
    )
    own = next(critic.glob("eval-*-mc5-s1.json"))
    other = own.with_name(f"{own.stem}-bf16.json")
    other.write_text(own.read_text().replace('"noise_mc5": ', '"noise_mc5": 9'))
    (row,) = predict_rows(capsys, critic, "text=good1", "mc_samples=5")
    assert row["std_noise"] == json.loads(own.read_text())["metrics"]["noise_mc5"]
    own.unlink()
    (row,) = predict_rows(capsys, critic, "text=good1", "mc_samples=5")
    assert row["std_noise"] == json.loads((critic / "result.json").read_text())["noise"]


def test_a_text_in_lines_is_one_row_and_what_cannot_be_shown_is_escaped(
    critic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for more, escaped in (
        ([], "good1 bad1 \\u201chm\\u201d"),
        (["format=json"], r"good1\nbad1 \u201chm\u201d"),
    ):
        stdout = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(stdout, encoding="ascii", write_through=True))
        output.prepare()
        predict.run(
            settings(
                f"checkpoint={critic}",
                "text='good1\nbad1 “hm”'",
                "mc_samples=2",
                "device=cpu",
                *more,
                command="predict",
            )
        )
        *_, last = stdout.getvalue().decode().splitlines()
        assert escaped in last
        assert not more or json.loads(last)["text"] == "good1\nbad1 “hm”"


def test_noise_fitted_to_training_data_is_reported(
    rated: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the paper's protocol, which has no validation part."""
    monkeypatch.chdir(tmp_path)
    train.run(settings(*TINY_SENTIMENT, *rated))
    folder = next(Path().rglob("result.json")).parent
    learnt = (
        "fitted to the train part (pieces of 6 words that the model was trained on: intervals are too narrow "
        "where it over-fits, and too wide for longer texts)"
    )
    predict_rows(capsys, folder, "text=good1")
    predict.run(settings(f"checkpoint={folder}", "text=good1", "device=cpu", command="predict"))
    assert learnt in capsys.readouterr().err
    evaluation.run(
        settings(f"checkpoint={folder}", "mc_samples=5", "stored_data=true", "device=cpu", command="eval")
    )
    predict.run(
        settings(f"checkpoint={folder}", "text=good1", "mc_samples=5", "device=cpu", command="predict")
    )
    assert f"{learnt} in {folder}" in capsys.readouterr().err


def test_a_text_of_the_test_part_gets_the_rating_that_the_test_error_is_made_from(
    critic: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded, task = load(
        checkpoint.find(str(critic)),
        settings(f"checkpoint={critic}", "stored_data=true", command="eval"),
        torch.device("cpu"),
    )
    assert isinstance(task, Sentiment)
    part, words = task.parts["test"], {number: word for word, number in task.ids.items()}
    Path("texts.txt").write_text(
        "\n".join(" ".join(words[int(i)] for i in sequence[1:]) for sequence in part.sequences)
    )
    rows = predict_rows(capsys, critic, "file=texts.txt", "mc_samples=0")
    assert [row["rating"] for row in rows] == pytest.approx(
        task.predict(loaded.model, part).tolist(), abs=1e-6
    )


def test_a_damaged_evaluation_is_an_error(critic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (critic / f"{checkpoint.find(str(critic)).stem.replace('checkpoint', 'eval')}-mc50-s1.json").write_text(
        "{"
    )
    with pytest.raises(ConfigError, match=r"eval-\d+-mc50-s1\.json is damaged"):
        predict_rows(capsys, critic, "text=good1")


def test_a_language_model_names_the_words_it_expects_least(
    writer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this language w3 is followed by 10, 11, 16 or 20, w10 by 31, 32, 37 or 1."""
    usual, odd = "w3 w10 w31", "w3 w10 w30 W5"
    Path("texts.txt").write_text(f"{usual}\n{odd}\n")
    first, second = predict_rows(capsys, writer, "file=texts.txt", "surprises=2")
    assert first["ppl"] < second["ppl"] and (first["words"], second["words"]) == (4, 5), (
        "and the sentence's end"
    )
    assert len(second["surprises"]) == 2
    assert second["surprises"][0]["bits"] > second["surprises"][1]["bits"]
    (whole,) = predict_rows(capsys, writer, f"text='{odd}'", "surprises=9")
    assert len(whole["surprises"]) == 5
    bits = sum(one["bits"] for one in whole["surprises"]) / 5
    assert 2**bits == pytest.approx(whole["ppl"], rel=1e-6), "perplexity is 2 to the mean surprise"
    by_place = {one["place"]: (one["word"], one["read_as"]) for one in whole["surprises"]}
    assert by_place[4] == ("W5", "w5") and by_place[5] == ("<eos>", "<eos>")
    (lines,) = predict_rows(capsys, writer, f"text='{usual}\n{usual}'")
    (marked,) = predict_rows(capsys, writer, f"text='{usual} <eos> {usual}'")
    assert lines["ppl"] == marked["ppl"] and lines["words"] == 2 * 4
    predict.run(settings(f"checkpoint={writer}", f"text='{odd}'", "device=cpu", command="predict"))
    shown = capsys.readouterr().out
    assert "perplexity" in shown and " bits  word 3    w30\n" in shown and "W5 (read as w5)" in shown


def doubter_in(folder: Path, *overrides: str) -> Path:
    """Trains a language model with variational dropout; returns its run folder."""
    folder.mkdir()
    train_in(folder, *TINY, *overrides, "dropout=variational", *ADAM)
    return next(folder.rglob("result.json")).parent


@pytest.fixture
def doubter(here: Path, long_text: list[str]) -> Path:
    """A language model of the 40 words with variational dropout."""
    return doubter_in(here / "doubter", *long_text, "schedule.epochs=2")


def test_mc_passes_average_the_words_of_a_text_and_measure_how_they_differ(
    doubter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "w3 w10 w30 w5"
    Path("texts.txt").write_text(f"w3 w10 w31\n{text}\n")
    _, row = predict_rows(capsys, doubter, "file=texts.txt", "mc_samples=6", "surprises=9")
    loaded = load_model(settings(f"checkpoint={doubter}", command="predict"), torch.device("cpu"))
    assert isinstance(loaded.predictor, WordPredictor)
    stream_N = loaded.predictor.encode(["<eos>", *text.split(), "<eos>"])
    options = PassOptions(samples=6, batch=2, seed=1, word_dropout=False)
    assert row["ppl"] == pytest.approx(mc_perplexity(loaded.model, stream_N, options)[-1]["ppl"], rel=1e-5)
    bits = {one["place"]: one["bits"] for one in row["surprises"]}
    assert 2 ** (sum(bits.values()) / 5) == pytest.approx(row["ppl"], rel=1e-6)
    information = [one["mutual_information_bits"] for one in row["surprises"]]
    assert all(0 < one < math.log2(6) for one in information)
    assert row["mutual_information_bits"] == pytest.approx(sum(information) / 5)
    (alone,) = predict_rows(capsys, doubter, f"text='{text}'", "mc_samples=6", "surprises=9")
    assert alone | {"line": 2} == row, "other texts do not change it"
    (other,) = predict_rows(capsys, doubter, f"text='{text}'", "mc_samples=6", "seed=2")
    assert other["ppl"] != row["ppl"]
    (standard,) = predict_rows(capsys, doubter, f"text='{text}'")
    assert standard["ppl"] != row["ppl"] and "mutual_information_bits" not in standard
    command = (f"checkpoint={doubter}", f"text='{text}'", "mc_samples=6", "device=cpu")
    predict.run(settings(*command, command="predict"))
    output = capsys.readouterr()
    assert "MC dropout, passes: 6" in output.err
    assert re.search(
        rf"^line 1: perplexity [\d.]+ over 5 tokens, mutual information 0\.\d+ bits: {text}$",
        output.out,
        re.M,
    )
    assert re.search(r"^ +[\d.]+ bits \(0\.\d\d of mutual information\)  word \d +w30$", output.out, re.M)
    predict.run(settings(*command, "format=csv", command="predict"))
    header, values = csv.reader(capsys.readouterr().out.splitlines())
    assert header == ["line", "text", "ppl", "words", "mutual_information_bits", "error"]
    assert float(values[4]) == row["mutual_information_bits"]


def test_passes_that_cannot_differ_have_no_mutual_information(
    doubter: Path, here: Path, long_text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    places = ("dropout.p_word=0.5", *(f"dropout.{name}=0" for name in ("p_x", "p_h", "p_out")))
    type_model = doubter_in(here / "types", *long_text, *places)
    token_model = doubter_in(here / "tokens", *long_text, *places, "dropout.word_mask=token")
    capsys.readouterr()
    same = "drops nothing, or words alone, which passes keep; leave mc_samples out"
    for folder, samples, reason in (
        (doubter, 1, "one pass has no mutual information; take more mc_samples"),
        (type_model, 3, same),
        (token_model, 3, same),
    ):
        command = (
            f"checkpoint={folder}",
            "text=w3 w10",
            f"mc_samples={samples}",
            "format=json",
            "device=cpu",
        )
        predict.run(settings(*command, command="predict"))
        output = capsys.readouterr()
        assert reason in output.err
        row = json.loads(output.out)
        assert row["mutual_information_bits"] is None and row["ppl"] > 1
        assert all(one["mutual_information_bits"] is None for one in row["surprises"])


def test_a_word_that_training_does_not_have_is_unknown(
    writer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = predict_rows(capsys, writer, "text=w3 unheard", "surprises=9")
    assert {(one["word"], one["read_as"]) for one in row["surprises"]} == {
        ("w3", "w3"),
        ("unheard", "<unk>"),
        ("<eos>", "<eos>"),
    }


def test_a_language_model_writes_what_it_has_learned(
    writer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = predict_rows(capsys, writer, "sample=300", "text=w3")
    words = ["w3", *row["sample"]]
    assert len(row["sample"]) == 300 and row["text"] == "w3"
    followed = [
        (int(a[1:]), int(b[1:])) for a, b in itertools.pairwise(words) if not {"<eos>", "<unk>"} & {a, b}
    ]
    right = [b in {(3 * a + step) % 40 for step in (1, 2, 7, 11)} for a, b in followed]
    assert sum(right) / len(right) > 0.6, "by chance it would be a tenth"
    assert (
        predict_rows(capsys, writer, "sample=300", "text=w3")
        == [row]
        != predict_rows(capsys, writer, "sample=300", "text=w3", "seed=2")
    )
    predict.run(settings(f"checkpoint={writer}", "sample=30", "device=cpu", command="predict"))
    assert "<eos>" not in capsys.readouterr().out


def test_temperature_and_top_k_choose_among_probable_words(
    writer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The most probable word each time, by either; a temperature of 1 and all words change nothing."""
    greedy = [
        predict_rows(capsys, writer, "sample=20", "text=w3", more, "seed=7")
        for more in ("top_k=1", "temperature=1e-6")
    ]
    assert greedy[0] == greedy[1]
    without = predict_rows(capsys, writer, "sample=60", "text=w3")
    assert predict_rows(capsys, writer, "sample=60", "text=w3", "temperature=1", "top_k=1000") == without
    assert predict_rows(capsys, writer, "sample=60", "text=w3", "temperature=3") != without


def test_unknown_words_are_counted_once_for_all_lines(
    here: Path, text: list[str], rated: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Ends of lines and blank lines are no words; a word of the vocabulary in lower case is known."""
    train.run(settings(*TINY, *text))
    train.run(settings(*TINY_SENTIMENT, *rated, "data.min_count=1"))
    writer, critic = (next(here.rglob(f"{task}-*/*-s1")) for task in ("language_model", "sentiment"))
    Path("words.txt").write_text("w3 W5 unheard\n\nw1 unheard novel\n")
    Path("ratings.txt").write_text("good1 Bad1 unheard\n\nnovel\n")
    for folder, file, counts in ((writer, "words.txt", "3 of 6"), (critic, "ratings.txt", "2 of 4")):
        show(capsys, folder, f"file={file}")
        assert capsys.readouterr().err.count(f"vdrop: {counts} words unknown") == 1
    show(capsys, writer, "sample=3", "text=w3 unheard")
    assert "1 of 2 words unknown" in capsys.readouterr().err
    show(capsys, critic, "text=unheard")
    assert (
        "read as the unknown word, which was never trained: the training text has none"
        in capsys.readouterr().err
    )
    for folder, text in ((writer, "w3 W5"), (critic, "good1")):
        show(capsys, folder, f"text={text}")
        assert "words unknown" not in capsys.readouterr().err


def test_at_a_terminal_it_says_that_it_waits_for_text(
    writer: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Keyboard(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    for kind, is_announced in ((Keyboard, True), (io.TextIOWrapper, False)):
        monkeypatch.setattr("sys.stdin", kind(io.BytesIO(b"w3 w5\n")))
        show(capsys, writer)
        shown = capsys.readouterr()
        assert ("Ctrl-" in shown.err) == is_announced and shown.out.startswith("line 1: perplexity")


def show(capsys: pytest.CaptureFixture[str], folder: Path, *overrides: str) -> None:
    """Predicts; what it prints can be read after that."""
    capsys.readouterr()
    predict.run(settings(f"checkpoint={folder}", "device=cpu", *overrides, command="predict"))


def test_drawn_words_continue_the_whole_text(
    writer: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = []

    def remembering(model: Any, prompt_N: torch.Tensor, *rest: Any) -> Any:
        prompts.append(prompt_N.tolist())
        return sample_words(model, prompt_N, *rest)

    monkeypatch.setattr(word_prediction, "sample_words", remembering)
    for words in ("", "w3 w10 w20"):
        (row,) = predict_rows(capsys, writer, "sample=5", *([f"text={words}"] if words else []))
        assert len(row["sample"]) == 5
    loaded = load_model(settings(f"checkpoint={writer}", command="predict"), torch.device("cpu"))
    assert isinstance(loaded.predictor, WordPredictor)
    ids = loaded.predictor.ids
    assert prompts == [[ids["<eos>"]], [ids[word] for word in ("<eos>", "w3", "w10", "w20")]]


def test_words_are_drawn_as_often_as_the_model_expects_them(writer: Path) -> None:
    loaded = load_model(settings(f"checkpoint={writer}", command="predict"), torch.device("cpu"))
    assert isinstance(loaded.predictor, WordPredictor)
    begin, generator = torch.tensor([loaded.predictor.ids["<eos>"]]), torch.Generator().manual_seed(0)
    drawn = torch.tensor([next(sample_words(loaded.model, begin, 1, generator)) for _ in range(1500)])
    pairs = torch.stack([begin.expand(42), torch.arange(42)])
    expected = torch.stack([(-stream_nll(loaded.model, pair)).exp()[0] for pair in pairs.T])
    assert expected.sum().item() == pytest.approx(1, rel=1e-5)
    assert torch.allclose(drawn.bincount(minlength=42) / 1500, expected, atol=0.04)


@pytest.mark.parametrize("model", ["critic", "writer"])
def test_a_seed_without_anything_random_is_refused(model: str, request: pytest.FixtureRequest) -> None:
    given = ["device=cpu", "text=a", "mc_samples=0", "seed=2"]
    with pytest.raises(
        ConfigError, match=r"^seed must be 1 without (MC samples|mc_samples or sample), which"
    ):
        predict.run(settings(f"checkpoint={request.getfixturevalue(model)}", *given, command="predict"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["text=a", "file=b"], "file must be null with text"),
        (["text='  '"], "text must be a text with words in it"),
        (["text=a", "mc_samples=-1"], "mc_samples must be in"),
        (["text=a", "level=100"], r"level must be in \[1, 100\), or null"),
        (["text=a", "surprises=0"], "surprises must be at least 1, or null"),
        (["sample=3", "surprises=2"], "surprises must be null with sample"),
        (["sample=3", "mc_samples=5"], "mc_samples must be 0 or null with sample=…, got 5"),
        (["sample=3", "temperature=0"], "temperature must be at least"),
        (["sample=3", "temperature=inf"], "temperature must be at least"),
        (["sample=3", "top_k=0"], "top_k must be at least 1, or null"),
        (["text=a", "temperature=0.5"], "temperature must be null without sample"),
        (["text=a", "top_k=5"], "top_k must be null without sample"),
        (["sample=-1"], "sample must be at least 0"),
        (["sample=3", "file=b"], "file must be null with sample"),
        (["seed=-1", "text=a"], "seed must be in"),
        (["text=a", "column=b"], "column must be null with text"),
        (["text=a", "input=csv"], "input must be null with text"),
        (["sample=3", "input=csv"], "input must be null with sample"),
        (["sample=3", "format=csv"], "format must be table or json with sample"),
        (["format=csv", "surprises=3"], "surprises must be null with format=csv"),
        (["text=a", "passes=true"], "passes must be false without format=json"),
    ],
)
def test_values_out_of_bounds_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings("checkpoint=a", *overrides, command="predict")


def test_standard_input_that_cannot_be_read_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        @staticmethod
        def isatty() -> bool:
            return False

        class buffer:
            @staticmethod
            def read() -> bytes:
                raise OSError(5, "Input/output error")

    monkeypatch.setattr("sys.stdin", Broken)
    with pytest.raises(ConfigError, match=r"^standard input cannot be read \(Input/output error\); give"):
        content_of(settings("checkpoint=a", command="predict"))


def test_settings_that_do_not_fit_the_model_are_refused(
    writer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        ConfigError, match=r"^mc_samples must be 0 or null, .* was trained without dropout, got 3"
    ):
        predict_rows(capsys, writer, "text=w3", "mc_samples=3")
    for wrong in ("level=50", "interval=quantile", f"members=[{writer / '..' / writer.name}]", "passes=true"):
        name = wrong.partition("=")[0]
        with pytest.raises(
            ConfigError, match=rf"^{name} (is|are) for ratings, .* is a language model; leave "
        ):
            predict_rows(capsys, writer, "text=w3", wrong)
    with pytest.raises(ConfigError, match=r"^file=nowhere cannot be read"):
        predict_rows(capsys, writer, "file=nowhere")
    with pytest.raises(ConfigError, match=r"^data\.train must be null, .* has all that .*, got nofile\.txt"):
        predict_rows(capsys, writer, "text=w3", "data.train=nofile.txt")
    Path("empty").write_text("")
    with pytest.raises(ConfigError, match=r"^file=empty holds no text"):
        predict_rows(capsys, writer, "file=empty")


def test_a_model_of_ratings_writes_no_words(critic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("sample=3", "surprises=3"):
        with pytest.raises(
            ConfigError,
            match=rf"^{wrong[:-2]} (is|are) for language models, .* is a model of ratings; leave ",
        ):
            predict_rows(capsys, critic, wrong)


def moved_without_data(run: Path, elsewhere: Path) -> Path:
    """A run folder on a machine that has not got the text, with nothing beside it but the checkpoint."""
    elsewhere.mkdir()
    path = checkpoint.find(str(run))
    (elsewhere / path.name).write_bytes(path.read_bytes())
    return elsewhere


@pytest.fixture
def own_text(here: Path, text_folder: Path) -> list[str]:
    """The overrides that choose a copy of the text, which can be taken away."""
    shutil.copytree(text_folder, here / "corpus")
    return ["data=text", *(f"data.{part}=corpus/{part}.txt" for part in ("train", "valid", "test"))]


def test_a_checkpoint_predicts_where_its_text_is_not(
    here: Path, own_text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    train.run(settings(*TINY, *own_text))
    run = next(here.rglob("result.json")).parent
    (before,) = predict_rows(capsys, run, "text=w3 w10")
    shutil.rmtree("corpus")
    folder = moved_without_data(run, here / "elsewhere")
    assert predict_rows(capsys, folder, "text=w3 w10") == [before]
    assert len(predict_rows(capsys, folder, "sample=4")[0]["sample"]) == 4


def test_ratings_are_predicted_where_their_texts_are_not(
    critic: Path, rated: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (before,) = predict_rows(capsys, critic, "text=good1 bad2")
    csv = Path(rated[1].removeprefix("data.csv="))
    csv.rename(csv.with_suffix(".away"))
    try:
        assert predict_rows(capsys, moved_without_data(critic, Path("elsewhere")), "text=good1 bad2") == [
            before
        ], "with the same interval"
    finally:
        csv.with_suffix(".away").rename(csv)


def test_where_the_corpus_lies_is_said_to_be_unused_where_the_noise_is_known(
    critic: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict.run(settings(f"checkpoint={critic}", "text=good1", "data.csv=nowhere.csv", command="predict"))
    assert "vdrop: data.csv=nowhere.csv is not read: " in capsys.readouterr().err
    predict.run(settings(f"checkpoint={critic}", "text=good1", command="predict"))
    assert "is not read" not in capsys.readouterr().err


def test_in_the_middle_of_an_epoch_the_error_says_how_to_measure_the_noise(
    critic: Path, capsys: pytest.CaptureFixture[str], rated: list[str]
) -> None:
    original = checkpoint.load(checkpoint.find(str(critic)))
    (end,) = predict_rows(capsys, critic, "text=good1", "mc_samples=5")
    Path("middle").mkdir()
    path = Path("middle") / checkpoint.find(str(critic)).name
    files.write_tensors(
        path,
        {"format": checkpoint.FORMAT, **vars(replace(original, learned=original.learned | {"noise": None}))},
    )
    with pytest.raises(
        ConfigError,
        match=r"data\.csv=.* give data\.csv=…, or run vdrop eval \S+ mc_samples=5 stored_data=true first",
    ):
        predict_rows(capsys, path, "text=good1", "mc_samples=5")
    (fitted,) = predict_rows(capsys, path, "text=good1", "mc_samples=5", rated[1])
    assert fitted["std_noise"] == pytest.approx(end["std_noise"], rel=1e-6)


def test_every_line_has_a_row_and_one_that_cannot_be_read_takes_no_other_along(
    writer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("lines").write_bytes(b"w3 w10\r\n\n  \nw3 unheard\ncaf\xe9\nw10 w31")
    capsys.readouterr()
    with pytest.raises(ConfigError, match=r"^file=lines: nothing is predicted from 1 of 6 lines"):
        predict.run(
            settings(f"checkpoint={writer}", "device=cpu", "format=json", "file=lines", command="predict")
        )
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [row["line"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["ppl"] is None for row in rows] == [False, True, True, False, True, False]
    assert [row["text"] for row in rows] == ["w3 w10", "", "", "w3 unheard", None, "w10 w31"]
    assert [row["line"] for row in rows if "error" in row] == [5]
    assert "file=lines, line 5: not UTF-8" in printed.err
    with pytest.raises(ConfigError):
        predict.run(settings(f"checkpoint={writer}", "device=cpu", "file=lines", command="predict"))
    assert "line 2: no perplexity: (blank line)" in capsys.readouterr().out


def test_lines_end_as_those_of_a_training_text_do(writer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("lines").write_bytes(b"\xef\xbb\xbfw3 w10\rw10 w31\r\n\rw3\xe2\x80\xa8w10\n")
    rows = predict_rows(capsys, writer, "file=lines")
    assert [row["text"] for row in rows] == ["w3 w10", "w10 w31", "", "w3\u2028w10"] and rows[3][
        "ppl"
    ] == rows[0]["ppl"]


def test_ratings_have_a_row_for_every_line_too(critic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    Path("lines").write_bytes(b"good1\n\nca\xe9\nbad1\x1b[31m\n")
    with pytest.raises(ConfigError, match=r"^file=lines: nothing is predicted from 1 of 4 lines"):
        predict.run(
            settings(f"checkpoint={critic}", "device=cpu", "file=lines", "mc_samples=2", command="predict")
        )
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.split()[:2] == ["line", "rating"] and [int(row.split()[0]) for row in rows] == [1, 2, 3, 4]
    assert "(blank line)" in rows[1] and r"bad1\x1b[31m" in rows[3]


def test_a_corpus_of_one_line_has_no_line_ends_and_texts_are_predicted_and_written(
    here: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its vocabulary is without <eos>."""
    train.run(settings(*TINY, *one_line(here, text_folder)))
    path = checkpoint.find(str(next(here.rglob("result.json")).parent))
    words = [word for word in checkpoint.load(path).learned["vocabulary"] if word.startswith("w")]
    original = without_line_ends(checkpoint.load(path))
    files.write_tensors(here / "one.pt", {"format": checkpoint.FORMAT, **vars(original)})
    (row,) = predict_rows(capsys, here / "one.pt", f"text='{words[0]} {words[1]}\n{words[2]}'")
    assert row["words"] == 2 and [one["place"] for one in row["surprises"]] in ([2, 3], [3, 2]), (
        "the first word is not predicted"
    )
    (alone,) = predict_rows(capsys, here / "one.pt", f"text={words[0]}")
    assert (alone["ppl"], alone["surprises"]) == (None, None)
    drawn = predict_rows(capsys, here / "one.pt", "sample=5")[0]["sample"]
    assert len(drawn) == 5 and set(drawn) <= set(original.learned["vocabulary"])
    assert len(predict_rows(capsys, here / "one.pt", "sample=5", f"text={words[0]}")[0]["sample"]) == 5


def one_line(here: Path, text_folder: Path) -> list[str]:
    for part in ("train", "valid", "test"):
        (here / f"{part}.one").write_text(" ".join((text_folder / f"{part}.txt").read_text().split()))
    return ["data=text", *(f"data.{part}={part}.one" for part in ("train", "valid", "test"))]


def without_line_ends(original: Checkpoint) -> Checkpoint:
    """The same model without the words <eos> and <unk>, where it has them."""
    vocabulary = original.learned["vocabulary"]
    word_ids = [number for number, word in enumerate(vocabulary) if word not in ("<eos>", "<unk>")]
    by_word = {name: original.model[name][word_ids] for name in ("embedding", "head_weight", "head_bias")}
    known = learned.to_dict(Words.from_vocabulary([vocabulary[number] for number in word_ids]))
    return replace(original, model=original.model | by_word, learned=known)


def test_a_prediction_that_is_no_number_is_an_error(writer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights can be finite and still overflow."""
    path = checkpoint.find(str(writer))
    original = checkpoint.load(path)
    huge = {name: torch.full_like(weight, 3e38) for name, weight in original.model.items()}
    files.write_tensors(path, {"format": checkpoint.FORMAT, **vars(replace(original, model=huge))})
    for what in ("text=w3 w10", "sample=3"):
        with pytest.raises(RunError, match="are not those of a model that works"):
            predict_rows(capsys, path, what)
        assert "nan" not in capsys.readouterr().out.lower()
    files.write_tensors(
        path,
        {
            "format": checkpoint.FORMAT,
            **vars(replace(original, model={f"{n}_": w for n, w in original.model.items()})),
        },
    )
    with pytest.raises(
        ConfigError, match="cannot be used: it does not hold the weights that its settings describe"
    ):
        predict_rows(capsys, path, "text=w3")


def evaluated(folder: Path, *overrides: str) -> dict[str, Any]:
    """The newest evaluation, made with these settings."""
    evaluation.run(
        settings(f"checkpoint={folder}", "stored_data=true", "device=cpu", *overrides, command="eval")
    )
    path = max(folder.glob("eval-*.json"), key=lambda one: one.stat().st_mtime_ns)
    return dict(json.loads(path.read_text()))


def test_intervals_of_each_kind_are_those_of_the_passes_and_the_noise(
    critic: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Conformal ones take noise and scores of the evaluation in the same way."""
    text = ("text=good1 bad2", "mc_samples=5", "level=60")
    with pytest.raises(
        ConfigError,
        match=r"^interval=conformal takes .*; run vdrop eval \S+ mc_samples=5 stored_data=true first",
    ):
        predict_rows(capsys, critic, *text, "interval=conformal")
    results = evaluated(critic, "mc_samples=5")
    evaluated(critic)
    rows = {
        kind: predict_rows(capsys, critic, *text, f"interval={kind}", "passes=true")[0]
        for kind in ("gaussian", "quantile", "conformal")
    }
    passes_S, noise = (
        torch.tensor(rows["gaussian"]["passes"], dtype=torch.float64),
        results["metrics"]["noise_mc5"],
    )
    for row in rows.values():
        assert row["passes"] == passes_S.tolist() and row["std_noise"] == noise and len(passes_S) == 5
        assert row["rating"] == pytest.approx(passes_S.mean().item(), rel=1e-5)
        assert row["std_model"] == pytest.approx(passes_S.std(correction=0).item(), rel=1e-3)
    std = (rows["gaussian"]["std_model"] ** 2 + noise**2) ** 0.5
    assert rows["gaussian"]["high"] - rows["gaussian"]["rating"] == pytest.approx(0.8416 * std, rel=1e-3)
    rank = math.ceil(7 * 0.6)
    half = results["conformal_scores"][rank - 1] * std
    assert rows["conformal"]["high"] - rows["conformal"]["rating"] == pytest.approx(half, rel=1e-6)
    low, high = (torch.tensor(rows["quantile"][end]) for end in ("low", "high"))
    for end, below in ((low, 0.2), (high, 0.8)):
        assert torch.special.ndtr((end - passes_S) / noise).mean().item() == pytest.approx(below, abs=1e-4)
    with pytest.raises(ConfigError, match=r"^level: conformal intervals of 95 % need 19 .*, got 6; choose a"):
        predict_rows(capsys, critic, "text=good1", "mc_samples=5", "interval=conformal")


def test_one_pass_has_no_standard_deviation_and_says_so(
    critic: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for samples in (0, 1):
        row = {
            kind: predict_rows(capsys, critic, "text=good1", f"mc_samples={samples}", f"interval={kind}")[0]
            for kind in ("gaussian", "quantile")
        }
        assert row["gaussian"]["std_model"] is None
        assert row["gaussian"]["low"] == pytest.approx(row["quantile"]["low"], rel=1e-5)
    predict.run(
        settings(f"checkpoint={critic}", "text=good1", "device=cpu", "mc_samples=1", command="predict")
    )
    shown = capsys.readouterr()
    assert "vdrop: one pass has no standard deviation of the model" in shown.err and "   –   " in shown.out


def test_passes_without_any_dropout_probability_have_no_standard_deviation(
    here: Path, rated: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    zero = [f"dropout.{name}=0" for name in ("p_word", "p_x", "p_h", "p_out")]
    train.run(settings(*TINY_SENTIMENT, *rated, *zero))
    folder = next(here.rglob("result.json")).parent
    predict.run(
        settings(f"checkpoint={folder}", "text=good1", "device=cpu", "format=json", command="predict")
    )
    shown = capsys.readouterr()
    assert "all passes are the same, as every dropout probability" in shown.err
    assert json.loads(shown.out.splitlines()[-1])["std_model"] is None


def test_a_table_gets_its_predictions_beside_its_columns(
    critic: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = b'id,review\r\n1,"good1, ""good2""\nbad1"\r\n2,ca\xe9\r\n3,bad1,more\r\n4,\r\n5," bad1"\r\n'
    Path("reviews.csv").write_bytes(content)
    capsys.readouterr()
    with pytest.raises(ConfigError, match=r"^file=reviews.csv: nothing is predicted from 2 of 5 lines"):
        predict.run(
            settings(
                f"checkpoint={critic}",
                "device=cpu",
                "file=reviews.csv",
                "column=review",
                "format=csv",
                command="predict",
            )
        )
    printed = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(printed.out)))
    names = ["line", "id", "review", "rating", "std_model", "std_noise", "low", "high", "level", "error"]
    assert list(rows[0]) == names
    assert [row["line"] for row in rows] == ["2", "4", "5", "6", "7"], "lines of the file"
    assert [row["id"] for row in rows] == ["1", "2", "", "4", "5"]
    assert rows[0]["review"] == 'good1, "good2"\nbad1' and rows[4]["review"] == " bad1"
    assert [bool(row["rating"]) for row in rows] == [True, False, False, False, True]
    assert [bool(row["error"]) for row in rows] == [False, True, True, False, False]
    assert "line 4: not UTF-8" in printed.err and "line 5: 3 fields, the header has 2" in printed.err
    (alone,) = predict_rows(capsys, critic, "text=bad1")
    assert float(rows[4]["rating"]) == alone["rating"] and float(rows[4]["low"]) == alone["low"]
    with pytest.raises(ConfigError, match=r"^column=text is not a column of file=.*; choose from id, review"):
        predict_rows(capsys, critic, "file=reviews.csv")
    for header, message in (
        (b",,text", "has more than one column without a name"),
        (b"\xe9,text", "is not UTF"),
    ):
        Path("names.csv").write_bytes(header + b"\na,b,c\n")
        with pytest.raises(ConfigError, match=f"^file=names.csv: line 1 {message}"):
            predict_rows(capsys, critic, "file=names.csv")
    Path("names.csv").write_text(",text\n0,good1\n")
    (row,) = predict_rows(capsys, critic, "file=names.csv")
    assert row[""] == "0", "as of a table with numbered rows"
    Path("reviews.tsv").write_text('rating\ttext\n3\tgood1 "x"\n')
    config = settings(f"checkpoint={critic}", "file=reviews.tsv", "format=json", command="predict")
    predict.run(config)
    said = capsys.readouterr()
    row = json.loads(said.out)
    assert "file=reviews.tsv has a column rating, so the predicted one is called predicted_rating" in said.err
    assert row["rating"] == "3" and isinstance(row["predicted_rating"], float), "the file's, and the model's"
    Path("reviews.tsv").write_text('line\ttext\n3\tgood1 "x"\n')
    with pytest.raises(ConfigError, match=r"^file=reviews.tsv has a column line, as the output has; rename"):
        predict_rows(capsys, critic, "file=reviews.tsv")
    Path("reviews.tsv").write_text('stars\ttext\n3\tgood1 "x"\n')
    (row,) = predict_rows(capsys, critic, "file=reviews.tsv")
    assert (row["stars"], row["text"]) == ("3", 'good1 "x"')


def test_a_table_may_have_another_delimiter(critic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("semicolons.csv").write_text("id;text\n1;good1, bad1\n")
    with pytest.raises(ConfigError, match=r"has a semicolon between its columns.*give 'delimiter=\";\"'"):
        predict_rows(capsys, critic, "file=semicolons.csv")
    (row,) = predict_rows(capsys, critic, "file=semicolons.csv", "delimiter=';'")
    assert (row["id"], row["text"]) == ("1", "good1, bad1")
    for file, wrong, message in (
        ("semicolons.csv", "delimiter=ab", "delimiter must be one character"),
        ("a.txt", "delimiter=';'", r"delimiter must be null, file=a\.txt is read as lines, got ';'"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}"):
            predict_rows(capsys, critic, f"file={file}", wrong)
    with pytest.raises(ConfigError, match=r"^delimiter must be null with text="):
        predict_rows(capsys, critic, "text=good1", "delimiter=';'")


def test_blank_lines_may_stand_anywhere_and_have_their_numbers(here: Path) -> None:
    table = "id,text\n\n1,good1\n  \n2,bad1\n\n"
    Path("a.csv").write_text(table)
    Path("a.tsv").write_text(table.replace(",", "\t"))
    Path("a.NDJSON").write_text('{"text": "good1"}\n\n{"text": "bad1"}\n')
    rows = [(2, ""), (3, "good1"), (4, ""), (5, "bad1"), (6, "")]
    Path("a.json").write_text('{"text": "good1"}\n')
    for name, expected in (
        ("a.json", [(1, "good1")]),
        ("a.csv", rows),
        ("a.tsv", rows),
        ("a.NDJSON", [(1, "good1"), (2, ""), (3, "bad1")]),
    ):
        read = lines(settings("checkpoint=a", f"file={name}", command="predict"))
        assert [(line.number, line.text) for line in read] == expected


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_nothing_is_predicted_from_a_file_in_another_encoding(encoding: str, critic: Path) -> None:
    """Text in UTF-16 is valid UTF-8 with NUL characters, but for its mark of the byte order."""
    Path("notes.txt").write_bytes("good1 good2\r\nbad1\r\n".encode(encoding))
    with pytest.raises(ConfigError, match=r"^file=notes.txt: nothing is predicted from (\d) of \1 lines"):
        predict.run(settings(f"checkpoint={critic}", "device=cpu", "file=notes.txt", command="predict"))


def test_json_lines_keep_their_fields_and_one_that_cannot_be_read_is_named(
    critic: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.jsonl").write_bytes(
        b'{"text": "good1", "n": [1]}\n{"n": 2}\n{"text": 3}\n{"text"\n\n{"text": "\\ud800"}\n"x"\n\xff\n'
    )
    capsys.readouterr()
    with pytest.raises(ConfigError, match=r"^file=a.jsonl: nothing is predicted from 6 of 8 lines"):
        predict.run(
            settings(f"checkpoint={critic}", "device=cpu", "file=a.jsonl", "format=json", command="predict")
        )
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [row["line"] for row in rows] == [*range(1, 9)]
    assert rows[0]["n"] == [1] and rows[0]["rating"] is not None and rows[1]["n"] == 2
    problems = ["no field text", "not text", "not JSON", "surrogate", "not a JSON object", "not UTF-8"]
    for row, problem in zip([rows[n] for n in (1, 2, 3, 5, 6, 7)], problems, strict=True):
        assert row["rating"] is None and problem in row["error"], row
    assert "error" not in rows[4] and rows[4]["rating"] is None
    Path("a.jsonl").write_text('{"review": "good1", "n": 1e400}\n{"review": "good1"}\n')
    given = ["device=cpu", "file=a.jsonl", "column=review", "format=csv"]
    with pytest.raises(ConfigError, match=r"^file=a.jsonl: nothing is predicted from 1 of 2 lines"):
        predict.run(settings(f"checkpoint={critic}", *given, command="predict"))
    printed = capsys.readouterr()
    header, first, _ = csv.reader(printed.out.splitlines())
    assert header[:3] == ["line", "review", "rating"] and "a number that is too large" in first[-1]
    Path("a.jsonl").write_text('{"review": "good1"}\n')
    with pytest.raises(
        ConfigError, match=r"^column=text is not a column of file=a.jsonl; choose from review"
    ):
        predict_rows(capsys, critic, "file=a.jsonl")


def test_standard_input_and_files_are_read_in_the_format_that_is_named(
    writer: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(b"text,n\nw3 w10,1\n"))
    monkeypatch.setattr("sys.stdin", stream)
    (row,) = predict_rows(capsys, writer, "input=csv")
    assert row["n"] == "1" and row["ppl"] > 1
    Path("a.csv").write_text("w3 w10\nw10 w31\n")
    assert len(predict_rows(capsys, writer, "file=a.csv", "input=lines")) == 2
    predict.run(
        settings(
            f"checkpoint={writer}", "device=cpu", "file=a.csv", "input=lines", "format=csv", command="predict"
        )
    )
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(rows[0]) == ["line", "text", "ppl", "words", "error"] and rows[1]["words"] == "3"
    with pytest.raises(
        ConfigError, match=r"^column must be null, .* is read as lines, which have no columns"
    ):
        predict_rows(capsys, writer, "file=a.csv", "input=lines", "column=text")


def test_members_pool_their_passes_and_take_the_noise_of_their_evaluation(
    here: Path, rated: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["task.protocol=clean", "schedule.epochs=1"]
    for seed in (1, 2):
        train.run(settings(*TINY_SENTIMENT, *rated, *more, f"seed={seed}"))
    first, second = sorted(path.parent for path in here.rglob("result.json"))
    together = ("text=good1 bad2", "passes=true", f"members=[{second}]")
    with pytest.raises(
        ConfigError, match=r"^members have no observation noise together yet; run vdrop eval .* members=\["
    ):
        predict_rows(capsys, first, *together)
    results = evaluated(first, f"members=[{second}]")
    (row,) = predict_rows(capsys, first, *together)
    alone = [
        predict_rows(capsys, folder, "text=good1 bad2", "mc_samples=0")[0]["rating"]
        for folder in (first, second)
    ]
    assert row["passes"] == pytest.approx(alone, rel=1e-6), "the standard approximation of each"
    assert row["rating"] == pytest.approx(sum(alone) / 2, rel=1e-6)
    assert row["std_model"] == pytest.approx(abs(alone[0] - alone[1]) / 2, rel=1e-4)
    assert row["std_noise"] == results["metrics"]["noise"]
    (swapped,) = predict_rows(capsys, second, *together[:2], f"members=[{first}]")
    assert swapped["std_noise"] == row["std_noise"] and swapped["rating"] == pytest.approx(row["rating"])
    pooled = evaluated(first, f"members=[{second}]", "mc_samples=3")
    (mixed,) = predict_rows(capsys, first, *together, "mc_samples=3", "interval=conformal", "level=50")
    assert len(mixed["passes"]) == 6 and mixed["std_noise"] == pooled["metrics"]["noise_mc3"]
    half = pooled["conformal_scores"][3] * (mixed["std_model"] ** 2 + mixed["std_noise"] ** 2) ** 0.5
    assert mixed["high"] - mixed["rating"] == pytest.approx(half, rel=1e-6)
    train.run(settings(*TINY_SENTIMENT, *rated, *more, "task.split_seed=1"))
    other = next(path.parent for path in here.rglob("result.json") if path.parent not in (first, second))
    with pytest.raises(ConfigError, match=r"^members: .* was trained on another corpus than"):
        predict_rows(capsys, first, "text=good1", f"members=[{other}]")
    with pytest.raises(ConfigError, match="got one twice"):
        predict_rows(capsys, first, "text=good1", f"members=[{first}]")
