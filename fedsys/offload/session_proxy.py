"""A session that computes in another process of its edge server, as the rest of that sees it.

What the session says and does is that of `fedsys.offload.session`, in the other process
(`fedsys.offload.session_worker`). Each call here is a frame there, and has one answer::

    open      {spec, step}              state     ─▶  done
    handle    {kind, meta}              tensors   ─▶  reply {kind, meta} tensors, and more; done
    snapshot, freeze                              ─▶  done {step}  state
    hold_still, as_it_stands, followed            ─▶  done  state, and what was done of the step
    take_up   a position                          ─▶  done
    sealed    {awaited}                           ─▶  done {digest, frozen_s}
    go_on                                         ─▶  done

Before the replies to an operation that is new comes a ``took``, if somebody follows the session.
Instead of ``done`` there may be ``failed``. Both say where the session is ``now``, so that nobody
waits for it who asks. Where the other process is gone, calls raise LinkClosed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any, final

from torch import Tensor

from fedsys import errors
from fedsys.errors import FedsysError, LinkClosed, RuntimeFailure
from fedsys.offload.edge_session import Follower
from fedsys.offload.sealing import Sealed
from fedsys.offload.snapshot import SessionPosition, SessionSpec, Snapshot, natural
from fedsys.offload.turns import Awaited
from fedsys.transport.frame_pipe import FramePipe
from fedsys.transport.security import new_token
from fedsys.transport.wire import Frame


@final
class SessionProxy:
    """A `fedsys.offload.edge_session.EdgeSession` whose computing is done elsewhere.

    Args:
        pipe: To its other end, which has the session as long as this object lives.
        spec: What the server app said.
        start: Where to begin: the state at a step.
        replicate: Called with a snapshot after every ``replicate_every`` steps.
        gone: Called when nobody has this object any more.
        broken: Called when an operation finds the other process gone, before that is raised: who
            comes back then is to find that the session is lost.

    Attributes:
        lost: Whether the other process is gone, as far as that was noticed.

    Raises:
        FedsysError: The session cannot be built, or the other process is gone.
    """

    def __init__(
        self,
        pipe: FramePipe,
        spec: SessionSpec,
        start: Snapshot,
        replicate: Callable[[SessionSpec, Snapshot], None],
        gone: Callable[[], None] = lambda: None,
        broken: Callable[[], None] = lambda: None,
    ) -> None:
        self.spec, self.incarnation, self.lost = spec, new_token(), False
        self._pipe, self._replicate, self._broken = pipe, replicate, broken
        self._is_broken = False
        self._steps, self._nbytes = start.step, 0
        self._follower: Follower | None = None
        self._lock = threading.RLock()
        weakref.finalize(self, _let_go, pipe, gone).atexit = False
        alone = replace(spec, replicate_every=0)  # replicas are sent from here
        self._ask("open", {"spec": alone.to_meta(), **start.to_meta()}, start.tensors())

    @property
    def steps(self) -> int:
        """Steps done in this round; without waiting."""
        return self._steps

    def handle(self, frame: Frame) -> Iterator[Frame]:
        """Have an operation done and yield the replies that are due, in order.

        Raises:
            FedsysError: As of a session.
        """
        if self._follower is not None and frame.kind == "activation":
            step = natural(frame, "step")
            if step == self._steps:
                self._follower.let_catch_up(step)
        about = {
            "kind": frame.kind,
            "meta": frame.meta,
            "encoded_bytes": frame.encoded_bytes,
            "arrived_s": frame.arrived_s,
        }
        try:
            yield from self._handled(frame, about)
        except LinkClosed:  # not held here: others ask for this lock and hold that of a table
            if self._is_broken:
                self._broken()
            raise

    def _handled(self, frame: Frame, about: Mapping[str, Any]) -> Iterator[Frame]:
        with self._lock:
            before = self._steps
            with closing(self._exchange(Frame("handle", about, frame.tensors))) as answers:
                for answer in answers:
                    if answer.kind == "reply":
                        yield Frame(answer.meta["kind"], answer.meta["meta"], answer.tensors)
                    elif answer.kind == "took" and self._follower is not None:
                        self._follower.take(frame)
            every = self.spec.replicate_every
            if self._steps > before and every and self._steps % every == 0:
                self._replicate(self.spec, self.snapshot())

    def snapshot(self) -> Snapshot:
        """Return the state between two steps."""
        return Snapshot.from_frame(self._ask("snapshot"))

    def freeze(self) -> Snapshot:
        """Return the state between two steps, and do nothing more from here on."""
        return Snapshot.from_frame(self._ask("freeze"))

    def hold_still(self) -> SessionPosition:
        """Return the state as it is, also within a step, and do nothing more until `go_on`."""
        return self._position_by("hold_still")

    def as_it_stands(self) -> SessionPosition:
        """Return the state as it is, also within a step."""
        return self._position_by("as_it_stands")

    def followed(self, follower: Follower | None) -> SessionPosition:
        """Return the state as it is; `follower` takes each operation after that, in order."""
        with self._lock:
            position = self._position_by("followed", {"by": follower is not None})
            self._follower = follower
            return position

    def sealed(self, awaited: Collection[Awaited]) -> Sealed:
        """Do nothing more until `go_on`, and return what two that are the same have in common."""
        told = self._ask("sealed", {"awaited": [list(one) for one in awaited]}).meta
        return Sealed(self.incarnation, str(told["digest"]), float(told["frozen_s"]))

    def go_on(self) -> None:
        """Do operations again after `hold_still` or `sealed`; what is lost does none."""
        with suppress(LinkClosed):
            self._ask("go_on")

    def take_up(self, position: SessionPosition) -> None:
        """Come to where another session stood that began with the same snapshot."""
        with self._lock:
            meta = {**position.snapshot.to_meta(), **position.to_meta()}
            self._ask("take_up", meta, position.tensors())
            self.incarnation = position.incarnation

    def at_work(self) -> bool:
        """Return whether an operation is in work, without waiting for it."""
        if not self._lock.acquire(blocking=False):
            return True
        self._lock.release()
        return False

    def position(self) -> int:
        """Return the steps done, once the operation in work is."""
        with self._lock:
            return self._steps

    def nbytes(self) -> int:
        """Return the bytes of weights and optimizer state, without waiting for an operation."""
        return self._nbytes

    def _position_by(self, kind: str, meta: Mapping[str, Any] | None = None) -> SessionPosition:
        with self._lock:
            position = SessionPosition.from_frame(self._ask(kind, meta))
            return replace(position, incarnation=self.incarnation)

    def _ask(
        self, kind: str, meta: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> Frame:  # fmt: skip
        """Return what answers a call that has no other answers."""
        with self._lock:
            *_, answer = self._exchange(Frame(kind, meta or {}, tensors or {}))
            return answer

    def _exchange(self, call: Frame) -> Generator[Frame, None, None]:
        """Make a call and yield its answers; all of them are taken, whatever becomes of this."""
        over = True  # where the other process is gone, nothing more comes
        try:
            self._send(call)
            while True:
                answer, over = self._recv(), False
                if answer.kind in ("done", "failed"):
                    over = True
                    self._note(answer.meta.get("now"))
                    if answer.kind == "failed":
                        raise _error(answer)
                yield answer
                if over:
                    return
                over = True
        finally:
            while not over:
                over = self._recv().kind in ("done", "failed")

    def _send(self, call: Frame) -> None:
        try:
            self._pipe.send(call)
        except LinkClosed:
            self._is_broken = True
            raise

    def _recv(self) -> Frame:
        try:
            return self._pipe.recv()
        except LinkClosed:
            self._is_broken = True
            raise

    def _note(self, now: object) -> None:
        if isinstance(now, Mapping):
            self._steps, self._nbytes = int(now["steps"]), int(now["nbytes"])
            if now["first"] != self.spec.first:
                self.spec = replace(self.spec, first=int(now["first"]))


def _let_go(pipe: FramePipe, gone: Callable[[], None]) -> None:
    pipe.close()
    gone()


def _error(answer: Frame) -> FedsysError:
    """Return the error of this project that a session raised; others are failures of a process."""
    kind = getattr(errors, str(answer.meta.get("error")), None)
    text = str(answer.meta.get("text"))
    if isinstance(kind, type) and issubclass(kind, FedsysError):
        return kind(text)
    return RuntimeFailure(text)
