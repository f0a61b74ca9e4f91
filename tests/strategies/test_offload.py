"""Split training as a strategy: what a run says of it, with real clients, edges and sessions."""

import dataclasses
import json
from typing import ClassVar

import pytest
import torch
from flwr.app import Array, ArrayRecord
from flwr.clientapp import mod as flower_mods

from clients.app import app
from fedsys.config import EdgeAddress, EdgeConfig
from fedsys.errors import ConfigError, ModelError, SessionError
from fedsys.faults import KINDS
from fedsys.offload.edge import EdgeServer
from fedsys.offload.fleet import Fleet
from fedsys.runtime.apps import check_mods
from fedsys.training import federation
from fedsys.training.federation import layered_model
from fedsys.training.schedule import micro_batch_bounds
from fedsys.transport import records
from strategies.around import find
from strategies.message_halves import joined
from strategies.offload import Offload
from strategies.offload_totals import OffloadTotals, in_words
from strategies.policies.policy import Assignment
from tests.small_runs import SMALL


@pytest.fixture
def train(configure, carry_out):
    return lambda *overrides: carry_out(configure(*SMALL, *overrides))


@pytest.fixture
def edge_named():
    """Return a function that starts an edge server and returns its address."""
    servers = []

    def start(name, **more):
        address = f"memory://{name}-of-offload"
        servers.append(EdgeServer(name, address, control_token="t", **more))
        return EdgeAddress(name, address)

    start.servers = servers
    yield start
    for server in servers:
        server.kill()


def steps_of(config):
    """Return the sizes of all mini-batches of a run, by its definition."""
    fed, batch = federation.federation(config), config.client.batch_size
    counts = [len(part) for part in fed.parts]
    once = [[min(batch, n - start) for start in range(0, n, batch)] for n in counts]
    return [size for own in once for size in own] * config.client.epochs * config.rounds


@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_steps_and_bytes_are_what_the_closed_form_says(cut, micro_batches, configure, carry_out):
    more = ("policy=fixed", f"policy.cut={cut}", f"schedule.micro_batches={micro_batches}")
    config = configure(*SMALL, *more)
    figures = carry_out(config).figures
    sizes = steps_of(config)
    fed = federation.federation(config)
    shape, classes = fed.dataset.input_shape, fed.dataset.num_classes
    example = 4 * torch.Size(layered_model(config, shape, classes).units[cut - 1].out_shape).numel()
    assert figures["edge_steps"] == len(sizes)
    # Up: activations in float32 and labels in int64; down: as many gradients, one loss, one count.
    # Around them a frame has its header and padding, of less than 1 kB.
    frames = sum(len(list(micro_batch_bounds(size, micro_batches))) for size in sizes)
    said = 2 * config.rounds * config.num_clients  # greetings and ends, of training and scoring
    up, down = sum(sizes) * (example + 8), sum(sizes) * example
    assert up < figures["bytes_up"] < up + 1024 * (frames + said)
    assert down < figures["bytes_down"] < down + 1024 * (frames + said)


def test_a_run_says_the_cut_of_each_client_by_index_unit_and_share(train):
    figures = train("policy=fixed", "policy.cut=[1,4]").figures
    assert figures["cuts"].keys() == {"0", "1"}
    first, second = figures["cuts"]["0"], figures["cuts"]["1"]
    assert (first["index"], first["unit"]) == (1, "conv1")
    assert 0 < first["device_share"] < 1
    assert (second["index"], second["device_share"]) == (4, 1.0)
    assert set(figures) >= {"cuts", "edge_steps", "bytes_up", "bytes_down", "recoveries"}
    assert json.loads(json.dumps(figures)) == figures


def test_a_share_of_the_work_never_means_all_or_nothing(train):
    for share in ("0.001", "0.999"):
        (entry,) = {
            tuple(cut.items()) for cut in train("policy=fixed", f"policy.cut={share}", "rounds=1")
            .figures["cuts"].values()
        }  # fmt: skip
        assert 0 < dict(entry)["index"] < 4


def test_clients_with_the_whole_model_need_no_edge(train):
    whole = train("policy=fixed", "policy.cut=4")
    assert whole.sha256 == train().sha256
    assert (whole.figures["edge_steps"], whole.figures["bytes_up"]) == (0, 0)


@pytest.mark.parametrize("kind", ["edge_killed", "link_cut"])
def test_a_run_says_of_each_fault_and_recovery_what_whom_when_and_how_long(kind, train):
    run = train("policy=fixed", "policy.cut=0.3", "num_edges=2", f"faults={kind}")
    (fault,) = run.faults
    assert fault.keys() >= {"kind", "who", "round", "step", "fired"}
    assert (fault["kind"], fault["round"], fault["step"], fault["fired"]) == (kind, 2, 1, True)
    entries = run.figures["recoveries"]
    assert entries
    for entry in entries:
        assert entry.keys() >= {"what", "from", "to", "repeated_steps", "seconds"}
        assert entry["what"] == ("edge" if kind == "edge_killed" else "link")
        assert {entry["from"], entry["to"]} <= {"edge-0", "edge-1"}
        assert entry["seconds"] >= 0
        assert f"round 2: client {entry['client']} lost" in in_words(entry)


def test_the_steps_of_the_edges_are_those_that_count_and_not_the_repeated_ones(train):
    more = ("policy=fixed", "policy.cut=0.3", "num_edges=2")
    plain, struck = train(*more).figures, train(*more, "faults=edge_killed").figures
    assert struck["edge_steps"] == plain["edge_steps"]
    assert struck["bytes_up"] > plain["bytes_up"]  # the repeated steps were sent


class Homeward:
    """Offloads in the first round, and keeps the devices at home afterwards."""

    told: ClassVar = []

    def init(self, layers, nodes):
        return {"whole": len(layers), "rounds": 0}

    def plan(self, state, seen):
        Homeward.told.append(seen)
        cut = state["whole"] if state["rounds"] else 2
        return state | {"rounds": state["rounds"] + 1}, {k: Assignment(cut, 0) for k in seen}


def test_a_device_that_is_sent_home_is_measured_at_home(train):
    """What it had measured with its edge stayed, and was taken for the whole model."""
    Homeward.told.clear()
    policy = f"+policy._target_={Homeward.__module__}.{Homeward.__qualname__}"
    train("policy=none", "policy.kind=own", policy, "rounds=3")
    first, away, home = (seen[0] for seen in Homeward.told)
    assert first.steps == 0
    assert away.bytes_up > 0 and away.edge_s > 0
    assert home.steps > 0 and home.compute_s > 0 and home.iteration_s > 0
    assert (home.bytes_up, home.edge_s, home.up_bit_s, home.down_bit_s) == (0, 0.0, 0.0, 0.0)


def test_a_device_that_lost_its_edge_is_not_taken_for_one_that_offloads(edge_named, train):
    """The times of its whole model would be divided by those of the units before its cut."""
    run = train("policy=fixed", "policy.cut=2", "rounds=1", "faults=edge_killed",
                "faults.list.0.round=1")  # fmt: skip
    assert {entry["to"] for entry in run.figures["recoveries"]} == {"device"}
    assert find(run.strategy, Offload).seen_of(0).iteration_s == 0.0


def test_edges_that_are_full_are_an_error_before_a_device_begins(edge_named, configure, carry_out):
    addresses = [edge_named("small", limits=EdgeConfig(max_sessions=1))]
    with (
        Fleet(addresses, control_token="t") as fleet,
        pytest.raises(SessionError, match=r"session of client 1: .* small is full: 1 sessions"),
    ):
        carry_out(configure(*SMALL, "policy=fixed", "policy.cut=0.3"), fleet)


def test_sessions_are_released_after_each_round(edge_named, configure, carry_out):
    addresses = [edge_named("first"), edge_named("second")]
    with Fleet(addresses, control_token="t") as fleet:
        config = configure(*SMALL, "policy=fixed", "policy.cut=0.3", "num_edges=2")
        figures = carry_out(config, fleet).figures
    counters = [server.counters for server in edge_named.servers]
    assert all(counted["opened"] == counted["released"] > 0 for counted in counters)
    assert sum(counted["steps"] for counted in counters) == figures["edge_steps"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("policy.cut=9",), "policy.cut=9: must be"),
        (("policy.cut=-1",), "policy.cut=-1"),
        (("policy.cut=1.5",), "policy.cut=1.5"),
        (("policy.cut=conv9",), "policy.cut=conv9"),
        (("policy.cut=3", "client.label_private=true"), "policy.cut=3: must be below 3"),
        (("policy.cut=1", "client.optimizer=lbfgs"), "(?i)lbfgs"),
    ],
)
def test_what_cannot_be_split_is_refused_before_training_starts(overrides, words, train):
    with pytest.raises(ConfigError, match=words):
        train("policy=fixed", *overrides)


class Noise:
    """A mod of the user's own."""

    def __call__(self, message, context, call_next):
        return call_next(message, context)


@pytest.mark.parametrize(
    "where", ["fixedclipping_mod", "adaptiveclipping_mod", "LocalDpMod", "own"]
)
def test_mods_that_would_take_a_half_for_the_whole_are_refused_by_name(where, train, monkeypatch):
    made = {"own": Noise, "LocalDpMod": lambda: flower_mods.LocalDpMod(1.0, 1.0, 1.0, 1e-5)}
    mod = made[where]() if where in made else getattr(flower_mods, where)
    monkeypatch.setattr(app, "_mods", [*app._mods, mod])
    name = "Noise" if where == "own" else where
    with pytest.raises(ConfigError, match=rf"apps\.client=clients\.app:app: .*{name} with split"):
        check_mods("clients.app:app")
    # Flower's are refused before that, with the reason that holds for whole models, too
    with pytest.raises(ConfigError, match=rf"apps\.client=clients\.app:app: must not .*{name}"):
        train("policy=fixed", "policy.cut=1")


def test_mods_that_only_look_are_accepted(monkeypatch):
    own = Noise()
    own.only_looks = True
    looking = [flower_mods.arrays_size_mod, flower_mods.message_size_mod, own]
    monkeypatch.setattr(app, "_mods", [*looking, *app._mods])
    check_mods("clients.app:app")
    del own.only_looks
    with pytest.raises(ConfigError, match="Noise"):
        check_mods("clients.app:app")


def arrays(**values):
    return ArrayRecord({n: Array(torch.full((2,), float(v)).numpy()) for n, v in values.items()})


def test_halves_are_joined_by_name_in_the_order_of_the_whole():
    own, edge = arrays(a=1, d=4), {"c": torch.full((2,), 3.0), "b": torch.full((2,), 2.0)}
    whole = joined(own, edge, ["a", "b", "c", "d"])
    assert list(whole) == ["a", "b", "c", "d"]
    assert [float(t[0]) for t in records.from_record(whole).values()] == [1, 2, 3, 4]
    assert list(joined(own, edge, None)) == ["a", "b", "c", "d"]


def test_halves_that_overlap_are_refused_by_name():
    with pytest.raises(ModelError, match="in both halves: b"):
        joined(arrays(a=1, b=2), {"b": torch.zeros(2)}, ["a", "b"])


def test_every_position_of_every_kind_of_link_and_edge_is_in_the_fault_table():
    from tests.test_fault_table import TABLE

    lasting = {kind for kind, about in KINDS.items() if about.target in ("edge", "link")}
    assert {kind for kind, _ in TABLE} == lasting
    assert len(TABLE) == sum(len(KINDS[kind].positions) for kind in lasting)
    assert {"edge_killed", "link_cut", "link_slow", "link_reordered", "link_duplicated",
            "link_corrupted", "device_killed"} <= KINDS.keys()  # fmt: skip


def test_totals_survive_as_plain_values(train):
    totals = OffloadTotals({"0": {"index": 1}}, 3, 10, 20, [{"what": "link"}])
    assert OffloadTotals(**json.loads(json.dumps(dataclasses.asdict(totals)))) == totals
