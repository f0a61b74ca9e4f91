"""Many clients trained at once: one pass of a model computes a step of all of them.

Each parameter is a stack, one layer for each client, and `torch.func.vmap` runs the model over it
(Horace He and Richard Zou, "functorch: JAX-like composable function transforms for PyTorch", 2021).
For tiny models, whose steps are calls and little arithmetic, that is several times as fast. Sums in
matrix products are made in another order, so the bits are others than one at a time.

Each client has the optimizer's arithmetic of its own, as those of `ELEMENTWISE` look at each number
alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.optim import Optimizer

from fedsys.config import Config
from fedsys.errors import ConfigError
from fedsys.training import optimizers
from fedsys.training.plain import Score
from fedsys.training.tasks import CLASSIFICATION, Task

OPTION: Final = "runtime.batched_clients"

ELEMENTWISE: Final = frozenset(
    ("adadelta", "adagrad", "adam", "adamax", "adamw", "nadam", "radam", "rmsprop", "rprop", "sgd")
)
"""Optimizers of torch in which no number depends on another one."""

State = Mapping[str, Tensor]


def check_config(config: Config) -> None:
    """Refuse what many clients at once would train otherwise than each alone.

    Raises:
        ConfigError: Names the other option and the way out.
    """
    if config.runtime.batched_clients == 1:
        return
    client = config.client
    cases = {
        "runtime.kind": (config.runtime.kind, config.runtime.kind != "local"),
        "runtime.pool": (config.runtime.pool, config.runtime.pool != "threads"),
        "policy": (config.policy.get("kind"), config.policy.get("kind", "none") != "none"),
        "privacy": (config.privacy.mechanism, config.privacy.active),
        "pruning": (config.pruning.method, config.pruning.active),
        "resilience": (config.resilience.training, config.resilience.active),
        "schedule.micro_batches": (
            config.schedule.micro_batches, config.schedule.micro_batches > 1,
        ),
        "client.optimizer": (client.optimizer, client.optimizer.lower() not in ELEMENTWISE),
        "client.clip_norm": (client.clip_norm, client.clip_norm is not None),
        "client.keep_optimizer": (client.keep_optimizer, client.keep_optimizer),
        "client.frozen": (client.frozen, client.frozen),
        "client.train": (client.train, client.train != "all"),
        "fleet.emulate": (config.fleet.emulate, config.fleet.emulate),
    }  # fmt: skip
    for name, (value, refused) in cases.items():
        if refused:
            raise ConfigError.of(
                OPTION, config.runtime.batched_clients, f"does not go with {name}={value}",
                f"{OPTION}=1",
            )  # fmt: skip


def check_model(model: nn.Module, count: int) -> None:
    """Refuse a model whose training does more than to compute: which draws, or writes to buffers.

    Args:
        model: What clients are to train.
        count: How many of them at once.

    Raises:
        ConfigError: Names what does.
    """
    plain = dict(model.named_parameters())
    if plain.keys() != dict(model.named_parameters(remove_duplicate=False)).keys():
        raise _refused(count, "a parameter has two names")
    for name, module in model.named_modules():
        kind = type(module).__name__
        if "Dropout" in kind and getattr(module, "p", True):
            raise _refused(count, f"{name} ({kind}) draws", "model.dropout=0")
        if "BatchNorm" in kind and getattr(module, "track_running_stats", True):
            raise _refused(count, f"{name} ({kind}) keeps statistics", "model.norm=group")


def _refused(count: int, reason: str, remedy: str = f"{OPTION}=1") -> ConfigError:
    return ConfigError.of(OPTION, count, f"does not go with this model: {reason}", remedy)


Batch = tuple[Tensor, Tensor]


def train(
    model: nn.Module,
    states: Sequence[State],
    batches: Sequence[Iterable[Batch]],
    make: Callable[[Sequence[nn.Parameter]], Optimizer],
    *,
    proximal_mu: float = 0.0,
    task: Task = CLASSIFICATION,
) -> list[tuple[dict[str, Tensor], Score]]:
    """Train a model from a state of each client on that client's mini-batches.

    Args:
        model: Computes; its own state is not looked at.
        states: Parameters and buffers of each client, by name, on the model's device.
        batches: Of each client; pairs of inputs ``(batch, …)`` and labels ``(batch,)``. Their
            numbers and sizes may differ; those of one size are trained at once.
        make: Makes the optimizer.
        proximal_mu: Weight of FedProx's term; 0 for none.
        task: Tells loss and metric.

    Returns:
        For each client its state after training, and its score as seen in training.
    """
    crowd = _Crowd(model, states, task)
    optimizer = make(list(crowd.stacked.values()))
    start = {n: p.detach().clone() for n, p in crowd.stacked.items()} if proximal_mu else {}
    sources = {k: iter(source) for k, source in enumerate(batches)}
    done: dict[int, dict[str, Tensor]] = {}
    while sources:
        alike: dict[Any, list[tuple[int, Batch]]] = defaultdict(list)
        for k, source in list(sources.items()):
            if (batch := next(source, None)) is None:
                done[k] = crowd.state(k)
                del sources[k]
            else:
                alike[tuple(batch[0].shape)].append((k, batch))
        for group in alike.values():
            crowd.gradients(group)
        if alike:
            for name, p in crowd.stacked.items():
                if start and p.grad is not None:
                    p.grad.add_(p.detach() - start[name], alpha=proximal_mu)
            optimizers.step(optimizer)
    return [(done[k], crowd.scores[k].score()) for k in range(len(states))]


class _Seen:
    """What one client saw in training."""

    def __init__(self) -> None:
        self.loss, self.hits = 0.0, 0.0
        self.examples = self.steps = 0

    def score(self) -> Score:
        n = self.examples
        if not n:
            return Score(math.nan, math.nan, 0)
        return Score(self.loss / n, self.hits / n, n, self.steps)


class _Crowd:
    """The parameters of many clients, one above the other.

    A client that has no more mini-batches takes further steps with the others, which nobody looks
    at: its state is taken before.
    """

    def __init__(self, model: nn.Module, states: Sequence[State], task: Task) -> None:
        self._model, self._task, self._count = model.train(), task, len(states)
        names = dict(model.named_parameters())
        self.stacked = {
            name: nn.Parameter(
                torch.stack([state[name] for state in states]), requires_grad=p.requires_grad
            )
            for name, p in names.items()
        }
        self._order = list(states[0])
        self._buffers = {n: t for n, t in states[0].items() if n not in names}
        self.scores = [_Seen() for _ in states]
        self._work = vmap(grad_and_value(self._loss, has_aux=True), in_dims=(0, None, 0, 0))

    def _loss(
        self, learnt: dict[str, Tensor], fixed: dict[str, Tensor], x: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor]:
        outputs = functional_call(self._model, {**learnt, **fixed}, (x,))
        return self._task.loss(outputs, y, 1.0), outputs

    def state(self, client: int) -> dict[str, Tensor]:
        """Return a copy of a client's state, in the order in which it came."""
        return {
            name: self.stacked[name].detach()[client].clone()
            if name in self.stacked
            else self._buffers[name]
            for name in self._order
        }

    def gradients(self, group: Sequence[tuple[int, Batch]]) -> None:
        """Set the gradients of some clients, whose mini-batches have one size."""
        clients = [k for k, _ in group]
        everyone = len(clients) == self._count
        index = torch.tensor(clients)
        chosen = {n: p.detach() if everyone else p.detach()[index] for n, p in self.stacked.items()}
        learnt = {n: p for n, p in chosen.items() if self.stacked[n].requires_grad}
        xs = torch.stack([x for _, (x, _) in group])
        ys = torch.stack([y for _, (_, y) in group])
        fixed = dict(self._buffers)  # parameters that do not learn are equal in all clients
        fixed |= {n: p[0] for n, p in chosen.items() if n not in learnt}
        found, (losses, outputs) = self._work(learnt, fixed, xs, ys)
        for name, gradient in found.items():
            p = self.stacked[name]
            if everyone:
                p.grad = gradient
            else:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                p.grad[index] = gradient
        self._note(clients, losses, outputs, ys)

    def _note(self, clients: Sequence[int], losses: Tensor, outputs: Tensor, ys: Tensor) -> None:
        size = ys.shape[1]
        if self._task.counts:
            hits = (outputs.argmax(-1) == ys).sum(1).tolist()
        else:
            hits = [float(self._task.total(o, y)) for o, y in zip(outputs, ys, strict=True)]
        for k, loss, hit in zip(clients, losses.tolist(), hits, strict=True):
            seen = self.scores[k]
            seen.loss += loss * size
            seen.hits += hit
            seen.examples += size
            seen.steps += 1
