# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Reads other people's checkpoints, which are pickles, without unpickling them.

A pickle is a program for a small machine that may import anything and call it. Here its instructions are decoded by
`pickletools`, which runs nothing, and carried out by a machine of our own that knows plain containers and the few
names of `BUILDERS`. A name stands for one of the functions below; nothing is ever imported, and source text that
comes with a network is not looked at. What the machine makes is not trusted either: sizes are checked against the
bytes that are there before a tensor is made.
"""

import io
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch


ZIP_MAGIC = b"PK\x03\x04"
# What torch.save wrote before 2020, and still writes for a tensor inside of another pickle, begins with these two.
LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
# Instructions of a pickle, by their names in `pickletools`: those that push the value behind them, and idle ones.
VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
IGNORED = {"PROTO", "FRAME"}
# What reading a damaged file raises. A file cut short may announce more bytes than there is memory.
DAMAGE = (
    *(ValueError, LookupError, TypeError, EOFError, MemoryError, OverflowError, RuntimeError),
    *(struct.error, zipfile.BadZipFile),
)


@dataclass(eq=False)
class Global:
    """A name that the pickle mentions."""

    name: str


@dataclass(eq=False)
class Opaque:
    """A value that no conversion needs, such as a NumPy scalar among the arguments of a layer; nothing is kept."""


@dataclass(eq=False)
class SavedStorage:
    """The numbers of a tensor; `data` comes after the pickle in some formats."""

    dtype: torch.dtype
    numel: int
    data: bytearray | None = None


@dataclass(eq=False)
class SavedModule:
    """A network or a layer of it: the name of its class, and what its attributes were."""

    class_name: str
    state: dict

    def entries(self, kind: str) -> dict:
        """Its "_parameters", "_buffers" or "_modules" by name; whatever is no such table is left out."""
        entries = self.state.get(kind)
        return {name: e for name, e in entries.items() if type(name) is str} if type(entries) is dict else {}


@dataclass(eq=False)
class SavedTensor:
    """A view of a storage, within its bounds."""

    storage: SavedStorage
    offset: int
    size: tuple
    stride: tuple

    def build(self) -> torch.Tensor:
        """The tensor; it shares memory with its storage.

        Raises:
            ValueError: the file has no bytes for it.
        """
        if self.storage.data is None:
            raise ValueError(f"checkpoint: the bytes of a tensor of size {self.size} are missing")
        if self.storage.numel == 0:
            return torch.empty(self.size, dtype=self.storage.dtype)
        flat = torch.frombuffer(self.storage.data, dtype=self.storage.dtype)
        return flat.as_strided(self.size, self.stride, self.offset)


# What the allowed names stand for


def _tensor(storage, offset, size, stride, requires_grad, hooks, metadata=None) -> SavedTensor:
    if type(storage) is not SavedStorage or type(size) is not tuple or type(stride) is not tuple:
        raise ValueError("checkpoint: a tensor without storage, size or stride is refused")
    if len(size) > 8 or len(size) != len(stride) or any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise ValueError("checkpoint: a tensor whose size, stride or offset are no small set of numbers is refused")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    # A stride of 0 would show one number a billion times.
    if prod(size) > storage.numel or (prod(size) and last >= storage.numel):
        raise ValueError(
            f"checkpoint: a tensor of size {size}, stride {stride} and offset {offset} is refused, its storage has "
            f"{storage.numel} numbers"
        )
    return SavedTensor(storage, offset, size, stride)


def _parameter(tensor, requires_grad, hooks):
    return tensor


class StorageFromBytes:
    """Reads storages that are pickles within the pickle, as long as they have not more bytes than the whole file."""

    def __init__(self, size: int):
        self.left = size

    def __call__(self, data: bytes) -> SavedStorage:
        # The same bytes could be asked for a thousand times, and each time would make new memory.
        self.left -= len(data)
        if self.left < 0:
            raise ValueError("checkpoint: torch.storage._load_from_bytes of more bytes than the file has is refused")
        stream = io.BytesIO(data)
        if PickleReader(stream, {}).read() != LEGACY_MAGIC:
            raise ValueError("checkpoint: torch.storage._load_from_bytes of something that is no tensor is refused")
        # No names are allowed in here but those of storages, so this cannot nest.
        return _read_legacy(stream, len(data), {})


def _persistent_object(meta: dict) -> SavedModule:
    return _module(meta["class_name"], meta["state"])


def _module(class_name, state) -> SavedModule:
    if type(class_name) is not str or type(state) is not dict:
        raise ValueError("checkpoint: a module without a class name and attributes is refused")
    return SavedModule(class_name, state)


BUILDERS: dict[str, Callable] = {
    "builtins.set": lambda *args: Opaque(),
    "collections.OrderedDict": lambda: {},
    "dnnlib.util.EasyDict": lambda: {},
    "numpy.dtype": lambda *args: Opaque(),
    "numpy.core.multiarray.scalar": lambda *args: Opaque(),
    "numpy._core.multiarray.scalar": lambda *args: Opaque(),
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.nn.modules.container.ModuleDict": lambda: _module("ModuleDict", {}),
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
}


class PickleReader:
    """The machine. It runs one pickle of `stream`, which it leaves just behind the end of it.

    Args:
        stream: of bytes.
        builders: the names that may be called, and what is called instead.
        storage: turns the persistent identity of a storage (torch's formats have them) into it; None where there are
            none.
    """

    def __init__(self, stream: BinaryIO, builders: dict[str, Callable], storage: Callable | None = None):
        self.stream, self.builders, self.storage = stream, builders, storage
        self.stack: list = []
        # The stacks below each mark, and what may be asked for again by number.
        self.below: list[list] = []
        self.memo: dict[int, object] = {}

    def read(self):
        """The object that the pickle makes, of plain containers and the records of this module.

        Raises:
            ValueError: a name or an instruction is not allowed (it is named), or the pickle is damaged.
            IndexError, KeyError, TypeError: the pickle is damaged.
        """
        for opcode, argument, _ in pickletools.genops(self.stream):
            if opcode.name == "STOP":
                return self.pop(1)[0]
            if opcode.name in VALUES:
                self.stack.append(argument)
            elif opcode.name not in IGNORED:
                self.step(opcode.name, argument)

    def step(self, opcode: str, argument):
        """One instruction, under the name that `pickletools` has for it."""
        match opcode:
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self.stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_SET" | "EMPTY_TUPLE":
                self.stack.append(
                    {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}[opcode]()
                )
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "TUPLE":
                items = self.pop_mark()
                self.stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.stack.append(tuple(self.pop(int(opcode[-1]))))
            case "APPEND" | "APPENDS":
                items = self.pop(1) if opcode == "APPEND" else self.pop_mark()
                self.top(list).extend(items)
            case "ADDITEMS":
                items = self.pop_mark()
                self.top(set).update(_key(item) for item in items)
            case "SETITEM" | "SETITEMS":
                items = self.pop(2) if opcode == "SETITEM" else self.pop_mark()
                target = self.top(dict)
                for key, value in zip(items[::2], items[1::2], strict=True):
                    target[_key(key)] = value
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "GLOBAL":
                self.name(*argument.split(" ", 1))
            case "STACK_GLOBAL":
                self.name(*self.pop(2))
            case "REDUCE" | "NEWOBJ":
                self.call(*self.pop(2))
            case "BUILD":
                self.set_state(*self.pop(1))
            case "BINPERSID" if self.storage is not None:
                self.stack.append(self.storage(*self.pop(1)))
            case _:
                raise ValueError(f"checkpoint: instruction {opcode} {str(argument or '')[:100]!r} is refused")

    def pop(self, count: int) -> list:
        if count > len(self.stack):
            raise IndexError("an instruction finds nothing on the stack")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def pop_mark(self) -> list:
        items, self.stack = self.stack, self.below.pop()
        return items

    def top(self, kind: type):
        if type(self.stack[-1]) is not kind:
            raise TypeError(f"an instruction for a {kind.__name__} finds a {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def name(self, module: str, name: str):
        if type(module) is not str or type(name) is not str:
            raise TypeError("a name that is no text")
        full = f"{module}.{name}"
        if full not in self.builders and full not in DTYPES:
            raise ValueError(f"checkpoint: the name {full[:100]!r} is refused; only weights and plain values are read")
        self.stack.append(Global(full))

    def call(self, function, arguments):
        if type(function) is not Global or type(arguments) is not tuple:
            raise TypeError(f"a call of a {type(function).__name__}")
        if function.name not in self.builders:
            raise ValueError(f"checkpoint: a call of {function.name!r} is refused")
        self.stack.append(self.builders[function.name](*arguments))

    def set_state(self, state):
        # The state of everything else (metadata of an OrderedDict, a NumPy dtype) says nothing about weights.
        if type(self.stack[-1]) is SavedModule and type(state) is dict:
            self.stack[-1].state = state


def _key(key):
    # Nothing else: the hash of a tuple is recursive in C, so a deeply nested one ends the process.
    if type(key) not in (str, int, bytes, bool):
        raise TypeError(f"a {type(key).__name__} as a key")
    return key


# Files


def _read_legacy(stream: BinaryIO, size: int, builders: dict[str, Callable]):
    """What follows LEGACY_MAGIC: version, byte order, the object, the keys of its storages, their bytes."""
    version, system = PickleReader(stream, {}).read(), PickleReader(stream, {}).read()
    if version != LEGACY_PROTOCOL or system["little_endian"] is not True:
        raise ValueError("checkpoint: version and byte order of its torch.save are unknown")
    storages: dict[str, SavedStorage] = {}

    def storage(identity: tuple) -> SavedStorage:
        # The last one is a view of the storage, which torch no longer writes.
        kind, dtype, key, location, numel, view = identity
        if view is not None:
            raise ValueError("checkpoint: a view of a storage is refused")
        return storages.setdefault(_key(key), _storage(kind, dtype, numel, size))

    saved = PickleReader(stream, builders, storage).read()
    for key in PickleReader(stream, {}).read():
        storage, numel = storages[_key(key)], struct.unpack("<q", stream.read(8))[0]
        if numel != storage.numel:
            raise ValueError(f"checkpoint: storage {key!r} has {numel} numbers, {storage.numel} were announced")
        storage.data = _exactly(stream.read(numel * storage.dtype.itemsize), storage)
    return saved


def _storage(kind: str, dtype: Global, numel: int, limit: int) -> SavedStorage:
    """A storage without its bytes, refused if it could not fit into `limit` of them."""
    if kind != "storage" or type(dtype) is not Global or dtype.name not in DTYPES or type(numel) is not int:
        raise ValueError("checkpoint: a storage of an unknown kind of numbers is refused")
    if not 0 <= numel * DTYPES[dtype.name].itemsize <= limit:
        raise ValueError(f"checkpoint: a storage of {numel} numbers is announced, the file has {limit} bytes")
    return SavedStorage(DTYPES[dtype.name], numel)


def _exactly(data: bytes, storage: SavedStorage) -> bytearray:
    if len(data) != storage.numel * storage.dtype.itemsize:
        raise ValueError(f"checkpoint: a storage of {storage.numel} numbers has {len(data)} bytes")
    return bytearray(data)


def _read_zip(path: Path, size: int, builders: dict[str, Callable]):
    """torch.save since 2020: a zip file of `data.pkl` and one member per storage, nothing of it compressed."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
        compressed = [name for name, member in members.items() if member.compress_type != zipfile.ZIP_STORED]
        if compressed or sum(member.file_size for member in archive.infolist()) > size:
            raise ValueError(
                "checkpoint: its members are compressed or larger than the file; torch.save does not write that"
            )
        (pickled,) = [name for name in members if name.endswith("data.pkl")]
        folder = pickled.removesuffix("data.pkl")
        if f"{folder}byteorder" in members and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("checkpoint: its byte order is not little-endian")
        storages: dict[str, SavedStorage] = {}

        def storage(identity: tuple) -> SavedStorage:
            kind, dtype, key, location, numel = identity
            if _key(key) not in storages:
                storages[key] = _storage(kind, dtype, numel, size)
                storages[key].data = _exactly(archive.read(f"{folder}data/{key}"), storages[key])
            return storages[key]

        return PickleReader(io.BytesIO(archive.read(pickled)), builders, storage).read()


def read_checkpoint(path: str | Path):
    """Reads a pickle of NVIDIA's EDM, or a file of torch.save (of either format).

    Args:
        path: the file.

    Returns:
        Plain containers and values, with tensors as `SavedTensor` and networks as `SavedModule`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else than weights and plain values (the first name of that kind is in the text),
            or is damaged. The text begins with "checkpoint:".
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: {path} is missing; a .pkl or .pt file is needed there")
    size = path.stat().st_size
    builders = {**BUILDERS, "torch.storage._load_from_bytes": StorageFromBytes(size)}
    try:
        with open(path, "rb") as stream:
            if stream.read(len(ZIP_MAGIC)) == ZIP_MAGIC:
                return _read_zip(path, size, builders)
            stream.seek(0)
            saved = PickleReader(stream, builders).read()
            return _read_legacy(stream, size, builders) if saved == LEGACY_MAGIC else saved
    except DAMAGE as error:
        if str(error).startswith("checkpoint:"):
            raise
        raise ValueError(
            f"checkpoint: {path} is damaged or no checkpoint ({type(error).__name__}: {str(error)[:200]})"
        ) from error
