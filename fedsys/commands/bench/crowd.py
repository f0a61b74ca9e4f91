"""Those who want something of an endpoint, and those who only take its places, memory and time.

As a process it is the latter: ``python -m fedsys.commands.bench.crowd ADDRESS CROWD`` says that it
has begun, presses until its standard input ends, and then prints what became of it as JSON.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fedsys.serving import v2

PATH = "/v2/models/{}/infer"
_AGAIN_S = 0.5  # from the end of a connection to the next one in its place
_TRICKLE_S = 1.0  # from byte to byte of slow headers
_PIECE = 1 << 16
_TIMEOUT_S = 60.0
_NICE = 10  # the crowd stands for other machines: what it computes itself is no load of this one


@dataclass(frozen=True)
class Crowd:
    """Who presses.

    Attributes:
        idle: Connections that say nothing.
        slow: Connections that send one byte of headers each second.
        header_bytes: Of headers without an end, until so many are sent.
        bodies: Requests at one time with a large JSON body.
        body_bytes: Of each.
        name: Of the model.
        input_shape: Of the model.
        rows: Images in each body.
    """

    idle: int
    slow: int
    header_bytes: int
    bodies: int
    body_bytes: int
    name: str
    input_shape: tuple[int, ...]
    rows: int


@dataclass
class Heard:
    """What clients heard.

    Attributes:
        ms: Of each answer, in milliseconds.
        failures: What else happened, by text.
    """

    ms: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)

    def quantile(self, share: float) -> float:
        """Return the time within which that share was answered, in milliseconds; NaN for none."""
        return float(np.quantile(self.ms, share)) if self.ms else float("nan")


@dataclass(frozen=True)
class Form:
    """A request as it is sent.

    Attributes:
        method: Of HTTP.
        path: Of HTTP.
        body: None for none.
        headers: Of HTTP.
    """

    method: str
    path: str
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)


HEALTH = Form("GET", "/v2/health/ready")


def forms(name: str, input_shape: Sequence[int], only: Sequence[str] = ()) -> dict[str, Form]:
    """Return a request about one image as JSON and with a raw tensor.

    Args:
        name: Of the model.
        input_shape: Of the model.
        only: Outputs that are asked for; all if empty.
    """
    outputs = {"outputs": [{"name": output} for output in only]} if only else {}
    image = np.random.default_rng(0).normal(size=(1, *input_shape)).astype("<f4")
    entry = {"name": v2.INPUT, "datatype": "FP32", "shape": list(image.shape)}
    raw = {**entry, "parameters": {"binary_data_size": image.nbytes}}
    head = json.dumps(
        {"inputs": [raw], "parameters": {"binary_data_output": True}, **outputs}
    ).encode()
    text = json.dumps({"inputs": [{**entry, "data": image.ravel().tolist()}], **outputs}).encode()
    path = PATH.format(name)
    return {
        "json": Form("POST", path, text),
        "binary": Form("POST", path, head + image.tobytes(), {v2.HEADER_LENGTH: str(len(head))}),
    }


def whole(form: Form) -> bytes:
    """Return a request as it is on a connection that is kept."""
    body = form.body or b""
    headers = {"Host": "localhost", "Content-Length": str(len(body)), **form.headers}
    lines = [f"{form.method} {form.path} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def ask(
    address: str, form: Form, until: Callable[[int], bool], pause_s: float, *, keep: bool = True
) -> Heard:
    """Ask again and again, as one client that keeps its connection, and note what is heard.

    Args:
        address: As ``http://host:port``.
        form: The request.
        until: Given how often was asked: whether that is enough.
        pause_s: From an answer to the next request.
        keep: Whether the connection is kept; else each request has one of its own.
    """
    heard, asked = Heard(), 0
    place = address.removeprefix("http://")
    with closing(http.client.HTTPConnection(place, timeout=_TIMEOUT_S)) as connection:
        while not until(asked):
            asked += 1
            start = time.perf_counter()
            try:
                connection.request(form.method, form.path, form.body, form.headers)
                response = connection.getresponse()
                response.read()
            except (OSError, http.client.HTTPException) as error:
                heard.failures[type(error).__name__] += 1
                connection.close()
            else:
                if response.status == 200:
                    heard.ms.append((time.perf_counter() - start) * 1e3)
                else:
                    heard.failures[str(response.status)] += 1
            if not keep:
                connection.close()
            time.sleep(pause_s)
    return heard


# --------------------------------------------------------------------------------------------------
# The crowd


async def press(
    address: str, crowd: Crowd, stop: asyncio.Event, begun: Callable[[], None] = lambda: None
) -> Counter[str]:
    """Press until told to stop, and call `begun` at the start; return how often what happened."""
    pressing = _Pressing(address, crowd, stop)
    begun()
    running = [asyncio.ensure_future(one) for one in pressing.everybody()]
    await stop.wait()
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    return pressing.seen


class _Pressing:
    """What each of a crowd does, and how often what happened."""

    def __init__(self, address: str, crowd: Crowd, stop: asyncio.Event) -> None:
        host, _, port = address.removeprefix("http://").rpartition(":")
        self._place, self._crowd, self._stop = (host, int(port)), crowd, stop
        self._body = _body(crowd) if crowd.bodies else b""
        self.seen: Counter[str] = Counter()

    def everybody(self) -> list[Coroutine[Any, Any, None]]:
        crowd = self._crowd
        return [
            *(self._again("idle", self._say_nothing) for _ in range(crowd.idle)),
            *(self._again("slow", self._trickle) for _ in range(crowd.slow)),
            *(self._again("headers", self._go_on) for _ in range(4 if crowd.header_bytes else 0)),
            *(self._again("bodies", self._send_body) for _ in range(crowd.bodies)),
        ]

    async def _again(
        self, kind: str, once: Callable[[asyncio.StreamWriter], Coroutine[Any, Any, None]]
    ) -> None:
        """Connect, do it, wait for the end of the connection, and begin again."""
        while not self._stop.is_set():
            try:
                reader, writer = await asyncio.open_connection(*self._place)
            except OSError:
                self.seen[f"{kind}: not connected"] += 1
            else:
                self.seen[f"{kind}: connected"] += 1
                task = asyncio.ensure_future(once(writer))
                try:
                    line = await reader.readline()  # the end, or what the endpoint says
                    self.seen[f"{kind}: {line.decode('latin-1').strip()[:12] or 'ended'}"] += 1
                except OSError:
                    self.seen[f"{kind}: reset"] += 1
                finally:
                    task.cancel()
                    writer.transport.abort()
                    await asyncio.gather(task, return_exceptions=True)
            await asyncio.sleep(_AGAIN_S)

    async def _say_nothing(self, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0)

    async def _trickle(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET /v2 HTTP/1.1\r\nX-Slow: ")
        while True:
            writer.write(b"a")
            await asyncio.sleep(_TRICKLE_S)

    async def _go_on(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET /v2 HTTP/1.1\r\nX-Long: ")
        while self.seen["header bytes"] < self._crowd.header_bytes:
            writer.write(b"a" * _PIECE)
            self.seen["header bytes"] += _PIECE
            await writer.drain()

    async def _send_body(self, writer: asyncio.StreamWriter) -> None:
        path, size = PATH.format(self._crowd.name), len(self._body)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}"
        writer.write(f"{head}\r\n\r\n".encode())
        for start in range(0, size, _PIECE):
            writer.write(self._body[start : start + _PIECE])
            await writer.drain()


def _body(crowd: Crowd) -> bytes:
    """Return a right request for as many images as it may hold, written at length."""
    shape = [crowd.rows, *crowd.input_shape]
    count = int(np.prod(shape))
    digits = max(1, crowd.body_bytes // count - len("0.,"))
    number = "0." + "1" * digits
    data = ",".join([number] * count)
    head = f'{{"inputs":[{{"name":"{v2.INPUT}","datatype":"FP32","shape":{shape},"data":['
    return f"{head}{data}]}}]}}".encode()


def main() -> None:
    """Press until standard input ends."""
    os.nice(_NICE)
    address, crowd = sys.argv[1], Crowd(**json.loads(sys.argv[2]))

    async def run() -> Counter[str]:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        def wait() -> None:
            sys.stdin.read()
            loop.call_soon_threadsafe(stop.set)

        threading.Thread(target=wait, daemon=True).start()
        return await press(address, crowd, stop, lambda: print("begun", flush=True))

    print(json.dumps(asyncio.run(run())))


def command(address: str, crowd: Crowd) -> list[str]:
    """Return the command line of the process that presses."""
    about = json.dumps(asdict(crowd))
    return [sys.executable, "-m", "fedsys.commands.bench.crowd", address, about]


if __name__ == "__main__":
    main()
