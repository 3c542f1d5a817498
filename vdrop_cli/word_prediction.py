"""The surprisal of each word of a text, one row per text; or words that continue it.

N predicted tokens
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from math import log
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vdrop_cli.device import choose_mc_batch
from vdrop_cli.errors import ConfigError, RunError, require
from vdrop_cli.files import printable
from vdrop_cli.generation import sample_words
from vdrop_cli.mc_passes import PassOptions
from vdrop_cli.metric_names import in_digits
from vdrop_cli.next_word import mc_tokens
from vdrop_cli.perplexity import perplexity, stream_nll
from vdrop_cli.policies import Policy
from vdrop_cli.prediction_inputs import Line, lines
from vdrop_cli.prediction_rows import Problems, RowPrinter, UnknownWords, as_json, require_finite
from vdrop_cli.settings.choices import OutputFormat
from vdrop_cli.settings.commands import Predict
from vdrop_cli.tasks import UnknownWord, WordPredictor
from vdrop_cli.trained_model import BROKEN_WEIGHTS, TrainedModel, no_dropout

INFORMATION = "mutual_information_bits"  # a column of the output
SURPRISES = 5  # default number of words that are shown


class Nats(NamedTuple):
    """What a model says of each predicted token of a text, in nats."""

    nll_N: Tensor
    mutual_information_N: Tensor | None  # between the token and the masks; None: not measured


def mc_options(trained: TrainedModel, predictor: WordPredictor, settings: Predict) -> PassOptions | None:
    """Returns how MC passes are made, with the masks of `vdrop eval`; None without them. Raises ConfigError
    for a model without dropout.
    """
    if not settings.mc_samples:
        require(settings.seed == 1, "seed", "1 without mc_samples or sample, which it is for", settings.seed)
        return None
    dropout = trained.checkpoint.train.dropout
    if dropout.policy is Policy.none:
        raise no_dropout(trained.path, settings.mc_samples, "0 or null")
    batch = choose_mc_batch(None, predictor.device, trained.model.dropout.p_weight)
    return PassOptions(settings.mc_samples, batch, settings.seed, word_dropout=False)


def lacks_information(trained: TrainedModel, options: PassOptions) -> str | None:
    """Returns why passes cannot differ, so that they have no mutual information; None where they can."""
    if options.samples == 1:
        return "one pass has no mutual information; take more mc_samples"
    if not trained.model.dropout.without_words().drops:
        return (
            f"all passes are the same, so they have no mutual information: {trained.path} drops nothing, or "
            "words alone, which passes keep; leave mc_samples out"
        )
    return None


def read_lines(
    texts: list[Line], predictor: WordPredictor
) -> Iterator[tuple[Line, list[str], Tensor | None]]:
    """Yields each line, its words including line ends, and the ids of the words.

    The id of a line end, where the vocabulary has one, precedes the ids, so that the first word is predicted.
    The ids are None for a blank line and for a line with a problem.
    """
    for line in texts:
        if line.problem is not None or line.is_blank:
            yield line, [], None
            continue
        assert line.text is not None
        words = [*predictor.words(line.text), *predictor.line_end]
        try:
            yield line, words, predictor.encode([*predictor.line_end, *words])
        except UnknownWord as reason:
            yield replace(line, problem=str(reason)), [], None


def nats_of(
    trained: TrainedModel, stream_N: Tensor, options: PassOptions | None, has_information: bool
) -> Nats:
    """Returns what the standard approximation, or MC passes, say of each token but the first.

    `has_information`: whether the passes can differ, so that their mutual information means something.
    """
    if options is None:
        return Nats(stream_nll(trained.model, stream_N), None)
    tokens = mc_tokens(trained.model, stream_N, options)
    return Nats(tokens.nll_N, tokens.mutual_information_N if has_information else None)


def print_surprisals(trained: TrainedModel, predictor: WordPredictor, settings: Predict) -> None:
    """Prints the perplexity of each text, and the words that surprise the model most, in bits.

    A text is read as the beginning of a sentence. With MC passes, the mutual information between the words
    and the masks is printed, too. Where the training text had one line, the vocabulary has no word for a
    line's end, and the first word of a text is not predicted.
    """
    options = mc_options(trained, predictor, settings)
    texts, problems = lines(settings), Problems(settings)
    unknown = UnknownWords(predictor, trained.checkpoint.train.data)
    names = ("ppl", "words", *((INFORMATION,) if options else ()), "surprises")
    rows = RowPrinter(settings, texts, names[:-1] if settings.format is OutputFormat.csv else names)
    reason = lacks_information(trained, options) if options else None
    if options:
        print(f"{trained.path}: MC dropout, passes: {options.samples}", file=sys.stderr)
    if reason:
        print(f"vdrop: {reason}", file=sys.stderr)
    max_surprises = SURPRISES if settings.surprises is None else settings.surprises
    for line, words, stream_N in read_lines(texts, predictor):
        unknown.count([word for word in words if word not in predictor.line_end])
        values: dict[str, Any] = dict.fromkeys(names)
        shown = "no perplexity"
        if stream_N is not None and len(stream_N) > 1:
            nats = nats_of(trained, stream_N, options, reason is None)
            ppl = require_finite(perplexity(nats.nll_N), "perplexity", trained, line)
            values |= {"ppl": ppl, "words": len(nats.nll_N)}
            shown = f"perplexity {in_digits(ppl, 1)} over {values['words']} tokens"
            if nats.mutual_information_N is not None:
                values[INFORMATION] = nats.mutual_information_N.mean().item() / log(2)
                shown += f", mutual information {values[INFORMATION]:.3f} bits"
            values["surprises"] = surprises(nats, words, stream_N, predictor, options is not None)[
                :max_surprises
            ]
        if line.problem is not None:
            problems.report(line)
        rows.write(line, values, f"line {line.number}: {shown}: {line.shown}")
        for one in (values["surprises"] or []) if settings.format is OutputFormat.table else []:
            print(surprise_line(one))
    unknown.report()
    problems.end(len(texts))


def surprise_line(one: dict[str, Any]) -> str:
    """Returns a word that surprises the model as a line of the table."""
    information = "" if one.get(INFORMATION) is None else f" ({one[INFORMATION]:.2f} of mutual information)"
    read_as = "" if one["read_as"] == one["word"] else f" (read as {printable(one['read_as'])})"
    return f"{one['bits']:8.1f} bits{information}  word {one['place']:<4} {printable(one['word'])}{read_as}"


def surprises(
    nats: Nats, words: list[str], stream_N: Tensor, predictor: WordPredictor, is_averaged: bool
) -> list[dict[str, Any]]:
    """Returns a row for each predicted word, the most surprising words first.

    `place` counts the words of the text from 1. `is_averaged`: whether the numbers are of MC passes, so that
    a row has the mutual information.
    """
    bits = (nats.nll_N.double() / log(2)).tolist()
    information = None if nats.mutual_information_N is None else (nats.mutual_information_N / log(2)).tolist()
    first = len(words) - len(bits)  # 1 where the first word is not predicted, else 0
    read_as = [predictor.vocabulary[number] for number in stream_N[1:].tolist()]
    rows = [
        {"word": words[first + n], "read_as": read_as[n], "place": first + n + 1, "bits": bits[n]}
        | ({INFORMATION: None if information is None else information[n]} if is_averaged else {})
        for n in range(len(bits))
    ]
    return sorted(rows, key=lambda one: -one["bits"])


def print_sample(trained: TrainedModel, predictor: WordPredictor, settings: Predict) -> None:
    """Prints words that the model draws; they continue the text, or begin a sentence without a text."""
    prompt = predictor.words(settings.text or "")
    unknown = UnknownWords(predictor, trained.checkpoint.train.data)
    unknown.count([word for word in prompt if word not in predictor.line_end])
    try:
        prompt_N = predictor.encode([*predictor.line_end, *prompt])
    except UnknownWord as reason:
        raise ConfigError(f"text: {reason}") from None
    generator = torch.Generator(device=predictor.device).manual_seed(settings.seed)
    temperature = 1.0 if settings.temperature is None else settings.temperature
    try:
        drawn = [
            predictor.vocabulary[number]
            for number in sample_words(
                trained.model, prompt_N, settings.sample, generator, temperature, settings.top_k
            )
        ]
    except ValueError as reason:
        raise RunError(f"{trained.path}: {reason}; {BROKEN_WEIGHTS}") from None
    unknown.report()
    if settings.format is OutputFormat.json:
        print(as_json({"text": settings.text or "", "sample": drawn}))
    else:
        sampled: list[list[str]] = [[]]
        for word in (*prompt, *drawn):
            if word in predictor.line_end:
                sampled.append([])
            else:
                sampled[-1].append(word)
        print("\n".join(printable(" ".join(words)) for words in sampled))
