"""Random numbers as a function of a path."""

import torch

from vdrop_cli.random_streams import Stream, new_stream


def numbers(stream: Stream) -> tuple[float, ...]:
    return tuple(torch.rand(3, generator=stream.generator()).tolist())


def test_a_stream_is_a_function_of_its_path() -> None:
    """Whatever was drawn before; others for every other seed, name and number, and for a number that is
    written as a word.
    """
    expected = numbers(Stream((1, "a")))
    torch.rand(7)
    assert numbers(Stream((1, "a"))) == numbers(Stream((1,)).at("a")) == expected
    assert (
        len({numbers(Stream(path)) for path in ((1, "a"), (1, "b"), (2, "a"), (1, "a", 0), ("1", "a"))}) == 5
    )


def test_a_new_stream_is_decided_by_torchs_random_state() -> None:
    torch.manual_seed(3)
    first, second = new_stream(), new_stream()
    torch.manual_seed(3)
    assert new_stream() == first != second
