"""Reads the zip archives that `torch.save` makes, as data: plain values and dense tensors, nothing else.

`torch.load(weights_only=True)` runs no code either, but a crafted file can make it allocate far more than the
file holds, or read past the end of a tensor's memory. Here every size is checked against the bytes that are
there before anything is made of it.
"""

import pickle
import zipfile
from collections.abc import Iterator
from io import BytesIO
from typing import Any, ClassVar

MOST_NESTED = 12  # lists and dicts within each other; what vdrop writes has five
MOST_AGAIN = 10  # elements of a tuple that stands in two places, such as the shape of a tensor
LARGEST_KEY = 2**63  # with larger ones a dict could be made that is slow
PLAIN = (str, int, float, bool, type(None))

# of pickle protocol 2, what lists, dicts, numbers, strings and tensors are written with
OPERATIONS = (
    *(
        pickle.PROTO,
        pickle.STOP,
        pickle.MARK,
        pickle.NONE,
        pickle.NEWTRUE,
        pickle.NEWFALSE,
        pickle.BININT,
        pickle.BININT1,
        pickle.BININT2,
    ),
    *(
        pickle.LONG1,
        pickle.BINFLOAT,
        pickle.BINUNICODE,
        pickle.EMPTY_LIST,
        pickle.APPEND,
        pickle.APPENDS,
        pickle.EMPTY_DICT,
    ),
    *(
        pickle.SETITEM,
        pickle.SETITEMS,
        pickle.EMPTY_TUPLE,
        pickle.TUPLE,
        pickle.TUPLE1,
        pickle.TUPLE2,
        pickle.TUPLE3,
        pickle.BINPUT,
    ),
    *(pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET, pickle.GLOBAL, pickle.REDUCE, pickle.BINPERSID),
)
STORAGES = {  # names of torch's classes for them: the type of their elements
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


class Malformed(ValueError):
    """The archive is not one that `torch.save` makes of plain values and dense tensors; the message says
    why.
    """


def unpack(content: bytes) -> Any:
    """What `torch.save` was given. Raises Malformed; MemoryError."""
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            folder = require_plain(archive, len(content))
            if archive.read(f"{folder}/byteorder") != b"little":
                raise Malformed("its numbers are not in the byte order of this machine")
            found = Unpickler(archive, folder).load()
    except (Malformed, MemoryError):
        raise
    except Exception as error:  # whatever the reader of a crafted file stumbles over
        raise Malformed(
            f"it is not an archive of tensors and plain values ({type(error).__name__})"
        ) from None
    require_small(found, len(content))
    return found


def require_plain(archive: zipfile.ZipFile, size: int) -> str:
    """Checks the directory of the archive; returns the folder that all its entries lie in. `size` is that of
    the whole file in bytes.
    """
    entries = archive.infolist()
    names = {entry.filename.casefold() for entry in entries}
    if len(names) < len(entries):
        raise Malformed("two of its entries have one name")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        raise Malformed("its entries are compressed or encrypted, as vdrop writes none")
    if (
        any(entry.file_size != entry.compress_size for entry in entries)
        or sum(entry.file_size for entry in entries) > size
    ):
        raise Malformed("its entries are said to be larger than the file")
    folder = entries[0].filename.partition("/")[0] if entries else ""
    if f"{folder}/data.pkl" not in archive.namelist():
        raise Malformed("it holds no data.pkl")
    return folder


def require_small(found: Any, size: int) -> None:
    """No value is nested deeper than MOST_NESTED, and tensors that share memory are not so many that to read
    them all takes long.
    """
    import torch

    elements = 0
    for depth, level in enumerate(levels(found)):
        if depth >= MOST_NESTED:
            raise Malformed("its values are nested too deep")
        elements += sum(value.numel() for value in level if isinstance(value, torch.Tensor))
    if elements > size:
        raise Malformed("its tensors have more elements than the file has bytes")


def levels(value: Any) -> Iterator[list[Any]]:
    """A value, then all that it holds, then all that these hold: in lists, tuples and dicts, each of which is
    in one place.
    """
    level = [value]
    while level:
        yield level
        containers = [inner for inner in level if isinstance(inner, list | tuple | dict)]
        level = [
            inner for held in containers for inner in (held.values() if isinstance(held, dict) else held)
        ]


class Unpickler(pickle._Unpickler):
    """Knows the operations that plain values and dense tensors are written with, and calls nothing but the
    two functions below.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        operation[0]: pickle._Unpickler.dispatch[operation[0]] for operation in OPERATIONS
    }
    memo: dict[int, Any]
    stack: list[Any]

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(BytesIO(archive.read(f"{folder}/data.pkl")))
        self.archive, self.folder = archive, folder
        self.storages: dict[
            str, tuple[str, Any]
        ] = {}  # by key: the type's name, and all elements as one tensor

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return tensor_of
        if (module, name) == ("collections", "OrderedDict"):
            return dict_of_nothing
        if module == "torch" and name in STORAGES:
            return StorageType(STORAGES[name])
        raise Malformed("it holds an object that is neither a tensor nor a plain value")

    def persistent_load(self, pid: Any) -> Any:
        """The elements of a tensor's memory, [N]."""
        import torch

        kind, storage, key, _, count = pid
        if (
            kind != "storage"
            or not isinstance(storage, StorageType)
            or not isinstance(key, str)
            or type(count) is not int
        ):
            raise Malformed("it holds a tensor without its elements")
        if key not in self.storages:
            dtype: torch.dtype = getattr(torch, storage.dtype)
            held = bytearray(self.archive.read(f"{self.folder}/data/{key}"))
            if len(held) != count * dtype.itemsize:
                raise Malformed("it holds a tensor of another size than it says")
            self.storages[key] = (
                storage.dtype,
                torch.frombuffer(held, dtype=dtype) if held else torch.empty(0, dtype=dtype),
            )
        name, elements_N = self.storages[key]
        if (name, len(elements_N)) != (storage.dtype, count):
            raise Malformed("it holds two tensors of different types in one place")
        return elements_N

    def load_get(self, key: int) -> None:
        """A value that stands in two places. Of lists and dicts that would be a tree that grows with every
        level of it.
        """
        value = self.memo[key]
        again = not isinstance(value, list | dict | tuple)
        if isinstance(value, tuple):
            again = len(value) <= MOST_AGAIN and all(isinstance(inner, PLAIN) for inner in value)
        if not again:
            raise Malformed("its lists refer to each other")
        self.append(value)  # type: ignore[attr-defined]

    def load_binget(self) -> None:
        self.load_get(self.read(1)[0])  # type: ignore[attr-defined]

    def load_long_binget(self) -> None:
        self.load_get(int.from_bytes(self.read(4), "little"))  # type: ignore[attr-defined]

    def set_items(self, items: list[Any]) -> None:
        """Keys and values by turns, into the dict on the stack."""
        into = self.stack[-1]
        if type(into) is not dict:
            raise Malformed("it sets items of what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not (type(key) is str or (type(key) is int and abs(key) < LARGEST_KEY)):
                raise Malformed("it holds a key that is neither a text nor a number")
            into[key] = value

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def load_setitems(self) -> None:
        self.set_items(self.pop_mark())  # type: ignore[attr-defined]

    def add_items(self, items: list[Any]) -> None:
        """Into the list on the stack."""
        into = self.stack[-1]
        if type(into) is not list:
            raise Malformed("it appends to what is no list")
        into.extend(items)

    def load_append(self) -> None:
        self.add_items([self.stack.pop()])

    def load_appends(self) -> None:
        self.add_items(self.pop_mark())  # type: ignore[attr-defined]

    dispatch[pickle.BINGET[0]] = load_binget
    dispatch[pickle.LONG_BINGET[0]] = load_long_binget
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.APPEND[0]] = load_append
    dispatch[pickle.APPENDS[0]] = load_appends


class StorageType:
    """The type of a tensor's elements, by its name in torch."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype


def dict_of_nothing() -> dict[Any, Any]:
    """Stands for the hooks that a tensor is written with; there are never any."""
    return {}


def tensor_of(
    elements_N: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> Any:
    """A tensor as a view of its memory. It has no more elements than that."""
    import torch

    numbers = [offset, *size, *stride]
    if (
        not isinstance(elements_N, torch.Tensor)
        or len(size) != len(stride)
        or any(type(n) is not int or n < 0 for n in numbers)
    ):
        raise Malformed("it holds a tensor without a shape")
    count = 1
    for length in size:
        count *= length
    last = (
        offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if count else -1
    )
    if max(count, last + 1) > len(elements_N) or max(size, default=0) > max(len(elements_N), 2**31):
        raise Malformed("it holds a tensor that is larger than its memory")
    return elements_N.as_strided(size, stride, offset)
