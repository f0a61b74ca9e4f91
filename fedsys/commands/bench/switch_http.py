"""What a request takes over HTTP beside what the engine takes for it, also while variants change.

The benchmark is the client: it asks over one connection that it keeps, as soon as it has its
answer, each request in one write, with the algorithm of Nagle as the kernel has it. The endpoint of
``fedsys serve`` answers in a process of its own, by a variant that is held still and then changes
again and again. An answer says how long it waited and was computed; what its client waited longer
is of HTTP and of reading. Where a delay of the network hides in there (an answer in two writes, of
which the second waits for the acknowledgement of the first: 40 ms), it shows here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, final
from urllib.parse import urlsplit

import numpy as np
import torch

from fedsys.commands.bench import python_path
from fedsys.commands.bench.crowd import Form, forms, whole
from fedsys.commands.bench.serving_clients import Client
from fedsys.commands.bench.switch_load import LeasedEngine
from fedsys.commands.serve import SWITCH_S
from fedsys.config.serving import ServingConfig
from fedsys.errors import RuntimeFailure
from fedsys.pruning.measuring import quantile
from fedsys.pruning.portfolio import Portfolio
from fedsys.serving import v2
from fedsys.serving.http import Endpoint
from fedsys.serving.portfolio import QUICK_MS
from fedsys.serving.switch.policy import profile_of
from fedsys.serving.switch.switcher import Loaded

MOST_MS = 10.0
"""What HTTP may add to the fastest tenth of all requests: a quarter of a delayed acknowledgement.

Such a delay meets them all; one by other processes on a busy machine, in the median too, does not.
"""

_PATIENCE_S = 600.0
_NAME = "classifier"
_WARM = 20


@dataclass(frozen=True)
class EndpointCase:
    """What the process of the endpoint is to do.

    Attributes:
        portfolio: Folder.
        threads: Intra-op threads.
    """

    portfolio: str
    threads: int


@dataclass
class HeardOverHttp:
    """What a client heard.

    Attributes:
        took_ms: From each request to its answer.
        engine_ms: What the engine took of that, waiting included, as the answer says.
        failed: Answers that are none.
        wrong: Answers that differ, in a bit, from what the variant gives that they name.
        variants: Those that answered.
    """

    took_ms: list[float] = field(default_factory=list)
    engine_ms: list[float] = field(default_factory=list)
    failed: int = 0
    wrong: int = 0
    variants: set[str] = field(default_factory=set)

    def row(self) -> dict[str, Any]:
        """Return its figures."""
        beyond = [a - b for a, b in zip(self.took_ms, self.engine_ms, strict=True)]
        return {
            "requests": len(self.took_ms) + self.failed,
            "failed": self.failed,
            "wrong": self.wrong,
            "variants": len(self.variants),
            **{
                f"{name}_{part}_ms": quantile(values, q) if values else float("nan")
                for name, values in (
                    ("http", self.took_ms), ("engine", self.engine_ms), ("beyond", beyond),
                )
                for part, q in (("p10", 0.1), ("p50", 0.5), ("p99", 0.99))
            },
        }  # fmt: skip


@final
class KeptConnection:
    """A client with one connection, and what the answers to its one request are to be.

    Args:
        address: As ``http://host:port``.
        form: The request: of one image, for scores.
        right: Scores of each variant, float32 ``(1, classes)``.
    """

    def __init__(self, address: str, form: Form, right: Mapping[str, Any]) -> None:
        parts = urlsplit(address)
        self._place = str(parts.hostname), int(parts.port or 0)
        self._client, self._request, self._right = self._connected(), whole(form), right

    def _connected(self) -> Client:
        try:
            return Client(socket.create_connection(self._place, _PATIENCE_S))
        except OSError as error:
            text = f"the endpoint of the benchmark does not answer: {error}"
            raise RuntimeFailure(text) from error

    def ask(self, heard: HeardOverHttp) -> None:
        """Ask once, and add what is heard; a connection that ended is made anew.

        Raises:
            RuntimeFailure: There is nobody who answers.
        """
        try:
            self._client.ask(self._request)
            while not self._client.take():
                pass
        except OSError:
            heard.failed += 1
            self.close()
            self._client = self._connected()
            return
        took_ms = (time.perf_counter() - self._client.since) * 1e3
        head, _, body = bytes(self._client.got).partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            heard.failed += 1
            return
        about, scores = answer_of(head, body)
        heard.took_ms.append(took_ms)
        heard.engine_ms.append(about["queue_ms"] + about["compute_ms"])
        heard.variants.add(about["variant"])
        heard.wrong += not np.array_equal(scores, self._right[about["variant"]].ravel())

    @property
    def delays_small_writes(self) -> bool:
        """Whether the algorithm of Nagle is on, as it is where nobody turns it off."""
        return not self._client.peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    def close(self) -> None:
        """End the connection."""
        self._client.peer.close()


def answer_of(head: bytes, body: bytes) -> tuple[Mapping[str, Any], Any]:
    """Return the parameters of an answer, and its scores as float32."""
    end = len(body)
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == v2.HEADER_LENGTH.lower().encode():
            end = int(value)
    tree = json.loads(body[:end])
    raw = np.frombuffer(body[end:], "<f4")
    scores = raw if raw.size else np.array(tree["outputs"][0]["data"], np.float32)
    return tree["parameters"], scores


def measure(portfolio: Portfolio, options: Mapping[str, Any], threads: int) -> list[dict[str, Any]]:
    """Ask in either encoding, while nothing changes and while variants do.

    Args:
        portfolio: At least two variants.
        options: ``http_seconds`` and ``http_switches`` of ``conf/bench/switch.yaml``.
        threads: Intra-op threads.

    Returns:
        A row for each encoding and phase: `HeardOverHttp.row`, and what a switch took.

    Raises:
        RuntimeFailure: The process of the endpoint failed.
    """
    asked = forms(_NAME, portfolio.about.input_shape, only=(v2.SCORES,))
    right = _right(portfolio, asked["binary"])
    seconds, switches = float(options["http_seconds"]), int(options["http_switches"])
    rows = []
    with _endpoint(EndpointCase(str(portfolio.folder.absolute()), threads)) as (address, order):
        for encoding, form in asked.items():
            with contextlib.closing(KeptConnection(address, form, right)) as connection:
                for _ in range(_WARM):
                    connection.ask(HeardOverHttp())
                quiet, changing = HeardOverHttp(), HeardOverHttp()
                end = time.perf_counter() + seconds
                while time.perf_counter() < end:
                    connection.ask(quiet)
                costs = order(switches, partial(connection.ask, changing))
            rows.append({"encoding": encoding, "phase": "quiet", **quiet.row(), "switches": 0})
            rows.append({"encoding": encoding, "phase": "switching", **changing.row(), **costs})
    return rows


def is_prompt(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether HTTP added no more than `MOST_MS`, and no answer was lost or mixed."""
    return all(
        row["beyond_p10_ms"] <= MOST_MS and not row["failed"] and not row["wrong"] for row in rows
    )


def _right(portfolio: Portfolio, form: Form) -> dict[str, Any]:
    shape = portfolio.about.input_shape
    size = 4 * int(np.prod(shape))
    image = np.frombuffer((form.body or b"")[-size:], "<f4").reshape(1, *shape)
    with torch.inference_mode():
        return {
            v.name: portfolio.module(v.name)(torch.from_numpy(image.copy())).numpy()
            for v in portfolio.variants
        }


@contextlib.contextmanager
def _endpoint(
    case: EndpointCase,
) -> Iterator[tuple[str, Callable[[int, Callable[[], None]], dict[str, Any]]]]:
    """Start the process, and end it with the block.

    Yields its address, and a function that has it change variants so many times and calls another
    again and again meanwhile.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "fedsys.commands.bench.switch_http", json.dumps(asdict(case))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": python_path()},
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None  # both are pipes
    source, sink = process.stdin, process.stdout

    def line() -> dict[str, Any]:
        text = sink.readline()
        if not text:
            raise RuntimeFailure("the endpoint of the benchmark ended")
        told: dict[str, Any] = json.loads(text)
        return told

    def order(switches: int, meanwhile: Callable[[], None]) -> dict[str, Any]:
        source.write(f"{switches}\n")
        source.flush()
        while not select.select([sink], [], [], 0.0)[0]:
            meanwhile()
        return line()

    try:
        yield line()["address"], order
    finally:
        source.close()
        try:
            process.wait(_PATIENCE_S)
        except BaseException:
            process.kill()
            raise
        finally:
            sink.close()


def serve(case: EndpointCase) -> None:
    """Answer until standard input ends; change variants as often as each line of it says."""
    torch.set_num_threads(case.threads)
    sys.setswitchinterval(SWITCH_S)
    portfolio = Portfolio.load(Path(case.portfolio))
    profiles = [profile_of(v, case.threads) for v in portfolio.variants]
    first = portfolio.parent.name
    names = [first, *(v.name for v in portfolio.variants if v.name != first)]
    switcher = Loaded(portfolio.module, first, (torch.zeros(1, *portfolio.about.input_shape),))
    quick = {profile.name for profile in profiles if profile.latency[0].p50_ms < QUICK_MS}
    engine = LeasedEngine(portfolio, switcher, quick)
    options = dataclasses.replace(ServingConfig(), address="http://127.0.0.1:0", name=_NAME)
    endpoint = Endpoint(engine, options)
    try:
        print(json.dumps({"address": endpoint.address}), flush=True)
        for order in sys.stdin:
            turns = [names[n % len(names)] for n in range(1, int(order) + 1)]
            costs = [switcher.switch(name) for name in (*turns, first)]
            costs = [cost for cost in costs if cost.before != cost.after]
            told = {
                "switches": len(costs),
                "switch_ms": quantile([cost.total_ms for cost in costs], 0.5),
                "blocked_ms_max": max(cost.blocked_ms for cost in costs),
            }
            print(json.dumps(told), flush=True)
    finally:
        endpoint.close()


if __name__ == "__main__":
    serve(EndpointCase(**json.loads(sys.argv[1])))
