"""One round of split training for real, watched: edge servers are a process of their own.

So the processor time of this process is that of the devices, and the two do not wait for each
other's interpreter.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import psutil
from flwr.app import Context, Message

from fedsys import config as configuration
from fedsys.config import BETWEEN_PROCESSES, Config, secret
from fedsys.errors import RuntimeFailure
from fedsys.planning.resources import Observation
from fedsys.runtime.apps import load_apps
from fedsys.runtime.local import ClientFunction, play_local
from fedsys.runtime.processes import wait_or_kill
from fedsys.transport.messages import OBSERVATION, PARTITION_ID, TRACE, TraceRecord, number, read
from fedsys.transport.security import new_token

END_S = 20.0
"""Seconds that an edge server has to end when it is told to."""

BEFORE = 1
"""Mini-batches of a device before those that count."""


@dataclass(frozen=True)
class EdgeProcess:
    """An edge server that runs.

    Attributes:
        name: Its name, by which it finds the machine that it stands for.
        address: Where it listens.
        token: What a controller must present.
        pid: Its process.
    """

    name: str
    address: str
    token: str
    pid: int

    def fleet(self) -> dict[str, Any]:
        """Return the values of the group ``fleet`` for a run that uses it."""
        return {
            "edges": [{"name": self.name, "address": self.address}],
            "control_token": self.token,
        }

    def cpu_s(self) -> float:
        """Return the processor time that it has used, with the processes of its sessions."""
        edge = psutil.Process(self.pid)
        times = [one.cpu_times() for one in (edge, *edge.children(recursive=True))]
        return float(sum(one.user + one.system for one in times))


@contextlib.contextmanager
def edge_process(
    kind: str = BETWEEN_PROCESSES,
    name: str = "edge-0",
    token: str = "",
    *,
    faults: bool = False,
    workers: int = 1,
) -> Iterator[EdgeProcess]:
    """Start ``fedsys edge`` on loopback, and end it with the block.

    Args:
        kind: Of its links: ``grpc`` or ``tcp``.
        name: Its name.
        token: What a controller must present; empty: a new one.
        faults: Whether a run may kill it.
        workers: Processes in which its sessions compute.

    Raises:
        RuntimeFailure: It does not start.
    """
    token = token or new_token()
    command = [
        *(sys.executable, "-m", "fedsys.main", "edge", "json=true", f"edge.name={name}"),
        *(f"edge.address={kind}://127.0.0.1:0", "edge.http=null"),
        *(f"edge.faults={str(faults).lower()}", f"edge.workers={workers}"),
    ]
    environment = {**os.environ, secret.VARIABLE: token}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeFailure("the edge server of the benchmark did not start")
        yield EdgeProcess(name, str(json.loads(line)["ready"]["address"]), token, process.pid)
    finally:
        process.terminate()
        wait_or_kill(process, END_S)
        if process.stdout is not None:
            process.stdout.close()


@dataclass
class RoundWatch:
    """What the devices of one round did, noted around their app.

    Attributes:
        ends: By device, when each mini-batch ended.
        observations: By device, what it tells the server app; nothing where it was alone.
        late_s: By device, seconds by which its real work was behind.
        window_s: From the first device's begin to the last one's end.
        device_cpu_s: Processor time of the devices' process in that time.
        edge_cpu_s: That of the edge server.
    """

    ends: dict[int, list[float]] = field(default_factory=dict)
    observations: dict[int, Observation] = field(default_factory=dict)
    late_s: dict[int, float] = field(default_factory=dict)
    window_s: float = 0.0
    device_cpu_s: float = 0.0
    edge_cpu_s: float = 0.0

    def iterations(self, count: int) -> list[float]:
        """Return the seconds of `count` mini-batches of each device, without the first."""
        found = []
        for ends in self.ends.values():
            steps = [b - a for a, b in pairwise(ends)]
            found += steps[BEFORE - 1 : BEFORE - 1 + count]
        return found

    @property
    def steps(self) -> int:
        """Mini-batches of all devices."""
        return sum(map(len, self.ends.values()))


class Watching:
    """The client app, with someone who looks at the clock.

    Args:
        app: The client app.
        edge_cpu_s: Tells the processor time of the edge server.
        ready: Called before the first device begins.
    """

    def __init__(
        self,
        app: ClientFunction,
        edge_cpu_s: Callable[[], float] = lambda: 0.0,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._app, self._edge_cpu_s, self._ready, self.watch = app, edge_cpu_s, ready, RoundWatch()
        self._lock = threading.Lock()
        self._began: tuple[float, float, float] | None = None

    def __call__(self, message: Message, context: Context) -> Message:
        """Hand the message to the app, and note when it was at work."""
        if message.metadata.message_type != "train":
            return self._app(message, context)
        with self._lock:
            if self._began is None:
                self._ready()
                self._began = self._now()
        reply = self._app(message, context)
        with self._lock:
            self._note(reply, context)
        return reply

    def _now(self) -> tuple[float, float, float]:
        return time.monotonic(), time.process_time(), self._edge_cpu_s()

    def _note(self, reply: Message, context: Context) -> None:
        watch, began = self.watch, self._began
        if began is None or not reply.has_content():
            return
        now = self._now()
        watch.window_s, watch.device_cpu_s, watch.edge_cpu_s = (
            b - a for a, b in zip(began, now, strict=True)
        )
        device = int(number(context.node_config, PARTITION_ID))
        records = reply.content.config_records
        if OBSERVATION in records:
            seen = Observation.of(records[OBSERVATION])
            if seen.bytes_up:
                watch.observations[device] = seen
        if TRACE in records:
            trace = read(TraceRecord, records[TRACE])
            watch.ends[device], watch.late_s[device] = list(trace.ends), trace.late


def watched_round(config: Config, edge: EdgeProcess, **values: Any) -> tuple[RoundWatch, float]:
    """Carry out one round of training.

    Args:
        config: What all rounds have in common.
        edge: The edge server.
        values: More of the configuration, by group.

    Returns:
        What was seen, and the metric of the run for its model on the test part.

    Raises:
        RuntimeFailure: A device failed.
        FedsysError: The run failed.
    """
    fleet = {**edge.fleet(), **values.pop("fleet", {})}
    workers = values.get("num_clients", config.num_clients)
    given = {"runtime": {"kind": "local", "workers": workers}, **values}
    text = configuration.with_values(config.text, json=True, fleet=fleet, **given)
    made = configuration.parse(text)
    server, client = load_apps(made)
    watching = Watching(client, edge.cpu_s)
    play_local(made, server, watching)
    watch = watching.watch
    if len(watch.ends) != made.num_clients and made.fleet.emulate:
        raise RuntimeFailure(f"{made.run.dir}: {len(watch.ends)} of the devices finished")
    with open(f"{made.run.dir}/run.json", encoding="utf-8") as file:
        return watch, float(json.load(file)["result"][made.task.measure.name])
