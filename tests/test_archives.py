"""Archives that nobody but `torch.save` would write are refused at once, and nothing in them takes time or
memory.
"""

import pickle
import time
import warnings
import zipfile
from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest
import torch

from vdrop_cli import archives
from vdrop_cli.archives import Malformed


def saved(content: Any) -> bytes:
    buffer = BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def remade(
    content: bytes,
    compression: int = zipfile.ZIP_STORED,
    pickled: Callable[[bytes], bytes] = lambda content: content,
) -> bytes:
    """The same archive with another compression, or another pickle."""
    buffer = BytesIO()
    with zipfile.ZipFile(BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            archive = old.read(name)
            new.writestr(name, pickled(archive) if name.endswith("data.pkl") else archive)
    return buffer.getvalue()


def test_plain_values_and_dense_tensors_come_back() -> None:
    shared = torch.randn(4, 3)
    types = [
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    ]
    content = {
        "a": [1, -(2**40), 2.5, None, True, "é", (1, ("x",)), {}],
        3: {"t": shared.t(), "same": shared, "none": torch.empty(0, 3)},
    }
    content["types"] = [torch.ones(2, 2).to(dtype) for dtype in types]
    values = archives.unpack(saved(content))
    assert (
        values["a"] == content["a"]
        and torch.equal(values[3]["t"], shared.t())
        and values[3]["none"].shape == (0, 3)
    )
    assert values[3]["t"].data_ptr() == values[3]["same"].data_ptr(), "what shares memory still does"
    assert all(torch.equal(one, other) for one, other in zip(values["types"], content["types"], strict=True))


def tree(depth: int, join: Callable[[Any], Any]) -> Any:
    value: Any = ["leaf"]
    for _ in range(depth):
        value = join(value)
    return value


def sparse() -> torch.Tensor:
    """Of 10^12 elements, one of them stored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of torch warn of invariants that they do not check
        return torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (10**12,))


def itself() -> list[Any]:
    values: list[Any] = []
    values.append(values)
    return values


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("ran",)


BOMBS: dict[str, Any] = {
    "a tree of lists": tree(60, lambda value: [value, value]),
    "a tree of dicts": tree(60, lambda value: {"a": value, "b": value}),
    "a tree of tuples": tree(60, lambda value: (value, value)),
    "a list in itself": itself(),
    "nesting": tree(300, lambda value: [value]),
    "an expanded tensor": torch.zeros(1).expand(10**12),
    "a sparse tensor": sparse(),
    "a tensor without memory": torch.empty(10**12, device="meta"),
    "a parameter": torch.nn.Parameter(torch.zeros(1)),
    "an object": Payload(),
    "bytes": bytearray(10),
    "a set": {1, 2},
    "a function": print,
    "a type": torch.float32,
    "one tuple in many places": [(1,) * 1000] * 1000,
    "one tensor in many places": [torch.zeros(1000)] * 100_000,
    "views of one tensor": list(torch.zeros(1000).expand(3, 1000).unbind()) * 10,
    "keys of one hash": {number * (2**61 - 1): 0 for number in range(1000)},
    "a key that is a tuple": {(1, 2): 0},
    "a key that is a tensor": {torch.zeros(1): 0},
    "a key that is nothing": {None: 0},
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_would_grow_is_refused_at_once(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    content, begun = saved({"config": BOMBS[name]}), time.perf_counter()
    with pytest.raises(Malformed) as refused:
        archives.unpack(content)
    assert time.perf_counter() - begun < 2 and "weights_only" not in str(refused.value)
    assert capsys.readouterr().out == ""


def test_sizes_are_checked_before_anything_is_unpacked() -> None:
    archive = saved({"w": torch.zeros(1000)})
    with pytest.raises(Malformed, match="compressed"):
        archives.unpack(remade(archive, zipfile.ZIP_DEFLATED))
    with pytest.raises(Malformed, match="another size than it says"):
        archives.unpack(remade(archive, pickled=lambda content: content.replace(b"M\xe8\x03", b"M\xe9\x03")))
    name = b"archive/data/0"
    entry = archive.rindex(name) - 46  # in the directory at the end: 46 bytes, and the name
    sizes = (10**9).to_bytes(4, "little") * 2
    with pytest.raises(Malformed, match="larger than the file"):
        archives.unpack(archive[: entry + 20] + sizes + archive[entry + 28 :])
    with pytest.raises(Malformed):
        archives.unpack(remade(archive, pickled=lambda _: pickle.dumps({"w": 1}, 4)))
    with pytest.raises(Malformed, match=r"no data\.pkl"):
        archives.unpack(remade(archive).replace(b"data.pkl", b"data.pkx"))
    assert archives.unpack(remade(archive))["w"].shape == (1000,)


@pytest.mark.parametrize(
    "more", [b"K\x00K\x01s", b"(K\x00K\x01u", b"(K\x00K\x01K\x02u", b"K\x00a", b"(K\x00e"]
)
def test_nothing_is_written_into_a_tensor(more: bytes) -> None:
    """One item of an expanded tensor is as many as the tensor has."""
    content = saved({"w": torch.zeros(1000)})
    with pytest.raises(Malformed, match=r"not a (dict|list)"):
        archives.unpack(remade(content, pickled=lambda pickled: pickled[:-2] + more + pickled[-2:]))


def test_a_place_in_the_memo_beyond_all_memory_is_no_place() -> None:
    """`LONG_BINPUT` of 2^31: the C unpickler makes an array of that length."""
    content = remade(saved({"a": 1}), pickled=lambda _: b"\x80\x02}r\xff\xff\xff\x7f.")
    assert archives.unpack(content) == {}
