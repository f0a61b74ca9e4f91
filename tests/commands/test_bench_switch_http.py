"""Why this is measured: a lone client waited 53 ms for an answer of 3, and no benchmark saw it.

The listening socket was made without naming its protocol, so asyncio left the algorithm of Nagle
on; headers and body of an answer were two writes, and the second waited for the acknowledgement of
the client, who delayed it by 40 ms. `fedsys bench switch` called the engine inside of the process.
"""

import contextlib
import json
import socket
import threading
import time

import numpy as np
import pytest

from fedsys.commands.bench.crowd import Form
from fedsys.commands.bench.switch_http import (
    HeardOverHttp,
    KeptConnection,
    answer_of,
    is_prompt,
    measure,
)
from fedsys.errors import RuntimeFailure
from fedsys.main import main
from fedsys.pruning.portfolio import Portfolio

ABOUT = {"queue_ms": 0.5, "compute_ms": 1.0, "variant": "parent"}
RIGHT = np.array([[1.0, 2.0]], np.float32)


@contextlib.contextmanager
def answering(*pieces, pause_s=0.0):
    """A server on loopback that answers each request by these pieces, and pauses between them."""

    def serve():
        with contextlib.suppress(OSError):
            while True:
                peer, _ = listening.accept()
                with peer:
                    while peer.recv(1000):
                        for number, piece in enumerate(pieces):
                            time.sleep(pause_s if number else 0.0)
                            peer.sendall(piece)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def answer(scores):
    body = json.dumps({"parameters": ABOUT, "outputs": [{"data": scores}]}).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body), body


def asked(address, times=3):
    heard, form = HeardOverHttp(), Form("POST", "/", b"x")
    with contextlib.closing(KeptConnection(address, form, {"parent": RIGHT})) as connection:
        assert connection.delays_small_writes
        for _ in range(times):
            connection.ask(heard)
    return heard


def test_answers_over_http_are_those_of_their_variants_while_these_change(portfolio_folder):
    rows = measure(
        Portfolio.load(portfolio_folder), {"http_seconds": 0.1, "http_switches": 4}, threads=1
    )
    assert [(row["encoding"], row["phase"]) for row in rows] == [
        ("json", "quiet"), ("json", "switching"), ("binary", "quiet"), ("binary", "switching"),
    ]  # fmt: skip
    for row in rows:
        assert row["requests"] > 0 and row["failed"] == row["wrong"] == 0
        assert 0 < row["engine_p50_ms"] < row["http_p50_ms"] <= row["http_p99_ms"]
        assert 0 < row["beyond_p10_ms"] <= row["beyond_p50_ms"] < row["http_p50_ms"]
        assert row["switches"] >= 4 if row["phase"] == "switching" else row["variants"] == 1


def test_a_delay_between_the_writes_of_an_answer_is_found():
    with answering(*answer([1.0, 2.0]), pause_s=0.04) as address:
        late = asked(address).row()
    assert late["engine_p50_ms"] == 1.5 and late["http_p50_ms"] >= 40.0
    assert late["beyond_p50_ms"] == pytest.approx(late["http_p50_ms"] - 1.5)
    assert not is_prompt([late])
    assert is_prompt([{"beyond_p10_ms": 1.0, "failed": 0, "wrong": 0}])


def test_an_answer_of_another_variant_or_none_is_counted():
    with answering(b"".join(answer([1.0, 2.5]))) as address:
        heard = asked(address)
    assert heard.wrong == 3 and heard.failed == 0 and heard.variants == {"parent"}
    with answering(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n") as address:
        row = asked(address).row()
    assert row["failed"] == row["requests"] == 3 and not is_prompt([row])


def test_an_endpoint_that_ends_is_told_in_words():
    with answering(b"".join(answer([1.0, 2.0]))) as address:
        pass
    with pytest.raises(RuntimeFailure, match="does not answer"):
        asked(address)


def test_an_answer_with_raw_tensors_is_read_like_json():
    body = json.dumps({"parameters": ABOUT}).encode()
    head = b"HTTP/1.1 200 OK\r\nInference-Header-Content-Length: %d" % len(body)
    about, scores = answer_of(head, body + RIGHT.tobytes())
    assert about == ABOUT and scores.tolist() == [1.0, 2.0]


def test_no_switches_over_http_are_refused(portfolio_folder, capsys):
    call = ["bench", "switch", f"portfolio={portfolio_folder}", "bench.http_switches=0"]
    assert main(call) == 2
    assert "bench.http_switches=0: must be an integer of at least 1" in capsys.readouterr().err
