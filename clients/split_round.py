"""A round of a device with its edge, step by step, wherever its session goes on.

When the session moves to another edge, the device returns to the point at which the session
stands: the step in work, a step of which both have kept their halves, or the start of the round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clients.device_half import DeviceHalf, Point
from clients.local import own_batches
from clients.roaming import Roaming
from clients.steps import Batches, Steps, Tally
from fedsys.config import Config
from fedsys.faults import Doom
from fedsys.offload.asking import EdgesLost
from fedsys.offload.remote import Moved, Remote
from fedsys.privacy.part import Stepping
from fedsys.randomness import Address
from fedsys.training.pulse import pulse
from fedsys.transport.several import Inputs


class SplitRound:
    """One round of one device.

    Args:
        config: The run.
        address: Seed, client and round.
        half: The device's units.
        remote: The session.
        steps: Works through mini-batches.
        most: As `own_batches` takes it.
        roaming: Moves of the device in this round; None: there are none.

    Attributes:
        reached: The step in work.
    """

    def __init__(
        self,
        config: Config,
        address: Address,
        half: DeviceHalf,
        remote: Remote,
        steps: Steps,
        most: int | None = None,
        roaming: Roaming | None = None,
    ) -> None:
        self.reached = 0
        self._config, self._address, self._most = config, address, most
        self._half, self._remote, self._steps = half, remote, steps
        self._roaming = roaming

    def train(self, doom: Doom) -> tuple[Stepping, Tally, int]:
        """Train to the end of the round; return the units, what was seen, and the steps.

        Args:
            doom: What strikes the device before or after one of its steps.

        Raises:
            EdgesLost: No edge has the session at a step at which the device can go on.
        """
        points = {0: self._half.start()}
        step = self._remote.open()
        if step not in points:  # it was begun by a device that is no more
            raise EdgesLost(f"the session stands at step {step}, where this device never was")
        while True:
            self._part = self._half.part(points[step])
            self._steps.shared_as(self._half.split)
            sums = points[step].sums.copy()
            try:
                steps = self._from(step, sums, points, doom)
                if self._roaming is not None:
                    self._roaming.at(steps, 0)
                self._say_done(steps)
                return self._part, sums, steps
            except Moved as moved:
                # A replica may be newer than the device's last point only if the device never saw
                # the answers to those steps; then it has none of them, and the round begins anew.
                step = moved.step
                if step not in points or moved.first not in (None, points[step].cut):
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

    def _from(self, first: int, sums: Tally, points: dict[int, Point], doom: Doom) -> int:
        """Train from a step to the end of the round; return the number of steps."""
        every = self._config.fleet.replicate_every
        drawn = self._half.source
        source = own_batches(self._config, self._address.client, self._address, self._most, drawn)
        step = 0
        with Batches(source, self._half.device) as batches:
            while True:
                new = step >= first
                batch = self._steps.take(step, batches) if new else batches.take()
                if batch is None:
                    return step
                doom.reach("before", step)
                if new:
                    self.reached = step
                    self._arrive(step, sums)
                    self._step_anywhere(step, self._part, (batch.x, batch.y), sums, batches)
                    if every and (step + 1) % every == 0:
                        points[step + 1] = self._half.point(self._part, sums, step + 1)
                        # the edge's newest replica may be one older
                        for old in [s for s in points if 0 < s < step + 1 - 2 * every]:
                            del points[old]
                doom.reach("after", step)
                pulse().batch_done()
                step += 1

    def _arrive(self, step: int, sums: Tally) -> None:
        """Do the moves that are due before a step, and share the model as it goes with the place.

        Raises:
            Moved: The session goes on from an earlier step.
        """
        while self._roaming is not None:
            try:
                self._roaming.at(step, 0)
                cut = self._roaming.cut
                here = self._half.split.assignment.cut
                if cut is not None and cut != here and not self._recut(step, sums, cut):
                    self._roaming.cut = None
                return
            except Moved as moved:
                if not self._is_here(moved, step):
                    raise

    def _is_here(self, moved: Moved, step: int) -> bool:
        """Return whether a session is where it was, with the same units."""
        return moved.step == step and moved.first in (None, self._half.split.assignment.cut)

    def _recut(self, step: int, sums: Tally, cut: int) -> bool:
        """Have the units before another cut; the edge gets or gives what lies between.

        Returns:
            Whether that was done: an edge server may have no room for what it would get.
        """
        half, names = self._half.point(self._part, sums, step).half, self._half.between(cut)
        came = self._remote.recut(step, cut, half.of(names))
        if came is None:
            return False
        now = half.of(names, others=True).with_(came)
        self._part = self._half.part(Point(now, sums, cut))
        self._steps.shared_as(self._half.split)
        return True

    def _step_anywhere(
        self, step: int, part: Stepping, batch: tuple[Inputs, Tensor], sums: Tally, batches: Batches
    ) -> None:
        """Do a step, once more if the session moved to another edge as it stands.

        Raises:
            Moved: The session goes on from an earlier step.
        """
        seen = sums.copy()
        buffers = [(b, b.clone()) for module in part.part.modules for b in module.buffers()]
        while True:
            try:
                return self._steps.do(step, part, *batch, sums, batches)
            except Moved as moved:
                self._remote.traffic.repeated(step - moved.step)
                if not self._is_here(moved, step):
                    raise
            # all that a step changes before its end
            sums.loss, sums.hits, sums.examples = seen.loss.clone(), seen.hits, seen.examples
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
