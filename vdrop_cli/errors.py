"""The two kinds of error that end a command with one line, and helpers that word this line.

This module does not import Hydra.
"""


class ConfigError(Exception):
    """A mistake of the user's, as one line that names the setting or the file and says what to do.

    The exit code is 2.
    """


class RunError(Exception):
    """An error that ends a run without a mistake in its settings, as one line. The exit code is 1."""


def require(holds: bool, key: str, rule: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"{key} must be {rule}, got {value}")


def lacks_memory(error: BaseException) -> bool:
    """Whether an error of Python or torch says that memory ran out."""
    signs = (
        *("not enough memory", "out of memory", "can't allocate memory", "storage size calculation"),
        "cublas_status_alloc_failed",  # cuBLAS, where a GPU is full
    )
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in signs)


def one_line(error: Exception) -> str:
    """The kind of another library's error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def nearest(word: str, known: list[str]) -> str:
    """A hint for a mistyped word, ready to be appended to a message."""
    from difflib import get_close_matches

    with_word = [name for name in known if word in name.split("_")]  # small: gru_small, lstm_small
    if len(with_word) > 1:
        return f"; choose from {', '.join(with_word)}"
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; choose from {', '.join(known)}"
