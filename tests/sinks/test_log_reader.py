"""Damage to a log is detected."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.sinks.examples import write_log
from vdrop_cli.errors import ConfigError
from vdrop_cli.files import Damaged
from vdrop_cli.sinks.json_lines import JsonLines
from vdrop_cli.sinks.log_reader import lines_from_end, log_until, read_log


def line_number(lines: list[str], *parts: str) -> int:
    return next(n for n, line in enumerate(lines) if all(part in line for part in parts))


def without(lines: list[str], number: int) -> list[str]:
    return lines[:number] + lines[number + 1 :]


DAMAGES: dict[str, Callable[[list[str]], list[str]]] = {
    "cut at its end": lambda lines: lines[:-1],
    "cut in its last epoch": lambda lines: lines[:-3],
    "a step taken out": lambda lines: without(lines, line_number(lines, '"step": 14,')),
    "an epoch taken out": lambda lines: without(lines, line_number(lines, '"kind": "epoch"', '"epoch": 2,')),
    "reordered": lambda lines: [*lines[:-3], lines[-2], lines[-3], lines[-1]],
    "an epoch with another number": lambda lines: [
        line.replace('"epoch": 3, "step": 18', '"epoch": 4, "step": 18') for line in lines
    ],
    "an epoch with another loss": lambda lines: [
        *lines[:-1],
        lines[-1].replace('"train_loss": 2.0', '"train_loss": 1.9'),
    ],
    "an epoch without its chain": lambda lines: [*lines[:-1], re.sub(r', "chain": "\w+"', "", lines[-1])],
    "a loss of another type": lambda lines: [
        *lines[:-2],
        lines[-2].replace('"loss": 2.0', '"loss": "2.0"'),
        lines[-1],
    ],
    "a loss that is no number": lambda lines: [
        *lines[:-2],
        lines[-2].replace('"loss": 2.0', '"loss": NaN'),
        lines[-1],
    ],
    "deep nesting": lambda lines: [*lines[:-2], "[" * 100_000, lines[-1]],
    "no record": lambda lines: [*lines[:-2], "[1]", lines[-1]],
    "no known kind": lambda lines: [*lines[:-2], '{"kind": ["step"]}', lines[-1]],
    "emptied": lambda lines: [],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_log_is_refused_on_resuming_and_left_as_it_is(damage: str, tmp_path: Path) -> None:
    path = write_log(tmp_path)
    changed = "".join(f"{line}\n" for line in DAMAGES[damage](path.read_text().splitlines()))
    assert changed != path.read_text()
    path.write_text(changed)
    with pytest.raises(ConfigError, match=r"log\.jsonl .*move it away"):
        JsonLines(tmp_path, 1, 3, 18)
    with pytest.raises(Damaged):
        log_until(path, 3, 18)
    assert path.read_text() == changed


def test_a_log_until_the_end_of_an_epoch_is_the_log_at_that_time(tmp_path: Path) -> None:
    path = write_log(tmp_path)
    whole = path.read_bytes()
    for epochs, last in (
        (1, '"epoch": 1, "step": 6'),
        (2, '"epoch": 2, "step": 12'),
        (3, '"epoch": 3, "step": 18'),
    ):
        content = log_until(path, epochs, 6 * epochs)
        assert content is not None and whole.startswith(content)
        assert content.splitlines()[-1].decode().startswith('{"kind": "epoch", ' + last)
    assert content == whole
    first, *others = whole.split(b'"valid_ppl_batched": 99.0', 1)
    path.write_bytes(b'"valid_ppl_batched": 9.0'.join([first, *others]))
    with pytest.raises(Damaged, match="epoch 1, or one before it, was changed"):
        log_until(path, 3, 18)
    assert log_until(tmp_path / "nowhere", 1, 6) is None


def test_a_log_that_is_cut_within_an_epoch_is_refused_on_resuming(tmp_path: Path) -> None:
    path = write_log(tmp_path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))
    with pytest.raises(ConfigError, match="steps after step 16 are missing"):
        JsonLines(tmp_path, 1, 2, 17)
    JsonLines(tmp_path, 1, 2, 16)


@pytest.mark.parametrize(
    "damage", sorted(DAMAGES.keys() - {"emptied", "cut at its end", "cut in its last epoch"})
)
def test_a_damaged_log_is_refused_where_it_is_read(damage: str, tmp_path: Path) -> None:
    path = write_log(tmp_path)
    assert len(read_log(path)) == 23
    path.write_text("".join(f"{line}\n" for line in DAMAGES[damage](path.read_text().splitlines())))
    with pytest.raises(ConfigError, match=r"log\.jsonl"):
        read_log(path)


def test_an_early_epoch_that_was_changed_is_noticed_by_the_later_ones(tmp_path: Path) -> None:
    path = write_log(tmp_path)
    first, *others = path.read_text().split('"valid_ppl_batched": 99.0', 1)
    path.write_text('"valid_ppl_batched": 9.0'.join([first, *others]))
    with pytest.raises(ConfigError, match="epoch 1, or one before it, was changed"):
        read_log(path)


@pytest.mark.parametrize("block", [1, 7, 64, 4096])
def test_lines_from_the_end_are_those_from_the_beginning(block: int, tmp_path: Path) -> None:
    for content in (b"", b"\n", b"a", b"a\n", b"a\n\nbc\nd", b"\n\n", b"x" * 100 + b"\n" + b"y" * 70 + b"\n"):
        (tmp_path / "f").write_bytes(content)
        with (tmp_path / "f").open("rb") as file:
            lines = list(lines_from_end(file, block))[::-1]
        assert b"".join(line for _, line in lines) == content
        assert [line for _, line in lines] == content.splitlines(keepends=True)
        assert all(content[begin : begin + len(line)] == line for begin, line in lines)
