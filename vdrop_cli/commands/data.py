"""`vdrop data`: the corpora, where they lie, what they hold, whether they are right."""

from vdrop_cli import corpora
from vdrop_cli.config import ConfigError, Data, ListData, Source
from vdrop_cli.corpora import Corpus, ptb

CHECKS = {Source.ptb: "MD5 of the three files, token counts and vocabulary agree with Mikolov's"}


def run(settings: ListData) -> None:
    if settings.data is not None:
        tell(settings.data.source, corpora.load(settings.data))
        return
    for data in (Data(Source.ptb), Data(Source.pydoc, min_count=2)):
        if data.source is Source.ptb and ptb.local(data) is None:
            looked = ", ".join(str(folder) for _, folder in ptb.places(data))
            print(f"ptb\n  not here (looked in {looked}); vdrop data data=ptb fetches it\n")
            continue
        try:
            tell(data.source, corpora.load(data))
        except ConfigError as error:
            print(f"{data.source}\n  {error}\n")
    print("text, hub\n  your own: data=text data.train=… data.valid=… data.test=…, data=hub data.name=… data.column=…")


def tell(source: Source, corpus: Corpus) -> None:
    print(f"{source}\n  from    {corpus.origin}")
    for part, stream_N in corpus.parts.items():
        print(f"  {part:<8}{len(stream_N):>9,} tokens")
    print(f"  types   {len(corpus.vocabulary):>9,}")
    print(f"  checks  {CHECKS.get(source, 'none known for this corpus')}")
    print(f"  content {corpus.fingerprint[:16]}\n")
