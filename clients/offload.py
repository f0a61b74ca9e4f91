"""A client that trains the first units of the model and leaves the others to an edge server.

What it does to its parameters is what `LocalClient` does, in the same order and with the same
draws; between forward and backward stands a session with an edge. With a label-private cut the
last units stay here too, and with them the labels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor, nn

from clients.local import observation, own_batches, train_metrics
from clients.steps import Batches, Split, Steps, Tally
from fedsys import data
from fedsys.config import Config
from fedsys.faults import SPARED, Doom
from fedsys.offload.emulation import Pace, device_costs
from fedsys.offload.remote import EdgesLost, Moved, Remote
from fedsys.planning.assignment import Assignment
from fedsys.planning.hardware import network_for
from fedsys.randomness import Address
from fedsys.runs.tracing import Recorder
from fedsys.training import federation
from fedsys.training import plain as training
from fedsys.training.federation import layered_model, penalty_of
from fedsys.training.part import Part, filled_stages
from fedsys.training.plain import Score
from fedsys.training.pulse import pulse
from fedsys.transport import messages, records
from fedsys.transport.codecs import decode_activation, encode_activation
from fedsys.transport.link import Link
from fedsys.transport.messages import ARRAYS, ASSIGNMENT, MASKS, OBSERVATION, OPTIMIZER

EVALUATION_BATCH = 500

NOTHING = Score(float("nan"), float("nan"), 0)

Connect = Callable[[str], Link]


@dataclass(frozen=True)
class _Point:
    """The device's half between two steps, to which it can return."""

    state: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    sums: Tally


class OffloadClient:
    """One client's part of a round, together with an edge server.

    Args:
        config: The run.
        partition: The client's partition id: its data and its random draws.
        content: The message: the device's half, settings, and the assignment.
        connect: Dials an edge server.
    """

    def __init__(
        self, config: Config, partition: int, content: RecordDict, connect: Connect
    ) -> None:
        training.set_threads(config.client.threads)
        self._config, self._partition, self._content = config, partition, content
        self._fed = federation.federation(config)
        shape, classes = self._fed.dataset.input_shape, self._fed.dataset.num_classes
        self._layers = layered_model(config, shape, classes)
        settings, told = messages.settings_of(content), content.config_records[ASSIGNMENT]
        place = messages.read(messages.Place, told)
        pieces = settings.micro_batches or config.schedule.micro_batches
        self._assigned = Assignment.of(told, pieces)
        self._cuts = [self._assigned.cut, place.tail]
        self._private = self._cuts[1] < len(self._layers)
        self._device = training.pick_device(config.client.device)
        self._round, self._mu = settings.server_round, settings.proximal_mu
        self._address = Address(config.seed, partition, self._round)
        self._remote = Remote(
            list(place.edges), place.session, place.token, connect, private=self._private
        )
        self._recorder = Recorder()
        pace = Pace(device_costs(config, self._layers, partition))
        split = Split(self._assigned, place.tail, len(self._layers), config.schedule)
        self._steps = Steps(split, self._address, self._remote, pace, self._recorder, self._device)
        self._reached = 0  # the step in work

    def train(self, doom: Doom = SPARED) -> RecordDict:
        """Train together with the edge.

        Args:
            doom: What strikes the device before or after one of its steps.

        Returns:
            The records of `LocalClient.train` with the device's half only, and ``observation``.
        """
        began = time.perf_counter()
        try:
            part, sums, steps = self._train(doom)
        except EdgesLost as error:
            return self._stranded(str(error), time.perf_counter() - began)
        finally:
            self._remote.close()
        score = Score(
            float(sums.loss) / sums.examples if sums.examples else float("nan"),
            sums.hits / sums.examples if sums.examples else float("nan"),
            sums.examples,
            steps,
        )
        seconds = time.perf_counter() - began
        reply = RecordDict(
            {
                ARRAYS: records.to_record(part.state()),
                messages.METRICS: train_metrics(score, self._config.client.epochs, seconds),
                OBSERVATION: self._observation(steps, seconds),
                messages.TRACE: ConfigRecord(messages.written(self._recorder.record())),
            }
        )
        if self._config.client.keep_optimizer:
            reply[OPTIMIZER] = records.to_record(part.optimizer_state())
        return reply

    def evaluate(self) -> RecordDict:
        """Score the model on the client's own examples: forward here, there, and here again.

        Returns:
            The records of `LocalClient.evaluate`, without metrics if no edge is left, and
            ``observation``.
        """
        began = time.perf_counter()
        try:
            metrics = self._evaluate()
        except EdgesLost as error:
            return self._stranded(str(error), time.perf_counter() - began)
        finally:
            self._remote.close()
        seen = self._observation(0, time.perf_counter() - began)
        return RecordDict({messages.METRICS: metrics, OBSERVATION: seen})

    @torch.inference_mode()
    def _evaluate(self) -> MetricRecord:
        front, back = self._stages(records.from_record(self._content.array_records[ARRAYS]))
        front.eval()
        back.eval()
        own = self._fed.dataset.train.take(self._fed.parts[self._partition])
        loss, hits, examples = 0.0, 0, 0
        self._remote.open()
        for index, (x, y) in enumerate(data.eval_batches(own, self._fed.dataset, EVALUATION_BATCH)):
            x, y = x.to(self._device), y.to(self._device)
            outputs = back(self._through_edge(index, front(x)))
            loss += float(nn.functional.cross_entropy(outputs, y, reduction="sum"))
            hits += int((outputs.argmax(1) == y).sum())
            examples += len(y)
        score = Score(loss / examples, hits / examples, examples) if examples else NOTHING
        return MetricRecord(
            {
                messages.NUM_EXAMPLES: score.examples,
                "eval_loss": score.loss,
                "eval_accuracy": score.accuracy,
            }
        )

    def _through_edge(self, index: int, z: Tensor) -> Tensor:
        """Return what the edge's units make of `z`, wherever the session is."""
        tensors, meta = encode_activation(z, self._assigned.codec_up)
        while True:
            try:
                self._remote.send("evaluate", 0, index, meta, tensors)
                answer = self._remote.receive("evaluate", 0, index)
                return decode_activation(answer.tensors, answer.meta).to(self._device)
            except Moved:  # to a session with the same parameters: nothing was trained
                continue

    # --- rounds, steps, micro-batches -------------------------------------------------------------

    def _train(self, doom: Doom) -> tuple[Part, Tally, int]:
        kept = self._content.array_records.get(OPTIMIZER, ArrayRecord())
        points = {
            0: _Point(
                records.from_record(self._content.array_records[ARRAYS]),
                records.from_record(kept),
                Tally(),
            )
        }
        step = self._remote.open()
        if step not in points:  # it was begun by a device that is no more
            raise EdgesLost(f"the session stands at step {step}, where this device never was")
        while True:
            part = self._restore(points[step], points[0])
            sums = points[step].sums.copy()
            try:
                steps = self._from(step, part, sums, points, doom)
                self._say_done(steps)
                return part, sums, steps
            except Moved as moved:
                # A replica may be newer than the device's last point only if the device never saw
                # the answers to those steps; then it has none of them, and the round begins anew.
                step = moved.step if moved.step in points else 0
                if step != moved.step:
                    raise EdgesLost(
                        "the session stands at a step that this device never saw"
                    ) from (moved)

    def _say_done(self, steps: int) -> None:
        while True:
            try:
                self._remote.send("done", steps, 0, {}, {})
                self._remote.receive("done", steps, 0)
                return
            except Moved as moved:
                if moved.step != steps:
                    raise

    def _from(
        self, first: int, part: Part, sums: Tally, points: dict[int, _Point], doom: Doom
    ) -> int:
        """Train from a step to the end of the round; return the number of steps."""
        every = self._config.fleet.replicate_every
        source = own_batches(self._config, self._partition, self._address)
        step = 0
        with Batches(source, self._device) as batches:
            while True:
                new = step >= first
                batch = self._steps.take(step, batches) if new else batches.take()
                if batch is None:
                    return step
                doom.reach("before", step)
                if new:
                    self._reached = step
                    self._step_anywhere(step, part, (batch.x, batch.y), sums, batches)
                    if every and (step + 1) % every == 0:
                        self._keep_point(points, step + 1, part, sums)
                doom.reach("after", step)
                pulse().batch_done()
                step += 1

    def _step_anywhere(
        self, step: int, part: Part, batch: tuple[Tensor, Tensor], sums: Tally, batches: Batches
    ) -> None:
        """Do a step, once more if the session moved to another edge as it stands.

        Raises:
            Moved: The session goes on from an earlier step.
        """
        seen = sums.copy()
        buffers = [(b, b.clone()) for module in part.modules for b in module.buffers()]
        while True:
            try:
                return self._steps.do(step, part, *batch, sums, batches)
            except Moved as moved:
                self._count_repeated(step, moved.step)
                if moved.step != step:
                    raise
            # all that a step changes before its end
            sums.loss, sums.hits, sums.examples = seen.loss.clone(), seen.hits, seen.examples
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

    # --- the device's half ------------------------------------------------------------------------

    def _stages(self, state: dict[str, Tensor]) -> list[nn.Module]:
        """Return the device's stages on its device; the edge's are never built."""
        layout = self._config.client.memory_format
        return filled_stages(self._layers, self._cuts, [0, 2], state, self._device, layout)

    def _restore(self, point: _Point, first: _Point) -> Part:
        state = {name: tensor.clone() for name, tensor in point.state.items()}
        return Part(
            self._stages(state),
            self._config,
            self._round,
            proximal_mu=self._mu,
            optimizer_state=point.optimizer,
            anchor=first.state,
            masks=records.from_record(self._content.array_records.get(MASKS, ArrayRecord())),
            penalty=penalty_of(self._config, self._layers, self._round),
        )

    def _keep_point(self, points: dict[int, _Point], step: int, part: Part, sums: Tally) -> None:
        """Keep the newest points; the edge's newest replica may be one older."""
        every = self._config.fleet.replicate_every
        state = {name: tensor.cpu().clone() for name, tensor in part.state().items()}
        points[step] = _Point(state, part.optimizer_state(), sums.copy())
        for old in [s for s in points if 0 < s < step - 2 * every]:
            del points[old]

    # --- what is told -----------------------------------------------------------------------------

    def _count_repeated(self, step: int, to: int) -> None:
        if self._remote.traffic.recoveries:
            self._remote.traffic.recoveries[-1]["repeated_steps"] = step - to

    def _stranded(self, reason: str, seconds: float) -> RecordDict:
        return RecordDict({OBSERVATION: self._observation(self._reached, seconds, reason)})

    def _observation(self, steps: int, seconds: float, stranded: str = "") -> ConfigRecord:
        sums = self._recorder.sums(network_for(self._config, self._partition).latency_s)
        return observation(steps, seconds, sums, self._remote.traffic, stranded)
