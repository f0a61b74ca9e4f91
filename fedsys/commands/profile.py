"""``fedsys profile``: what this machine takes for the model of a run, as ``fleet=`` reads it.

Units between two useful cuts are timed as one and share its time by their work. Each size of
micro-batch is timed by itself, in training, with the draws and the loss that training has; medians
over repeats, on a GPU after it has finished.

One thread of the CPU is timed by its processor time, so what else the machine does counts for
little. Where a control group leaves this process less than its threads could use, everything takes
as much longer: a short operation, timed by the clock, is over before the quota is used up, and a
long one is not. Both is what a device does that has such a quota while it trains.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import yaml
from torch import Tensor

from fedsys import config as configuration
from fedsys import data
from fedsys.commands.profile_link import LinkCosts, measure_link, other_end, serve_for_ever
from fedsys.config import Config
from fedsys.errors import ConfigError, is_number
from fedsys.models.fused import fuse, fusion_of
from fedsys.models.layers import LayeredModel, layered, stages
from fedsys.offload.processors import processor_quota, usable_cores
from fedsys.partition.profiling import shared_by_work
from fedsys.planning.costs import crossings, tensor_bytes
from fedsys.planning.hardware import made_for, units_sha256
from fedsys.randomness import Address, drawing
from fedsys.runs.folder import RunFolder, default_path, write_atomic
from fedsys.training import federation, optimizers
from fedsys.training import plain as training
from fedsys.training.part import safe_input
from fedsys.training.precision import autocast, for_loss
from fedsys.training.tasks import task_of
from fedsys.transport.addresses import dial
from fedsys.transport.codecs import CODECS, decode_activation, encode_activation
from fedsys.transport.link import Link
from fedsys.transport.security import Credentials, Role
from fedsys.transport.several import arguments, beside
from fedsys.transport.wire import Frame

OPTIONS: Mapping[str, Any] = {
    "repeats": 15,
    "edge": None,
    "serve": None,
    "name": None,
    "quota": None,
}

PIECES = "int8"
"""Codec of the pieces that are computed, sent and answered as in training."""

IN_FLIGHT = 8
"""How many of them at once."""

ANSWER_S = 120.0
"""Longest time for an answer, in seconds."""

Times = dict[int, list[list[float]]]


def job(tree: Any) -> Mapping[str, Any]:
    """Measure, and write ``profile.yaml`` into a run folder.

    Args:
        tree: The composed configuration (a DictConfig); ``profile`` has the options: ``repeats``
            of each measurement; ``edge``, the address of another machine on which this command
            runs with ``serve``; ``name`` of the machine in the file; ``quota``, the cores' worth of
            processor time that its devices have, if its control group does not say so.

    Returns:
        The profile, and its ``file``.

    Raises:
        FedsysError: A value is not usable, or the other machine does not answer.
    """
    path = Path(tree.run.dir or default_path(Path("outputs"), "profile")).absolute()
    tree.run.dir = str(path)
    config = configuration.parse(configuration.to_text(tree))
    options = _options(config.profile)
    credentials = _credentials(config)
    if options["serve"]:
        serve_for_ever(str(options["serve"]), credentials, _announce)
    with RunFolder.create(path, config.text) as folder:
        found = profile(config, options, credentials)
        file = path / "profile.yaml"
        head = "# Written by fedsys profile: use it as fleet=THIS_FILE\n"
        write_atomic(file, (head + fleet_text(found["fleet"])).encode())
        result = {**found, "file": str(file), "run_dir": str(path)}
        folder.finish(result)
    if not tree.json:
        print(f"{found['summary']}\nuse it with fleet={file}")
    return result


def fleet_text(fleet: Mapping[str, Any]) -> str:
    """Return a fleet as YAML, each list of numbers and each small group on a line of its own."""
    return yaml.dump(fleet, Dumper=_Dumper, sort_keys=False, width=2**20)


class _Dumper(yaml.SafeDumper):
    """Writes what holds single values only on one line."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        return super().represent_sequence(tag, sequence, _single(sequence))

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> Any:
        # a dict comes as it is, or as its items
        values = mapping.values() if isinstance(mapping, Mapping) else [v for _, v in mapping]
        return super().represent_mapping(tag, mapping, _single(values) and len(values) <= _SMALL)

    def ignore_aliases(self, data: Any) -> bool:
        return True


_SMALL = 6  # as many keys as fit on a line


def _short(seconds: float) -> float:
    """Return as many digits as a measurement has, for whoever reads the file."""
    return float(f"{seconds:.5g}")


def _single(values: Any) -> bool:
    return not any(isinstance(value, Mapping | list | tuple) for value in values)


def _announce(address: str) -> None:
    print(f"answering at {address}; on the device: profile.edge={address}", file=sys.stderr)


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    options = {**OPTIONS, **given}
    for key in given:
        if key not in OPTIONS:
            raise ConfigError.of(
                f"profile.{key}", given[key], f"must be one of {', '.join(OPTIONS)}"
            )
    repeats = options["repeats"]
    if type(repeats) is not int or repeats < 3:
        raise ConfigError.of("profile.repeats", repeats, "must be a whole number of at least 3")
    quota = options["quota"]
    if quota is not None and not (is_number(quota) and quota > 0):
        raise ConfigError.of("profile.quota", quota, "must be cores, more than 0, or null")
    return options


def _credentials(config: Config) -> Credentials | None:
    folder = config.link.credentials
    role: Role = "server" if config.profile.get("serve") else "client"
    return Credentials.load(Path(folder), role=role) if folder else None


def profile(
    config: Config, options: Mapping[str, Any], credentials: Credentials | None = None
) -> dict[str, Any]:
    """Return the fleet file of this machine, and what else was measured.

    Args:
        config: The run: its model, batch size, optimizer and data.
        options: As in `OPTIONS`.
        credentials: For mutual TLS to the other end.
    """
    training.set_threads(config.client.threads)
    fed = federation.federation(config)
    model = federation.build_model(config, fed.dataset)
    federation.check_model(model, fed.dataset, config)
    device = training.pick_device(config.client.device)
    layers = layered(model.to(device), fed.dataset.input_shape)
    repeats, name = int(options["repeats"]), str(options["name"] or socket.gethostname())
    quota = options["quota"] or processor_quota()
    timed = _Timed(config, layers, device, clock_of(config.client.threads, device.type, quota))
    computing, words = _computing(timed, sizes_of(config.client.batch_size), repeats)
    link, piece_s = _link(timed, options, repeats, credentials, max(1.0, 1 / (quota or 1)))
    known = computing["forward_s"][0], computing["backward_s"][0]
    machine = {
        **_about(config, layers, device),
        **computing,
        "operation_s": _short(_operation_s(timed, piece_s, known, link)),
        "load_s": _short(_load_s(config, repeats, timed.now)),
        "message_s": _short(link.message_s),
        "byte_s": {codec: _short(seconds) for codec, seconds in link.byte_s.items()},
        "bytes_at_cuts": _bytes_at_cuts(layers, config.client.batch_size),
    }
    rates = _rates(link)
    fleet: dict[str, Any] = {"machines": {name: machine}, "devices": [name], "servers": [name]}
    if options["edge"]:
        source = f"measured to {options['edge']}"
        fleet["links"] = [{"name": "measured", "source": source, **rates}]
    words += _of_messages(link)
    if quota is not None and quota < config.client.threads:
        machine["quota"] = _short(quota)
        words += f", with {quota:.2g} of a core"
    return {
        "machine": name,
        "fleet": fleet,
        "bytes_at_cuts": machine["bytes_at_cuts"],
        **rates,
        "link": str(options["edge"] or "loopback"),
        "summary": f"{machine['model']} on {name}: {words}",
    }


def _rates(link: LinkCosts) -> dict[str, float]:
    return {
        "up_mbit_s": link.up_bits_s / 1e6,
        "down_mbit_s": link.down_bits_s / 1e6,
        "latency_ms": link.latency_s * 1e3,
    }


def _of_messages(link: LinkCosts) -> str:
    per_message, per_byte = 1e6 * link.message_s, 1e9 * link.byte_s["fp32"]
    return f", {per_message:.0f} µs and {per_byte:.2f} ns a byte for a message"


def clock_of(threads: int, kind: str, quota: float | None) -> Callable[[], float]:
    """Return what tells the seconds of computing, from any moment on.

    Args:
        threads: Of a client.
        kind: Of its device: ``cpu`` or another.
        quota: Cores' worth of processor time that this process has; None: any.
    """
    if quota is not None and quota < threads and kind == "cpu":
        return (lambda: time.process_time() / quota) if quota <= 1 else _within(quota)
    return time.process_time if threads == 1 and kind == "cpu" else time.perf_counter


def _within(quota: float) -> Callable[[], float]:
    """Return a clock for several threads with more than one core, but fewer than threads.

    What one of them does alone takes no less than on the clock; what all do takes the quota.
    """
    at, total = (time.perf_counter(), time.process_time()), 0.0

    def now() -> float:
        nonlocal at, total
        before, at = at, (time.perf_counter(), time.process_time())
        total += max(at[0] - before[0], (at[1] - before[1]) / quota)
        return total

    return now


def _about(config: Config, layers: LayeredModel, device: torch.device) -> dict[str, Any]:
    """Return for what a machine was measured, and with what."""
    client = config.client
    return {
        "model": str(config.model.get("name") or config.model["_target_"]).rpartition(".")[2],
        "units": units_sha256(layers),
        "batch_size": client.batch_size,
        **made_for(client),
        "torch": str(torch.__version__),
        "source": f"measured: {client.threads} threads, {device}, torch {torch.__version__}",
        "workers": _workers(config, device),
    }


def _computing(timed: _Timed, sizes: list[int], repeats: int) -> tuple[dict[str, Any], str]:
    """Return what computing takes, by size of micro-batch and unit, and the largest in words."""
    forward, backward = timed.passes(sizes, repeats)
    update, most = timed.updates(repeats), sizes[-1]
    spread = _spread([*forward[most], *backward[most]])
    there, back = (1e3 * sum(map(median, table[most])) for table in (forward, backward))
    words = (
        f"{there:.1f} ms forward, {back:.1f} ms backward for {most} examples (spread {spread:.0%})"
    )
    return {
        "spread": round(spread, 4),
        "names": timed.names,
        "rows": sizes,
        "forward_s": [timed.by_unit(forward[n]) for n in sizes],
        "backward_s": [timed.by_unit(backward[n]) for n in sizes],
        "forward_spread": [timed.spread_by_unit(forward[n]) for n in sizes],
        "backward_spread": [timed.spread_by_unit(backward[n]) for n in sizes],
        "update_s": timed.by_unit(update),
    }, words


def _bytes_at_cuts(layers: LayeredModel, rows: int) -> dict[int, dict[str, int]]:
    """Return the bytes of what crosses each useful cut for a number of examples, by codec."""
    return {
        cut: {codec: tensor_bytes(crossings(layers)[cut - 1], rows, codec) for codec in CODECS}
        for cut in layers.cuts
    }


def sizes_of(batch_size: int) -> list[int]:
    """Return the sizes of micro-batches that are timed, of two examples at least.

    >>> sizes_of(100), sizes_of(1)
    ([2, 6, 25, 100], [1])
    """
    return sorted({min(batch_size, max(2, batch_size // part)) for part in (1, 4, 16, 64)})


def _workers(config: Config, device: torch.device) -> int:
    """Return how many sessions an edge server computes at once here, at the speed of one.

    As many as there are cores for (`fedsys.offload.processors`); on a GPU they share what one has
    alone.
    """
    return 1 if device.type == "cuda" else max(1, usable_cores() // config.client.threads)


def _spread(samples: Sequence[Sequence[float]]) -> float:
    """Return the quartiles' distance of the sums over all parts, as a share of their median."""
    sums = [sum(each) for each in zip(*samples, strict=True)]
    low, middle, high = quantiles(sums, n=4)
    return (high - low) / middle if middle else 0.0


def _load_s(config: Config, repeats: int, now: Callable[[], float]) -> float:
    """Return the seconds that one example takes to be loaded, augmented and normalised."""
    fed = federation.federation(config)
    largest = max(fed.parts, key=len)
    seconds = []
    for repeat in range(max(2, repeats // 4)):
        address, count, began = Address(config.seed, 0, repeat + 1), 0, now()
        batches = data.train_batches(
            fed.dataset.train, largest, fed.dataset, config.client.batch_size, address, 0, 0
        )
        for _, labels in batches:
            count += len(labels)
            if count >= 20 * config.client.batch_size:
                break
        seconds.append((now() - began) / max(count, 1))
    return median(seconds)


def _link(
    timed: _Timed, options: Mapping[str, Any], repeats: int, credentials: Credentials | None,
    slower: float,
) -> tuple[LinkCosts, float]:  # fmt: skip
    """Return what messages cost, and the seconds of a piece with both of its own."""
    layers, rows = timed.layers, timed.config.client.batch_size
    cuts = layers.cuts or (len(layers),)
    crossing = max((crossings(layers)[cut - 1] for cut in cuts), key=lambda c: c.elements)

    def measured(address: str, credentials: Credentials | None) -> tuple[LinkCosts, float]:
        costs = measure_link(address, crossing, rows, repeats, credentials)
        return costs.slower(slower), timed.piece_s(address, credentials, repeats)

    if options["edge"]:
        return measured(str(options["edge"]), credentials)
    with other_end(timed.config.link.between_processes) as address:
        return measured(address, None)


def _operation_s(
    timed: _Timed, piece_s: float, known: tuple[Sequence[float], Sequence[float]], link: LinkCosts
) -> float:
    """Return what an operation takes beside what its units and its message take by themselves.

    Whoever computes a piece, sends it, and takes an answer finds little of the one in the caches
    that the other has left.

    Args:
        timed: Who measured.
        piece_s: Seconds of forward and backward of a smallest piece, with both messages.
        known: Of its size, the seconds of each unit, forward and backward.
        link: What messages cost.
    """
    if not piece_s:
        return 0.0
    cut = timed.layers.cuts[0]
    nbytes = tensor_bytes(crossings(timed.layers)[cut - 1], timed.smallest, PIECES)
    messages = 2 * (link.message_s + nbytes * link.byte_s[PIECES])
    alone = sum(sum(table[:cut]) for table in known)
    return max(0.0, piece_s - alone - messages) / 2


class _Timed:
    """The parts of a model between its useful cuts, timed in training."""

    def __init__(
        self,
        config: Config,
        layers: LayeredModel,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config, self.layers, self._device, self._clock = config, layers, device, clock
        self._loss = task_of(config).loss
        self.names = [unit.name for unit in layers.units]
        parts = stages(layers, layers.cuts)
        if config.client.kernels == "fused":
            fusion = fusion_of(layers)
            parts = tuple(fuse(part, fusion) for part in parts)
        self._parts = [part.train() for part in parts]
        bounds = pairwise([0, *layers.cuts, len(layers)])
        self._given = [layers.inputs(first, last) for first, last in bounds]
        self._address = Address(config.seed, 0, 1)
        fed = federation.federation(config)
        batch = next(
            iter(
                data.train_batches(
                    fed.dataset.train, max(fed.parts, key=len), fed.dataset,
                    config.client.batch_size, self._address, 0, 0,
                )
            )
        )  # fmt: skip
        self._x, self._y = (tensor.to(device) for tensor in batch)

    def passes(self, sizes: Sequence[int], repeats: int) -> tuple[Times, Times]:
        """Return samples of the seconds of each part, forward and backward, by size.

        Raises:
            ConfigError: No client has as many examples as the largest size.
        """
        if len(self._y) < sizes[-1]:
            raise ConfigError.of(
                "client.batch_size", sizes[-1], f"must be at most the {len(self._y)} examples",
                "profile with fewer clients: num_clients=1",
            )  # fmt: skip
        forward: Times = {n: [[] for _ in self._parts] for n in sizes}
        backward: Times = {n: [[] for _ in self._parts] for n in sizes}
        for repeat in range(2 + repeats):  # in turns: what else the machine does meets all sizes
            for n in sizes:
                there, back = self._pass(n)
                for index in range(len(self._parts) if repeat >= 2 else 0):
                    forward[n][index].append(there[index])
                    backward[n][index].append(back[index])
        return forward, backward

    def _pass(self, n: int) -> tuple[list[float], list[float]]:
        x, y = self._x[:n], self._y[:n]
        whole, precision = x, self.config.client.precision
        for part in self._parts:
            part.zero_grad(set_to_none=True)
        inputs, outputs, forward, backward = [], [], list[float](), list[float]()
        with drawing(self._address, 0, n):
            for index, part in enumerate(self._parts):
                x = x.detach().requires_grad_() if index else x
                inputs.append(x)
                began = self.now()
                with autocast(precision, whole):
                    if index:
                        x = part(safe_input(part, x), *beside(whole, self._given[index]).values())
                    else:
                        x = part(*arguments(part, whole))
                if index == len(self._parts) - 1:
                    x = self._loss(for_loss(x, precision), y, 1.0)
                forward.append(self.now() - began)
                outputs.append(x)
            gradient: Tensor | None = None
            for x, out in zip(reversed(inputs), reversed(outputs), strict=True):
                began = self.now()
                if out.requires_grad:
                    out.backward(gradient)  # type: ignore[no-untyped-call]  # no type in torch
                backward.append(self.now() - began)
                gradient = x.grad if isinstance(x, Tensor) else None
        return forward, backward[::-1]

    @property
    def smallest(self) -> int:
        """Examples of the smallest piece that is timed."""
        return sizes_of(self.config.client.batch_size)[0]

    def piece_s(self, address: str, credentials: Credentials | None, repeats: int) -> float:
        """Return the seconds of a smallest piece before the first cut, with its two messages.

        Pieces are in flight together, as in training: all are computed and sent, then for each the
        answer is awaited and its backward computed. 0 for a model without a cut.

        Args:
            address: Where `fedsys.commands.profile_link.answer` is served; it sends activations
                back, which stand for their gradients.
            credentials: For mutual TLS.
            repeats: Turns, of which the median counts.
        """
        if not self.layers.cuts:
            return 0.0
        link = dial(address, credentials=credentials)
        try:
            return median(self._in_flight(link) for _ in range(1 + repeats))
        finally:
            link.close()

    def _in_flight(self, link: Link) -> float:
        x, part, outputs = self._x[: self.smallest], self._parts[0], []
        began = self.now()
        for _ in range(IN_FLIGHT):
            with drawing(self._address, 0, len(x)), autocast(self.config.client.precision, x):
                outputs.append(part(*arguments(part, x)))
            tensors, meta = encode_activation(outputs[-1], PIECES)
            link.send(Frame("activation", meta, tensors))
        for out in outputs:
            answer = link.recv(ANSWER_S)
            gradient = decode_activation(answer.tensors, answer.meta).to(self._device)
            if out.requires_grad:
                out.backward(gradient)
        return (self.now() - began) / IN_FLIGHT

    def updates(self, repeats: int) -> list[list[float]]:
        """Return samples of the seconds of the optimizer for each part."""
        self._pass(len(self._y))
        found = []
        for part in self._parts:
            parameters = [p for p in part.parameters() if p.requires_grad]
            if not parameters:
                found.append([0.0] * repeats)
                continue
            optimizer = optimizers.make_optimizer(parameters, self.config.client, 1e-6)
            samples = []
            for _ in range(2 + repeats):
                began = self.now()
                optimizer.step()
                samples.append(self.now() - began)
            found.append(samples[2:])
        return found

    def by_unit(self, samples: Sequence[Sequence[float]]) -> list[float]:
        """Return the median seconds of each unit; units of a part share them by their work."""
        return [_short(s) for s in shared_by_work(self.layers, [*map(median, samples)])]

    def spread_by_unit(self, samples: Sequence[Sequence[float]]) -> list[float]:
        """Return the spread of the part that each unit is in, as a share of its median."""
        bounds = [0, *self.layers.cuts, len(self.layers)]
        sizes = [last - first for first, last in pairwise(bounds)]
        parts = zip(sizes, samples, strict=True)
        return [round(_spread([part]), 4) for size, part in parts for _ in range(size)]

    def now(self) -> float:
        """Return the seconds of the clock, on a GPU once it has finished."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()
