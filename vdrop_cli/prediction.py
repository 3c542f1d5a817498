"""A rating, the surprisal of each word of a text, or words that continue it: one row per line of text."""

import codecs
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from typing import Any

import torch

from vdrop_cli import checkpoint, evaluation_files, files
from vdrop_cli.corpora.text import lines as lines_of
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.evaluation_files import Evaluation
from vdrop_cli.files import Damaged, printable
from vdrop_cli.generation import sample_words
from vdrop_cli.perplexity import perplexity, stream_nll
from vdrop_cli.policies import Policy
from vdrop_cli.settings.commands import Predict, data_for
from vdrop_cli.tasks import Predictor, RatingPredictor, Sentiment, UnknownWord, WordPredictor, predictor_of
from vdrop_cli.trained_model import Built, build, task_of
from vdrop_cli.uncertainty import Predictive, fit_noise

PASSES = 50  # of MC dropout, where the settings leave it open
LEVEL = 95.0  # likewise
SURPRISES = 5  # likewise
UNDECODED = "surrogateescape"  # how bytes that are not UTF-8 are carried along
SHOWN = 60  # characters of a text in the table
END_OF_INPUT = "Ctrl-Z and Enter" if sys.platform == "win32" else "Ctrl-D on a new line"


def load(settings: Predict, device: torch.device) -> Built:
    """The model, with all that prediction needs; of a checkpoint of an older format its training text is read
    for that.
    """
    assert settings.checkpoint is not None
    path = checkpoint.find(settings.checkpoint)
    snapshot = checkpoint.load(path)
    if snapshot.knowledge is not None:
        predictor = predictor_of(snapshot.knowledge, device)
    else:
        otherwise = "train again: newer checkpoints hold what is needed of it"
        predictor = task_of(
            path,
            snapshot,
            data_for(snapshot.train.data, settings.data, False, f"checkpoint={path}", otherwise),
            device,
        ).predictor
    return build(path, snapshot, predictor, settings, device)


@dataclass(frozen=True)
class Line:
    """One text to predict from. `number` counts the lines of the input from 1."""

    number: int
    text: str | None  # None: it could not be decoded
    problem: str | None = None  # why nothing can be predicted from it

    @property
    def is_blank(self) -> bool:
        return self.text is not None and not self.text.strip()

    @property
    def row(self) -> dict[str, Any]:
        """The start of its row in the output."""
        return {"line": self.number, "text": "" if self.is_blank else self.text} | (
            {"error": self.problem} if self.problem else {}
        )

    @property
    def shown(self) -> str:
        """For a table."""
        return (
            "(blank line)"
            if self.is_blank
            else shortened(self.text or "") + (f" ({self.problem})" if self.problem else "")
        )


def origin(settings: Predict) -> str:
    """Of the lines, for a message."""
    return (
        "text"
        if settings.text is not None
        else f"file={settings.file}"
        if settings.file is not None
        else "standard input"
    )


def lines(settings: Predict) -> list[Line]:
    """From the command line, which is line 1 whatever it holds, a file, or standard input."""
    if settings.text is not None:
        if any("\ud800" <= character <= "\udfff" for character in settings.text):
            raise ConfigError(f"text={settings.text!r} is not UTF-8; convert it")
        return [Line(1, settings.text)]
    try:
        if settings.file is None and sys.stdin is None:
            raise ConfigError("there is no standard input; give text=… or file=…")
        if settings.file is not None:
            content = files.read(Path(settings.file))
        else:
            if sys.stdin.isatty():
                print(f"vdrop: type one text per line; {END_OF_INPUT} ends the input", file=sys.stderr)
            content = sys.stdin.buffer.read()
    except OSError as error:
        raise ConfigError(
            f"file={settings.file} cannot be read ({error.strerror}); name a text file, or give text=…"
        ) from None
    except Damaged as reason:
        raise ConfigError(
            f"file={settings.file} cannot be read ({reason}); name a text file, or give text=…"
        ) from None
    text = content.removeprefix(codecs.BOM_UTF8).decode(errors=UNDECODED)
    numbered_lines = [line_of(number, line) for number, line in enumerate(lines_of(text), 1)]
    if not numbered_lines:
        raise ConfigError(f"{origin(settings)} holds no text; give text=…, or one text a line")
    return numbered_lines


def line_of(number: int, line: str) -> Line:
    """`line` may hold bytes that are not UTF-8."""
    try:
        return Line(number, line.encode(errors=UNDECODED).decode())
    except UnicodeDecodeError as error:
        return Line(number, None, f"not UTF-8, {error.reason} at byte {error.start} of the line; convert it")


class UnknownWords:
    """Counts words that are not in the vocabulary, over all lines."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.words = 0
        self.unknown = 0

    def count(self, words: list[str]) -> None:
        self.words += len(words)
        self.unknown += sum(map(self.predictor.is_unknown, words))

    def report(self) -> None:
        """Prints the counts if a word is unknown."""
        if self.unknown:
            print(
                f"vdrop: {self.unknown:,} of {self.words:,} words unknown: the vocabulary of the model does "
                "not have them",
                file=sys.stderr,
            )


class Problems:
    """Lines that nothing could be predicted from: reported as they come, and an error when all others are
    done.
    """

    def __init__(self, settings: Predict) -> None:
        self.settings, self.count = settings, 0

    def report(self, line: Line) -> None:
        assert line.problem is not None
        if self.settings.text is not None:
            raise ConfigError(f"text: {line.problem}")
        print(f"vdrop: {origin(self.settings)}, line {line.number}: {line.problem}", file=sys.stderr)
        self.count += 1

    def end(self, lines: int) -> None:
        """Raises ConfigError where there were some, once all output is on its way."""
        if self.count:
            sys.stdout.flush()
            raise ConfigError(
                f"{origin(self.settings)}: nothing is predicted from {self.count} of {lines} lines; see above"
            )


def finite(value: float, what: str, built: Built, line: Line) -> float:
    if not math.isfinite(value):
        raise RunError(
            f"{built.path}: the {what} of line {line.number} is {value}; its weights are not those of a "
            "model that works"
        )
    return value


@dataclass(frozen=True)
class Noise:
    """The standard deviation of observations about what the model means, and where it is from."""

    deviation: float
    origin: str


def noise_of(built: Built, predictor: RatingPredictor, settings: Predict, samples: int) -> Noise:
    """As `vdrop eval mc_samples=…` fitted it for this checkpoint and precision, else as the standard
    approximation's errors give it.

    These hold the model's error, too, so that with the deviation over passes beside it an interval comes out
    a little too wide. They are in the checkpoint where the validation had just been made, else the training
    text is read for them.
    """
    metric = f"noise_mc{samples}" if samples else "noise"
    trained = built.checkpoint.train
    precision = None if built.precision is trained.precision else built.precision
    how = Evaluation(samples=samples, precision=precision)
    part = predictor.learned.noise_part
    fitted = f"fitted to the {part} part"
    if part == "train":
        fitted += " (which the model has learnt: intervals are too narrow where it over-fits)"
    for path in sorted(built.path.parent.glob("*.json")):
        made = evaluation_files.from_file(path, built.path.stem)
        if made is None or not how.includes(made):
            continue
        results = evaluation_files.read(path)
        # another checkpoint may have had the same name
        if metric in results["metrics"] and results.get("epoch") == built.checkpoint.epoch:
            noise = results["metrics"][metric]
            if type(noise) is not float or not 0 < noise < math.inf:
                raise ConfigError(f"{path} is damaged; delete it and give the same vdrop eval command again")
            return Noise(noise, f"{fitted} in {path}")
    wide = (
        ", by the standard approximation, which makes intervals a little too wide; vdrop eval "
        "mc_samples={} fits it to passes"
    )
    fitted += wide.format(samples) if samples else ""
    if predictor.learned.noise is not None:
        fitted += (
            f" (in {trained.precision}, as the model was trained)"
            if built.precision is not trained.precision
            else ""
        )
        return Noise(predictor.learned.noise, fitted)
    first = (
        f"run vdrop eval checkpoint={built.path}{f' mc_samples={samples}' if samples else ''} first, "
        "which fits the observation noise"
    )
    data = data_for(trained.data, settings.data, False, f"checkpoint={built.path}", first)
    task = task_of(built.path, built.checkpoint, data, predictor.device)
    assert isinstance(task, Sentiment)
    sample = task.sample(part)
    return Noise(fit_noise(task.predict(built.model, sample)[None], sample.ratings_R), fitted)


def rate(built: Built, predictor: RatingPredictor, settings: Predict) -> None:
    """Each text's rating with its standard deviation over MC passes, and the interval that holds `level` per
    cent of such ratings.
    """
    inputs, problems, unknown = lines(settings), Problems(settings), UnknownWords(predictor)
    without = built.checkpoint.train.dropout.policy is Policy.none
    if without and settings.mc_samples:
        raise ConfigError(
            f"mc_samples must be 0 or null, {built.path} was trained without dropout, got "
            f"{settings.mc_samples}"
        )
    samples = (0 if without else PASSES) if settings.mc_samples is None else settings.mc_samples
    noise = noise_of(built, predictor, settings, samples)
    level = LEVEL if settings.level is None else settings.level
    how = f"{samples} passes of MC dropout" if samples else "standard approximation"
    print(f"{built.path}: {how}; observation noise {noise.deviation:.4g}, {noise.origin}", file=sys.stderr)
    if not settings.json:
        print(f"{'line':>6} {'rating':>8} {'± (model)':>10}   {level:g} % of ratings in     text")
    for line in inputs:
        values: dict[str, Any] = dict.fromkeys(("rating", "deviation", "noise", "low", "high", "level"))
        shown = f"{'–':>8} {'–':>10}   {'–':>8}    {'':<8}"
        if line.problem is None and not line.is_blank:
            assert line.text is not None
            words = predictor.words(line.text)
            unknown.count(words)
            passes = predictor.passes_of(built.model, words, samples, settings.seed)
            distribution = Predictive(passes[:, None], noise.deviation)
            mean, half = distribution.mean_R.item(), distribution.half_width(level).item()
            finite(mean + half, "rating", built, line)
            values = {
                "rating": mean,
                "deviation": distribution.model_variance_R.sqrt().item(),
                "noise": noise.deviation,
            }
            values |= {"low": mean - half, "high": mean + half, "level": level}
            shown = f"{mean:8.3f} {values['deviation']:10.3f}   {mean - half:8.3f} to {mean + half:<8.3f}"
        if line.problem is not None:
            problems.report(line)
        print(as_json(line.row | values) if settings.json else f"{line.number:6} {shown}    {line.shown}")
    unknown.report()
    problems.end(len(inputs))


def as_json(row: dict[str, Any]) -> str:
    """One line; where the terminal has no UTF-8, all else than ASCII is written as JSON's escapes."""
    return json.dumps(row, ensure_ascii=codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8")


def shortened(text: str) -> str:
    text = printable(" ".join(text.split()))
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def read_lines(
    settings: Predict, predictor: WordPredictor
) -> Iterator[tuple[Line, list[str], torch.Tensor | None]]:
    """Each line with its words, ends of lines among them, and their ids after that of a line's end; None
    where there are none.
    """
    for line in lines(settings):
        if line.problem is not None or line.is_blank:
            yield line, [], None
            continue
        assert line.text is not None
        words = [*predictor.words(line.text), *predictor.line_end]
        try:
            yield line, words, predictor.encode([*predictor.line_end, *words])
        except UnknownWord as reason:
            yield replace(line, problem=str(reason)), [], None


def surprise(built: Built, predictor: WordPredictor, settings: Predict) -> None:
    """Each text's perplexity, as one that begins a sentence, and its words that surprise the model most, in
    bits.

    Where the training text had one line, and so no word for a line's end, a text's first word is not
    predicted.
    """
    problems, unknown = Problems(settings), UnknownWords(predictor)
    count = 0
    most = SURPRISES if settings.surprises is None else settings.surprises
    for line, words, stream_N in read_lines(settings, predictor):
        count += 1
        unknown.count([word for word in words if word not in predictor.line_end])
        values: dict[str, Any] = dict.fromkeys(("ppl", "words", "surprises"))
        if stream_N is not None and len(stream_N) > 1:
            nll_N = stream_nll(built.model, stream_N)
            ppl = finite(perplexity(nll_N), "perplexity", built, line)
            values = {
                "ppl": ppl,
                "words": len(nll_N),
                "surprises": surprises(nll_N, words, stream_N, predictor)[:most],
            }
        if line.problem is not None:
            problems.report(line)
        shown = (
            f"perplexity {values['ppl']:.1f} over {values['words']} words"
            if values["ppl"] is not None
            else "no perplexity"
        )
        print(as_json(line.row | values) if settings.json else f"line {line.number}: {shown}: {line.shown}")
        for one in [] if settings.json else values["surprises"] or []:
            read_as = "" if one["read_as"] == one["word"] else f" (read as {printable(one['read_as'])})"
            print(f"{one['bits']:8.1f} bits  word {one['place']:<4} {printable(one['word'])}{read_as}")
    unknown.report()
    problems.end(count)


def surprises(
    nll_N: torch.Tensor, words: list[str], stream_N: torch.Tensor, predictor: WordPredictor
) -> list[dict[str, Any]]:
    """The words that were predicted, those that surprise most first; `place` counts the words of the text
    from 1.
    """
    bits = (nll_N.double() / log(2)).tolist()
    first = len(words) - len(bits)  # 1 where the first word is not predicted, else 0
    read_as = [predictor.vocabulary[number] for number in stream_N[1:].tolist()]
    order = sorted(range(len(bits)), key=lambda n: -bits[n])
    return [
        {"word": words[first + n], "read_as": read_as[n], "place": first + n + 1, "bits": bits[n]}
        for n in order
    ]


def write(built: Built, predictor: WordPredictor, settings: Predict) -> None:
    """Words that the model draws one after the other, after the text, or at the beginning of a sentence."""
    begun = predictor.words(settings.text or "")
    unknown = UnknownWords(predictor)
    unknown.count([word for word in begun if word not in predictor.line_end])
    try:
        begin_N = predictor.encode([*predictor.line_end, *begun])
    except UnknownWord as reason:
        raise ConfigError(f"text: {reason}") from None
    generator = torch.Generator(device=predictor.device).manual_seed(settings.seed)
    temperature = 1.0 if settings.temperature is None else settings.temperature
    try:
        drawn = [
            predictor.vocabulary[number]
            for number in sample_words(
                built.model, begin_N, settings.sample, generator, temperature, settings.top_k
            )
        ]
    except ValueError as reason:
        raise RunError(f"{built.path}: {reason}; its weights are not those of a model that works") from None
    unknown.report()
    if settings.json:
        print(as_json({"text": settings.text or "", "sample": drawn}))
    else:
        sampled = " ".join([*begun, *drawn]).replace(" <eos> ", "\n").replace("<eos>", "")
        print("\n".join(map(printable, sampled.split("\n"))))
