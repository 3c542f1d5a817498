"""The Cornell scale dataset v1.0 (Pang & Lee 2005): film reviews of four authors.

Read from this machine, else downloaded; always verified.
"""

import http.client
import io
import tarfile
import urllib.request

from vdrop_cli.corpora import places
from vdrop_cli.corpora.rated import Rated, number
from vdrop_cli.corpora.text import read_file
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.data import CornellReviews

NAME = "cornell_scale"  # name of the folder
AUTHORS = ("Dennis+Schwartz", "James+Berardinelli", "Scott+Renshaw", "Steve+Rhodes")
MD5 = {  # author: (extracts, ratings)
    "Dennis+Schwartz": ("bc613e29303723dcc4822ef860b8e785", "389da1f936c136c20688dbe4ad743386"),
    "James+Berardinelli": ("f3d64edccc4fc5ec4cbd1d44ba4847c2", "93ffa51e855baf405878e204eb973273"),
    "Scott+Renshaw": ("028e35c8f234ad9d5915560ea10a63eb", "ca289e96d19bbbe79667abf1331a1e01"),
    "Steve+Rhodes": ("209131c1e145db5e50765d9686e25fc9", "209482da452dc00ac35c9d90a0cc3243"),
}
SUMS = {
    f"scaledata/{author}/{kind}.{author}": md5
    for author, sums in MD5.items()
    for kind, md5 in zip(("subj", "rating"), sums, strict=True)
}
FILES = list(SUMS)
URL = "https://www.cs.cornell.edu/people/pabo/movie-review-data/scale_data.tar.gz"
URL_TIMEOUT = 30  # seconds without an answer
PUNCTUATION = '.,:;!?()"'  # signs that the data set always separates from words
END = "<end>"  # of a review: the authors' code splits on single spaces, so the line's end is a word


def read(data: CornellReviews) -> Rated:
    """Returns all reviews, author by author.

    A review is an "extract" of the data set: a line of words that are already separated.
    """
    place = places.local(data, NAME, FILES)
    if place is None:
        contents, origin = fetch()
    else:
        setting, folder = place
        contents = {file: read_file(folder / file, f"{setting}: {folder / file}") for file in FILES}
        origin = str(folder)
        check_sums(contents, f"{setting}: {folder}/{{name}}")
    texts: list[list[str]] = []
    ratings: list[float] = []
    sources: list[str] = []
    for author in AUTHORS:
        reviews, numbers = (
            contents[f"scaledata/{author}/{kind}.{author}"].decode("latin-1") for kind in ("subj", "rating")
        )
        texts += [words(review) for review in reviews.splitlines()]
        ratings += [number(rating, f"rating.{author}") for rating in numbers.split()]
        sources += [author.replace("+", " ")] * (len(ratings) - len(sources))
    return Rated(texts, ratings, origin, sources=sources)


def words(text: str) -> list[str]:
    """Splits a text into lower-case words, with punctuation separated as in the data set.

    Everything else stays inside words, as in "kids'" and "$100".
    """
    result = []
    for word in text.lower().split():
        core = word.strip(PUNCTUATION)
        before = len(word) - len(word.lstrip(PUNCTUATION)) if core else len(word)
        result += [*word[:before], *([core] if core else []), *word[before + len(core) :]]
    return [*result, END]


def fetch() -> tuple[dict[str, bytes], str]:
    """Downloads from the authors' page, verifies, and stores the files below `data/`."""
    try:
        content = urllib.request.urlopen(URL, timeout=URL_TIMEOUT).read()
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            members = {
                member.name.removeprefix("./"): member for member in archive.getmembers() if member.isfile()
            }
            contents = {file: archive.extractfile(members[file]).read() for file in FILES}  # type: ignore[union-attr]
        check_sums(contents, f"{URL}: {{name}}")
    except (OSError, http.client.HTTPException, tarfile.TarError, EOFError, KeyError, ConfigError) as error:
        raise ConfigError(
            "data=cornell is not on this machine and could not be downloaded. Set data.dir=FOLDER with "
            "scaledata/ of scale_data.tar.gz in it, or the environment variable VDROP_DATA=FOLDER with "
            f"{NAME}/ in it, or put scaledata/ into {places.DOWNLOADS / NAME}. "
            f"Tried {URL}: {' '.join(str(error).split())[:200]}"
        ) from None
    return contents, f"{places.store(NAME, contents)} (downloaded from {URL})"


def check_sums(contents: dict[str, bytes], where: str) -> None:
    places.check_md5(contents, SUMS, where, "that of the Cornell scale dataset v1.0", "text_regression")
