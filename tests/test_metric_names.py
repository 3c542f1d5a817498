"""Metrics in words."""

import pytest

from vdrop_cli.metric_names import decimals, metric_in_words, metric_line


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("valid_ppl", "validation perplexity"),
        ("test_ppl_mc100", "test perplexity, 100 MC samples"),
        ("test_rmse", "test RMSE"),
        ("test_entropy", "test entropy of the next word, nats"),
        ("file_ppl_mc50", "the file's perplexity, 50 MC samples"),
        ("test_ece_mc50", "test calibration error of the most probable word, 50 MC samples"),
        ("test_mutual_information_mc5", "test mutual information of next word and masks, nats, 5 MC samples"),
        ("test_rmse_of_mean", "test RMSE of predicting the mean"),
        ("noise_mc50", "standard deviation of the observation noise, 50 MC samples"),
        ("test_interval_score_95", "test score of the 95 % interval"),
        ("test_coverage_95_mc50", "test share in the 95 % interval, 50 MC samples"),
        ("seconds", "of training and validation"),
        ("seconds_of_it", ""),
        ("test_ppl_mc", ""),
        ("noise", "standard deviation of the observation noise"),
    ],
)
def test_a_metric_is_named_in_words(name: str, words: str) -> None:
    assert metric_in_words(name) == words
    assert metric_line(name, 12.375).split(maxsplit=2) == [name, "12.38", *([words] if words else [])]


def test_a_count_is_printed_whole() -> None:
    assert metric_line("epoch", 12).split()[:2] == ["epoch", "12"]


def test_a_number_that_is_very_large_has_an_exponent() -> None:
    assert metric_line("test_ppl", 1.2345e51).split()[1] == "1.23e+51"
    assert metric_line("test_ppl", 123456789.0).split()[1] == "123456789.00"


def test_large_numbers_have_two_decimals_and_small_ones_four() -> None:
    assert [decimals(value) for value in (0.1, -9.99, 10, 10.0, -123.4)] == [4, 4, 2, 2, 2]
