"""The policy of a cut that the user names: the same in every round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedsys.errors import ConfigError
from fedsys.models.layers import LayeredModel, resolve_cut
from fedsys.transport.codecs import check_codec
from strategies.policies.policy import Assignment, Observation, PolicyState


class FixedPolicy:
    """The cut that the user names, the same in every round.

    Args:
        cut: An index, the name of a unit, or a fraction of the work (see
            `fedsys.models.layers.resolve_cut`); or a list with one of these for each device,
            which is repeated if there are more devices.
        codec: Name of a codec, or ``{up: …, down: …}``.
        num_edges: Number of edge servers; device i is at edge ``i mod num_edges``.
        micro_batches: Pieces of a mini-batch, or a list like that of `cut`; None: those of the
            schedule.
    """

    def __init__(self, cut: Any, codec: Any, num_edges: int, micro_batches: Any = None) -> None:
        self._cuts = list(cut) if isinstance(cut, list | tuple) else [cut]
        if not self._cuts or any(c is None for c in self._cuts):
            raise ConfigError.of(
                "policy.cut", cut, "must be an index, the name of a unit or a fraction",
                "for instance policy.cut=0.3",
            )  # fmt: skip
        self._codecs = codecs_of(codec)
        self._num_edges = num_edges
        pieces = micro_batches if isinstance(micro_batches, list | tuple) else [micro_batches]
        if not pieces or not all(n is None or (type(n) is int and n > 0) for n in pieces):
            raise ConfigError.of(
                "policy.micro_batches", micro_batches, "must be a whole number of at least 1",
                "or a list with one for each device; null takes schedule.micro_batches",
            )  # fmt: skip
        self._pieces: list[int | None] = list(pieces)

    def init(self, layers: LayeredModel, nodes: Sequence[int]) -> PolicyState:
        """Return the resolved cuts."""
        try:
            return tuple(resolve_cut(layers, cut) for cut in self._cuts)
        except ConfigError as error:
            raise ConfigError(f"policy.{error}") from error

    def plan(
        self, state: PolicyState, seen: Mapping[int, Observation]
    ) -> tuple[PolicyState, Mapping[int, Assignment]]:
        """Return the same assignments every time."""
        up, down = self._codecs
        return state, {
            node: Assignment(
                state[node % len(state)],
                node % self._num_edges,
                up,
                down,
                self._pieces[node % len(self._pieces)],
            )
            for node in seen
        }

    def reasons(self, state: PolicyState, clients: Sequence[int]) -> Mapping[int, str]:
        """Return a sentence for each client: who asked for its cut."""
        return {
            client: f"policy.cut={self._cuts[client % len(self._cuts)]} says so"
            for client in clients
        }


def codecs_of(codec: Any) -> tuple[str, str]:
    """Return the codecs for up and down that ``policy.codec`` names.

    >>> codecs_of("fp16")
    ('fp16', 'fp16')

    Raises:
        ConfigError: There is no such codec.
    """
    pair = codec if isinstance(codec, Mapping) else {"up": codec, "down": codec}
    for direction in ("up", "down"):
        check_codec(pair.get(direction))
    return str(pair["up"]), str(pair["down"])
