"""The Cornell scale dataset v1.0 (Pang & Lee 2005): film reviews of four authors, found locally, else
fetched; always verified.
"""

import http.client
import io
import tarfile
import urllib.request

from vdrop_cli.corpora import places
from vdrop_cli.corpora.rated import Rated, number
from vdrop_cli.corpora.text import read_file
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.train import Data

NAME = "cornell_scale"  # of its folder
AUTHORS = ("Dennis+Schwartz", "James+Berardinelli", "Scott+Renshaw", "Steve+Rhodes")
MD5 = {  # of the extracts and the ratings of each author
    "Dennis+Schwartz": ("bc613e29303723dcc4822ef860b8e785", "389da1f936c136c20688dbe4ad743386"),
    "James+Berardinelli": ("f3d64edccc4fc5ec4cbd1d44ba4847c2", "93ffa51e855baf405878e204eb973273"),
    "Scott+Renshaw": ("028e35c8f234ad9d5915560ea10a63eb", "ca289e96d19bbbe79667abf1331a1e01"),
    "Steve+Rhodes": ("209131c1e145db5e50765d9686e25fc9", "209482da452dc00ac35c9d90a0cc3243"),
}
SUMS = {
    f"scaledata/{a}/{kind}.{a}": md5
    for a, of in MD5.items()
    for kind, md5 in zip(("subj", "rating"), of, strict=True)
}
FILES = list(SUMS)
URL = "https://www.cs.cornell.edu/people/pabo/movie-review-data/scale_data.tar.gz"
URL_TIMEOUT = 30  # seconds without an answer
APART = '.,:;!?()"'  # what never hangs on a word in the data set
END = (
    "<end>"  # of a review; the authors' code, which splits on single spaces, leaves the line's end as a word
)


def read(data: Data) -> Rated:
    """All reviews, author by author; a review is what the data set calls an extract, a line of words that are
    apart already.
    """
    found = places.local(data, NAME, FILES)
    if found is None:
        contents, origin = fetch()
    else:
        setting, folder = found
        contents, origin = (
            {file: read_file(folder / file, f"{setting}: {folder / file}") for file in FILES},
            str(folder),
        )
        check_sums(contents, f"{setting}: {folder}/{{name}}")
    texts, ratings = [], []
    for author in AUTHORS:
        reviews, rated = (
            contents[f"scaledata/{author}/{kind}.{author}"].decode("latin-1") for kind in ("subj", "rating")
        )
        texts += [words(review) for review in reviews.splitlines()]
        ratings += [number(rating, f"rating.{author}") for rating in rated.split()]
    return Rated(texts, ratings, origin)


def words(text: str) -> list[str]:
    """Lower-cased, with the punctuation apart that is so in the data set, where all else stays as it stands
    («kids'», «$100»).
    """
    found = []
    for word in text.lower().split():
        core = word.strip(APART)
        before = len(word) - len(word.lstrip(APART)) if core else len(word)
        found += [*word[:before], *([core] if core else []), *word[before + len(core) :]]
    return [*found, END]


def fetch() -> tuple[dict[str, bytes], str]:
    """From the authors' page; what came is verified and kept below `data/`."""
    try:
        with tarfile.open(
            fileobj=io.BytesIO(urllib.request.urlopen(URL, timeout=URL_TIMEOUT).read())
        ) as archive:
            named = {
                member.name.removeprefix("./"): member for member in archive.getmembers() if member.isfile()
            }
            contents = {file: archive.extractfile(named[file]).read() for file in FILES}  # type: ignore[union-attr]
        check_sums(contents, f"{URL}: {{name}}")
    except (OSError, http.client.HTTPException, tarfile.TarError, EOFError, KeyError, ConfigError) as error:
        raise ConfigError(
            "data=cornell is not on this machine and could not be fetched. Ways out: data.dir=FOLDER with "
            "scaledata/ of scale_data.tar.gz "
            f"in it; the environment variable VDROP_DATA=FOLDER with {NAME}/ in it; the same in "
            f"{places.DOWNLOADS / NAME}. "
            f"Tried {URL}: {' '.join(str(error).split())[:200]}"
        ) from None
    return contents, f"{places.keep(NAME, contents)} (fetched from {URL})"


def check_sums(contents: dict[str, bytes], where: str) -> None:
    places.check_md5(contents, SUMS, where, "that of the Cornell scale dataset v1.0", "text_regression")
