"""The commands: where each does its work, what may stand behind it, and which options are its own.

Nothing heavy is imported here: the list of commands, help and completion are there at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

RUN = ("num_clients", "rounds", "seed")
"""Options of ``conf/config.yaml`` that say how large a run is."""

TRAINED = ("data", "model", "strategy")
"""Groups of what is trained."""

SPLIT = ("policy", "schedule", "link", "network", "fleet")
"""Groups of who trains with whom, and how they are connected."""


@dataclass(frozen=True)
class Command:
    """One verb.

    Attributes:
        module: Where its job is, imported when the verb is used.
        function: Name of the job in that module.
        help: One line for the list of commands.
        names: What may stand behind the verb, for instance the benchmarks; empty for nothing.
        paths: Word for the folders that stand behind the verb instead; empty for none.
        group: Choice of a group that holds its options; empty for none.
        aliases: Keys of the command line that are short for others.
        implied: Choices by the key of which they follow, where their group is not chosen.
        options: Keys of ``conf/config.yaml`` that count for it, beside ``json``, in the order of
            its help.
        groups: Groups that count for it.
        whole: Those of which the help shows all options of what is chosen.
        sweeps: Whether ``--multirun`` makes sense, which ends with a table of its runs.
        plain: Whether it has nothing to compose: its job takes what stands behind the verb
            (`fedsys.commands.arguments.Given`) instead of a configuration.
    """

    module: str
    function: str
    help: str
    names: Mapping[str, str] = field(default_factory=dict)
    paths: str = ""
    group: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)
    implied: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    sweeps: bool = False
    plain: bool = False


COMMANDS: dict[str, Command] = {
    "train": Command(
        "fedsys.commands.train",
        "job",
        "train a model by federated learning",
        options=(
            *(*RUN, "num_edges", "resume", "dashboard"),
            *("client", "edge.device", "checkpoint", "run"),
        ),
        groups=(
            *TRAINED,
            *SPLIT,
            "mobility",
            "pruning",
            "privacy",
            "resilience",
            "runtime",
            "faults",
            "tracker",
        ),
        sweeps=True,
    ),
    "edge": Command(
        "fedsys.commands.edge",
        "job",
        "hold sessions of split training for many devices, until SIGTERM or Ctrl-C",
        options=("edge",),
    ),
    "device": Command(
        "fedsys.commands.device",
        "job",
        "be a device of a provisioned fleet, until SIGTERM or Ctrl-C",
        paths="BUNDLE",
        plain=True,
    ),
    "server": Command(
        "fedsys.commands.server",
        "job",
        "be the server of a provisioned fleet, until SIGTERM or Ctrl-C",
        paths="BUNDLE",
        plain=True,
    ),
    "provision": Command(
        "fedsys.commands.provision",
        "job",
        "write a bundle with keys and certificates for each machine of a fleet",
        paths="FLEET.yaml",
        plain=True,
    ),
    "host": Command(
        "fedsys.commands.host",
        "job",
        "compute units of models for chains of hosts, until SIGTERM or Ctrl-C",
        options=("host",),
    ),
    "serve": Command(
        "fedsys.commands.serve",
        "job",
        "answer requests over HTTP by the variants of a portfolio, or by a chain of hosts",
        options=("portfolio", "partition", "dashboard"),
        groups=("serving", "hosts", "network"),
        whole=("serving",),
    ),
    "query": Command(
        "fedsys.commands.query",
        "job",
        "ask an endpoint what is on an image",
        options=("input", "serving.address", "serving.name", "serving.timeout_s", "serving.wait_s"),
    ),
    "plan": Command(
        "fedsys.commands.plan",
        "job",
        "say for each device where to cut, how long it takes, and why",
        options=("num_clients", "num_edges", "seed", "client.epochs", "client.batch_size"),
        groups=("data", "model", "fleet", "network", "policy", "schedule", "mobility"),
        whole=("policy",),
    ),
    "partition": Command(
        "fedsys.commands.partition",
        "job",
        "divide a model, or a variant of a portfolio, among device, edges and cloud, and say why",
        options=("portfolio", "seed", "partition", "run"),
        groups=("model", "data", "hosts", "network"),
        whole=("hosts",),
    ),
    "profile": Command(
        "fedsys.commands.profile",
        "job",
        "measure what this machine takes for a model, as fleet= reads it",
        options=(
            "profile",
            "client.batch_size",
            "client.threads",
            "client.memory_format",
            "client.kernels",
            "client.precision",
        ),
        groups=("data", "model"),
    ),
    "bench": Command(
        "fedsys.commands.bench",
        "job",
        "measure fedsys and its alternatives side by side",
        {
            "training": "a client's training against the barest PyTorch loop",
            "simulation": "the in-process grid against Flower's engine and a bare loop",
            "scale": "rounds per second and memory by the number of virtual clients",
            "start": "from the command to the first round, and from the last to the end",
            "memory": "memory over rounds with many virtual clients",
            "vehicles": "the virtual clock on vehicles that move over many edge servers",
            "switch": "changing variants under load, against three alternatives",
            "simulators": "a round beside pfl-research and Flower's engine: time and memory",
            "serving": "the same model behind fedsys serve, FastAPI and MLServer",
            "serving_load": "clients of an endpoint beside a crowd that takes places and memory",
            "prune": "exact conversion and portfolios, against Torch-Pruning and training",
            "coverage": "which models of torchvision and timm are cut, split, pruned and served",
            "link": "links against bare gRPC, and the share of a shaped rate in use",
            "pipeline": "plans of split training on shaped links and slow devices, or virtually",
            "planning": "how long plans take to make, and how near they are to the optimum",
            "partition": "chains of hosts: planner, predictions, moves, throughput, adaptation",
            "conditions": "which cut is the best under 3^5 conditions of links, CPU and memory",
            "failure": "a chain whose hosts are killed, stopped, cut off and slowed: gaps, choices",
            "lifecycle": "a model from its training to the failure of a host: every decision",
            "offload": "policies that decide on cuts, against classic training and the optimum",
            "privacy": "what privacy by example costs, beside none and beside Opacus",
            "leakage": "what attacks make of activations, gradients and models; bounds on epsilon",
            "split": "split training at every cut against the unsplit loop, and a device's memory",
            "kernels": "a device's part of an iteration with fused kernels and with torch's layers",
            "sessions": "many sessions on an edge server against one with all cores, and memory",
            "migration": "a device that moves between edge servers: pauses, savings, faults",
            "soak": "split training for a while, with a fault at edge servers or links every 3 s",
            "codecs": "error, bytes and speed of each codec, and the accuracy of training with it",
        },
        aliases={
            "virtual": "bench.virtual",
            "models": "bench.models",
            "quick": "bench.quick",
        },
        implied={"data.root": "data=image_folder"},
        options=(*RUN, "client"),
        groups=(*TRAINED, *SPLIT, "pruning", "privacy", "serving"),
    ),
    "prune": Command(
        "fedsys.commands.prune",
        "job",
        "make a portfolio of small dense variants of a model",
        group="variants=portfolio",
        aliases={"run": "variants.run"},
        options=("seed", "client.lr", "client.batch_size", "client.threads", "run"),
        groups=("pruning", "data", "model"),
        whole=("pruning",),
    ),
    "report": Command(
        "fedsys.commands.report",
        "job",
        "write an HTML page about a run, or about several compared",
        paths="RUN",
        group="report=page",
    ),
    "runs": Command(
        "fedsys.commands.runs",
        "job",
        "list the runs in outputs/, or in another folder: what differs, and how they ended",
        paths="FOLDER",
        plain=True,
    ),
    "doctor": Command(
        "fedsys.commands.doctor",
        "job",
        "check whether the run can go, and say what to expect",
        options=(*RUN, "num_edges", "client", "run"),
        groups=(*TRAINED, *SPLIT, "mobility", "pruning", "privacy", "resilience", "runtime"),
    ),
    "completion": Command(
        "fedsys.commands.completion",
        "job",
        "print what completes commands, options and choices in a shell",
        {
            "bash": 'eval "$(fedsys completion bash)" in ~/.bashrc',
            "zsh": 'eval "$(fedsys completion zsh)" in ~/.zshrc, behind compinit',
        },
        plain=True,
    ),
}
