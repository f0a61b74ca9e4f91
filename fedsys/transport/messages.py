"""What messages between server app and clients carry: the names of records, and what is in them.

A record of settings or figures is a frozen dataclass that both sides share. `written` gives the
values of its Flower record, whose keys are the names of the attributes with hyphens; `read` takes
them in again. So neither side spells a key, and one that is missing or ill-typed is one error.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from fedsys.errors import RuntimeFailure

if TYPE_CHECKING:
    from flwr.app import RecordDict

T = TypeVar("T")

ARRAYS: Final = "arrays"
OPTIMIZER: Final = "optimizer"
MASKS: Final = "masks"
"""Records of arrays: model, state of its optimizer, what is pruned of it."""

METRICS: Final = "metrics"
NUM_EXAMPLES: Final = "num-examples"
STEPS: Final = "steps"
"""The record of figures of a reply, and two of them that the server app counts on."""

CONFIG: Final = "config"
FEDERATION: Final = "federation"
IDENTITY: Final = "identity"
ASSIGNMENT: Final = "assignment"
OBSERVATION: Final = "observation"
TRACE: Final = "trace"
TRUNCATED: Final = "truncated"
PROBE: Final = "probe"
FAULTS: Final = "faults"
MOVES: Final = "moves"
"""Records with a dataclass: below, in `fedsys.planning`, and in `fedsys.faults`."""

MICRO_BATCHES: Final = "micro-batches"
STRUCK: Final = "struck"
PARTITION_ID: Final = "partition-id"
DATA_ROOT: Final = "data-root"
"""Keys that stand alone: in `CONFIG`, in `FAULTS` of a reply, in the configuration of a node."""


TRUNCATED_ROUND: Final = "query.truncated_round"
"""Message type of a round of a few mini-batches, of which nothing comes back but an observation."""


@dataclass(frozen=True, slots=True)
class Settings:
    """`CONFIG`: round from 1, weight of FedProx's term, pieces of a mini-batch if not as usual.

    With privacy by example also deviation of the noise, over the largest norm, and examples of a
    mini-batch on average.
    """

    server_round: int
    proximal_mu: float = 0.0
    micro_batches: int | None = None
    noise: float = 0.0
    expected: float = 0.0


@dataclass(frozen=True, slots=True)
class Division:
    """`FEDERATION`: among how many clients the data are divided."""

    num_clients: int


@dataclass(frozen=True, slots=True)
class Identity:
    """`IDENTITY`: a node's partition, what bits depend on there (JSON), and data of its own."""

    partition_id: int
    arithmetic: str = ""
    data_root: str | None = None
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """`ASSIGNMENT`, beside the decision: where the edge's units end, its session, its addresses."""

    tail: int
    session: str
    token: str
    edges: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Itinerary:
    """`MOVES`: moves of the device in the round (JSON), and the addresses of all edge servers.

    With `restart` its round begins anew at each edge server that it comes to; without `armed` it
    leaves no poor link before that was good.
    """

    moves: str
    edges: tuple[str, ...]
    restart: bool = False
    armed: bool = True


@dataclass(frozen=True, slots=True)
class Truncated:
    """`TRUNCATED`: after how many mini-batches a round is over."""

    iterations: int


@dataclass(frozen=True, slots=True)
class Probe:
    """`PROBE`: bytes each way to measure a link with, and an edge server that expects it."""

    nbytes: int
    token: str
    edges: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """`OBSERVATION`, beside the figures: what became of links and edges.

    Losses overcome (JSON), why no edge is left, if so, the address of the edge at which the session
    ended, and what became of moves (JSON).
    """

    recoveries: str = "[]"
    stranded: str = ""
    edge: str = ""
    moves: str = "[]"


@dataclass(frozen=True, slots=True)
class TraceRecord:
    """`TRACE`: packed events, ends of mini-batches in seconds, seconds behind what is emulated."""

    events: bytes
    ends: tuple[float, ...] = ()
    late: float = 0.0


_KINDS: Final[Any] = {"int": int, "float": int | float, "str": str, "bytes": bytes, "bool": bool}


def written(value: Any) -> dict[str, Any]:
    """Return the values of a dataclass by key, for a record; what is None is left out.

    >>> written(Settings(3, 0.1))
    {'server-round': 3, 'proximal-mu': 0.1}
    """
    values = {field.key: getattr(value, field.name) for field in _fields(cast(Any, type(value)))}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None}


@dataclass(frozen=True, slots=True)
class _Field:
    """An attribute: its key in a record, whether it may be missing, and its type."""

    name: str
    key: str
    optional: bool
    kind: str


@functools.cache
def _fields(kind: Any) -> tuple[_Field, ...]:
    """Return the attributes of a dataclass; looked up once, as each message of each client asks."""
    return tuple(
        _Field(
            field.name,
            _key(field.name),
            field.default is not dataclasses.MISSING,
            str(field.type).removesuffix(" | None"),
        )
        for field in dataclasses.fields(kind)
    )


def read(
    kind: type[T], record: Mapping[str, Any], *, required: Container[str] = (), **known: Any
) -> T:
    """Return what `written` made a record of; keys that `kind` does not know are not looked at.

    >>> read(Settings, {"server-round": 3, "of-another": 1})
    Settings(server_round=3, proximal_mu=0.0, micro_batches=None)

    Args:
        kind: The dataclass.
        record: The record.
        required: Attributes that must be told although they have a default.
        known: Attributes that are known already, and not looked up.

    Raises:
        RuntimeFailure: A key is missing, or its value of another type.
    """
    for field in _fields(cast(Any, kind)):
        name, key = field.name, field.key
        if name in known or (field.optional and key not in record and name not in required):
            continue
        value = record.get(key)
        if not _is(value, field.kind):
            raise RuntimeFailure(
                f"message: {key}={value!r:.60}: must be of type {field.kind} in {kind.__name__}; "
                "is the other side of another version?"
            )
        known[name] = tuple(value) if isinstance(value, list) else value
    return kind(**known)


def of_kind(content: RecordDict, kind: type[T]) -> dict[str, T]:
    """Return the records of one kind by name, only to be read.

    Flower's own views (``content.config_records`` and so on) write each record back and check it:
    three of them for each message were a tenth of a round with a tiny model.
    """
    return {name: record for name, record in content.items() if isinstance(record, kind)}


def settings_of(content: RecordDict) -> Settings:
    """Return the settings of a message.

    Raises:
        RuntimeFailure: A key is missing, or its value of another type.
    """
    return read(Settings, cast(Any, content.get(CONFIG, {})))


def number(record: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Return a number of a record.

    Raises:
        RuntimeFailure: There is none and no default, or it is something else.
    """
    value = record.get(key, default)
    if not _is(value, "float"):
        raise RuntimeFailure(f"message: {key}={value!r:.60}: must be a number")
    return cast(float, value)


def _key(name: str) -> str:
    return name.replace("_", "-")


def _is(value: object, kind: str) -> bool:
    if kind.startswith("tuple["):
        inner = kind.removeprefix("tuple[").removesuffix(", ...]")
        return isinstance(value, list | tuple) and all(_is(v, inner) for v in value)
    return isinstance(value, _KINDS[kind]) and isinstance(value, bool) == (kind == "bool")
