"""The figures without dropout and with early stopping, to compare with the figures with dropout.

Every example is trained for six numbers of steps. The best figure of `none` on the new data is printed.
"""

import inspect
from importlib import import_module

EXAMPLES = (
    *("language_model", "rating", "layer", "cell", "translation", "encoder", "span", "streaming"),
    *("transformer", "mlp", "awd_lstm"),
)
EIGHTHS = (1, 2, 3, 4, 6, 8)


def best_without_dropout(name: str) -> float:
    """The lowest figure of `none` after some eighths of the example's steps."""
    main = import_module(name).main
    steps = inspect.signature(main).parameters["steps"].default
    return min(main(steps * eighths // 8)["none"] for eighths in EIGHTHS)


if __name__ == "__main__":
    for name in EXAMPLES:
        print(f"{name:<16}{best_without_dropout(name):8.3f}", flush=True)
