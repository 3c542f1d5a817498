"""Settings: what the files hold, which values are refused, and that each one changes something."""

import json
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from omegaconf import OmegaConf

from tests.conftest import TINY, TINY_SENTIMENT, composed, settings
from vdrop_cli import CONF, published
from vdrop_cli.commands import train
from vdrop_cli.errors import ConfigError
from vdrop_cli.policies import Cell, Policy
from vdrop_cli.settings.choices import BenchCell, Precision
from vdrop_cli.settings.commands import ROOTS, Bench
from vdrop_cli.settings.compose import parse, restore
from vdrop_cli.settings.fields import FilePath, flatten, keys, plain, rule, walk, without_defaults
from vdrop_cli.settings.train import Train
from vdrop_cli.sinks import read_log

YAML_FILES = sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml"))
NEEDS = {
    "data/text.yaml": ["data.train=a", "data.valid=b", "data.test=c"],
    "data/hub.yaml": ["data.name=a", "data.column=b"],
    "data/cornell.yaml": ["task=sentiment"],
    "data/vader.yaml": ["task=sentiment"],
    "model/lstm_sentiment.yaml": ["task=sentiment"],
    "model/gru_sentiment.yaml": ["task=sentiment"],
    "data/text_regression.yaml": ["task=sentiment", "data.csv=a", "data.column=b", "data.rating_column=c"],
    "eval.yaml": ["checkpoint=a"],
    "export.yaml": ["checkpoint=a"],
    "predict.yaml": ["checkpoint=a"],
    "compare.yaml": ["runs=[a]"],
}


@pytest.mark.parametrize("path", YAML_FILES, ids=str)
def test_every_file_parses_and_says_where_its_numbers_come_from(path: Path) -> None:
    content = (CONF / path).read_text()
    sourced = content.splitlines()[1 if content.startswith("# @package") else 0]
    assert re.match(r"# \w.{20}", sourced)
    assert "_target_" not in content
    assert isinstance(yaml.safe_load(content), dict)
    group, name = path.parent.name, path.stem
    needs = NEEDS.get(str(path), [])
    if group and group != "published":
        model = ["model=lstm_small"] if group == "dropout" else []
        parsed = settings(f"{group}={name}", *model, *needs)
        if group in ("model", "dropout"):
            assert getattr(parsed, group).name == name, "the run folder is named by it"
    elif name in ROOTS:
        settings(*needs, command=name)


# hidden, bptt, batch, init, clip, decay, max_epoch, epochs, p_word, p_h, p_x, p_out, weight decay: the
# authors' scripts
PUBLISHED = {
    ("medium", "variational"): (650, 35, 20, 0.05, 5, 1.2, 6, 39, 0.2, 0.2, 0.35, 0.35, 1e-7),
    ("large", "variational"): (1500, 35, 20, 0.04, 10, 1.15, 10, 55, 0.3, 0.3, 0.5, 0.5, 1e-7),
    ("medium", "zaremba"): (650, 35, 20, 0.05, 5, 1.2, 6, 39, 0, 0, 0.5, 0.5, 0),
    ("large", "zaremba"): (1500, 35, 20, 0.04, 10, 1.15, 14, 55, 0, 0, 0.65, 0.65, 0),
    ("small", "variational"): (200, 20, 20, 0.1, 5, 2, 4, 13, 0.25, 0.25, 0.25, 0.25, 1e-5),
    ("small", "none"): (200, 20, 20, 0.1, 5, 2, 4, 13, 0, 0, 0, 0, 0),
}


@pytest.mark.parametrize(("size", "dropout"), PUBLISHED)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_model_and_dropout_alone_select_the_published_settings(size: str, dropout: str, cell: str) -> None:
    c = settings(f"model={cell}_{size}", f"dropout={dropout}")
    m = c.model
    d = c.dropout
    t = c.task
    s = c.schedule
    values = (
        m.hidden_size,
        t.bptt,
        t.batch_size,
        m.init,
        s.clip,
        s.decay,
        s.max_epoch,
        s.epochs,
        d.p_word,
        d.p_h,
        d.p_x,
        d.p_out,
        s.weight_decay,
    )
    assert values == PUBLISHED[size, dropout]
    assert (m.layers, s.lr, m.cell) == (2, 1, Cell[cell])


@pytest.mark.parametrize("size", ["small", "medium", "large"])
@pytest.mark.parametrize("dropout", ["moon", "moon_word"])
def test_moons_probabilities_by_size(size: str, dropout: str) -> None:
    d = settings(f"model=lstm_{size}", f"dropout={dropout}").dropout
    assert d.p_c == {"small": 0.15, "medium": 0.5, "large": 0.5}[size]
    assert d.p_word == {"moon": 0, "moon_word": 0.1}[dropout]


@pytest.mark.parametrize("name", published.experiments())
def test_an_experiment_of_table_1_is_the_model_and_dropout_of_its_row(name: str) -> None:
    c = settings(f"experiment={name}")
    _, size, row = name.split("_", 2)
    dropout = re.sub("_(mc|corrected|corrected_mc)$", "", row).replace("untied", "variational_untied")
    dropout = "variational_untied" if row == "ensemble" else dropout
    stuck = ["stuck.steps=200"] if size == "large" else []
    base = settings(f"model=lstm_{size}", f"dropout={dropout}", "log_every=100", *stuck)
    if size == "small":
        medium = settings(f"experiment=table1_medium_{row}")
        own = (c.task, replace(c.schedule, weight_decay=0))
        assert own == (medium.task, replace(medium.schedule, weight_decay=0))
        assert (c.model, c.dropout) == (base.model, base.dropout)
    else:
        assert c == base


def test_the_run_of_the_authors_log_has_the_settings_that_it_prints() -> None:
    c = settings("experiment=authors_1250")
    large = settings("model=lstm_large", "dropout=variational_untied", "dropout.word_mask=token")
    assert c.model == replace(large.model, name="lstm_1250", hidden_size=1250) and c.dropout == large.dropout
    assert (c.dropout.p_word, c.dropout.p_h, c.dropout.p_x, c.dropout.p_out, c.dropout.untied) == (
        0.3,
        0.3,
        0.5,
        0.5,
        True,
    )
    assert (c.schedule.decay, c.schedule.max_epoch, c.schedule.epochs, c.schedule.clip, c.model.init) == (
        1.15,
        10,
        55,
        10,
        0.04,
    )


def test_recipes_have_the_numbers_of_their_sources() -> None:
    """In the units of the sources, whose losses are means over steps or sums over a batch."""
    c = settings("experiment=awd_lstm")
    assert c.schedule.lr * c.task.bptt == pytest.approx(30, rel=1e-4)
    assert c.schedule.clip == pytest.approx(0.25 * c.task.bptt)
    assert c.schedule.weight_decay == pytest.approx(1.2e-6 * 30)
    assert (c.task.batch_size, c.task.bptt, c.schedule.epochs) == (20, 70, 500)
    probabilities = [getattr(c.dropout, name) for name in ("p_word", "p_x", "p_between", "p_weight", "p_out")]
    assert probabilities == [0.1, 0.4, 0.25, 0.5, 0.4]
    assert (c.task.ar, c.task.tar, c.schedule.average_trigger, str(c.schedule.optimiser)) == (2, 1, 5, "sgd")
    c = settings("experiment=melis_10m")
    assert c.schedule.lr == pytest.approx(0.0041787, rel=1e-3)
    assert c.schedule.weight_decay == pytest.approx(1.2435e-4, rel=5e-3)
    probabilities = [getattr(c.dropout, name) for name in ("p_x", "p_h", "p_out", "p_head")]
    assert probabilities == pytest.approx([0.5799, 0.2153, 0.3270, 0.3270], abs=5e-4)
    assert (c.task.batch_size, c.task.bptt, c.task.reset, c.schedule.clip) == (64, 35, 0.01, 10)
    assert (str(c.schedule.optimiser), c.schedule.beta1, c.schedule.decay) == ("adam", 0, 10)
    assert c.schedule.plateau_epochs == 26 * 100 * 64 * 35 // 929_589, "26 validations, one every 100 steps"
    c = settings("experiment=inan_medium_tied")
    assert (c.schedule.lr, 1 / c.schedule.decay, c.schedule.clip) == (1, pytest.approx(0.9), 5)
    assert (c.dropout.p_x, c.dropout.p_h, c.task.batch_size, c.task.bptt) == (0.5, 0.5, 20, 35)
    c = settings("experiment=quick_tied")
    assert (c.task.batch_size, c.task.bptt, c.schedule.epochs, c.schedule.lr) == (128, 32, 30, 0.01)
    assert (c.schedule.clip, c.schedule.weight_decay) == (2 / 128, 1e-4 / 128)
    assert (c.dropout.p_between, c.dropout.p_out, 1 / c.schedule.decay) == (0.5, 0.5, 0.25)


def test_untied_differs_from_tied_in_its_masks_alone() -> None:
    tied, untied = (
        plain(settings("model=lstm_large", f"dropout={name}"))
        for name in ("variational", "variational_untied")
    )
    assert untied["dropout"]["untied"] and not tied["dropout"]["untied"]
    for changes in (tied, untied):
        del changes["dropout"]["untied"], changes["dropout"]["name"]
    assert tied == untied


def test_the_default_is_the_medium_variational_row_on_penn_treebank() -> None:
    assert settings() == settings(
        "model=lstm_medium", "dropout=variational", "data=ptb", "schedule=variational", "task=language_model"
    )


def test_published_settings_can_be_overridden_one_by_one() -> None:
    c = settings("model=lstm_large", "dropout.p_h=0.1", "schedule.epochs=3", "schedule=zaremba")
    assert (c.dropout.p_h, c.dropout.p_word, c.schedule.epochs, c.schedule.max_epoch) == (0.1, 0.3, 3, 14)


def test_a_run_is_restored_from_its_stored_configuration() -> None:
    config = settings("model=gru_small", "dropout=naive", "seed=3", "model.reset_after=true")
    assert restore(json.loads(json.dumps(plain(config)))) == config


def test_plain_values_are_those_of_omegaconf() -> None:
    chosen = [
        ("experiment=awd_lstm", "schedule.lr=1", "schedule.clip=null", "tags=[a,b]"),
        ("experiment=melis_10m", "data=hub", "data.name=a", "data.column=b", "stuck.steps=3"),
        ("task=sentiment", "data=vader", "checkpoint.minutes=2"),
    ]
    configs: list[Any] = [settings(*choices) for choices in chosen]
    whole = replace(configs[0], schedule=replace(configs[0].schedule, lr=2, clip=5))  # floats given as such
    bench = Bench(cells=[BenchCell.variational], precisions=[Precision.fp32])
    for config in (*configs, whole, bench):
        expected = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
        assert json.dumps(plain(config)) == json.dumps(expected)


FORMER_NULLS = ("dir", "train", "valid", "test", "csv", "delimiter", "name", "config", "revision", "column")


@pytest.mark.parametrize(
    ("words", "former"),
    [
        ([], {"min_count": 1, "vocabulary_size": None}),
        (["data=pydoc"], {"vocabulary_size": None}),
        (["task=sentiment"], {"cache": "elsewhere"}),
        (["task=sentiment", "data=vader"], {"cache": None}),
    ],
)
def test_former_configurations_with_the_settings_of_every_corpus_and_task_are_read(
    words: list[str], former: dict[str, Any]
) -> None:
    config = settings(*words)
    values = plain(config)
    task_nulls = dict.fromkeys(("bptt", "protocol", "chunk_words", "split_seed", "length_pool"))
    values["data"] = dict.fromkeys((*FORMER_NULLS, "rating_column")) | former | values["data"]
    values["task"] = task_nulls | values["task"]
    assert restore(values) == config


def test_a_stored_setting_of_another_corpus_or_task_is_refused() -> None:
    values = plain(settings("data=pydoc"))
    for group, key, value in (
        ("data", "csv", "a"),
        ("data", "vocabulary_size", 9),
        ("task", "protocol", "paper"),
        ("task", "bptt", None),
    ):
        with pytest.raises(ConfigError, match=rf"^{group}\.{key} must be "):
            restore(values | {group: values[group] | {key: value}})


@pytest.mark.parametrize(("command", "words"), [("train", ["task=sentiment"]), ("data", ["data=pydoc"])])
def test_a_composed_configuration_can_be_sent_to_another_process(command: str, words: list[str]) -> None:
    """As launchers do."""
    sent = pickle.loads(pickle.dumps(composed(*words, command=command)))
    assert parse(sent, ROOTS[command]) == settings(*words, command=command)


def test_the_settings_of_a_corpus_and_a_task_are_those_that_apply() -> None:
    assert set(plain(settings())["data"]) == {"source", "dir", "cache", "fraction"}
    assert set(plain(settings())["task"]) == {
        *("name", "batch_size", "bptt", "random_length", "reset", "ar", "tar"),
        *("augmented_loss", "augmented_temperature"),
    }
    ratings = plain(settings("task=sentiment"))
    assert set(ratings["data"]) == {"source", "dir", "min_count", "vocabulary_size", "fraction"}
    assert "bptt" not in ratings["task"]


def test_what_was_written_down_is_data_and_is_not_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither OmegaConf's interpolations, nor groups within each other without an end, nor the same group
    again and again.
    """
    monkeypatch.setenv("SECRET", "hunter2")
    good = plain(settings())
    shared: dict[str, Any] = {"a": 1}
    for _ in range(60):
        shared = {"a": shared, "b": shared}
    endless: dict[str, Any] = {}
    endless["a"] = endless
    data = good["data"]
    for wrong in (
        *(
            {"outputs": "${oc.env:SECRET}"},
            {"data": data | {"dir": "${seed}"}},
            {"data": shared},
            {"data": endless},
            {"x": [[1]]},
        ),
        *(
            {"data": data | {"${oc.env:SECRET}": 1}},
            {"data": {3: 4}},
            {"data": data | {"dir": b"x"}},
            {"a": {"b": {"c": {"d": {"e": {}}}}}},
        ),
    ):
        with pytest.raises(ConfigError) as refused:
            restore(good | wrong)
        assert "hunter2" not in str(refused.value)
    with pytest.raises(ConfigError):
        restore([good])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^data\.train must be a text without \$\{"):
        plain(settings("data=text", r"data.train='a\${b}'", "data.valid=b", "data.test=c"))


def test_what_is_as_by_default_is_no_part_of_a_runs_identity() -> None:
    """So a setting can be added without older runs being made again."""
    stored = without_defaults(settings("model=lstm_small", "dropout=none"))
    assert stored["model"] == {
        "name": "lstm_small",
        "size": "small",
        "cell": "lstm",
        "hidden_size": 200,
        "layers": 2,
        "init": 0.1,
    }
    assert stored["dropout"] == {"name": "none", "policy": "none"} and stored["task"]["bptt"] == 20
    assert settings("dropout=none").identity("f") == "bf584e53", (
        "folders of runs are named by it: nothing may change it"
    )
    without = settings("dropout=none")
    given = settings(
        "dropout=none",
        "model.forget_bias=0",
        "dropout.p_h=0",
        "seed=5",
        "log_every=7",
        "tags=[a]",
        "run_name=b",
        "logger=none",
    )
    assert (
        without.identity("f")
        == given.identity("f")
        != settings("dropout=none", "model.forget_bias=1").identity("f")
    )


def test_the_order_of_places_is_no_part_of_a_runs_identity() -> None:
    one, other = (settings(f"dropout.new_each_step=[{places}]") for places in ("p_x,p_out", "p_out,p_x,p_x"))
    assert one.identity("f") == other.identity("f") != settings().identity("f")


def test_which_gpu_of_a_machine_is_no_part_of_a_runs_identity() -> None:
    one, other, cpu = (settings(f"device={device}").identity("f") for device in ("cuda", "cuda:1", "cpu"))
    assert one == other != cpu


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=ptb", "data.min_count=2"], r"data\.min_count must be unset with data=ptb, got 2"),
        (
            ["task=sentiment", "model.tie_embeddings=true"],
            r"model\.tie_embeddings must be false with task=sentiment, .*, got true",
        ),
        (
            ["schedule.lr_shape=cosine"],
            r"schedule\.decay must be 1 with schedule\.lr_shape=cosine, .*, got 1\.2",
        ),
        (
            ["schedule.lr_shape=linear", "schedule.decay=1", "schedule.max_epoch=39"],
            r"schedule\.max_epoch must be below schedule\.epochs=39 .*, got 39",
        ),
        (
            ["schedule.lr_shape=plateau", "schedule.decay=1"],
            r"schedule\.decay must be above 1 with schedule\.lr_shape=plateau, got 1\.0",
        ),
        (
            ["task=sentiment", "schedule.lr_shape=plateau", "schedule.decay=2"],
            r"schedule\.lr_shape must be another than plateau with task\.protocol=paper",
        ),
        (
            ["schedule.plateau_gain=0.1"],
            r"schedule\.plateau_gain must be 0\.0 with schedule\.lr_shape=step, got 0\.1",
        ),
        (
            ["schedule.plateau_epochs=3"],
            r"schedule\.plateau_epochs must be 1 with schedule\.lr_shape=step, got 3",
        ),
        (["schedule.lr_end=0.1"], r"schedule\.lr_end must be 0\.0 with schedule\.lr_shape=step, got 0\.1"),
        (
            ["schedule.report_last=true"],
            r"schedule\.report_last must be false, except with task\.protocol=clean and without",
        ),
        (
            ["task=sentiment", "task.protocol=clean", "schedule.report_last=true", "schedule.patience=2"],
            r"schedule\.report_last must be false, except with task\.protocol=clean and without",
        ),
        (["schedule.beta1=0"], r"schedule\.beta1 must be 0\.9 with schedule\.optimiser=sgd, got 0\.0"),
        (
            ["model.lower_sizes=[3,4]"],
            r"model\.lower_sizes must be empty, or 1 sizes, with model\.layers=2, got",
        ),
        (["model.lower_sizes=[0]"], r"model\.lower_sizes must be at least 1, got 0"),
        (
            ["model.lower_sizes=[9]", "model.residual=true"],
            r"model\.residual must be false where the sizes of the layers differ",
        ),
        (["model.layers=1", "model.residual=true"], r"model\.residual must be false with model\.layers=1"),
        (["dropout.p_weight=1"], r"dropout\.p_weight must be in \[0, 1\), got 1"),
        (
            ["dropout=naive", "dropout.p_weight=0.1"],
            r"dropout\.p_weight must be 0 with dropout\.policy=naive",
        ),
        (["model.embedding_size=0"], r"model\.embedding_size must be at least 1, or null, got 0"),
        (
            ["task.bptt=9", "task.random_length=true"],
            r"task\.random_length must be false with task\.bptt below 10, got true",
        ),
        (["task.reset=1.5"], r"task\.reset must be in \[0, 1\], got 1\.5"),
        (
            ["task.augmented_loss=13"],
            r"task\.augmented_temperature must be a number with task\.augmented_loss=13, got null",
        ),
        (
            ["task.augmented_temperature=20"],
            r"task\.augmented_temperature must be null with task\.augmented_loss=0, got 20\.0",
        ),
        (
            ["dropout.p_out=0", "dropout.p_h=0", "dropout.one_state_mask=true"],
            r"dropout\.one_state_mask must be false with dropout\.p_h=0, got true",
        ),
        (
            ["dropout.one_state_mask=true"],
            r"dropout\.p_out must be 0 with dropout\.one_state_mask=true, got 0\.35",
        ),
        (
            ["dropout.p_out=0", "dropout.p_between=0.2", "dropout.one_state_mask=true"],
            r"dropout\.p_between must be unset with dropout\.one_state_mask=true, got 0\.2",
        ),
        (
            ["dropout=variational_untied", "dropout.p_out=0", "dropout.one_state_mask=true"],
            r"dropout\.untied must be false with dropout\.one_state_mask=true, got true",
        ),
        (
            ["dropout.p_out=0", "dropout.one_state_mask=true", "model.residual=true"],
            r"dropout\.one_state_mask must be false with model\.residual=true, got true",
        ),
        (
            ["dropout.p_out=0", "dropout.one_state_mask=true", "dropout.new_each_step=[p_h]"],
            r"dropout\.new_each_step must be without p_h with dropout\.one_state_mask=true",
        ),
        (["task.tar=-1"], r"task\.tar must be at least 0, and finite, got -1\.0"),
        (["task.tar=1", "task.bptt=1"], r"task\.tar must be 0 with task\.bptt=1, got 1\.0"),
        (["outputs="], r"outputs must be a folder; \. is the current one, got nothing"),
        (
            ["dropout=variational_untied", "dropout.p_x=0", "dropout.p_h=0"],
            r"dropout\.untied must be false where no place with gates drops: dropout\.p_x, dropout\.p_h or",
        ),
        (
            ["schedule.average_decay=1", "schedule.epochs=3"],
            r"schedule\.epochs must be at least 4 with schedule\.average_decay, or schedule\.average_from a",
        ),
        (["dropout.p_h=1"], r"dropout\.p_h must be in \[0, 1\), got 1\.0"),
        (["dropout.p_x=-0.1"], r"dropout\.p_x must be in \[0, 1\)"),
        (["dropout.p_x=nan"], r"dropout\.p_x must be in \[0, 1\)"),
        (["dropout.p_c=0.5"], r"dropout\.p_c must be 0 with dropout\.policy=variational"),
        (
            ["dropout.p_out=0", "dropout.new_each_step=[p_out]"],
            r"dropout\.new_each_step must be without p_out, where nothing is dropped, got p_out",
        ),
        (["model.layers=1", "dropout.p_between=0.5"], r"dropout\.p_between must be null, and not in"),
        (
            ["model.layers=1", "dropout.new_each_step=[p_between]"],
            r"dropout\.p_between must be null, and not",
        ),
        *(
            (
                ["task=sentiment", "task.protocol=clean", "schedule.report_last=true", *steered],
                r"schedule\.report_last must be false where validation decides",
            )
            for steered in (["schedule.lr_shape=plateau", "schedule.decay=2"], ["schedule.average_decay=1"])
        ),
        (["task=sentiment", "dropout.p_head=0.3"], r"dropout\.p_head must be 0 with task=sentiment"),
        (["dropout.p_head=0.3"], r"dropout\.p_head must be 0 without a projection, which comes with"),
        (
            ["model.tie_embeddings=true", "dropout.p_head=0.3"],
            r"dropout\.p_head must be 0 without a projection, which comes with",
        ),
        (
            ["dropout.new_each_step=[p_c]"],
            r"dropout\.new_each_step must be of p_x, p_between, p_h, p_out, p_head",
        ),
        (
            ["dropout=naive", "dropout.new_each_step=[p_h]"],
            r"dropout\.new_each_step must be empty with dropout\.policy=naive, got p_h",
        ),
        (["dropout=none", "dropout.p_between=0.5"], r"dropout\.p_between must be unset with dropout\.policy"),
        (["dropout=none", "dropout.p_h=0.5"], r"dropout\.p_h must be 0 with dropout\.policy=none"),
        (
            ["dropout=zaremba", "dropout.p_word=0.5"],
            r"dropout\.p_word must be 0 with dropout\.policy=zaremba",
        ),
        (
            ["dropout=naive", "dropout.untied=true"],
            r"dropout\.untied must be false with dropout\.policy=naive",
        ),
        (["dropout=zaremba", "dropout.word_mask=token"], r"dropout\.word_mask must be type"),
        (["dropout=moon", "model=gru_small"], "dropout must be another policy than moon with a GRU"),
        (["model.reset_after=true"], r"model\.reset_after must be false for an LSTM"),
        (["model.layers=0"], r"model\.layers must be in"),
        (["model.hidden_size=-1"], r"model\.hidden_size must be at least 1"),
        (["model.init=0"], r"model\.init must be above 0"),
        (["task.batch_size=0"], r"task\.batch_size"),
        (["task.bptt=0"], r"task\.bptt"),
        (["schedule.epochs=0"], r"schedule\.epochs"),
        (["schedule.lr=0"], r"schedule\.lr"),
        (["schedule.lr=inf"], r"schedule\.lr"),
        (["schedule.decay=0.5"], r"schedule\.decay"),
        (["schedule.max_epoch=-1"], r"schedule\.max_epoch"),
        (["schedule.clip=0"], r"schedule\.clip"),
        (["schedule.weight_decay=1"], r"schedule\.weight_decay"),
        (["schedule.patience=0"], r"schedule\.patience"),
        (["seed=-1"], "seed must be"),
        (["checkpoint.minutes=0"], r"checkpoint\.minutes must be above 0"),
        (["checkpoint.epochs=0"], r"checkpoint\.epochs must be at least 1, got 0"),
        (["stuck.steps=0"], r"stuck\.steps must be at least 1, or null, got 0"),
        (["stuck.loss=5"], r"stuck\.loss must be 7 without stuck\.steps, which it is for, got 5"),
        (["stuck.loss=0"], r"stuck\.loss must be above 0"),
        (["stuck.loss=nan"], r"stuck\.loss must be above 0"),
        (["task=sentiment", "stuck.steps=3"], r"stuck\.steps must be null with task=sentiment, got 3"),
        (["log_every=0"], "log_every must be"),
        (["run_name=' '"], "run_name must be letters"),
        (["tags=[a b]"], "tags must be"),
        (["data.min_count=0"], r"data\.min_count"),
        (["data.train=a"], r"data\.train must be unset with data=ptb, got a"),
        (["data=text", "data.train=a", "data.valid=b"], r"data\.test must be set with data=text"),
        (["data=hub", "data.name=a"], r"data\.column must be set with data=hub"),
        (["data=vader"], r"data must be one of ptb, pydoc, text, hub with task=language_model, got vader"),
        (
            ["task=sentiment", "data=ptb"],
            r"data must be one of cornell, vader, text_regression with task=sentiment, got ptb",
        ),
        (["task=sentiment", "task.bptt=3"], r"task\.bptt must be unset with task=sentiment, got 3"),
        (
            ["task=sentiment", "task.protocol=null"],
            r"task\.protocol must be set with task=sentiment, got nothing",
        ),
        (["task=sentiment", "task.chunk_words=1"], r"task\.chunk_words must be at least 2, or null, got 1"),
        (["task=sentiment", "task.split_seed=-1"], r"task\.split_seed must be in"),
        (
            ["task=sentiment", "schedule.patience=3"],
            r"schedule\.patience must be null with task\.protocol=paper",
        ),
        (
            [
                "task=sentiment",
                "data=text_regression",
                "data.csv=a",
                "data.revision=b",
                "data.column=c",
                "data.rating_column=d",
            ],
            r"data\.revision",
        ),
        (["task=sentiment", "task.length_pool=0"], r"task\.length_pool must be at least 1"),
        (["task.bptt=null"], r"task\.bptt must be set with task=language_model, got nothing"),
        (["task.chunk_words=9"], r"task\.chunk_words must be unset with task=language_model, got 9"),
        (["model.forget_bias=nan"], r"model\.forget_bias must be finite"),
        (["model=gru_small", "model.forget_bias=1"], r"model\.forget_bias must be 0 for a GRU"),
        (["task=sentiment", "data.cache=a"], r"data\.cache must be unset with data=cornell, got a"),
        (["data=text", "data.source=ptb"], r"data\.min_count must be unset with data=ptb, got 2"),
        (["data.vocabulary_size=9"], r"data\.vocabulary_size must be unset with data=ptb"),
        (
            ["data=cornell", "data.vocabulary_size=0"],
            r"data\.vocabulary_size must be at least 1, or null, got 0",
        ),
        (["data=ptb", "data.delimiter=tab"], r"data\.delimiter must be unset with data=ptb, got tab"),
        (
            [
                "task=sentiment",
                "data=text_regression",
                "data.name=a",
                "data.column=b",
                "data.rating_column=c",
                "data.delimiter=tab",
            ],
            r"data\.delimiter must be null without data\.csv, got tab",
        ),
        *(
            (
                [
                    "task=sentiment",
                    "data=text_regression",
                    "data.csv=a",
                    "data.column=b",
                    "data.rating_column=c",
                    f"data.delimiter='{sign}'",
                ],
                r"data\.delimiter must be one character that is no quotation mark",
            )
            for sign in ('"', "", "::", "\n")
        ),
        (
            ["task=sentiment", "data=text_regression", "data.csv=a", "data.column=b", "data.rating_column=b"],
            r"data\.rating_column must be another column than data\.column, got b",
        ),
        (
            ["data=text_regression", "data.csv=a", "data.column=b"],
            r"data\.rating_column must be set with data=text_regression",
        ),
        (
            ["data=text_regression", "data.csv=a", "data.name=b", "data.column=b", "data.rating_column=c"],
            r"data\.csv must be set .*got both",
        ),
        (["+model.hiden=3"], r"model\.hiden is not a setting; did you mean model\.hidden_size\?"),
        (["+foo=3"], "foo is not a setting"),
    ],
)
def test_values_out_of_bounds_are_refused_by_name(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        settings(*overrides)


OF_ONES_OWN = ["data=text_regression", "data.csv=a", "data.column=b", "data.rating_column=c"]


@pytest.mark.parametrize(
    ("data", "protocol"),
    [([], "paper"), (["data=cornell"], "paper"), (["data=vader"], "clean"), (OF_ONES_OWN, "clean")],
)
def test_the_authors_protocol_is_that_of_their_data_alone(data: list[str], protocol: str) -> None:
    """It has no validation part; on other data it has to be asked for."""
    assert str(settings("task=sentiment", *data).task.protocol) == protocol
    assert str(settings("task=sentiment", *data, "task.protocol=paper").task.protocol) == "paper"
    assert str(settings("task=sentiment", *data, "task.protocol=clean").task.protocol) == "clean"


def test_the_identity_of_runs_on_film_reviews_is_what_it_was() -> None:
    """Folders of runs are named by it."""
    assert settings("task=sentiment").identity("f") == "d63c1b23"
    assert settings("task=sentiment", "task.protocol=clean").identity("f") == "f8232d65"


def test_the_set_of_settings_is_frozen() -> None:
    """A setting that comes, goes or is renamed changes what people type: this list, the README and the
    records go with it.
    """
    assert {command: keys(root) for command, root in ROOTS.items()} == json.loads(
        (Path(__file__).parent / "settings.json").read_text()
    )


PLATEAU = ("schedule.lr_shape=plateau", "schedule.decay=9", "schedule.max_epoch=0")
# What each setting of `vdrop train` changes: overrides without it, the override itself, and where the
# difference shows.
CHANGES: dict[str, tuple[list[str], list[str], str]] = {
    "model.name": ([], ["model.name=other"], "folder"),
    "model.size": ([], ["model.size=large"], "numbers"),
    "model.cell": ([], ["model.cell=gru"], "numbers"),
    "model.hidden_size": ([], ["model.hidden_size=9"], "numbers"),
    "model.layers": ([], ["model.layers=1"], "numbers"),
    "model.init": ([], ["model.init=0.2"], "numbers"),
    "model.forget_bias": ([], ["model.forget_bias=1"], "numbers"),
    "model.reset_after": (["model=gru_small"], ["model.reset_after=true"], "numbers"),
    "model.embedding_size": ([], ["model.embedding_size=9"], "numbers"),
    "model.tie_embeddings": ([], ["model.tie_embeddings=true"], "numbers"),
    "model.lower_sizes": ([], ["model.lower_sizes=[9]"], "numbers"),
    "model.residual": ([], ["model.residual=true"], "numbers"),
    "model.embedding_std": ([], ["model.embedding_std=1"], "numbers"),
    "dropout.name": ([], ["dropout.name=other"], "folder"),
    "dropout.policy": (["dropout.p_word=0"], ["dropout.policy=naive"], "numbers"),
    "dropout.untied": ([], ["dropout.untied=true"], "numbers"),
    "dropout.p_word": ([], ["dropout.p_word=0.4"], "numbers"),
    "dropout.p_x": ([], ["dropout.p_x=0.4"], "numbers"),
    "dropout.p_between": ([], ["dropout.p_between=0.4"], "numbers"),
    "dropout.new_each_step": ([], ["dropout.new_each_step=[p_out]"], "numbers"),
    "dropout.p_h": ([], ["dropout.p_h=0.4"], "numbers"),
    "dropout.p_c": (["dropout=moon"], ["dropout.p_c=0.4"], "numbers"),
    "dropout.p_weight": ([], ["dropout.p_weight=0.4"], "numbers"),
    "dropout.p_out": ([], ["dropout.p_out=0.4"], "numbers"),
    "dropout.p_head": (
        ["model.tie_embeddings=true", "model.embedding_size=3"],
        ["dropout.p_head=0.4"],
        "numbers",
    ),
    "dropout.one_state_mask": (["dropout.p_out=0"], ["dropout.one_state_mask=true"], "numbers"),
    "dropout.word_mask": ([], ["dropout.word_mask=token"], "numbers"),
    "data.train": ([], ["data.train={folder}/valid.txt"], "numbers"),
    "data.valid": ([], ["data.valid={folder}/test.txt"], "numbers"),
    "data.test": ([], ["data.test={folder}/valid.txt"], "numbers"),
    "data.min_count": ([], ["data.min_count=17"], "numbers"),
    "data.fraction": ([], ["data.fraction=0.5"], "numbers"),
    "data.cache": ([], ["data.cache=cache"], "files"),
    "task.batch_size": ([], ["task.batch_size=3"], "numbers"),
    "task.bptt": ([], ["task.bptt=6"], "numbers"),
    "task.random_length": (["task.bptt=10"], ["task.random_length=true"], "numbers"),
    "task.reset": ([], ["task.reset=0.5"], "numbers"),
    "task.ar": ([], ["task.ar=2"], "numbers"),
    "task.tar": ([], ["task.tar=2"], "numbers"),
    "task.augmented_loss": (
        ["task.augmented_loss=1", "task.augmented_temperature=20"],
        ["task.augmented_loss=3"],
        "numbers",
    ),
    "task.augmented_temperature": (
        ["task.augmented_loss=1", "task.augmented_temperature=20"],
        ["task.augmented_temperature=2"],
        "numbers",
    ),
    "schedule.epochs": ([], ["schedule.epochs=2"], "numbers"),
    "schedule.optimiser": (["schedule.lr=0.01"], ["schedule.optimiser=adam"], "numbers"),
    "schedule.lr": ([], ["schedule.lr=0.5"], "numbers"),
    "schedule.decay": (["schedule.epochs=3", "schedule.max_epoch=0"], ["schedule.decay=4"], "numbers"),
    "schedule.max_epoch": (["schedule.epochs=3"], ["schedule.max_epoch=0"], "numbers"),
    "schedule.clip": ([], ["schedule.clip=0.1"], "numbers"),
    "schedule.weight_decay": ([], ["schedule.weight_decay=0.1"], "numbers"),
    "schedule.max_steps": ([], ["schedule.max_steps=5"], "numbers"),
    "schedule.beta1": (["schedule.lr=0.01", "schedule.optimiser=adam"], ["schedule.beta1=0"], "numbers"),
    "schedule.beta2": (["schedule.lr=0.01", "schedule.optimiser=adamw"], ["schedule.beta2=0.5"], "numbers"),
    "schedule.lr_shape": (
        ["schedule.decay=1", "schedule.max_epoch=0"],
        ["schedule.lr_shape=linear"],
        "numbers",
    ),
    "schedule.warmup": ([], ["schedule.warmup=3"], "numbers"),
    "schedule.plateau_gain": (["schedule.epochs=3", *PLATEAU], ["schedule.plateau_gain=0.9"], "numbers"),
    "schedule.plateau_epochs": (
        ["schedule.epochs=6", "schedule.lr=30", "schedule.clip=inf", *PLATEAU],
        ["schedule.plateau_epochs=3"],
        "numbers",
    ),
    "schedule.lr_end": (
        ["schedule.decay=1", "schedule.max_epoch=0", "schedule.lr_shape=cosine"],
        ["schedule.lr_end=0.9"],
        "numbers",
    ),
    "schedule.average_decay": (
        ["schedule.average_from=0", "schedule.average_decay=1"],
        ["schedule.average_decay=0.9"],
        "numbers",
    ),
    "schedule.average_from": (
        ["schedule.epochs=3", "schedule.average_decay=1", "schedule.average_from=2"],
        ["schedule.average_from=1"],
        "numbers",
    ),
    "schedule.average_trigger": (
        [
            *("schedule.epochs=6", "schedule.lr=30", "schedule.clip=inf", "schedule.average_decay=1"),
            "schedule.average_trigger=3",
        ],
        ["schedule.average_trigger=1"],
        "numbers",
    ),
    "schedule.patience": (
        ["schedule.epochs=8", "schedule.lr=30", "schedule.clip=inf"],
        ["schedule.patience=1"],
        "numbers",
    ),
    "run_name": ([], ["run_name=mine"], "name"),
    "tags": ([], ["tags=[a,b]"], "name"),
    "seed": ([], ["seed=2"], "numbers"),
    "backend": ([], ["backend=reference"], "environment"),
    "precision": ([], ["precision=bf16"], "numbers"),
    "outputs": ([], ["outputs=elsewhere"], "folder"),
    "log_every": ([], ["log_every=1"], "log"),
    "logger": ([], ["logger=none"], "files of the run"),
    "debug": ([], ["debug=true"], "folder"),
}
SENTIMENT_CHANGES = {  # the same for those of the other task
    "data.vocabulary_size": "data.vocabulary_size=3",
    "task.protocol": "task.protocol=clean",
    "task.chunk_words": "task.chunk_words=9",
    "task.split_seed": "task.split_seed=1",
    "task.length_pool": "task.length_pool=3",
}
SHOWN_ELSEWHERE = {
    "data.source": "tests/corpora",
    "data.dir": "tests/corpora/test_ptb.py",
    "data.name": "tests/corpora/test_hub.py",
    "data.config": "tests/corpora/test_hub.py",
    "data.revision": "tests/corpora/test_hub.py",
    "data.column": "tests/corpora/test_hub.py",
    "data.csv": "tests/corpora/test_text_regression.py",
    "data.delimiter": "tests/corpora/test_text_regression.py",
    "data.rating_column": "tests/corpora/test_text_regression.py",
    "task.name": "tests/tasks",
    "schedule.report_last": "tests/test_training.py",
    "device": "tests/test_device.py",
    "force": "tests/commands/test_train.py",
    "checkpoint.minutes": "tests/test_training.py",
    "checkpoint.epochs": "tests/test_training.py",
    "stuck.steps": "tests/test_stuck_starts.py",
    "stuck.loss": "tests/test_stuck_starts.py",
}


def observe(overrides: list[str]) -> dict[str, Any]:
    """Runs a training to its end and returns what can be seen of it, by name."""
    settled = settings(*overrides)
    before = set(Path().rglob("*"))
    train.run(settled)
    folder = next(path.parent for path in Path().rglob("result.json") if path not in before)
    log = read_log(folder / "log.jsonl")
    numbers = {
        name: value
        for name, value in json.loads((folder / "result.json").read_text()).items()
        if name != "seconds"
    }
    return {
        "numbers": numbers,
        "folder": folder.parent,
        "files": sorted(path.name for path in Path().glob("*")),
        "environment": log[0]["environment"]["backend"],
        "log": len(log),
        "files of the run": len(list(folder.iterdir())),
        "name": (log[0]["config"]["run_name"], log[0]["config"]["tags"]),
    }


Observe = Callable[[list[str]], dict[str, Any]]


@pytest.fixture(scope="module")
def observe_once(tmp_path_factory: pytest.TempPathFactory) -> Observe:
    """`observe` in a folder of its own; the same training is run once."""
    seen = dict[tuple[str, ...], dict[str, Any]]()

    def run(overrides: list[str]) -> dict[str, Any]:
        if (key := tuple(overrides)) not in seen:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(tmp_path_factory.mktemp("observed"))
                seen[key] = observe(overrides)
        return seen[key]

    return run


@pytest.mark.parametrize("key", CHANGES)
def test_every_setting_changes_something(
    key: str, text: list[str], text_folder: Path, observe_once: Observe
) -> None:
    without, override, shown = CHANGES[key]
    base = [*TINY, *text, *without]
    before = observe_once(base)
    after = observe_once([*base, *(one.format(folder=text_folder) for one in override)])
    assert before[shown] != after[shown]
    if shown not in ("numbers", "environment") and key != "debug":
        assert before["numbers"] == after["numbers"], "names, places and loggers change no number"


@pytest.mark.parametrize("key", SENTIMENT_CHANGES)
def test_every_setting_of_the_other_task_does(key: str, rated: list[str], observe_once: Observe) -> None:
    base = [*TINY_SENTIMENT, *rated]
    assert observe_once(base)["numbers"] != observe_once([*base, SENTIMENT_CHANGES[key]])["numbers"]


def test_no_setting_is_left_out_of_that() -> None:
    assert {*CHANGES, *SENTIMENT_CHANGES, *SHOWN_ELSEWHERE} == set(keys(Train))
    root = Path(__file__).parent.parent
    assert all((root / where).exists() for where in SHOWN_ELSEWHERE.values())


def test_every_policy_can_be_chosen() -> None:
    chosen = {
        settings("model=lstm_small", f"dropout={path.stem}").dropout.policy
        for path in (CONF / "dropout").glob("*.yaml")
    }
    assert chosen == set(Policy)


HUGE = 10**26


def nodes(node: Any, prefix: str = "") -> Iterator[tuple[Any, str]]:
    yield node, prefix
    for f in fields(node):
        if is_dataclass(getattr(node, f.name)):
            yield from nodes(getattr(node, f.name), f"{prefix}{f.name}.")


@pytest.mark.parametrize("command", sorted(ROOTS))
def test_every_whole_number_and_every_path_has_a_limit(command: str) -> None:
    made = settings(*NEEDS.get(f"{command}.yaml", []), command=command)
    for node, prefix in nodes(made):
        for f in fields(node):
            is_number = f.type is int or int in get_args(f.type)
            too_much: list[object] = [HUGE] if is_number else []
            if isinstance(rule(f), FilePath):
                too_much += ["x" * 5000, "x/" * 2500, "é" * 128, "a\0b"]
            for value in too_much:
                listed = [value] if f.type == list[str] else value
                with pytest.raises(ConfigError, match=rf"^{re.escape(prefix + f.name)} must be "):
                    replace(node, **{f.name: listed})


PATHS = {  # settings that name a file, a folder or a data set
    "train": {"dir", "train", "valid", "test", "csv", "name", "cache"},
    "eval": {"dir", "train", "valid", "test", "csv", "name"},
    "predict": {"dir", "train", "valid", "test", "csv", "name"},
    "data": {"dir", "train", "valid", "test", "csv", "name", "cache"},
}
MORE_PATHS = {
    "checkpoint",
    "members",
    "outputs",
    "file",
    "folder",
    "csv",
    "latex",
    "markdown",
    "picture",
    "runs",
}


@pytest.mark.parametrize("command", sorted(ROOTS))
def test_what_is_a_path(command: str) -> None:
    paths = {key for key, f, _ in walk(ROOTS[command]) if isinstance(rule(f), FilePath)}
    expected = {f"data.{name}" for name in PATHS.get(command, ())} | (MORE_PATHS & set(keys(ROOTS[command])))
    assert paths == expected


@pytest.mark.parametrize(
    ("command", "key", "value"),
    [
        ("train", "model.hidden_size", str(HUGE)),
        ("train", "schedule.max_epoch", "9" * 30),
        ("train", "data.min_count", "9" * 30),
        ("train", "outputs", "x" * 5000),
        ("train", "model.layers", "1001"),
        ("train", "model.name", "x" * 101),
        ("train", "seed", str(2**63)),
        ("eval", "mc_samples", str(10**30)),
        ("eval", "checkpoint", "x" * 5000),
        ("predict", "mc_samples", str(10**30)),
        ("reproduce", "mc_samples", str(10**30)),
    ],
)
def test_what_no_machine_can_hold_is_named(command: str, key: str, value: str) -> None:
    more = ["data=pydoc"] if key == "data.min_count" else []
    with pytest.raises(ConfigError, match=rf"^{key} must be "):
        settings(*NEEDS.get(f"{command}.yaml", []), *more, f"{key}={value}", command=command)


def test_nested_settings_have_full_names() -> None:
    assert flatten({"a": {"b": 1, "c": None}, "d": "x", "e": [1, 2], "f": []}) == {
        "a.b": 1,
        "d": "x",
        "e": "1, 2",
    }


@pytest.mark.parametrize("dropout", ["naive", "variational_no_word"])
def test_the_small_tier_has_the_schedule_of_the_small_rows_for_other_dropouts(dropout: str) -> None:
    """The weight decay, too, which is too large at the default of the size."""
    row = settings("experiment=table1_small_variational")
    other = settings("experiment=small_tier", f"dropout={dropout}")
    assert (other.schedule, other.task) == (row.schedule, row.task)
