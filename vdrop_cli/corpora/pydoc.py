"""The embedded corpus: the help topics of the Python standard library. Real English, no download; it differs
between Python versions.
"""

import platform
import re

from vdrop_cli.corpora.text import Raw, from_rows
from vdrop_cli.settings.train import Data

WORD = re.compile(r"\w+|([^\w\s])\1*")  # a row of the same sign, such as a ruled line, is one word
BLOCKS_OF_TEN = ("train",) * 8 + ("valid", "test")  # which part each block of ten goes to


def read(data: Data) -> Raw:
    """Paragraphs in order of topic, each once, lower-cased, words and punctuation apart; of ten, eight train,
    one valid, one test.
    """
    from pydoc_data.topics import topics  # half a megabyte, so only where it is used

    parts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    blocks = [block for name in sorted(topics) for block in re.split(r"\n\s*\n", topics[name])]
    lines = (" ".join(match[0] for match in re.finditer(WORD, block.lower())) for block in blocks)
    paragraphs = dict.fromkeys(lines)  # many stand under several topics
    for number, paragraph in enumerate(paragraph for paragraph in paragraphs if paragraph):
        parts[BLOCKS_OF_TEN[number % 10]].append(paragraph)
    return Raw(
        {part: from_rows(of_part) for part, of_part in parts.items()},
        f"pydoc_data.topics of Python {platform.python_version()}",
    )
