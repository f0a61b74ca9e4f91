"""Model states as Flower records, and back, without the copies that are not needed.

Flower stores an array as the bytes of a ``.npy`` file. The same bytes are written and read here,
so records are exchangeable with any Flower app; only the way is shorter: one copy to encode, none
to look at a received array.

In one process, many clients receive the same record. `SealedArray` makes that safe without a copy
for each of them: it cannot be changed, and hands out fresh arrays to whoever wants to write.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsys.errors import ModelError
from fedsys.transport.messages import of_kind

State = Mapping[str, Tensor]
"""Tensors by their global name in the model: parameters and buffers."""

Record = ArrayRecord | MetricRecord | ConfigRecord

A = TypeVar("A", bound=Array)
R = TypeVar("R", bound=ArrayRecord | MetricRecord | ConfigRecord | RecordDict)

_NUMPY = "numpy.ndarray"

_HOLDS = "buifc"
"""NumPy's letters for kinds of numbers: each can hold those before it, if not every value."""


@functools.lru_cache(maxsize=4096)
def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return the ``.npy`` header of a C-contiguous array."""
    buffer = io.BytesIO()
    description = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


# NumPy composes the name of a type, and looks a name up, in several microseconds each.
_name = functools.lru_cache(maxsize=256)(str)
_dtype: Callable[[str], np.dtype[Any]] = functools.lru_cache(maxsize=256)(np.dtype)


def _make(kind: type[A], dtype: str, shape: tuple[int, ...], data: bytes) -> A:
    """Return an array of `kind` over `data`, past the checks of Flower's constructor."""
    new = object.__new__(kind)
    new.__dict__.update(dtype=dtype, shape=shape, stype=_NUMPY, data=data)
    return new


def encode(array: NDArray[Any]) -> Array:
    """Encode a NumPy array with one copy; the bytes are those of `numpy.save`.

    Raises:
        ModelError: The array holds Python objects, whose bytes would be addresses.
    """
    array = np.asarray(array, order="C")
    if array.dtype.hasobject:
        raise ModelError(f"array of type {array.dtype}: must hold numbers, not Python objects")
    head = _header(array.dtype, array.shape)
    body = array.reshape(-1).view(np.uint8).data if array.size else b""
    return _make(Array, _name(array.dtype), array.shape, b"".join((head, body)))


def view(array: Array) -> NDArray[Any]:
    """Return the array over the received bytes: read-only, nothing is copied.

    Raises:
        ModelError: The array was not serialised by NumPy, or its bytes do not fit its shape.
    """
    if type(array) is MappedArray:
        return array.mapped
    if array.stype != _NUMPY:
        raise ModelError(f"array of serialisation type {array.stype!r}: must be {_NUMPY!r}")
    try:
        dtype = _dtype(array.dtype)
        head = _header(dtype, tuple(array.shape))
        if not array.data.startswith(head):  # Fortran order, or a writer with another header
            loaded: NDArray[Any] = np.load(io.BytesIO(array.data), allow_pickle=False)
            loaded.flags.writeable = False
            return loaded
        flat: NDArray[Any] = np.frombuffer(array.data, dtype, offset=len(head))
        return flat.reshape(array.shape)
    except (ValueError, TypeError, EOFError) as error:
        kind = f"{array.dtype} of shape {list(array.shape)}"
        raise ModelError(f"{kind}: {len(array.data)} bytes do not hold it ({error})") from error


def array_of(file: bytes) -> Array:
    """Return an array over the bytes of a ``.npy`` file, which say its type and shape.

    Raises:
        ModelError: The bytes are not such a file.
    """
    try:
        stream = io.BytesIO(file)
        np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    except ValueError as error:
        raise ModelError(f"an array cannot be read: {error}") from error
    return _make(Array, str(dtype), shape, file)


class SealedArray(Array):
    """A Flower array that cannot be changed, so that clients of one process can share it.

    It stays in its process: Flower sends arrays by the name of their class.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("dtype", "shape", "stype", "data"):
            raise AttributeError(
                f"{name}: this array is shared with other clients; put a new Array into your record"
            )
        super().__setattr__(name, value)

    def numpy(self) -> NDArray[Any]:
        """Return a fresh, writable copy of the array."""
        return view(self).copy()


class ViewArray(SealedArray):
    """A sealed array whose `numpy` is the read-only view: for strategies, which only read."""

    def numpy(self) -> NDArray[Any]:
        """Return the array over the received bytes: read-only, nothing is copied."""
        return view(self)


class MappedArray(SealedArray):
    """A sealed array over memory that another process wrote; as bytes only if somebody asks.

    Attributes:
        mapped: The array, read-only.
    """

    mapped: NDArray[Any]

    @property
    def data(self) -> bytes:  # type: ignore[override]  # the field of Flower's dataclass
        """The bytes of a ``.npy`` file."""
        return encode(self.mapped).data


def record_over(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """Return a record of sealed arrays over these, of which nothing is copied."""
    record: dict[str, Array] = {}
    for name, array in arrays.items():
        record[name] = new = object.__new__(MappedArray)
        new.__dict__.update(dtype=_name(array.dtype), shape=array.shape, stype=_NUMPY, mapped=array)
    return _record(record)


def lasting(record: ArrayRecord) -> ArrayRecord:
    """Return the record, or one that stays what it is where others will write into its memory."""
    if not any(type(array) is MappedArray for array in record.values()):
        return record
    return record_of(arrays_of(record))


def _as(kind: type[A], record: ArrayRecord) -> ArrayRecord:
    """Return a record of arrays of `kind` over the same bytes."""
    return _record(
        {
            name: array
            if type(array) is kind or type(array) is MappedArray
            else _make(kind, array.dtype, array.shape, array.data)
            for name, array in record.items()
        }
    )


def to_record(state: State) -> ArrayRecord:
    """Encode a state; every tensor is copied once, whatever its device or memory format.

    Raises:
        ModelError: A tensor has a type that NumPy does not know, such as bfloat16.
    """
    return record_of({name: _to_numpy(name, tensor) for name, tensor in state.items()})


def _to_numpy(name: str, tensor: Tensor) -> NDArray[Any]:
    try:
        array: NDArray[Any] = tensor.numpy(force=True)
    except TypeError as error:
        raise ModelError(
            f"{name}: {tensor.dtype} cannot be sent in a Flower record; convert it to float32"
        ) from error
    return array


def record_of(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """Encode NumPy arrays by name."""
    return _record({name: encode(array) for name, array in arrays.items()})


def select(record: ArrayRecord, names: Container[str]) -> tuple[ArrayRecord, ArrayRecord]:
    """Return two records over the same arrays: those in `names`, and the others."""
    chosen: dict[str, Array] = {}
    others: dict[str, Array] = {}
    for name, array in record.items():
        (chosen if name in names else others)[name] = array
    return _record(chosen), _record(others)


def joined(record: ArrayRecord, other: ArrayRecord) -> ArrayRecord:
    """Return a record over the arrays of `record`, in its order, or those of `other` if it has."""
    return _record({name: other.get(name, array) for name, array in record.items()})


def _record(arrays: dict[str, Any]) -> ArrayRecord:
    """Return a record that holds exactly these arrays; Flower's constructor would copy each."""
    record = ArrayRecord()
    record.__dict__["_data"] = arrays
    return record


def arrays_of(record: ArrayRecord) -> dict[str, NDArray[Any]]:
    """Return read-only arrays over the record's bytes.

    Raises:
        ModelError: Names an array whose bytes are not what it says.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for name, array in record.items():
        try:
            arrays[name] = view(array)
        except ModelError as error:
            raise ModelError(f"{name}: {error}") from error
    return arrays


def from_record(record: ArrayRecord) -> dict[str, Tensor]:
    """Decode a state into tensors of its own memory."""
    return {name: torch.from_numpy(array.copy()) for name, array in arrays_of(record).items()}


def load_into(model: nn.Module, record: ArrayRecord, names: Container[str] | None = None) -> None:
    """Copy a record into the parameters and buffers of `model`, by name.

    Args:
        model: What it is copied into.
        record: Arrays by name.
        names: Those that it must have; None: all of the model.

    Raises:
        ModelError: Names every tensor that is missing, unexpected, or of another shape, or one
            whose type does not fit.
    """
    own: State = model.state_dict()  # detached, over the memory of the model
    if names is not None:
        own = {name: tensor for name, tensor in own.items() if name in names}
    arrays = arrays_of(record)
    if not all(name in arrays and fits(arrays[name], tensor) for name, tensor in own.items()) or (
        len(arrays) > len(own)
    ):
        _refuse(own, arrays)
    for name, tensor in own.items():
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            np.copyto(tensor.numpy(), arrays[name], casting="same_kind")
        else:
            tensor.copy_(torch.from_numpy(arrays[name].copy()))


def fits(array: NDArray[Any], tensor: Tensor) -> bool:
    """Return whether an array can be copied into a tensor: same shape, and a type that holds it."""
    return array.shape == tensor.shape and array.dtype.kind in _HOLDS[: _rank(tensor.dtype) + 1]


def _refuse(own: State, arrays: Mapping[str, NDArray[Any]]) -> NoReturn:
    problems = differences(
        {name: tuple(t.shape) for name, t in own.items()},
        {name: array.shape for name, array in arrays.items()},
    )
    problems += [
        f"{name} is {array.dtype}, which {own[name].dtype} cannot hold"
        for name, array in sorted(arrays.items())
        if name in own and array.dtype.kind not in _HOLDS[: _rank(own[name].dtype) + 1]
    ]
    raise ModelError("the received state does not fit the model: " + "; ".join(problems))


@functools.lru_cache(maxsize=64)
def _rank(dtype: torch.dtype) -> int:
    """Return the place in `_HOLDS` of the kind of number that a tensor of `dtype` holds."""
    if dtype == torch.bool:
        return _HOLDS.index("b")
    kind = "c" if dtype.is_complex else "f" if dtype.is_floating_point else "i"
    return _HOLDS.index(kind)


def differences(
    own: Mapping[str, tuple[int, ...]], other: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Describe every difference of names and shapes between two states, in order of name."""
    problems = [f"{name} is missing" for name in sorted(own.keys() - other.keys())]
    problems += [f"{name} is unexpected" for name in sorted(other.keys() - own.keys())]
    problems += [
        f"{name} has shape {list(other[name])} instead of {list(own[name])}"
        for name in sorted(own.keys() & other.keys())
        if tuple(own[name]) != tuple(other[name])
    ]
    return problems


# --------------------------------------------------------------------------------------------------
# Sharing records between the clients of one process


def sealed(content: RecordDict) -> RecordDict:
    """Return the same records with every array sealed; metrics and settings are not copied."""
    return _content(
        (
            name,
            _as(SealedArray, record) if isinstance(record, ArrayRecord) else record,
        )
        for name, record in content.items()
    )


def own_copy(content: RecordDict) -> RecordDict:
    """Return records of the receiver's own over the sender's sealed arrays and plain values."""
    own = {name: _own(record) for name, record in content.__dict__["_data"].items()}
    return _like(content, own)


def _own(record: Record) -> Record:
    if isinstance(record, ArrayRecord):
        return _like(record, dict(record.__dict__["_data"]))
    # Lists are the only values that can be written into.
    values = record.__dict__["_data"].items()
    return _like(record, {k: list(v) if isinstance(v, list) else v for k, v in values})


def _like(record: R, values: dict[Any, Any]) -> R:
    """Return a record of the same kind over these values, past the checks of its constructor."""
    new = object.__new__(type(record))
    new.__dict__.update(record.__dict__)
    new.__dict__["_data"] = values
    return new


def unchecked(kind: type[R], values: Mapping[str, Any]) -> R:
    """Return a record of settings or figures past the checks of each key and value.

    For what is known to be right: the checks take longer than a tiny model's step.
    """
    record = kind()
    record.__dict__["_data"] = dict(values)
    return record


def readable(record: ArrayRecord) -> ArrayRecord:
    """Return a record whose `numpy` calls copy nothing, for code that only reads."""
    return _as(ViewArray, record)


def writable(record: ArrayRecord) -> ArrayRecord:
    """Return a record whose `numpy` calls give fresh arrays, for code that writes into them."""
    return _as(SealedArray, record)


def _content(
    records: Iterable[tuple[str, Record]],
) -> RecordDict:
    content = RecordDict()
    content.__dict__["_data"] = dict(records)
    return content


def size_of(content: RecordDict) -> int:
    """Return the bytes of all arrays in a message's content."""
    found = of_kind(content, ArrayRecord).values()
    return sum(_file_size(array) for record in found for array in record.values())


def _file_size(array: Array) -> int:
    if type(array) is MappedArray:
        mapped = array.mapped
        return len(_header(mapped.dtype, mapped.shape)) + mapped.nbytes
    return len(array.data)
