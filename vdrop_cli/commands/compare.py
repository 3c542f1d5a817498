"""`vdrop compare RUN RUN …`: results of runs, settings that differ, learning curves."""

import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from vdrop_cli import comparison, files, outcomes, output, ownership, pictures, runs, text_tables
from vdrop_cli.comparison import Configuration
from vdrop_cli.errors import ConfigError
from vdrop_cli.run_files import CONFIG
from vdrop_cli.runs import Finished, Unfinished
from vdrop_cli.settings.commands import Compare


def run(settings: Compare) -> None:
    written = [(settings.csv, comparison.is_csv), (settings.markdown, comparison.is_markdown)]
    for name, is_own in written:
        if name is not None:
            ownership.require_own(Path(name), is_own, "choose another file")
    if settings.picture is not None:
        pictures.require_writable(Path(settings.picture))
    chosen = list(selected(settings))
    configurations, messages = comparison.grouped(chosen)
    for message in [*messages, *notes(chosen)]:
        print(f"vdrop: {message}", file=sys.stderr)
    if not any(one.finished for one in configurations):
        raise ConfigError("none of these runs is finished; give the same vdrop train command again to resume")
    write(settings, configurations)
    with output.stdout_errors_deferred():
        print_tables(configurations)


def selected(settings: Compare) -> Iterator[Finished | Unfinished]:
    """The runs that the settings name, without those that lack a tag."""
    names = settings.runs or [str(Path(settings.outputs) / "train")]
    count = 0
    for folder in dict.fromkeys(folder for name in names for folder in run_folders(Path(name))):
        one = runs.read_any(folder)
        if set(settings.tags) <= set(one.train.tags):
            count += 1
            yield one
    if not count:
        raise ConfigError(f"tags: no run below {', '.join(names)} has {', '.join(settings.tags)}")


def run_folders(folder: Path) -> Iterable[Path]:
    """A run folder itself, the run folders of a sweep, or those below any other folder."""
    if runs.is_run(folder):
        return [folder]
    if (folder / outcomes.SUMMARY).exists() or outcomes.paths(folder):
        chosen = [
            run_folder
            for outcome in outcomes.read_all(folder)
            if outcome.folder
            # a job that was refused, or has just begun, names a folder that may not exist
            if runs.is_run(run_folder := outcomes.run_folder(folder, outcome)) or outcome.is_done
        ]
        if not chosen:
            raise ConfigError(
                f"{folder} names no run folders; name the folders of its runs below outputs/train"
            )
        return chosen
    below = runs.folders_with(folder, CONFIG)
    if not below:
        raise ConfigError(f"{folder} is not a run folder and holds none; name folders below outputs/train")
    return below


def notes(chosen: Iterable[Finished | Unfinished]) -> Iterator[str]:
    """Yields messages about single runs: which are not finished, and warnings about texts."""
    for one in chosen:
        if isinstance(one, Unfinished):
            yield f"{one.folder} is {one.state}"
        else:
            yield from (f"{one.folder}: {warning}" for warning in one.result.get("warnings", []))


def write(settings: Compare, configurations: list[Configuration]) -> None:
    """Writes the files that the settings ask for."""
    for key, make in (("csv", comparison.as_csv), ("markdown", comparison.as_markdown)):
        if (name := getattr(settings, key)) is not None:
            files.write_output(Path(name), make(configurations).encode(), key)
    if settings.picture is not None:
        curves = {one.label: one.finished for one in configurations if one.finished}
        pictures.save(pictures.curves(curves, settings.title), Path(settings.picture))


def print_tables(configurations: list[Configuration]) -> None:
    columns = shutil.get_terminal_size().columns
    tables = [comparison.result_rows(configurations), comparison.setting_rows(configurations)]
    blocks = ["\n".join(text_tables.fitted(rows, columns)) for rows in tables if rows]
    print("\n\n".join(blocks))
