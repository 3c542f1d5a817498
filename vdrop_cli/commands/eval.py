"""`vdrop eval`: what a checkpoint's model is worth. Everything but its corpus is in the checkpoint."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from vdrop_cli import checkpoint, corpora, environment, evaluate
from vdrop_cli.config import ConfigError, Eval, Policy
from vdrop_cli.model import LanguageModel
from vdrop_cli.sinks import counting
from vdrop_cli.tasks import LanguageModelling


def run(settings: Eval) -> None:
    device = environment.device(settings.device)
    assert settings.checkpoint is not None
    path = checkpoint.find(settings.checkpoint)
    found = checkpoint.load(path)
    trained = found.train
    precision = environment.precision(settings.precision or trained.precision, device)
    environment.make_ready(device)
    data = replace(trained.data, **{key: value for key, value in vars(settings.data).items() if value is not None})
    if settings.mc_samples > 0 and trained.dropout.policy is Policy.none:
        raise ConfigError(f"mc_samples must be 0, {path} was trained without dropout, got {settings.mc_samples}")
    corpus = corpora.load(data)
    if corpus.fingerprint != found.corpus:
        raise ConfigError(f"checkpoint={path} was trained on another corpus than {corpus.origin}; give it the text that it was trained on")
    task = LanguageModelling(trained.task, corpus, device)
    model = LanguageModel(
        trained.model, trained.dropout, len(corpus.vocabulary), settings.backend.name, environment.COMPUTE_DTYPES[precision]
    )
    try:
        model.load_state_dict(found.model)
    except RuntimeError:
        raise ConfigError(
            f"checkpoint={path} does not hold the weights that its own settings describe; take another one of the run"
        ) from None
    model.to(device)
    print(f"{path}: epoch {found.epoch}, {corpus.origin}, {device}, back end {model.layers.backend}, {precision}", file=sys.stderr)
    metrics: dict[str, Any] = dict(evaluate.standard(model, task))
    told: dict[str, Any] = {"checkpoint": str(path), "epoch": found.epoch, "seed": settings.seed, "metrics": metrics}
    name = "eval-standard.json"
    if settings.mc_samples > 0:
        began = time.perf_counter()
        words = settings.mc_samples * (len(task.streams["test"]) - 1)
        with counting(words, "word") as count:
            averages = evaluate.mc_perplexity(
                model, task.streams["test"], settings.mc_samples, settings.mc_batch, settings.seed, settings.word_dropout, count
            )
        metrics[f"test_ppl_mc{settings.mc_samples}"] = averages[-1].ppl
        told |= {
            "word_dropout": settings.word_dropout,
            "mc": [average._asdict() for average in averages],
            "mc_seconds": time.perf_counter() - began,
        }
        name = f"eval-mc{settings.mc_samples}{'-word' if settings.word_dropout else ''}-s{settings.seed}.json"
    told["environment"] = environment.describe(device, model.layers.backend, precision.name)
    tell(told)
    write(path.with_name(f"{path.stem.replace('checkpoint', 'eval')}-{name.removeprefix('eval-')}"), told)


def tell(told: dict[str, Any]) -> None:
    """The results as a table."""
    for metric, value in told["metrics"].items():
        print(f"{metric:<24}{value:8.2f}")
    if "mc" in told:
        print(f"\n{'passes averaged':<24}test_ppl  deviation over groups of passes")
        for row in told["mc"]:
            spread = f"{row['deviation']:9.2f} of {row['groups']}" if row["deviation"] is not None else "        –"
            print(f"{row['samples']:<24}{row['ppl']:8.2f} {spread}")


def write(path: Path, told: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(told, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); the results are above") from None
    print(f"\nwritten to {path}", file=sys.stderr)
