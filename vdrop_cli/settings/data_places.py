"""Where the corpus of a checkpoint lies: settings for it, and the data settings that follow from them."""

import dataclasses
from dataclasses import dataclass

from vdrop_cli.errors import ConfigError
from vdrop_cli.settings.data import CORPORA, Data, RatedTable, TextData
from vdrop_cli.settings.fields import FilePath, require_limits, setting


@dataclass
class DataPlaces:
    """Where the corpus of a checkpoint lies. Places that the checkpoint names are used only with
    `stored_data`.
    """

    dir: str | None = setting(None, "ptb, cornell, vader: folder of the corpus", limits=FilePath())
    train: str | None = setting(None, "text: the training file", limits=FilePath())
    valid: str | None = setting(None, "text: the validation file", limits=FilePath())
    test: str | None = setting(None, "text: the test file", limits=FilePath())
    csv: str | None = setting(None, "text_regression: the CSV file", limits=FilePath())
    name: str | None = setting(None, "hub, text_regression: the data set", limits=FilePath())

    def __post_init__(self) -> None:
        require_limits(self, "data.")


def stored_places(data: Data) -> dict[str, str]:
    """The settings of a training run's data that name files, folders and data sets."""
    values = {f.name: getattr(data, f.name, None) for f in dataclasses.fields(DataPlaces)}
    return {name: value for name, value in values.items() if value is not None}


def data_for(trained: Data, places: DataPlaces, stored_data: bool, where: str, otherwise: str) -> Data:
    """The data of a checkpoint, read from `places`. Places that a checkpoint names are used only if
    `stored_data` allows that.

    `where` and `otherwise` are for the message: the checkpoint, and the alternative to naming the places.
    """
    changes = {name: value for name, value in vars(places).items() if value is not None}
    for one, other in (("csv", "name"), ("name", "csv")):
        if one in changes and isinstance(trained, RatedTable):
            changes.setdefault(other, None)
    if changes.get("csv"):
        changes |= {"config": None, "revision": None}
    elif changes.get("name"):
        changes |= {"delimiter": None}
    used = {name: value for name, value in stored_places(trained).items() if name not in changes}
    if used and not stored_data:
        names = " ".join(f"data.{name}=…" for name in used)
        named = ", ".join(f"data.{name}={value!r}" for name, value in used.items())
        raise ConfigError(
            f"{where} names its own data, {named}, which is used only if asked for; give {names}, or "
            f"{otherwise}"
        )
    if isinstance(trained, TextData) and trained.cache is not None:
        changes["cache"] = TextData.cache
    return CORPORA.changed(trained, changes)
