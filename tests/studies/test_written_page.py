"""The page that exists already: its numbers, and those that a new page would lose."""

import re

from tests.processes import ROOT
from vdrop_cli.studies import written_page


def test_each_number_of_the_page_of_the_checkout_can_be_lost() -> None:
    whole = (ROOT / "RESULTS.md").read_text()
    assert written_page.lost_numbers(whole, whole) == []
    named = written_page.measured(whole)[0]
    assert any("Ratings of film reviews" in name for name in named) and any(
        "Variational (tied weights)" in name for name in named
    )
    lines = [line for line in whole.splitlines(keepends=True) if line.startswith("| ")]
    run_lines = [
        line
        for line in lines
        if any(name[-1] in line for name in named) and re.search(r"\| (bf16|fp32) \|$", line)
    ]
    assert len(run_lines) > len(named)
    for line in run_lines:
        assert written_page.lost_numbers(whole, whole.replace(line, "", 1)), line
    assert written_page.lost_numbers(whole, "") and written_page.lost_numbers("", whole) == []
    more_seeds = whole.replace(
        "| naive | 24 | 0.0496 ± 0.0133 | 14 ± 7 |", "| naive | 24 | 0.0497 ± 0.0133 | 15 ± 7 |"
    )
    assert more_seeds != whole and written_page.lost_numbers(whole, more_seeds) == [], "means may change"
    assert written_page.lost_numbers(whole, re.sub("^. `dropout.p_c` .*\n", "", whole, flags=re.M))


def test_a_page_of_an_earlier_version_is_replaced_by_one_with_its_numbers_only() -> None:
    """Its tables have seeds, devices and commits, too."""
    old = "\n".join(
        [
            "## Small (200 units)",
            "",
            "| row | valid, exact | test | seeds | precision | device | date | commit |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            "| Moon et al. | 114.12 | 107.35 | 1 | bf16 | AMD EPYC, 1 thread | 2026-11-26 | 0485b04 |",
            "| Zaremba et al. | – | not yet run | – | – | – | – | – |",
        ]
    )
    new = "\n".join(
        [
            "## Small (200 units)",
            "",
            "| row | valid, exact | test | seeds | precision |",
            "| --- | --- | --- | --- | --- |",
            "| Moon et al. | 114.12 | 107.35 | 1 | bf16 |",
            "",
            "| row | seeds | device | date | commit |",
            "| --- | --- | --- | --- | --- |",
            "| Moon et al. | 1 | AMD EPYC, 1 thread | 2026-11-26 | 0485b04 |",
        ]
    )
    assert written_page.lost_numbers(old, new) == []
    assert written_page.lost_numbers(old, new.replace("114.12", "–")) != []
    assert written_page.lost_numbers(old, new.replace("| 107.35 | 1 |", "| 107.35 | 2 |")) != []
