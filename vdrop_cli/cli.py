"""`vdrop COMMAND key=value …`: one Hydra application for each command."""

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from vdrop_cli import CONF, output
from vdrop_cli.command_examples import EXAMPLES

COMMANDS = {
    "train": "train a model; the same command again resumes, or says that it is done",
    "eval": "perplexity or error of a checkpoint: standard approximation, and MC dropout",
    "predict": "predict a rating, or the surprisal of each word, or sample words from a model",
    "data": "the corpora: where they lie, what they hold, whether they are right",
    "export": "a checkpoint as a safetensors file, or as a folder to share, with a model card",
    "bench": "how fast the cells are, beside torch.nn.LSTM and the machine's limit",
    "table": "what was measured beside what was published: RESULTS.md, pictures",
    "reproduce": "run or resume the rows of a study of the paper, evaluate them, and write RESULTS.md",
    "compare": "runs side by side: their results over seeds, settings that differ, curves",
    "completion": "print the completion script for bash",
}
ELSEWHERE = {  # names that other programs use: the command of vdrop
    "evaluate": "eval",
    "fit": "train",
    "generate": "predict sample=50",
    "plot": "compare RUN picture=curves.png",
    "run": "train",
    "sample": "predict sample=50",
    "test": "eval",
}

HELP = f"""vdrop: dropout in LSTM and GRU as in Gal & Ghahramani (2016)

usage: vdrop COMMAND [key=value …]

{"".join(f"  {name:<12}{what}{chr(10)}" for name, what in COMMANDS.items())}
examples:
  vdrop train model=lstm_large dropout=variational
  vdrop train -m model=lstm_small dropout=none,naive,variational seed=1,2,3
  vdrop eval checkpoint=outputs/train/… mc_samples=100
  vdrop COMMAND --help          its groups, settings and examples
  vdrop help schedule.lr        the meaning, unit, limits and default of a setting
  eval "$(vdrop completion)"    complete commands, groups and keys in this bash
"""

INTERRUPTED = 130  # the exit code after Ctrl-C
CONFIGS = ("job", "hydra", "all")
INFOS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
FLAGS = ("-m", "--multirun", "--resolve", "-h", "--help", "--hydra-help")
CHOICES = {"-c": CONFIGS, "--cfg": CONFIGS, "-i": INFOS, "--info": INFOS}  # options with a choice
FOLDERS = ("-cd", "--config-dir")  # options with a path
HYDRA_OPTIONS = (*FLAGS, *CHOICES, *FOLDERS)

COMPLETION = """_vdrop() {
    mapfile -t COMPREPLY < <(COMP_LINE="$COMP_LINE" COMP_POINT="$COMP_POINT" \\
        vdrop completion query 2>/dev/null)
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _vdrop vdrop
"""


def fail(message: str) -> NoReturn:
    """Prints a mistake of the user's as one line, and exits with code 2."""
    print(f"vdrop: {' '.join(message.split())}", file=sys.stderr)  # one line, whatever the user typed
    sys.exit(2)


def main() -> None:
    output.prepare()
    try:
        code: object = exit_code()
    except SystemExit as stop:
        code = stop.code
    lost = output.finish()
    if code or lost:
        sys.exit(code or lost)  # type: ignore[arg-type]


def exit_code() -> int:
    """Runs what was typed and returns the exit code."""
    try:
        dispatch()
    except KeyboardInterrupt:
        print("vdrop: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if not output.is_stdout_error(error):
            raise
    return 0


def dispatch() -> None:
    command, arguments = command_of(sys.argv[1:])
    if command is None and arguments and arguments[0] not in ("-h", "--help", "--version"):
        fail(f"{arguments[0]} has no command; vdrop --help lists the commands")
    elif command is None and "--version" in arguments:
        from vdrop_cli import __version__

        print(f"vdrop {__version__}")
    elif command == "help" and arguments and arguments[0] not in ("-h", "--help"):
        print_help(arguments[0])
    elif command in (None, "help"):
        print(HELP, end="")
    elif command == "completion" and arguments == ["query"]:
        from vdrop_cli import completion

        completion.answer(COMMANDS, list(HYDRA_OPTIONS))
    elif command == "completion":
        print(COMPLETION, end="")
    elif command in COMMANDS:
        run(command, arguments)
    else:
        fail_unknown(command)


def fail_unknown(command: str) -> NoReturn:
    """Prints which command was probably meant, and exits with code 2."""
    from vdrop_cli.errors import nearest

    if command in ELSEWHERE:
        fail(f"{command} is not a command; use vdrop {ELSEWHERE[command]}")
    fail(f"{command} is not a command{nearest(command, list(COMMANDS))}")


def print_command_help(command: str, settings: str) -> None:
    """Prints what a command does, its examples and its settings."""
    print(f"vdrop {command}: {COMMANDS[command]}\n\nexamples:\n{EXAMPLES[command]}\n{settings}", end="")


def print_help(topic: str) -> None:
    """Prints the help of a command, a setting or a group of settings."""
    from vdrop_cli import help
    from vdrop_cli.errors import ConfigError

    if topic in EXAMPLES:
        print_command_help(topic, help.command_help(topic, []))
        return
    try:
        print(help.key_help(topic), end="")
    except ConfigError as error:
        fail(str(error))


def command_of(line: list[str]) -> tuple[str | None, list[str]]:
    """Returns the command, or None, and all other words; options may come before the command."""
    for place, word in enumerate(line):
        if not word.startswith("-") and not is_value(line, place):
            return word, line[:place] + line[place + 1 :]
    return None, line


def options_of(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Returns the options with their values, and separately all other words.

    Hydra's parser does not accept options between other words.
    """
    options, words = list[str](), list[str]()
    for place, word in enumerate(arguments):
        (options if word.startswith("-") or is_value(arguments, place) else words).append(word)
    return options, words


def is_value(arguments: list[str], place: int) -> bool:
    """Whether a word is the value of the option before it."""
    option, word = arguments[place - 1] if place > 0 else "", arguments[place]
    return word in CHOICES.get(option, ()) or (option in FOLDERS and not word.startswith("-"))


def mistake_in(options: list[str], settings: Iterable[str]) -> str | None:
    """Returns what is wrong with the options of a command that has these settings; None if nothing is."""
    for place, word in enumerate(options):
        option, equals, value = word.partition("=")
        if is_value(options, place):
            continue
        if not equals and place + 1 < len(options) and is_value(options, place + 1):
            value = options[place + 1]
        if option.lstrip("-") in settings:
            return f"{option} is not an option, it is a setting: {option.lstrip('-')}=…"
        if option not in HYDRA_OPTIONS or (option in FLAGS and equals):
            return f"{word} is not an option; settings are key=value"
        if option in FOLDERS and not value:
            return f"{option} needs a folder"
        is_needed = equals or option in ("-c", "--cfg")
        if option in CHOICES and is_needed and value not in CHOICES[option]:
            return f"{option} must be one of {', '.join(CHOICES[option])}"
    return None


@contextmanager
def hydra_process(arguments: list[str]) -> Iterator[None]:
    """Within the context, Hydra reads `arguments` as the command line of this process and raises errors."""
    argv, variable = sys.argv, "HYDRA_FULL_ERROR"
    earlier = os.environ.get(variable)
    sys.argv = ["vdrop", *arguments]
    os.environ[variable] = "1"  # Hydra would print errors in its own way
    try:
        yield
    finally:
        sys.argv = argv
        os.environ.pop(variable)
        if earlier is not None:
            os.environ[variable] = earlier


def run(command: str, arguments: list[str]) -> None:
    """Composes the command's configuration with Hydra and runs it, once or as a sweep."""
    if sys.platform == "win32":
        fail("the commands need Linux or macOS; use WSL, or import the layers of vdrop_cli.layers alone")
    import hydra

    from vdrop_cli import help
    from vdrop_cli.arguments import ALIASES, full_keys, to_hydra
    from vdrop_cli.errors import ConfigError
    from vdrop_cli.explain import explain
    from vdrop_cli.settings.commands import ROOTS
    from vdrop_cli.settings.compose import register
    from vdrop_cli.settings.fields import types
    from vdrop_cli.sweeps import SWEEPER, Job, register_sweeper

    register()
    register_sweeper()
    options, words = options_of(arguments)
    if other := next((word for word in words if word.startswith("hydra/sweeper=")), None):
        fail(f"{other}: hydra/sweeper must be unset, vdrop brings its own")
    if mistake := mistake_in(options, {*types(ROOTS[command]), *ALIASES.get(command, ())}):
        fail(f"{mistake}; vdrop {command} --help shows the settings")
    if any(option.split("=")[0] in ("--cfg", "-c") for option in options) and "--resolve" not in options:
        options = [*options, "--resolve"]
    words, notes = full_keys(command, words)
    for note in notes:
        print(f"vdrop: {note}", file=sys.stderr)
    is_sweep = "-m" in options or "--multirun" in options
    only_prints = any(option.partition("=")[0] in CHOICES for option in options)
    is_single = not (is_sweep or only_prints or any(word.startswith("hydra.mode=") for word in words))
    if is_single and (other := next((word for word in words if word.startswith("hydra/launcher=")), None)):
        advice = "use launcher=…" if command == "reproduce" else "add -m"
        fail(f"{other}: a launcher is for sweeps; {advice}")
    try:
        words = to_hydra(command, words, is_sweep)
    except ConfigError as error:
        fail(str(error))
    if match := next(filter(None, (re.fullmatch(r"([+\w.]+)=[-+]?\d{300,}", word) for word in words)), None):
        fail(f"{match[1]} must be a number with fewer digits than {len(match[0]) - len(match[1]) - 1:,}")
    if {"-h", "--help"} & {*options}:
        try:
            page = help.command_help(command, [] if is_sweep else words)
        except Exception as error:
            fail(explain(error, command))
        print_command_help(command, page)
        return
    wants_traceback = "HYDRA_FULL_ERROR" in os.environ
    job = Job(command)
    try:
        with hydra_process([*options, "--", f"hydra/sweeper={SWEEPER}", *words]):
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=command)(job)()
    except Exception as error:
        if job.composed or wants_traceback or output.is_stdout_error(error):  # not a fault of what was typed
            raise
        fail(explain(error, command))
    if job.outcome.code:
        sys.exit(job.outcome.code)
