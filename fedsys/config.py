"""Configuration: from Hydra's YAML to typed values. The only module that knows Hydra and OmegaConf.

A run is described by one YAML text, composed from the groups in ``conf/`` and the overrides of
the command line. The text travels as it is to every app of the run (Flower's run config holds
flat values only), where `parse` turns it into a frozen `Config` once per process. Below this
module there are only typed values and plain dicts.

`_target_` entries name constructors by dotted path, as everywhere in Hydra; they are the user's
own configuration and run with the user's rights.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
import shlex
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsys import faults
from fedsys.errors import ConfigError, did_you_mean
from fedsys.pruning import settings as pruning_settings
from fedsys.pruning.settings import PruningConfig
from fedsys.serving.options import RULES as SERVING_RULES
from fedsys.serving.options import ServingConfig

CONF = Path(__file__).resolve().parents[1] / "conf"
"""The folder of the groups: the same place in the checkout, the wheel and the Flower bundle."""

Spec = Mapping[str, Any]
"""A group whose keys belong to what its ``_target_`` (or kind) names, as a plain dict."""

T = TypeVar("T")


# --------------------------------------------------------------------------------------------------
# The values


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
        keep_optimizer: Whether the optimizer's state lives on from round to round.
        label_private: Whether the last unit stays on the device in split training, so that labels
            never leave it.
        frozen: Whether parameters stay as they are (but for the rounding of the average), so that
            only BatchNorm takes its statistics anew, as a pruned variant may need.
        max_model_bytes: Largest model that the device holds alone if its edges are lost, in
            bytes; None for any.
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
    keep_optimizer: bool = False
    label_private: bool = False
    frozen: bool = False
    max_model_bytes: int | None = None


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
        timeout_s: Longest time for one phase of a round, in seconds.
        superlink: Address of the SuperLink as ``host:port``; ``deployment`` only.
        root_certificates: File with the certificate of its authority; None for the system's.
        insecure: Whether the SuperLink is spoken to without TLS.
        launch: Whether SuperLink and SuperNodes are started here, for this run only.
        wait_s: How long to wait until as many nodes are there as the run needs, in seconds.
    """

    kind: str = "local"
    workers: int | None = None
    timeout_s: float = 3600.0
    superlink: str | None = None
    root_certificates: str | None = None
    insecure: bool = False
    launch: bool = False
    wait_s: float = 60.0


@dataclass(frozen=True)
class LinkConfig:
    """How devices and edge servers are connected.

    Attributes:
        kind: ``memory``, ``grpc``, or ``auto``: memory where both are in one process.
        credentials: Folder with ``ca.pem``, ``cert.pem`` and ``key.pem`` for mutual TLS; a node's
            own configuration may name another.
        holder: Name in the certificate of the device of a session, with ``{client}`` for its
            partition id; None admits every certificate of the authority that has the token.
    """

    kind: str = "auto"
    credentials: str | None = None
    holder: str | None = None


@dataclass(frozen=True)
class NetworkConfig:
    """The network between devices and edge servers.

    Attributes:
        name: What it is called.
        source: Where its rates come from, or the word "nominal".
        up_mbit_s: From the device, in Mbit/s; None: no limit.
        down_mbit_s: To the device, in Mbit/s; None: no limit.
        latency_ms: One way, in milliseconds.
        trace: ``[second, up, down]``, ascending; rates in Mbit/s from then on.
        period_s: Seconds after which the trace repeats; None: its last rates stay.
        emulate: Whether the links of this run are made as slow as this network, in real time. The
            trace begins anew with each message to a device.
    """

    name: str = "none"
    source: str = ""
    up_mbit_s: float | None = None
    down_mbit_s: float | None = None
    latency_ms: float = 0.0
    trace: tuple[tuple[float, ...], ...] = ()
    period_s: float | None = None
    emulate: bool = False


@dataclass(frozen=True)
class EdgeAddressConfig:
    """Where an edge server is: as the server app reaches it, and as the devices do."""

    name: str
    address: str
    device_address: str = ""


@dataclass(frozen=True)
class FleetConfig:
    """The edge servers of a run, and what kinds of machines it is planned for.

    Attributes:
        edges: Those that exist already; if empty, ``num_edges`` are started for the run.
        replicate_every: Steps between replicas of a session, from which it continues if its edge
            is lost; 0: it continues from the start of the round.
        credentials: Folder with the server app's certificate for mutual TLS; None: that of `link`.
        control_token: What edge servers that exist already want to hear instead of one.
        machines: Costs by name: nominal rates or a profile (`fedsys.hardware`).
        devices: Machine of each device, repeated if there are more; empty: none is modelled.
        servers: Machine of each edge server, repeated if there are more.
        links: Connection of each device, repeated; empty: that of the group ``network``.
        emulate: Whether devices and edge servers take as long as those machines would, in real
            time, by waiting (`fedsys.emulation`).
    """

    edges: tuple[EdgeAddressConfig, ...] = ()
    replicate_every: int = 0
    credentials: str | None = None
    control_token: str = ""
    machines: Spec = field(default_factory=dict)
    devices: tuple[str, ...] = ()
    servers: tuple[str, ...] = ()
    links: tuple[NetworkConfig, ...] = ()
    emulate: bool = False


@dataclass(frozen=True)
class EdgeConfig:
    """One edge server. All but `device` is of ``fedsys edge`` alone.

    Attributes:
        device: Where sessions compute: ``auto``, ``cpu`` or ``cuda``.
        name: Name of the edge server.
        address: Where it listens, as ``grpc://host:port``; port 0: any that is free.
        http: ``host:port`` of ``/health`` and ``/metrics``; None for neither.
        credentials: Folder with ``ca.pem``, ``cert.pem`` and ``key.pem`` for mutual TLS.
        controller: Name in the certificate of a server app.
        control_token: What a server app without a certificate must present; on loopback only.
        max_sessions: Sessions at one time.
        max_session_bytes: Weights and optimizer state of all sessions, in bytes.
        max_frame_bytes: Largest frame, in bytes.
        state_dir: Folder for sessions that no server app takes back when it stops, and from which
            it takes them up again; None loses them.
        faults: Whether a run may kill it by ``faults=edge_killed``.
    """

    device: str = "auto"
    name: str = "edge-0"
    address: str = "grpc://0.0.0.0:9443"
    http: str | None = "127.0.0.1:9464"
    credentials: str | None = None
    controller: str = "server"
    control_token: str = ""
    max_sessions: int = 256
    max_session_bytes: int = 16 << 30
    max_frame_bytes: int = 1 << 30
    state_dir: str | None = None
    faults: bool = False


@dataclass(frozen=True)
class RunConfig:
    """What a run leaves behind.

    Attributes:
        dir: Where results go; None for a new folder in ``outputs/``.
        plots: Whether pictures are drawn at the end, which takes a few seconds.
    """

    dir: str | None = None
    plots: bool = True


@dataclass(frozen=True)
class CheckpointConfig:
    """How often the server keeps what a run can continue from; always after the last round."""

    every: int = 1


@dataclass(frozen=True)
class FaultsConfig:
    """What fails, and when."""

    list: tuple[faults.Fault, ...] = ()


@dataclass(frozen=True)
class PruneConfig:
    """What ``fedsys prune`` makes of the model. Sizes of groups of weights are of `PruningConfig`.

    Attributes:
        run: Folder of the run whose model is pruned; None: an untrained model.
        round_to: Multiple that numbers of channels are rounded up to.
        borders: ``carrier`` or ``map``: see `fedsys.pruning.constants.Borders`.
        coupling: ``group`` or ``scatter``: see `fedsys.pruning.channels.Coupling`.
        precisions: Types of further variants: bfloat16, float16, int8.
        recalibrate: Training images on which BatchNorm takes its statistics anew; 0 for none.
        fine_tune: Epochs of training under the mask.
        batch_sizes: Examples in the batches that are measured.
        threads: Intra-op threads that are measured.
        runs: Timed runs of each variant with each batch size and thread count.
        margin: Share by which a variant must be faster than one that is more accurate.
        max_drop: Largest loss of validation accuracy against the parent, in [0, 1]; None: any.
        memory: Whether peak memory is measured.
    """

    run: str | None = None
    round_to: int = 1
    borders: str = "carrier"
    coupling: str = "group"
    precisions: tuple[str, ...] = ()
    recalibrate: int = 0
    fine_tune: int = 0
    batch_sizes: tuple[int, ...] = (1, 16)
    threads: tuple[int, ...] = (1, 2)
    runs: int = 30
    margin: float = 0.02
    max_drop: float | None = None
    memory: bool = True


@dataclass(frozen=True)
class Apps:
    """The two Flower apps as ``module:attribute``; fedsys knows them by these names only."""

    server: str = "strategies.app:app"
    client: str = "clients.app:app"


@dataclass(frozen=True)
class Config:
    """One run, completely. `text` is the YAML that it was parsed from.

    `resume` is the folder of the run that this one continues; `portfolio` the folder whose variants
    are served; `input` the image, or the folder of images, of ``fedsys query``.
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
    bench: Spec = field(default_factory=dict)
    profile: Spec = field(default_factory=dict)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    portfolio: str | None = None
    input: str | None = None
    resume: str | None = None
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    text: str = field(default="", repr=False, compare=False)


# --------------------------------------------------------------------------------------------------
# Rules for values: (path, test, rule, way out)

Rule = tuple[str, Callable[[Any], bool], str, str]


def _positive(value: Any) -> bool:
    return bool(value > 0)


def _at_least_one(value: Any) -> bool:
    return bool(value >= 1)


def _optional(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or test(value)


def _counts(values: Any) -> bool:
    return bool(values) and all(value >= 1 for value in values)


def _names_one(value: Any) -> bool:
    return bool(value) and str(value).replace("{client}", "", 1).isprintable()


def _one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value in names), "must be one of " + ", ".join(names)


RULES: tuple[Rule, ...] = (
    ("num_clients", _at_least_one, "must be at least 1", ""),
    ("rounds", _at_least_one, "must be at least 1", ""),
    ("seed", lambda v: 0 <= v < 2**63, "must be between 0 and 2^63 - 1", ""),
    ("client.epochs", _at_least_one, "must be at least 1", ""),
    ("client.batch_size", _at_least_one, "must be at least 1", ""),
    ("client.lr", _positive, "must be greater than 0", "try client.lr=0.02"),
    ("client.momentum", lambda v: 0 <= v < 1, "must be in [0, 1)", "0 turns it off"),
    ("client.weight_decay", lambda v: v >= 0, "must not be negative", "0 turns it off"),
    ("client.clip_norm", _optional(_positive), "must be greater than 0", "null turns it off"),
    ("client.threads", _at_least_one, "must be at least 1", ""),
    ("client.device", *_one_of("auto", "cpu", "cuda"), ""),
    ("client.lr_schedule.kind", *_one_of("constant", "step", "exponential", "cosine"), ""),
    ("client.lr_schedule.gamma", _positive, "must be greater than 0", ""),
    ("client.lr_schedule.final", lambda v: 0 <= v <= 1, "must be in [0, 1]", ""),
    ("client.lr_schedule.warmup", lambda v: v >= 0, "must not be negative", ""),
    ("num_edges", _at_least_one, "must be at least 1", "policy=none trains without edge servers"),
    ("client.max_model_bytes", _optional(_positive), "must be above 0", "null for no bound"),
    ("schedule.kind", *_one_of("sequential", "pipelined", "bounded"), ""),
    ("schedule.depth", _at_least_one, "must be at least 1", ""),
    ("link.kind", *_one_of("auto", "memory", "grpc"), ""),
    ("fleet.replicate_every", lambda v: v >= 0, "must not be negative", "0 turns it off"),
    ("edge.device", *_one_of("auto", "cpu", "cuda"), ""),
    ("network.up_mbit_s", _optional(_positive), "must be above 0", "null for no limit"),
    ("network.down_mbit_s", _optional(_positive), "must be above 0", "null for no limit"),
    ("network.latency_ms", lambda v: v >= 0, "must not be negative", ""),
    (
        "network.trace",
        lambda v: all(len(row) == 3 for row in v),
        "must be a list of [second, up, down]",
        "rates are in Mbit/s",
    ),
    ("edge.name", bool, "must not be empty", ""),
    ("edge.max_sessions", _at_least_one, "must be at least 1", ""),
    ("edge.max_session_bytes", _positive, "must be above 0", ""),
    ("edge.max_frame_bytes", _positive, "must be above 0", ""),
    ("link.holder", _optional(_names_one), "must be a name, with {client} at most once", ""),
    ("schedule.micro_batches", _at_least_one, "must be at least 1", ""),
    ("checkpoint.every", _at_least_one, "must be at least 1", ""),
    ("prune.round_to", _at_least_one, "must be at least 1", "1 rounds nothing"),
    ("prune.borders", *_one_of("carrier", "map"), ""),
    ("prune.coupling", *_one_of("group", "scatter"), ""),
    (
        "prune.precisions",
        lambda v: set(v) <= {"bfloat16", "float16", "int8"},
        "must be a list of bfloat16, float16, int8",
        "",
    ),
    ("prune.recalibrate", lambda v: v >= 0, "must not be negative", "0 turns it off"),
    ("prune.fine_tune", lambda v: v >= 0, "must not be negative", "0 turns it off"),
    ("prune.batch_sizes", _counts, "must be a list of numbers of at least 1", ""),
    ("prune.threads", _counts, "must be a list of numbers of at least 1", ""),
    ("prune.runs", lambda v: v >= 30, "must be at least 30", "fewer say little about the tail"),
    ("prune.margin", lambda v: 0 <= v < 1, "must be in [0, 1)", ""),
    ("prune.max_drop", _optional(lambda v: 0 <= v <= 1), "must be in [0, 1]", "null for any"),
    ("runtime.workers", _optional(_at_least_one), "must be at least 1", "null lets fedsys choose"),
    ("runtime.timeout_s", _positive, "must be greater than 0", ""),
    ("runtime.wait_s", _positive, "must be greater than 0", ""),
    *((f"serving.{key}", test, rule, "") for key, test, rule in SERVING_RULES),
)


def _check(config: Config) -> None:
    for path, test, rule, way_out in RULES:
        value: Any = config
        for part in path.split("."):
            value = getattr(value, part)
        if not test(value):
            raise ConfigError.of(path, value, rule, way_out)
    pruning_settings.check(config.pruning)
    if config.schedule.micro_batches > config.client.batch_size:
        raise ConfigError.of(
            "schedule.micro_batches",
            config.schedule.micro_batches,
            f"must not exceed client.batch_size={config.client.batch_size}",
        )


# --------------------------------------------------------------------------------------------------
# From YAML to values


@functools.lru_cache(maxsize=8)
def parse(text: str) -> Config:
    """Turn the YAML text of a run into a checked `Config`; once per process and text.

    Raises:
        ConfigError: Names the key, its value, the rule and the way out.
    """
    try:
        tree = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    # OmegaConf asserts that a text is a mapping or a list.
    except (OmegaConfBaseException, yaml.YAMLError, AssertionError) as error:
        raise ConfigError(f"configuration: {first_line(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError("configuration: must be a mapping of keys to values")
    tree.pop("hydra", None)
    config = typing.cast(Config, _build(Config, tree, ""))
    config = dataclasses.replace(config, text=text)
    _check(config)
    planned = faults.check(
        config.faults.list,
        rounds=config.rounds,
        num_clients=config.num_clients,
        edges=edge_names(config),
    )
    return dataclasses.replace(config, faults=FaultsConfig(planned))


def edge_names(config: Config) -> list[str]:
    """Return the names of the edge servers of a run; none if it needs none."""
    if config.policy.get("kind", "none") == "none":
        return []
    return [e.name for e in config.fleet.edges] or [f"edge-{i}" for i in range(config.num_edges)]


def from_run_config(run_config: Mapping[str, Any]) -> Config:
    """Return the configuration that a Flower app finds in its run config.

    ``hydra-config`` holds the composed YAML when ``fedsys train`` started the run; for a bare
    ``flwr run``, ``overrides`` holds Hydra overrides and the groups are composed here.
    """
    text = str(run_config.get("hydra-config", ""))
    return parse(text or compose_text(str(run_config.get("overrides", ""))))


@functools.lru_cache(maxsize=8)
def compose_text(overrides: str) -> str:
    """Compose ``conf/config.yaml`` with overrides in shell syntax; return resolved YAML."""
    from hydra import compose, initialize_config_dir

    arguments = shlex.split(overrides)
    with (
        translated_errors(),
        known_models(arguments),
        initialize_config_dir(str(CONF), version_base="1.3"),
    ):
        return to_text(compose("config", overrides=arguments))


def to_text(tree: Any) -> str:
    """Return the resolved YAML of a composed configuration, or of plain dicts and lists."""
    with translated_errors():
        return OmegaConf.to_yaml(OmegaConf.create(tree), resolve=True)


def plain(tree: Any) -> dict[str, Any]:
    """Return a composed configuration as resolved plain dicts and lists."""
    with translated_errors():
        return typing.cast(dict[str, Any], OmegaConf.to_container(tree, resolve=True))


def with_values(text: str, **values: Any) -> str:
    """Return the YAML of a run with other values for some of its top-level keys."""
    return to_text(OmegaConf.merge(OmegaConf.create(text), OmegaConf.create(values)))


def divided(config: Config, num_clients: int) -> Config:
    """Return the configuration of the same run among another number of clients."""
    return parse(_divided_text(config.text, num_clients))


@functools.lru_cache(maxsize=8)
def _divided_text(text: str, num_clients: int) -> str:
    return with_values(text, num_clients=num_clients)


def given_keys() -> list[str]:
    """Return the keys and groups that the command line of this job names, with dots."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    return [override.key_or_group.replace("/", ".") for override in parsed]


def _build(kind: Any, value: Any, path: str) -> Any:
    """Convert `value` to the annotation `kind`, or raise a ConfigError that names `path`."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        options = [k for k in typing.get_args(kind) if k is not type(None)]
        fitting = [k for k in options if type(value) is k]
        return None if value is None else _build((fitting or options)[0], value, path)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, path)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError.of(path, value, "must be a list", f"write {path}=[…]")
        each: Any = typing.get_args(kind)[0]
        return tuple(_build(each, v, f"{path}[{i}]") for i, v in enumerate(value))
    if isinstance(origin or kind, type) and issubclass(origin or kind, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError.of(path, value, "must be a group of keys")
        return {str(k): v for k, v in value.items()}
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError.of(path, value, "must be a finite number")
        return float(value)
    if kind is str and value is not None and not isinstance(value, dict | list):
        return str(value)
    if type(value) is not kind:
        raise ConfigError.of(path, value, f"must be of type {kind.__name__}")
    return value


def _build_dataclass(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError.of(path, value, "must be a group of keys")
    hints = typing.get_type_hints(kind)
    names = {f.name for f in dataclasses.fields(kind)} - {"text"}
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in names:
            hint = did_you_mean(str(key), names)
            raise ConfigError(f"{prefix}{key}: no such option; {hint}see --help for all of them")
    built = {k: _build(hints[k], v, prefix + str(k)) for k, v in value.items()}
    for spec in dataclasses.fields(kind):
        required = (
            spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        )
        if required and spec.name not in built:
            raise ConfigError(f"{prefix}{spec.name}: missing from the configuration")
    return kind(**built)


# --------------------------------------------------------------------------------------------------
# Targets


def call_target(spec: Spec, group: str, **given: Any) -> Any:
    """Call the constructor that ``spec["_target_"]`` names, with the other keys as keywords.

    Args:
        spec: A group; nested groups with a ``_target_`` of their own are built first.
        group: Name of the group, for error messages.
        **given: Further keywords, passed where the target has them; the group cannot set them.

    Raises:
        ConfigError: The target does not exist, a keyword is not one of its parameters or not of
            its type, or the target refuses its arguments.
    """
    target = locate(str(spec.get("_target_", "")), group)
    keywords = {
        str(k): call_target(v, f"{group}.{k}") if isinstance(v, Mapping) and "_target_" in v else v
        for k, v in spec.items()
        if k != "_target_"
    }
    for key in keywords.keys() & given:
        raise ConfigError.of(f"{group}.{key}", keywords[key], "must not be set: fedsys sets it")
    parameters = _parameters(target)
    if parameters is not None and not _takes_any(parameters):
        given = {key: value for key, value in given.items() if key in parameters}
    check_keywords(target, {**keywords, **given}, group)
    types_ = _simple_types(target)
    for key in keywords.keys() & types_:
        keywords[key] = _build(types_[key], keywords[key], f"{group}.{key}")
    try:
        return target(**keywords, **given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{group}: {_name_of(target)} refuses its arguments: {error}") from error


def locate(path: str, group: str) -> Callable[..., Any]:
    """Return what a dotted path names; ConfigError names ``group._target_`` if there is nothing."""
    import hydra.utils

    try:
        target = hydra.utils.get_object(path)
    except (
        Exception
    ) as error:  # whatever the import of a user's module raises belongs to the message
        raise ConfigError.of(
            f"{group}._target_",
            path,
            f"cannot be imported ({first_line(error)})",
            "give the dotted path of a class or function",
        ) from error
    if not callable(target):
        raise ConfigError.of(f"{group}._target_", path, "must name a class or a function")
    return typing.cast(Callable[..., Any], target)


def check_keywords(target: Callable[..., Any], keywords: Spec, group: str) -> None:
    """Refuse keywords that `target` does not take, and missing ones, by name."""
    parameters = _parameters(target)
    if parameters is None:
        return
    if not _takes_any(parameters):
        for key in keywords:
            if key not in parameters:
                hint = did_you_mean(key, parameters)
                raise ConfigError(
                    f"{group}.{key}: {_name_of(target)} has no such parameter; "
                    f"{hint}it has {', '.join(parameters) or 'none'}"
                )
    for name, parameter in parameters.items():
        needed = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY,
        )  # fmt: skip
        if needed and name not in keywords:
            raise ConfigError(f"{group}.{name}: {_name_of(target)} needs a value for it")


def _parameters(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):  # some extension types have no signature; calling them decides
        return None


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _simple_types(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the parameters that are annotated as a plain number, text or truth value."""
    constructor: Any = target
    try:
        hints = typing.get_type_hints(
            constructor.__init__ if inspect.isclass(target) else constructor
        )
    except (NameError, TypeError, AttributeError):  # written for a type checker only
        return {}
    return {name: kind for name, kind in hints.items() if kind in (bool, int, float, str)}


def _name_of(target: Callable[..., Any]) -> str:
    return str(getattr(target, "__name__", target))


# --------------------------------------------------------------------------------------------------
# Hydra's seams


@contextmanager
def translated_errors() -> Iterator[None]:
    """Turn errors of Hydra and OmegaConf into a `ConfigError` of one or two lines."""
    from hydra.errors import HydraException

    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error


def _explain(error: BaseException) -> str:
    text = str(error)
    if match := re.search(r"Could not find '(\w+)/([^']+)'", text):
        group, name = match.groups()
        known = options_of(group)
        if not known:
            return f"{group}={name}: there is no group '{group}'; see --help for all of them"
        others = _torchvision_names() if group == "model" else set()
        return (
            f"{group}={name}: no such choice; {did_you_mean(name, [*known, *sorted(others)])}"
            f"known are {', '.join(known)}{' and the classifiers of torchvision' if others else ''}"
        )
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match[1]
        groups = [p.name for p in CONF.iterdir() if p.is_dir() and not p.name.startswith("_")]
        known = [name for name in (*_top_level_keys(), *groups) if name != key]
        return f"{key}: no such option; {did_you_mean(key, known)}see --help for all of them"
    return first_line(error)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def options_of(group: str) -> list[str]:
    """Return the names that can be chosen in a group."""
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def _torchvision_names() -> set[str]:
    from fedsys.models.catalog import torchvision_names  # imports torchvision

    return set(torchvision_names())


def _top_level_keys() -> list[str]:
    keys: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            keys.append(f"{prefix}{key}")
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")

    tree = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"))
    walk(
        {
            k: v
            for k, v in typing.cast(dict[str, Any], tree).items()
            if k not in ("defaults", "hydra")
        },
        "",
    )
    return keys


@contextmanager
def known_models(overrides: Sequence[str]) -> Iterator[None]:
    """Make ``model=NAME`` work for torchvision's classifiers, which have no file in ``conf/``.

    A name without a file becomes a configuration whose constructor looks the name up when the
    model is built, so that torchvision is imported only then.
    """
    from hydra.core.config_store import ConfigStore

    names = [
        name
        for override in overrides
        if override.startswith("model=")
        for name in override.removeprefix("model=").split(",")
        if re.fullmatch(r"\w+", name) and not (CONF / "model" / f"{name}.yaml").exists()
    ]
    store = ConfigStore.instance()
    for name in _torchvision_names().intersection(names) if names else ():
        node = {
            "_target_": "fedsys.models.torchvision_classifier",
            "name": name,
            "norm": "batch",
            "init": None,
        }
        store.store(group="model", name=name, node=node, provider="torchvision")
    for override in overrides:
        if override.startswith("fleet=") and override.endswith((".yaml", ".yml")):
            _store_fleet(override.removeprefix("fleet="))
    yield


def _store_fleet(path: str) -> None:
    """Make ``fleet=PATH.yaml`` work: a file of the user's, over the defaults of ``fleet=local``."""
    from hydra.core.config_store import ConfigStore

    try:
        own = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError.of("fleet", path, f"cannot be read: {first_line(error)}") from error
    if not isinstance(own, dict):
        raise ConfigError.of("fleet", path, "must hold a mapping of keys to values")
    local = yaml.safe_load((CONF / "fleet" / "local.yaml").read_text(encoding="utf-8"))
    parts = [part for part in path.split("/") if part]
    ConfigStore.instance().store(
        group="/".join(["fleet", *parts[:-1]]), name=parts[-1], node={**local, **own},
        package="fleet", provider="file",
    )  # fmt: skip
