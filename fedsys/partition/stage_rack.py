"""The stages of pipelines that a host computes: built of what was sent, found by token, dropped."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from fedsys.errors import FrameError, SecurityError
from fedsys.partition.data_link import CONNECT_S, open_data
from fedsys.partition.hosted_stage import HostedStage, Onward, StagePiece, tensors_of
from fedsys.partition.tensor_store import TensorStore
from fedsys.transport.security import Credentials, same_token
from fedsys.transport.wire import Frame


class Builder(Protocol):
    """Makes modules of what was sent, and frees them."""

    def build(self, body: bytes, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Return the module that a body describes, with these tensors."""

    def free(self, module: nn.Module) -> None:
        """Take a module apart that nobody runs any more."""


@dataclass(eq=False)
class _Stage:
    token: str
    modules: tuple[nn.Module, ...]
    hosted: HostedStage


@final
class StageRack:
    """All stages of one host, by the key of their pipeline.

    Args:
        name: Of the host, in answers and messages.
        builder: Makes modules of what is sent.
        store: Has the tensors.
        credentials: For links to other hosts.
    """

    def __init__(
        self, name: str, builder: Builder, store: TensorStore, credentials: Credentials | None
    ) -> None:
        self._name, self._builder, self._credentials = name, builder, credentials
        self._store = store
        self._stages: dict[str, _Stage] = {}
        self._left = (0, 0.0)  # requests and seconds of stages that were dropped
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._stages)

    def of(self, key: str, token: str) -> HostedStage:
        """Return a pipeline's stage.

        Raises:
            SecurityError: There is none, or its token is another.
        """
        stage = self._stages.get(key)
        if stage is None or not same_token(token, stage.token):
            raise SecurityError("there is no such pipeline here, or its token is another")
        return stage.hosted

    def build(self, frame: Frame) -> Frame:
        """Make a stage ready: its modules, their first runs, and its link to the next host."""
        meta, key, start = frame.meta, str(frame.meta.get("pipeline", "")), time.perf_counter()
        modules: list[nn.Module] = []
        try:
            for index, piece in enumerate(meta["pieces"]):
                body = frame.tensors[f"body{index}"].numpy().tobytes()
                names = {str(name): str(digest) for name, digest in dict(piece["names"]).items()}
                modules.append(self._builder.build(body, self._store.use(key, names)).eval())
            with torch.inference_mode():
                for rows in meta.get("warm", ()):
                    out = tuple(torch.zeros(int(rows), *map(int, s)) for s in meta["shapes"])
                    for module in modules:
                        out = tensors_of(module(*out), self._name)
            onward = self._onward(meta)
        except BaseException:
            self._free(key, modules)
            raise
        firsts = [int(piece["first"]) for piece in meta["pieces"]]
        pieces = [StagePiece(first, module) for first, module in zip(firsts, modules, strict=True)]
        end, by = int(meta["end"]), str(meta.get("by", ""))
        hosted = HostedStage(self._name, pieces, end, onward, by)
        with self._lock:
            self._stages[key] = _Stage(str(meta["token"]), tuple(modules), hosted)
        took = 1e3 * (time.perf_counter() - start)
        return Frame("built", {"build_ms": took, "bytes": self._store.nbytes})

    def _onward(self, meta: Mapping[str, Any]) -> Onward:
        address, link = meta.get("next"), None
        if address:
            own = None if str(address).startswith("memory://") else self._credentials
            opened = {"pipeline": meta["pipeline"], "token": meta["next_token"]}
            connect_s = min(CONNECT_S, float(meta.get("connect_s", CONNECT_S)))
            link = open_data(str(address), own, opened, meta.get("shape_link"), connect_s)
        name, codec = str(meta.get("next_name", "")), str(meta.get("codec", "fp32"))
        return Onward(link, name, codec, bool(meta.get("holds")))

    def _free(self, key: str, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            self._builder.free(module)
        self._store.leave(key)

    def divert(self, meta: Mapping[str, Any]) -> int:
        """Let another pipeline's stage go on with what one holds; return how much that is."""
        stages = [self._stages.get(str(meta.get(key, ""))) for key in ("pipeline", "to")]
        old, new = stages
        if old is None or new is None:
            raise FrameError(f"divert: {self._name} has no such pipeline")
        return old.hosted.divert(new.hosted, int(meta["first"]))

    def drop(self, key: str) -> None:
        """End a pipeline's stage, if there is one, and free its modules."""
        with self._lock:
            stage = self._stages.pop(key, None)
        if stage is not None:
            over = stage.hosted.close()
            computed, busy_s = self._left
            self._left = computed + stage.hosted.computed, busy_s + stage.hosted.busy_s
            self._free(key, stage.modules if over else ())  # else whoever computes has them

    def told(self) -> dict[str, Any]:
        """Return how many there are, and what they and those before them computed."""
        stages = list(self._stages.values())
        return {
            "pipelines": len(stages),
            "computed": self._left[0] + sum(stage.hosted.computed for stage in stages),
            "busy_s": self._left[1] + sum(stage.hosted.busy_s for stage in stages),
            "in_flight": sum(len(stage.hosted.held) for stage in stages),
        }

    def close(self) -> None:
        """End all."""
        for key in list(self._stages):
            self.drop(key)
