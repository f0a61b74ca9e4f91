"""Clipped sums of the gradients of single examples, over parts of a model on several machines.

DP-SGD (Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, algorithm 1) bounds what
one example does to a step: its gradient is scaled to a norm of at most `clip_norm`. The norm is
over the whole model, so where that is split each machine needs one number for each example from
the other: the squared norm of its part.

These numbers are whole multiples of ``clip_norm² × 2^-28``. Whole numbers add up to the same total
in any order, so a model that is split anywhere clips by the bits by which the whole one does. Norms
above 11,585 times `clip_norm`, and such that are not finite, have no number: such an example adds
nothing, which is within the bound, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedsys.errors import ModelError
from fedsys.privacy.layers import LayerRecord, Rule, learns, rule_of

_UNITS: Final = 2.0**28
_MOST: Final = 2**55
"""Of one parameter, so that those of 255 parameters add up within 64 bits."""

EPS: Final = 1e-6
"""Added to norms before they are divided by, as Opacus does; also more than what is rounded."""


class ExampleGradients:
    """Takes the place of ``backward`` for parameters: their gradients are sums of clipped ones.

    While examples are taken in (`recording`), autograd computes gradients of activations only.
    What layers were given and what came back is kept until the sums are made from it, so there is
    neither a second backward nor, where layers allow, a gradient for each example.

    Args:
        modules: What is trained on this machine; with global names.
        clip_norm: Bound on the norm of an example's gradient over the whole model.

    Raises:
        ModelError: A parameter has no module of its own, or is shared.
    """

    def __init__(self, modules: Sequence[nn.Module], clip_norm: float) -> None:
        self.clip_norm = clip_norm
        self.named = {n: p for m in modules for n, p in m.named_parameters()}
        self._rules: dict[nn.Module, tuple[str, Rule]] = {}
        self._hooks: list[RemovableHandle] = []
        self._pieces: dict[int, dict[nn.Module, LayerRecord]] = {}
        self._sizes: dict[int, int] = {}
        self._current: dict[nn.Module, LayerRecord] | None = None
        for stage in modules:
            for name, module in _owners(stage):
                self._rules[module] = name, rule_of(module)
                self._hooks.append(module.register_forward_hook(self._keep))
        # a layer that works in place must not write into what is kept
        self._copies = any(getattr(i, "inplace", False) for m in modules for i in m.modules())

    def close(self) -> None:
        """Leave the modules as they were."""
        for hook in self._hooks:
            hook.remove()

    def begin(self) -> None:
        """Begin a mini-batch."""
        self._pieces.clear()
        self._sizes.clear()

    @contextmanager
    def recording(self, piece: int, examples: int) -> Iterator[None]:
        """Take in what is computed of a piece in this block, forward or backward.

        Args:
            piece: Its index in the mini-batch.
            examples: How many it has.
        """
        self._current = self._pieces.setdefault(piece, {})
        self._sizes[piece] = examples
        try:
            with self._apart():
                yield
        finally:
            self._current = None

    @torch.no_grad()
    def squares(self) -> Tensor:
        """Return the squared norms of all examples of the mini-batch, in units of the exchange.

        Returns:
            int64 of shape ``(batch,)``, on the CPU; examples in the order of the pieces.
        """
        found = [self._squares(piece) for piece in sorted(self._pieces)]
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)

    @torch.no_grad()
    def finish(self, squares: Tensor) -> None:
        """Put the sum of clipped gradients into ``.grad`` of the parameters.

        Args:
            squares: int64 of shape ``(batch,)``, over all parts of the model.
        """
        weights = factors(squares, self.clip_norm)
        for parameter in self.named.values():
            parameter.grad = None
        first = 0
        for piece in sorted(self._pieces):
            own = weights[first : first + self._sizes[piece]]
            first += len(own)
            self._add(self._pieces[piece], own)
        for parameter in self.named.values():
            if parameter.grad is None and learns(parameter):
                parameter.grad = torch.zeros_like(parameter)
        self.begin()

    def unseen(self) -> dict[str, str]:
        """Return the trained parameters of which nothing was taken in, each with the reason."""
        found = {}
        taken = {m: r for piece in self._pieces.values() for m, r in piece.items()}
        for module, (name, _) in self._rules.items():
            record = taken.get(module)
            if record is not None and record.gradient is not None:
                continue
            reason = "its module is never called" if record is None else "no gradient comes back"
            for own, parameter in module.named_parameters(recurse=False):
                if learns(parameter):
                    found[f"{name}.{own}" if name else own] = reason
        return found

    # --- inside -----------------------------------------------------------------------------------

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Keep autograd from the parameters, whose gradients it would sum up unclipped."""
        trained = [p for p in self.named.values() if p.requires_grad]
        for parameter in trained:
            parameter.trained_privately = True  # type: ignore[attr-defined]
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if self._current is None or not torch.is_grad_enabled():
            return None
        name, _ = self._rules[module]
        if module in self._current:
            raise ModelError(f"{name} is called twice in a forward: {SHARED}")
        if not isinstance(output, Tensor):
            raise ModelError(f"{name} ({type(module).__name__}) returns more than one tensor")
        kept = tuple(i.detach() if isinstance(i, Tensor) else i for i in inputs)
        record = self._current[module] = LayerRecord(module, kept)
        if not output.requires_grad:  # nothing before it is trained
            output = output.detach().requires_grad_()
        output.register_hook(lambda gradient: setattr(record, "gradient", gradient.detach()))
        return output.clone() if self._copies else output

    def _squares(self, piece: int) -> Tensor:
        size = self._sizes[piece]
        total = torch.zeros(size, dtype=torch.int64)
        for module, record in self._pieces[piece].items():
            if record.gradient is None:
                continue
            for name, squares in self._rules[module][1](record, None).items():
                if learns(module.get_parameter(name)):
                    total += rounded(squares, self.clip_norm)
        return total

    def _add(self, records: dict[nn.Module, LayerRecord], weights: Tensor) -> None:
        gone = weights == 0.0
        for module, record in records.items():
            if record.gradient is None:
                continue
            own = weights.to(record.gradient.device, record.gradient.dtype)
            clean = record.without(gone.to(own.device)) if bool(gone.any()) else record
            for name, summed in self._rules[module][1](clean, own).items():
                parameter = module.get_parameter(name)
                if learns(parameter):
                    grad = parameter.grad
                    parameter.grad = summed if grad is None else grad.add_(summed)
        records.clear()


SHARED: Final = (
    "the norm of an example's gradient would need all of its uses at once; give each use "
    "parameters of its own, or choose another model"
)


def _owners(stage: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules whose parameters are trained, by name: those that own them directly."""
    for name, module in stage.named_modules():
        if any(learns(p) for p in module.parameters(recurse=False)):
            yield name, module


def rounded(squares: Tensor, clip_norm: float) -> Tensor:
    """Return squared norms in whole units of the exchange: int64 on the CPU.

    >>> rounded(torch.tensor([1.0, float("nan")]), 2.0).tolist()
    [67108864, 36028797018963968]
    """
    units = (squares.detach().cpu().double() * (_UNITS / clip_norm**2)).round()
    return torch.where(units < _MOST, units, torch.full_like(units, _MOST)).to(torch.int64)


def factors(squares: Tensor, clip_norm: float) -> Tensor:
    """Return what the gradient of each example is multiplied with, float64 in [0, 1].

    >>> [round(f, 5) for f in factors(rounded(torch.tensor([16.0, 0.25]), 1.0), 1.0).tolist()]
    [0.25, 1.0]

    Args:
        squares: Squared norms over the whole model, in units of the exchange.
        clip_norm: The bound.
    """
    norms = (squares.double() / _UNITS).sqrt() * clip_norm
    found = (clip_norm / (norms + EPS)).clamp(max=1.0)
    return torch.where(squares < _MOST, found, 0.0)
