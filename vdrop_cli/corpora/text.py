"""Text → ids, for any three texts; and a cache of that, found by content.

N tokens of a part
"""

import hashlib
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vdrop_cli.config import ConfigError, Data

PARTS = ("train", "valid", "test")
ENCODING = "1"  # goes into the fingerprint; to be raised when the same text would give other ids


class Raw(NamedTuple):
    """The three parts as they were found."""

    parts: dict[str, bytes]  # train, valid, test
    origin: str  # for a person: where they came from


@dataclass(frozen=True)
class Corpus:
    """Streams of word ids; `vocabulary[id]` is the word. Ids are given in order of first appearance in train, valid, test."""

    vocabulary: list[str]
    train_N: Tensor
    valid_N: Tensor
    test_N: Tensor
    origin: str
    fingerprint: str  # SHA-256 of the content and the way it was encoded

    @property
    def parts(self) -> dict[str, Tensor]:
        return dict(zip(PARTS, (self.train_N, self.valid_N, self.test_N), strict=True))


def read(data: Data) -> Raw:
    """Three local files."""
    paths = {part: Path(path) for part, path in zip(PARTS, (data.train, data.valid, data.test), strict=True) if path is not None}
    return Raw({part: read_file(path, f"data.{part}") for part, path in paths.items()}, ", ".join(map(str, paths.values())))


def read_file(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting}={path} cannot be read ({error.strerror}); name a text file") from None


def words(content: bytes, part: str, origin: str) -> list[str]:
    """Words are what white space separates; the end of a line is the word <eos>."""
    try:
        found = content.decode("utf-8").replace("\n", " <eos> ").split()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"data.{part}: byte {error.start} of the {part} part of {origin} is not UTF-8; convert the file to UTF-8"
        ) from None
    if not found:
        raise ConfigError(f"data.{part}: the {part} part of {origin} is empty; it needs words")
    return found


def encoded(raw: Raw, data: Data) -> Corpus:
    """The ids, from the cache where the same content was encoded before."""
    digest = hashlib.sha256(f"{ENCODING} {data.min_count}".encode())
    for content in raw.parts.values():
        digest.update(len(content).to_bytes(8, "little") + content)
    fingerprint = digest.hexdigest()
    cached = Path(data.cache) / f"{fingerprint}.pt" if data.cache else None
    if cached is not None and cached.is_file():
        try:
            held = torch.load(cached, weights_only=True)
            return Corpus(held["vocabulary"], held["train"], held["valid"], held["test"], raw.origin, fingerprint)
        except Exception as error:  # whatever the reader of a damaged file stumbles over
            print(f"vdrop: {cached} is damaged ({type(error).__name__}); encoding the text again", file=sys.stderr)
    corpus = encode(raw, data.min_count, fingerprint)
    if cached is not None:
        keep(corpus, cached)
    return corpus


def encode(raw: Raw, min_count: int, fingerprint: str) -> Corpus:
    """Words seen less than `min_count` times in the training part become <unk>, in all parts."""
    texts = [words(content, part, raw.origin) for part, content in raw.parts.items()]
    if min_count > 1:
        counts = Counter(texts[0])
        texts = [[word if counts[word] >= min_count else "<unk>" for word in text] for text in texts]
    ids: dict[str, int] = {}
    train_N, valid_N, test_N = (torch.tensor([ids.setdefault(word, len(ids)) for word in text]) for text in texts)
    return Corpus(list(ids), train_N, valid_N, test_N, raw.origin, fingerprint)


def keep(corpus: Corpus, path: Path) -> None:
    """Writes the cache; where that is not possible the run goes on without, and says so."""
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"vocabulary": corpus.vocabulary, **corpus.parts}, beside)
        beside.replace(path)
    except (OSError, RuntimeError) as error:
        print(f"vdrop: data.cache={path.parent} cannot be written ({error}); going on without a cache", file=sys.stderr)
