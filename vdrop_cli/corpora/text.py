"""Text → ids, for any three texts; and a cache of that, found by content.

A text is a sequence of lines, whatever source it is from. A line ends with \\n, \\r\\n or a lone \\r; a line
end at the end of the text is optional and adds no line; a blank line is a line. Each line gives its words,
which white space separates, and one <eos>.

N tokens of a part
"""

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vdrop_cli import files
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.files import Damaged
from vdrop_cli.settings.choices import CorpusName
from vdrop_cli.settings.train import Data

PARTS = ("train", "valid", "test")
EOS, UNK = "<eos>", "<unk>"
LINE_END = re.compile(
    r"\r\n?|\n"
)  # other separators of Unicode, such as \u2028, are white space between words
ENCODING = "2"  # goes into the fingerprint; to be raised when the same text would give other ids
FIRST_ENCODING = (
    "1"  # that of Penn Treebank, and of checkpoints made before lines were read alike from all sources
)


class Raw(NamedTuple):
    """The three parts as they were found."""

    parts: dict[str, bytes]  # train, valid, test
    origin: str  # for a person: where they came from


@dataclass(frozen=True)
class Corpus:
    """Streams of word ids; `vocabulary[id]` is the word. Ids are in order of first appearance; <eos> and
    <unk> have one each.
    """

    vocabulary: list[str]
    train_N: Tensor
    valid_N: Tensor
    test_N: Tensor
    origin: str
    fingerprint: str  # SHA-256 of the content and the way it was encoded

    @property
    def parts(self) -> dict[str, Tensor]:
        return dict(zip(PARTS, (self.train_N, self.valid_N, self.test_N), strict=True))

    def shortened(self, tokens: int) -> "Corpus":
        """The first tokens of each part, with the whole vocabulary."""
        train_N, valid_N, test_N = (part_N[:tokens] for part_N in self.parts.values())
        return replace(self, train_N=train_N, valid_N=valid_N, test_N=test_N)


def unknown_share(stream_N: Tensor, corpus: Corpus) -> float:
    """What part of the tokens is <unk>."""
    return (
        (stream_N == corpus.vocabulary.index(UNK)).float().mean().item() if UNK in corpus.vocabulary else 0.0
    )


def read(data: Data) -> Raw:
    """Three local files."""
    paths = {
        part: Path(path)
        for part, path in zip(PARTS, (data.train, data.valid, data.test), strict=True)
        if path is not None
    }
    return Raw(
        {part: read_file(path, f"data.{part}={path}") for part, path in paths.items()},
        ", ".join(map(str, paths.values())),
    )


def read_file(path: Path, where: str, wanted: str = "a text file") -> bytes:
    """Its content, without the byte order mark that some editors put first. An error begins with `where`, and
    says what is `wanted`.
    """
    try:
        return files.read(path).removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise ConfigError(f"{where} cannot be read ({error.strerror}); name {wanted}") from None
    except Damaged as reason:
        raise ConfigError(f"{where} cannot be read ({reason}); name {wanted}") from None


def decoded(content: bytes, where: str) -> str:
    """Raises ConfigError where it is no text."""
    try:
        found = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{where} is not UTF-8 ({error.reason} at byte {error.start}); convert it to UTF-8"
        ) from None
    if (place := found.find("\0")) >= 0:
        raise ConfigError(
            f"{where} holds NUL in line {1 + line_ends(found[:place])}, as no text does; convert it to UTF-8"
        )
    return found


def line_ends(text: str) -> int:
    """How many there are."""
    return len(LINE_END.findall(text))


def lines(text: str) -> list[str]:
    """Without their ends."""
    found = LINE_END.split(text)
    return found if found[-1] else found[:-1]


def from_rows(rows: Iterable[str]) -> bytes:
    """A text whose rows are texts themselves, each of one line or more; an empty row is a blank line."""
    return "".join(with_line_ends(row) or "\n" for row in rows).encode()


def with_line_ends(text: str) -> str:
    """The same lines, each ending with \\n."""
    text = LINE_END.sub("\n", text)
    return text if not text or text.endswith("\n") else f"{text}\n"


def of_part(content: bytes, part: str, origin: str) -> str:
    """Its text, which has words."""
    where = f"data.{part}: the {part} part of {origin}"
    found = decoded(content, where)
    if not found.strip():
        raise ConfigError(f"{where} is empty; it needs words")
    return found


def fingerprint_of(contents: Iterable[bytes], encoding: str, min_count: int) -> str:
    digest = hashlib.sha256(f"{encoding} {min_count}".encode())
    for content in contents:
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def encoded(raw: Raw, data: Data, wanted: str | None = None) -> Corpus:
    """The ids, from the cache where the same content was encoded before.

    `wanted` is the fingerprint that a checkpoint has of its corpus: a text of the first encoding is encoded
    as it was then.
    """
    fingerprint, first = fingerprint_of(raw.parts.values(), FIRST_ENCODING, data.min_count), True
    texts = [of_part(content, part, raw.origin) for part, content in raw.parts.items()]
    if data.source is not CorpusName.ptb and fingerprint != wanted:
        texts, first = [with_line_ends(text) for text in texts], False
        fingerprint = fingerprint_of((text.encode() for text in texts), ENCODING, data.min_count)
    cached = Path(data.cache) / f"{fingerprint}.pt" if data.cache else None
    if cached is not None and cached.is_file():
        try:
            return cached_corpus(files.read_tensors(cached), raw.origin, fingerprint)
        except (OSError, Damaged) as error:
            print(f"vdrop: {cached} cannot be used ({error}); encoding the text again", file=sys.stderr)
    corpus = encode(texts, data.min_count, raw.origin, fingerprint, first)
    if cached is not None:
        keep(corpus, cached)
    return corpus


def cached_corpus(held: dict[str, Any], origin: str, fingerprint: str) -> Corpus:
    """Raises Damaged where it is not a vocabulary and three streams of its ids."""
    vocabulary = held.get("vocabulary")
    if not (
        isinstance(vocabulary, list)
        and all(isinstance(word, str) for word in vocabulary)
        and len(set(vocabulary)) == len(vocabulary)
    ):
        raise Damaged("its vocabulary is not a list of different words")
    for part in PARTS:
        ids_N = held.get(part)
        if not (
            isinstance(ids_N, Tensor)
            and ids_N.dtype is torch.int64
            and ids_N.layout is torch.strided
            and ids_N.dim() == 1
        ):
            raise Damaged(f"its {part} part is not a stream of ids")
        if not (ids_N.is_contiguous() and len(ids_N) > 0):
            raise Damaged(f"its {part} part is empty, or is not as it was written")
        if not 0 <= int(ids_N.min()) <= int(ids_N.max()) < len(vocabulary):
            raise Damaged(f"its {part} part holds an id that is not of its vocabulary")
    return Corpus(vocabulary, held["train"], held["valid"], held["test"], origin, fingerprint)


def encode(texts: list[str], min_count: int, origin: str, fingerprint: str, first: bool) -> Corpus:
    """The ids of three texts whose lines end with \\n; `first`: in the first encoding."""
    parts = [text.replace("\n", f" {EOS} ").split() for text in texts]
    if first:
        vocabulary, parts = in_first_encoding(parts, min_count)
    else:
        vocabulary = words_of(parts[0], min_count, origin)
    ids = {word: number for number, word in enumerate(vocabulary)}
    unknown = ids.get(UNK, -1)  # in the first encoding it may be missing, and all words are in the vocabulary
    train_N, valid_N, test_N = (torch.tensor([ids.get(word, unknown) for word in words]) for words in parts)
    return Corpus(vocabulary, train_N, valid_N, test_N, origin, fingerprint)


def words_of(train: list[str], min_count: int, origin: str) -> list[str]:
    """The vocabulary: the words of the training part that it has `min_count` times, by first appearance; all
    others are <unk>.
    """
    counts = Counter(train)
    named = [word if count >= min_count or word == EOS else UNK for word, count in counts.items()]
    found = list(dict.fromkeys([*named, UNK]))
    if set(found) == {EOS, UNK}:
        raise ConfigError(
            f"data.min_count={min_count}: the training part of {origin} has no word so often, all would be "
            f"{UNK}; "
            f"{'make data.min_count smaller' if min_count > 1 else 'take another text'}"
        )
    return found


def in_first_encoding(parts: list[list[str]], min_count: int) -> tuple[list[str], list[list[str]]]:
    """The vocabulary, of the words of all parts, and the parts, whose words are in it."""
    if min_count > 1:
        counts = Counter(parts[0])
        parts = [[word if counts[word] >= min_count else UNK for word in words] for words in parts]
    return list(dict.fromkeys(word for words in parts for word in words)), parts


def keep(corpus: Corpus, path: Path) -> None:
    """Writes the cache; where that is not possible the run continues without, and says so."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_tensors(path, {"vocabulary": corpus.vocabulary, **corpus.parts})
    except (OSError, RunError) as error:
        print(
            f"vdrop: data.cache={path.parent} cannot be written ({error}); continuing without a cache",
            file=sys.stderr,
        )
