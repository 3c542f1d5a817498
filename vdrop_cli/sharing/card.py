"""The model card of an export: what the model is, its numbers, and how to use it."""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vdrop_cli import evaluation_files, markdown, runs
from vdrop_cli.checkpoint import Checkpoint
from vdrop_cli.evaluation_files import Evaluation
from vdrop_cli.learned import Learned, Ratings
from vdrop_cli.metric_names import PARTS, metric_in_words
from vdrop_cli.policies import Cell
from vdrop_cli.runs import Finished
from vdrop_cli.settings.fields import without_defaults
from vdrop_cli.settings.train import Model, Train

MARK = "<!-- written by vdrop export; SHA-256 of the lines above: "
END = " -->\n"
LICENCE_HINT = (
    "This export states no licence. Choose one that the training data allow, and add it to the header of "
    "this page as `license:`."
)


@dataclass(frozen=True)
class CardMetric:
    """A metric of the exported weights, and the command that measured it."""

    metric: str
    value: float
    command: str


def measurements(path: Path, snapshot: Checkpoint) -> list[CardMetric]:
    """The metrics in the run folder of a checkpoint that were measured with its weights.

    The list is empty where the checkpoint lies outside of its run folder. Raises ConfigError where a file
    there is damaged.
    """
    folder = path.parent
    if not runs.is_run(folder):
        return []
    run = runs.read_any(folder)
    if not run.log or run.train.run_identity(run.corpus) != snapshot.train.run_identity(snapshot.corpus):
        return []
    measured = list[CardMetric]()
    if isinstance(run, Finished) and (run.result["epoch"], 0) == (snapshot.epoch, snapshot.batch):
        measured += to_measurements(run.result, "vdrop train")
    for file in sorted(folder.glob("eval-*.json")):
        evaluation = evaluation_files.from_file(file, path.stem)
        if evaluation is not None and evaluation.members == 1 and not evaluation.text_digest:
            measured += to_measurements(evaluation_files.read(file)["metrics"], command_of(evaluation))
    return list({(one.metric, one.value): one for one in reversed(measured)}.values())[::-1]


def to_measurements(values: dict[str, Any], command: str) -> list[CardMetric]:
    """The metrics among the values of a result or an evaluation."""
    calibration = evaluation_files.NEXT_WORD
    return [
        CardMetric(name, value, f"{command} calibration=true" if calibration.fullmatch(name) else command)
        for name, value in values.items()
        if is_metric(name)
    ]


def is_metric(name: str) -> bool:
    """Whether a value of a result is an error or likelihood on a part of the data, rather than a count."""
    # metrics of other weights, temperatures, probabilities or epochs
    is_of_others = name.endswith(("_raw", "_tempered", "_scaled", "_chosen_on_test"))
    return name.partition("_")[0] in PARTS and bool(metric_in_words(name)) and not is_of_others


def command_of(evaluation: Evaluation) -> str:
    """The command of an evaluation, without the checkpoint."""
    words = ["vdrop eval"]
    if evaluation.samples:
        words += [f"mc_samples={evaluation.samples}", f"seed={evaluation.seed}"]
    if evaluation.word_dropout is not None:
        words.append(f"word_dropout={str(evaluation.word_dropout).lower()}")
    if evaluation.precision is not None:
        words.append(f"precision={evaluation.precision}")
    return " ".join(words)


def without_places(config: dict[str, Any]) -> dict[str, Any]:
    """Settings without the folders of the machine that trained the model."""
    data = dict(config["data"])
    for key in ("train", "valid", "test", "csv"):
        if data.get(key):
            data[key] = Path(data[key]).name
    name = data.get("name")
    if name and (not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or os.path.exists(name)):
        data["name"] = Path(name).resolve().name or "folder"  # a local one
    for key in ("dir", "cache"):
        if data.get(key):
            data[key] = None
    return config | {"data": data, "outputs": Train.outputs}


def render(snapshot: Checkpoint, measured: list[CardMetric]) -> str:
    """The page, with a checksum in its last line."""
    train = snapshot.train
    knowledge = snapshot.knowledge
    is_rating = isinstance(knowledge, Ratings)
    kind = {Cell.lstm: "An LSTM", Cell.gru: "A GRU"}[train.model.cell]
    purpose = "a rating from a text" if is_rating else "the next word of a text"
    first_id = ", from id 2 on; 0 is the start of a text, 1 an unknown word" if is_rating else ""
    parts = [
        f"---\nlibrary_name: vdrop\ntags: [vdrop, {train.model.cell}, dropout]\n---",
        f"# {train.model.name}, dropout {train.dropout.name}",
        f"{kind} that predicts {purpose}, trained with vdrop.",
        LICENCE_HINT,
        markdown.table(["", ""], [(name, escaped(fact)) for name, fact in facts(snapshot, knowledge)]),
        "## Numbers",
        numbers(measured, train.seed),
        "## Use",
        "In the folder of this page, with vdrop and safetensors installed:",
        f"```python\n{example(train, knowledge)}```",
        "## Files",
        "- `model.safetensors`: the weights; the metadata in it repeat vocabulary and settings\n"
        f"- `vocabulary.json`: the words in the order of their ids{first_id}\n"
        "- `config.json`: settings, versions, and what prediction needs beside weights and vocabulary",
        "## Settings",
        f"```yaml\n{OmegaConf.to_yaml(OmegaConf.create(snapshot.config))}```",
    ]
    body = "\n\n".join(parts) + "\n"
    return f"{body}{MARK}{checksum(body)}{END}"


def layers_in_words(model: Model) -> str:
    """Number and sizes of the layers."""
    sizes = f"{model.hidden_size:,}"
    if model.lower_sizes:
        sizes = f"{', '.join(f'{size:,}' for size in model.lower_sizes)} and {sizes}"
    return f"{model.layers} layers of {sizes} units{', residual' if model.residual else ''}"


def facts(snapshot: Checkpoint, knowledge: Learned) -> Iterator[tuple[str, str]]:
    """What the model is and how it was trained: names and values."""
    train, environment = snapshot.train, snapshot.environment
    model, dropout = train.model, train.dropout
    count = sum(weight.numel() for weight in snapshot.weights.values())
    yield (
        "model",
        f"{str(model.cell).upper()}, {layers_in_words(model)}, "
        f"word vectors of {model.word_size:,}{', tied to the head' if model.tie_embeddings else ''}, "
        f"vocabulary {len(knowledge.vocabulary):,}, {count:,} weights",
    )
    if snapshot.averaged:
        yield "weights", f"the average over {snapshot.averaged:,} updates"
    yield (
        "dropout in training",
        f"{dropout.policy}{', untied' if dropout.untied else ''}: {dropout.in_words}",
    )
    data = without_defaults(train.data)
    named = [f"{name}={data[name]}" for name in DATA_NAMES if data.get(name) is not None]
    yield "training data", ", ".join([f"`data={train.data.source}`", *(f"`{name}`" for name in named)])
    yield "fingerprint of the corpus: all parts, as vdrop reads them", f"`{snapshot.corpus}`"
    steps = f" and {snapshot.batch} steps" if snapshot.batch else ""
    yield "training", f"epochs: {snapshot.epoch}{steps}, {train.schedule.optimiser}, seed {train.seed}"
    software = [f"{name} {environment[name]}" for name in SOFTWARE if environment.get(name) is not None]
    yield "software", ", ".join(software)
    hardware = [str(environment[name]) for name in ("device", "precision") if name in environment]
    yield "hardware and precision", ", ".join(hardware)


DATA_NAMES = (
    "name",
    "config",
    "revision",
    "column",
    "rating_column",
    "train",
    "valid",
    "test",
    "csv",
    "fraction",
)
SOFTWARE = ("vdrop", "torch", "python", "commit")


def numbers(measured: list[CardMetric], seed: int) -> str:
    """The metrics as a table."""
    if not measured:
        return "No measurement of these weights lies beside the checkpoint."
    rows = [
        (f"`{one.metric}`", f"{one.value:.4g}", metric_in_words(one.metric), f"`{one.command}`")
        for one in measured
    ]
    introduction = f"Of this one run, seed {seed}; dropout is off unless the meaning says otherwise."
    return f"{introduction}\n\n{markdown.table(['metric', 'value', 'meaning', 'command'], rows)}"


def escaped(text: str) -> str:
    """A text as a cell of a table."""
    return re.sub(r"\s+", " ", text).replace("|", r"\|")


def checksum(body: str) -> str:
    return hashlib.sha256(body.encode(errors="backslashreplace")).hexdigest()


def is_unedited(content: bytes) -> bool:
    """Whether a page is as `render` wrote it, for whichever model."""
    body, mark, rest = content.decode(errors="replace").rpartition(MARK)
    return bool(mark) and rest == checksum(body) + END


LOAD = """import json
from pathlib import Path

import torch
from safetensors.torch import load_file
{imports}
weights = load_file("model.safetensors")
words = json.loads(Path("vocabulary.json").read_text(encoding="utf-8"))
layers = {layers}
layers.load_state_dict({{name[7:]: weights[name] for name in weights if name.startswith("layers.")}})
layers.eval()
"""
NEXT_WORD = """text = words[:3]  # words of the vocabulary; put yours here
ids = torch.tensor([words.index(word) for word in text])
outputs, _ = layers(weights["embedding"][ids][:, None])  # time, batch, units
logits = outputs[:, 0]{projection} @ weights["{head}"].T + weights["head_bias"]
log_probabilities = logits.log_softmax(-1)  # of the word after each word of the text
print(words[log_probabilities[-1].argmax()])
"""
RATING = """learned = json.loads(Path("config.json").read_text(encoding="utf-8"))["learned"]
ids = {{word: number for number, word in enumerate(words, 2)}}
text = split_words(learned["splitting"], "A film to remember .")
text_ids = torch.tensor([0, *(ids.get(word, 1) for word in text)]){chunks}
outputs, _ = layers(weights["embedding"][text_ids][:, None])  # time, batch, units
output = outputs[-1, 0] @ weights["head_weight"][0] + weights["head_bias"][0]
print(learned["mean"] + learned["deviation"] * output.item())
"""


def example(train: Train, knowledge: Learned) -> str:
    """The code that loads the files and predicts, with dropout off."""
    model = train.model
    kind = "LSTM" if model.cell is Cell.lstm else "GRU"
    options = [f"{name}=True" for name in ("residual", "reset_after") if getattr(model, name)]
    sizes = model.hidden_sizes if model.lower_sizes else model.hidden_size
    layers = f"{kind}({', '.join([str(model.word_size), str(sizes), str(model.layers), *options])})"
    layer_import = f"from vdrop_cli.layers import {kind}\n"
    if not isinstance(knowledge, Ratings):
        return LOAD.format(imports=layer_import, layers=layers) + NEXT_WORD.format(
            projection=' @ weights["head_projection"].T' if model.has_projection else "",
            head="embedding" if model.tie_embeddings else "head_weight",
        )
    imports = f"from vdrop_cli.corpora import split_words\n{layer_import}"
    length = knowledge.chunk_words
    chunks = (
        "" if length is None else f"  # the rating of a longer text: the mean over pieces of {length} ids"
    )
    return LOAD.format(imports=imports, layers=layers) + RATING.format(chunks=chunks)
