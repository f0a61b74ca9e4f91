"""A chain of host processes that can be killed, stopped, cut off and slowed, under load."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

from fedsys.commands.host import start_host
from fedsys.config import Config
from fedsys.errors import FedsysError, RuntimeFailure
from fedsys.pruning.portfolio import Portfolio
from fedsys.serving.chain import ChainEngine
from fedsys.serving.chain_opening import OpenedChain
from fedsys.serving.recovery.continuer import Continuer
from fedsys.serving.routes import route_of

_PORT_S = 10.0
_FIRST, _PAUSE_S = 2, 0.02  # requests that do not count, and the pause behind each
_DUTY_S = 0.02  # a slowed host runs and is stopped in turns of this length together


@final
class HostProcess:
    """One host process behind a forwarder, at an address that stays when it is started again.

    Args:
        name: Of the host.
        token: That its controller presents.
        threads: Intra-op threads of a forward pass.

    Attributes:
        ended_s: When its process was taken down by the last fault, by `time.monotonic`; None: it
            was not.
    """

    ended_s: float | None = None

    def __init__(self, name: str, token: str, threads: int) -> None:
        self.name, self._token, self._threads = name, token, threads
        self._address = "tcp://127.0.0.1:0"
        self.start()
        port = self._address.rpartition(":")[2]
        self._proxy = subprocess.Popen(
            [sys.executable, "-m", "fedsys.commands.bench.soak_proxy", port],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._proxy.stdout is not None
        self.address = f"tcp://127.0.0.1:{self._proxy.stdout.readline().strip()}"

    def start(self) -> None:
        """Start the process, again where it was."""
        given = [f"host.name={self.name}", f"host.address={self._address}", "host.drain_s=0"]
        given.append(f"host.threads={self._threads}")
        until = time.monotonic() + _PORT_S
        while True:
            try:
                self.pid, self._spawned = start_host(given, self._token)
            except RuntimeFailure:
                if time.monotonic() > until:
                    raise
                continue
            self._address = self._spawned.address
            return

    def strike(self, fault: str, seconds: float, share: float) -> None:
        """Let a fault strike; returns when it has. What lasts goes on in a thread."""
        self.ended_s = None
        if fault == "kill":
            threading.Thread(target=self._see_end, daemon=True).start()
            os.kill(self.pid, signal.SIGKILL)
        elif fault == "cut":
            assert self._proxy.stdin is not None
            self._proxy.stdin.write(f"cut {seconds}\n")
            self._proxy.stdin.flush()
        elif fault == "pause":
            os.kill(self.pid, signal.SIGSTOP)
            threading.Timer(seconds, os.kill, (self.pid, signal.SIGCONT)).start()
        else:
            threading.Thread(target=self._slow, args=(seconds, share), daemon=True).start()

    def _see_end(self) -> None:
        """Take note of when the system has taken the process down: its sockets end just before."""
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        self.ended_s = time.monotonic()

    def _slow(self, seconds: float, share: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            os.kill(self.pid, signal.SIGSTOP)
            time.sleep(_DUTY_S * (1 - share))
            os.kill(self.pid, signal.SIGCONT)
            time.sleep(_DUTY_S * share)

    def mend(self, fault: str) -> None:
        """Start it again if it was killed."""
        if fault == "kill":
            self._spawned.end()
            self.start()

    def close(self) -> None:
        """End the process and its forwarder."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)
        self._spawned.end()
        self._proxy.kill()
        self._proxy.wait()
        for stream in (self._proxy.stdin, self._proxy.stdout):
            if stream is not None:
                stream.close()


@dataclass
class RequestLedger:
    """What became of requests.

    Attributes:
        issued: How many were sent.
        answers: When each was answered, by number.
        failed: Errors by number.
        twice: Requests that were answered more than once.
        around: Requests that another route answered than that of all hosts.
    """

    issued: int = 0
    answers: dict[int, float] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    twice: int = 0
    around: set[int] = field(default_factory=set)

    def first_around(self, since: float) -> float | None:
        """Return when the first request from a moment on was answered by another route."""
        there = list(self.answers.items())
        return min((at for n, at in there if at >= since and n in self.around), default=None)


@final
class ConstantLoad:
    """Sends one image at equal distances, each in a thread of its own, until it is closed.

    Args:
        engine: Answers.
        images: Are asked about in turn, ``(n, C, H, W)``.
        rate: Requests per second.
    """

    def __init__(self, engine: ChainEngine, images: Tensor, rate: float) -> None:
        self._engine, self._images, self._rate = engine, images, rate
        self.ledger, self._lock = RequestLedger(), threading.Lock()
        self._end, self._asking = threading.Event(), list[threading.Thread]()
        self._thread = threading.Thread(target=self._issue, daemon=True)
        self._thread.start()

    def _issue(self) -> None:
        due = time.monotonic()
        while not self._end.wait(max(0.0, due - time.monotonic())):
            due += 1 / self._rate
            number = self.ledger.issued
            self.ledger.issued += 1
            thread = threading.Thread(target=self._ask, args=(number,), daemon=True)
            thread.start()
            self._asking = [*(one for one in self._asking if one.is_alive()), thread]

    def _ask(self, number: int) -> None:
        at = number % len(self._images)
        try:
            answer = self._engine.answer(self._images[at : at + 1].numpy())
        except FedsysError as error:
            self.ledger.failed[number] = str(error)
            return
        with self._lock:
            if answer.facts.get("technique", "none") != "none":
                self.ledger.around.add(number)
            self.ledger.twice += number in self.ledger.answers
            self.ledger.answers[number] = time.monotonic()

    def close(self, wait_s: float = 30.0) -> RequestLedger:
        """Send no more, and wait for what is under way."""
        self._end.set()
        self._thread.join()
        for thread in self._asking:
            thread.join(wait_s)
        return self.ledger


@contextmanager
def host_processes(config: Config, token: str) -> Iterator[tuple[Config, list[HostProcess]]]:
    """Start the hosts of a configuration behind forwarders, and yield it with their addresses."""
    threads, names = config.serving.threads or 1, [one.name for one in config.hosts.list]
    with ExitStack() as stack, ThreadPoolExecutor(len(names)) as pool:
        hosts = list(pool.map(lambda name: HostProcess(name, token, threads), names))
        for host in hosts:
            stack.callback(host.close)
        listed = tuple(
            replace(one, address=host.address, start=False)
            for one, host in zip(config.hosts.list, hosts, strict=True)
        )
        yield replace(config, hosts=replace(config.hosts, list=listed, control_token=token)), hosts


@contextmanager
def opened_chain(
    config: Config, portfolio: Portfolio, tell: Callable[[Mapping[str, Any]], None]
) -> Iterator[tuple[ChainEngine, Continuer]]:
    """Open the chain of a configuration, yield it with who looks after it, and close it."""
    opened = OpenedChain(config, portfolio, tell)
    try:
        assert opened.recovery is not None and opened.recovery.continuer is not None
        yield opened.engine, opened.recovery.continuer
    finally:
        opened.close()


def seconds_of(engine: ChainEngine, label: str, image: Tensor, count: int) -> list[float]:
    """Return what each request took along a route, built for that; nothing if it cannot be.

    Requests come with a pause between them, as those of clients do.
    """
    try:
        module = engine.chain.lay(route_of(label), lambda *told: None)
    except FedsysError:
        return []
    took = []
    try:
        with torch.inference_mode():
            for number in range(_FIRST + count):
                took_s = module.rehearse(image)[1]
                took += [took_s] if number >= _FIRST else []
                time.sleep(_PAUSE_S)
    except FedsysError:
        return []
    finally:
        module.close()
    return took
