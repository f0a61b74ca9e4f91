"""A client that trains the whole model by itself: classic federated learning."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from fedsys import data
from fedsys.config import Config, pruning
from fedsys.data import Images
from fedsys.faults import Doom
from fedsys.models import lora
from fedsys.offload.emulation import Pace, device_costs
from fedsys.offload.remote import Traffic
from fedsys.planning.costs import MachineCosts
from fedsys.planning.resources import Measured, Observation
from fedsys.privacy import training as private
from fedsys.privacy.budget import epoch_steps, sampling_rate
from fedsys.privacy.labels import randomised
from fedsys.privacy.local import release_update
from fedsys.privacy.noise import NoiseSource, poisson_sample, source_of
from fedsys.privacy.update import PrivateUpdate
from fedsys.randomness import Address
from fedsys.runs.tracing import Recorder
from fedsys.training import federation, optimizers, resilience
from fedsys.training import plain as training
from fedsys.training.federation import Federation, layers_of, penalty_of
from fedsys.training.masks import Masks, held
from fedsys.training.penalty import Penalty
from fedsys.training.pulse import pulse
from fedsys.training.schedule import micro_batch_bounds
from fedsys.training.tasks import task_of
from fedsys.transport import messages, records
from fedsys.transport.several import Inputs

_models = threading.local()

Batches = Iterator[tuple[Inputs, Tensor]]


class LocalClient:
    """One client's part of a round. Holds nothing that outlives the message.

    Args:
        config: The run.
        partition: The client's partition id: its data and its random draws.
    """

    def __init__(self, config: Config, partition: int) -> None:
        self.config, self.partition = config, partition
        training.set_threads(config.client.threads)

    def train(self, content: RecordDict, most: int | None = None) -> RecordDict:
        """Train from the received arrays.

        Args:
            content: Records ``arrays`` (the global model), ``config`` (with ``server-round``, and
                ``proximal-mu`` from FedProx), ``optimizer`` if state was kept, and ``masks`` if
                weights are pruned.
            most: Mini-batches after which a truncated round is over; None: it is none.

        Returns:
            Records ``arrays``, ``metrics``, ``observation`` and, if the optimizer is kept,
            ``optimizer``.
        """
        began = time.perf_counter()
        client = self.config.client
        settings = messages.settings_of(content)
        round_ = settings.server_round
        model = self.model()
        received = messages.of_kind(content, ArrayRecord)
        records.load_into(model, received[messages.ARRAYS], lora.sent(model))
        place = pruning.position(self.config.pruning, round_, self.config.rounds)
        lr = optimizers.learning_rate(client.lr, client.lr_schedule, *place)
        named = dict(model.named_parameters())
        optimizer = optimizers.make_optimizer(model.parameters(), client, lr)
        if (kept := received.get(messages.OPTIMIZER)) is not None:
            optimizers.unpack_optimizer(optimizer, named, records.from_record(kept))
        address = Address(self.config.seed, self.partition, round_)
        doom = Doom.of(messages.of_kind(content, ConfigRecord).get(messages.FAULTS))
        size = settings.micro_batches or self.config.schedule.micro_batches
        recorder = Recorder()
        source = source_of(address, self.config.privacy.secure)
        own = own_batches(self.config, self.partition, address, most, source)
        batches = doomed(self._paced(own, size, recorder), doom)
        packed = records.from_record(received.get(messages.MASKS, ArrayRecord()))
        with held(Masks.unpacked(packed, named), model, optimizer), _frozen(model, client.frozen):
            score = self._fit(model, optimizer, batches, settings, source, packed)
        if self.config.privacy.local:
            start = records.from_record(content.array_records[messages.ARRAYS])
            clip_norm, noise = self.config.privacy.clip_norm, settings.noise
            release_update(model, start, clip_norm=clip_norm, noise=noise, source=source)
        seconds = time.perf_counter() - began
        reply = self._reply(model, score, seconds, recorder)
        if client.keep_optimizer:
            state = optimizers.pack_optimizer(optimizer, named)
            reply[messages.OPTIMIZER] = records.to_record(state)
        return reply

    def _reply(
        self, model: nn.Module, score: training.Score, seconds: float, recorder: Recorder
    ) -> RecordDict:
        """Return what a round tells: the model, how it went, and what was measured of it."""
        reply = records.unchecked(
            RecordDict,
            {
                messages.ARRAYS: records.to_record(lora.sent(model)),
                messages.METRICS: train_metrics(score, self.config, self.partition, seconds),
                messages.OBSERVATION: observation(score.steps, seconds, recorder.sums()),
            },
        )
        if self.config.fleet.emulate:
            reply[messages.TRACE] = ConfigRecord(messages.written(recorder.record()))
        return reply

    def _fit(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        batches: Batches,
        settings: messages.Settings,
        source: NoiseSource,
        packed: Mapping[str, Tensor],
    ) -> training.Score:
        """Train the model; with a promise to each example if the run makes one."""
        config, round_ = self.config, settings.server_round
        address = Address(config.seed, self.partition, round_)
        pieces = settings.micro_batches or config.schedule.micro_batches
        anchor, penalty = _anchor(model, settings.proximal_mu), self._penalty(round_)
        if not config.privacy.per_example:
            with resilience.phase(model, config.resilience, round_) as losses:
                return training.train(
                    model, optimizer, batches, address,
                    micro_batches=pieces, clip_norm=config.client.clip_norm,
                    anchor=anchor, penalty=penalty, losses=losses, task=task_of(config),
                    precision=config.client.precision,
                )  # fmt: skip
        with PrivateUpdate(
            [model],
            clip_norm=config.privacy.clip_norm,
            noise=settings.noise,
            expected=settings.expected,
            source=source,
            masks=Masks.unpacked(packed, dict(model.named_parameters())),
        ) as update:
            return private.train(
                model, optimizer, batches, address, update,
                micro_batches=pieces, anchor=anchor, penalty=penalty,
            )  # fmt: skip

    def evaluate(self, content: RecordDict) -> RecordDict:
        """Score the received arrays on the client's own training examples, without augmentation."""
        fed = federation.federation(self.config)
        model = self.model()
        records.load_into(model, content.array_records[messages.ARRAYS], lora.sent(model))
        own = fed.dataset.train.take(fed.parts[self.partition])
        score = training.evaluate(model, data.eval_batches(own, fed.dataset), task_of(self.config))
        return RecordDict({messages.METRICS: eval_metrics(score, self.config)})

    def _penalty(self, round_: int) -> Penalty | None:
        if not pruning.penalty_weight(self.config.pruning, round_, self.config.rounds):
            return None
        dataset = federation.federation(self.config).dataset
        layers = layers_of(self.config, dataset)
        return penalty_of(self.config, layers, round_)

    def _paced(self, batches: Batches, micro_batches: int, recorder: Recorder) -> Batches:
        """Yield mini-batches, note how long they take, and wait as long as who is stood for."""
        pace = Pace(self._costs())
        for step, (x, y) in enumerate(batches):
            pace.begin()
            yield x, y
            seconds, load_s = 0.0, 0.0
            if (costs := pace.costs) is not None:
                sizes = [stop - start for start, stop in micro_batch_bounds(len(y), micro_batches)]
                seconds = sum(costs.update_s) + sum(sum(costs.seconds(n)) for n in sizes)
                load_s = len(y) * costs.load_s
            recorder.note("step", step, -1, pace.end(seconds))
            pace.owe(load_s)
            recorder.note("load", step, -1, pace.settle())
            recorder.finished(pace.real(), pace.late_s)

    def _costs(self) -> MachineCosts | None:
        """Return the costs of the machine that this device stands for; None: of itself."""
        if not self.config.fleet.emulate:
            return None
        dataset = federation.federation(self.config).dataset
        layers = layers_of(self.config, dataset)
        return device_costs(self.config, layers, self.partition)

    def model(self) -> nn.Module:
        """Return this thread's model; its state is overwritten by every message."""
        key = (self.config.text, threading.get_ident())
        if getattr(_models, "key", None) != key:
            fed = federation.federation(self.config)
            model = federation.trained_model(self.config, fed.dataset, initial=False)
            model = model.to(training.pick_device(self.config.client.device))
            _models.model = federation.with_kernels(model, self.config, fed.dataset)
            _models.key = key
        model_: nn.Module = _models.model
        return model_


@contextmanager
def _frozen(model: nn.Module, frozen: bool) -> Iterator[None]:
    learns = [p for p in model.parameters() if p.requires_grad] if frozen else []
    for parameter in learns:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learns:
            parameter.requires_grad_(True)  # the model serves other messages, too


def _anchor(model: nn.Module, mu: float) -> training.Proximal | None:
    return training.Proximal.at(model, mu) if mu else None


def doomed(batches: Batches, doom: Doom) -> Batches:
    """Yield mini-batches; `doom` strikes before or after the step of one."""
    for step, batch in enumerate(batches):
        doom.reach("before", step)
        yield batch
        doom.reach("after", step)
        pulse().batch_done()


def own_batches(
    config: Config,
    partition: int,
    address: Address,
    most: int | None = None,
    source: NoiseSource | None = None,
) -> Batches:
    """Return the mini-batches of a client's round, epoch after epoch.

    With a promise to each example they are Poisson samples: as many as without, and each example
    is in each of them with the probability that gives ``client.batch_size`` examples on average.

    Args:
        config: The run.
        partition: The client.
        address: Seed, client and round.
        most: How many there are in a truncated round, over as many epochs as that takes; None:
            those of the epochs of the run.
        source: Draws Poisson samples; None: by the address.

    Returns:
        Inputs ``(batch, C, H, W)``, normalised and augmented, and labels ``(batch,)``.
    """
    epochs = config.client.epochs if most is None else most  # there is a mini-batch in each
    if config.privacy.per_example:
        drawn = _sampled(config, partition, epochs, source or source_of(address, secure=False))
        fed = federation.federation(config)
        drawn = itertools.islice(drawn, most)
        return data.drawn_batches(fed.dataset.train, drawn, fed.dataset, address)
    return itertools.islice(_epochs(config, partition, address, epochs), most)


def _sampled(
    config: Config, partition: int, epochs: int, source: NoiseSource
) -> Iterator[NDArray[np.int64]]:
    own, size = federation.federation(config).parts[partition], config.client.batch_size
    rate = sampling_rate(len(own), size)
    for step in range(epochs * epoch_steps(len(own), size)):
        yield own[poisson_sample(source, step, len(own), rate)]


def _told(config: Config, fed: Federation, partition: int) -> Images:
    """Return the training part with the labels that a client tells, the same in every round."""
    images, privacy = fed.dataset.train, config.privacy
    if privacy.mechanism != "cut" or privacy.label_epsilon is None:
        return images
    own, labels = torch.from_numpy(fed.parts[partition]), images.labels.clone()
    address, classes = Address(config.seed, partition), fed.dataset.num_classes
    labels[own] = randomised(images.labels[own], privacy.label_epsilon, classes, address)
    return Images(images.pixels, labels)


def _epochs(config: Config, partition: int, address: Address, epochs: int) -> Batches:
    fed = federation.federation(config)
    images, step = _told(config, fed, partition), 0
    for epoch in range(epochs):
        for batch in data.train_batches(
            images,
            fed.parts[partition],
            fed.dataset,
            config.client.batch_size,
            address,
            epoch,
            step,
        ):
            yield batch
            step += 1


def train_metrics(
    score: training.Score, config: Config, partition: int, seconds: float
) -> MetricRecord:
    """Return what a client tells about its training; the same keys from every kind of client.

    With a promise to each example, neither loss nor accuracy on them is told, and the number of
    examples is that of all, not of those that were drawn. Nor are they with noise on the device,
    where all count alike, as all have the same noise. A metric that is no mean over examples is not
    told of mini-batches.
    """
    told: dict[str, float] = {messages.STEPS: score.steps, "client_seconds": seconds}
    if config.privacy.local:
        return MetricRecord({messages.NUM_EXAMPLES: 1, **told})
    if config.privacy.per_example:
        own = federation.federation(config).parts[partition]
        return MetricRecord({messages.NUM_EXAMPLES: len(own), **told})
    metric = {f"train_{config.task.measure.name}": score.accuracy}
    return records.unchecked(
        MetricRecord,
        {
            messages.NUM_EXAMPLES: score.examples // config.client.epochs,
            "train_loss": score.loss,
            **(metric if task_of(config).whole is None else {}),
            **told,
        },
    )


def eval_metrics(score: training.Score, config: Config) -> MetricRecord:
    """Return what a client tells about its evaluation; the same keys from every kind of client."""
    return MetricRecord(
        {
            messages.NUM_EXAMPLES: score.examples,
            "eval_loss": score.loss,
            f"eval_{config.task.measure.name}": score.accuracy,
        }
    )


def observation(
    steps: int,
    seconds: float,
    measured: Measured,
    traffic: Traffic | None = None,
    stranded: str = "",
) -> ConfigRecord:
    """Return what a client tells the server app of its time; the same keys from every kind.

    Args:
        steps: Optimizer steps.
        seconds: What they took.
        measured: What a mini-batch took.
        traffic: What went over the links of its session; None: it had none.
        stranded: Why no edge has its session any more.
    """
    traffic = traffic or Traffic()
    seen = Observation(
        **asdict(measured),
        steps=steps,
        seconds=seconds,
        waited_s=traffic.waited_s,
        bytes_up=traffic.bytes_up,
        bytes_down=traffic.bytes_down,
        gradient_share=traffic.gradient_share,
    )
    outcome = messages.Outcome(json.dumps(traffic.recoveries), stranded)
    told = {**messages.written(seen), **messages.written(outcome)}
    return records.unchecked(ConfigRecord, told)
