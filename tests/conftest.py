"""Fixtures that several modules share."""

import atexit
import gc
import os
import shlex
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from fedsys.config import Config
    from fedsys.faults import Faults

# Bits depend on the number of threads; Flower and Ray must not call home. Flower's processes
# inherit what is set before they are imported.
torch.set_num_threads(1)
os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # at Ray's 15 they stood still beside other work
}
# Workers and commands in processes of their own would compile all that they import each time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Tests ask dp-accounting as an oracle, whose log handler would close the captured standard error.
with suppress(ImportError):
    import absl.logging  # noqa: F401

    from fedsys.config.targets import keep_standard_error_open

    keep_standard_error_open()

# No test asserts a time, nor does Hypothesis: other work on the machine is no fault of ours.
settings.register_profile("fedsys", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fedsys")

_LONG = ("deployment", "ray", "slow")

_composed: dict[tuple[str, ...], str] = {}


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """Have one worker more than there are processors: many tests wait, for Flower for instance."""
    count = yield
    return count if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ else count + 1


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep what is imported out of collections of garbage: it stays to the end of the process.

    Each worker imports all tests and all libraries, a million objects. They were gone through again
    and again as they came, and then in each full collection, of which pytest makes five at its end.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # libraries look then whether all of theirs has gone


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the files with the most long tests begin, then those with the most tests.

    A file is the work of one worker: a long one that begins last leaves the others idle.
    """
    tests = Counter(item.path for item in items)
    long = Counter(item.path for item in items if any(map(item.get_closest_marker, _LONG)))
    items.sort(key=lambda item: (-long[item.path], -tests[item.path], item.path))


@pytest.fixture
def configure() -> "Callable[..., Config]":
    """Compose the configuration of a run from overrides, as the command line does.

    A run with a folder draws no pictures: they take most of its time.
    """
    from fedsys.config import compose_text, parse

    def compose(*overrides: str) -> "Config":
        if any(override.startswith("run.dir=") for override in overrides):
            overrides = ("run.plots=false", *overrides)
        if overrides not in _composed:
            _composed[overrides] = compose_text(shlex.join(overrides))
        return parse(_composed[overrides])

    return compose


@pytest.fixture
def identity() -> None:
    """Give this process the identity without which Flower builds no message."""
    from fedsys.runtime import quiet_flower
    from fedsys.runtime.local import identify_process

    quiet_flower()
    identify_process()


@pytest.fixture
def carry_out(identity: None) -> "Callable[..., SimpleNamespace]":
    """Play the rounds of a configuration in this process, without a folder, scores or plots."""
    from fedsys.faults import Faults
    from fedsys.identity import state_sha256
    from fedsys.transport import records
    from strategies.offload_figures import figures

    def carried_out(config: "Config", fleet: Any = None, mobility: Any = None) -> SimpleNamespace:
        rounds: list[Any] = []
        faults = Faults(config.faults.list)
        strategy, arrays = _played(config, fleet, faults, rounds.append, mobility)
        state = records.from_record(arrays)
        return SimpleNamespace(
            sha256=state_sha256(state),
            state=state,
            rows=[result.row for result in rounds],
            lost=[dict(result.lost) for result in rounds],
            figures=figures(strategy),
            strategy=strategy,
            faults=faults.report(),
        )

    return carried_out


_MODELS: dict[tuple[str, ...], str] = {}


@pytest.fixture
def model_of(
    configure: "Callable[..., Config]", carry_out: "Callable[..., SimpleNamespace]"
) -> "Callable[..., str]":
    """Return the hash of the model of a run to which nothing happens; carried out once for all."""

    def hashed(*overrides: str) -> str:
        if overrides not in _MODELS:
            _MODELS[overrides] = str(carry_out(configure(*overrides)).sha256)
        return _MODELS[overrides]

    return hashed


def _played(
    config: "Config",
    fleet: Any,
    faults: "Faults",
    done: "Callable[[Any], None]",
    mobility: Any = None,
) -> tuple[Any, Any]:
    """Play all rounds; return the strategy and the arrays that it ends with."""
    from fedsys.models.lora import sent
    from fedsys.offload.opening import open_fleet
    from fedsys.runtime.apps import load_client
    from fedsys.runtime.local import LocalGrid
    from fedsys.training import federation
    from fedsys.training import plain as training
    from fedsys.transport import records
    from strategies import Roster, build
    from strategies.around import find
    from strategies.offload import Offload
    from strategies.one_by_one import one_by_one
    from strategies.rounds import play

    fed = federation.federation(config)
    model = federation.trained_model(config, fed.dataset)
    with ExitStack() as stack:
        fleet = fleet or stack.enter_context(open_fleet(config, faults))
        client, run_config = load_client(config.apps.client), {"hydra-config": config.text}
        grid = LocalGrid(client, config.num_clients, run_config=run_config)  # type: ignore[arg-type]
        stack.enter_context(grid)
        roster = Roster(config.num_clients)
        strategy = build(config, model, roster, fleet=fleet, dataset=fed.dataset)
        if mobility is not None:
            find(strategy, Offload).mobility = mobility
        arrays = play(
            strategy,
            grid,
            records.to_record(sent(model)),
            first=1,
            last=config.rounds,
            timeout_s=60.0,
            judge=lambda _: training.Score(0.0, 0.0, 1),
            done=done,
            faults=faults,
            adding=one_by_one(config, grid, strategy, [len(part) for part in fed.parts]),
        )
    return strategy, arrays


@pytest.fixture
def last_layer(configure: "Callable[..., Config]") -> SimpleNamespace:
    """Describe sessions with the last linear layer of a small CNN: inputs are made by hand."""
    from fedsys import models
    from fedsys.config import parse, with_values
    from fedsys.offload.snapshot import SessionSpec, Snapshot
    from fedsys.transport.wire import Frame

    base = configure("data=synthetic", "model=cnn")
    config = parse(with_values(base.text, model={"width": 4, "hidden": 16}))
    model = models.build(dict(config.model), input_shape=(1, 8, 8), num_classes=10, seed=1)
    state = {n: t for n, t in model.state_dict().items() if n.startswith("fc2.")}

    def spec(name: str = "s", **more: Any) -> SessionSpec:
        given = {"client": 0, "round": 1, "first": 3, "last": 4, **more}
        return SessionSpec(
            name, f"token of {name}", config=config.text, input_shape=(1, 8, 8), num_classes=10,
            **given,
        )  # fmt: skip

    def activation(step: int, size: int = 3) -> Frame:
        x = torch.full((size, 16), 0.1) * torch.arange(1, 17) + step
        labels = torch.arange(size)
        meta = {"step": step, "piece": 0, "batch": size, "codec": "fp32"}
        return Frame("activation", meta, {"x": x, "labels": labels})

    def start() -> Snapshot:
        return Snapshot(0, {name: tensor.clone() for name, tensor in state.items()}, {})

    return SimpleNamespace(config=config, spec=spec, start=start, activation=activation)


@pytest.fixture(scope="module")
def forked_hosts(tmp_path_factory: pytest.TempPathFactory) -> Generator[None, None, None]:
    """Let hosts of a chain be forks of a process that has imported torch."""
    from fedsys.commands import host
    from tests.forked_hosts import HostForks

    folder = tmp_path_factory.mktemp("hosts")
    with HostForks(folder) as forks, pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "subprocess", forks)
        yield


@pytest.fixture(scope="session")
def portfolio_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A portfolio of a small CNN on images of 3x8x8: the parent and two smaller variants."""
    from torch import nn

    from fedsys.pruning import portfolio
    from fedsys.pruning.dense.shrink import shrink
    from fedsys.randomness import seeded_default_generator

    with seeded_default_generator(7):
        model = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(96, 4),
        ).eval()
    made = []
    for name, kept, accuracy in (("parent", 24, 0.9), ("half", 12, 0.8), ("tenth", 3, 0.6)):
        mask = torch.zeros(24, 3, 3, 3, dtype=torch.bool)
        mask[:kept] = True
        small = shrink(model, (3, 8, 8), masks={"0.weight": mask})
        latencies = tuple(
            portfolio.Latency(batch, 1, kept * batch / 4, kept * batch / 3, 5) for batch in (1, 8)
        )
        size = 4 * small.report.parameters
        variant = portfolio.Variant(
            name, accuracy, small.report.parameters, small.report.macs, size, 4 * size, latencies
        )
        made.append((variant, small.model))
    about = portfolio.About({}, ("cat", "dog", "owl", "elk"), (3, 8, 8), (0.5,) * 3, (0.25,) * 3)
    folder: Path = tmp_path_factory.mktemp("portfolio") / "small"
    portfolio.Portfolio.write(folder, about, made)
    return folder
