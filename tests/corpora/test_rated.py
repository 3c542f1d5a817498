"""Texts with ratings: words, numbers, and what cannot be learned from."""

from collections import Counter

import pytest

from vdrop_cli.corpora.rated import Rated, number, words
from vdrop_cli.errors import ConfigError


def test_words_are_lower_case_and_apart_from_punctuation() -> None:
    assert words("Don't miss «it»: 9.5/10 -- state-of-the-art...") == [
        *("don't", "miss", "«", "it", "»", ":", "9.5/10", "--", "state-of-the-art", "...")
    ]
    assert words("a.b. C!") == ["a.b", ".", "c", "!"] and words(" \n") == []
    assert words("?!! ('x')") == ["?", "!!", "(", "'", "x", "'", ")"]


def test_words_of_all_languages_stay_whole() -> None:
    assert words("हिन्दी İstanbul, cafe\u0301!") == ["हिन्दी", "i̇stanbul", ",", "café", "!"]


def test_a_rating_is_a_finite_number() -> None:
    assert number("1e-1", "x") == 0.1 and number(3, "x") == 3.0
    assert [number(value, "x") for value in (" 10 ", "+1.", "-.5", "2.5E+1")] == [10, 1, -0.5, 25]
    for value in (
        "good",
        "nan",
        "inf",
        "1e39",
        None,
        "",
        "1_0",
        "1,5",
        "٣",
        "0x1",
        "1 0",
        "½",
        "1\n",
        10**400,
        float("nan"),
    ):
        with pytest.raises(ConfigError, match=r"^row 3 holds .*, .* a finite number"):
            number(value, "row 3")


def test_too_few_texts_and_one_rating_for_all_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^here has 9 texts; it needs at least 10"):
        Rated([["a"]] * 9, [float(n) for n in range(9)], "here")
    with pytest.raises(ConfigError, match=r"^here gives every text the same rating, 0\.5"):
        Rated([["a"]] * 10, [0.5] * 10, "here")


def test_the_fingerprint_is_of_the_content_alone() -> None:
    def made(word: str, rating: float, origin: str = "here") -> str:
        return Rated([[word]] * 10, [rating, *[1.0] * 9], origin).fingerprint

    assert made("a", 0.5) == made("a", 0.5, "there")
    assert len({made("a", 0.5), made("b", 0.5), made("a", 0.6)}) == 3


def test_a_short_form_has_texts_of_each_part_and_of_each_end_of_the_scale() -> None:
    """Sources can be sorted by rating."""
    texts, ratings = [[str(i), "a", "b"] for i in range(100)], [float(i) for i in range(100)]
    parts = ["train"] * 60 + ["valid"] * 10 + ["test"] * 30
    short = Rated(texts, ratings, "here", parts, [f"line {i}" for i in range(100)]).shortened(20, 5, 2)
    assert Counter(short.parts) == {"train": 20, "valid": 5, "test": 5}
    for text, rating, place in zip(short.texts, short.ratings, short.places, strict=True):
        assert text == [f"{rating:.0f}", "a"] and place == f"line {rating:.0f}"
    whole = Rated(texts, ratings, "here").shortened(20, 5, None)
    assert whole.texts[-1] == texts[95]
    assert whole.ratings == [float(5 * i) for i in range(20)] and whole.parts == whole.places == []
