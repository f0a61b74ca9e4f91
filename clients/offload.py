"""A client that trains the first units of the model and leaves the others to an edge server.

What it does to its parameters is what `LocalClient` does, in the same order and with the same
draws; between forward and backward stands a session with an edge. With a label-private cut the
last units stay here too, and with them the labels.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from clients.device_half import DeviceHalf
from clients.local import eval_metrics, observation, train_metrics
from clients.roaming import Roaming, handover_of
from clients.split_round import SplitRound
from clients.steps import Steps
from clients.watching import LinkWatcher
from fedsys import data
from fedsys.config import Config
from fedsys.errors import RemoteError
from fedsys.faults import SPARED, Doom
from fedsys.offload.asking import EdgesLost
from fedsys.offload.emulation import Pace, device_costs
from fedsys.offload.remote import Moved, Remote
from fedsys.planning.hardware import network_for
from fedsys.planning.mobility.network_led import is_watched, limits_of
from fedsys.planning.mobility.scripted import movers
from fedsys.planning.moves import moves_of, to_text
from fedsys.planning.workload import mini_batches
from fedsys.randomness import Address
from fedsys.runs.tracing import Recorder
from fedsys.training import federation
from fedsys.training import plain as training
from fedsys.training.plain import Score
from fedsys.training.tasks import task_of
from fedsys.transport import messages, records
from fedsys.transport.codecs import decode_activation, encode_activation
from fedsys.transport.link import Link
from fedsys.transport.messages import ARRAYS, OBSERVATION, OPTIMIZER, Itinerary
from fedsys.transport.several import Inputs, beside

Connect = Callable[[str], Link]


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
        self._config, self._partition = config, partition
        self._half = half = DeviceHalf(config, content, partition)
        place, self._recorder = half.place, Recorder()
        self._remote = Remote(
            list(place.edges), place.session, place.token, connect, private=half.split.private
        )
        self._address = Address(config.seed, partition, half.round)
        self._began_s = time.monotonic()
        self._itinerary = itinerary_of(content)
        self._watching: LinkWatcher | None = None

    def train(self, doom: Doom = SPARED, most: int | None = None) -> RecordDict:
        """Train together with the edge.

        Args:
            doom: What strikes the device before or after one of its steps.
            most: Mini-batches after which a truncated round is over; None: it is none.

        Returns:
            The records of `LocalClient.train` with the device's half only, and ``observation``.
        """
        config = self._config
        pace = Pace(device_costs(config, self._half.layers, self._partition))
        roaming = self._roaming() if most is None else None
        steps_of = Steps(
            self._half.split,
            self._address,
            self._remote,
            pace,
            self._recorder,
            self._half.device,
            roaming,
            task_of(config),
            config.client.precision,
        )
        round_ = SplitRound(
            config, self._address, self._half, self._remote, steps_of, most, roaming
        )
        began = time.perf_counter()
        self._began_s = time.monotonic()
        try:
            part, sums, steps = round_.train(doom)
        except (EdgesLost, RemoteError) as error:  # the round can be done without that edge
            return self._stranded(round_.reached, str(error), began)
        finally:
            self._remote.close()
        seconds = time.perf_counter() - began
        score = sums.score(steps)
        reply = RecordDict(
            {
                ARRAYS: records.to_record(part.part.state()),
                messages.METRICS: train_metrics(score, config, self._partition, seconds),
                OBSERVATION: self._observation(steps, seconds),
                messages.TRACE: ConfigRecord(messages.written(self._recorder.record())),
            }
        )
        if config.client.keep_optimizer:
            reply[OPTIMIZER] = records.to_record(part.part.optimizer_state())
        return reply

    def evaluate(self) -> RecordDict:
        """Score the model on the client's own examples: forward here, there, and here again.

        Returns:
            The records of `LocalClient.evaluate`, without metrics if no edge is left, and
            ``observation``.
        """
        began = time.perf_counter()
        try:
            score = self._score()
        except (EdgesLost, RemoteError) as error:
            return self._stranded(0, str(error), began)
        finally:
            self._remote.close()
        seen = self._observation(0, time.perf_counter() - began)
        return RecordDict({messages.METRICS: eval_metrics(score, self._config), OBSERVATION: seen})

    @torch.inference_mode()
    def _score(self) -> Score:
        front, back = self._half.stages(self._half.start().half.state)
        front.eval()
        back.eval()
        fed, index = federation.federation(self._config), itertools.count()
        own = fed.dataset.train.take(fed.parts[self._partition])
        self._remote.open()
        return training.score_of(
            lambda x: back(
                self._through_edge(next(index), training.forward(front, x), x),
                *beside(x, self._half.split.kept).values(),
            ),
            data.eval_batches(own, fed.dataset),
            self._half.device,
            task_of(self._config),
        )

    def _through_edge(self, index: int, z: Tensor, x: Inputs) -> Tensor:
        """Return what the edge's units make of `z`, and of inputs, wherever the session is."""
        tensors, meta = encode_activation(z, self._half.split.assignment.codec_up)
        tensors = {**tensors, **beside(x, self._half.split.given)}
        while True:
            try:
                self._remote.send("evaluate", 0, index, meta, tensors)
                answer = self._remote.receive("evaluate", 0, index)
                return decode_activation(answer.tensors, answer.meta).to(self._half.device)
            except Moved:  # to a session with the same parameters: nothing was trained
                continue

    def _roaming(self) -> Roaming | None:
        """Return the moves of the device in this round; None if there are none."""
        told, config = self._itinerary, self._config
        watcher = self._watching = self._watcher()
        if told is None and watcher is None:
            return None
        told = told or Itinerary("[]", (), config.mobility.mode == "restart")
        return Roaming(
            moves_of(told.moves), told.edges, self._mini_batches(), self._remote,
            restart=told.restart, watcher=watcher, how=config.mobility.how, cut=config.mobility.cut,
        )  # fmt: skip

    def _watcher(self) -> LinkWatcher | None:
        """Return what watches the link of the device; None if it does not leave because of it."""
        config, own = self._config, self._config.mobility
        if not is_watched(config) or self._partition not in movers(
            own, config.num_clients, config.seed
        ):
            return None
        latency_s = network_for(config, self._partition).latency_s
        edges = self._half.place.edges
        armed = self._itinerary is None or self._itinerary.armed
        return LinkWatcher(
            limits_of(own), self._recorder, self._remote, edges, latency_s, armed=armed
        )

    def _mini_batches(self) -> int:
        """Return the mini-batches of the device in a round."""
        own = len(federation.federation(self._config).parts[self._partition])
        client = self._config.client
        return client.epochs * len(mini_batches(own, client.batch_size))

    def _stranded(self, reached: int, reason: str, began: float) -> RecordDict:
        seconds = time.perf_counter() - began
        return RecordDict({OBSERVATION: self._observation(reached, seconds, reason)})

    def _observation(self, steps: int, seconds: float, stranded: str = "") -> ConfigRecord:
        sums = self._recorder.sums(network_for(self._config, self._partition).latency_s)
        begun = self._partition, self._half.round, self._began_s
        gone = self._remote.traffic.moves
        whole, good = self._mini_batches(), self._watching is None or self._watching.armed
        moves = [handover_of(one, *begun, whole, good=good) for one in gone]
        more = {"edge": self._remote.edge, "moves": to_text(moves)}
        seen = observation(steps, seconds, sums, self._remote.traffic, stranded)
        return ConfigRecord({**seen, **more})


def itinerary_of(content: RecordDict) -> Itinerary | None:
    """Return where a device is to go in the round that a message begins; None: it stays."""
    told = content.config_records.get(messages.MOVES)
    return None if told is None else messages.read(Itinerary, told)
