"""Rewrites messages of Hydra and OmegaConf as one line that names the setting and says what to do."""

import re

from hydra.errors import MissingConfigException

from vdrop_cli.arguments import ALIASES, SWEEP_ADVICE, choices, groups
from vdrop_cli.errors import nearest
from vdrop_cli.settings.commands import CHOSEN_BY_REPRODUCE, ROOTS
from vdrop_cli.settings.fields import keys, suggestion

EXTRAS = {
    "hydra/launcher=joblib": "parallel",
    "hydra/launcher=submitit_slurm": "slurm",
    "hydra/launcher=submitit_local": "slurm",
}


def explain(error: BaseException, command: str) -> str:
    """One line that names the setting and what to do."""
    message = str(error).strip()
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        if extra := EXTRAS.get(f"{group}={choice}"):
            return f"{group}={choice} is not installed; pip install 'vdrop[{extra}]'"
        if match := re.fullmatch(r"data/(.*[./].*)", error.missing_cfg_file):
            return (
                f"data={match[1]} is an unknown choice; a text of your own is data=text data.train=… "
                "data.valid=… data.test=…"
            )
        own = " (a dropout of your own needs one of these beside it)" if group == "schedule" else ""
        return f"{group}={choice} is an unknown choice{nearest(choice, list(error.options or []))}{own}"
    if message.startswith("Config group override must be"):
        return (
            f"a group takes the name of a choice, not null or a number; vdrop {command} --help lists "
            "groups and choices"
        )
    if message.startswith("Unexpected type for root"):
        return "data.… needs a corpus to belong to; choose it too: vdrop data data=ptb data.dir=…"
    if match := re.match(
        r"Ambiguous value for argument '(.+?)'\n|Sweep parameters '(.+?)' requires", message, re.DOTALL
    ):
        return f"{match[1] or match[2]}: several values are a sweep; {SWEEP_ADVICE}"
    if match := re.match(r"Error parsing override '([\w.-]+)'", message):
        return f"{match[1]} is not key=value{value_hint(match[1], command)}"
    if match := re.match(r"Could not override '([^']+)'", message):
        return f"{match[1]} is not a setting{setting_hint(match[1], command)}"
    if match := re.match(r"Error merging override (\S+)", message):
        reason = value_error(str(error.__cause__))
        if reason.startswith("must be"):
            return f"{match[1].partition('=')[0]} {reason}"
        return f"{match[1]}: {reason}"
    message = message.removeprefix("ConfigError raised while resolving interpolation: ")
    full_key = getattr(error, "full_key", None)
    return f"{full_key}: {join_lines(message)}" if full_key else join_lines(message)


def setting_hint(key: str, command: str) -> str:
    """Returns a hint for a setting that the command does not have, to be appended to a message."""
    trained = ALIASES["train"].get(key, key)
    if command != "train" and trained in keys(ROOTS["train"]):
        advice = ""
        if trained in CHOSEN_BY_REPRODUCE:
            advice = f"; {CHOSEN_BY_REPRODUCE[trained]}" if command == "reproduce" else ""
        elif trained != "debug" and "overrides" in keys(ROOTS[command]):
            advice = f"; here, overrides='{trained}=…' sets it"
        return f" of vdrop {command}; vdrop train has {trained}{advice}"
    hint = suggestion(key, [*keys(ROOTS[command]), *groups(command)], ALIASES.get(command))
    return hint or f"; vdrop {command} --help lists the settings"


def value_hint(word: str, command: str) -> str:
    """Returns a hint for a word without `=`, such as the name of a choice, to be appended to a message."""
    if word in (*keys(ROOTS[command]), *ALIASES.get(command, ())):
        return f"; give it a value: {word}=…"
    meant = [f"{group}={word}" for group in groups(command) if word in choices(group)]
    return (
        f"; did you mean {' or '.join(meant)}?" if meant else f"; vdrop {command} --help shows the settings"
    )


KINDS_OF_VALUES = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}


def value_error(message: str) -> str:
    """Returns the first line of OmegaConf's message about a value, with the type in words."""
    match = re.match(
        r"Value '(.*)' (?:of type '\w+' could not be converted to|is not a valid) (\w+)", message
    )
    if match is None or match[2] not in KINDS_OF_VALUES:
        return join_lines(message)
    return f"must be {KINDS_OF_VALUES[match[2]]}, got {match[1]}"


def join_lines(message: str) -> str:
    lines = [
        line.strip()
        for line in message.splitlines()
        if line.strip() and not re.match(r"\s*(full_key|object_type|reference_type|See http)", line)
    ]
    return "; ".join(lines)
