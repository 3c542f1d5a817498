"""A folder to share: weights, vocabulary, settings and a model card."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from vdrop_cli import files, ownership, stored
from vdrop_cli.checkpoint import Checkpoint
from vdrop_cli.errors import ConfigError
from vdrop_cli.files import Damaged
from vdrop_cli.sharing import card, weights

FORMAT = "vdrop export 1"
WEIGHTS, VOCABULARY, CONFIG, CARD = weights.FILE_NAME, "vocabulary.json", "config.json", "README.md"
ADVICE = "choose another folder="


def write(path: Path, snapshot: Checkpoint, folder: Path) -> None:
    """Writes the export of the checkpoint at `path`.

    An edited model card stays if the weights are the same. Raises ConfigError if the folder is no export and
    not empty, or if it has an edited model card of other weights.
    """
    shared = replace(snapshot, config=card.without_places(snapshot.config))
    content = {WEIGHTS: weights.encode(shared), VOCABULARY: vocabulary(shared), CONFIG: config(shared)}
    page = card.render(shared, card.measurements(path, snapshot)).encode(errors="backslashreplace")
    make(folder)
    if is_card_to_write(folder, content[WEIGHTS]):
        content[CARD] = page
    else:
        print(f"vdrop: {folder / CARD} was edited and stays as it is", file=sys.stderr)
    for name in (CONFIG, *sorted(content.keys() - {CONFIG})):  # config.json marks the folder as an export
        files.replace(folder / name, content[name])


def make(folder: Path) -> None:
    """Makes the folder. Raises ConfigError unless it is new, empty or an export."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        has_content = any(folder.iterdir())
    except OSError as error:
        raise ConfigError(f"folder={folder} cannot be written ({error.strerror}); {ADVICE}") from None
    if not has_content:
        return
    if not (folder / CONFIG).exists():
        raise ConfigError(f"folder={folder} holds other files; {ADVICE}")
    ownership.require_own(folder / CONFIG, stored.readable_by(parse_config), ADVICE)
    ownership.require_own(folder / WEIGHTS, weights.is_export, ADVICE, weights.start_size(folder / WEIGHTS))
    ownership.require_own(folder / VOCABULARY, stored.readable_by(parse_vocabulary), ADVICE)


def is_card_to_write(folder: Path, new_weights: bytes) -> bool:
    """Whether the model card is missing or as vdrop wrote it. Raises ConfigError where an edited one
    describes other weights.
    """
    present = read(folder / CARD)
    if present is None or card.is_unedited(present):
        return True
    old_weights = read(folder / WEIGHTS)
    if not old_weights or not weights.are_equal(old_weights, new_weights):
        raise ConfigError(f"{folder / CARD} was edited for other weights; move it away, or {ADVICE}")
    return False


def read(path: Path) -> bytes | None:
    """The content of a file; None where it is missing. Raises ConfigError."""
    try:
        return files.read(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise files.read_error(path, error) from None
    except Damaged as damage:
        raise ConfigError(f"{path} would be overwritten, and {damage}; {ADVICE}") from None


def vocabulary(snapshot: Checkpoint) -> bytes:
    return f"{weights.as_json(snapshot.learned['vocabulary'], indent=0)}\n".encode()


def config(snapshot: Checkpoint) -> bytes:
    """The settings, versions, and what prediction needs beside weights and vocabulary."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "task": str(snapshot.train.task.name),
        "epoch": snapshot.epoch,
        "batch": snapshot.batch,
        "corpus": snapshot.corpus,
        "learned": {name: value for name, value in snapshot.learned.items() if name != "vocabulary"},
        "settings": json_settings(snapshot.config),
        "environment": snapshot.environment,
    }
    return f"{weights.as_json(content, indent=2)}\n".encode()


def json_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Returns nested settings for JSON, which lacks infinity: it becomes a text, which a setting accepts."""
    return {
        key: json_settings(value)
        if isinstance(value, dict)
        else str(value)
        if isinstance(value, float) and math.isinf(value)
        else value
        for key, value in values.items()
    }


def parse_config(content: bytes) -> None:
    """Raises Damaged unless this is the config.json of an export."""
    values = stored.parse_json(content)
    if values.get("format") != FORMAT:
        raise Damaged("it is not an export")


def parse_vocabulary(content: bytes) -> None:
    """Raises Damaged unless this is a list of texts."""
    words = stored.parse_value(content)
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise Damaged("it is not a list of texts")
