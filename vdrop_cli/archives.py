"""Reads the zip archives of `torch.save` as data: plain values and dense tensors, nothing else.

`torch.load(weights_only=True)` runs no code either, but a crafted file can make it allocate far more than the
size of the file, or read past the end of a tensor's memory. Here every size is checked against the file
before anything is allocated.
"""

import pickle
import zipfile
from collections.abc import Iterator
from io import BytesIO
from typing import Any, ClassVar

MAX_DEPTH = 12  # nested lists and dicts; files of vdrop have five levels
MAX_SHARED_TUPLE = 10  # elements of a tuple that is stored once and used twice, such as a tensor's shape
KEY_LIMIT = 2**63  # larger integer keys could make a dict slow
PLAIN = (str, int, float, bool, type(None))

# operations of pickle protocol 2 for lists, dicts, numbers, strings and tensors
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
STORAGES = {  # names of torch's storage classes: the type of their elements
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
    """The archive is not one of plain values and dense tensors that `torch.save` wrote.

    The message is the reason.
    """


def unpack(content: bytes) -> Any:
    """Returns the object that `torch.save` wrote; raises Malformed or MemoryError."""
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            folder = require_plain(archive, len(content))
            if archive.read(f"{folder}/byteorder") != b"little":
                raise Malformed("its numbers are not in the byte order of this machine")
            values = Unpickler(archive, folder).load()
    except (Malformed, MemoryError):
        raise
    except Exception as error:  # a crafted file can cause any
        raise Malformed(
            f"it is not an archive of tensors and plain values ({type(error).__name__})"
        ) from None
    require_small(values, len(content))
    return values


def require_plain(archive: zipfile.ZipFile, size: int) -> str:
    """Checks the directory of the archive; returns the folder that contains all entries.

    `size` is that of the whole file in bytes. Raises Malformed.
    """
    entries = archive.infolist()
    names = {entry.filename.casefold() for entry in entries}
    if len(names) < len(entries):
        raise Malformed("two of its entries have the same name")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        raise Malformed("its entries are compressed or encrypted, which files of vdrop are not")
    if (
        any(entry.file_size != entry.compress_size for entry in entries)
        or sum(entry.file_size for entry in entries) > size
    ):
        raise Malformed("its entries are larger than the file")
    folder = entries[0].filename.partition("/")[0] if entries else ""
    if f"{folder}/data.pkl" not in archive.namelist():
        raise Malformed("it has no data.pkl")
    return folder


def require_small(values: Any, size: int) -> None:
    """Raises Malformed for values nested deeper than MAX_DEPTH and for too many elements of tensors.

    Tensors may share memory, so their elements can exceed the file.
    """
    import torch

    elements = 0
    for depth, level in enumerate(levels(values)):
        if depth >= MAX_DEPTH:
            raise Malformed("its values are nested too deep")
        elements += sum(value.numel() for value in level if isinstance(value, torch.Tensor))
    if elements > size:
        raise Malformed("its tensors have more elements than the file has bytes")


def levels(value: Any) -> Iterator[list[Any]]:
    """Yields a value in a list, then the values inside it, then the values inside those.

    Lists, tuples and dicts count as containers; each of them must be in one place only.
    """
    level = [value]
    while level:
        yield level
        containers = [inner for inner in level if isinstance(inner, list | tuple | dict)]
        level = [
            inner for outer in containers for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]


class Unpickler(pickle._Unpickler):
    """An unpickler for plain values and dense tensors, which calls nothing but the two functions below."""

    dispatch: ClassVar[dict[int, Any]] = {
        operation[0]: pickle._Unpickler.dispatch[operation[0]] for operation in OPERATIONS
    }
    memo: dict[int, Any]
    stack: list[Any]

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(BytesIO(archive.read(f"{folder}/data.pkl")))
        self.archive, self.folder = archive, folder
        self.storages: dict[str, tuple[str, Any]] = {}  # key: (type of the elements, all elements [N])

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return make_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return empty_dict
        if module == "torch" and name in STORAGES:
            return StorageType(STORAGES[name])
        raise Malformed("it holds an object that is neither a tensor nor a plain value")

    def persistent_load(self, pid: Any) -> Any:
        """Returns the elements of a tensor's memory, [N]."""
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
            memory = bytearray(self.archive.read(f"{self.folder}/data/{key}"))
            if len(memory) != count * dtype.itemsize:
                raise Malformed("it holds a tensor of another size than it says")
            elements = torch.frombuffer(memory, dtype=dtype) if memory else torch.empty(0, dtype=dtype)
            self.storages[key] = (storage.dtype, elements)
        name, elements_N = self.storages[key]
        if (name, len(elements_N)) != (storage.dtype, count):
            raise Malformed("it holds two tensors of different types in one place")
        return elements_N

    def load_get(self, key: int) -> None:
        """Pushes a value that is used twice.

        Shared lists and dicts are refused: with them a small file could describe a tree of exponential size.
        """
        value = self.memo[key]
        is_small = not isinstance(value, list | dict | tuple)
        if isinstance(value, tuple):
            is_small = len(value) <= MAX_SHARED_TUPLE and all(isinstance(inner, PLAIN) for inner in value)
        if not is_small:
            raise Malformed("its lists refer to each other")
        self.append(value)  # type: ignore[attr-defined]

    def load_binget(self) -> None:
        self.load_get(self.read(1)[0])  # type: ignore[attr-defined]

    def load_long_binget(self) -> None:
        self.load_get(int.from_bytes(self.read(4), "little"))  # type: ignore[attr-defined]

    def set_items(self, items: list[Any]) -> None:
        """Sets alternating keys and values in the dict on the stack."""
        into = self.stack[-1]
        if type(into) is not dict:
            raise Malformed("it sets an item of a value that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not (type(key) is str or (type(key) is int and abs(key) < KEY_LIMIT)):
                raise Malformed("it holds a key that is neither a text nor a number")
            into[key] = value

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def load_setitems(self) -> None:
        self.set_items(self.pop_mark())  # type: ignore[attr-defined]

    def add_items(self, items: list[Any]) -> None:
        """Appends items to the list on the stack."""
        into = self.stack[-1]
        if type(into) is not list:
            raise Malformed("it appends to a value that is not a list")
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


def empty_dict() -> dict[Any, Any]:
    """Replaces the hooks of a tensor, which are always empty."""
    return {}


def make_tensor(
    elements_N: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> Any:
    """Returns a tensor as a view of its memory; raises Malformed where it exceeds that."""
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
    steps = sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    last = offset + steps if count else -1
    if max(count, last + 1) > len(elements_N) or max(size, default=0) > max(len(elements_N), 2**31):
        raise Malformed("it holds a tensor that is larger than its memory")
    return elements_N.as_strided(size, stride, offset)
