"""Rules that values obey on their own, whatever the run is about."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fedsys.config import dashboard
from fedsys.config import privacy as privacy_settings
from fedsys.config import pruning as pruning_settings
from fedsys.config import resilience as resilience_settings
from fedsys.config import task as task_settings
from fedsys.config.partition import HOST_RULES, HOSTS_RULES
from fedsys.config.partition import RULES as PARTITION_RULES
from fedsys.config.serving import RULES as SERVING_RULES
from fedsys.config.values import Config, NetworkConfig, Spec
from fedsys.errors import ConfigError, did_you_mean, is_number

Rule = tuple[str, Callable[[Any], bool], str, str]
"""Path of the value, test, the rule in words, and the way out."""


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


def _names_target(value: Mapping[str, Any]) -> bool:
    return isinstance(value.get("_target_"), str)


def _tables(trace: Any) -> Iterator[tuple[Any, ...]]:
    """Yield what is given as rows of numbers, for all devices or for one, also where it is not."""
    if isinstance(trace, Mapping):
        for inner in trace.get("machines", trace).values() if "generate" not in trace else ():
            yield from _tables(inner)
    elif isinstance(trace, tuple):
        if any(is_number(x) or x is None for row in trace if isinstance(row, tuple) for x in row):
            yield trace
        else:
            for inner in trace:
                yield from _tables(inner)


def _check_traces(config: Config) -> None:
    """Raise a ConfigError for the first row of a trace, or machine that has one, that cannot be."""
    links = enumerate(config.fleet.links)
    networks = {"network": config.network, **{f"fleet.links[{i}]": link for i, link in links}}
    known = config.fleet.machines
    for path, network in networks.items():
        for rows in _tables(network.trace):
            _check_rows(f"{path}.trace, row", rows)
        named = network.trace.get("machines") if isinstance(network.trace, Mapping) else None
        for name in named or ():
            if name not in known:
                hint = did_you_mean(str(name), known) or ("" if known else "fleet=pi_lab has some")
                rule = f"must be a machine of the fleet: {', '.join(known) or 'it names none'}"
                raise ConfigError.of(f"{path}.trace.machines", name, rule, hint.strip())


def _check_rows(path: str, rows: tuple[Any, ...]) -> None:
    before = -math.inf
    for row in rows:
        if not (isinstance(row, tuple) and len(row) == 3 and all(map(is_number, row))):
            rule, way_out = "must be [second, up, down], without a hole", "rates are in Mbit/s"
        elif min(row) < 0:
            rule, way_out = "must have no negative rate or second", "0 is an outage"
        elif row[0] <= before:
            rule, way_out = f"must be later than {before:g} s before it", "sort rows by time"
        else:
            before = row[0]
            continue
        raise ConfigError.of(path, list(row) if isinstance(row, tuple) else row, rule, way_out)


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
    ("client.memory_format", *_one_of("contiguous", "channels_last"), ""),
    ("client.kernels", *_one_of("plain", "fused"), ""),
    ("client.precision", *_one_of("fp32", "bf16"), ""),
    ("client.lr_schedule.kind", *_one_of("constant", "step", "exponential", "cosine"), ""),
    ("client.lr_schedule.gamma", _positive, "must be greater than 0", ""),
    ("client.lr_schedule.final", lambda v: 0 <= v <= 1, "must be in [0, 1]", ""),
    ("client.lr_schedule.warmup", lambda v: v >= 0, "must not be negative", ""),
    ("num_edges", _at_least_one, "must be at least 1", "policy=none trains without edge servers"),
    ("client.train", *_one_of("all", "lora"), ""),
    ("client.lora.rank", _at_least_one, "must be at least 1", ""),
    ("client.lora.alpha", _positive, "must be greater than 0", ""),
    ("client.max_model_bytes", _optional(_positive), "must be above 0", "null for no bound"),
    ("schedule.kind", *_one_of("sequential", "pipelined", "bounded"), ""),
    ("schedule.depth", _at_least_one, "must be at least 1", ""),
    ("link.kind", *_one_of("auto", "memory", "grpc", "tcp"), ""),
    ("link.skip_zero_gradients", *_one_of("auto", "always", "never"), ""),
    ("fleet.replicate_every", lambda v: v >= 0, "must not be negative", "0 turns it off"),
    ("fleet.between.mbit_s", _optional(_positive), "must be above 0", "null for no limit"),
    ("fleet.between.latency_ms", lambda v: v >= 0, "must not be negative", ""),
    ("fleet.misjudged", lambda v: 1 <= v <= 100, "must be from 1 to 100", "1 is as it is"),
    ("edge.device", *_one_of("auto", "cpu", "cuda"), ""),
    ("network.up_mbit_s", _optional(_positive), "must be above 0", "null for no limit"),
    ("network.down_mbit_s", _optional(_positive), "must be above 0", "null for no limit"),
    ("network.latency_ms", lambda v: v >= 0, "must not be negative", ""),
    ("network.trace_by", *_one_of("seconds", "rounds"), ""),
    (
        "network.columns",
        lambda v: set(v or ()) <= {"seconds", "up", "down"},
        "must map seconds, up and down to names of columns",
        "",
    ),
    ("edge.name", bool, "must not be empty", ""),
    ("edge.max_sessions", _at_least_one, "must be at least 1", ""),
    ("edge.max_session_bytes", _positive, "must be above 0", ""),
    ("edge.max_frame_bytes", _positive, "must be above 0", ""),
    ("edge.workers", _optional(_at_least_one), "must be at least 1", "null: one for each core"),
    ("link.holder", _optional(_names_one), "must be a name, with {client} at most once", ""),
    ("link.around", _optional(_names_target), "must have a _target_, the path of a class", ""),
    ("schedule.micro_batches", _at_least_one, "must be at least 1", ""),
    ("checkpoint.every", _at_least_one, "must be at least 1", ""),
    (
        "variants.round_to",
        lambda v: v == "auto" or (isinstance(v, int) and v >= 1),
        "must be at least 1, or auto",
        "1 rounds nothing",
    ),
    ("variants.borders", *_one_of("carrier", "map"), ""),
    ("variants.coupling", *_one_of("group", "scatter"), ""),
    (
        "variants.precisions",
        lambda v: set(v) <= {"bfloat16", "float16", "int8"},
        "must be a list of bfloat16, float16, int8",
        "",
    ),
    ("variants.recalibrate", lambda v: v >= 0, "must not be negative", "0 turns it off"),
    ("variants.fine_tune", _optional(lambda v: v >= 0), "must not be negative", "0 turns it off"),
    ("variants.batch_sizes", _counts, "must be a list of numbers of at least 1", ""),
    ("variants.threads", _counts, "must be a list of numbers of at least 1", ""),
    ("variants.runs", lambda v: v >= 30, "must be at least 30", "fewer say little about the tail"),
    ("variants.margin", lambda v: 0 <= v < 1, "must be in [0, 1)", ""),
    ("variants.max_drop", _optional(lambda v: 0 <= v <= 1), "must be in [0, 1]", "null for any"),
    ("runtime.workers", _optional(_at_least_one), "must be at least 1", "null lets fedsys choose"),
    ("runtime.pool", *_one_of("threads", "processes"), ""),
    ("runtime.batched_clients", _at_least_one, "must be at least 1", "1 trains each alone"),
    ("runtime.timeout_s", _positive, "must be greater than 0", ""),
    ("runtime.wait_s", _positive, "must be greater than 0", ""),
    *((f"serving.{key}", test, rule, "") for key, test, rule in SERVING_RULES),
    *((f"hosts.{key}", test, rule, "") for key, test, rule in HOSTS_RULES),
    *((f"host.{key}", test, rule, "") for key, test, rule in HOST_RULES),
    *((f"partition.{key}", test, rule, "") for key, test, rule in PARTITION_RULES),
)


def check(config: Config) -> None:
    """Raise a ConfigError for the first value that breaks its rule."""
    for path, test, rule, way_out in RULES:
        value: Any = config
        for part in path.split("."):
            value = getattr(value, part)
        if not test(value):
            raise ConfigError.of(path, value, rule, way_out)
    pruning_settings.check(config.pruning)
    privacy_settings.check(config.privacy)
    task_settings.check(config.task)
    _check_task(config)
    _check_kernels(config)
    _check_precision(config)
    _check_resilience(config)
    _check_lora(config)
    _check_tracker(config.tracker)
    dashboard.address_of(config.dashboard)
    _check_edge_workers(config)
    _check_links(config)
    _check_traces(config)
    _check_addresses(config)
    if config.schedule.micro_batches > config.client.batch_size:
        raise ConfigError.of(
            "schedule.micro_batches",
            config.schedule.micro_batches,
            f"must not exceed client.batch_size={config.client.batch_size}",
        )


def _check_tracker(tracker: Spec) -> None:
    """Raise a ConfigError for a group that names no tracker, or waits for less than nothing."""
    wait_s = tracker.get("wait_s", 0)
    if not is_number(wait_s) or wait_s < 0:
        raise ConfigError.of("tracker.wait_s", wait_s, "must be a number of seconds, 0 or more")
    if tracker and not tracker.get("_target_") and tracker.get("kind") != "none":
        rule = "must name the class of a tracker, with its dotted path"
        raise ConfigError.of("tracker._target_", tracker.get("_target_"), rule, "tracker=none")


def _check_kernels(config: Config) -> None:
    """Refuse fused kernels where they are not made for what a client computes."""
    if config.client.kernels != "fused":
        return
    if config.client.device == "cuda":
        raise ConfigError.of(
            "client.kernels", "fused", "must be plain on a GPU: the kernels are for the CPU",
            "client.device=cpu",
        )  # fmt: skip
    if config.privacy.per_example:
        raise ConfigError.of(
            "client.kernels", "fused",
            f"must be plain with privacy={config.privacy.mechanism}, which takes the gradient of "
            "each example from the layers", "client.kernels=plain",
        )  # fmt: skip


def _check_edge_workers(config: Config) -> None:
    """Refuse worker processes of edge servers where one process has what sessions share."""
    workers, way_out = config.edge.workers, "edge.workers=1"
    if workers == 1:
        return
    value = "null" if workers is None else workers
    if config.edge.device == "cuda":
        raise ConfigError.of(
            "edge.workers", value, "must be 1 on a GPU, which one process uses for all sessions",
            f"{way_out}, or edge.device=cpu",
        )  # fmt: skip
    if config.fleet.emulate:
        raise ConfigError.of(
            "edge.workers", value, "must be 1 with fleet.emulate=true: the machine that an edge "
            "server stands for is one process's", way_out,
        )  # fmt: skip


def _check_precision(config: Config) -> None:
    """Refuse bfloat16 where gradients or activations are bounded, or made, in float32."""
    if config.client.precision == "fp32":
        return
    mechanism, training = config.privacy.mechanism, config.resilience.training
    for key, value, broken, reason, way_out in (
        ("client.kernels", config.client.kernels, config.client.kernels == "fused",
         "the kernels compute in float32", "plain"),
        ("privacy.mechanism", mechanism, config.privacy.per_example,
         "the gradient of each example is taken from the layers in float32", "client"),
        ("privacy.mechanism", mechanism, mechanism == "cut",
         "activations are clipped and made noisy in float32", "client"),
        ("resilience.training", training, config.resilience.active,
         "exits have losses of their own", "none"),
        ("runtime.batched_clients", config.runtime.batched_clients,
         config.runtime.batched_clients > 1, "clients that are trained at once compute in float32",
         "1"),
    ):  # fmt: skip
        if broken:
            rule = f"cannot be with client.precision=bf16: {reason}"
            raise ConfigError.of(key, value, rule, f"{key}={way_out}, or client.precision=fp32")


def _check_resilience(config: Config) -> None:
    """Raise a ConfigError for what does not go with exits."""
    policy = str(config.policy.get("kind", "none"))
    mechanism, method = config.privacy.mechanism, config.pruning.method
    others = (
        ("policy", policy, policy != "none"),
        ("pruning.method", method, config.pruning.active),
        ("privacy.mechanism", mechanism, mechanism not in ("none", "client")),
    )
    resilience_settings.check(config.resilience, config.rounds, others)


def _check_lora(config: Config) -> None:
    """Refuse what changes, masks or scores weights where only adapters learn."""
    if config.client.train != "lora":
        return
    privacy, client = config.privacy, config.client
    for key, value, broken, way_out in (
        ("pruning.method", config.pruning.method, config.pruning.active, "none"),
        ("resilience.training", config.resilience.training, config.resilience.active, "none"),
        ("privacy.mechanism", privacy.mechanism, privacy.per_example, "client or cut"),
        ("client.frozen", True, client.frozen, "false"),
        ("client.max_model_bytes", client.max_model_bytes, client.max_model_bytes is not None,
         "null: each device has the whole model anyway"),
    ):  # fmt: skip
        if broken:
            raise ConfigError.of(key, value, "cannot be with client.train=lora", way_out)


def _check_addresses(config: Config) -> None:
    """Raise a ConfigError for the first address of an edge server without its kind of link."""
    named = {"edge.address": config.edge.address}
    for index, edge in enumerate(config.fleet.edges):
        named[f"fleet.edges[{index}].address"] = edge.address
        named[f"fleet.edges[{index}].device_address"] = edge.device_address or edge.address
    for path, address in named.items():
        if "://" not in address:
            raise ConfigError.of(
                path, address, "must be tcp://host:port or grpc://host:port",
                f"did you mean tcp://{address}?",
            )  # fmt: skip


def _check_links(config: Config) -> None:
    """Raise a ConfigError for the first link of the fleet that breaks a rule."""
    unnamed = NetworkConfig(emulate=config.network.emulate)
    if config.fleet.links and config.network.name == unnamed.name and config.network != unnamed:
        raise ConfigError.of(
            "network", unnamed.name, "must be chosen to have options where the fleet has links",
            "give them in fleet.links, or choose as in network=4g",
        )  # fmt: skip
    for index, link in enumerate(config.fleet.links):
        path = f"fleet.links[{index}]"
        for key in ("up_mbit_s", "down_mbit_s"):
            rate = getattr(link, key)
            if rate is None or not rate > 0:
                raise ConfigError.of(
                    f"{path}.{key}", rate, "must be given, above 0", "its rate in Mbit/s"
                )
        for name, test, rule, way_out in RULES:
            group, _, key = name.partition(".")
            if group == "network" and key in ("latency_ms", "trace_by", "columns"):
                value = getattr(link, key)
                if not test(value):
                    raise ConfigError.of(f"{path}.{key}", value, rule, way_out)
        if link.emulate:
            raise ConfigError.of(
                f"{path}.emulate", True, "must be left out", "network.emulate=true is for all links"
            )


def _check_task(config: Config) -> None:
    """Refuse what is made for classes and the cross-entropy where something else is learned."""
    if config.task.usual:
        return
    task = "own loss" if config.task.kind == "classification" else config.task.kind
    cut = config.privacy.mechanism == "cut"
    refused = (
        ("privacy.mechanism", config.privacy.mechanism, config.privacy.per_example or cut,
         "computes the gradient of each example by the cross-entropy" if not cut
         else "tries whether examples influence each other on images", "privacy=none or client"),
        ("resilience.training", config.resilience.training, config.resilience.active,
         "trains exits by the cross-entropy", "resilience=none"),
        ("pruning.method", config.pruning.method,
         config.pruning.active and config.pruning.method not in ("magnitude", "random", "own"),
         "scores weights by the cross-entropy, or on images", "pruning=magnitude"),
    )  # fmt: skip
    for key, value, broken, rule, way_out in refused:
        if broken:
            raise ConfigError.of(key, value, f"cannot be with task={task}: it {rule}", way_out)
