"""Any data set of the Hugging Face Hub that has a text column and splits train, validation and test."""

from vdrop_cli.config import ConfigError, Data
from vdrop_cli.corpora.text import PARTS, Raw

SPLITS = {"train": "train", "valid": "validation", "test": "test"}


def sentences(data: Data) -> dict[str, list[str]]:
    """The lines of each part."""
    import datasets  # slow to import, so only where it is used
    from huggingface_hub import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # of what fails, the last word is enough
    datasets.disable_progress_bars()
    assert data.name is not None
    try:
        found = datasets.load_dataset(data.name, data.config, revision=data.revision)
    except Exception as error:  # the library raises what its many parts raise; the reason is in the message
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"data.name={data.name} cannot be loaded from the Hub ({reason[:300]})") from None
    lines = {}
    for part in PARTS:
        if SPLITS[part] not in found:
            raise ConfigError(
                f"data.name={data.name} has no split {SPLITS[part]}, only {', '.join(map(str, found))}; use data=text with files"
            )
        split = found[SPLITS[part]]
        if data.column not in split.column_names:
            raise ConfigError(f"data.column={data.column} is not a column of {data.name}; there are {', '.join(split.column_names)}")
        lines[part] = list(split[data.column])
    return lines


def read(data: Data) -> Raw:
    contents = {part: "".join(f"{line}\n" for line in lines).encode() for part, lines in sentences(data).items()}
    revision = f"@{data.revision}" if data.revision else ""
    return Raw(contents, f"Hub: {data.name}{revision}")
