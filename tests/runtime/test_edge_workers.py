"""Sessions in worker processes of their edge server: same bits, moves, kills, and no orphans."""

import dataclasses
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from fedsys.commands.bench.rounds import edge_process
from fedsys.commands.edge import _workers, moved
from fedsys.config import EdgeAddress, EdgeConfig, with_values
from fedsys.errors import ConfigError, RuntimeFailure, SessionError
from fedsys.offload import edge as edge_module
from fedsys.offload.edge import EdgeServer
from fedsys.offload.edge_metrics import EdgeCollector
from fedsys.offload.fleet import Fleet
from fedsys.offload.processors import usable_cores
from fedsys.offload.remote import Moved, Remote
from fedsys.planning.moves import Move
from fedsys.runtime import edge_workers
from fedsys.runtime.edge_workers import EdgeWorkers
from fedsys.transport.addresses import dial
from fedsys.transport.link_around import LinkAround
from fedsys.transport.wire import decode
from tests.devices import device, is_trained, train
from tests.moving import Listed
from tests.small_runs import SMALL
from tests.waiting import until

TOKEN = "control"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sockets are sent to processes")


@contextmanager
def served(**counts):
    """Start edge servers by name, each with so many worker processes; yield them and a fleet."""
    edges = {}
    try:
        for name, count in counts.items():
            workers = EdgeWorkers(count, name) if count > 1 else None
            edges[name] = EdgeServer(
                name, "tcp://127.0.0.1:0", control_token=TOKEN, workers=workers
            )
        addresses = [EdgeAddress(name, edge.address) for name, edge in edges.items()]
        with Fleet(addresses, control_token=TOKEN) as fleet:
            yield edges, fleet
    finally:
        for edge in edges.values():
            edge.kill()


def pids(edge):
    return edge._processes.pids


def living(listed):
    """Return those of some processes that have not ended; zombies have."""
    found = []
    for pid in listed:
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX":
            found.append(pid)
    return found


def test_sessions_go_where_the_fewest_are_move_between_processes_and_end_with_them(last_layer):
    with served(a=2, b=2) as (edges, fleet):
        names = ["s", "t", "u", "v"]
        for name in names:
            fleet.open(last_layer.spec(name), last_layer.start(), "a")
        workers = edges["a"]._processes
        assert [worker.load for worker in workers._workers] == [2, 2]
        remotes = {name: device(edges, name) for name in names}
        for remote in remotes.values():
            remote.open()
            train(remote, last_layer, range(2))
        moved(EdgeConfig(address=edges["a"].address, control_token=TOKEN, move={"to": "b"}))
        until(lambda: sorted(edges["b"].sessions) == names)
        for name, remote in remotes.items():
            train(remote, last_layer, range(2, 4))
            assert is_trained(last_layer, fleet.collect(name, "b"), 4)
            assert [leaving.how for leaving in remote.traffic.moves] == ["commanded"]
        until(lambda: [worker.load for worker in workers._workers] == [0, 0])
        metrics = {
            sample.name: sample.value
            for metric in EdgeCollector(edges["b"]).collect()
            for sample in metric.samples
            if not sample.labels
        }
        assert metrics["fedsys_edge_workers"] == 2
        assert metrics["fedsys_edge_steps_total"] == 8
        assert metrics["fedsys_edge_workers_cpu_seconds_total"] > 0
        assert metrics["fedsys_edge_workers_resident_memory_bytes"] > 1 << 20
        all_of_them = pids(edges["a"]) + pids(edges["b"])
        assert len(set(all_of_them)) == len(living(all_of_them)) == 4
    until(lambda: not living(all_of_them))


def test_a_worker_that_is_killed_ends_its_sessions_and_no_others(last_layer):
    """As an edge server that is killed: they are opened anew, in a process that is new."""
    with served(a=2) as (edges, fleet):
        for name in ("s", "t"):
            fleet.open(last_layer.spec(name), last_layer.start(), "a")
        remotes = {name: device(edges, name) for name in ("s", "t")}
        for remote in remotes.values():
            remote.open()
            train(remote, last_layer, range(2))
        before = pids(edges["a"])
        others = edges["a"]._table.get("t")
        os.kill(before[0], signal.SIGKILL)  # that of s, which was opened first
        train(remotes["t"], last_layer, range(2, 4))
        assert edges["a"]._table.get("t") is others
        until(lambda: [r.session for r in fleet._recovery.done] == ["s"])
        with pytest.raises(Moved, match="goes on from step 0"):
            train(remotes["s"], last_layer, range(2, 4))
        train(remotes["s"], last_layer, range(4))
        for name in ("s", "t"):
            assert is_trained(last_layer, fleet.collect(name), 4)
        assert remotes["t"].traffic.recoveries == []
        (recovery,) = fleet.recoveries()
        assert (recovery.source, recovery.target, recovery.step) == ("a", "a", 0)
        after = pids(edges["a"])
        assert len(set(after) | set(before)) == 3 and living(after) == after
        assert edges["a"].counters["workers_lost"] == 1


# --- runs -----------------------------------------------------------------------------------------

RUN = (*SMALL, "client.batch_size=20", "client.epochs=2")
SPLIT = ("policy=fixed", "policy.cut=0.3", "link=tcp")


@pytest.fixture
def alone(model_of):
    """Return the model of devices that train alone."""
    return lambda *overrides: model_of(*RUN, *overrides)


class Killing(LinkAround):
    """A link of a device that has something done to its session in the middle of a round."""

    def __init__(self, link, when, do):
        super().__init__(link)
        self._left, self._do, self._session = when, do, ""

    def send_encoded(self, parts):
        self._session = self._session or decode(b"".join(parts)).meta["session"]
        self._left -= 1
        if not self._left:
            self._do(self._session)
        self.inner.send_encoded(parts)


@pytest.mark.parametrize(
    ("more", "killed"),
    [
        ((), 0),
        (("schedule=pipelined", "schedule.micro_batches=3", "client.optimizer=adam"), 2),
        (("schedule=pipelined", "schedule.micro_batches=2", "client.label_private=true"), 1),
        (("client.kernels=fused", "fleet.replicate_every=2", "client.clip_norm=1"), 1),
        (("privacy=record",), 1),
    ],
    ids=str,
)
def test_a_run_has_the_bits_of_plain_training(
    more, killed, configure, carry_out, alone, monkeypatch
):
    """Also where one worker, or all of them, are killed in the middle of a round."""
    dials = []
    with served(**{"edge-0": 2}) as (edges, fleet):

        def kill(name):
            session, workers = edges["edge-0"]._table.get(name), edges["edge-0"]._processes._workers
            for worker in sorted(workers, key=lambda worker: session not in worker.sessions)[
                :killed
            ]:
                os.kill(worker.pid, signal.SIGKILL)

        def connect(address, **options):
            dials.append(address)
            link = dial(address, **options)
            return Killing(link, 6, kill) if killed and len(dials) == 1 else link

        monkeypatch.setattr("fedsys.offload.dialling.dial", connect)
        run = carry_out(configure(*RUN, *SPLIT, *more), fleet)
        assert run.sha256 == alone(*more)
        told = [(e["what"], e["from"], e["to"]) for e in run.figures["recoveries"]]
        assert set(told) == {("edge", "edge-0", "edge-0")} if killed else not told
        assert len(told) <= killed  # a device that comes later does not notice
        assert edges["edge-0"].counters["workers_lost"] == killed


@pytest.mark.parametrize("how", ["announced", "foreseen", "unannounced"])
def test_devices_move_from_process_to_process_in_a_round(how, configure, carry_out, alone):
    """From workers to an edge server of one process, and back; shadows compute in workers, too."""
    moves = (Move(0, 1, 0.5, 1, how), Move(1, 1, 0.3, 0, how))
    with served(**{"edge-0": 2, "edge-1": 1}) as (_, fleet):
        run = carry_out(configure(*RUN, *SPLIT, "num_edges=2"), fleet, Listed(moves))
    assert run.sha256 == alone()
    assert [move["how"] for move in run.figures["moves"]] == [how, how]
    assert run.figures["recoveries"] == []
    assert {move["repeated_steps"] for move in run.figures["moves"]} == {0}


# --- the process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_an_edge_server_that_ends(number, last_layer):
    """And what it can it hands over before: Ctrl-C reaches all processes of a terminal at once."""
    with edge_process("tcp", workers=2) as edge:
        below = [child.pid for child in psutil.Process(edge.pid).children(recursive=True)]
        assert len(below) == 3, "a nursery and two workers"
        fleet = Fleet([EdgeAddress(edge.name, edge.address)], control_token=edge.token)
        fleet.open(last_layer.spec(), last_layer.start(), edge.name)
        remote = Remote([edge.address], "s", "token of s", dial)
        remote.open()
        train(remote, last_layer, range(3))
        for pid in (edge.pid, *below) if number == signal.SIGINT else (edge.pid,):
            os.kill(pid, number)
        until(lambda: not living(below))
        if number != signal.SIGKILL:
            until(lambda: fleet._held.get("s").returned is not None)
            assert is_trained(last_layer, fleet.collect("s"), 3)
        fleet.close()


def test_what_does_not_go_with_workers_is_said_at_the_start(configure, last_layer):
    for more, reason in (
        (("edge.device=cuda",), "must be 1 on a GPU"),
        (("fleet=pi_lab", "fleet.emulate=true"), "must be 1 with fleet.emulate=true"),
    ):
        with pytest.raises(ConfigError, match=rf"edge\.workers=2: {reason}"):
            configure("edge.workers=2", *more)
    with pytest.raises(ConfigError, match=r"edge\.workers=0: must be at least 1"):
        configure("edge.workers=0")
    assert _workers(EdgeConfig(workers=None), torch.device("cpu")) == usable_cores()
    assert _workers(EdgeConfig(workers=None), torch.device("cuda")) == 1
    with pytest.raises(ConfigError, match=r"edge\.device=auto is cuda"):
        _workers(EdgeConfig(workers=2), torch.device("cuda"))
    emulating = with_values(last_layer.config.text, fleet={"emulate": True})
    spec = dataclasses.replace(last_layer.spec(), config=emulating)
    with served(a=2) as (_, fleet), pytest.raises(SessionError, match=r"with edge\.workers=1"):
        fleet.open(spec, last_layer.start(), "a")


def test_a_nursery_that_was_killed_is_replaced_with_its_workers(last_layer):
    with served(a=2) as (edges, fleet):
        fleet.open(last_layer.spec(), last_layer.start(), "a")
        before = pids(edges["a"])
        os.kill(edges["a"]._processes._nursery.pid, signal.SIGKILL)
        until(lambda: not living(before))
        until(lambda: len(fleet._recovery.done) == 1)
        remote = device(edges, "s")
        remote.open()
        train(remote, last_layer, range(2))
        assert is_trained(last_layer, fleet.collect("s"), 2)


def test_a_nursery_that_does_not_answer_is_not_waited_for_without_end(monkeypatch):
    """The lock was held meanwhile, so that the edge server could not even be stopped."""
    started, popen = [], subprocess.Popen

    def deaf(command, **options):
        started.append(popen([sys.executable, "-c", "import time; time.sleep(600)"], **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", deaf)
    monkeypatch.setattr(edge_workers, "_FORK_S", 0.2)
    monkeypatch.setattr(edge_workers, "_END_S", 0.1)
    with pytest.raises(RuntimeFailure, match="worker processes of a do not start"):
        EdgeWorkers(2, "a")
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2


def test_a_worker_that_does_nothing_any_more_does_not_keep_its_edge_server(last_layer, monkeypatch):
    """An edge server that was told to stop waited for its session without end, and did not stop."""
    monkeypatch.setattr(edge_module, "STUCK_S", 0.2)
    with served(a=2) as (edges, fleet):
        fleet.open(last_layer.spec(), last_layer.start(), "a")
        workers = pids(edges["a"])
        os.kill(workers[0], signal.SIGSTOP)
        assert edges["a"].stop(0.1) == []
        until(lambda: not living(workers))
