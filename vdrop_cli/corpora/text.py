"""Text → ids, for any three texts; and a cache of that, found by content.

N tokens of a part
"""

import hashlib
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vdrop_cli import files
from vdrop_cli.config import ConfigError, Data, RunError
from vdrop_cli.files import Damaged

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
    """Its content, without the byte order mark that some editors put first."""
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise ConfigError(f"{setting}={path} cannot be read ({error.strerror}); name a text file") from None


def words(content: bytes, part: str, origin: str) -> list[str]:
    """Words are what white space separates, the \\r of Windows too; the end of a line is the word <eos>."""
    try:
        found = content.decode("utf-8").replace("\n", " <eos> ").split()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"data.{part}: byte {error.start} of the {part} part of {origin} is not UTF-8; convert the file to UTF-8"
        ) from None
    if (place := content.find(b"\0")) >= 0:
        raise ConfigError(f"data.{part}: byte {place} of the {part} part of {origin} is NUL, as in no text; convert the file to UTF-8")
    if set(found) <= {"<eos>"}:
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
            return cached_corpus(files.read_tensors(cached), raw.origin, fingerprint)
        except (OSError, Damaged) as error:
            print(f"vdrop: {cached} cannot be used ({error}); encoding the text again", file=sys.stderr)
    corpus = encode(raw, data.min_count, fingerprint)
    if cached is not None:
        keep(corpus, cached)
    return corpus


def cached_corpus(held: dict[str, Any], origin: str, fingerprint: str) -> Corpus:
    """Raises Damaged where it is not a vocabulary and three streams of its ids."""
    vocabulary = held.get("vocabulary")
    if not (isinstance(vocabulary, list) and all(isinstance(word, str) for word in vocabulary) and len(set(vocabulary)) == len(vocabulary)):
        raise Damaged("its vocabulary is not a list of different words")
    for part in PARTS:
        ids_N = held.get(part)
        if not (isinstance(ids_N, Tensor) and ids_N.dtype is torch.int64 and ids_N.layout is torch.strided and ids_N.dim() == 1):
            raise Damaged(f"its {part} part is not a stream of ids")
        if not (ids_N.is_contiguous() and len(ids_N) > 0):
            raise Damaged(f"its {part} part is empty, or is not as it was written")
        if not 0 <= int(ids_N.min()) <= int(ids_N.max()) < len(vocabulary):
            raise Damaged(f"its {part} part holds an id that is not of its vocabulary")
    return Corpus(vocabulary, held["train"], held["valid"], held["test"], origin, fingerprint)


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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_tensors(path, {"vocabulary": corpus.vocabulary, **corpus.parts})
    except (OSError, RunError) as error:
        print(f"vdrop: data.cache={path.parent} cannot be written ({error}); going on without a cache", file=sys.stderr)
