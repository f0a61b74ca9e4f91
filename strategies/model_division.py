"""A model in two: what a device is sent of it, what its edge is, and both joined again by name."""

from __future__ import annotations

from flwr.app import ArrayRecord, RecordDict

from fedsys.config import Config
from fedsys.data import Dataset
from fedsys.errors import ConfigError
from fedsys.models.layers import LayeredModel
from fedsys.offload.snapshot import SessionSpec, Snapshot
from fedsys.training.federation import layers_of
from fedsys.training.part import names_between
from fedsys.transport import records
from fedsys.transport.messages import ARRAYS, MASKS, OPTIMIZER, settings_of
from fedsys.transport.security import new_token
from strategies.message_halves import halved, joined, without
from strategies.policies.policy import Assignment


class ModelDivision:
    """Divides the messages of a run at the cuts of a policy.

    Args:
        config: The run.
        dataset: Tells the shape of an example, and what is learned of it.

    Attributes:
        layers: The model, on ``meta``.
    """

    def __init__(self, config: Config, dataset: Dataset) -> None:
        self.layers: LayeredModel = layers_of(config, dataset)
        self._config, self._shape = config, dataset.input_shape
        self._classes = dataset.num_classes
        self._names: dict[tuple[int, int], set[str]] = {}

    def spec(
        self, whole: RecordDict, client: int, assignment: Assignment, round_: int, attempt: int
    ) -> SessionSpec:
        """Return what the edge is told about the session of a client.

        Raises:
            ConfigError: A label-private cut would leave no unit for the edge.
        """
        config, settings = self._config, settings_of(whole)
        return SessionSpec(
            id=f"r{round_}-c{client}-{attempt}-{new_token()[:8]}",
            token=new_token(),
            client=client,
            round=round_,
            first=assignment.cut,
            last=self._tail(assignment.cut),
            config=config.text,
            input_shape=self._shape,
            num_classes=self._classes,
            micro_batches=assignment.micro_batches or config.schedule.micro_batches,
            proximal_mu=settings.proximal_mu,
            codec_up=assignment.codec_up,
            codec_down=assignment.codec_down,
            holder=(config.link.holder or "").replace("{client}", str(client)),
            replicate_every=config.fleet.replicate_every,
            noise=settings.noise,
            expected=settings.expected,
        )

    def check_cut(self, cut: int) -> None:
        """Check that devices may go on at a cut after a move.

        Raises:
            ConfigError: No unit would be left for the edge server, or there is no such cut.
        """
        last = max(cut for cut in self.layers.cuts if cut < self._tail(0))
        if cut not in (0, *self.layers.cuts) or cut > last:
            raise ConfigError.of(
                "mobility.cut", cut, "must be the index of a cut with units on both sides, "
                f"at most {last}", "null leaves the cut as it is",
            )  # fmt: skip

    def edge_half(self, whole: RecordDict, spec: SessionSpec) -> Snapshot:
        """Return what the session of `spec` begins with."""
        names = self._names_of(spec)
        arrays, optimizer, masks = (
            records.from_record(halved(whole, key, names)) for key in (ARRAYS, OPTIMIZER, MASKS)
        )
        return Snapshot(0, arrays, optimizer, masks=masks)

    def device_half(self, whole: RecordDict, spec: SessionSpec) -> RecordDict:
        """Return the content for the device, without what `spec` leaves to the edge."""
        names, content = self._names_of(spec), records.own_copy(whole)
        for key in (ARRAYS, OPTIMIZER, MASKS):
            if key in whole.array_records:
                content[key] = without(whole, key, names)
        return content

    def join(self, content: RecordDict, edge: Snapshot, like: ArrayRecord) -> None:
        """Put the edge's half into what its device sent back, in the order of names of `like`."""
        own = content.array_records
        content[ARRAYS] = joined(own[ARRAYS], edge.state, list(like))
        if (optimizer := own.get(OPTIMIZER)) is not None:
            content[OPTIMIZER] = joined(optimizer, edge.optimizer, None)

    def _tail(self, cut: int) -> int:
        """Return the end of the edge's units."""
        if not self._config.client.label_private:
            return len(self.layers)
        tail = len(self.layers) - 1  # the classifier stays on the device
        if cut >= tail:
            raise ConfigError.of(
                "policy.cut", cut, f"must be below {tail} with client.label_private=true",
                "the last unit stays on the device, and the edge would have none",
            )  # fmt: skip
        return tail

    def _names_of(self, spec: SessionSpec) -> set[str]:
        cuts = spec.first, spec.last
        if cuts not in self._names:
            self._names[cuts] = names_between(self.layers, cuts)[1]
        return self._names[cuts]
