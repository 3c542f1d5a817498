"""Help that comes from the settings' metadata, on the terminal and as a page."""

import pytest

from vdrop_cli import ROOT, help
from vdrop_cli.arguments import ALIASES
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.commands import ROOTS
from vdrop_cli.settings.fields import keys, walk


def test_the_page_of_settings_is_the_one_that_make_docs_settings_writes() -> None:
    assert (ROOT / "docs" / "settings.md").read_text() == help.page()


@pytest.mark.parametrize("command", ROOTS)
def test_every_setting_says_what_it_means(command: str) -> None:
    for key, f, _ in walk(ROOTS[command]):
        assert len(f.metadata["help"].text) > 8, key


@pytest.mark.parametrize(
    ("command", "words"),
    [*((command, []) for command in ROOTS), ("train", ["task=sentiment"]), ("data", ["data=text"])],
)
def test_help_has_a_line_for_each_setting_that_applies_within_the_width(
    command: str, words: list[str]
) -> None:
    lines = help.command_help(command, words).splitlines()
    shown = [line.split("=")[0].strip() for line in lines if line.startswith("  ") and "=" in line[:40]]
    groups = {"train": ["data=ptb", "task=language_model"], "data": []}.get(command, [])
    chosen = {"task=sentiment": ["data=cornell", "task=sentiment"], "data=text": ["data=text"]}.get(
        "".join(words), groups
    )
    expected = [
        key for key, _, choice in walk(ROOTS[command]) if not choice or not chosen or choice in chosen
    ]
    assert set(expected) <= set(shown)
    if chosen:
        unsuitable = {key for key in keys(ROOTS[command]) if key not in expected}
        assert len(unsuitable) > 5 and not unsuitable & set(shown)
    assert max(map(len, lines)) <= help.WIDTH


def test_a_setting_of_several_corpora_has_the_default_of_each() -> None:
    explained = help.key_help("data.min_count")
    text, ratings, table = explained.strip().split("\n\n")
    assert text.startswith("data.min_count (vdrop train data=pydoc,text,hub; vdrop data data=pydoc,text,hub)")
    assert table.startswith("data.min_count (vdrop train data=text_regression; ")
    assert [part[-1] for part in (text, ratings, table)] == ["2", "1", "2"]


def test_values_are_those_of_the_command_line() -> None:
    shown = help.command_help("train", ["model=gru_small", "dropout=naive", "schedule.clip=null"])
    for pair in ("model.cell=gru", "model.hidden_size=200", "dropout.p_h=0.25", "schedule.clip=null"):
        assert f"  {pair} " in shown


@pytest.mark.parametrize("query", ["schedule.lr", "lr", "learning_rate"])
def test_a_setting_is_explained_by_its_key_its_last_part_or_an_alias(query: str) -> None:
    explained = help.key_help(query)
    assert explained.startswith("schedule.lr (vdrop train)\n") and explained.count("default:") == 1
    assert "above 0" in explained and "default: 1.0" in explained


def test_a_group_is_explained_by_its_settings() -> None:
    explained = help.key_help("schedule")
    assert explained.count("default:") == 20 and "schedule.patience (vdrop train)" in explained


def test_a_setting_of_several_commands_is_explained_for_each() -> None:
    assert {f"vdrop {command}" in help.key_help("mc_samples") for command in ("eval", "predict")} == {True}


def test_an_unknown_key_is_refused_with_the_closest_one() -> None:
    with pytest.raises(ConfigError, match=r"schedule\.lrr .*schedule\.lr\?"):
        help.key_help("schedule.lrr")
    with pytest.raises(ConfigError, match="nothing_like_it"):
        help.key_help("nothing_like_it")


def test_every_alias_is_of_a_setting_and_hides_none() -> None:
    for command, aliases in ALIASES.items():
        known = keys(ROOTS[command])
        assert set(aliases.values()) <= set(known) and not set(aliases) & set(known)
