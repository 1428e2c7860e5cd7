"""From a tree to the bytes of a file that ``torch.load(path, weights_only=True)`` opens, planned once.

What a file looks like depends on the kinds and shapes of the tensors and on which of them share memory, not on
their content. `Planner` keeps the last plan, compares all that it depends on with the tree of the next save, and
uses it again where nothing differs. `data.pkl` begins with the tensors, as the plan has them; the tree itself
follows and is pickled anew for every save, each tensor a reference to its place in the pickle's memo.

Tensors share memory where they overlap in it, as tied weights and views do, and share it again when they are
loaded. Of a buffer only the part is saved that a tensor of the tree covers. Everything is stored as of the CPU.
A tree with a tensor of a rarer kind (sparse, quantized, of a subclass, with attributes) is pickled as `torch.save`
does it, whole storages and all, which is slower and never planned.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import pickle
import struct
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any, TypeAlias

import numpy as np
import torch

from chainrun.checkpoint.archive import Records

# of a file: how torch calls the storage of a dtype; those of a later day are "untyped"
_STORAGES = {
    torch.float32: "FloatStorage",
    torch.float64: "DoubleStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.int16: "ShortStorage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
    torch.complex64: "ComplexFloatStorage",
    torch.complex128: "ComplexDoubleStorage",
}
_QUANTIZED = {torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.quint2x4}
_UTILS = "torch._utils"  # where files say that the functions are that make a tensor
_Column: TypeAlias = "list[Any]"


class Content:
    """One save: the file's bytes, where they are in memory.

    The bytes at ``where[i]`` of the file, ``sizes[i]`` of them, are at ``addresses[i]``, or in ``elsewhere[i]``, a
    tensor of bytes, where the CPU cannot address them. Valid while the tensors live and are not moved.
    """

    def __init__(
        self, records: Records, data: bytes, addresses: Any, elsewhere: dict[int, torch.Tensor], keep: Any
    ) -> None:
        self.records = records
        self.tail = records.tail(data)
        self.size = records.end + len(self.tail)
        pieces = 2 * records.count + 1  # header and data of every record, and the tail
        self.where, self.sizes, self.addresses = np.zeros((3, pieces), dtype=np.int64)
        self.where[0:-1:2] = records.offsets - records.header_sizes
        self.where[1::2] = records.offsets
        self.where[-1] = records.end
        self.sizes[0:-1:2], self.sizes[1::2], self.sizes[-1] = (
            records.header_sizes,
            records.sizes,
            len(self.tail),
        )
        self.addresses[0:-1:2] = (
            np.cumsum(records.header_sizes) - records.header_sizes + _address(records.headers)
        )
        self.addresses[1::2] = addresses
        self.addresses[-1] = _address(self.tail)
        self.elsewhere = {2 * number + 1: tensor for number, tensor in elsewhere.items()}
        self.here = np.ones(pieces, dtype=bool)
        """Whether the CPU can address a piece."""
        self.here[list(self.elsewhere)] = False
        self._keep = keep


def _address(content: bytes) -> int:
    return int(np.frombuffer(content, dtype=np.uint8).ctypes.data) if content else 0


class Planner:
    """Makes the content of a file from a tree, and keeps the plan for the next tree like it."""

    def __init__(self) -> None:
        self._plan: _Plan | None = None

    def content(self, tree: Any) -> Content:
        """Return the content of the file for a tree.

        Raises:
            Exception: what torch or pickle raise for what they cannot save.
        """
        with _no_collection():
            found: dict[int, torch.Tensor] = {}
            _collect(tree, found)
            with contextlib.suppress(_Rare):
                facts = _facts(list(found.values()))
                if self._plan is None or not self._plan.fits(facts):
                    self._plan = _Plan(facts)
                return self._plan.content(tree, found, facts)
            return _as_torch_does(tree)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from going through all objects several times over for our many small ones."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Rare(Exception):
    """There is a tensor whose pickle is not planned."""


def _collect(tree: Any, found: dict[int, torch.Tensor]) -> None:
    for value in (
        tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else [tree]
    ):
        kind = type(value)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            found[id(value)] = value
        elif isinstance(value, (dict, list, tuple)):
            _collect(value, found)


# ---- all that a plan depends on ----------------------------------------------------------------


class _Facts:
    """What there is to know of the tensors besides their content; columns, for they are compared at every save."""

    columns: list[_Column]
    addresses: Any


def _column(get: Callable[[Any], Any], tensors: Sequence[torch.Tensor]) -> _Column:
    return list(map(get, tensors))


def _facts(tensors: list[torch.Tensor]) -> _Facts:
    """Return them, cheaply: there may be many thousands.

    Raises:
        _Rare: one of them is of a rare kind.
    """
    if any(map(attrgetter("__dict__"), tensors)) or not set(map(attrgetter("layout"), tensors)) <= {
        torch.strided
    }:
        raise _Rare
    dtypes = _column(attrgetter("dtype"), tensors)
    kinds = set(dtypes)
    if kinds & _QUANTIZED:
        raise _Rare
    facts = _Facts()
    complex_ = any(kind.is_complex for kind in kinds)
    facts.columns = [
        _column(type, tensors),
        dtypes,
        _column(attrgetter("shape"), tensors),
        _column(torch.Tensor.stride, tensors),
        _column(attrgetter("device"), tensors),
        _column(attrgetter("requires_grad"), tensors),
        _column(torch.Tensor.is_neg, tensors),
        _column(torch.Tensor.is_conj, tensors) if complex_ else [False] * len(tensors),
    ]
    facts.addresses = np.array(_column(torch.Tensor.data_ptr, tensors), dtype=np.int64)
    return facts


def _extent(shape: Sequence[int], stride: Sequence[int], itemsize: int) -> int:
    """Return how many bytes a tensor reaches over, from its first element to its last."""
    if 0 in shape:
        return 0
    return itemsize * (1 + sum((length - 1) * step for length, step in zip(shape, stride, strict=True)))


def _shared(begin: Any, extent: Any) -> tuple[Any, Any] | None:
    """Return the group of each tensor that overlaps others in memory and its place there; None if none does.

    A group's number is that of its first tensor; the place is in bytes from the group's first.
    """
    order = np.argsort(begin, kind="stable")
    order = order[extent[order] > 0]
    first, last = begin[order], (begin + extent)[order]
    reach = np.maximum.accumulate(last)
    opens = np.ones(len(order), dtype=bool)
    opens[1:] = first[1:] >= reach[:-1]
    if opens.all():
        return None
    run = np.cumsum(opens) - 1
    smallest = np.full(run[-1] + 1, len(begin), dtype=np.int64)
    np.minimum.at(smallest, run, order)
    group = np.arange(len(begin))
    place = np.zeros(len(begin), dtype=np.int64)
    group[order] = smallest[run]
    place[order] = first - first[opens][run]
    return group, place


# ---- the plan ----------------------------------------------------------------------------------


class _Plan:
    """The storages of a tree, and the beginning of its pickle."""

    def __init__(self, facts: _Facts) -> None:
        self._columns = facts.columns
        _, dtypes, shapes, strides, devices, *_ = facts.columns
        self._extent = np.array(
            [
                0 if device.type == "meta" else _extent(shape, stride, dtype.itemsize)
                for dtype, shape, stride, device in zip(dtypes, shapes, strides, devices, strict=True)
            ],
            dtype=np.int64,
        )
        _check_addresses(facts, self._extent)
        self._shared = _shared(facts.addresses, self._extent)
        count = len(dtypes)
        alone: Any = (np.arange(count), np.zeros(count, dtype=np.int64))
        group, self._place = self._shared or alone
        stored = [index for index in range(count) if devices[index].type != "meta"]
        self._leaders = [index for index in stored if group[index] == index]
        numbers = {leader: number for number, leader in enumerate(self._leaders)}
        storages = {index: numbers[int(group[index])] for index in stored}
        sizes = np.zeros(len(numbers), dtype=np.int64)
        kinds: list[set[torch.dtype]] = [set() for _ in numbers]
        for index, number in storages.items():
            sizes[number] = max(sizes[number], self._place[index] + self._extent[index])
            kinds[number].add(dtypes[index])
        self._elsewhere = [index for index in self._leaders if devices[index].type != "cpu"]
        self._numbers = numbers
        self._records = Records(sizes.tolist())
        self._prefix = _tensors_pickled(facts.columns, storages, self._place.tolist(), sizes.tolist(), kinds)

    def fits(self, facts: _Facts) -> bool:
        """Whether it is the plan for these tensors too."""
        if facts.columns != self._columns:
            return False
        _check_addresses(facts, self._extent)
        shared = _shared(facts.addresses, self._extent)
        if shared is None or self._shared is None:
            return shared is self._shared
        return all(np.array_equal(one, other) for one, other in zip(shared, self._shared, strict=True))

    def content(self, tree: Any, tensors: dict[int, torch.Tensor], facts: _Facts) -> Content:
        """Return what a save of this tree writes."""
        buffer = io.BytesIO()
        pickler = _TreePickler(buffer, protocol=2)
        # the tensors have the first numbers of the memo, so the tree's own entries get others
        pickler.memo = dict(zip(tensors, enumerate(tensors.values()), strict=True))
        pickler.dump(tree)
        data = self._prefix + buffer.getvalue()[2:]  # both begin with the protocol
        starts = facts.addresses - self._place
        everyone = list(tensors.values()) if self._elsewhere else []
        elsewhere = {
            number: _bytes_at(everyone[index], int(starts[index]), int(self._records.sizes[number]))
            for index in self._elsewhere
            if self._records.sizes[number := self._numbers[index]]
        }
        return Content(self._records, data, starts[self._leaders], elsewhere, tensors)


def _check_addresses(facts: _Facts, extent: Any) -> None:
    if np.any((extent > 0) & (facts.addresses == 0)):
        raise _Rare  # its memory was given back, by FSDP say: torch tells what to do


def _bytes_at(tensor: torch.Tensor, address: int, size: int) -> torch.Tensor:
    """Return memory of a device as bytes."""
    storage = tensor.untyped_storage()
    begin = address - storage.data_ptr()
    if begin < 0 or begin + size > storage.nbytes():
        raise _Rare  # storages that overlap
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, begin, (size,), (1,))


class _TreePickler(pickle.Pickler):
    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, torch.Tensor) or torch.is_storage(thing):
            raise _Rare
        return NotImplemented


# ---- pickles -----------------------------------------------------------------------------------


class _Memo:
    """Numbers of the pickle machine's memo; the first `taken` are others'."""

    def __init__(self, taken: int) -> None:
        self._next = taken
        self._numbers: dict[Any, int] = {}

    def once(self, key: Any, code: Callable[[], bytes]) -> bytes:
        """Return code that pushes a value: `code` the first time, later a reference to what that pushed."""
        if key in self._numbers:
            return _pack(b"j", self._numbers[key])
        made = code()
        self._numbers[key] = number = self._next
        self._next += 1
        return made + _pack(b"r", number)

    def name(self, module: str, name: str) -> bytes:
        return self.once((module, name), f"c{module}\n{name}\n".encode)

    def text(self, text: str) -> bytes:
        return self.once(text, lambda: _text(text))


def _pack(operation: bytes, number: int) -> bytes:
    return operation + struct.pack("<I", number)


def _text(text: str) -> bytes:
    return _pack(b"X", len(text.encode())) + text.encode()


def _tuple(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


@functools.cache
def _int(number: int) -> bytes:
    if 0 <= number < 1 << 31:
        return b"J" + struct.pack("<i", number)
    return b"\x8a\x08" + struct.pack("<q", number)


@functools.lru_cache(4096)
def _ints(numbers: Sequence[int]) -> bytes:
    return _tuple(*map(_int, numbers))


def _tensors_pickled(
    columns: list[_Column],
    storages: dict[int, int],
    places: list[int],
    sizes: list[int],
    kinds: list[set[torch.dtype]],
) -> bytes:
    """Return a pickle, without its end, that makes the tensors and memoizes each under its number.

    It leaves a list of them on the machine's stack, below what is to come: torch's reader cannot pop.

    Args:
        storages: for each tensor that has bytes, the number of its storage.
        places: where in the storage each tensor begins, in bytes.
        sizes: bytes of each storage.
        kinds: dtypes of the tensors in each storage.
    """
    memo = _Memo(len(places))
    flag = {True: b"\x88", False: b"\x89"}

    def storage(number: int, name: str, length: int) -> bytes:
        module = "torch.storage" if name == "UntypedStorage" else "torch"
        kind = memo.name(module, name)
        what = (memo.text("storage"), kind, _text(str(number)), memo.text("cpu"), _int(length))
        return _tuple(*what) + b"Q"

    out = [b"\x80\x02]("]
    for index, (kind, dtype, shape, stride, _, grad, neg, conj) in enumerate(zip(*columns, strict=True)):
        is_parameter = kind is torch.nn.Parameter
        keeps = grad and not is_parameter
        number = storages.get(index)
        layout = [_ints(shape), _ints(stride), flag[keeps]]
        if number is None:
            make = memo.name(_UTILS, "_rebuild_meta_tensor_no_storage")
            arguments = [memo.name(*str(dtype).split(".")), *layout]
        else:
            typed = _STORAGES.get(dtype) if len(kinds[number]) == 1 else None
            offset, rest = divmod(places[index], dtype.itemsize)
            if rest or (typed is None and keeps):
                raise _Rare
            make = memo.name(_UTILS, "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
            name, length = typed or "UntypedStorage", sizes[number] // (dtype.itemsize if typed else 1)
            stored = memo.once(number, functools.partial(storage, number, name, length))
            arguments = [stored, _int(offset), *layout, b"N"]
            if not typed:
                arguments.append(memo.name(*str(dtype).split(".")))
            if neg or conj:
                on = [
                    _text(text) + flag[True] + b"s" for text, set_ in (("conj", conj), ("neg", neg)) if set_
                ]
                arguments.append(b"}" + b"".join(on))
        code = make + _tuple(*arguments) + b"R"
        if is_parameter:
            code = memo.name(_UTILS, "_rebuild_parameter") + _tuple(code, flag[grad], b"N") + b"R"
        out.append(code + _pack(b"r", index))
    return b"".join((*out, b"e"))


def _as_torch_does(tree: Any) -> Content:
    """Return what a save of a tree with any tensors writes: they are pickled by torch's own code."""
    numbers: dict[int, int] = {}
    storages: list[torch.UntypedStorage] = []
    dtypes: dict[int, torch.dtype] = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: Any) -> Any:
            # as torch.save does; the public ways to ask a TypedStorage warn that the class will go
            if isinstance(thing, torch.storage.TypedStorage):
                typed: Any = thing
                storage, dtype = typed._untyped_storage, typed.dtype
                kind, length = getattr(torch, typed._pickle_storage_type()), typed._size()
            elif isinstance(thing, torch.UntypedStorage):
                storage, dtype = thing, torch.uint8
                kind, length = torch.UntypedStorage, thing.nbytes()
            else:
                return None
            address = storage.data_ptr()
            if address and storage.device.type != "meta" and dtypes.setdefault(address, dtype) != dtype:
                raise RuntimeError(
                    "tensors of different dtypes share memory, and with tensors such as sparse or quantized "
                    "ones or of a subclass in the same tree that cannot be saved; keep a clone() of one of them"
                )
            if id(storage) not in numbers:
                numbers[id(storage)] = len(storages)
                storages.append(storage)  # which keeps it, and the number its own
            return ("storage", kind, str(numbers[id(storage)]), "cpu", length)

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(tree)
    elsewhere = {
        number: torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        for number, storage in enumerate(storages)
        if storage.device.type != "cpu" and storage.nbytes()
    }
    addresses = np.array([storage.data_ptr() for storage in storages], dtype=np.int64)
    records = Records([storage.nbytes() for storage in storages])
    return Content(records, buffer.getvalue(), addresses, elsewhere, (tree, storages))
