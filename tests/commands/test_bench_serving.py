import json
import socket
import threading

import pytest

from fedsys.commands.bench.serving import _Cell, _ratios
from fedsys.commands.bench.serving_clients import Errand, ask
from fedsys.main import main


def test_ours_are_measured_and_nothing_is_answered_wrongly(portfolio_folder, tmp_path, capsys):
    call = [
        "bench", "serving", "json=true", f"run.dir={tmp_path / 'run'}", "bench.seconds=0.1",
        f"portfolio={portfolio_folder}", "bench.servers=[fedsys-torch]", "bench.turns=2",
        "bench.clients=[1,3]",
    ]  # fmt: skip
    assert main(call) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    keys = {"server", "clients", "encoding", "requests_s", "p50_ms", "p99_ms", "cpu_ms", "rss_mb"}
    assert [(row["clients"], row["encoding"]) for row in figures["cells"]] == [
        (1, "json"), (1, "binary"), (3, "json"), (3, "binary"),
    ]  # fmt: skip
    for row in figures["cells"]:
        assert keys <= row.keys() and row["wrong"] == 0
        assert row["requests_s"] > 0 and 0 < row["p50_ms"] <= row["p99_ms"] and row["rss_mb"] > 0
    assert figures["ratios"] == [] and figures["left_out"] == []


def test_ratios_are_those_of_the_same_turn_and_goals_need_all():
    ours = _Cell(rates=[100.0, 10.0], took=[1.0, 1.0], cpu_s=0.002, rss=100_000_000)
    theirs = _Cell(rates=[50.0, 5.0], took=[1.0, 1.0], cpu_s=0.002, rss=100_000_000)
    cells = {("fedsys-torch", 1, "json"): ours, ("fastapi-torch", 1, "json"): theirs}
    (row,) = _ratios(cells)
    assert row["requests"] == pytest.approx(2.0) and row["goal"]
    theirs.cpu_s = 0.001
    assert not _ratios(cells)[0]["goal"]


def test_clients_tell_answers_that_are_none(tmp_path):
    """Two clients of a server that refuses the one and answers the other, in two pieces each."""
    request = tmp_path / "request"
    request.write_bytes(b"GET / HTTP/1.1\r\n\r\n")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer(status):
            peer, _ = listening.accept()
            with peer:
                while peer.recv(100):
                    peer.sendall(b"HTTP/1.1 %d X\r\nContent-Length: 2\r\n" % status)
                    peer.sendall(b"\r\nab")

        threads = [threading.Thread(target=answer, args=(status,)) for status in (200, 503)]
        for thread in threads:
            thread.start()
        took, wrong = ask(Errand(listening.getsockname()[1], str(request), 2, 0.05))
        for thread in threads:
            thread.join(10)
    assert 0 < wrong < len(took) and min(took) > 0
