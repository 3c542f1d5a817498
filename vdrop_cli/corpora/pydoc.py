"""The embedded corpus: the help topics of the Python standard library.

It is real English, without a download, and differs between Python versions.
"""

import platform
import re

from vdrop_cli.corpora.text import Raw, from_rows
from vdrop_cli.settings.data import PythonTopics

WORD = re.compile(r"\w+|([^\w\s])\1*")  # repetitions of one sign, such as a ruled line, are one word
PARTS_OF_TEN = ("train",) * 8 + ("valid", "test")  # the part of each of ten successive paragraphs


def read(data: PythonTopics) -> Raw:
    """Returns the paragraphs in the order of topics, without repetitions.

    They are lower-case, with words and punctuation separated. Of ten, eight are for training, one for
    validation and one for test.
    """
    from pydoc_data.topics import topics  # half a megabyte

    parts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    blocks = [block for name in sorted(topics) for block in re.split(r"\n\s*\n", topics[name])]
    lines = (" ".join(match[0] for match in re.finditer(WORD, block.lower())) for block in blocks)
    paragraphs = dict.fromkeys(lines)  # many occur in several topics
    for number, paragraph in enumerate(paragraph for paragraph in paragraphs if paragraph):
        parts[PARTS_OF_TEN[number % 10]].append(paragraph)
    return Raw(
        {part: from_rows(rows) for part, rows in parts.items()},
        f"pydoc_data.topics of Python {platform.python_version()}",
    )
