"""Many sessions on one edge server, fed by replayed activations: examples per second, and memory.

The edge server is a process of its own, ``fedsys edge``; this process is all its devices. Each has
a link and a thread that sends the activation of one mini-batch again and again, as a device would
that computes in no time. The rival is one session alone on the same server with as many intra-op
threads as there are cores, fed ahead so that it never waits for its device. They take turns.

The memory of a session is the rise of the server's resident size over what it had when it was empty
(after a first session came and went, so that what is loaded once is not counted), at its peak,
divided by the number of sessions. It is compared with what a session cannot do without, if all
compute at once: weights, optimizer state and the activations of a mini-batch, which are the tensors
that PyTorch saves for the backward pass, with the input and without the weights.

With ``workers`` another edge server, whose sessions compute in so many processes, takes turns with
one that computes for itself: examples per second, and processor time of all its processes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor

from fedsys.commands.bench import Chart, with_quartiles
from fedsys.commands.bench.rounds import EdgeProcess, edge_process
from fedsys.config import Config, EdgeAddress, parse, with_values
from fedsys.errors import ConfigError, RuntimeFailure
from fedsys.models.layers import LayeredModel
from fedsys.offload.fleet import Fleet
from fedsys.offload.processors import usable_cores
from fedsys.offload.snapshot import SessionSpec, Snapshot
from fedsys.randomness import Address, drawing
from fedsys.training import federation
from fedsys.training import plain as training
from fedsys.training.federation import layered_model
from fedsys.training.part import filled_stages, names_between, safe_input
from fedsys.training.tasks import loss_of
from fedsys.transport.addresses import dial
from fedsys.transport.link import Link
from fedsys.transport.security import new_token
from fedsys.transport.wire import Frame

_PATIENCE_S: Final = 600.0


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure memory first, then the two in turns.

    Args:
        config: Model, client and data, of which one mini-batch is sent.
        options: ``sessions`` at one time, the ``cut``, ``steps`` of each in a turn, ``turns``,
            ``in_flight`` for the one session, and ``workers``.

    Returns:
        ``many_examples_s`` and ``one_examples_s`` (medians), the median and the quartiles of the
        turns' ``ratio``; per session in MB (10^6 bytes) the rise of the server's size at its peak
        and afterwards, at rest, weights with optimizer state, and activations; ``memory_ratio`` of
        the peak to these. With ``workers`` their ``workers_examples_s``, the median and the
        quartiles of ``workers_ratio``, and processor milliseconds of a mini-batch:
        ``workers_cpu_ms`` and ``alone_cpu_ms``.

    Raises:
        ConfigError: There is no such cut, or an option is not a whole number of at least 1.
        RuntimeFailure: The server does not start.
    """
    workers = options.get("workers")
    counts = ("sessions", "steps", "turns", "in_flight", *(["workers"] if workers else []))
    for name in counts:
        if type(options[name]) is not int or options[name] < 1:
            raise ConfigError.of(f"bench.{name}", options[name], "must be at least 1")
    work = _Work.of(config, int(options["cut"]))
    cores = usable_cores()
    alone = _Work.of(parse(with_values(config.text, client={"threads": cores})), work.cut)
    steps, sessions = options["steps"], options["sessions"]
    with _server() as (edge, fleet):
        pid, address = edge.pid, edge.address
        _train(fleet, address, work, 1, 2)
        empty = _resident(pid)
        _forget_peak(pid)
        peak, rest = _train(fleet, address, work, sessions, max(2, steps), pid).memory
        _train(fleet, address, alone, 1, 2)
        rates = [_turn(fleet, address, work, alone, options, k) for k in range(options["turns"])]
    ratios = (many / one for many, one in rates)
    held, activations = work.held_bytes(), work.activation_bytes()
    per_session = (peak - empty) / sessions
    compared = _with_workers(work, options) if workers else {}
    return {
        "sessions": sessions,
        "cut": work.cut,
        "batch_size": work.batch,
        "cores": cores,
        "many_examples_s": median(many for many, _ in rates),
        "one_examples_s": median(one for _, one in rates),
        **with_quartiles("ratio", ratios),
        "empty_mb": empty / 1e6,
        "session_peak_mb": per_session / 1e6,
        "session_rest_mb": (rest - empty) / sessions / 1e6,
        "held_mb": held / 1e6,
        "activations_mb": activations / 1e6,
        "memory_ratio": per_session / (held + activations),
        **compared,
    }


def _turn(
    fleet: Fleet, address: str, many: _Work, one: _Work, options: Mapping[str, Any], turn: int
) -> tuple[float, float]:
    """Return the examples per second of many sessions and of one, who begin by turns."""
    rates: dict[str, float] = {}
    for who in ("many", "one") if turn % 2 else ("one", "many"):
        sessions, steps = options["sessions"], options["steps"]
        if who == "many":
            rates[who] = _train(fleet, address, many, sessions, steps).rate
        else:  # as many steps as the others do together
            steps, ahead = max(2, sessions * steps), options["in_flight"]
            rates[who] = _train(fleet, address, one, 1, steps, ahead=ahead).rate
    return rates["many"], rates["one"]


def _with_workers(work: _Work, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what processes for the sessions of an edge server change."""
    sessions, steps, count = options["sessions"], options["steps"], options["workers"]
    alone, several = list[_Turn](), list[_Turn]()
    with _server() as first, _server(count) as second:
        servers = [(first, alone), (second, several)]
        for (edge, fleet), _ in servers:
            _train(fleet, edge.address, work, sessions, 1)
        for turn in range(options["turns"]):
            for (edge, fleet), turns in servers if turn % 2 else reversed(servers):
                turns.append(_train(fleet, edge.address, work, sessions, steps, cpu_s=edge.cpu_s))
    ratios = (b.rate / a.rate for a, b in zip(alone, several, strict=True))
    per_batch = 1000 / (sessions * steps)
    return {
        "workers": count,
        "alone_examples_s": median(turn.rate for turn in alone),
        "workers_examples_s": median(turn.rate for turn in several),
        **with_quartiles("workers_ratio", ratios),
        "alone_cpu_ms": per_batch * median(turn.cpu_s for turn in alone),
        "workers_cpu_ms": per_batch * median(turn.cpu_s for turn in several),
    }


# --------------------------------------------------------------------------------------------------
# The server


@contextmanager
def _server(workers: int = 1) -> Iterator[tuple[EdgeProcess, Fleet]]:
    """Yield an edge server and a handle on it."""
    with (
        edge_process(workers=workers) as edge,
        Fleet([EdgeAddress(edge.name, edge.address)], control_token=edge.token) as fleet,
    ):
        yield edge, fleet


def _resident(pid: int, what: str = "VmRSS") -> int:
    """Return the resident size of a process in bytes, ``VmHWM`` for the largest so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))


def _forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


# --------------------------------------------------------------------------------------------------
# Sessions and their devices


@dataclass(frozen=True)
class _Work:
    """What every device sends, and to what.

    Attributes:
        config: The run.
        model: On ``meta``.
        state: Weights of the whole model.
        shape: ``(C, H, W)`` of one example.
        classes: Number of classes.
        cut: Units ``[cut, L)`` are on the edge server.
        activation: What crosses the cut, of one mini-batch.
        labels: Of its examples.
    """

    config: Config
    model: LayeredModel
    state: Mapping[str, Tensor]
    shape: tuple[int, ...]
    classes: int
    cut: int
    activation: Tensor
    labels: Tensor

    @classmethod
    def of(cls, config: Config, cut: int) -> _Work:
        """Return the work of a configuration at a cut.

        Raises:
            ConfigError: The model has no such cut.
        """
        training.set_threads(config.client.threads)
        dataset = federation.federation(config).dataset
        shape, classes = dataset.input_shape, dataset.num_classes
        model = layered_model(config, shape, classes)
        if not 0 < cut < len(model):
            raise ConfigError.of("bench.cut", cut, f"must be from 1 to {len(model) - 1}")
        batch = config.client.batch_size
        draw = torch.Generator().manual_seed(config.seed)
        activation = torch.rand(batch, *model.units[cut - 1].out_shape, generator=draw)
        labels = torch.arange(batch) % classes
        built = federation.build_model(config, dataset)
        state = {name: tensor.clone() for name, tensor in built.state_dict().items()}
        return cls(config, model, state, shape, classes, cut, activation, labels)

    @property
    def batch(self) -> int:
        """Examples of a mini-batch."""
        return len(self.labels)

    def own_state(self) -> dict[str, Tensor]:
        """Return the weights of the edge's units."""
        _, names = names_between(self.model, [self.cut])
        return {name: tensor for name, tensor in self.state.items() if name in names}

    def open(self, fleet: Fleet, name: str) -> SessionSpec:
        """Open a session."""
        spec = SessionSpec(
            id=name,
            token=new_token(),
            client=0,
            round=1,
            first=self.cut,
            last=len(self.model),
            config=self.config.text,
            input_shape=self.shape,
            num_classes=self.classes,
        )
        fleet.open(spec, Snapshot(0, self.own_state(), {}), fleet.alive[0])
        return spec

    def frame(self, step: int) -> Frame:
        """Return the operation of a step."""
        meta = {"step": step, "piece": 0, "batch": self.batch, "codec": "fp32"}
        tensors = {"x": self.activation, "labels": self.labels}
        return Frame("activation", {**meta, "needs_gradient": True}, tensors)

    def held_bytes(self) -> int:
        """Return the bytes of weights, buffers and optimizer state (one value per weight)."""
        own = self.own_state()
        weights = sum(tensor.nbytes for tensor in own.values())
        trained = {name for name, _ in self.model.graph.named_parameters()}
        momentum = self.config.client.momentum > 0
        return weights + momentum * sum(x.nbytes for name, x in own.items() if name in trained)

    def activation_bytes(self) -> int:
        """Return the bytes of what PyTorch keeps between the forward and the backward pass."""
        own = {name: tensor.clone() for name, tensor in self.own_state().items()}
        client, cpu = self.config.client, torch.device("cpu")
        (stage,) = filled_stages(
            self.model, [self.cut], [1], own, cpu, client.memory_format, kernels=client.kernels
        )
        weights = {tensor.data_ptr() for tensor in stage.state_dict().values()}
        saved: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        x = self.activation.clone().requires_grad_()
        keep(x.detach())
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            drawing(Address(0), 0, self.batch),
        ):
            loss_of(stage.train()(safe_input(stage, x)), self.labels, 1.0)
        return sum(saved.values())


@dataclass(frozen=True)
class _Turn:
    """Examples per second, the server's size in bytes: at its peak, and at the end; its time."""

    rate: float
    memory: tuple[int, int]
    cpu_s: float


def _train(
    fleet: Fleet,
    address: str,
    work: _Work,
    sessions: int,
    steps: int,
    pid: int | None = None,
    *,
    ahead: int = 1,
    cpu_s: Callable[[], float] = lambda: 0.0,
) -> _Turn:
    """Open sessions, let all devices train at once, and release them."""
    specs = [work.open(fleet, new_token()) for _ in range(sessions)]
    links = [_greeted(address, spec) for spec in specs]
    try:
        for link in links:  # whatever a session makes when it first computes
            link.send(work.frame(0))
        for link in links:
            link.recv(_PATIENCE_S)
        failed: list[BaseException] = []
        began, used_s = time.perf_counter(), cpu_s()
        threads = [
            threading.Thread(target=_device, args=(link, work, steps, ahead, failed))
            for link in links
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds, used_s = time.perf_counter() - began, cpu_s() - used_s
        if failed:
            raise failed[0]
        memory = (_resident(pid, "VmHWM"), _resident(pid)) if pid is not None else (0, 0)
        return _Turn(sessions * steps * work.batch / seconds, memory, used_s)
    finally:
        for link in links:
            link.close()
        for spec in specs:
            fleet.release(spec.id)


def _greeted(address: str, spec: SessionSpec) -> Link:
    link = dial(address)
    link.send(Frame("hello", {"session": spec.id, "token": spec.token}))
    welcome = link.recv(_PATIENCE_S)
    if welcome.kind != "welcome":
        raise RuntimeFailure(f"session {spec.id}: {welcome.kind} instead of a welcome")
    return link


def _device(link: Link, work: _Work, steps: int, ahead: int, failed: list[BaseException]) -> None:
    """Send steps 1 to `steps` with up to `ahead` in flight."""
    try:
        sent = 0
        for done in range(steps):
            while sent < min(steps, done + ahead):
                sent += 1
                link.send(work.frame(sent))
            link.recv(_PATIENCE_S)
    except BaseException as error:  # raised where the threads are waited for
        failed.append(error)


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return what the memory of a session is made of, and what it takes."""
    names: Sequence[str] = ("held_mb", "activations_mb", "session_rest_mb", "session_peak_mb")
    return Chart(
        f"{figures['sessions']} sessions: {figures['ratio']:.2f} of the examples/s of one",
        "of one session",
        "MB",
        ["weights, optimizer", "activations", "resident at rest", "resident at the peak"],
        {"one session": [figures[name] for name in names]},
    )
