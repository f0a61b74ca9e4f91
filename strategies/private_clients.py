"""A promise to each client: the mean of clipped updates with noise.

McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018, with the
clipping of Flower's `DifferentialPrivacyServerSideFixedClipping`. What that wrapper leaves open is
done around it here:

* its norm covers every array that it is shown, so it is shown parameters alone, of the whole model,
  device and edge half together; buffers are refused, which would be averaged without noise;
* clients count alike, whatever examples they have: the noise is that of equal weights;
* an update of exactly zero, which it would divide by, is made to differ in one last place; one
  with numbers that are not finite, which no factor bounds, counts as such a one, and one whose
  squares float32 does not hold is clipped before;
* noise has an address, or is the operating system's, where Flower draws from a process-wide
  generator; and its deviation is that of the clients that answered;
* the clipping norm may follow a quantile (`fedsys.privacy.adaptive`), in the paper's direction;
* ε is accounted by dp-accounting for clients that are asked more or less often. Flower's own
  accountant knows full participation only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    Strategy,
)
from numpy.typing import NDArray
from torch import nn

from fedsys.config import Config
from fedsys.errors import ConfigError
from fedsys.privacy.adaptive import next_norm, split_noise
from fedsys.privacy.local import PURPOSE
from fedsys.privacy.noise import NoiseSource, source_of
from fedsys.randomness import Address
from fedsys.transport import records
from fedsys.transport.messages import ARRAYS, METRICS, NUM_EXAMPLES
from strategies.around import Around

_MOST_NORM: Final = 1e15
"""Of an update that Flower clips: it adds up squares in float32."""

_CLIENT_SIDE = (
    "has devices clip what they send, which is their half of a split model, and believes that they "
    "did; here whole updates are clipped, by their norm over both halves"
)

FLOWERS = {
    "DifferentialPrivacyServerSideFixedClipping": "weighs clients by examples, so that one moves "
    "the mean by more than its noise was made for, and leaves a round out in which one fails",
    "DifferentialPrivacyServerSideAdaptiveClipping": "moves its norm away from the quantile",
    "DifferentialPrivacyClientSideFixedClipping": _CLIENT_SIDE,
    "DifferentialPrivacyClientSideAdaptiveClipping": _CLIENT_SIDE,
}
"""Flower's wrappers, and what of each breaks a promise; its accountant knows full participation
only."""


def refuse_flowers(target: str) -> None:
    """Refuse a strategy that is one of Flower's wrappers for differential privacy.

    Raises:
        ConfigError: It is; the reason and the way out are named.
    """
    name = target.rpartition(".")[2]
    if target.startswith("flwr.") and name in FLOWERS:
        clipping = "adaptive" if "Adaptive" in name else "fixed"
        raise ConfigError.of(
            "strategy._target_", target, f"must not be chosen: it {FLOWERS[name]}",
            f"privacy=client privacy.clipping={clipping} clips by Flower's code, and accounts",
        )  # fmt: skip


def check_client_run(config: Config, inner: Strategy, model: nn.Module) -> None:
    """Refuse what releases more about clients than the noised mean of their clipped updates.

    With noise on the devices it is each clipped update with noise; whatever is made of these spends
    nothing more.

    Raises:
        ConfigError: Names the option and the way out.
    """
    if config.privacy.local:
        _check_local(config)
    elif type(inner).aggregate_train is not FedAvg.aggregate_train:
        raise ConfigError.of(
            "strategy._target_", type(inner).__name__,
            "must average as FedAvg does with privacy=client: what one client can change in "
            "another aggregate is not bounded by the clipping norm, or not by as much noise",
            "strategy=fedavg or fedprox",
        )  # fmt: skip
    _check_parameters(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if buffers := sorted(model.state_dict().keys() - parameters):
        raise ConfigError.of(
            "model.norm", "batch",
            f"cannot be with privacy=client: {buffers[0]} and {len(buffers) - 1} other buffers "
            "would be averaged without clipping and noise", "model.norm=group",
        )  # fmt: skip
    if float(config.strategy.get("fraction_evaluate") or 0.0) > 0:
        raise ConfigError.of(
            "strategy.fraction_evaluate", config.strategy.get("fraction_evaluate"),
            "has clients tell their scores, which is a release without noise with privacy=client",
            "0; rounds are judged on the validation part",
        )  # fmt: skip


def _check_parameters(model: nn.Module) -> None:
    """Refuse parameters that noise would change although, or differently than, they are trained."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            raise ConfigError.of(
                "model", name, "is frozen, and with privacy=client all that is sent gets noise",
                "train all parameters, or choose another model",
            )  # fmt: skip
        if (other := first.setdefault(id(parameter), name)) != name:
            raise ConfigError.of(
                "model", name, f"is shared with {other}, and with privacy=client each would get "
                "noise of its own", "give each use parameters of its own, or choose another model",
            )  # fmt: skip


def drowned(config: Config, noise: float, parameters: int) -> str:
    """Return a warning where noise of a round is longer than any mean of clipped updates is.

    A regression over 8 clients ended in numbers that are none: the noise of each of its rounds was
    25 times as long as what devices could say against it, until they could not train any more.

    Args:
        config: The run.
        noise: Deviation of the noise over the clipping norm.
        parameters: Of the model; the length of the noise grows with their root.
    """
    if config.privacy.mechanism != "client":
        return ""
    asked = max(1, round(config.num_clients * float(config.strategy.get("fraction_train") or 1.0)))
    one = noise * math.sqrt(parameters)
    ratio = one / (math.sqrt(asked) if config.privacy.local else asked)
    if ratio <= 1:
        return ""
    enough = math.ceil(one**2 if config.privacy.local else one)
    return (
        f"the noise of a round is {ratio:.3g} times as long as the longest mean of updates from "
        f"{asked} client{'s' * (asked > 1)}, and the model may learn nothing: from {enough:,} "
        "clients in a round on it is shorter; a larger privacy.epsilon, fewer rounds and smaller "
        "models need fewer"
    )


def _check_local(config: Config) -> None:
    """Refuse what devices would tell of themselves before noise is added, or beside it."""
    kind, clipping = config.policy.get("kind", "none"), config.privacy.clipping
    refused = (
        ("privacy.where", "device", kind != "none",
         f"must be server with policy={kind}: an edge server makes its half of an update, and sees "
         "activations, before any noise", "policy=none trains on the devices alone"),
        ("privacy.clipping", clipping, clipping != "fixed",
         "must be fixed with privacy.where=device: it needs the norms of updates",
         "privacy.clipping=fixed"),
        ("client.keep_optimizer", True, config.client.keep_optimizer,
         "must be false with privacy.where=device: the optimizer's state would leave devices as it "
         "is", "client.keep_optimizer=false"),
    )  # fmt: skip
    for key, value, broken, rule, way_out in refused:
        if broken:
            raise ConfigError.of(key, value, rule, way_out)


class PrivateClients(Around):
    """Clips whole updates, averages them with equal weights, and adds noise to the mean.

    Args:
        inner: Averages as FedAvg does; sees parameters only.
        config: The run.

    Attributes:
        clip_norm: Of the next round.
        clipped: Share of the clients that were clipped in the last round; not private, so it is
            told nobody.
    """

    STATE = ("clip_norm",)

    def __init__(self, inner: Strategy, config: Config) -> None:
        # Noise of Flower's would come from a process-wide generator
        flower = DifferentialPrivacyServerSideFixedClipping(inner, 0.0, config.privacy.clip_norm, 1)
        flower.inner = inner  # type: ignore[attr-defined]  # by which layers are found
        super().__init__(flower)
        self._flower, self._config, self._multiplier = flower, config, 0.0
        self.clip_norm = config.privacy.clip_norm
        self.clipped = 0.0
        self._sent: dict[str, NDArray[Any]] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember from where updates are measured, and how much noise there is to be.

        Args:
            server_round: The round.
            arrays: The global model's parameters.
            config: Has ``noise``: deviation over the clipping norm, of the sum of the updates.
            grid: Passed on.
        """
        self._multiplier = float(config["noise"])  # type: ignore[arg-type]
        self._sent = records.arrays_of(arrays)
        self._flower.clipping_norm = self.clip_norm
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the mean of the clipped updates with noise."""
        replies = list(replies)
        norms = [self._prepared(reply) for reply in replies]
        self._flower.num_sampled_clients = len(replies)
        aggregate, _ = self._flower.aggregate_train(server_round, replies)
        if aggregate is None:
            return None, None
        source = source_of(Address(self._config.seed, round=server_round), self._secure)
        multiplier, count_noise = self._noises(len(replies))
        deviation = multiplier * self.clip_norm / len(replies)
        noisy = {
            name: array + deviation * _normal(source, name, array)
            for name, array in records.arrays_of(aggregate).items()
        }
        self._adapt(norms, source, count_noise)
        # What clients tell of their losses is no part of the promise
        return records.record_of(noisy), MetricRecord()

    @property
    def _secure(self) -> bool:
        return self._config.privacy.secure

    def _prepared(self, reply: Message) -> float:
        """Give a reply the weight of all others; return the norm of its update."""
        reply.content[METRICS] = MetricRecord({NUM_EXAMPLES: 1})
        arrays = records.arrays_of(reply.content.array_records[ARRAYS])
        total = math.fsum(
            float(np.square(array.astype(np.float64) - self._sent[name]).sum())
            for name, array in arrays.items()
        )
        norm = math.sqrt(total) if math.isfinite(total) else 0.0
        if norm == 0.0:
            reply.content[ARRAYS] = records.record_of(_barely_moved(self._sent_alike(arrays)))
        elif norm > _MOST_NORM:
            factor = self.clip_norm / norm
            clipped = {
                name: (sent + factor * (arrays[name] - sent.astype(np.float64))).astype(sent.dtype)
                for name, sent in self._sent_alike(arrays).items()
            }
            reply.content[ARRAYS] = records.record_of(clipped)
        return norm

    def _sent_alike(self, arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return what was sent, of the arrays that came back."""
        return {name: self._sent[name].astype(array.dtype) for name, array in arrays.items()}

    def _noises(self, clients: int) -> tuple[float, float]:
        if self._config.privacy.clipping == "fixed":
            return self._multiplier, 0.0
        return split_noise(self._multiplier, clients)

    def _adapt(self, norms: list[float], source: NoiseSource, count_noise: float) -> None:
        privacy, within = self._config.privacy, sum(norm <= self.clip_norm for norm in norms)
        self.clipped = 1 - within / len(norms)
        if privacy.clipping == "adaptive":
            draw = float(source.normal("client-count", 0, "", torch.Size([1])))
            share = (within + count_noise * draw) / len(norms)
            self.clip_norm = next_norm(self.clip_norm, share, privacy.quantile)


def _barely_moved(arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return arrays of which the largest number is one unit in the last place, or 1e-12, off."""
    name = max(arrays, key=lambda n: float(np.abs(arrays[n]).max(initial=-1.0)))
    moved = arrays[name].copy()
    index = int(np.abs(moved).argmax())
    moved.flat[index] += max(float(np.spacing(np.abs(moved.flat[index]))), 1e-12)
    return {**arrays, name: moved}


def _normal(source: NoiseSource, name: str, array: NDArray[Any]) -> NDArray[Any]:
    drawn: NDArray[Any] = source.normal(PURPOSE, 0, name, torch.Size(array.shape)).numpy()
    return drawn.astype(array.dtype)
