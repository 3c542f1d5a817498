"""`vdrop COMMAND key=value …`: one Hydra application a command."""

import argparse
import os
import re
import sys
from typing import NoReturn

from vdrop_cli import CONF, output

COMMANDS = {
    "train": "train a model; the same command again resumes, or says that it is done",
    "eval": "perplexity or error of a checkpoint: standard approximation, and MC dropout",
    "predict": "predict a rating, or the surprisal of each word, or sample words from a model",
    "data": "the corpora: where they lie, what they hold, whether they are right",
    "export": "a checkpoint as a safetensors file: its weights, vocabulary and settings",
    "bench": "how fast the cells are, beside torch.nn.LSTM and the machine's limit",
    "table": "what was measured beside what was published: RESULTS.md, pictures",
    "reproduce": "run or resume the rows of the paper's Table 1, evaluate them, and write the table",
    "figures": "run or resume the paper's experiments on film reviews, evaluate them, and draw their errors",
    "compare": "runs side by side: what differs, how they ended, their curves",
    "completion": "print the completion script for bash",
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
HYDRA_OPTIONS: dict[str, tuple[str, ...]] = {  # and the values that can follow as words of their own
    **dict.fromkeys(("-m", "--multirun", "--resolve", "-h", "--help", "--hydra-help"), ()),
    **dict.fromkeys(("-c", "--cfg"), CONFIGS),
    **dict.fromkeys(("-i", "--info"), INFOS),
}

EXAMPLES = {
    "train": """vdrop train: train a model; the same command again resumes, or says that it is done

examples:
  vdrop train                                          the medium variational row on Penn Treebank
  vdrop train model=lstm_large dropout=variational     the large one, with its published settings
  vdrop train model=gru_small dropout=naive data=pydoc schedule.epochs=5
  vdrop train -m dropout=none,variational seed=1,2,3   a sweep: six runs, one after the other
  vdrop train data=text data.train=a.txt data.valid=b.txt data.test=c.txt
  vdrop train task=sentiment dropout=naive             ratings of film reviews
  vdrop train model=lstm_large stuck.steps=200         stops if the start is stuck; choose another seed then
  vdrop train schedule.epochs=60                       continues the same run of fewer epochs
  vdrop train checkpoint.minutes=inf checkpoint.epochs=5
                                                       few checkpoints, for a slow disk; a signal still saves
""",
    "eval": """vdrop eval: perplexity or error of a checkpoint, with its model, dropout and corpus

examples:
  vdrop eval checkpoint=outputs/train/language_model-lstm_small-variational/0123abcd-s1
  vdrop eval checkpoint=… mc_samples=100               and MC dropout, by number of samples
  vdrop eval checkpoint=… data.dir=corpora/ptb         the corpus has moved
  vdrop eval checkpoint=… stored_data=true             read the data that the checkpoint itself names
""",
    "predict": """vdrop predict: a rating with an interval, or a text's perplexity and most surprising words

examples:
  vdrop predict checkpoint=… text="A film to remember ."
  vdrop predict checkpoint=… file=reviews.txt json=true  a row per line of the file; or standard input
  vdrop predict checkpoint=… sample=50                   generate fifty words with a language model
""",
    "data": """vdrop data: where the corpora lie, what they hold, whether they are right

examples:
  vdrop data                                           a look; nothing is fetched
  vdrop data data=ptb                                  fetch Penn Treebank if need be, and check it
  vdrop data data=text data.train=a.txt data.valid=b.txt data.test=c.txt
  vdrop data data=hub data.name=owner/name data.column=text
  vdrop data data=text_regression data.csv=a.csv data.column=text data.rating_column=stars
""",
    "export": """vdrop export: a checkpoint as a safetensors file; needs pip install 'vdrop[export]'

examples:
  vdrop export checkpoint=outputs/train/language_model-lstm_small-variational/0123abcd-s1
  vdrop export checkpoint=… file=model.safetensors
""",
    "table": """vdrop table: RESULTS.md, from run folders and records: measured beside published

examples:
  vdrop table                                          every size, with pictures
  vdrop table sizes=[small] file=small.md csv=small.csv latex=small.tex
  vdrop table record=true                              and keep what is small of the runs in outputs/record
""",
    "reproduce": """vdrop reproduce: the rows of the paper's Table 1: run, resumed, evaluated, written down

examples:
  vdrop reproduce sizes=[small] plan=true              what there is to do, and how long it takes here
  vdrop reproduce sizes=[medium] rows=[variational,variational_mc] seeds=3
  vdrop reproduce sizes=[large] seeds=3                the first three seeds whose start is not stuck
  vdrop reproduce jobs=3 until=25min mc_batch=500      three runs at once; the same command resumes them
  vdrop reproduce 'launcher=submitit_slurm hydra.launcher.timeout_min=600'
""",
    "figures": """vdrop figures: the paper's experiments on film reviews: run, evaluated, drawn, written down

examples:
  vdrop figures plan=true                              what there is to do, and how long it takes here
  vdrop figures protocols=[clean] cells=[lstm] seeds=3
  vdrop figures epochs=250 jobs=2 until=8h
""",
    "bench": """vdrop bench: words per second, time, fraction of the machine's limit, peak memory

examples:
  vdrop bench                                          every size, cell and precision: half an hour
  vdrop bench sizes=[medium] parts=[step]              whole training steps of the medium model
  vdrop bench 'cells=[variational,torch_lstm,keras]' precisions=[fp32]
""",
}

COMPLETION = """_vdrop() {
    mapfile -t COMPREPLY < <(COMP_LINE="$COMP_LINE" COMP_POINT="$COMP_POINT" \\
        vdrop completion query 2>/dev/null)
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _vdrop vdrop
"""


def fail(message: str) -> NoReturn:
    """One line for a mistake of the user's."""
    print(f"vdrop: {' '.join(message.split())}", file=sys.stderr)  # one, whatever was typed
    sys.exit(2)


def main() -> None:
    output.prepare()
    try:
        code: object = guarded()
    except SystemExit as stop:
        code = stop.code
    lost = output.finish()
    if code or lost:
        sys.exit(code or lost)  # type: ignore[arg-type]


def guarded() -> int:
    """The exit code."""
    try:
        dispatch()
    except KeyboardInterrupt:
        print("vdrop: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if not output.is_lost(error):
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
    elif command == "compare":
        from vdrop_cli.commands import compare

        compare.main(arguments)
    elif command in COMMANDS:
        run(command, arguments)
    else:
        from vdrop_cli.errors import nearest

        fail(f"{command} is not a command{nearest(command, list(COMMANDS))}")


def print_help(topic: str) -> None:
    """Prints the help of a command, a setting or a group of settings."""
    from vdrop_cli import help
    from vdrop_cli.errors import ConfigError

    if topic in EXAMPLES:
        print(EXAMPLES[topic], help.command_help(topic, []), sep="\n", end="")
        return
    try:
        print(help.key_help(topic), end="")
    except ConfigError as error:
        fail(str(error))


def command_of(line: list[str]) -> tuple[str | None, list[str]]:
    """The command, which options can stand before, and the rest of the line."""
    for place, word in enumerate(line):
        is_value = place > 0 and word in HYDRA_OPTIONS.get(line[place - 1], ())
        if not word.startswith("-") and not is_value:
            return word, line[:place] + line[place + 1 :]
    return None, line


def options_of(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Options with their values, and all other words, as Hydra's parser takes them one after the other
    only.
    """
    options, words = list[str](), list[str]()
    for place, word in enumerate(arguments):
        is_value = place > 0 and word in HYDRA_OPTIONS.get(arguments[place - 1], ())
        (options if word.startswith("-") or is_value else words).append(word)
    return options, words


def run(command: str, arguments: list[str]) -> None:
    """Composes the command's configuration with Hydra and runs it, once or as a sweep."""
    import hydra

    from vdrop_cli import help
    from vdrop_cli.arguments import full_keys, prepared
    from vdrop_cli.errors import ConfigError
    from vdrop_cli.explain import explain
    from vdrop_cli.settings.compose import register
    from vdrop_cli.sweeps import Job, take_over

    register()
    take_over()
    options, words = options_of(arguments)
    unknown = [
        option for option in options if option.startswith("-") and option.split("=")[0] not in HYDRA_OPTIONS
    ]
    if unknown:
        fail(f"{unknown[0]} is not an option; settings are key=value, vdrop {command} --help shows them")
    if any(option.split("=")[0] in ("--cfg", "-c") for option in options) and "--resolve" not in options:
        options = [*options, "--resolve"]
    words, notes = full_keys(command, words)
    for note in notes:
        print(f"vdrop: {note}", file=sys.stderr)
    is_sweep = "-m" in options or "--multirun" in options
    try:
        words = prepared(command, words, is_sweep)
    except ConfigError as error:
        fail(str(error))
    if found := next(filter(None, (re.fullmatch(r"([+\w.]+)=[-+]?\d{300,}", word) for word in words)), None):
        fail(f"{found[1]} must be a number with fewer digits than {len(found[0]) - len(found[1]) - 1:,}")
    sys.argv = ["vdrop", *options, "--", *words]
    if {"-h", "--help"} & {*options}:
        try:
            print(EXAMPLES[command], help.command_help(command, [] if is_sweep else words), sep="\n", end="")
        except Exception as error:
            fail(explain(error, command))
        return
    wants_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing them in its own way
    job = Job(command)

    def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
        fail(f"{message}; settings are key=value, vdrop {command} --help shows them")

    # Hydra's would print its usage
    argparse.ArgumentParser.error = refuse  # type: ignore[method-assign,assignment]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=command)(job)()
    except Exception as error:
        if job.composed or wants_traceback or output.is_lost(error):  # not a fault of what was typed
            raise
        fail(explain(error, command))
    if job.outcome.code:
        sys.exit(job.outcome.code)
