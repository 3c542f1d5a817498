"""Text → ids, for any three texts, with a cache by content.

A text is a sequence of lines, whatever its source. A line ends with \\n, \\r\\n or a lone \\r; a line end at
the end of the text is optional and adds no line; a blank line is a line. Each line gives its words, separated
by white space, and one <eos>.

N tokens of a part
"""

import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vdrop_cli import files
from vdrop_cli.errors import ConfigError, RunError
from vdrop_cli.files import Damaged
from vdrop_cli.settings.data import CountedText, TextData, TextFiles

PARTS = ("train", "valid", "test")
EOS, UNK = "<eos>", "<unk>"
LINE_END = re.compile(r"\r\n?|\n")  # other separators of Unicode, such as \u2028, are white space
ENCODING = "2"  # part of the fingerprint; raise it when the same text would give other ids
FIRST_ENCODING = "1"  # of Penn Treebank, whose fingerprint names recorded runs


class Raw(NamedTuple):
    """The three parts as read."""

    parts: dict[str, bytes]  # train, valid, test
    origin: str  # the source, for messages


@dataclass(frozen=True)
class Corpus:
    """Streams of word ids; `vocabulary[id]` is the word.

    Ids are in order of first appearance, those of <eos> and <unk> too.
    """

    vocabulary: list[str]
    train_N: Tensor
    valid_N: Tensor
    test_N: Tensor
    origin: str
    fingerprint: str  # SHA-256 of the content and the rule of its encoding

    @property
    def parts(self) -> dict[str, Tensor]:
        return dict(zip(PARTS, (self.train_N, self.valid_N, self.test_N), strict=True))

    def shortened(self, tokens: int) -> "Corpus":
        """The first tokens of each part, with the whole vocabulary."""
        train_N, valid_N, test_N = (part_N[:tokens] for part_N in self.parts.values())
        return replace(self, train_N=train_N, valid_N=valid_N, test_N=test_N)

    def with_fraction(self, fraction: float) -> "Corpus":
        """The first tokens of the training part, with the whole vocabulary and a fingerprint of its own."""
        return replace(
            self,
            train_N=self.train_N[: first_part(len(self.train_N), fraction)],
            origin=with_fraction(self.origin, fraction),
            fingerprint=hashlib.sha256(f"{self.fingerprint} fraction {fraction}".encode()).hexdigest(),
        )


def first_part(items: int, fraction: float) -> int:
    """How many items a fraction of them is; at least one."""
    return max(1, round(items * fraction))


def with_fraction(origin: str, fraction: float) -> str:
    """The name of a corpus of which a fraction of the training part is used, for messages."""
    return origin if fraction == 1 else f"{origin} (data.fraction={fraction:g})"


def unknown_share(stream_N: Tensor, corpus: Corpus) -> float:
    """Returns the share of tokens that are <unk>."""
    return (
        (stream_N == corpus.vocabulary.index(UNK)).float().mean().item() if UNK in corpus.vocabulary else 0.0
    )


def read(data: TextFiles) -> Raw:
    """Reads three local files."""
    paths = {part: Path(path) for part, path in zip(PARTS, (data.train, data.valid, data.test), strict=True)}
    return Raw(
        {part: read_file(path, f"data.{part}={path}") for part, path in paths.items()},
        ", ".join(map(str, paths.values())),
    )


def read_file(path: Path, where: str, kind: str = "a text file") -> bytes:
    """Returns the content of a file, without a byte order mark.

    Errors begin with `where`, and ask for `kind`.
    """
    try:
        return files.read(path).removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise ConfigError(f"{where} cannot be read ({error.strerror}); name {kind}") from None
    except Damaged as reason:
        raise ConfigError(f"{where} cannot be read ({reason}); name {kind}") from None


def decode(content: bytes, where: str) -> str:
    """Decodes UTF-8; raises ConfigError where the content is not text."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{where} is not UTF-8 ({error.reason} at byte {error.start}); convert it to UTF-8"
        ) from None
    if (position := text.find("\0")) >= 0:
        raise ConfigError(
            f"{where} has a NUL character in line {1 + line_ends(text[:position])}; convert it to UTF-8"
        )
    return text


def line_ends(text: str) -> int:
    """Counts line ends."""
    return len(LINE_END.findall(text))


def lines(text: str) -> list[str]:
    """Splits a text into lines, without their ends."""
    parts = LINE_END.split(text)
    return parts if parts[-1] else parts[:-1]


def from_rows(rows: Iterable[str]) -> bytes:
    """Joins rows to a text; a row may have several lines, and an empty row is a blank line."""
    return "".join(with_line_ends(row) or "\n" for row in rows).encode()


def with_line_ends(text: str) -> str:
    """Returns the same lines, each with the end \\n."""
    text = LINE_END.sub("\n", text)
    return text if not text or text.endswith("\n") else f"{text}\n"


def decode_words(content: bytes, where: str) -> str:
    """Decodes a text; raises ConfigError where it has no words."""
    text = decode(content, where)
    if not text.strip():
        raise ConfigError(f"{where} is empty; it needs words")
    return text


def compute_fingerprint(contents: Iterable[bytes], encoding: str, min_count: int) -> str:
    digest = hashlib.sha256(f"{encoding} {min_count}".encode())
    for content in contents:
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def load_encoded(raw: Raw, data: TextData) -> Corpus:
    """Returns the ids of a corpus, from the cache if it has them."""
    texts = [
        decode_words(content, f"data.{part}: the {part} part of {raw.origin}")
        for part, content in raw.parts.items()
    ]
    min_count = data.min_count if isinstance(data, CountedText) else None
    if min_count is None:
        fingerprint = compute_fingerprint(raw.parts.values(), FIRST_ENCODING, 1)
    else:
        texts = [with_line_ends(text) for text in texts]
        fingerprint = compute_fingerprint((text.encode() for text in texts), ENCODING, min_count)
    cached = Path(data.cache) / f"{fingerprint}.pt" if data.cache else None
    if cached is not None and os.path.isfile(cached):  # False, too, where its folder cannot be entered
        try:
            return cached_corpus(files.read_tensors(cached), raw.origin, fingerprint)
        except (OSError, Damaged) as error:
            print(f"vdrop: {cached} cannot be used ({error}); encoding the text again", file=sys.stderr)
    corpus = encode(texts, min_count, raw.origin, fingerprint)
    if cached is not None:
        store(corpus, cached)
    return corpus


def cached_corpus(values: dict[str, Any], origin: str, fingerprint: str) -> Corpus:
    """Returns a corpus from the values in the cache.

    Raises Damaged unless they are a vocabulary and three streams of its ids.
    """
    vocabulary = values.get("vocabulary")
    if not (
        isinstance(vocabulary, list)
        and all(isinstance(word, str) for word in vocabulary)
        and len(set(vocabulary)) == len(vocabulary)
    ):
        raise Damaged("its vocabulary is not a list of different words")
    for part in PARTS:
        ids_N = values.get(part)
        if not (isinstance(ids_N, Tensor) and ids_N.dtype is torch.int64 and ids_N.dim() == 1):
            raise Damaged(f"its {part} part is not a stream of ids")
        if not (ids_N.is_contiguous() and len(ids_N) > 0):
            raise Damaged(f"its {part} part is empty, or has another layout")
        if not 0 <= int(ids_N.min()) <= int(ids_N.max()) < len(vocabulary):
            raise Damaged(f"its {part} part has an id outside its vocabulary")
    return Corpus(vocabulary, values["train"], values["valid"], values["test"], origin, fingerprint)


def encode(texts: list[str], min_count: int | None, origin: str, fingerprint: str) -> Corpus:
    """Returns the ids of three texts whose lines end with \\n.

    `min_count` None selects the first encoding: the vocabulary is the words of all parts.
    """
    parts = list(map(to_tokens, texts))
    if min_count is None:
        vocabulary = list(dict.fromkeys(chain.from_iterable(parts)))
    else:
        vocabulary = make_vocabulary(parts[0], min_count, origin)
    ids = {word: number for number, word in enumerate(vocabulary)}
    unknown = ids.get(UNK, -1)  # the first encoding may lack it, and has all words in its vocabulary
    train_N, valid_N, test_N = (torch.tensor([ids.get(word, unknown) for word in words]) for words in parts)
    return Corpus(vocabulary, train_N, valid_N, test_N, origin, fingerprint)


def to_tokens(text: str) -> list[str]:
    """Returns the words of a text whose lines end with \\n, and an <eos> for each line end."""
    return text.replace("\n", f" {EOS} ").split()


def read_tokens(path: Path, where: str) -> tuple[list[str], str]:
    """Returns the words of a text file, with an <eos> for each line end, and the SHA-256 of the content
    without a byte order mark.

    Raises ConfigError, which begins with `where`, unless the file is a text with words.
    """
    content = read_file(path, where)
    text = decode_words(content, where)
    return to_tokens(with_line_ends(text)), hashlib.sha256(content).hexdigest()


def make_vocabulary(train: list[str], min_count: int, origin: str) -> list[str]:
    """Returns the words that occur at least `min_count` times in the training part.

    They are in order of first appearance. All others become <unk>. Raises ConfigError where no word remains.
    """
    counts = Counter(train)
    tokens = [word if count >= min_count or word == EOS else UNK for word, count in counts.items()]
    vocabulary = list(dict.fromkeys([*tokens, UNK]))
    if set(vocabulary) == {EOS, UNK}:
        advice = "make data.min_count smaller" if min_count > 1 else "take another text"
        raise ConfigError(
            f"data.min_count={min_count}: no word of the training part of {origin} occurs so often, all "
            f"would be {UNK}; {advice}"
        )
    return vocabulary


def store(corpus: Corpus, path: Path) -> None:
    """Writes the cache; prints a warning where that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_tensors(path, {"vocabulary": corpus.vocabulary, **corpus.parts})
    except (OSError, RunError) as error:
        print(
            f"vdrop: data.cache={path.parent} cannot be written ({error}); continuing without a cache",
            file=sys.stderr,
        )
