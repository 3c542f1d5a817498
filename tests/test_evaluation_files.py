"""Files of evaluations: their names, which say how they were made, and their content."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from vdrop_cli import evaluation_files
from vdrop_cli.errors import ConfigError
from vdrop_cli.evaluation_files import Evaluation
from vdrop_cli.settings.choices import Precision

PRECISIONS = (None, Precision.fp32, Precision.bf16)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize(
    "how",
    [
        Evaluation(),
        Evaluation(members=10),
        Evaluation(5, members=10, seed=7, word_dropout=False),
        Evaluation(tempered=True),
        Evaluation(tempered=True, text_digest="0123abcd"),
        Evaluation(50, seed=7, scaled="0.5_1", text_digest="0123abcd"),
        Evaluation(members=10, text_digest="89abcdef"),
        Evaluation(100, seed=7, scaled="0.5_1e-05_1"),
        *(Evaluation(100, seed=7, word_dropout=word) for word in (None, True, False)),
    ],
    ids=str,
)
def test_a_name_says_how_an_evaluation_was_made(how: Evaluation, precision: Precision | None) -> None:
    made = replace(how, precision=precision)
    for checkpoint in ("checkpoint-0003", "checkpoint-0003-00050"):
        path = Path("a") / f"{made.stem(checkpoint, '0123abcd')}.json"
        assert evaluation_files.from_file(path) == evaluation_files.from_file(path, checkpoint) == made
        assert evaluation_files.from_file(path, "checkpoint-0004") is None
    own = made.stem("my-checkpoint", "0123abcd")
    assert own.startswith("my-eval-") and evaluation_files.from_file(Path(f"{own}.json")) is None
    assert evaluation_files.from_file(Path(f"{own}.json"), "my-checkpoint") == made


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("eval-0039-standard.json", Evaluation()),
        ("eval-0039-mc1000-s1.json", Evaluation(1000, seed=1)),
        ("eval-0001-00012-mc3-no_word-s7-bf16.json", Evaluation(3, 1, 7, False, Precision.bf16)),
        ("eval-0001-ensemble10-0123abcd-fp32.json", Evaluation(members=10, precision=Precision.fp32)),
        ("eval-0001-ensemble3-0123abcd-mc50-s2-fp32.json", Evaluation(50, 3, 2, None, Precision.fp32)),
        ("eval-0001-ensemble3-0123abcd-standard.json", None),
        ("eval-0001-ensemble3-0123abcdmc50-s2.json", None),
        ("eval-0039-tempered.json", Evaluation(tempered=True)),
        (
            "eval-0039-standard-file_0123abcd-bf16.json",
            Evaluation(text_digest="0123abcd", precision=Precision.bf16),
        ),
        ("eval-0039-standard-file_0123abc.json", None),
        ("eval-0039-file_0123abcd.json", None),
        ("eval-0039-tempered-mc5-s1.json", None),
        (
            "eval-0039-mc50-s1-scaled_1-bf16.json",
            Evaluation(50, seed=1, scaled="1", precision=Precision.bf16),
        ),
        ("eval-0001-notes.json", None),
        ("eval-0001-mc3.json", None),
        ("eval-0001-standard.partial", None),
        ("result.json", None),
    ],
)
def test_names_that_are_on_disk_keep_their_meaning(name: str, how: Evaluation | None) -> None:
    assert evaluation_files.from_file(Path(name)) == how


def test_an_evaluation_without_a_seed_includes_those_of_any_seed_and_no_others() -> None:
    row = Evaluation(samples=100)
    changes = product((100, 10), (1, 2), (None, True), (None, Precision.fp32))
    made = [Evaluation(s, 1, seed, word, precision) for s, seed, word, precision in changes]
    assert [one for one in made if row.includes(one)] == [Evaluation(100, seed=1), Evaluation(100, seed=2)]
    assert [one for one in made if Evaluation(100, seed=2).includes(one)] == [Evaluation(100, seed=2)]


def test_passes_of_several_runs_are_neither_those_of_one_nor_an_ensemble_without() -> None:
    pooled = Evaluation(samples=100, members=3, seed=1)
    assert not Evaluation(samples=100).includes(pooled) and not Evaluation(members=3).includes(pooled)
    assert Evaluation(samples=100, members=3).includes(pooled)


def test_members_have_one_name_in_any_order() -> None:
    names = ["a/checkpoint-0001.pt", "b/checkpoint-0001.pt"]
    assert evaluation_files.members_digest(names) == evaluation_files.members_digest(names[::-1])
    assert evaluation_files.members_digest(names) != evaluation_files.members_digest(names[:1])


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        '{"metrics": 3}',
        '{"metrics": {"test_ppl": "9"}}',
        '{"metrics": {"test_ppl": NaN}}',
        '{"metrics": {}, "mc": [3]}',
        '{"metrics": {}, "mc": [{"samples": "1"}]}',
        '{"metrics": {}, "tables": []}',
        '{"metrics": {}, "tables": {"positions": []}}',
        '{"metrics": {}, "tables": {"positions": [3]}}',
        '{"metrics": {}, "tables": {"positions": [{"tokens": [3]}]}}',
        '{"metrics": {}, "tables": {"positions": [{"tokens": 3}, {"entropy": 1.0}]}}',
        '{"metrics": {}, "conformal_scores": [2.0, 1.0]}',
        '{"metrics": {}, "conformal_scores": [1]}',
        '{"metrics": {}, "mc": [{"samples": 1, "ppl": "9"}]}',
        '{"metrics": {}, "members": [3]}',
        '{"metrics": {}, "environment": 3}',
        "[" * 100_000,
    ],
)
def test_a_damaged_evaluation_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "eval-0003-mc10-s1.json"
    path.write_text(damage)
    with pytest.raises(ConfigError, match=r"mc10-s1\.json is damaged .*; delete it"):
        evaluation_files.read(path)


def test_factors_that_differ_have_names_that_differ() -> None:
    named = {0.5: "0.5", 1.0: "1", 0.33333333: "0.33333333", 0.33333334: "0.33333334", 1e-7: "1e-07"}
    for factor, name in named.items():
        assert evaluation_files.factor_name(factor) == name and float(name) == factor
        stem = Evaluation(samples=4, seed=1, scaled=name).stem("checkpoint-0001")
        made = evaluation_files.from_file(Path(f"{stem}.json"))
        assert made is not None and made.scaled == name
