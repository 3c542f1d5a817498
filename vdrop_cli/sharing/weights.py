"""A checkpoint's weights, and what prediction needs beside them, as a safetensors file: written and read."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdrop_cli import checkpoint, files, stored
from vdrop_cli.checkpoint import Checkpoint, Trained
from vdrop_cli.errors import ConfigError
from vdrop_cli.files import Damaged
from vdrop_cli.model import LanguageModel, Regressor
from vdrop_cli.settings.choices import TaskName
from vdrop_cli.tasks import predictor_of

SUFFIX = ".safetensors"
FILE_NAME = f"model{SUFFIX}"  # in a folder to share
LENGTH = 8  # bytes that hold the length of the header, which follows: names, shapes and settings as JSON
HEADER_LIMIT = 100_000_000  # bytes of the longest header that safetensors reads


def start_size(path: Path) -> int:
    """The number of bytes from the start of a safetensors file to the end of its header.

    For a file that cannot be read, or that names a longer header than safetensors reads, it is `LENGTH`.
    """
    try:
        size = int.from_bytes(files.read_start(path, LENGTH), "little")
    except (OSError, Damaged):
        size = 0
    return LENGTH + (size if size <= HEADER_LIMIT else 0)


def parse_start(start: bytes) -> dict[str, Any]:
    """The metadata from the start of a file that `encode` made. Raises Damaged."""
    header = stored.parse_json(start[LENGTH : LENGTH + int.from_bytes(start[:LENGTH], "little")])
    stored.require_types(header, {"__metadata__": dict})
    metadata_of_file: dict[str, Any] = header["__metadata__"]
    stored.require_types(metadata_of_file, {"config": str, "epoch": str})
    return metadata_of_file


def are_equal(one: bytes, other: bytes) -> bool:
    """Whether two files hold the same weights and metadata, in any order."""
    return split(one) == split(other)


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the numbers of a file."""
    end = LENGTH + int.from_bytes(content[:LENGTH], "little")
    return stored.parse_json(content[LENGTH:end]), content[end:]


def is_export(start: bytes) -> bool:
    """Whether a file starts like those that `encode` makes, or is empty."""
    return not start or stored.readable_by(parse_start)(start)


def require_installed() -> None:
    """Raises ConfigError where safetensors is missing."""
    try:
        import safetensors.torch  # noqa: F401
    except ImportError:
        raise ConfigError("an export needs safetensors; pip install 'vdrop[export]'") from None


@dataclass(kw_only=True)
class Exported(Trained):
    """A model as an export holds it: enough for evaluation and prediction, but not to resume training."""

    epoch: int
    batch: int
    weights: dict[str, Tensor] = field(repr=False)


def load(path: Path) -> Exported:
    """Returns the model in a file that `encode` made. Raises ConfigError where it cannot be used."""
    require_installed()
    from safetensors import SafetensorError
    from safetensors.torch import load as decode

    try:
        content = files.read(path)
        require_checksum(content)
        return parse(parse_start(content), decode(content))
    except FileNotFoundError:
        raise ConfigError(
            f"checkpoint={path} does not exist; name a file or a folder of vdrop export"
        ) from None
    except OSError as error:
        raise files.read_error(path, error) from None
    except (Damaged, SafetensorError, ValueError) as reason:
        shown = files.printable(" ".join(str(reason).split()))
        raise ConfigError(
            f"checkpoint={path} is damaged, or no export of vdrop or of this version ({shown}); export or "
            "download it again, or use the version that its config.json names"
        ) from None


def parse(metadata_of_file: dict[str, Any], weights: dict[str, Tensor]) -> Exported:
    """Returns the model with these metadata and weights. Raises Damaged or ValueError where an export has
    others.
    """
    stored.require_types(metadata_of_file, dict.fromkeys((*RUN_METADATA, *metadata_of_file), str))
    epoch, batch = (metadata_of_file[name] for name in ("epoch", "batch"))
    if not all(re.fullmatch(r"\d{1,9}", count, re.ASCII) for count in (epoch, batch)):
        raise Damaged("epoch and batch must be whole numbers")
    model = Exported(
        config=stored.parse_json(metadata_of_file["config"].encode(), infinite=True),
        corpus=metadata_of_file["corpus"],
        learned={
            name: stored.parse_value(value.encode())
            for name, value in metadata_of_file.items()
            if name not in RUN_METADATA
        },
        epoch=int(epoch),
        batch=int(batch),
        weights=weights,
    )
    checkpoint.require_numbers("a weight", list(weights.values()))
    checkpoint.require_restorable(model)
    return model


def encode(snapshot: Checkpoint) -> bytes:
    """The content of a safetensors file."""
    from safetensors.torch import save

    # safetensors requires contiguous weights that share no memory
    weights = {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in snapshot.weights.items()
    }
    header, numbers = split(save(weights))
    # safetensors writes metadata in random order; sorted, the same model always gives the same file
    described = metadata(snapshot) | {CHECKSUM: hashlib.sha256(numbers).hexdigest()}
    text = as_json({"__metadata__": dict(sorted(described.items())), **header}).encode()
    text += b" " * (-len(text) % LENGTH)  # the numbers are aligned
    return len(text).to_bytes(LENGTH, "little") + text + numbers


def require_checksum(content: bytes) -> None:
    """Raises Damaged where the numbers of a file are not those whose checksum its metadata hold."""
    expected = parse_start(content).get(CHECKSUM)
    if expected is None:
        raise Damaged("it has no checksum")
    _, numbers = split(content)
    if expected != hashlib.sha256(numbers).hexdigest():
        raise Damaged("its numbers do not fit its checksum")


def require_whole(path: Path, snapshot: Checkpoint) -> None:
    """Raises ConfigError unless the weights are those that the settings and the vocabulary describe."""
    trained = snapshot.train
    words = predictor_of(snapshot.knowledge, torch.device("cpu")).vocabulary_size
    try:
        checkpoint.require_large_enough(snapshot.weights, trained.model, words)
        kind = Regressor if trained.task.name is TaskName.sentiment else LanguageModel
        checkpoint.require_fitting(
            snapshot.weights, kind(trained.model, trained.dropout.to_policy(), words, "fused")
        )
    except ValueError as reason:
        raise checkpoint.unusable(path, reason) from None


CHECKSUM = "sha256"  # metadata: of the bytes after the header
# all other metadata are of what the model has learned
RUN_METADATA = ("config", "corpus", "epoch", "batch", CHECKSUM)


def metadata(snapshot: Checkpoint) -> dict[str, str]:
    """JSON of the settings, and of each field of what the model has learned of its text
    (`vdrop_cli.learned`).
    """
    learned = {name: as_json(value) for name, value in snapshot.learned.items()}
    return learned | {
        "config": as_json(snapshot.config),
        "corpus": snapshot.corpus,
        "epoch": str(snapshot.epoch),
        "batch": str(snapshot.batch),
    }


def as_json(value: object, indent: int | None = None) -> str:
    """JSON whose characters are not escaped, except halves of surrogate pairs, which UTF-8 cannot encode."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return re.sub(r"[\ud800-\udfff]", lambda half: rf"\u{ord(half[0]):04x}", text)
