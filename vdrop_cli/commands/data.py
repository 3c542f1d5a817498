"""`vdrop data`: the corpora, where they lie, what they hold, whether they are right."""

from collections import Counter
from statistics import fmean, pstdev

from vdrop_cli import corpora
from vdrop_cli.corpora import cornell, places, ptb, vader
from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.choices import CorpusName
from vdrop_cli.settings.commands import ListData
from vdrop_cli.settings.data import (
    CornellReviews,
    Data,
    LocalData,
    PennTreebank,
    PythonTopics,
    RatedData,
    TextData,
    VaderSnippets,
)

CHECKS = {
    CorpusName.ptb: "MD5 of the three files, token counts and vocabulary agree with Mikolov's",
    CorpusName.cornell: "MD5 of the eight files agree with the authors'",
    CorpusName.vader: "SHA-256 of the file agrees with the package's",
}
FETCHED = {
    CorpusName.ptb: (ptb.NAME, ptb.FILES),
    CorpusName.cornell: (cornell.NAME, cornell.FILES),
    CorpusName.vader: (vader.NAME, [vader.FILE]),
}


def run(settings: ListData) -> None:
    if settings.data is not None:
        print_data(settings.data)
        return
    unusable = list[str]()
    for data in (PennTreebank(), PythonTopics(min_count=2), CornellReviews(), VaderSnippets()):
        name, files = FETCHED.get(data.source, ("", []))
        if isinstance(data, LocalData) and places.local(data, name, files) is None:
            looked = ", ".join(str(folder) for _, folder in places.candidate_folders(data, name))
            print(
                f"{data.source}\n  not here (looked in {looked}); vdrop data data={data.source} fetches it\n"
            )
            continue
        try:
            print_data(data)
        except ConfigError as error:
            print(f"{data.source}\n  {error}\n")
            unusable.append(f"{data.source} cannot be used: {error}")
    print("text, hub, text_regression\n  your own; vdrop data --help shows how to name them")
    if unusable:
        raise ConfigError("; ".join(unusable))


def print_data(data: Data) -> None:
    match data:
        case RatedData():
            lines = rated(data)
        case TextData():
            lines = streams(data)
        case _:
            raise TypeError(data)
    print("\n".join([str(data.source), *(f"  {line}" for line in lines)]))
    print(f"  checks  {CHECKS.get(data.source, 'none known for this corpus')}\n")


def streams(data: TextData) -> list[str]:
    """Returns lines about a corpus for language models: source, tokens of each part, types."""
    corpus = corpora.load_text(data)
    counts = [
        f"{part:<8}{len(stream_N):>9,} tokens, {100 * corpora.unknown_share(stream_N, corpus):.2f} % <unk>"
        for part, stream_N in corpus.parts.items()
    ]
    return [
        f"from    {corpus.origin}",
        *counts,
        f"types   {len(corpus.vocabulary):>9,}",
        f"content {corpus.fingerprint[:16]}",
    ]


def rated(data: RatedData) -> list[str]:
    """Returns lines about texts with ratings: source, counts, and mean and spread of the ratings."""
    corpus = corpora.load_rated(data)
    parts = ", ".join(f"{count:,} {part}" for part, count in Counter(corpus.parts).items())
    return [
        f"from    {corpus.origin}",
        f"texts   {len(corpus.texts):>9,}{f' ({parts})' if parts else ''}",
        f"words   {sum(map(len, corpus.texts)):>9,}",
        f"types   {len({word for text in corpus.texts for word in text}):>9,}",
        f"ratings {min(corpus.ratings):g} to {max(corpus.ratings):g}, mean {fmean(corpus.ratings):.3f}, "
        f"standard deviation {pstdev(corpus.ratings):.3f}",
        f"content {corpus.fingerprint[:16]}",
    ]
