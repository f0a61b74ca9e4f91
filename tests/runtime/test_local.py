import threading

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity

from fedsys.errors import ConfigError
from fedsys.runtime import run
from fedsys.runtime.apps import load_apps, load_client
from fedsys.runtime.local import FIRST_NODE_ID, LocalGrid
from fedsys.transport import records

WAIT_S = 60.0
"""Longest time that a test waits for a thread, which means that it failed."""


def messages_to(count, content=None):
    """Return a message to each node, all with the same content, as Flower's strategies do."""
    content = content if content is not None else RecordDict()
    return [Message(content, FIRST_NODE_ID + k, "train") for k in range(count)]


def answer(message, value):
    return Message(RecordDict({"m": MetricRecord({"x": value})}), reply_to=message)


def values(replies):
    return [reply.content["m"]["x"] if reply.has_content() else None for reply in replies]


def partition(context):
    return int(context.node_config["partition-id"])


@pytest.fixture
def grid_of():
    """Return a function that makes a grid, which is closed at the end of the test."""
    grids = []

    def make(client, nodes, **arguments):
        grids.append(LocalGrid(client, nodes, **arguments))
        return grids[-1]

    yield make
    for grid in grids:
        grid.close()


# --------------------------------------------------------------------------------------------------
# Replies


def test_replies_have_the_order_of_the_messages_whoever_is_first(grid_of):
    last_is_done = threading.Event()

    def client(message, context):
        k = partition(context)
        if k == 3:
            last_is_done.set()
        elif k == 0:
            assert last_is_done.wait(WAIT_S)
        return answer(message, k)

    replies = list(grid_of(client, 4, workers=4).send_and_receive(messages_to(4)))
    assert values(replies) == [0, 1, 2, 3]
    assert [r.metadata.src_node_id - FIRST_NODE_ID for r in replies] == [0, 1, 2, 3]


def test_all_workers_work_at_the_same_time_and_no_more(grid_of):
    barrier, lock, running, most = threading.Barrier(3), threading.Lock(), [0], [0]

    def client(message, context):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        barrier.wait(WAIT_S)
        with lock:
            running[0] -= 1
        return answer(message, 0)

    assert len(list(grid_of(client, 6, workers=3).send_and_receive(messages_to(6)))) == 6
    assert most == [3]


def test_no_messages_have_no_replies(grid_of):
    assert list(grid_of(None, 2).send_and_receive([])) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ValueError("x is 3"), "ValueError: x is 3"), (SystemExit(4), "SystemExit: 4")],
)
def test_an_error_of_one_client_is_its_reply_and_the_worker_goes_on(grid_of, error, reason):
    def client(message, context):
        if partition(context) == 1:
            raise error
        return answer(message, partition(context))

    grid = grid_of(client, 3)
    for _ in range(2):
        replies = list(grid.send_and_receive(messages_to(3), timeout=WAIT_S))
        assert values(replies) == [0, None, 2]
        assert replies[1].error.reason == reason
        assert replies[1].metadata.reply_to_message_id


def test_a_client_that_returns_no_message_is_told_so(grid_of):
    [reply] = grid_of(lambda m, c: None, 1).send_and_receive(messages_to(1), timeout=WAIT_S)
    assert reply.error.reason == "TypeError: the client app returned None"


@pytest.mark.parametrize("by", ["absence", "time"])
def test_a_message_that_nobody_waits_for_any_more_keeps_no_worker(by, grid_of):
    """A device that left and arrived nowhere was left out, and kept its worker for the next rounds.

    With one worker nobody else trained until it gave up.
    """
    away, began = threading.Event(), threading.Event()

    def client(message, context):
        if partition(context) == 0 and not began.is_set():
            began.set()
            away.wait(WAIT_S)
        return answer(message, partition(context))

    grid = grid_of(client, 3, workers=1)
    grid.absent = lambda: {FIRST_NODE_ID: "gone"} if by == "absence" and began.is_set() else {}
    replies = list(grid.send_and_receive(messages_to(3), timeout=0.5 if by == "time" else WAIT_S))
    if by == "absence":  # the others of its round are asked all the same
        assert values(replies) == [None, 1, 2] and "gone" in replies[0].error.reason
    grid.absent = dict
    assert values(grid.send_and_receive(messages_to(3), timeout=WAIT_S)) == [0, 1, 2]
    away.set()
    assert values(grid.send_and_receive(messages_to(3), timeout=WAIT_S)) == [0, 1, 2]


def test_who_takes_too_long_is_answered_for_and_his_late_reply_is_dropped(grid_of):
    release, left = threading.Event(), threading.Event()

    def client(message, context):
        if partition(context) == 1 and not release.is_set():
            assert release.wait(WAIT_S)
            left.set()
            return answer(message, "late")
        return answer(message, partition(context))

    grid = grid_of(client, 3, workers=2)
    first = list(grid.send_and_receive(messages_to(3), timeout=0.01))
    assert first[1].error.reason == "no reply within 0.01 s"
    release.set()
    assert left.wait(WAIT_S)
    assert values(grid.send_and_receive(messages_to(3), timeout=WAIT_S)) == [0, 1, 2]
    assert first[1].has_error()


def test_messages_that_nobody_has_begun_are_not_begun_after_the_time_limit(grid_of):
    begun, release, done = [], threading.Event(), threading.Event()

    def client(message, context):
        begun.append(partition(context))
        assert release.wait(WAIT_S)
        done.set()
        return answer(message, 0)

    grid = grid_of(client, 3)
    replies = list(grid.send_and_receive(messages_to(3), timeout=0.01))
    assert all(reply.has_error() for reply in replies) and len(replies) == 3
    release.set()
    assert done.wait(WAIT_S)
    grid.close()
    assert begun == [0]


def test_pushed_messages_are_pulled_once(grid_of):
    grid = grid_of(lambda m, c: answer(m, partition(c)), 2)
    ids = list(grid.push_messages(messages_to(2)))
    assert len(set(ids)) == 2
    assert values(grid.pull_messages([ids[1], "unknown"])) == [1]
    assert values(grid.pull_messages(ids)) == [0]
    assert list(grid.pull_messages(ids)) == []


# --------------------------------------------------------------------------------------------------
# Nodes


def test_a_node_keeps_its_state_between_messages_and_shares_it_with_nobody(grid_of):
    def client(message, context):
        seen = context.state.metric_records.get("count", MetricRecord({"n": 0}))["n"]
        context.state["count"] = MetricRecord({"n": seen + partition(context)})
        return answer(message, seen)

    grid = grid_of(client, 3, workers=2)
    assert [values(grid.send_and_receive(messages_to(3))) for _ in range(3)] == [
        [0, 0, 0],
        [0, 1, 2],
        [0, 2, 4],
    ]


def test_a_context_tells_who_the_node_is_and_what_the_run_is(grid_of):
    seen = []

    def client(message, context):
        seen.append((context.node_id, dict(context.node_config), dict(context.run_config)))
        return answer(message, 0)

    grid = grid_of(client, 2, run_config={"hydra-config": "x"})
    list(grid.send_and_receive(messages_to(2)))
    ids = list(grid.get_node_ids())
    assert [node.node_id for node in grid.get_nodes()] == ids
    assert seen == [
        (node, {"partition-id": k, "num-partitions": 2}, {"hydra-config": "x"})
        for k, node in enumerate(ids)
    ]


def test_what_a_client_writes_into_its_message_no_other_client_and_no_server_sees(grid_of):
    def client(message, context):
        arrays = message.content.array_records["arrays"]
        config = message.content.config_records["config"]
        seen = float(arrays["w"].numpy().sum()) + config["lr"] + sum(config["steps"])
        arrays["w"].numpy()[:] = 99
        with pytest.raises(AttributeError, match="shared with other clients"):
            arrays["w"].data = b""
        arrays["w"] = records.encode(np.array([99.0]))
        config["lr"] = 99.0
        config["steps"].append(99)
        del message.content["config"]
        return answer(message, seen)

    content = RecordDict(
        {
            "arrays": records.record_of({"w": np.array([1.0, 2.0])}),
            "config": ConfigRecord({"lr": 0.5, "steps": [1, 2]}),
        }
    )
    grid = grid_of(client, 4)
    for _ in range(2):
        assert values(grid.send_and_receive(messages_to(4, content))) == [6.5] * 4
    assert content["arrays"]["w"].numpy().tolist() == [1.0, 2.0]
    assert dict(content["config"]) == {"lr": 0.5, "steps": [1, 2]}


# --------------------------------------------------------------------------------------------------
# The end


def test_a_closed_grid_has_no_threads_left():
    before = set(threading.enumerate())
    with LocalGrid(lambda m, c: answer(m, 0), 2, workers=3) as grid:
        assert len(set(threading.enumerate()) - before) == 3
        list(grid.send_and_receive(messages_to(2)))
    assert set(threading.enumerate()) <= before


def test_closing_does_not_wait_for_ever_for_a_client_that_hangs(monkeypatch):
    monkeypatch.setattr("fedsys.runtime.local.CLOSE_S", 0.01)
    release = threading.Event()

    def client(message, context):
        release.wait(WAIT_S)
        return answer(message, 0)

    with LocalGrid(client, 1) as grid:
        list(grid.send_and_receive(messages_to(1), timeout=0.01))
        stuck = grid._threads[0]  # another has taken its place
    assert stuck.is_alive() and stuck.daemon
    release.set()
    stuck.join(WAIT_S)
    assert not stuck.is_alive()


# --------------------------------------------------------------------------------------------------
# What is private in Flower


def test_flower_takes_the_identity_of_a_process_from_where_it_is_put(grid_of):
    grid_of(None, 1)
    assert grid_of(None, 1).run.run_id == TaskIdentity.run_id == 1
    message = grid_of(None, 1).create_message(RecordDict(), "train", 5, "group")
    assert message.metadata.run_id == 1
    assert message.metadata.src_node_id == SUPERLINK_NODE_ID
    assert (message.metadata.dst_node_id, message.metadata.group_id) == (5, "group")


def test_flower_takes_the_id_of_a_message_from_where_it_is_put(grid_of):
    seen = []

    def client(message, context):
        seen.append(message.metadata.message_id)
        return answer(message, 0)

    grid = grid_of(client, 2)
    replies = [*grid.send_and_receive(messages_to(2)), *grid.send_and_receive(messages_to(2))]
    assert [reply.metadata.reply_to_message_id for reply in replies] == seen
    assert len(set(seen)) == 4 and all(seen)


def test_flowers_records_keep_their_values_where_they_are_looked_for():
    record = records.record_of({"w": np.arange(3.0)})
    usual = ArrayRecord({"w": Array(np.arange(3.0))})
    assert record == usual and record.object_id == usual.object_id
    content = records.own_copy(RecordDict({"a": record}))
    assert content["a"] is not record and content["a"]["w"] is record["w"]
    assert content.object_id == RecordDict({"a": usual}).object_id


# --------------------------------------------------------------------------------------------------
# Apps


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("apps.server=nowhere.app:app", r"apps\.server=nowhere\.app:app: cannot be imported \(No"),
        ("apps.client=clients.app:nothing", r"apps\.client=clients\.app:nothing: cannot be import"),
        ("apps.server=clients.app:app", r"apps\.server=.*: must name a Flower ServerApp"),
    ],
)
def test_a_name_that_leads_to_no_app_is_refused(configure, override, rule):
    with pytest.raises(ConfigError, match=rule):
        load_apps(configure(override))


def test_an_unknown_runtime_is_refused(configure):
    with pytest.raises(ConfigError, match=r"runtime\.kind=cloud: must be one of local, simul"):
        run(configure("runtime.kind=cloud"))
    assert load_client("clients.app") is load_client("clients.app:app")
