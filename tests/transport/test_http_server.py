"""Places at an HTTP server: who goes when they run out, and what strangers cannot do.

Before, 1,000 idle connections or 300 with slow headers shut everybody out, health checks included;
headers of 200 MiB took 830 MiB; and every answer waited 40 ms for Nagle's algorithm.
"""

import http.client
import json
import resource
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from fedsys.transport import http_server
from fedsys.transport.descriptors import affordable
from fedsys.transport.http_door import Guard
from fedsys.transport.http_parsers import ByH11, Joining
from fedsys.transport.http_places import GRACE_S, HttpLimits, Phase, Seat, overdue, victims
from fedsys.transport.http_server import (
    ConnectionCollector,
    HttpServer,
    listening_socket,
)

NOW = 1000.0


def seat(phase, ago, served=False, body=0):
    return Seat(phase, NOW - ago, served, body)


# --------------------------------------------------------------------------------------------------
# The decisions


def test_those_go_first_that_never_asked_and_those_in_work_never():
    seats = [
        seat(Phase.WORK, 900),
        seat(Phase.BODY, 10, body=10_000_000),
        seat(Phase.BODY, 10, body=10),
        seat(Phase.IDLE, 5, served=True),
        seat(Phase.IDLE, 20, served=True),
        seat(Phase.HEADERS, 3),
        seat(Phase.IDLE, 8),
        seat(Phase.IDLE, GRACE_S / 2),
    ]
    assert victims(seats, NOW, 9) == [6, 5, 4, 3, 2]
    assert victims(seats, NOW, 2) == [6, 5]
    assert victims(seats, NOW, 9, grace_s=0.0) == [6, 5, 7, 4, 3, 2]


@given(st.lists(st.tuples(st.sampled_from(Phase), st.floats(0, 99), st.booleans(), st.integers(0))))
def test_who_works_or_has_just_come_stays(drawn):
    seats = [seat(*one) for one in drawn]
    gone = victims(seats, NOW, len(seats))
    assert len(gone) == len(set(gone))
    for number in gone:
        assert seats[number].phase is not Phase.WORK
        assert NOW - seats[number].since >= GRACE_S


def test_each_phase_has_its_time():
    limits = HttpLimits(header_s=10, keep_alive_s=30)
    assert overdue(seat(Phase.IDLE, 11), NOW, limits)
    assert not overdue(seat(Phase.IDLE, 11, served=True), NOW, limits)
    assert overdue(seat(Phase.IDLE, 31, served=True), NOW, limits)
    assert overdue(seat(Phase.HEADERS, 11, served=True), NOW, limits)
    assert overdue(seat(Phase.BODY, 11, body=100), NOW, limits)
    assert not overdue(seat(Phase.BODY, 11, body=100_000), NOW, limits)
    assert not overdue(seat(Phase.WORK, 1e6), NOW, limits)


# --------------------------------------------------------------------------------------------------
# The server


class App:
    """Answers with the number of bytes of the body; ``/wait`` waits until it may."""

    def __init__(self):
        self.may = threading.Event()

    async def __call__(self, scope, receive, send):
        import asyncio

        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size += len(message["body"])
            more = message["more_body"]
        if scope["path"] == "/wait":
            await asyncio.to_thread(self.may.wait, 20)
        body = json.dumps({"size": size}).encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class Running:
    def __init__(self, **limits):
        self.app = App()
        listening = listening_socket("address", "here", "127.0.0.1", 0)
        self.place = listening.getsockname()
        self.server = HttpServer(
            self.app, listening, HttpLimits(**limits), always=lambda path: path == "/health",
            drain_s=1,
        )  # fmt: skip
        self.registry = CollectorRegistry()
        self.registry.register(ConnectionCollector(self.server, "it"))

    def connect(self):
        return socket.create_connection(self.place, timeout=20)

    def get(self, path="/", body=None, **headers):
        with closing(http.client.HTTPConnection(*self.place, timeout=20)) as connection:
            connection.request("GET", path, body, headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def metric(self, name):
        lines = generate_latest(self.registry).decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def close(self):
        self.app.may.set()
        self.server.close()


@pytest.fixture(params=["h11", "httptools"])
def start(request, monkeypatch):
    if request.param == "h11":
        monkeypatch.setattr(http_server, "parser", lambda: ByH11)
    else:
        pytest.importorskip("httptools")
    with ExitStack() as stack:
        yield lambda **limits: stack.enter_context(closing(Running(**limits)))


def ended(connection):
    """Read until the end; what came."""
    data = b""
    try:
        while piece := connection.recv(65_536):
            data += piece
    except ConnectionError:
        pass
    return data


def test_bodies_and_keep_alive_work_behind_the_door(start):
    running = start()
    with closing(http.client.HTTPConnection(*running.place, timeout=20)) as connection:
        for size in (0, 1, 20_000, 3_000_000):
            connection.request("POST", "/", b"x" * size)
            assert json.loads(connection.getresponse().read()) == {"size": size}
        connection.request("POST", "/", iter([b"abc", b"d" * 100_000]))  # in chunks
        assert json.loads(connection.getresponse().read()) == {"size": 100_003}


def test_answers_are_sent_at_once(start, monkeypatch):
    """Nagle's algorithm is off for each connection: asyncio asks the socket for its protocol."""
    seen, made = [], Guard.connection_made

    def note(guard, transport):
        accepted = transport.get_extra_info("socket")
        seen.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        made(guard, transport)

    monkeypatch.setattr(Guard, "connection_made", note)
    assert start().get()[0] == 200
    assert seen == [1]


def test_requests_that_wait_for_no_answer_are_answered_in_their_order(start):
    with start().connect() as connection:
        for size in (5, 0, 70_000):
            head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n"
            connection.sendall(head.encode() + b"x" * size)
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        said = ended(connection)
    bodies = [part[: part.index(b"}") + 1] for part in said.split(b"\r\n\r\n")[1:]]
    sizes = [json.loads(body)["size"] for body in bodies]
    assert sizes == [5, 0, 70_000, 0]


class Written:
    """A transport that notes what is written to it."""

    def __init__(self):
        self.pieces, self.closed = [], False

    def write(self, data):
        self.pieces.append(bytes(data))

    def close(self):
        self.closed = True


def test_headers_are_sent_with_what_follows_them():
    head, to = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n", Written()
    joining = Joining(to)
    joining.write(head)
    assert to.pieces == []
    joining.write(b"ab")
    assert to.pieces == [head + b"ab"]
    joining.write(head)
    joining.flush()  # an answer to HEAD has no more
    joining.flush()
    joining.write(b"HTTP/1.1 100 Continue\r\n\r\n")  # whoever waits for it sends nothing before
    joining.write(head)
    joining.close()
    assert to.pieces[1:] == [head, b"HTTP/1.1 100 Continue\r\n\r\n", head] and to.closed


def test_a_client_that_waits_before_its_body_is_told_to_go_on(start):
    with start().connect() as connection:
        head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"abc")
        assert b'{"size": 3}' in connection.recv(1000)


POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n"


def answers(said):
    """Status and body of each answer; errors are JSON like all else."""
    found = []
    for part in said.split(b"HTTP/1.1 ")[1:]:
        head, _, body = part.partition(b"\r\n\r\n")
        found.append((int(head[:3]), json.loads(body)))
    return found


@pytest.mark.parametrize("whole", [True, False])
def test_a_peer_that_sends_no_more_gets_all_its_answers(start, whole):
    """Of five requests in one write before a half-close, as ``nc -N`` does it, one was answered;
    half a request was met with silence."""
    with start().connect() as connection:
        connection.sendall((POST + b"abc") * 5 + (b"" if whole else POST + b"a"))
        connection.shutdown(socket.SHUT_WR)
        said = answers(ended(connection))
    assert said[:5] == [(200, {"size": 3})] * 5
    assert whole == (len(said) == 5)
    assert whole or said[5] == (400, {"error": "the connection ended within a request"})


@pytest.mark.parametrize("sent", [b"GET / HT", POST, POST + b"a"])
def test_half_a_request_is_refused_in_words(start, sent):
    with start().connect() as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        said = answers(ended(connection))
    assert said == [(400, {"error": "the connection ended within a request"})]


@pytest.mark.parametrize("half", [POST + b"a", b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_an_answer_that_takes_long_is_not_lost_to_what_is_wrong_behind_it(start, half):
    """Half a body was said to come too slowly, in place of the answer to the request before it,
    which was in work; and after a half-close what was no request was not refused at all."""
    running = start(header_s=0.2, keep_alive_s=0.2)
    with running.connect() as connection:
        connection.sendall(POST.replace(b" / ", b" /wait ") + b"abc" + half)
        connection.shutdown(socket.SHUT_WR)
        time.sleep(1.0)
        running.app.may.set()
        said = answers(ended(connection))
    assert [status for status, _ in said][:-1] == [200]
    assert said[-1][0] == 400 or (http_server.parser() is ByH11 and said[-1][0] == 408)


BAD = [
    b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00",
    b"GET / HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n", b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n",
    POST.replace(b"3", b"-1"), POST.replace(b"3", b"9" * 30), POST.replace(b"3", b"3x"),
    POST.replace(b"Host: x", b"Host: x\r\nContent-Length: 4"),
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\nzz\r\n",
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("before", [0, 1, 3])
def test_what_is_no_request_is_refused_behind_the_answers_to_what_was(start, bad, before):
    """The refusal was sent at once, as plain text, and requests before it were never answered."""
    running = start()
    with running.connect() as connection:
        connection.sendall((POST + b"abc") * before + bad + b"\r\n" * 8)
        said = answers(ended(connection))
    assert said[:-1] == [(200, {"size": 3})] * before
    status, body = said[-1]
    assert status == 400 and body["error"]
    assert running.get()[0] == 200


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_protocol_that_is_asked_for_in_vain_costs_no_body(start, pieces):
    """Clients of Java and ``curl --http2`` ask for HTTP/2 with their first request.

    httptools takes it to end with its headers then, and its body was read as the next request.
    """
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n"
    size = 50_000
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n%s\r\n" % (size, upgrade)
    chunked = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n%s\r\n" % upgrade
    get = b"GET / HTTP/1.1\r\nHost: x\r\n%s\r\n" % upgrade
    asked = [
        (head + b"x" * size, size), (POST + b"abc", 3), (get, 0),
        (chunked + b"5\r\nhello\r\n0\r\n\r\n", 5), (get, 0), (POST + b"abc", 3),
    ]  # fmt: skip
    with start().connect() as connection:
        text = b"".join(one for one, _ in asked)
        cut = 300 if pieces > 1 else len(text)
        connection.sendall(text[:cut])
        if pieces > 1:
            time.sleep(0.05)
            connection.sendall(text[cut:])
        connection.shutdown(socket.SHUT_WR)
        said = answers(ended(connection))
    assert said == [(200, {"size": size}) for _, size in asked]


def test_a_body_that_comes_too_slowly_is_told_so(start):
    """It was cut off without a word."""
    with start(header_s=0.3).connect() as connection:
        connection.sendall(POST)
        said = answers(ended(connection))
    assert said == [(408, {"error": "the body did not arrive in time"})]


@pytest.mark.parametrize("then", ["ends", "stops", "errs"])
def test_a_request_that_is_answered_before_its_body_is_answered_once(start, then, monkeypatch):
    """An unknown address is refused before its body is there. Who ended within it, sent too slowly
    or no chunk got a second answer, which a client takes for that to its next request."""
    if then == "errs" and http_server.parser() is ByH11:
        pytest.skip("h11 does not tell an error within a body from one behind it")

    async def refusing(self, scope, receive, send):
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 404, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})

    monkeypatch.setattr(App, "__call__", refusing)
    chunked = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n"
    with start(header_s=0.3 if then == "stops" else 20).connect() as connection:
        connection.sendall(chunked if then == "errs" else POST + b"a")
        said = connection.recv(1000)
        if then == "ends":
            connection.shutdown(socket.SHUT_WR)
        if then == "errs":
            connection.sendall(b"zz\r\n")
        said += ended(connection)
    assert answers(said) == [(404, {})]


def test_headers_behind_a_request_in_work_are_bounded_as_well(start):
    """httptools reads on while a request is in work: 200 MiB of headers were taken behind one."""
    running, sent = start(), 0
    with running.connect() as connection, pytest.raises((ConnectionError, TimeoutError)):
        connection.sendall(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nX: ")
        connection.settimeout(2)
        while sent < 1 << 28:
            sent += connection.send(b"a" * 65_536)
    assert sent < 1 << 25
    assert running.get()[0] == 200


@pytest.mark.parametrize("at_once", [True, False])
def test_headers_beyond_their_limit_are_refused(start, at_once):
    running = start(header_bytes=4096)
    assert running.get(**{"X": "a" * 3000})[0] == 200
    with running.connect() as connection:
        if at_once:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20_000 + b"\r\n\r\n")
        else:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
            for _ in range(60):
                connection.sendall(b"X: " + b"a" * 100 + b"\r\n")
        assert ended(connection).startswith(b"HTTP/1.1 431 ")
    assert running.metric('it_connections_ended_total{reason="refused_431"}') == 1
    assert running.get()[0] == 200


def test_headers_without_an_end_take_no_memory(start):
    running, sent = start(), 0
    with running.connect() as connection, pytest.raises(ConnectionError):
        connection.sendall(b"GET / HTTP/1.1\r\nX: ")
        while sent < 1 << 28:
            sent += connection.send(b"a" * 65_536)
    assert sent < 1 << 25


def test_slow_headers_and_silence_end_in_time(start):
    running = start(header_s=0.4)
    with running.connect() as silent, running.connect() as slow:
        slow.sendall(b"GET / HTTP/1.1\r\nX: ")
        assert ended(slow).startswith(b"HTTP/1.1 408 ")
        assert ended(silent) == b""
    assert running.metric('it_connections_ended_total{reason="slow_headers"}') == 1
    assert running.metric('it_connections_ended_total{reason="idle"}') == 1


def test_a_body_that_trickles_ends_and_its_place_is_free(start):
    running = start(header_s=0.4)
    with running.connect() as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nx")
        ended(connection)
    assert running.metric('it_connections_ended_total{reason="slow_body"}') == 1
    assert running.metric("it_connections{") == 0


def test_the_idle_go_for_those_who_ask(start):
    running = start(connections=16)
    with ExitStack() as stack:
        keeping = stack.enter_context(closing(http.client.HTTPConnection(*running.place)))
        keeping.request("GET", "/wait")
        for _ in range(300):
            stack.enter_context(running.connect())
        for _ in range(5):
            assert running.get()[0] == 200
            assert running.get("/health")[0] == 200
        assert running.metric('it_connections_ended_total{reason="full"}') > 150
        assert running.metric("it_connections{") <= 16 + 64
        running.app.may.set()
        assert keeping.getresponse().status == 200


def test_health_is_told_while_all_places_are_in_work(start):
    running = start(connections=4)
    with ExitStack() as stack:
        working = []
        for _ in range(4):
            connection = stack.enter_context(closing(http.client.HTTPConnection(*running.place)))
            connection.request("GET", "/wait")
            working.append(connection)
        deadline = time.monotonic() + 20
        while running.metric('it_connections{phase="work"}') < 4:
            assert time.monotonic() < deadline
        assert running.get("/health")[0] == 200
        status, told = running.get()
        assert status == 503
        assert "ask again later" in told["error"]
        assert running.metric("it_requests_full_total") == 1
        running.app.may.set()
        assert [connection.getresponse().status for connection in working] == [200] * 4


def test_places_are_counted_against_the_descriptors_of_the_system():
    program = (
        "import resource; from fedsys.transport.descriptors import affordable;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, {hard})); print(affordable(1000, kept=64),"
        "resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )

    def seen(hard):
        command = [sys.executable, "-c", program.format(hard=hard)]
        return [int(n) for n in subprocess.check_output(command, text=True).split()]

    places, soft = seen(400)
    assert soft == 400
    assert 200 < places < 300
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] >= 4000:
        places, soft = seen(4000)
        assert places == 1000
        assert 1000 < soft < 1300
    assert affordable(10) == 10
