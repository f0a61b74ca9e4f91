"""Clients in processes: what threads promise, the same bits, and what a killed one leaves."""

import os
import signal
import time

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedsys.errors import ConfigError
from fedsys.runtime.local import FIRST_NODE_ID, LocalGrid, check_pool
from fedsys.runtime.shared_memory import Region, arrays_in, kept, packed, read, tell, unpacked
from fedsys.transport import records
from tests.strategies.test_one_by_one import SMALL, played
from tests.waiting import until

pytestmark = [
    pytest.mark.usefixtures("identity"),
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux"),
]


def asking(count, content=None):
    content = content if content is not None else RecordDict()
    return [Message(content, FIRST_NODE_ID + k, "train") for k in range(count)]


def told(message, **values):
    return Message(RecordDict({"m": MetricRecord(values)}), reply_to=message)


def partition(context):
    return int(context.node_config["partition-id"])


def metrics(replies):
    return [r.error.reason if r.has_error() else dict(r.content["m"]) for r in replies]


# --------------------------------------------------------------------------------------------------
# What passes between processes

ARRAYS = hnp.arrays(
    st.sampled_from(["float32", "float64", "int64", "uint8", "bool"]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)
VALUES = st.one_of(st.integers(-(2**62), 2**62), st.floats(allow_nan=False), st.just([1.5, 2.0]))


@given(
    st.dictionaries(st.text(max_size=3), ARRAYS, max_size=4),
    st.dictionaries(st.text(min_size=1, max_size=3), VALUES, max_size=3),
)
def test_a_content_is_read_as_it_was_told(arrays, values):
    content = RecordDict({"a": records.record_of(arrays), "m": MetricRecord(values)})
    content["c"] = ConfigRecord({"b": b"\0", "s": "text", "yes": True, "many": ["x", "y"]})
    region = Region()
    places = {key: (1, place) for key, place in region.put(arrays_in([content])).items()}
    got = read(unpacked(packed(tell(content, places))), {1: region})
    assert list(got) == list(content)
    assert got["m"] == content["m"] and got["c"] == content["c"]
    assert [type(v) for v in got["m"].values()] == [type(v) for v in content["m"].values()]
    stays = kept(got)
    for record in (got["a"], stays["a"]):
        assert list(record) == list(content["a"])
        for name, array in record.items():
            assert array.data == content["a"][name].data
            assert array.numpy().tobytes() == arrays[name].tobytes()
            assert not records.view(array).flags.writeable
    assert records.size_of(got) == records.size_of(content)
    if arrays:
        region.put({k: np.zeros_like(a) for k, a in enumerate(arrays.values())})
    assert all(stays["a"][n].numpy().tobytes() == a.tobytes() for n, a in arrays.items())
    region.close()


# --------------------------------------------------------------------------------------------------
# The grid


def test_clients_are_in_processes_that_stay_and_replies_in_order():
    def client(message, context):
        time.sleep(0.01 * (4 - partition(context)))
        return told(message, pid=os.getpid(), k=partition(context))

    with LocalGrid(client, 4, workers=2, processes=True) as grid:
        first = metrics(grid.send_and_receive(asking(4)))
        second = metrics(grid.in_order(asking(4)))
    pids = {reply["pid"] for reply in first}
    assert len(pids) == 2 and os.getpid() not in pids
    assert {reply["pid"] for reply in second} <= pids
    assert [reply["k"] for reply in first] == [reply["k"] for reply in second] == [0, 1, 2, 3]
    for pid in pids:  # they are gone with the grid
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_arrays_go_both_ways_shared_or_of_one_client_alone():
    shared = records.record_of({"w": np.arange(5, dtype=np.float32), "n": np.asarray(7)})

    def client(message, context):
        arrays = {n: records.view(a) for n, a in message.content["shared"].items()}
        own = records.view(message.content["own"]["x"])
        arrays["w"] = arrays["w"] * own
        return Message(RecordDict({"a": records.record_of(arrays)}), reply_to=message)

    def messages():
        return [
            Message(
                RecordDict({"shared": shared, "own": records.record_of({"x": np.float32(k)})}),
                FIRST_NODE_ID + k, "train",
            )
            for k in range(12)
        ]  # fmt: skip

    with LocalGrid(client, 12, workers=2, processes=True) as grid:
        for replies in (grid.send_and_receive(messages()), grid.in_order(messages())):
            for k, reply in enumerate(replies):
                assert records.view(reply.content["a"]["w"]).tolist() == [0, k, 2 * k, 3 * k, 4 * k]
                assert records.view(reply.content["a"]["n"]).tolist() == 7
        kept_ = list(grid.send_and_receive(messages()))
        list(grid.in_order(messages()[:3]))
    assert records.view(kept_[11].content["a"]["w"]).tolist() == [0, 11, 22, 33, 44]


def test_errors_of_a_client_are_its_own():
    def client(message, context):
        if partition(context) == 1:
            raise ValueError("no data")
        if partition(context) == 2:
            raise SystemExit(3)
        return told(message, k=partition(context))

    with LocalGrid(client, 4, workers=2, processes=True) as grid:
        for replies in (grid.send_and_receive(asking(4)), grid.in_order(asking(4))):
            assert metrics(replies) == [{"k": 0}, "ValueError: no data", "SystemExit: 3", {"k": 3}]


def test_what_a_node_keeps_is_there_in_whatever_process_it_comes_to():
    def client(message, context):
        kept_ = context.state.metric_records.get("kept", MetricRecord({"n": 0}))
        number = int(kept_["n"]) + 1
        context.state["kept"] = MetricRecord({"n": number})
        context.state["array"] = records.record_of({"a": np.full(2, number)})
        if number > 1:
            assert context.state["array"]["a"].numpy().tolist() == [number, number]
        return told(message, n=number)

    with LocalGrid(client, 5, workers=2, processes=True) as grid:
        for turn in (1, 2, 3):
            assert metrics(grid.send_and_receive(asking(5))) == [{"n": turn}] * 5


def test_a_killed_process_costs_time_alone_and_a_client_that_kills_two_is_lost(tmp_path):
    def client(message, context):
        k = partition(context)
        if k == 1 and not (tmp_path / "once").exists():
            (tmp_path / "once").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if k == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return told(message, k=k)

    with LocalGrid(client, 6, workers=2, processes=True) as grid:
        got = metrics(grid.in_order(asking(6)))
        assert [r for k, r in enumerate(got) if k != 3] == [{"k": k} for k in (0, 1, 2, 4, 5)]
        assert got[3] == "RuntimeFailure: its worker process was killed by signal 9, twice"
        assert metrics(grid.send_and_receive(asking(3))) == [{"k": 0}, {"k": 1}, {"k": 2}]


def test_what_takes_too_long_is_answered_for_and_its_reply_dropped(tmp_path):
    def client(message, context):
        if partition(context) == 0 and not (tmp_path / "go").exists():
            until(lambda: (tmp_path / "go").exists())
        return told(message, k=partition(context))

    with LocalGrid(client, 2, workers=2, processes=True) as grid:
        got = metrics(grid.send_and_receive(asking(2), timeout=0.3))
        assert got == ["no reply within 0.3 s", {"k": 1}]
        (tmp_path / "go").touch()
        assert metrics(grid.send_and_receive(asking(2))) == [{"k": 0}, {"k": 1}]


def test_ctrl_c_in_the_middle_leaves_no_process():
    def client(message, context):
        if partition(context) == 1:
            time.sleep(60)
        return told(message, pid=os.getpid())

    with (
        pytest.raises(KeyboardInterrupt),
        LocalGrid(client, 3, workers=2, processes=True) as grid,
    ):
        for reply in grid.in_order(asking(3)):
            pid = int(reply.content["m"]["pid"])
            raise KeyboardInterrupt
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# --------------------------------------------------------------------------------------------------
# Runs


def test_the_bits_are_those_of_threads_and_of_one_worker(configure):
    config = configure(*SMALL, "strategy=fedadam", "client.keep_optimizer=true")
    one = played(config, one_by_one_=True, workers=1)
    assert played(config, one_by_one_=True, processes=True) == one
    assert played(config, one_by_one_=False, processes=True) == one


def test_processes_are_refused_where_they_would_be_something_else(configure):
    check_pool(configure(*SMALL, "runtime.pool=processes"))
    with pytest.raises(ConfigError, match=r"runtime.pool=processes: trains whole models only"):
        check_pool(configure(*SMALL, "runtime.pool=processes", "policy=fixed"))
    with pytest.raises(ConfigError, match=r"runtime.pool=forks: must be one of threads, processes"):
        configure("runtime.pool=forks")
