"""How a checkpoint is evaluated, and the file that holds its results: `eval-<epoch>-<how>.json`."""

import hashlib
import math
import re
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vdrop_cli import files, stored
from vdrop_cli.errors import ConfigError
from vdrop_cli.files import Damaged
from vdrop_cli.run_files import EVALUATION_PREFIX_PATTERN, parse_checkpoint
from vdrop_cli.settings.choices import Precision

# The part of a file's name after the checkpoint says how it was evaluated: with dropout off, with MC samples,
# or as an average of runs, each of them with dropout off or with MC samples.
SCALED = r"-scaled_(?P<scaled>[-+.\de]+(?:_[-+.\de]+)*)"  # factors on dropout probabilities
MC = rf"mc(?P<samples>\d+)(?P<words>-word|-no_word)?-s(?P<seed>\d+)(?:{SCALED})?"
MEMBER = "member_"  # prefix of the groups in the regular expression that describe each member
MEMBER_MC = MC.replace("?P<", f"?P<{MEMBER}")
HOW = (
    rf"(?:standard|(?P<tempered>tempered)|{MC}|ensemble(?P<members>\d+)-(?P<digest>[0-9a-f]{{8}})(?:-{MEMBER_MC})?)"
    r"(?:-file_(?P<text>[0-9a-f]{8}))?(?:-(?P<precision>fp32|bf16))?"
)
PATTERN = re.sub(r"\?P<\w+>", "?:", HOW)  # without named groups, for use in other patterns
WORDS = {None: "", True: "-word", False: "-no_word"}


def factor_name(factor: float) -> str:
    """Returns a factor on dropout probabilities as `Evaluation.scaled` has it: no other factor has this
    name.
    """
    short = f"{factor:g}"
    return short if float(short) == factor else repr(factor)


@dataclass(frozen=True)
class Evaluation:
    """How a checkpoint is evaluated: by default with dropout off, alone, in the precision of its training."""

    samples: int = 0  # MC samples, of each member
    members: int = 1  # runs whose probabilities or ratings are averaged
    seed: int | None = None  # of the samples' masks; None: any
    word_dropout: bool | None = None  # None: the task decides
    precision: Precision | None = None  # None: that of the training
    tempered: bool = False  # at the temperature that is the best on the validation text
    text_digest: str = ""  # eight hex digits that name another text than the test part
    scaled: str = ""  # factors on dropout probabilities, as `0.5_1`; the best on validation is used

    def stem(self, checkpoint: str, digest: str = "") -> str:
        """Returns the name of its file without the suffix.

        `checkpoint` is the stem of the checkpoint's name, `digest` eight hex digits that name the members.
        """
        how = [f"ensemble{self.members}-{digest}"] if self.members > 1 else []
        if self.samples:
            scaled = f"-scaled_{self.scaled}" if self.scaled else ""
            how.append(f"mc{self.samples}{WORDS[self.word_dropout]}-s{self.seed}{scaled}")
        how += ["tempered"] if self.tempered else []
        how = how or ["standard"]
        how += [f"file_{self.text_digest}"] if self.text_digest else []
        how += [] if self.precision is None else [str(self.precision)]
        return "-".join([checkpoint.replace("checkpoint", "eval"), *how])

    def includes(self, other: "Evaluation") -> bool:
        """Whether another evaluation is this one, with any seed where this one names none."""
        return replace(self, seed=None) == replace(other, seed=None) and self.seed in (None, other.seed)


def from_file(path: Path, checkpoint: str | None = None) -> Evaluation | None:
    """Returns how a file's results were made, by its name; None where the name is not one of an evaluation.

    `checkpoint` is the stem of the checkpoint's name; None: any that training writes.
    """
    prefix = (
        EVALUATION_PREFIX_PATTERN
        if checkpoint is None
        else re.escape(f"{checkpoint.replace('checkpoint', 'eval')}-")
    )
    match = re.fullmatch(rf"{prefix}{HOW}\.json", path.name, re.ASCII)
    if match is None:
        return None
    samples, words, seed = (match[name] or match[f"{MEMBER}{name}"] for name in ("samples", "words", "seed"))
    return Evaluation(
        samples=int(samples or 0),
        members=int(match["members"] or 1),
        seed=None if seed is None else int(seed),
        word_dropout=next(value for value, name in WORDS.items() if name == (words or "")),
        precision=None if match["precision"] is None else Precision[match["precision"]],
        tempered=match["tempered"] is not None,
        text_digest=match["text"] or "",
        scaled=match["scaled"] or "",
    )


def members_digest(names: Iterable[str]) -> str:
    """Returns eight hex digits that name the models that are evaluated together, in any order."""
    together = "".join(sorted(names))
    return hashlib.sha256(together.encode()).hexdigest()[:8]


def checksum_of(path: Path) -> str:
    """Returns the checksum at the end of a checkpoint; an empty text where there is no such file."""
    try:
        return files.checksum(path)
    except (OSError, Damaged):
        return ""


def same_kind(path: Path) -> str:
    """Returns the part of a file's name that says how the evaluation was made, without the epoch."""
    return re.sub(f"^{EVALUATION_PREFIX_PATTERN}", "", path.stem, flags=re.ASCII)


FIELDS: dict[str, type] = {  # types of fields that a file may lack
    "mc": list,
    "members": list,
    "checksums": list,
    "models": list,
    "environment": dict,
    "tables": dict,
    "conformal_scores": list,
    "file": dict,
}


def read(path: Path) -> dict[str, Any]:
    """Returns the results that `vdrop eval` wrote. Raises ConfigError where the file cannot be read."""
    with files.reading(path, "delete it and give the same vdrop eval command again"):
        return parse(files.read(path, stored.JSON_LIMIT))


def parse(content: bytes) -> dict[str, Any]:
    """Returns the results in the content of a file. Raises Damaged."""
    results = stored.parse_json(content)
    stored.require_types(
        results, {"metrics": dict} | {name: kind for name, kind in FIELDS.items() if name in results}
    )
    stored.require_types(results["metrics"], dict.fromkeys(results["metrics"], float))
    for row in results.get("mc", ()):
        if not isinstance(row, dict):
            raise Damaged("mc must be a list of objects")
        stored.require_types(row, {"samples": int})
        if not all(value is None or stored.is_finite(value) for value in row.values()):
            raise Damaged("mc must hold numbers")
    for name, rows in results.get("tables", {}).items():
        if not isinstance(rows, list) or not rows or not all(map(is_row, rows)):
            raise Damaged(f"tables.{name} must be a list of objects with numbers and texts")
        if any(row.keys() != rows[0].keys() for row in rows):
            raise Damaged(f"tables.{name} must have the same columns in all rows")
    if not all(isinstance(member, str) for member in results.get("members", ())):
        raise Damaged("members must be a list of texts")
    scores = results.get("conformal_scores", [])
    if not all(type(score) is float and stored.is_finite(score) for score in scores) or scores != sorted(
        scores
    ):
        raise Damaged("conformal_scores must be finite numbers, ascending")
    return results


def is_row(row: object) -> bool:
    """Whether a row of a table has columns of numbers, texts and missing values alone."""
    return (
        isinstance(row, dict)
        and bool(row)
        and all(value is None or isinstance(value, str) or stored.is_finite(value) for value in row.values())
    )


def require_fields(results: dict[str, Any], path: Path, *names: str) -> None:
    """Raises ConfigError where a result or an evaluation lacks one of these."""
    for name in names:
        if name not in results:
            raise ConfigError(
                f"{path} is damaged ({name} is missing); delete it and give the same command again"
            )


# what calibration=true adds to an evaluation
NEXT_WORD = re.compile(r"(?:test|file)_(?:entropy|accuracy|ece|mutual_information)(?:_mc\d+)?")
NEXT_WORD_TABLES = ("reliability", "positions", "frequencies")
ROUNDING = 1e-4  # relative; metrics of one checkpoint differ less between back ends, batches and machines


def add_earlier_calibration(results: dict[str, Any], target: Path) -> None:
    """Copies the calibration of an earlier evaluation from the file that is about to be replaced.

    It is copied only if the other metrics of both evaluations agree up to rounding. Otherwise a message says
    that it is removed.
    """
    try:
        earlier = parse(files.read(target, stored.JSON_LIMIT))
    except (OSError, Damaged):
        return
    measured = {name: value for name, value in earlier["metrics"].items() if NEXT_WORD.fullmatch(name)}
    if not measured:
        return
    metrics = results["metrics"]
    others = {name: value for name, value in earlier["metrics"].items() if name not in measured}
    if others.keys() != metrics.keys() or not all(
        math.isclose(value, metrics[name], rel_tol=ROUNDING) for name, value in others.items()
    ):
        print(
            f"vdrop: the calibration in {target} is of other numbers and was removed; calibration=true "
            "measures it again",
            file=sys.stderr,
        )
        return
    results["metrics"] = metrics | measured
    results["tables"] = {
        name: rows
        for name, rows in earlier.get("tables", {}).items()
        if name.removesuffix("_mc") in NEXT_WORD_TABLES
    }


def are_seeds_of_one_run(members: list[str], seeds: Collection[int]) -> bool:
    """Whether these paths are of checkpoints at ends of epochs, of runs that differ only in these seeds."""
    progress = [parse_checkpoint(Path(member).name) for member in members]
    if not all(one is not None and one[1] == 0 for one in progress):
        return False
    folders = [Path(member).parent.name for member in members]
    settings = folders[0].rpartition("-s")[0]
    return sorted(folders) == sorted(f"{settings}-s{seed}" for seed in seeds)
