"""`vdrop predict`: what a model makes of a text: its rating, how surprising its words are, or how it might go on."""

import codecs
import json
import re
import sys
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import torch

from vdrop_cli import corpora, environment, evaluate, runs
from vdrop_cli.commands.eval import Loaded, load
from vdrop_cli.config import ConfigError, Eval, Policy, Predict
from vdrop_cli.tasks import LanguageModelling, Sentiment
from vdrop_cli.uncertainty import fit_noise, predictive

PASSES = 50  # of MC dropout, where the settings leave it open
LEVEL = 95.0  # likewise
SURPRISES = 5  # likewise
SHOWN = 60  # characters of a text in the table


def run(settings: Predict) -> None:
    device = environment.device(settings.device)
    environment.make_ready(device)
    assert settings.checkpoint is not None
    as_in_eval = Eval(settings.checkpoint, settings.data, device=settings.device, backend=settings.backend, precision=settings.precision)
    loaded = load(settings.checkpoint, as_in_eval, device)
    if isinstance(loaded.task, Sentiment):
        for name, value in (("sample", settings.sample or None), ("surprises", settings.surprises)):
            if value is not None:
                raise ConfigError(f"{name} is for language models, {loaded.path} predicts ratings; leave it out")
        rate(loaded, loaded.task, settings)
        return
    assert isinstance(loaded.task, LanguageModelling)
    if settings.mc_samples:
        raise ConfigError(
            "mc_samples must be 0 or null of a language model, whose words are predicted without; vdrop eval has MC perplexity"
        )
    if settings.level is not None:
        raise ConfigError(f"level is for ratings, {loaded.path} is a language model; leave it out")
    if settings.sample > 0:
        write(loaded, loaded.task, settings)
    else:
        surprise(loaded, loaded.task, settings)


def texts(settings: Predict) -> list[str]:
    """From the command line, a file, or standard input: one a line, empty ones left out."""
    if settings.text is not None:
        if any("\ud800" <= character <= "\udfff" for character in settings.text):
            raise ConfigError(f"text={settings.text!r} is not UTF-8; convert it")
        return [settings.text]
    try:
        if settings.file is None and sys.stdin is None:
            raise ConfigError("there is no standard input; give text=… or file=…")
        content = Path(settings.file).read_bytes() if settings.file is not None else sys.stdin.buffer.read()
        lines = content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"file={settings.file} cannot be read ({error.strerror}); name a text file, or give text=…") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"file={settings.file or 'standard input'} is not UTF-8 ({error.reason} at byte {error.start}); convert it"
        ) from None
    found = [line.removesuffix("\r") for line in lines.split("\n") if line.strip()]
    if not found:
        raise ConfigError(
            f"{f'file={settings.file}' if settings.file else 'standard input'} holds no text; give text=…, or one text a line"
        )
    return found


@dataclass(frozen=True)
class Noise:
    """The deviation of observations about what the model means, and where it is from."""

    deviation: float
    told: str


def noise_of(loaded: Loaded, task: Sentiment, samples: int) -> Noise:
    """As `vdrop eval mc_samples=…` fitted it for this checkpoint and precision, else fitted to the errors of the standard approximation.

    These hold the model's error, too, so that with the deviation over passes beside it an interval comes out a little too wide.
    """
    stem, name = loaded.path.stem.replace("checkpoint", "eval"), f"noise_mc{samples}"
    in_another = "" if loaded.precision is loaded.checkpoint.train.precision else f"-{loaded.precision}"
    learnt = " (which the model has learnt: intervals are too narrow where it over-fits)" if task.noise_part == "train" else ""
    for path in sorted(loaded.path.parent.glob(f"{stem}-mc{samples}-s*.json")):
        its_name = re.fullmatch(rf"{stem}-mc{samples}-s\d+{in_another}", path.stem)
        if its_name and name in (metrics := runs.evaluation(path)["metrics"]):
            return Noise(metrics[name], f"fitted to the {task.noise_part} part{learnt} in {path}")
    part = task.sample(task.noise_part)
    predicted_R = task.predict(loaded.model, part)
    wide = f", by the standard approximation, which makes intervals a little too wide; vdrop eval mc_samples={samples} fits it to passes"
    advice = wide if samples > 0 else ""
    return Noise(fit_noise(predicted_R[None], part.ratings_R), f"fitted to the {task.noise_part} part{learnt}{advice}")


def rate(loaded: Loaded, task: Sentiment, settings: Predict) -> None:
    """Each text's rating with its deviation over MC passes, and the interval that holds `level` per cent of such ratings."""
    given = texts(settings)
    without = loaded.checkpoint.train.dropout.policy is Policy.none
    if without and settings.mc_samples:
        raise ConfigError(f"mc_samples must be 0 or null, {loaded.path} was trained without dropout, got {settings.mc_samples}")
    samples = (0 if without else PASSES) if settings.mc_samples is None else settings.mc_samples
    passes = [task.passes_of(loaded.model, corpora.words(loaded.data, text), samples, settings.seed) for text in given]
    noise = noise_of(loaded, task, samples)
    found = predictive(torch.stack(passes, 1), noise.deviation)
    level = LEVEL if settings.level is None else settings.level
    half_R = found.half_width(level)
    how = f"{samples} passes of MC dropout" if samples else "standard approximation"
    print(f"{loaded.path}: {how}; observation noise {noise.deviation:.4g}, {noise.told}", file=sys.stderr)
    rows = [
        {"text": text, "rating": mean, "deviation": deviation, "noise": noise.deviation}
        | {"low": mean - half, "high": mean + half, "level": level}
        for text, mean, deviation, half in zip(
            given, found.mean_R.tolist(), found.model_variance_R.sqrt().tolist(), half_R.tolist(), strict=True
        )
    ]
    if not settings.json:
        print(f"{'rating':>8} {'± (model)':>10}   {level:g} % of ratings in     text")
    for row in rows:
        told = f"{row['rating']:8.3f} {row['deviation']:10.3f}   {row['low']:8.3f} to {row['high']:<8.3f}    {shortened(str(row['text']))}"
        print(as_json(row) if settings.json else told)


def as_json(told: dict[str, Any]) -> str:
    """One line; where the terminal has no UTF-8, all else than ASCII is written as JSON's escapes."""
    return json.dumps(told, ensure_ascii=codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8")


def shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def words_of(text: str) -> list[str]:
    """What white space separates; a line's end is <eos>."""
    return text.strip().replace("\n", " <eos> ").split()


def ids_of(words: list[str], task: LanguageModelling, ids: dict[str, int]) -> list[int]:
    """As they are written, else in lower case, else <unk>."""
    found = []
    for word in words:
        known = next((form for form in (word, word.lower(), "<unk>") if form in ids), None)
        if known is None:
            raise ConfigError(f"text: {word!r} is not a word of {task.origin}, nor is <unk>; leave it out")
        found.append(ids[known])
    return found


def surprise(loaded: Loaded, task: LanguageModelling, settings: Predict) -> None:
    """Each text's perplexity, as one that begins a sentence, and its words that surprise the model most, in bits."""
    vocabulary = task.corpus.vocabulary
    ids = {word: number for number, word in enumerate(vocabulary)}
    for text in texts(settings):
        words = [*words_of(text), "<eos>"]
        stream_N = torch.tensor(ids_of(["<eos>", *words], task, ids), device=task.device)
        nll_N = evaluate.stream_nll(loaded.model, stream_N)
        bits = (nll_N.double() / log(2)).tolist()
        most = sorted(range(len(words)), key=lambda n: -bits[n])[: SURPRISES if settings.surprises is None else settings.surprises]
        told: dict[str, Any] = {"text": text, "ppl": evaluate.perplexity(nll_N), "words": len(words)}
        told["surprises"] = [{"word": words[n], "read_as": vocabulary[stream_N[n + 1]], "place": n + 1, "bits": bits[n]} for n in most]
        if settings.json:
            print(as_json(told))
            continue
        print(f"perplexity {told['ppl']:.1f} over {len(words)} words: {shortened(text)}")
        for one in told["surprises"]:
            read_as = "" if one["read_as"] == one["word"] else f" (read as {one['read_as']})"
            print(f"{one['bits']:8.1f} bits  word {one['place']:<4} {one['word']}{read_as}")


def write(loaded: Loaded, task: LanguageModelling, settings: Predict) -> None:
    """Words that the model draws one after the other, after the text, or at the beginning of a sentence."""
    vocabulary = task.corpus.vocabulary
    ids = {word: number for number, word in enumerate(vocabulary)}
    begun = words_of(settings.text or "")
    begin = ids_of(["<eos>", *begun], task, ids)
    generator = torch.Generator(device=task.device).manual_seed(settings.seed)
    numbers = evaluate.written(loaded.model, torch.tensor(begin, device=task.device), settings.sample, generator)
    drawn = [vocabulary[number] for number in numbers]
    if settings.json:
        print(as_json({"text": settings.text or "", "sample": drawn}))
    else:
        print(" ".join([*begun, *drawn]).replace(" <eos> ", "\n").replace("<eos>", ""))
