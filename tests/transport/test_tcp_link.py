"""What is particular to links over TCP; `tests/contracts/test_link_contract.py` has the rest."""

import contextlib
import logging
import select
import socket
import ssl
import sys
import threading
import time

import pytest
import torch

from fedsys.errors import LinkClosed, RemoteError, SecurityError
from fedsys.transport import tcp_link
from fedsys.transport import tcp_standby as standby
from fedsys.transport.addresses import dial, serve
from fedsys.transport.mailbox import Mailbox
from fedsys.transport.security import Authority
from fedsys.transport.tcp_channel import (
    LowWater,
    PlainChannel,
    TlsChannel,
    client_context,
    prepare,
)
from fedsys.transport.tcp_link import GREETING
from fedsys.transport.wire import Frame, encode
from tests.waiting import until

WAIT_S = 20.0


def echo(link):
    while True:
        link.send(link.recv(WAIT_S))


def place_of(server):
    host, port = server.address.removeprefix("tcp://").split(":")
    return host, int(port)


def greeting_threads():
    return [t for t in threading.enumerate() if t.name.startswith("greets ")]


@pytest.fixture(scope="module")
def authority():
    return Authority.create()


@pytest.fixture(scope="module")
def edge(authority):
    return authority.issue("edge-a", ["127.0.0.1"], role="server")


@pytest.fixture(scope="module")
def device(authority):
    return authority.issue("device-7")


@pytest.fixture(params=["plain", "tls"])
def server(request, edge):
    credentials = edge if request.param == "tls" else None
    server = serve("tcp://127.0.0.1:0", echo, credentials=credentials, max_links=4)
    yield server
    server.stop()


def test_one_end_without_tls_is_told_what_is_missing(edge, device):
    for theirs, ours, told in ((edge, None, "wants TLS"), (None, device, "does not speak TLS")):
        server = serve("tcp://127.0.0.1:0", echo, credentials=theirs)
        try:
            with pytest.raises(SecurityError, match=told):
                dial(server.address, credentials=ours, timeout_s=WAIT_S)
        finally:
            server.stop()


@contextlib.contextmanager
def stranger(answer):
    """Yield the address of a server that says `answer` to one connection's greeting."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def talk():
            connection, _ = listener.accept()
            with connection:
                connection.recv(len(GREETING))
                connection.sendall(answer)
                with contextlib.suppress(OSError):  # who does not like the answer resets
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(1)

        thread = threading.Thread(target=talk)
        thread.start()
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(WAIT_S)


def test_a_server_that_demands_tls_of_its_own_kind_is_recognised():
    """Whatever speaks TLS, for instance HTTPS, answers a plain greeting with an alert."""
    with (
        stranger(b"\x15\x03\x01\x00\x02\x02\x46") as address,
        pytest.raises(SecurityError, match="wants TLS"),
    ):
        dial(address, timeout_s=WAIT_S)


def test_what_is_no_fedsys_is_named_by_what_it_answers():
    told = r"does not serve the links of fedsys.*HTTP/1\.1 400"
    with (
        stranger(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address,
        pytest.raises(LinkClosed, match=told),
    ):
        dial(address, timeout_s=WAIT_S)


def test_a_port_that_accepts_and_says_nothing_does_not_hold_a_dial_for_ever():
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(LinkClosed, match="does not answer within"),
    ):
        dial(f"tcp://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.2)


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.1\r\nHost: edge\r\n\r\n", bytes(range(256)), b"\n", b""]
)
def test_strangers_are_sent_away_and_logged(server, said, caplog):
    with caplog.at_level(logging.WARNING), socket.create_connection(place_of(server)) as stranger:
        stranger.sendall(said)
        stranger.shutdown(socket.SHUT_WR)
        stranger.settimeout(WAIT_S)
        with contextlib.suppress(ConnectionResetError):
            while stranger.recv(1000):
                pass
        until(lambda: "refused 127.0.0.1" in caplog.text)
    until(lambda: not greeting_threads())


def test_another_version_is_told_which_one_is_spoken():
    server = serve("tcp://127.0.0.1:0", echo)
    try:
        with socket.create_connection(place_of(server)) as peer:
            peer.sendall(b"FSYS-LINK 0002\r\n")
            peer.settimeout(WAIT_S)
            told = b""
            while more := peer.recv(1000):
                told += more
        assert b"speaks version 0001" in told
        assert b"install the same version of fedsys on both sides" in told
    finally:
        server.stop()


def test_a_connection_that_does_not_greet_in_time_is_closed(server, monkeypatch, caplog):
    monkeypatch.setattr(tcp_link, "GREETING_S", 0.2)
    with socket.create_connection(place_of(server)) as silent:
        silent.settimeout(WAIT_S)
        assert silent.recv(1) == b""
    until(lambda: not greeting_threads())


def test_connections_that_only_wait_keep_nobody_out(server, edge, device):
    # four links at most, so four may wait; of eight that say nothing the oldest went
    silent = [socket.create_connection(place_of(server)) for _ in range(8)]
    tls = server._context is not None
    link = dial(server.address, credentials=device if tls else None, timeout_s=WAIT_S)
    link.send(Frame("x"))
    assert link.recv(WAIT_S).kind == "x"
    link.close()
    for one in silent:
        one.close()
    until(lambda: not greeting_threads())


def test_nothing_but_tls_1_3_is_spoken(edge, device):
    server = serve("tcp://127.0.0.1:0", echo, credentials=edge)
    old = client_context(device)
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    try:
        with socket.create_connection(place_of(server)) as connection:
            prepare(connection)
            channel = TlsChannel(connection, old, "127.0.0.1")
            with pytest.raises(ssl.SSLError, match=r"(?i)protocol.version"):
                channel.shake_hands(b"", time.monotonic() + WAIT_S)
    finally:
        server.stop()


@pytest.fixture
def pair():
    """A channel, and the socket at its other end."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as far,
    ):
        near, _ = listener.accept()
        with near:
            prepare(near)
            yield PlainChannel(near), far


def arrived(channel, nbytes):
    memory = memoryview(bytearray(1 << 20))
    return channel.socket.recv_into(memory, 0, socket.MSG_PEEK) >= nbytes


@pytest.mark.skipif(sys.platform != "linux", reason="marks are of Linux alone")
def test_a_reader_is_woken_when_there_is_much_of_a_large_frame_or_the_end_of_it(pair):
    channel, far = pair
    poll, mark = select.poll(), LowWater(channel)
    poll.register(channel.socket, select.POLLIN)

    def readable(missing):
        mark.expect(missing)
        return bool(poll.poll(0))

    far.sendall(bytes(LowWater.LEAST))
    until(lambda: arrived(channel, LowWater.LEAST))
    assert not readable(10 * LowWater.MOST) and not readable(LowWater.LEAST + 1)
    assert readable(LowWater.LEAST) and readable(LowWater.LEAST - 1) and readable(0)
    assert not readable(2 * LowWater.MOST)
    far.sendall(bytes(LowWater.MOST))
    until(lambda: readable(10 * LowWater.MOST))  # never more than that at a time
    channel.socket.recv(1 << 20)
    assert not readable(LowWater.MOST)
    far.sendall(b"x")
    assert not readable(LowWater.MOST)
    far.shutdown(socket.SHUT_WR)  # which ends what was to come
    until(lambda: readable(LowWater.MOST))


def test_where_there_are_no_marks_each_arrival_wakes(pair, monkeypatch):
    monkeypatch.setattr("fedsys.transport.tcp_channel._MARKED", False)
    channel, _ = pair
    LowWater(channel).expect(1 << 30)
    assert channel.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1


def test_small_frames_come_at_once_behind_large_ones(server, edge, device):
    """Whoever still waited for much of a frame that had ended would wait for ever."""
    link = dial(server.address, credentials=device if server._context else None, timeout_s=WAIT_S)
    sizes = (1 << 22, 1, 300_000, 0, LowWater.MOST + 1, 7, LowWater.LEAST, 2)
    try:
        for size in sizes:
            link.send(Frame("x", {}, {"x": torch.full((size,), 3, dtype=torch.uint8)}))
            assert link.recv(WAIT_S).tensors["x"].sum() == 3 * size
        for size in sizes:  # and when the link's own thread reads ahead
            link.send(Frame("x", {"n": size}, {"x": torch.zeros(size, dtype=torch.uint8)}))
        assert [link.recv(WAIT_S).meta["n"] for _ in sizes] == list(sizes)
    finally:
        link.close()


def test_a_large_frame_that_comes_in_small_pieces_is_whole():
    got = []
    server = serve("tcp://127.0.0.1:0", lambda link: got.append(link.recv(WAIT_S)))
    sent = Frame("x", {}, {"x": torch.arange(200_000)})
    try:
        with socket.create_connection(place_of(server)) as peer:
            data = encode(sent)
            peer.sendall(GREETING + data[: 1 << 20])
            assert peer.recv(len(GREETING)) == GREETING
            for start in range(1 << 20, len(data), 100_000):
                time.sleep(0.005)
                peer.sendall(data[start : start + 100_000])
            until(lambda: got)
        assert torch.equal(got[0].tensors["x"], sent.tensors["x"])
    finally:
        server.stop()


def test_a_frame_cut_off_by_the_end_is_a_lost_link():
    seen = []

    def receive(link):
        try:
            link.recv(WAIT_S)
        except LinkClosed as error:
            seen.append(str(error))
            raise

    server = serve("tcp://127.0.0.1:0", receive)
    try:
        with socket.create_connection(place_of(server)) as peer:
            peer.sendall(GREETING + encode(Frame("x", {}, {"x": torch.zeros(1000)}))[:-1])
            assert peer.recv(len(GREETING)) == GREETING
            peer.shutdown(socket.SHUT_WR)
            until(lambda: seen)
        assert "was lost" in seen[0]
    finally:
        server.stop()


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_frames_that_come_in_pieces_are_put_together(size):
    frames = [Frame("x", {"i": i}, {"x": torch.full((i * 300,), i)}) for i in range(4)]
    data = GREETING + b"".join(encode(frame) for frame in frames)
    server = serve(
        "tcp://127.0.0.1:0", lambda link: [got.append(link.recv(WAIT_S)) for _ in "1234"]
    )
    got: list[Frame] = []
    try:
        with socket.create_connection(place_of(server)) as peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for start in range(0, len(data), size):
                peer.sendall(data[start : start + size])
            until(lambda: len(got) == 4)
    finally:
        server.stop()
    for frame, sent in zip(got, frames, strict=True):
        assert frame.meta == sent.meta and torch.equal(frame.tensors["x"], sent.tensors["x"])


def test_a_link_that_nobody_receives_from_is_read_all_the_same():
    """Else the frames of one end would wait for the calls of the other one."""
    links = []
    server = serve("tcp://127.0.0.1:0", lambda link: (links.append(link), link.recv(WAIT_S)))
    try:
        near = dial(server.address, timeout_s=WAIT_S)
        until(lambda: links)
        for i in range(20):
            links[0].send(Frame("x", {"i": i}, {"x": torch.zeros(1 << 20, dtype=torch.uint8)}))
        until(lambda: near._inbox._held > 20 << 20)  # all are there before the first recv
        assert [near.recv(0.0).meta["i"] for _ in range(20)] == list(range(20))
        near.close()
    finally:
        server.stop()


def test_several_threads_receive_from_one_link():
    server = serve("tcp://127.0.0.1:0", echo)
    link = dial(server.address, timeout_s=WAIT_S)
    got = Mailbox[int](1 << 20)

    def receive():
        for _ in range(25):
            got.put(link.recv(WAIT_S).meta["i"], 1)

    threads = [threading.Thread(target=receive) for _ in range(4)]
    for thread in threads:
        thread.start()
    for i in range(100):
        link.send(Frame("x", {"i": i}))
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert sorted(got.get(0.0) for _ in range(100)) == list(range(100))
    link.close()
    server.stop()


def test_a_slow_frame_does_not_hold_a_receiver_beyond_its_time():
    data = encode(Frame("x", {}, {"x": torch.zeros(1000)}))
    given_up = threading.Event()

    def receive(link):
        with contextlib.suppress(TimeoutError):
            with pytest.raises(Exception, match="within"):
                link.recv(0.3)
            given_up.set()
            assert link.recv(WAIT_S).kind == "x"
            raise RemoteError("both")

    server = serve("tcp://127.0.0.1:0", receive)
    try:
        with socket.create_connection(place_of(server)) as peer:
            peer.sendall(GREETING)
            assert peer.recv(len(GREETING)) == GREETING
            sent = 0
            while not given_up.is_set():
                assert sent < len(data) - 1
                peer.sendall(data[sent : sent + 1])
                sent += 1
                time.sleep(0.002)
            peer.sendall(data[sent:])
            peer.settimeout(WAIT_S)
            assert b"both" in peer.recv(1000)
    finally:
        server.stop()


def test_links_leave_no_threads_and_no_sockets():
    server = serve("tcp://127.0.0.1:0", echo)
    before = len(threading.enumerate())
    for _ in range(20):
        link = dial(server.address, timeout_s=WAIT_S)
        link.send(Frame("x", {}, {"x": torch.zeros(1 << 20)}))
        link.recv(WAIT_S)
        link.close()
    until(lambda: len(threading.enumerate()) <= before + 1)  # the one that stands by
    server.stop()
    until(lambda: not standby._standby._links)
