"""Masks: which weights of a model are pruned. The mask is the truth, not the zeros of the weights.

A weight that training happens to bring to zero is not pruned, and one that is pruned must be zero
in everything that is computed, sent or saved. So masks are values of their own, with a file of
their own, and training happens while they are `held`::

    masks = Masks.dense(model, leave=["fc2"])
    masks = prune(masks, magnitude(model), 0.9)        # fedsys.pruning.sparsify, .scores
    optimizer = make_optimizer(model.parameters(), config.client, lr)
    with held(masks, model, optimizer):
        training.train(model, optimizer, batches, address)
    masks.save(folder / "masks.safetensors")

Masks name the weights of convolutions and linear layers; biases and normalisation are not pruned,
as in Frankle & Carbin, "The Lottery Ticket Hypothesis", ICLR 2019.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.optim import Optimizer

from fedsys.errors import ConfigError, ModelError, did_you_mean
from fedsys.files import write_atomic

FORMAT = "fedsys-masks-1"
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Layers whose weights can be pruned: their outputs are along the first dimension."""


def prunable(model: nn.Module, leave: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Return the weights that can be pruned, by name, in the order of the model's parameters.

    Args:
        model: Any model. A weight that layers share appears once.
        leave: What to leave alone: names of parameters or modules, or patterns such as ``*.down``.

    Raises:
        ConfigError: A name or pattern fits no weight, or everything is left alone.
    """
    weights = {id(m.weight) for m in model.modules() if isinstance(m, LAYERS)}
    found = {name: p for name, p in model.named_parameters() if id(p) in weights}
    for pattern in leave:
        if not any(_fits(name, pattern) for name in found):
            known = {name.rpartition(".")[0] for name in found}
            raise ConfigError.of(
                "pruning.leave",
                pattern,
                "must fit the name of a convolution or linear layer",
                f"{did_you_mean(pattern, known)}known are {', '.join(sorted(known))}",
            )
    kept = {n: p for n, p in found.items() if not any(_fits(n, pattern) for pattern in leave)}
    if not kept:
        rule = "must leave a convolution or linear layer to prune"
        raise ConfigError.of("pruning.leave", list(leave), rule)
    return kept


def last_layer(model: nn.Module) -> tuple[str, ...]:
    """Return what to leave alone so that the last layer stays whole: its outputs are the classes.

    Nothing is left alone in a model of one layer.
    """
    names = list(prunable(model))
    return (names[-1],) if len(names) > 1 else ()


def _fits(name: str, pattern: str) -> bool:
    layer = name.rpartition(".")[0]
    return name.startswith(f"{pattern}.") or any(fnmatchcase(n, pattern) for n in (name, layer))


# --------------------------------------------------------------------------------------------------
# Figures


@dataclass(frozen=True, slots=True)
class LayerSparsity:
    """Figures of one weight.

    Attributes:
        name: Name of the parameter.
        weights: Number of its elements.
        kept: Those that are not pruned.
        channels: Outputs of the layer.
        dead_channels: Outputs all of whose weights are pruned.
    """

    name: str
    weights: int
    kept: int
    channels: int
    dead_channels: int

    @property
    def sparsity(self) -> float:
        """Share of the weights that is pruned, in [0, 1]."""
        return 1.0 - self.kept / self.weights


@dataclass(frozen=True, slots=True)
class Sparsity:
    """Figures of all weights that have a mask."""

    layers: tuple[LayerSparsity, ...]

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(layer.weights for layer in self.layers)

    @property
    def kept(self) -> int:
        """Number of weights that are not pruned."""
        return sum(layer.kept for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Share of the weights that is pruned, in [0, 1]; 0 if there are no masks."""
        return 1.0 - self.kept / self.weights if self.layers else 0.0

    @property
    def dead_channels(self) -> float:
        """Share of the outputs of all layers all of whose weights are pruned, in [0, 1]."""
        channels = sum(layer.channels for layer in self.layers)
        return sum(layer.dead_channels for layer in self.layers) / channels


# --------------------------------------------------------------------------------------------------
# Masks


@final
class Masks(Mapping[str, Tensor]):
    """For each weight by its global name: which elements stay. A value; change none of its tensors.

    Args:
        kept: Tensors of bool, in the shapes of the parameters; True where a weight stays.

    Raises:
        ConfigError: A mask is not of bool, or without elements.
    """

    def __init__(self, kept: Mapping[str, Tensor]) -> None:
        for name, mask in kept.items():
            if mask.dtype is not torch.bool or not mask.numel():
                value = f"{mask.dtype} {tuple(mask.shape)}"
                raise ConfigError.of(f"masks[{name}]", value, "must be of bool and not empty")
        self._kept = {name: mask.detach().cpu().contiguous() for name, mask in kept.items()}

    @classmethod
    def dense(cls, model: nn.Module, leave: Sequence[str] = ()) -> Masks:
        """Return masks that prune nothing yet.

        Args:
            model: The model.
            leave: Layers to leave alone, as for `prunable`. They have no mask, so they stay whole
                whatever is done to the masks later.

        Raises:
            ConfigError: As `prunable`.
        """
        weights = prunable(model, leave)
        return cls({n: torch.ones(p.shape, dtype=torch.bool) for n, p in weights.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        same_names = list(self) == list(other)
        return same_names and all(torch.equal(mask, other[name]) for name, mask in self.items())

    __hash__ = None  # type: ignore[assignment]  # tensors are not hashable

    def __repr__(self) -> str:
        figures = self.figures()
        return f"Masks({figures.kept} of {figures.weights} weights in {len(self)} layers)"

    def part(self, names: Iterable[str]) -> Masks:
        """Return the masks of those weights that are among `names`, such as those of one half."""
        wanted = set(names)
        return Masks({name: mask for name, mask in self.items() if name in wanted})

    def figures(self) -> Sparsity:
        """Count what is pruned."""
        return Sparsity(
            tuple(
                LayerSparsity(
                    name=name,
                    weights=mask.numel(),
                    kept=int(mask.sum()),
                    channels=len(mask),
                    dead_channels=int((~mask.flatten(1).any(1)).sum()),
                )
                for name, mask in self.items()
            )
        )

    def apply(self, model: nn.Module) -> None:
        """Make every pruned weight of `model` exactly zero, whatever it was (NaN, too).

        Raises:
            ConfigError: A mask is not of a parameter, or not of its shape.
        """
        with torch.no_grad():
            for parameter, gone in self._gone(dict(model.named_parameters())):
                parameter.masked_fill_(gone, 0.0)

    def _gone(self, named: Mapping[str, nn.Parameter]) -> list[tuple[nn.Parameter, Tensor]]:
        """Return each parameter with the elements that are pruned, on its device."""
        for name, mask in self.items():
            if name not in named:
                raise ConfigError.of(
                    "masks",
                    name,
                    "must be the name of a parameter of the model",
                    "take the masks of this half with .part(names)",
                )
            if mask.shape != named[name].shape:
                rule = f"must be {tuple(named[name].shape)}, the shape of the parameter"
                raise ConfigError.of(f"masks[{name}].shape", tuple(mask.shape), rule)
        return [(named[n], mask.logical_not().to(named[n].device)) for n, mask in self.items()]

    def packed(self) -> dict[str, Tensor]:
        """Return eight elements to a byte, row-major, the first in the highest bit: to be sent."""
        return {
            name: torch.from_numpy(np.packbits(mask.numpy().reshape(-1)))
            for name, mask in self.items()
        }

    @classmethod
    def unpacked(cls, packed: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Masks:
        """Return the masks that `packed` packed.

        Args:
            packed: Bytes by name of the weight.
            like: Tensors of the shapes of the weights, by name; may have others.

        Raises:
            ModelError: A mask is of no tensor, or not of as many elements.
        """
        kept: dict[str, Tensor] = {}
        for name, data in packed.items():
            count = like[name].numel() if name in like else -1
            if data.dtype is not torch.uint8 or data.numel() != -(-count // 8):
                raise ModelError(f"the mask of {name} does not fit the model")
            bits = np.unpackbits(data.cpu().numpy(), count=count).astype(np.bool_)
            kept[name] = torch.from_numpy(bits).view(like[name].shape)
        return cls(kept)

    def save(self, path: Path) -> None:
        """Write the masks to a file, which is whole or absent.

        Raises:
            RunError: The file cannot be written.
        """
        write_tensors(path, self, {"format": FORMAT})

    @classmethod
    def load(cls, path: Path) -> Masks:
        """Read what `save` wrote.

        Raises:
            ModelError: The file cannot be read, is damaged, or is of another kind.
        """
        return cls(read_tensors(path, FORMAT)[0])


@final
class Holding:
    """Keeps pruned weights exactly zero while they are trained, for as long as it is not released.

    At the start, weights and the optimizer's state (momentum, moments) become zero where pruned,
    so momentum from before pruning is lost there alone. From then on, their gradients are zero as
    soon as they are added up. An optimizer that treats every element by itself (SGD, Adam, AdamW,
    RMSprop, …, with weight decay) then leaves them at zero in every single step, and not only when
    somebody looks.

    Args:
        masks: Of parameters among `named`.
        named: Parameters by global name; must stay the same objects.
        optimizer: Over these parameters, if it already has a state.

    Raises:
        ConfigError: A mask is not of a parameter, or not of its shape.
    """

    def __init__(
        self,
        masks: Masks,
        named: Mapping[str, nn.Parameter],
        optimizer: Optimizer | None = None,
    ) -> None:
        self._names, self._pairs = list(masks), masks._gone(named)
        self._zero()
        if optimizer is not None:
            _clear(optimizer, self._pairs)
        self._hooks = []
        for parameter, gone in self._pairs:
            if not parameter.requires_grad:  # frozen: it has no gradient to clear
                continue
            register: Any = parameter.register_post_accumulate_grad_hook  # torch has no type for it
            self._hooks.append(register(_clearing(gone)))

    def check(self) -> None:
        """Refuse weights that training has moved; make what is NaN zero again.

        Raises:
            ModelError: A pruned weight is not zero: the optimizer mixes elements (Muon), or a
                proximal term was anchored before the masks were held.
        """
        for name, (parameter, gone) in zip(self._names, self._pairs, strict=True):
            values = parameter.detach()[gone]
            # After a division by a norm of infinity all is NaN; that is no fault of the masks.
            if moved := int(((values != 0) & ~values.isnan()).sum()):
                raise ModelError(
                    f"{name}: training moved {moved} pruned weights; use an optimizer that treats "
                    "every element by itself (not Muon), and anchor proximal terms in the masked "
                    "model"
                )
        self._zero()

    def release(self) -> None:
        """Let the weights be trained without masks."""
        for hook in self._hooks:
            hook.remove()

    def _zero(self) -> None:
        with torch.no_grad():
            for parameter, gone in self._pairs:
                parameter.masked_fill_(gone, 0.0)


@contextmanager
def held(masks: Masks, model: nn.Module, optimizer: Optimizer | None = None) -> Iterator[None]:
    """Keep the pruned weights of `model` exactly zero while it trains in the block.

    Args:
        masks: Of parameters of `model`.
        model: Trained in the block; its parameters must stay the same objects.
        optimizer: As for `Holding`.

    Raises:
        ConfigError: As `Holding`.
        ModelError: As `Holding.check`, at the end.
    """
    named = dict(model.named_parameters()) if masks else {}
    holding = Holding(masks, named, optimizer)
    try:
        yield
    finally:
        holding.release()
    holding.check()


def _clearing(gone: Tensor) -> Any:
    def clear(parameter: Tensor) -> None:
        if parameter.grad is not None:
            parameter.grad.masked_fill_(gone, 0.0)

    return clear


def _clear(optimizer: Optimizer, pairs: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, gone in pairs:
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.masked_fill_(gone, 0.0)


# --------------------------------------------------------------------------------------------------
# Files


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, object]) -> None:
    """Write tensors and what is said about them to one file with a checksum over all of it.

    Equal values give equal bytes.

    Raises:
        RunError: The file cannot be written.
    """
    own = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    text = json.dumps({**about, "names": list(own)}, sort_keys=True)
    # One entry: safetensors writes several in an order that differs from process to process.
    entry = json.dumps({"about": text, "sha256": _digest(own, text)}, sort_keys=True)
    write_atomic(path, save_tensors(own, {"fedsys": entry}))


def read_tensors(path: Path, format_: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote; return the tensors in their order and what is said of them.

    Args:
        path: The file.
        format_: The value of ``format`` that it must have.

    Raises:
        ModelError: The file cannot be read, is damaged, or is of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            entry = json.loads((file.metadata() or {})["fedsys"])
            text, digest = str(entry["about"]), entry["sha256"]
            about = json.loads(text)
            tensors = {str(name): file.get_tensor(str(name)) for name in about["names"]}
            kind = about["format"]
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} is damaged or not of the kind {format_}: {error}") from error
    if digest != _digest(tensors, text):
        raise ModelError(f"{path} is damaged: its checksum does not fit; restore or remake it")
    if kind != format_:
        raise ModelError(f"{path} is of the kind {kind}, not {format_}")
    return tensors, about


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
