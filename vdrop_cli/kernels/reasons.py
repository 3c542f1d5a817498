"""Why something cannot run, in one line."""


def one_line(error: Exception) -> str:
    """The kind of another library's error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
