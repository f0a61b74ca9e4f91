import contextlib
import dataclasses
import random
import socket
import threading
from collections.abc import Iterator

import pytest
import torch

from fedsys.config import EdgeConfig, compose_text
from fedsys.errors import LinkClosed, LinkError, RemoteError, SecurityError
from fedsys.offload import edge as edge_module
from fedsys.offload.edge import CONTROLLER, EdgeServer
from fedsys.offload.edge_metrics import EdgeCollector
from fedsys.offload.session import Session
from fedsys.offload.snapshot import Snapshot
from fedsys.transport.addresses import dial
from fedsys.transport.grpc_link import _SERVICE
from fedsys.transport.security import Authority
from fedsys.transport.strangers import Strangers
from fedsys.transport.tcp_flows import Last, last_word
from fedsys.transport.tcp_link import GREETING
from fedsys.transport.wire import Frame, encode
from tests.waiting import until

TOKEN = "token of the controller"
WAIT_S = 60.0


@pytest.fixture
def edge_at():
    """Return a function that starts an edge server; all are stopped in the end."""
    servers = []

    def start(address="memory://edge", **more):
        servers.append(EdgeServer("edge", address, control_token=TOKEN, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


class Controller:
    """The least that a server app does: requests and their replies, one after the other."""

    def __init__(self, address, token=TOKEN, **more):
        self.link = dial(address, **more)
        self.others = []
        self.request("control", token=token)

    def request(self, kind, tensors=None, **meta):
        self.link.send(Frame(kind, {**meta, "request": 7}, tensors or {}))
        while (reply := self.link.recv(WAIT_S)).meta.get("request") != 7:
            self.others.append(reply)
        return reply

    def open(self, spec, start):
        return self.request("open", start.tensors(), spec=spec.to_meta(), step=start.step)


def greet(address, name="s", token=None, **more):
    link = dial(address, **more)
    link.send(Frame("hello", {"session": name, "token": token or f"token of {name}"}))
    answer = link.recv(WAIT_S)
    return link, link.recv(WAIT_S) if answer.kind == "wait" else answer


def ask(link, frame):
    link.send(frame)
    return link.recv(WAIT_S)


def trained_alone(last_layer, steps):
    """Return the state of a session after steps that nothing disturbed."""
    session = Session(last_layer.spec(), last_layer.start(), torch.device("cpu"))
    for step in range(steps):
        assert len(list(session.handle(last_layer.activation(step)))) == 1
    return session.snapshot().state


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_a_session_is_opened_trained_collected_and_released(edge_at, last_layer):
    edge = edge_at()
    controller = Controller(edge.address)
    assert controller.open(last_layer.spec(), last_layer.start()).kind == "opened"
    assert edge.sessions == ["s"]
    link, welcome = greet(edge.address)
    assert (welcome.kind, welcome.meta["step"]) == ("welcome", 0)
    for step in range(3):
        reply = ask(link, last_layer.activation(step))
        assert (reply.kind, reply.meta["step"]) == ("gradient", step)
    assert ask(link, Frame("done")).meta == {"step": 3}
    collected = controller.request("collect", session="s")
    snapshot = Snapshot.from_frame(collected)
    assert snapshot.step == 3
    assert same(snapshot.state, trained_alone(last_layer, 3))
    assert controller.request("release", session="s").kind == "released"
    assert edge.sessions == []
    with pytest.raises(LinkClosed):
        link.recv(WAIT_S)
    counted = controller.request("ping").meta["counters"]
    assert {k: counted[k] for k in ("opened", "steps", "released")} == {
        "opened": 1, "steps": 3, "released": 1,
    }  # fmt: skip
    assert counted["bytes_in"] > 3 * last_layer.activation(0).tensors["x"].nbytes


def test_a_controller_has_no_model_built_that_the_edge_server_does_not_name(edge_at, last_layer):
    """Whoever had the token could have it call any function of any module."""
    edge = edge_at(models=["fedsys.models"])
    controller = Controller(edge.address)
    spec, start = last_layer.spec(), last_layer.start()
    evil = compose_text("model._target_=os.system")
    reply = controller.open(dataclasses.replace(spec, config=evil), start)
    assert reply.kind == "refused" and "model._target_=os.system" in reply.meta["reason"]
    assert "edge.models=[" in reply.meta["reason"] and edge.sessions == []
    assert controller.open(spec, start).kind == "opened"


@pytest.mark.parametrize("scheme", ["tcp", "grpc"])
def test_strangers_keep_neither_controllers_nor_devices_out(
    scheme, edge_at, last_layer, monkeypatch
):
    """1,024 links that said nothing held all places of an edge server for 30 s."""
    monkeypatch.setattr(edge_module, "_STRANGERS", Strangers(places=4))
    edge = edge_at(f"{scheme}://127.0.0.1:0")
    silent = [dial(edge.address) for _ in range(12)]
    controller = Controller(edge.address)
    controller.open(last_layer.spec(), last_layer.start())
    link, welcome = greet(edge.address)
    assert welcome.kind == "welcome"
    assert ask(link, last_layer.activation(0)).kind == "gradient"
    metrics = {
        (sample.name, *sample.labels.values()): sample.value
        for metric in EdgeCollector(edge).collect()
        for sample in metric.samples
    }
    assert metrics["fedsys_edge_links", "known"] == 2
    assert metrics["fedsys_edge_links", "strangers"] <= 4
    assert metrics["fedsys_edge_link_places", "strangers"] == 4
    assert metrics["fedsys_edge_links_ended_total", "full"] >= 8
    for one in (*silent, link):
        one.close()


def test_nobody_sends_much_before_an_edge_server_knows_him(edge_at, last_layer):
    """Four first frames of 1 GiB took 1.2 GB from an edge server that nobody had a token for."""
    edge = edge_at("tcp://127.0.0.1:0")
    with pytest.raises(RemoteError, match="more than the limit"):
        ask(dial(edge.address), Frame("hello", {}, {"x": torch.zeros(1 << 20)}))
    controller = Controller(edge.address)  # with its token it may send what a session takes
    assert controller.open(last_layer.spec(), last_layer.start()).kind == "opened"


@pytest.mark.parametrize("token", ["", "wrong", "token of other", "token of s "])
def test_a_device_with_a_wrong_token_is_refused_and_the_right_one_is_not_disturbed(
    token, edge_at, last_layer
):
    edge = edge_at()
    controller = Controller(edge.address)
    for name in ("s", "other"):
        controller.open(last_layer.spec(name), last_layer.start())
    link, _ = greet(edge.address)
    with pytest.raises(RemoteError, match="SecurityError: session s: the token is not that"):
        greet(edge.address, token=token or " ")
    assert ask(link, last_layer.activation(0)).kind == "gradient"
    assert edge.counters["refused_SecurityError"] == 1


def test_a_token_is_of_no_use_once_its_session_is_released(edge_at, last_layer):
    edge = edge_at()
    controller = Controller(edge.address)
    controller.open(last_layer.spec(), last_layer.start())
    controller.request("release", session="s")
    assert greet(edge.address)[1].kind == "unknown"
    assert edge.counters["refused_unknown_session"] == 1


def test_a_link_that_greets_nobody_is_refused(edge_at, last_layer):
    edge = edge_at()
    for kind in ("activation", "open", "collect", "welcome"):
        link = dial(edge.address)
        link.send(Frame(kind, {"session": "s"}))
        with pytest.raises(
            RemoteError, match="a link begins with hello, probe, measure, control or peer"
        ):
            link.recv(WAIT_S)
    assert edge.counters["refused_SessionError"] == 4


@pytest.mark.parametrize("token", ["", "wrong", TOKEN[:-1], TOKEN + " "])
def test_nobody_controls_without_the_token(token, edge_at):
    edge = edge_at()
    with pytest.raises(RemoteError, match="SecurityError: a peer without certificate"):
        Controller(edge.address, token)


@pytest.mark.parametrize("controller", ["", CONTROLLER])
def test_an_edge_without_token_and_certificates_is_controlled_by_nobody(controller):
    edge = EdgeServer("edge", "memory://bare", controller=controller)
    try:
        for token in ("", "anything"):
            with pytest.raises(RemoteError, match="may not control"):
                Controller(edge.address, token)
    finally:
        edge.kill()


def test_a_device_may_not_do_what_a_controller_does(edge_at, last_layer):
    edge = edge_at()
    Controller(edge.address).open(last_layer.spec(), last_layer.start())
    for kind in ("collect", "release", "open", "ping"):
        link, _ = greet(edge.address)
        with pytest.raises(RemoteError, match="not an operation of a session"):
            ask(link, Frame(kind, {"session": "s"}))
    assert edge.sessions == ["s"]


def test_what_cannot_be_opened_is_refused_with_a_reason_and_the_link_goes_on(edge_at, last_layer):
    edge = edge_at(limits=EdgeConfig(max_sessions=1))
    controller = Controller(edge.address)
    start = last_layer.start()
    lacking = Snapshot(0, dict(list(start.state.items())[:1]), {})
    doubled = Snapshot(0, {n: t.double() for n, t in start.state.items()}, {})
    for spec, state, reason in (
        (last_layer.spec(), lacking, "ModelError"),
        (last_layer.spec(), doubled, "ModelError"),
        (last_layer.spec(last=9), start, "units 3 to 9 of 4"),
        (last_layer.spec(codec_up="gzip"), start, "gzip"),
    ):
        refused = controller.open(spec, state)
        assert refused.kind == "refused" and reason in refused.meta["reason"]
    assert controller.open(last_layer.spec(), start).kind == "opened"
    again = controller.open(last_layer.spec(), start)
    assert again.kind == "refused" and "session s is open already" in again.meta["reason"]
    full = controller.open(last_layer.spec("t"), start)
    assert full.kind == "refused" and "edge is full: 1 sessions" in full.meta["reason"]
    for kind, name in (("collect", "nobody"), ("release", "nobody"), ("explode", "s")):
        assert controller.request(kind, session=name).kind == "refused"
    assert edge.sessions == ["s"]


def test_the_bytes_of_all_sessions_together_are_limited(edge_at, last_layer):
    one = sum(t.nbytes for t in last_layer.start().state.values())
    edge = edge_at(limits=EdgeConfig(max_session_bytes=2 * one))
    controller = Controller(edge.address)
    kinds = [controller.open(last_layer.spec(n), last_layer.start()).kind for n in "abc"]
    assert kinds == ["opened", "opened", "refused"]
    link, _ = greet(edge.address, "a")
    ask(link, last_layer.activation(0))  # momentum: the session is twice as large now
    ask(link, Frame("done"))  # the step comes after its reply
    controller.request("release", session="b")
    refused = controller.open(last_layer.spec("d"), last_layer.start())
    assert refused.meta["reason"].endswith(f"edge is full: {3 * one} bytes of {2 * one}")


def test_a_device_that_comes_back_takes_over_from_its_former_link(edge_at, last_layer):
    edge = edge_at()
    controller = Controller(edge.address)
    controller.open(last_layer.spec(), last_layer.start())
    former, first = greet(edge.address)
    ask(former, last_layer.activation(0))
    link, second = greet(edge.address)
    about = {
        "step": 1,
        "first": 3,
        "incarnation": first.meta["incarnation"],
        "epoch": [1, 0, "edge", 0],
    }
    assert second.meta == about
    with pytest.raises(LinkClosed):
        former.recv(WAIT_S)
    # what the former link asked for is answered again, not done again
    assert ask(link, last_layer.activation(0)).meta["step"] == 0
    ask(link, last_layer.activation(1))
    state = Snapshot.from_frame(controller.request("collect", session="s")).state
    assert same(state, trained_alone(last_layer, 2))


def test_a_session_that_is_opened_again_is_another_incarnation(edge_at, last_layer):
    edge = edge_at()
    controller = Controller(edge.address)
    incarnations = set()
    for _ in range(3):
        controller.open(last_layer.spec(), last_layer.start())
        incarnations.add(greet(edge.address)[1].meta["incarnation"])
        controller.request("release", session="s")
    assert len(incarnations) == 3


def test_an_operation_out_of_turn_ends_its_link_only(edge_at, last_layer):
    edge = edge_at()
    controller = Controller(edge.address)
    for name in ("s", "t"):
        controller.open(last_layer.spec(name), last_layer.start())
    mine, _ = greet(edge.address, "s")
    other, _ = greet(edge.address, "t")
    with pytest.raises(RemoteError, match="step 5 of session s, where step 0 is due"):
        ask(mine, last_layer.activation(5))
    assert ask(other, last_layer.activation(0)).kind == "gradient"
    again, welcome = greet(edge.address, "s")
    assert welcome.meta["step"] == 0
    assert ask(again, last_layer.activation(0)).kind == "gradient"
    assert edge.counters["refused_SessionError"] == 1


def test_replicas_go_to_the_controller_that_is_there_now(edge_at, last_layer):
    edge = edge_at()
    gone = Controller(edge.address)
    gone.open(last_layer.spec(replicate_every=1), last_layer.start())
    link, _ = greet(edge.address)
    gone.link.close()
    back = Controller(edge.address)
    assert back.request("ping", sessions=["s", "nobody", 3]).meta["sessions"] == ["s"]
    ask(link, last_layer.activation(0))
    replica = back.link.recv(WAIT_S)
    assert (replica.kind, replica.meta["session"], replica.meta["step"]) == ("replica", "s", 1)
    assert same(Snapshot.from_frame(replica).state, trained_alone(last_layer, 1))


def test_sessions_can_be_opened_while_others_train_and_send_replicas(edge_at, last_layer):
    edge = edge_at()
    controller = Controller(edge.address)
    controller.open(last_layer.spec(replicate_every=1), last_layer.start())
    link, _ = greet(edge.address)

    def train():
        for step in range(60):
            ask(link, last_layer.activation(step))

    thread = threading.Thread(target=train)
    thread.start()
    for number in range(20):
        assert controller.open(last_layer.spec(f"n{number}"), last_layer.start()).kind == "opened"
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert controller.request("collect", session="s").meta["step"] == 60


def test_a_killed_edge_drops_everything_without_a_word(edge_at, last_layer):
    edge = edge_at()
    controller = Controller(edge.address)
    controller.open(last_layer.spec(), last_layer.start())
    link, _ = greet(edge.address)
    edge.kill()
    edge.kill()
    assert edge.sessions == []
    for end in (link, controller.link):
        with pytest.raises(LinkClosed):
            end.recv(WAIT_S)
    with pytest.raises(LinkError):
        dial(edge.address, retry=False)


def test_a_stopped_edge_hands_its_sessions_to_their_controller(edge_at, last_layer):
    edge = edge_at()
    controller = Controller(edge.address)
    controller.open(last_layer.spec(), last_layer.start())
    link, _ = greet(edge.address)
    for step in range(2):
        ask(link, last_layer.activation(step))
    thread = threading.Thread(target=edge.stop)
    thread.start()
    frame = controller.link.recv(WAIT_S)
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert frame.kind == "handover"
    assert (frame.meta["session"], frame.meta["step"]) == ("s", 2)
    assert same(Snapshot.from_frame(frame).state, trained_alone(last_layer, 2))


@pytest.fixture(scope="module")
def parties(tmp_path_factory):
    """Return certificates of one authority, and one of another."""
    home, elsewhere = (tmp_path_factory.mktemp(name) for name in ("home", "elsewhere"))
    hosts = ["127.0.0.1", "localhost"]
    authorities = {home: Authority.create(), elsewhere: Authority.create()}

    def made(authority, name):
        return authorities[authority].issue(name, hosts, role="both")

    names = ("edge", CONTROLLER, "device-0", "device-1")
    return {name: made(home, name) for name in names} | {
        "stranger": made(elsewhere, CONTROLLER),
    }


@pytest.mark.parametrize("network", ["grpc", "tcp"])
def test_over_tls_names_in_certificates_decide(network, parties, edge_at, last_layer):
    edge = EdgeServer("edge", f"{network}://127.0.0.1:0", credentials=parties["edge"])
    try:
        with pytest.raises(RemoteError, match="device-0 may not control"):
            Controller(edge.address, credentials=parties["device-0"])
        with pytest.raises((SecurityError, LinkError)):
            dial(edge.address, credentials=parties["stranger"], timeout_s=2.0)
        controller = Controller(edge.address, credentials=parties[CONTROLLER])
        controller.open(last_layer.spec(holder="device-0"), last_layer.start())
        with pytest.raises(RemoteError, match="belongs to device-0, not to device-1"):
            greet(edge.address, credentials=parties["device-1"])
        _, welcome = greet(edge.address, credentials=parties["device-0"])
        assert welcome.kind == "welcome"
    finally:
        edge.kill()


# --------------------------------------------------------------------------------------------------
# Attackers


def hostile(valid: bytes, count: int) -> Iterator[bytes]:
    """Yield bytes that are no frame, or no longer the one they were."""
    draw = random.Random(5)
    for number in range(count):
        data = bytearray(valid)
        match number % 4:
            case 0:
                data = bytearray(draw.randbytes(draw.randrange(1, 300)))
            case 1:
                data = data[: draw.randrange(1, len(data))]
            case 2:
                for _ in range(draw.randrange(1, 4)):
                    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            case 3:  # says that it is larger than any memory
                data[12:20] = draw.randrange(1 << 31, 1 << 63).to_bytes(8, "little")
        yield bytes(data)


def refused_over_grpc(address, frames):
    grpc = pytest.importorskip("grpc")
    channel = grpc.insecure_channel(address.removeprefix("grpc://"))
    connect = channel.stream_stream(f"/{_SERVICE}/Connect")
    refused = 0
    for data in frames:
        try:
            for _ in connect(iter([data])):
                pass
        except grpc.RpcError:
            refused += 1
    channel.close()
    return refused


def refused_over_tcp(address, frames):
    host, port = address.removeprefix("tcp://").split(":")
    refused = 0
    for number, data in enumerate(frames):
        with socket.create_connection((host, int(port)), WAIT_S) as connection:
            greeted = number % 10 > 0  # every tenth does not even do that
            connection.sendall(GREETING + data if greeted else data)
            connection.shutdown(socket.SHUT_WR)
            told = b""
            with contextlib.suppress(ConnectionResetError):
                while more := connection.recv(1 << 16):
                    told += more
        if not greeted:
            assert told == b""
            refused += 1
        elif told[len(GREETING) :].startswith(last_word(Last.FAILED)[:6]):
            refused += 1
    return refused


@pytest.mark.parametrize("network", ["grpc", "tcp"])
def test_two_thousand_hostile_frames_leave_an_edge_and_its_sessions_as_they_are(
    network, edge_at, last_layer
):
    limits = EdgeConfig(max_frame_bytes=1 << 20)
    edge = edge_at(f"{network}://127.0.0.1:0", limits=limits)
    controller = Controller(edge.address)
    controller.open(last_layer.spec(), last_layer.start())
    link, _ = greet(edge.address)
    steps, stop = [0], threading.Event()

    def train():
        while not stop.is_set() or steps[0] < 50:
            ask(link, last_layer.activation(steps[0]))
            steps[0] += 1
            stop.wait(0.005)  # all of these steps are done again below

    thread = threading.Thread(target=train)
    thread.start()
    frames = hostile(encode(Frame("hello", {"session": "s", "token": "guessed"})), 1000)
    inner = hostile(encode(last_layer.activation(0)), 1000)
    attack = refused_over_grpc if network == "grpc" else refused_over_tcp
    refused = attack(edge.address, (*frames, *inner))
    stop.set()
    thread.join(60)
    assert not thread.is_alive()
    # a truncated frame is only a link that ends early; all others are refused with a reason
    assert refused >= 1400
    snapshot = Snapshot.from_frame(controller.request("collect", session="s"))
    assert snapshot.step == steps[0]
    assert same(snapshot.state, trained_alone(last_layer, steps[0]))
    assert controller.request("ping").meta["sessions"] == ["s"]
    until(lambda: sum(t.name.startswith("link of") for t in threading.enumerate()) <= 4)


@pytest.mark.parametrize("network", ["grpc", "tcp"])
def test_a_server_that_dies_in_the_handshake_is_lost_and_no_stranger(network, parties):
    """An edge was killed just when a device connected: TLS was begun and then reset.

    The device took that for a certificate that was not accepted, and gave its round up.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:

        def die():
            connection, _ = server.accept()
            connection.recv(1)  # what is left unread makes closing a reset
            connection.close()

        thread = threading.Thread(target=die)
        thread.start()
        address = f"{network}://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(LinkClosed):
            dial(address, credentials=parties["device-0"], timeout_s=WAIT_S, retry=False)
        thread.join(WAIT_S)
