"""The Cornell reviews: the real files, and every way of not having them."""

import shutil
import tarfile
from pathlib import Path

import pytest

from vdrop_cli import corpora
from vdrop_cli.corpora import cornell
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.data import CornellReviews


@pytest.fixture(autouse=True)
def nowhere(elsewhere: Path) -> None:
    pass


@pytest.fixture
def reviews(real_data: Path) -> Path:
    return real_data / cornell.NAME


def test_the_real_files_have_the_known_counts(reviews: Path) -> None:
    rated = corpora.load_rated(CornellReviews(dir=str(reviews)))
    assert len(rated.texts) == len(rated.ratings) == 1027 + 1307 + 902 + 1770
    assert sum(map(len, rated.texts)) == 2_148_164 + 5_006, "and the end of each"
    assert {text[-1] for text in rated.texts} == {"<end>"} and not rated.parts
    assert (min(rated.ratings), max(rated.ratings), rated.ratings[0], rated.ratings[-1]) == (0, 1, 0.1, 0.9)
    assert rated.texts[0][:8] == ["in", "my", "opinion", ",", "a", "movie", "reviewer's", "most"]


def test_a_text_from_elsewhere_is_read_as_the_reviews_are(reviews: Path) -> None:
    """Those of them are read as they stand, every one."""
    rated = corpora.load_rated(CornellReviews(dir=str(reviews)))
    for text in rated.texts:
        assert cornell.words(" ".join(text[:-1])) == text


def test_punctuation_of_a_typed_text_is_separated_as_in_the_reviews() -> None:
    typed = corpora.split_words("cornell", 'A fine, "moving" film (of the kids\' own)... $100!')
    assert " ".join(typed) == 'a fine , " moving " film ( of the kids\' own ) . . . $100 ! <end>'


def test_a_changed_file_is_named(reviews: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(reviews, folder, copy_function=shutil.copyfile)
    with (folder / "scaledata/Scott+Renshaw/rating.Scott+Renshaw").open("a") as file:
        file.write("0.5\n")
    with pytest.raises(
        ConfigError,
        match=r"^data\.dir: .*/rating\.Scott\+Renshaw is not that of the Cornell .*: MD5 .*, expected "
        r"ca289e96",
    ):
        cornell.read(CornellReviews(dir=str(folder)))


def test_the_archive_is_fetched_verified_and_stored(
    reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(tmp_path / "scale_data.tar.gz", "w:gz") as archive:
        archive.add(reviews / "scaledata", "scaledata")
    monkeypatch.setattr(cornell, "URL", (tmp_path / "scale_data.tar.gz").as_uri())
    first = cornell.read(CornellReviews())
    assert "downloaded from file:" in first.origin
    monkeypatch.setattr(cornell, "URL", "http://127.0.0.1:1/")
    again = cornell.read(CornellReviews())  # from data/cornell_scale
    assert again.origin == "data/cornell_scale" and again.fingerprint == first.fingerprint


@pytest.mark.parametrize("content", [b"", b"<html>gone</html>", "an archive of something else"])
def test_when_it_cannot_be_fetched_the_ways_out_are_listed(
    content: bytes | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "scale_data.tar.gz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        (tmp_path / "readme").write_text(content)
        with tarfile.open(path, "w:gz") as archive:
            archive.add(tmp_path / "readme", "scaledata/readme")
    monkeypatch.setattr(cornell, "URL", path.as_uri())
    with pytest.raises(ConfigError) as caught:
        cornell.read(CornellReviews())
    for way in ("data.dir=", "VDROP_DATA=", "data/cornell_scale", "Tried file:"):
        assert way in str(caught.value)
    assert not Path("data").exists()
