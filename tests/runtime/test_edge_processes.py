"""Edge servers as processes with certificates: killed, stopped, frozen, spoken to by strangers."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch

from fedsys.config import EdgeAddress
from fedsys.errors import RemoteError, SecurityError
from fedsys.faults import Faults
from fedsys.offload.edge_client import EdgeClient, Hooks
from fedsys.offload.fleet import Fleet
from fedsys.offload.session import Session
from fedsys.offload.snapshot import Snapshot
from fedsys.runtime import launch
from fedsys.runtime.edge_processes import EdgeProcesses, credentials_of_device
from fedsys.runtime.processes import Processes
from fedsys.transport.addresses import dial
from fedsys.transport.security import Authority, Credentials
from fedsys.transport.wire import Frame
from tests.small_runs import SMALL
from tests.waiting import until

WAIT_S = 60.0
NOTHING = Hooks(lambda _: None, lambda _: False, lambda _, __: None, lambda _: None, lambda _: True)
SPLIT = ("policy=fixed", "policy.cut=0.3", "link=tcp", "num_edges=2", "faults=edge_killed")


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edges")
    with Processes(folder, launch.environment(folder / "home")) as processes:
        processes.preload()  # as a launched run does: each edge server imported torch anew
        yield folder, processes


@pytest.fixture
def edges(nursery, configure):
    """Return two edge servers that run, each in a process of its own; they may be struck."""
    folder, processes = nursery
    notes = []
    launched = EdgeProcesses(configure(*SMALL, *SPLIT), folder, processes, notes.append)
    launched.start()
    launched.wait()
    links = folder / "secrets" / "links"
    told = json.loads(launched.run_config()["edges"])
    yield SimpleNamespace(
        launched=launched,
        processes=processes,
        notes=notes,
        folder=folder,
        addresses=[
            EdgeAddress(e["name"], e["address"], e["device_address"]) for e in told["edges"]
        ],
        server=Credentials.load(Path(told["credentials"])),
        device=[Credentials.load(credentials_of_device(folder, i)) for i in range(2)],
        device_folder=credentials_of_device(folder, 0),
        links=links,
    )
    processes.stop(["edge-0", "edge-1"])


def ready(edges, name):
    """Return the addresses that an edge server said, in each of its starts."""
    lines = (edges.folder / f"{name}.log").read_text().splitlines()
    return [json.loads(line)["ready"] for line in lines if line.startswith('{"ready"')]


def http_of(edges, name):
    return ready(edges, name)[-1]["http"]


def test_a_second_start_is_not_taken_for_the_first_whose_log_it_continues(edges, configure):
    """A launched run with edges could not be resumed: its logs are those of the former start.

    The address of the former edge was read there, and nobody answered at it.
    """
    edges.processes.stop(["edge-0", "edge-1"])
    again = EdgeProcesses(configure(*SMALL, *SPLIT), edges.folder, edges.processes, print)
    again.start()
    again.wait()
    told = json.loads(again.run_config()["edges"])["edges"]
    assert [e["address"] for e in told] == [ready(edges, e["name"])[-1]["address"] for e in told]
    assert all(len(ready(edges, e["name"])) >= 2 for e in told)


def last_line(edges, name):
    return json.loads((edges.folder / f"{name}.log").read_text().splitlines()[-1])


@pytest.fixture
def train(edges, configure, carry_out):
    """Train with these edges; return the run and the model that it must have."""

    def trained(*overrides, before=lambda fleet: None):
        config = configure(*SMALL, *SPLIT, f"link.credentials={edges.device_folder}", *overrides)
        faults = Faults(config.faults.list)
        with Fleet(edges.addresses, credentials=edges.server, faults=faults) as fleet:
            before(fleet)
            return carry_out(config, fleet)

    return trained


_undisturbed = {}


@pytest.fixture
def undisturbed(configure, carry_out):
    if "sha256" not in _undisturbed:
        _undisturbed["sha256"] = carry_out(configure(*SMALL)).sha256
    return _undisturbed["sha256"]


def when_trained(edges, name, do):
    """Do something once an edge has taken a step; return the thread that waits for it."""
    http = http_of(edges, name)

    def wait():
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            if re.search(
                r"^fedsys_edge_steps_total [1-9]", httpx.get(f"{http}/metrics").text, re.M
            ):
                do()
                return

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_an_edge_that_is_killed_in_a_round_costs_time_and_not_the_model(edges, train, undisturbed):
    """`faults=edge_killed` is SIGKILL here."""
    run = train()
    assert run.sha256 == undisturbed
    edges.launched.check()
    assert edges.processes.status("edge-0") == -signal.SIGKILL
    assert edges.notes == ["edge server edge-0 ended with status -9"]
    (entry,) = run.figures["recoveries"]
    assert (entry["what"], entry["from"], entry["to"]) == ("edge", "edge-0", "edge-1")


def test_an_edge_that_is_told_to_stop_hands_its_sessions_over(edges, train, undisturbed):
    pid = edges.processes.pid("edge-0")
    waiting = when_trained(edges, "edge-0", lambda: os.kill(pid, signal.SIGTERM))
    run = train("faults=none")
    waiting.join(WAIT_S)
    assert run.sha256 == undisturbed
    until(lambda: edges.processes.status("edge-0") is not None)
    assert edges.processes.status("edge-0") == 0
    assert last_line(edges, "edge-0")["saved"] == 0


@pytest.mark.slow
def test_an_edge_that_freezes_is_left_without_waiting_for_its_links_to_end(
    edges, train, undisturbed
):
    """SIGSTOP: its machine still accepts links, nothing is closed, and nothing is answered."""
    pid = edges.processes.pid("edge-0")
    waiting = when_trained(edges, "edge-0", lambda: os.kill(pid, signal.SIGSTOP))
    run = train("faults=none")
    waiting.join(WAIT_S)
    assert run.sha256 == undisturbed
    edges.processes.stop(["edge-0"], at_once=True)


def refuses_those_of_another_authority(address, device):
    stranger = Authority.create().issue("device-0")
    with pytest.raises(SecurityError, match="certificates of one authority"):
        dial(address, credentials=stranger, timeout_s=WAIT_S, retry=False)
    half = Credentials(device.ca, stranger.certificate, stranger.key)
    with pytest.raises(SecurityError, match="not issued by the authority"):
        dial(address, credentials=half, timeout_s=WAIT_S, retry=False)
    with pytest.raises(SecurityError, match="wants TLS"):
        dial(address, timeout_s=WAIT_S, retry=False)


def test_strangers_are_refused_with_a_reason_and_counted_and_nobody_else_notices(edges, last_layer):
    address = edges.addresses[0].address

    def greet(credentials, name="s", token="token of s"):
        link = dial(address, credentials=credentials)
        link.send(Frame("hello", {"session": name, "token": token}))
        return link, link.recv(WAIT_S)

    server = EdgeClient("edge-0", dial(address, credentials=edges.server), "", NOTHING)
    for name, holder in (("s", "device-0"), ("t", "device-1")):
        spec, start = last_layer.spec(name, holder=holder), last_layer.start()
        server.request("open", {"spec": spec.to_meta(), "step": 0}, start.tensors())
    link, welcome = greet(edges.device[0])
    assert welcome.kind == "welcome"

    refuses_those_of_another_authority(address, edges.device[0])
    with pytest.raises(RemoteError, match="session s: belongs to device-0, not to device-1"):
        greet(edges.device[1])
    with pytest.raises(RemoteError, match="session t: the token is not that of this session"):
        greet(edges.device[1], "t")
    assert greet(edges.device[1], "nobody's")[1].kind == "unknown"
    with pytest.raises(RemoteError, match="device-1 may not control"):
        EdgeClient("edge-0", dial(address, credentials=edges.device[1]), "", NOTHING)
    other, _ = greet(edges.device[1], "t", "token of t")
    other.send(last_layer.activation(5))
    with pytest.raises(RemoteError, match="step 5 of session t, where step 0 is due"):
        other.recv(WAIT_S)

    for step in range(3):  # the link of device 0 was there all the time
        link.send(last_layer.activation(step))
        assert link.recv(WAIT_S).kind == "gradient"
    link.send(Frame("done"))
    link.recv(WAIT_S)
    alone = Session(last_layer.spec(), last_layer.start(), torch.device("cpu"))
    for step in range(3):
        list(alone.handle(last_layer.activation(step)))
    here = Snapshot.from_frame(server.request("collect", {"session": "s"}, {}))
    expected = alone.snapshot().state
    assert all(torch.equal(here.state[name], expected[name]) for name in expected)

    metrics = httpx.get(f"{http_of(edges, 'edge-0')}/metrics").text
    refused = dict(re.findall(r'refused_total\{reason="(\w+)"\} (\d+)', metrics))
    assert refused == {"SecurityError": "3", "SessionError": "1", "unknown_session": "1"}
    server.close()


@pytest.mark.slow
def test_sessions_that_nobody_takes_back_are_saved_and_taken_up_again(edges, last_layer, tmp_path):
    """SIGTERM while the server app is away."""
    command = edges.launched._command("edge-0", edges.links / "edge-0")
    command.append(f"edge.state_dir='{tmp_path}'")

    def start():
        edges.processes.stop(["edge-0"])
        (edges.folder / "edge-0.log").unlink()
        edges.processes.start("edge-0", command, vital=False)
        ready = edges.launched._ready("edge-0", time.monotonic() + WAIT_S)
        return dial(str(ready["address"]), credentials=edges.server)

    server = EdgeClient("edge-0", start(), "", NOTHING)
    spec, state = last_layer.spec(), last_layer.start()
    server.request("open", {"spec": spec.to_meta(), "step": 4}, state.tensors())
    server.close()
    time.sleep(0.1)
    again = EdgeClient("edge-0", start(), "", NOTHING)
    assert again.request("ping", {"sessions": ["s"]}, {}).meta["sessions"] == ["s"]
    snapshot = Snapshot.from_frame(again.request("collect", {"session": "s"}, {}))
    assert snapshot.step == 4
    assert all(torch.equal(snapshot.state[name], state.state[name]) for name in state.state)
    again.close()
