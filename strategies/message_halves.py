"""The content of messages of split training: halves of a model, by the names of the whole.

The names of what a client keeps beside the model (optimizer state, masks) begin with those of
parameters, before a ``|``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedsys.errors import ConfigError, ModelError
from fedsys.transport import records
from fedsys.transport.messages import CONFIG, MICRO_BATCHES


def halved(content: RecordDict, key: str, names: set[str]) -> ArrayRecord:
    """Return of a record, if there is one, what belongs to some names."""
    record = content.array_records.get(key, ArrayRecord())
    return ArrayRecord({n: a for n, a in record.items() if n.partition("|")[0] in names})


def without(content: RecordDict, key: str, names: set[str]) -> ArrayRecord:
    """Return of a record what does not belong to some names."""
    record = content.array_records[key]
    return ArrayRecord({n: a for n, a in record.items() if n.partition("|")[0] not in names})


def joined(own: ArrayRecord, edge: Mapping[str, Any], order: list[str] | None) -> ArrayRecord:
    """Return both halves in one record, in the given order of names, or sorted."""
    other = records.to_record(edge)
    both = set(own) & set(other)
    if both:
        raise ModelError(f"in both halves: {', '.join(sorted(both)[:5])}")
    names = order if order is not None else sorted({*own, *other})
    return ArrayRecord({name: own[name] if name in own else other[name] for name in names})


def with_pieces(content: RecordDict, pieces: int | None, batch_size: int) -> RecordDict:
    """Return the content with the pieces of a mini-batch; None: those of the run, as it is.

    Raises:
        ConfigError: There are more pieces than examples in a mini-batch.
    """
    if pieces is None:
        return content
    if not 1 <= pieces <= batch_size:
        raise ConfigError.of(
            "policy.micro_batches", pieces, f"must be from 1 to client.batch_size={batch_size}"
        )
    own = records.own_copy(content)
    settings = dict(content.config_records.get(CONFIG, ConfigRecord()))
    own[CONFIG] = ConfigRecord({**settings, MICRO_BATCHES: pieces})
    return own
