"""The settings of each corpus."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from vdrop_cli.errors import require
from vdrop_cli.settings.choices import CorpusName
from vdrop_cli.settings.fields import POSITIVE, FilePath, Limits, require_limits, setting
from vdrop_cli.settings.variants import Variants, selector

HUB_NAME_HELP = 'the data set, "owner/name", or a local folder that `datasets` can load'
FRACTION = Limits(above=0, at_most=1)


@dataclass
class Data:
    """What all corpora share."""

    source: CorpusName = setting(MISSING, "the corpus; data=… selects it")

    def __post_init__(self) -> None:
        require_limits(self, "data.")


@dataclass
class LocalData(Data):
    """A known corpus, which is downloaded unless a folder has it."""

    dir: str | None = setting(
        None,
        "folder of its files; null: that of the environment variable VDROP_DATA, else data/ of the working "
        "folder, else a download",
        limits=FilePath(),
    )


@dataclass
class HubData(Data):
    """A data set of the Hugging Face Hub."""

    name: str | None = setting(None, HUB_NAME_HELP, limits=FilePath())
    config: str | None = setting(None, "one of the data set's configurations")
    revision: str | None = setting(None, "branch, tag or commit of the data set")
    column: str = setting(MISSING, "the column with the text")


@dataclass
class TextData(Data):
    """A text for a language model."""

    fraction: float = setting(
        1.0,
        "share of the training part that is used, its first tokens; the vocabulary stays that of the whole "
        "part",
        limits=FRACTION,
    )
    cache: str | None = setting(
        "data/cache",
        "folder of encoded corpora, which are looked up by content; null: no cache",
        limits=FilePath(),
    )


@dataclass
class CountedText(TextData):
    """A text whose rare words are <unk>."""

    min_count: int = setting(1, "words that occur less often in the training part are <unk>", limits=POSITIVE)


@dataclass
class RatedData(Data):
    """Texts with a number each."""

    fraction: float = setting(
        1.0,
        "share of the training part that is used, texts drawn by task.split_seed; the vocabulary stays that "
        "of the whole part",
        limits=FRACTION,
    )
    min_count: int = setting(
        1,
        "words that occur less often in the training part (task.protocol=paper: in all parts) are <unknown>",
        limits=POSITIVE,
    )
    vocabulary_size: int | None = setting(
        None, "size of the vocabulary, the most frequent words; null: all", "words", POSITIVE
    )


@dataclass
class PennTreebank(LocalData, TextData):
    source: CorpusName = selector(CorpusName.ptb, "Penn Treebank: ptb.{train,valid,test}.txt")


@dataclass
class PythonTopics(CountedText):
    source: CorpusName = selector(CorpusName.pydoc, "the help topics of the Python standard library")


@dataclass
class TextFiles(CountedText):
    source: CorpusName = selector(CorpusName.text, "text files of your own")
    train: str = setting(MISSING, "file to train on", limits=FilePath())
    valid: str = setting(MISSING, "file to validate on", limits=FilePath())
    test: str = setting(MISSING, "file to test on", limits=FilePath())


@dataclass
class HubText(HubData, CountedText):
    source: CorpusName = selector(CorpusName.hub, "a text column of a data set of the Hugging Face Hub")
    name: str = setting(MISSING, HUB_NAME_HELP, limits=FilePath())


@dataclass
class CornellReviews(LocalData, RatedData):
    source: CorpusName = selector(CorpusName.cornell, "the Cornell scale dataset: scaledata/ with its files")


@dataclass
class VaderSnippets(LocalData, RatedData):
    source: CorpusName = selector(
        CorpusName.vader, "rated film review snippets: movieReviewSnippets_GroundTruth.txt"
    )


@dataclass
class RatedTable(HubData, RatedData):
    source: CorpusName = selector(
        CorpusName.text_regression, "two columns of a CSV file or of a data set of the Hugging Face Hub"
    )
    csv: str | None = setting(
        None, "a CSV file with column names in its first line; or data.name", limits=FilePath()
    )
    delimiter: str | None = setting(
        None, "with data.csv: the character between columns, or tab; null: a comma, or a tab in a .tsv file"
    )
    rating_column: str = setting(MISSING, "the column with the number to predict")

    def __post_init__(self) -> None:
        """Checks the settings, and replaces the delimiter `tab` by the sign."""
        super().__post_init__()
        got = "both" if self.csv else "neither"
        require(
            bool(self.csv) != bool(self.name), "data.csv", "set with data=text_regression, or data.name", got
        )
        require(
            self.column != self.rating_column,
            "data.rating_column",
            "another column than data.column",
            self.rating_column,
        )
        require(
            self.delimiter is None or self.csv is not None,
            "data.delimiter",
            "null without data.csv",
            self.delimiter,
        )
        self.delimiter = delimiter_sign("data.delimiter", self.delimiter)
        for key in ("config", "revision"):
            value = getattr(self, key)
            require(value is None or self.csv is None, f"data.{key}", "null with data.csv", value)


CORPORA: Variants[Data] = Variants(
    "data",
    "source",
    {
        kind.source: kind
        for kind in (
            PennTreebank,
            PythonTopics,
            TextFiles,
            HubText,
            CornellReviews,
            VaderSnippets,
            RatedTable,
        )
    },
)
AnyData: Any = CORPORA.schema
RATED = [source for source, kind in CORPORA.kinds.items() if issubclass(kind, RatedData)]


def delimiter_sign(key: str, delimiter: str | None) -> str | None:
    """Returns the character between columns, for `tab` the sign. Raises ConfigError if it cannot be one."""
    delimiter = "\t" if delimiter in ("tab", "\\t") else delimiter
    require(
        delimiter is None or (len(delimiter) == 1 and delimiter not in '"\r\n'),
        key,
        "one character that is no quotation mark or line end, or tab",
        repr(delimiter),
    )
    return delimiter
