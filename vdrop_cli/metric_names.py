"""Metrics in words: `valid_ppl` is the validation perplexity."""

import re

PARTS = {"train": "training", "valid": "validation", "test": "test"}
OTHER_TEXT = "file"  # in place of "test" in the metrics of another text
TEXTS = PARTS | {OTHER_TEXT: "the file's"}
MEASURES = {
    "ppl": "perplexity",
    "entropy": "entropy of the next word, nats",
    "accuracy": "share of most probable words that are right",
    "ece": "calibration error of the most probable word",
    "mutual_information": "mutual information of next word and masks, nats",
    "rmse": "RMSE",
    "log_likelihood": "log-likelihood",
    "crps": "CRPS",
    **{f"coverage_{level}": f"share in the {level} % interval" for level in (50, 80, 90, 95)},
    "width_95": "mean width of the 95 % interval",
    "interval_score_95": "score of the 95 % interval",
    "calibration_error": "calibration error of intervals",
    "aurc": "RMSE, mean over shares of the most certain texts",
}
VARIANTS = {
    "": "",
    "_batched": ", read in columns",
    "_raw": ", weights not averaged",
    "_batched_raw": ", read in columns, weights not averaged",
    "_as_published_raw": ", as the authors compute it, weights not averaged",
    "_as_published": ", as the authors compute it",
    "_dropout": ", dropout on",
    "_chosen_on_test": ", best epoch on the test part",
    "_tempered": ", at that temperature",
    "_of_mean": " of predicting the mean",
    "_of_ridge": " of ridge regression",
}


COUNTS = {
    "epoch": "the epoch that is reported",
    "epochs": "epochs trained",
    "averaged": "updates in the average of the weights",
    "seconds": "of training and validation",
    "stopped_after_steps": "training steps, by schedule.max_steps",
    "temperature": "of the softmax, chosen on validation",
    "dropout_factor": "on dropout probabilities, chosen on validation",
    "noise": "standard deviation of the observation noise",
}


LARGE = 1e9  # numbers from here on are written with an exponent


def metric_in_words(name: str) -> str:
    """Returns a metric such as `test_ppl_mc100` in words, `test perplexity, 100 MC samples`.

    Other names give an empty text.
    """
    if name in COUNTS:
        return COUNTS[name]
    if noise := re.fullmatch(r"noise_mc(\d+)", name):
        return f"{COUNTS['noise']}, {noise[1]} MC samples"
    match = re.fullmatch(rf"({'|'.join(TEXTS)})_({'|'.join(MEASURES)})(.*)", name)
    if match is None:
        return ""
    part, measure, variant = match.groups()
    samples = re.fullmatch(r"_mc(\d+)(_scaled)?", variant)
    if samples is None and variant not in VARIANTS:
        return ""
    scaled = ", dropout times that factor" if samples and samples[2] else ""
    suffix = f", {samples[1]} MC samples{scaled}" if samples else VARIANTS[variant]
    return f"{TEXTS[part]} {MEASURES[measure]}{suffix}"


def decimals(value: float) -> int:
    """Returns the number of decimals that a metric of such a size is shown with."""
    return 2 if abs(value) >= 10 else 4


def in_digits(value: float, digits: int) -> str:
    """Writes a number with so many decimals, or a very large one with an exponent."""
    return f"{value:.2e}" if abs(value) >= LARGE else f"{value:.{digits}f}"


def metric_line(name: str, value: float) -> str:
    """Returns a metric, its value and its meaning as a line of a result."""
    number = in_digits(value, decimals(value)) if isinstance(value, float) else str(value)
    return f"{name:<28}{number:>8}  {metric_in_words(name)}".rstrip()
