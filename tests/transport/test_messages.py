"""What messages carry: records that both sides read alike, and one error where they do not."""

import ast
import dataclasses
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedsys.errors import RuntimeFailure
from fedsys.planning.assignment import Assignment
from fedsys.planning.resources import Observation
from fedsys.transport import messages
from fedsys.transport.messages import (
    Division,
    Identity,
    Outcome,
    Place,
    Probe,
    Settings,
    TraceRecord,
    Truncated,
    read,
    written,
)

KINDS = [Settings, Division, Identity, Place, Outcome, TraceRecord, Observation]
TEXT = st.text("aé_-\n0", max_size=8)
VALUES = {
    "int": st.integers(-(2**63), 2**63 - 1),
    "float": st.floats(allow_nan=False),
    "str": TEXT,
    "bytes": st.binary(),
    "tuple[str, ...]": st.lists(TEXT, min_size=1).map(tuple),
    "tuple[float, ...]": st.lists(st.floats(allow_nan=False), min_size=1).map(tuple),
}


def records(kind):
    fields = {f.name: VALUES[f.type.removesuffix(" | None")] for f in dataclasses.fields(kind)}
    return st.builds(kind, **fields)


@given(st.sampled_from(KINDS).flatmap(records))
def test_what_one_side_writes_the_other_reads(value):
    sent = RecordDict({"one": ConfigRecord(written(value))})
    assert read(type(value), sent.config_records["one"]) == value


def test_what_is_not_told_is_left_out_and_has_its_default():
    assert written(Settings(2)) == {
        "server-round": 2, "proximal-mu": 0.0, "expected": 0.0, "noise": 0.0,
    }  # fmt: skip
    assert read(Settings, {"server-round": 2}) == Settings(2)
    assert written(Identity(1)) == {"partition-id": 1, "arithmetic": ""}


def test_the_keys_are_those_of_the_wire():
    """Nodes of other versions take part in a run: its messages keep their keys."""
    assert messages.MICRO_BATCHES in written(Settings(1, micro_batches=4))
    assert [*written(Division(3)), *written(Place(5, "s", "t", ("a",)))] == [
        *("num-clients", "tail", "session", "token", "edges")
    ]
    assert list(Assignment(3).to_record()) == ["cut", "codec-up", "codec-down"]
    assert {*written(Observation()), *written(Outcome())} == {
        *("steps", "seconds", "waited-s", "bytes-up", "bytes-down", "recoveries", "stranded"),
        *("iteration-s", "compute-s", "edge-s", "up-bit-s", "down-bit-s", "probe-bytes"),
        *("edge", "moves", "gradient-share"),
    }
    assert {*written(Truncated(5)), *written(Probe(1, "t", ()))} == {
        *("iterations", "nbytes", "token", "edges"),
    }
    assert list(written(TraceRecord(b""))) == ["events", "ends", "late"]


@pytest.mark.parametrize(
    ("kind", "record", "error"),
    [
        (Settings, {}, "server-round=None: must be of type int in Settings"),
        (Settings, {"server-round": "1"}, "server-round='1': must be of type int"),
        (Settings, {"server-round": True}, "server-round=True: must be of type int"),
        (Settings, {"server-round": 1, "proximal-mu": "x"}, "proximal-mu='x': must be of type fl"),
        (TraceRecord, {"events": "text"}, "events='text': must be of type bytes"),
        (Place, {"tail": 1, "session": "", "token": "", "edges": [1]}, r"edges=\[1\]: must be of"),
    ],
)
def test_a_key_that_is_missing_or_ill_typed_is_one_error(kind, record, error):
    """A typo on one side was a silent default on the other."""
    with pytest.raises(RuntimeFailure, match=error):
        read(kind, record)


def test_a_device_tells_what_it_did_or_it_is_an_error():
    with pytest.raises(RuntimeFailure, match="steps=None: must be of type int in Observation"):
        Observation.of({"seconds": 1.0})
    with pytest.raises(RuntimeFailure, match="steps='many': must be a number"):
        messages.number({"steps": "many"}, "steps")


@given(st.integers(0, 99), st.integers(1, 99), st.sampled_from(["fp32", "int8"]))
def test_a_device_learns_all_that_was_decided_but_its_edge(cut, pieces, codec):
    decided = Assignment(cut, 0, codec, "bf16", pieces)
    assert Assignment.of(decided.to_record(), pieces) == decided


def spelled(tree):
    """Return the names of records that code spells where it looks one up or makes a content."""
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(ast.Attribute(_, attr), ast.Constant(str(name))):
                pass
            case ast.Call(
                ast.Attribute(ast.Attribute(_, attr), "get"), [ast.Constant(str(name)), *_]
            ):
                pass
            case ast.Call(ast.Name("RecordDict"), [ast.Dict(keys)]):
                yield from (key.value for key in keys if isinstance(key, ast.Constant))
                continue
            case _:
                continue
        if attr == "content" or attr.endswith("_records"):
            yield name


def test_neither_side_spells_the_name_of_a_record():
    root = Path(__file__).parents[2]
    paths = [
        p for folder in ("fedsys", "strategies", "clients") for p in root.glob(f"{folder}/**/*.py")
    ]
    found = {str(p.relative_to(root)): [*spelled(ast.parse(p.read_text()))] for p in paths}
    assert {path: names for path, names in found.items() if names} == {}
    code = "a.content['b']; c.array_records.get('d', 1); RecordDict({'e': 2}); f.content[G]"
    assert sorted(spelled(ast.parse(code))) == ["b", "d", "e"]


def test_records_of_one_kind_are_those_that_flower_shows_and_nothing_is_written_back():
    content = RecordDict({"m": MetricRecord({"x": 1}), "c": ConfigRecord({"y": 2})})
    content["n"] = MetricRecord({"z": 3.0})
    assert messages.of_kind(content, MetricRecord) == dict(content.metric_records)
    assert messages.of_kind(content, ConfigRecord) == dict(content.config_records)
    messages.of_kind(content, MetricRecord).clear()
    assert list(content) == ["m", "c", "n"]
