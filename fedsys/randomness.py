"""Every random draw is a function of (seed, purpose, client, round, step).

Nothing in fedsys draws from a process-wide generator. A draw is addressed, not taken in turn:
whoever knows the address gets the same numbers, in any process, thread, order or machine. This
is what lets an offloaded, pipelined, migrated or resumed run repeat exactly what the plain run did.

The randomness *inside* a model is addressed too. `key_modules` replaces dropout and stochastic
depth by `KeyedDropout`, whose masks are drawn for the whole mini-batch from the address of the
step and the name of the module; a micro-batch then uses its rows of that mask. The address is
given by `drawing`, a context that holds for one thread::

    with drawing(Address(seed=1, client=3, round=2), step=0, batch_size=100):
        with rows(0, 50):
            loss_1 = criterion(model(x[:50]), y[:50])
        with rows(50, 100):
            loss_2 = criterion(model(x[50:]), y[50:])
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsys.errors import ModelError

SERVER = -1
"""The client of a draw that belongs to no client."""


@dataclass(frozen=True, slots=True)
class Address:
    """Who draws, and when: all of an address but purpose and step.

    Attributes:
        seed: The `seed` of the run.
        client: Partition id of the client; `SERVER` for draws of the server.
        round: Round, from 1; 0 before the first.
    """

    seed: int
    client: int = SERVER
    round: int = 0

    def seed_for(self, purpose: str, step: int = 0, name: str = "") -> int:
        """Return 63 bits that depend on every part of the address (BLAKE2b).

        Args:
            purpose: What the draw is for, for instance ``"shuffle"``.
            step: Index of the mini-batch in the round, or another counter.
            name: Name of the module that draws; empty outside of models.
        """
        words = struct.pack("<qqqq", self.seed, self.client, self.round, step)
        text = f"{purpose}\0{name}".encode()
        return int.from_bytes(hashlib.blake2b(words + text, digest_size=8).digest(), "little") >> 1

    def torch(self, purpose: str, step: int = 0, name: str = "") -> torch.Generator:
        """Return a generator of the CPU, seeded by the address."""
        return torch.Generator().manual_seed(self.seed_for(purpose, step, name))

    def numpy(self, purpose: str, step: int = 0) -> np.random.Generator:
        """Return a NumPy generator (PCG64), seeded by the address."""
        return np.random.default_rng(self.seed_for(purpose, step))


_fork_lock = threading.RLock()


@contextmanager
def seeded_default_generator(seed: int) -> Iterator[None]:
    """Seed torch's process-wide generator for a block and put its state back afterwards.

    PyTorch's own initialisation of layers knows no other generator. One thread at a time; CUDA's
    generators are left alone.
    """
    with _fork_lock, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def default_generator_lent() -> Iterator[None]:
    """Let other threads have the generator, in a block inside that of `seeded_default_generator`.

    Whoever waits for work of other threads there would otherwise wait for ever: they seed it too.
    """
    state = torch.default_generator.get_state()
    _fork_lock.release()
    try:
        yield
    finally:
        _fork_lock.acquire()
        torch.default_generator.set_state(state)


# --------------------------------------------------------------------------------------------------
# Randomness inside a model


@dataclass(slots=True)
class _Step:
    """One optimizer step of one client: the address, the mini-batch and the rows in work."""

    address: Address
    step: int
    batch_size: int
    start: int = 0
    stop: int = 0
    masks: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[Hashable, int] = field(default_factory=dict)

    def count(self, caller: Hashable) -> int:
        """Count a call with the rows in work; return how many `caller` has had by now."""
        calls = self.calls[caller] = self.calls.get(caller, 0) + 1
        return calls


_current = threading.local()


class drawing:
    """Address the draws that models make in this thread until the block ends.

    Not a generator, as every step of every client enters it: those take three times as long.

    Args:
        address: Seed, client and round.
        step: Index of the mini-batch within the round.
        batch_size: Number of examples in the whole mini-batch.
        masks: Where masks are kept if the step is worked through in several blocks; it saves
            drawing them again.
    """

    __slots__ = ("_outer", "_own")

    def __init__(
        self, address: Address, step: int, batch_size: int, masks: dict[str, Tensor] | None = None
    ) -> None:
        masks = {} if masks is None else masks
        self._own = _Step(address, step, batch_size, 0, batch_size, masks)

    def __enter__(self) -> None:
        self._outer: _Step | None = getattr(_current, "step", None)
        _current.step = self._own

    def __exit__(self, *_: object) -> None:
        _current.step = self._outer


class rows:
    """Say that the model sees examples ``[start, stop)`` of the mini-batch in this block."""

    __slots__ = ("_before", "_now", "_start", "_stop")

    def __init__(self, start: int, stop: int) -> None:
        self._start, self._stop = start, stop

    def __enter__(self) -> None:
        now: _Step | None = getattr(_current, "step", None)
        if now is None:
            raise ModelError("fedsys.randomness.rows: must be used inside drawing(…)")
        self._now, self._before = now, (now.start, now.stop, now.calls)
        now.start, now.stop, now.calls = self._start, self._stop, {}

    def __exit__(self, *_: object) -> None:
        self._now.start, self._now.stop, self._now.calls = self._before


@dataclass(frozen=True, slots=True)
class Piece:
    """Which part of a mini-batch a module is given.

    Attributes:
        start: First row.
        stop: End of the rows.
        of: Rows of the whole mini-batch.
        call: How many times the module was called with this piece before.
    """

    start: int
    stop: int
    of: int
    call: int


def piece_of(module: nn.Module) -> Piece | None:
    """Return the piece in work in this thread, and count the call; None outside of `drawing`."""
    now: _Step | None = getattr(_current, "step", None)
    if now is None:
        return None
    return Piece(now.start, now.stop, now.batch_size, now.count(module) - 1)


def drawn_for_rows(key: str, draw: Callable[[Address, int, int], Tensor]) -> Tensor:
    """Return the rows in work of a tensor that is drawn once for a whole mini-batch.

    Args:
        key: Name of the draw among those of a step.
        draw: Takes the address, the step and the examples of the mini-batch; returns
            ``(examples, …)``.

    Raises:
        ModelError: No step is in work.
    """
    now: _Step | None = getattr(_current, "step", None)
    if now is None:
        raise ModelError(f"{key}: must be drawn inside fedsys.randomness.drawing(…)")
    whole = now.masks.get(key)
    if whole is None:
        whole = now.masks[key] = draw(now.address, now.step, now.batch_size)
    return whole[now.start : now.stop]


class KeyedDropout(nn.Module):
    """Dropout whose mask is a function of (seed, client, round, step, module name).

    In training, elements (or whole channels, or whole examples) are zeroed with probability `p`
    and the rest is scaled by ``1 / (1 - p)``, as in `torch.nn.Dropout`. The mask is drawn for the
    whole mini-batch on the CPU, so it does not depend on micro-batches, on cuts or on the device.

    Args:
        name: Name of the module in the whole model.
        p: Probability of zeroing, in [0, 1].
        spread: How far one draw reaches: ``"element"`` (Dropout), ``"channel"`` (Dropout1d to
            Dropout3d), ``"example"`` (stochastic depth by row) or ``"batch"`` (by batch).

    Attributes:
        earlier: How often a forward of the whole model has called it before the part begins that
            it is in now.
    """

    def __init__(self, name: str, p: float, spread: str = "element") -> None:
        super().__init__()
        self.name, self.p, self.spread = name, p, spread
        self.earlier = 0

    def extra_repr(self) -> str:
        """Return the arguments, for `repr` of the model."""
        return f"{self.name!r}, p={self.p}, spread={self.spread!r}"

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` of shape ``(rows, …)`` with the rows' part of the mask applied."""
        if not self.training or self.p == 0.0:
            return x
        now: _Step | None = getattr(_current, "step", None)
        if now is None:
            raise ModelError(
                f"{self.name}: dropout in training mode needs an address for its draws; "
                "run the model inside fedsys.randomness.drawing(…), or call model.eval()"
            )
        if x.shape[0] != now.stop - now.start:
            raise ModelError(
                f"{self.name}: got {x.shape[0]} rows where the step said {now.stop - now.start}; "
                "announce micro-batches with fedsys.randomness.rows(start, stop)"
            )
        # A module that a forward calls several times draws anew each time.
        call = self.earlier + now.count(self)
        key = self.name if call == 1 else f"{self.name}#{call}"
        mask = now.masks.get(key)
        if mask is None:
            mask = now.masks[key] = self._draw(now, x, key)
        part = mask if self.spread == "batch" else mask[now.start : now.stop]
        return x * part.to(device=x.device, dtype=x.dtype)

    def _draw(self, now: _Step, x: Tensor, key: str) -> Tensor:
        tail = tuple(x.shape[1:])
        shape = {
            "element": (now.batch_size, *tail),
            "channel": (now.batch_size, *tail[:1], *(1 for _ in tail[1:])),
            "example": (now.batch_size, *(1 for _ in tail)),
            "batch": (1, *(1 for _ in tail)),
        }[self.spread]
        if self.p == 1.0:
            return torch.zeros(shape)
        generator = now.address.torch("dropout", now.step, key)
        kept = torch.rand(shape, generator=generator) >= self.p
        return kept.float().div_(1.0 - self.p)


_SPREADS: dict[str, str] = {
    "Dropout": "element",
    "Dropout1d": "channel",
    "Dropout2d": "channel",
    "Dropout3d": "channel",
}


def _keyed(name: str, module: nn.Module) -> KeyedDropout | None:
    kind = type(module).__name__
    if kind == "DropPath" and getattr(module, "scale_by_keep", False):  # timm's, by name as below
        return KeyedDropout(name, float(getattr(module, "drop_prob", None) or 0.0), "example")
    p = getattr(module, "p", None)
    if not isinstance(p, float | int):
        return None
    if kind in _SPREADS:
        return KeyedDropout(name, float(p), _SPREADS[kind])
    if kind == "StochasticDepth":  # torchvision.ops; by name, so that torchvision is not imported
        return KeyedDropout(name, float(p), "example" if module.mode == "row" else "batch")
    return None


def is_random_depth(module: nn.Module) -> bool:
    """Say whether `module` is torchvision's ``StochasticDepth`` or timm's ``DropPath``."""
    return type(module).__name__ in ("StochasticDepth", "DropPath")


def key_modules(model: nn.Module) -> nn.Module:
    """Replace every dropout and stochastic depth in `model` by `KeyedDropout`, in place.

    Parameters and buffers keep their names: the replaced modules have none.
    """
    done: dict[nn.Module, KeyedDropout] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        keyed = done.get(module) or _keyed(name, module)
        if keyed is None:
            continue
        done[module] = keyed
        keyed.train(module.training)
        if not name:
            return keyed
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, keyed)
    return model


def check_keyed(model: nn.Module, *inputs: Any, rows: int | None = None) -> object:
    """Refuse a model that draws from torch's process-wide generator in training mode.

    The model is run once and left as it was.

    Args:
        model: With values.
        inputs: What it is called with: a batch of two or more examples.
        rows: How many; None: as many as the first of the inputs has.

    Returns:
        What the model returned.

    Raises:
        ModelError: Names the first module whose forward drew from the process-wide generator.
    """
    names = {module: name for name, module in model.named_modules()}
    culprit = [f"{names[m]} (RReLU)" for m in names if isinstance(m, nn.RReLU)]

    def before(module: nn.Module, _: object) -> None:
        stack.append(torch.random.get_rng_state())

    def after(module: nn.Module, _: object, __: object) -> None:
        if not torch.equal(stack.pop(), torch.random.get_rng_state()):
            culprit.append(f"{names[module] or 'the model'} ({type(module).__name__})")

    stack: list[Tensor] = []
    hooks = [m.register_forward_pre_hook(before) for m in names]
    hooks += [m.register_forward_hook(after) for m in names]
    training = {m: m.training for m in names}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    try:
        model.train()
        with seeded_default_generator(0), torch.no_grad():
            address = Address(seed=0)
            with drawing(address, 0, len(inputs[0]) if rows is None else rows):
                outputs = model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    if culprit:
        raise ModelError(
            f"{culprit[0]} draws from torch's process-wide generator in training, so its runs "
            "cannot be repeated; use nn.Dropout, nn.Dropout1d to 3d, torchvision's StochasticDepth "
            "or timm's DropPath as modules instead of functional or other random layers"
        )
    return outputs
