"""The end of a session that computes: see `fedsys.offload.session_proxy` for the other one."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

import torch

from fedsys.errors import FedsysError, LinkClosed, SessionError
from fedsys.offload.checkpoint import awaited_of
from fedsys.offload.emulation import Workers
from fedsys.offload.session import Session
from fedsys.offload.snapshot import SessionPosition, SessionSpec, Snapshot
from fedsys.transport.frame_pipe import FramePipe
from fedsys.transport.wire import Frame

_log = logging.getLogger("fedsys.offload.edge")


def serve_session(pipe: FramePipe, workers: Workers) -> None:
    """Have a session do what its proxy says, until that lets go of it.

    Args:
        pipe: To the proxy.
        workers: What the sessions of this process share.
    """
    session: Session | None = None
    try:
        with suppress(LinkClosed):
            while True:
                call = pipe.recv()
                meta: dict[str, Any]
                try:
                    if session is None:
                        session, answer = _opened(call, workers), Frame("done")
                    else:
                        answer = _answer(session, call, pipe)
                except FedsysError as error:
                    meta = {"error": type(error).__name__, "text": str(error)}
                    answer = Frame("failed", meta)
                except Exception as error:
                    _log.exception("a session failed")
                    answer = Frame("failed", {"text": f"{type(error).__name__}: {error}"})
                meta = dict(answer.meta)
                if session is not None:
                    now = session.steps, session.nbytes(), session.spec.first
                    meta["now"] = dict(zip(("steps", "nbytes", "first"), now, strict=True))
                pipe.send(Frame(answer.kind, meta, answer.tensors))
    finally:
        pipe.close()


def _opened(call: Frame, workers: Workers) -> Session:
    spec = SessionSpec.from_meta(call.meta["spec"])
    return Session(spec, Snapshot.from_frame(call), torch.device("cpu"), workers=workers)


def _answer(session: Session, call: Frame, pipe: FramePipe) -> Frame:
    kind, meta = call.kind, call.meta
    if kind == "handle":
        about = meta["encoded_bytes"], meta["arrived_s"]
        for reply in session.handle(Frame(meta["kind"], meta["meta"], call.tensors, *about)):
            pipe.send(Frame("reply", {"kind": reply.kind, "meta": reply.meta}, reply.tensors))
        return Frame("done")
    if kind in ("snapshot", "freeze"):
        snapshot = session.freeze() if kind == "freeze" else session.snapshot()
        return Frame("done", snapshot.to_meta(), snapshot.tensors())
    if kind == "hold_still":
        return _told(session.hold_still())
    if kind == "as_it_stands":
        return _told(session.as_it_stands())
    if kind == "followed":
        return _told(session.followed(_Teller(pipe) if meta["by"] else None))
    if kind == "sealed":
        seal = session.sealed(awaited_of(meta["awaited"]))
        return Frame("done", {"digest": seal.digest, "frozen_s": seal.frozen_s})
    if kind == "take_up":
        session.take_up(SessionPosition.from_frame(call))
        return Frame("done")
    if kind == "go_on":
        session.go_on()
        return Frame("done")
    raise SessionError(f"{kind}: not a call of a session")


def _told(position: SessionPosition) -> Frame:
    return Frame("done", {**position.snapshot.to_meta(), **position.to_meta()}, position.tensors())


class _Teller:
    """Tells the proxy, which has the follower, of each operation that is new."""

    def __init__(self, pipe: FramePipe) -> None:
        self._pipe = pipe

    def let_catch_up(self, step: int) -> None:
        """Wait for nothing: the proxy has."""

    def take(self, operation: Frame) -> None:
        """Say that the operation in hand is new."""
        self._pipe.send(Frame("took"))
