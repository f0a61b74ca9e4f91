"""What a run is made of, as frozen values: the types that YAML is turned into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from fedsys import faults
from fedsys.config.mobility import EdgeLinkConfig, EdgePlace, MobilityConfig
from fedsys.config.network import NetworkConfig as NetworkConfig
from fedsys.config.partition import HostsConfig, HostServerConfig, PartitionConfig
from fedsys.config.privacy import PrivacyConfig
from fedsys.config.pruning import PruningConfig
from fedsys.config.resilience import ResilienceConfig
from fedsys.config.serving import ServingConfig
from fedsys.config.task import TaskConfig

OWN_MODELS: Final = ("fedsys.models", "fedsys.pruning.variant", "torchvision.models")
"""Where the constructors are that an edge server calls unless it is told others."""

Spec = Mapping[str, Any]
"""A group whose keys belong to what its ``_target_`` (or kind) names, as a plain dict."""


@dataclass(frozen=True)
class LearningRate:
    """How the learning rate depends on the round.

    Attributes:
        kind: ``constant``, ``step`` (times `gamma` once a milestone has passed), ``exponential``
            (times `gamma` each round) or ``cosine`` (from lr to `final` x lr over all rounds).
        milestones: Rounds after which the next factor applies; ``step`` only.
        gamma: The factor.
        final: Last factor of ``cosine``.
        warmup: Rounds in which the rate rises linearly to its value; 0 for none.
    """

    kind: str = "constant"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    final: float = 0.0
    warmup: int = 0


@dataclass(frozen=True)
class LoraConfig:
    """Adapters beside linear layers.

    Attributes:
        rank: Of each.
        alpha: Over `rank`, the weight of what they add.
        targets: Names of layers or their ends; empty: all linear layers.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClientConfig:
    """What each client does in a round.

    Attributes:
        epochs: Passes over the client's examples per round.
        batch_size: Examples per optimizer step.
        lr: Learning rate before the schedule.
        optimizer: Name of a class of `torch.optim`, in any case.
        momentum: For optimizers that have it.
        weight_decay: L2 penalty as the optimizer defines it.
        optimizer_args: Further keywords of the optimizer.
        clip_norm: Largest joint norm of all gradients of a step; None for no clipping.
        lr_schedule: The rate by round.
        threads: Intra-op threads of one client; bits depend on it.
        device: ``auto``, ``cpu`` or ``cuda``.
        memory_format: Of weights with four dimensions, which that of activations follows:
            ``contiguous`` or ``channels_last``; bits depend on it.
        kernels: ``plain``: torch's layers; ``fused``: units with few input channels are computed
            in one pass (`fedsys.models.fused`); bits depend on it.
        precision: ``fp32``: steps compute in the types of the model; ``bf16``: convolutions and
            matrix products in bfloat16 (`fedsys.training.precision`), parameters, their gradients
            and all else as ever; bits depend on it.
        keep_optimizer: Whether the optimizer's state lives on from round to round.
        label_private: Whether the last unit stays on the device in split training, so that labels
            never leave it.
        frozen: Whether parameters stay as they are (but for the rounding of the average), so that
            only BatchNorm takes its statistics anew, as a pruned variant may need.
        max_model_bytes: Largest model that the device holds alone if its edges are lost, in
            bytes; None for any.
        train: ``all``, or ``lora``: adapters alone, which alone are sent.
        lora: Of these adapters.
    """

    epochs: int = 2
    batch_size: int = 32
    lr: float = 0.02
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    optimizer_args: dict[str, Any] = field(default_factory=dict)
    clip_norm: float | None = None
    lr_schedule: LearningRate = field(default_factory=LearningRate)
    threads: int = 1
    device: str = "auto"
    memory_format: str = "contiguous"
    kernels: str = "plain"
    precision: str = "fp32"
    keep_optimizer: bool = False
    label_private: bool = False
    frozen: bool = False
    max_model_bytes: int | None = None
    train: str = "all"
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True)
class ScheduleConfig:
    """How a mini-batch is worked through.

    Attributes:
        kind: Order of the pieces in split training: ``sequential``, ``pipelined`` or ``bounded``.
        micro_batches: Pieces of a mini-batch, whose gradients add up.
        depth: ``bounded``: pieces in flight at most.
    """

    kind: str = "sequential"
    micro_batches: int = 1
    depth: int = 2


@dataclass(frozen=True)
class RuntimeConfig:
    """Where the run takes place.

    Attributes:
        kind: ``local``, ``simulation`` or ``deployment``.
        workers: Clients that train at the same time; None for cores / threads.
        pool: Whether the clients of ``local`` train in ``threads`` or ``processes``.
        batched_clients: Clients of ``local`` that train at once, in one pass of a model.
        timeout_s: Longest time for one phase of a round, in seconds.
        superlink: Address of the SuperLink as ``host:port``; ``deployment`` only.
        root_certificates: File with the certificate of its authority; None for the system's.
        insecure: Whether the SuperLink is spoken to without TLS.
        launch: Whether SuperLink and SuperNodes are started here, for this run only.
        wait_s: How long to wait until as many nodes are there as the run needs, in seconds.
    """

    kind: str = "local"
    workers: int | None = None
    pool: str = "threads"
    batched_clients: int = 1
    timeout_s: float = 3600.0
    superlink: str | None = None
    root_certificates: str | None = None
    insecure: bool = False
    launch: bool = False
    wait_s: float = 60.0


BETWEEN_PROCESSES: Final = "tcp"
"""Kind of link that ``link=auto`` stands for where memory cannot be shared."""


@dataclass(frozen=True)
class LinkConfig:
    """How devices and edge servers are connected.

    Attributes:
        kind: ``memory``, ``grpc``, ``tcp``, or ``auto``: memory where both are in one process,
            else TCP.
        credentials: Folder with ``ca.pem``, ``cert.pem`` and ``key.pem`` for mutual TLS; a node's
            own configuration may name another.
        holder: Name in the certificate of the device of a session, with ``{client}`` for its
            partition id; None admits every certificate of the authority that has the token.
        around: What wraps each link of a device, as a group with a ``_target_`` that takes the link
            as ``inner``; None for nothing.
        skip_zero_gradients: Whether edge servers leave out of gradients what the backward of a ReLU
            at the cut makes zero: ``always``, ``never``, or ``auto``: where a byte costs time, so
            not in memory, unless a network is emulated. The model is the same to the bit.
    """

    kind: str = "auto"
    credentials: str | None = None
    holder: str | None = None
    around: Mapping[str, Any] | None = None
    skip_zero_gradients: str = "auto"

    @property
    def between_processes(self) -> str:
        """What is served to other processes, whatever the runtime: ``grpc`` or ``tcp``."""
        return self.kind if self.kind in ("grpc", "tcp") else BETWEEN_PROCESSES


@dataclass(frozen=True)
class EdgeAddress:
    """Where an edge server is.

    Attributes:
        name: Its name.
        address: As the server app reaches it.
        device_address: As the devices reach it; the same if empty.
    """

    name: str
    address: str
    device_address: str = ""

    @property
    def for_devices(self) -> str:
        """The address to give to devices."""
        return self.device_address or self.address


@dataclass(frozen=True)
class FleetConfig:
    """The edge servers of a run, and what kinds of machines it is planned for.

    Attributes:
        edges: Those that exist already; if empty, ``num_edges`` are started for the run.
        replicate_every: Steps between replicas of a session, from which it continues if its edge
            is lost; 0: it continues from the start of the round.
        credentials: Folder with the server app's certificate for mutual TLS; None: that of `link`.
        control_token: What edge servers that exist already want to hear instead of one; see
            `fedsys.config.secret.control_token`.
        control_token_file: File that holds it, on the machine of the server app.
        machines: Costs by name: nominal rates or a profile (`fedsys.planning.hardware`).
        devices: Machine of each device, repeated if there are more; empty: none is modelled.
        servers: Machine of each edge server, repeated if there are more.
        believed: What policies believe of some machines instead, by name, where ``machines`` are
            what the virtual clock and emulation take.
        misjudged: Policies believe each unit of a machine off by a factor of up to this, another
            one for each machine and unit, drawn from the seed; 1: as it is.
        links: Connection of each device, repeated, with both rates; empty: that of the group
            ``network``, which comes before them if it is chosen.
        emulate: Whether devices and edge servers take as long as those machines would, in real
            time, by waiting (`fedsys.offload.emulation`).
        places: Where each edge server stands, for devices that move (``mobility``); empty: spread
            evenly over where these are.
        between: Links between edge servers.
    """

    edges: tuple[EdgeAddress, ...] = ()
    replicate_every: int = 0
    credentials: str | None = None
    control_token: str = field(default="", repr=False)
    control_token_file: str | None = None
    machines: Spec = field(default_factory=dict)
    devices: tuple[str, ...] = ()
    servers: tuple[str, ...] = ()
    believed: Spec = field(default_factory=dict)
    misjudged: float = 1.0
    links: tuple[NetworkConfig, ...] = ()
    emulate: bool = False
    places: tuple[EdgePlace, ...] = ()
    between: EdgeLinkConfig = field(default_factory=EdgeLinkConfig)


@dataclass(frozen=True)
class EdgeConfig:
    """One edge server. All but `device` is of ``fedsys edge`` alone.

    Attributes:
        device: Where sessions compute: ``auto``, ``cpu`` or ``cuda``.
        bundle: Folder of ``fedsys provision``, whose name, address and credentials count instead
            of those here.
        name: Name of the edge server.
        address: Where it listens, as ``grpc://host:port`` or ``tcp://host:port``; port 0: any
            that is free.
        http: ``host:port`` of ``/health`` and ``/metrics``; None for neither.
        credentials: Folder with ``ca.pem``, ``cert.pem`` and ``key.pem`` for mutual TLS.
        controller: Name in the certificate of a server app.
        control_token: What a server app without a certificate must present; on loopback only.
        control_token_file: File that holds it.
        models: What the models that it builds may be named by, as dotted prefixes; None for any.
        max_sessions: Sessions at one time.
        max_session_bytes: Weights and optimizer state of all sessions, in bytes.
        max_frame_bytes: Largest frame, in bytes.
        state_dir: Folder for sessions that no server app takes back when it stops, and from which
            it takes them up again; None loses them.
        workers: Processes in which sessions compute, on the CPU; 1: this one itself; None: one for
            each core.
        faults: Whether a run may kill it by ``faults=edge_killed``.
        move: What the edge server at `address` is to hand over instead: ``to`` the edge server of
            that name, the session of a ``client``, or all sessions; None: nothing.
    """

    device: str = "auto"
    bundle: str | None = None
    name: str = "edge-0"
    address: str = "tcp://0.0.0.0:9443"
    http: str | None = "127.0.0.1:9464"
    credentials: str | None = None
    controller: str = "server"
    control_token: str = field(default="", repr=False)
    control_token_file: str | None = None
    models: tuple[str, ...] | None = OWN_MODELS
    max_sessions: int = 256
    max_session_bytes: int = 16 << 30
    max_frame_bytes: int = 1 << 30
    state_dir: str | None = None
    workers: int | None = 1
    faults: bool = False
    move: Spec | None = None


@dataclass(frozen=True)
class RunConfig:
    """What a run leaves behind.

    Attributes:
        dir: Where results go; None for a new folder in ``outputs/``.
        plots: Whether pictures are drawn at the end, which takes a few seconds.
        oracle: Whether the choices of each round are compared with the best ones, where a policy
            decides on a modelled fleet.
    """

    dir: str | None = None
    plots: bool = True
    oracle: bool = True


@dataclass(frozen=True)
class CheckpointConfig:
    """How often the server keeps what a run can continue from; always after the last round."""

    every: int = 1


@dataclass(frozen=True)
class FaultsConfig:
    """What fails, and when."""

    list: tuple[faults.Fault, ...] = ()


@dataclass(frozen=True)
class VariantsConfig:
    """What ``fedsys prune`` makes of the model. Sizes of groups of weights are of `PruningConfig`.

    Attributes:
        run: Folder of the run whose model is pruned; None: an untrained model.
        trained: Folders of runs that trained its variants further; each gives a candidate, too.
        round_to: Multiple that numbers of channels are rounded up to, in a second candidate of
            each level; ``auto`` rounds, in the only one, what is measured to be faster so
            (`fedsys.pruning.rounding`).
        borders: ``carrier`` or ``map``: see `fedsys.pruning.dense.constants.Borders`.
        coupling: ``group`` or ``scatter``: see `fedsys.pruning.dense.channels.Coupling`.
        precisions: Types of further variants: bfloat16, float16, int8.
        recalibrate: Training images on which BatchNorm takes its statistics anew in variants that
            were not trained under their mask; 0 for none.
        fine_tune: Epochs of training under the mask; None: `FINE_TUNE` of the model of a run where
            it was not trained under that mask, and none of an untrained model.
        fold_batchnorm: Whether BatchNorm is folded into the layer before it where variants answer.
        batch_sizes: Examples in the batches that are measured.
        threads: Intra-op threads that are measured.
        runs: Timed runs of each variant with each batch size and thread count.
        margin: Share by which a variant must be faster than one that is more accurate.
        max_drop: Largest loss of validation accuracy against the parent, in [0, 1]; None: any.
        memory: Whether peak memory is measured.
        onnx: Whether every float32 variant is written as an ONNX file, too, and measured in ONNX
            Runtime, so that an endpoint may answer by it.
    """

    run: str | None = None
    trained: tuple[str, ...] = ()
    round_to: int | str = 1
    borders: str = "carrier"
    coupling: str = "group"
    precisions: tuple[str, ...] = ()
    recalibrate: int = 0
    fine_tune: int | None = None
    fold_batchnorm: bool = True
    batch_sizes: tuple[int, ...] = (1, 16)
    threads: tuple[int, ...] = (1, 2)
    runs: int = 30
    margin: float = 0.02
    max_drop: float | None = None
    memory: bool = True
    onnx: bool = False


@dataclass(frozen=True)
class Apps:
    """The two Flower apps as ``module:attribute``; fedsys knows them by these names only."""

    server: str = "strategies.app:app"
    client: str = "clients.app:app"


@dataclass(frozen=True)
class Config:
    """One run, completely. `text` is the YAML that it was parsed from.

    `resume` is the folder of the run that this one continues; `portfolio` the folder whose variants
    are served; `input` the image, or the folder of images, of ``fedsys query``; `dashboard` where
    the live page is (`fedsys.config.dashboard`).
    """

    num_clients: int
    num_edges: int
    rounds: int
    seed: int
    json: bool
    client: ClientConfig
    schedule: ScheduleConfig
    link: LinkConfig
    fleet: FleetConfig
    edge: EdgeConfig
    runtime: RuntimeConfig
    run: RunConfig
    apps: Apps
    data: Spec
    model: Spec
    strategy: Spec
    policy: Spec
    network: NetworkConfig = field(default_factory=NetworkConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    bench: Spec = field(default_factory=dict)
    profile: Spec = field(default_factory=dict)
    mobility: MobilityConfig = field(default_factory=MobilityConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    variants: VariantsConfig = field(default_factory=VariantsConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    host: HostServerConfig = field(default_factory=HostServerConfig)
    hosts: HostsConfig = field(default_factory=HostsConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    portfolio: str | None = None
    input: str | None = None
    resume: str | None = None
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    tracker: Spec = field(default_factory=dict)
    dashboard: bool | str = False
    text: str = field(default="", repr=False, compare=False)
