"""The promise of the product: how a model is trained changes time and never the model.

Every row of the table trains the same configuration twice: unsplit on the devices, and split over
devices and edge servers. Both must give the same bits. Any two values of any two columns meet in
some row.
"""

import itertools

import pytest

from fedsys.config import parse, with_values
from fedsys.offload import fleet_edges
from fedsys.offload import opening as edges
from fedsys.training.federation import federation, fusion_in
from fedsys.training.schedule import operations
from fedsys.transport.addresses import dial
from fedsys.transport.faulty import Faulty, LinkFault
from tests.moving import Listed, drawn

COMMON = {
    "num_clients": 3,
    "rounds": 2,
    "client": {"epochs": 1, "batch_size": 10, "lr": 0.1, "momentum": 0.0},
    # 28, 17 and 9 examples: the last mini-batches have 8, 7 and 9
    "data": {
        "examples": 60,
        "test_examples": 10,
        "partition": {"kind": "fractions", "fractions": [0.52, 0.31]},
    },
}
SHAPES = {
    "lenet": [1, 8, 8],
    "cnn": [1, 8, 8],
    "vgg5": [3, 16, 16],
    "resnet18": [3, 8, 8],
    "mobilenet_v2": [3, 8, 8],
}
UNITS = {"cnn": 4, "vgg5": 5}
MODELS = {
    "cnn-batch": ("cnn", {"width": 4, "hidden": 16}),  # with dropout
    "cnn-group": ("cnn", {"width": 4, "hidden": 16, "norm": "group"}),
    "cnn-deferred": ("cnn", {"width": 4, "hidden": 16, "norm": "deferred"}),
    "vgg5-batch": ("vgg5", {"dropout": 0.2}),
    # some builds of torch 2.15 end in the gradient of a narrower one that is channels_last
    "resnet18": ("resnet18", {"width": 8}),
    "mobilenet_v2": ("mobilenet_v2", {"width": 0.25}),
}


def partly(frozen, **more):
    """Return a model of which a part is not trained as the rest is."""
    target = "tests.models.partly.Partly"
    return "lenet", {"_target_": target, "dropout": 0.3, "frozen": frozen, **more}


MODELS |= {
    "frozen by train()": partly("root"),
    "frozen by train(), deferred": partly("root", norm="deferred"),
    "dropout frozen": partly("dropout"),
    "stem frozen": partly("stem"),
    "frozen by its class": partly("class"),
    "frozen by forward": partly("forward"),
    "momentum by mode": partly("momentum"),
    "parameters frozen": partly("parameters"),
    "odd tensors": ("lenet", {"_target_": "tests.models.odd.Odd", "dropout": 0.2}),
    "lazy": ("lenet", {"_target_": "tests.models.test_fits.Lazy", "dropout": 0.2}),
    "tokens": ("lenet", {"_target_": "tests.models.tokens.Tokens", "dropout": 0.2}),
}
FEATURES = {
    "plain": {},
    "momentum, decay, cosine": {
        "client": {
            "momentum": 0.9,
            "weight_decay": 0.01,
            "lr_schedule": {"kind": "cosine"},
            "optimizer_args": {"nesterov": True},
        }
    },
    "kept adam, crops": {
        "client": {"optimizer": "adam", "lr": 0.003, "keep_optimizer": True},
        "data": {"augmentation": "crop_flip"},
    },
    "proximal, clipped, two epochs": {
        "strategy": "fedprox",
        "client": {"epochs": 2, "clip_norm": 0.5},
    },
    "fedadam, kept momentum": {
        "strategy": "fedadam",
        "client": {"momentum": 0.9, "keep_optimizer": True},
    },
}

PRUNED = {
    "pruned between rounds, clipped, decay, penalty": {
        "client": {"momentum": 0.9, "weight_decay": 0.01, "keep_optimizer": True, "clip_norm": 0.5},
        "pruning": {"method": "magnitude", "sparsity": 0.7, "steps": 1, "group_lasso": 0.01},
    },
    "pruned, proximal": {
        "strategy": "fedprox",
        "pruning": {"method": "random", "sparsity": 0.5, "start": 0, "steps": 2},
    },
    "levels with rewinding, fedadam, kept adam": {
        "strategy": "fedadam",
        "client": {"optimizer": "adam", "lr": 0.003, "keep_optimizer": True},
        "pruning": {"method": "magnitude", "rewind": 0, "rounds_per_level": 1, "share": 0.4},
    },
}
COLUMNS = {
    "model and cut": [
        ("cnn-batch", 1),
        ("cnn-batch", 2),
        ("cnn-group", 1),
        ("cnn-group", [2, 3, 4]),  # device 2 has the whole model
        ("vgg5-batch", 1),
        ("vgg5-batch", 2),
        ("vgg5-batch", 3),
    ],
    "feature": list(FEATURES),
    "micro-batches and schedule": [
        (1, "sequential"),
        (3, "sequential"),
        (2, "pipelined"),
        (4, "bounded 2"),
        (5, "bounded 3"),
        ([1, 4, 3], "pipelined"),
    ],
    "interrupted": ["never", "link", "edge"],
    "private": [False, True],
    "link": ["memory", "grpc", "tcp"],
}


def all_pairs(columns):
    """Yield rows, chosen greedily, until any two values of two columns have met in one."""
    names = list(columns)
    open_pairs = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(columns[names[a]]))
        for j in range(len(columns[names[b]]))
    }
    candidates = list(itertools.product(*(range(len(values)) for values in columns.values())))
    while open_pairs:
        # one pair that is still open, completed by the row that closes the most others
        a, i, b, j = min(open_pairs)
        row = max(
            (row for row in candidates if row[a] == i and row[b] == j),
            key=lambda row: len(open_pairs & pairs_of(row)),
        )
        open_pairs -= pairs_of(row)
        yield tuple(columns[name][k] for name, k in zip(names, row, strict=True))


def pairs_of(row):
    return {(a, row[a], b, row[b]) for a, b in itertools.combinations(range(len(row)), 2)}


LAID_OUT = {
    "channels_last, kept momentum, clipped": {
        "client": {
            "memory_format": "channels_last",
            "momentum": 0.9,
            "keep_optimizer": True,
            "clip_norm": 0.5,
        },
    },
}
FUSED_KERNELS = {
    "fused": {"client": {"kernels": "fused"}},
    "fused, kept momentum, clipped, channels_last": {
        "client": {
            "kernels": "fused",
            "memory_format": "channels_last",
            "momentum": 0.9,
            "keep_optimizer": True,
            "clip_norm": 0.5,
        },
    },
    "fused, pruned, penalty, crops": {
        "client": {"kernels": "fused", "weight_decay": 0.01},
        "data": {"augmentation": "crop_flip"},
        "pruning": {"method": "magnitude", "sparsity": 0.7, "steps": 1, "group_lasso": 0.01},
    },
}
LOWERED = {
    "bf16": {"client": {"precision": "bf16"}},
    "bf16, kept momentum, clipped, channels_last": {
        "client": {
            "precision": "bf16",
            "memory_format": "channels_last",
            "momentum": 0.9,
            "keep_optimizer": True,
            "clip_norm": 0.5,
        },
    },
    "bf16, proximal, pruned, penalty, crops": {
        "strategy": "fedprox",
        "client": {"precision": "bf16", "weight_decay": 0.01},
        "data": {"augmentation": "crop_flip"},
        "pruning": {"method": "magnitude", "sparsity": 0.7, "steps": 1, "group_lasso": 0.01},
    },
}
RECORD = {
    "mechanism": "record",
    "epsilon": 1e6,
    "clip_norm": 0.5,
    "noise_multiplier": 0.7,
    "accountant": "rdp",
}
PRIVATE = {
    "private by example, kept momentum": {
        "client": {"momentum": 0.9, "keep_optimizer": True, "weight_decay": 0.01},
        "data": {"augmentation": "crop_flip"},
        "privacy": RECORD,
    },
    "private by example, proximal, empty mini-batches": {
        "strategy": "fedprox",
        "client": {"batch_size": 2},
        "privacy": RECORD,
    },
    "private by example, pruned": {
        "pruning": {"method": "magnitude", "sparsity": 0.7, "steps": 1, "group_lasso": 0.01},
        "privacy": RECORD,
    },
}
ALL_FEATURES = FEATURES | PRUNED | LAID_OUT | FUSED_KERNELS | LOWERED | PRIVATE
MOMENTUM, EMPTY, PRUNED_PRIVATELY = PRIVATE
BETWEEN_ROUNDS, PROXIMAL, LEVELS = PRUNED
(CHANNELS_LAST,) = LAID_OUT
FUSED, FUSED_CLIPPED, FUSED_PRUNED = FUSED_KERNELS
BF16, BF16_CLIPPED, BF16_PRUNED = LOWERED
TABLE = [
    *all_pairs(COLUMNS),
    (("resnet18", 0.5), "momentum, decay, cosine", (2, "pipelined"), "never", False, "memory"),
    (("mobilenet_v2", 0.5), "plain", (1, "sequential"), "never", True, "memory"),
    (("cnn-deferred", 1), "momentum, decay, cosine", (3, "pipelined"), "edge", False, "grpc"),
    (("cnn-deferred", 2), "kept adam, crops", (2, "sequential"), "link", True, "memory"),
    (("cnn-batch", [1, 2, 4]), BETWEEN_ROUNDS, (3, "pipelined"), "edge", False, "tcp"),
    (("vgg5-batch", 2), BETWEEN_ROUNDS, (2, "pipelined"), "never", True, "memory"),
    (("cnn-group", 2), PROXIMAL, (1, "sequential"), "link", False, "memory"),
    (("cnn-group", 1), LEVELS, (4, "bounded 2"), "edge", True, "memory"),
    (("vgg5-batch", [1, 2, 3]), CHANNELS_LAST, (3, "pipelined"), "link", False, "grpc"),
    (("resnet18", 0.5), CHANNELS_LAST, (2, "pipelined"), "edge", True, "memory"),
    (("mobilenet_v2", 0.5), CHANNELS_LAST, (1, "sequential"), "never", False, "memory"),
    (("frozen by train()", 1), "plain", (2, "pipelined"), "edge", False, "tcp"),
    (("frozen by train()", [1, 2, 2]), BETWEEN_ROUNDS, (1, "sequential"), "link", False, "memory"),
    (
        ("frozen by train(), deferred", 1),
        "kept adam, crops",
        (3, "pipelined"),
        "never",
        False,
        "grpc",
    ),
    (("dropout frozen", 1), "momentum, decay, cosine", (1, "sequential"), "edge", True, "memory"),
    (("dropout frozen", 2), PROXIMAL, (4, "bounded 2"), "never", False, "memory"),
    (("stem frozen", 1), "kept adam, crops", (2, "pipelined"), "link", False, "memory"),
    (("stem frozen", 2), LEVELS, (1, "sequential"), "edge", False, "memory"),
    (("frozen by its class", 1), CHANNELS_LAST, (3, "pipelined"), "never", True, "memory"),
    (
        ("frozen by forward", 1),
        "momentum, decay, cosine",
        (2, "pipelined"),
        "edge",
        False,
        "memory",
    ),
    (("frozen by forward", 2), BETWEEN_ROUNDS, (5, "bounded 3"), "link", False, "grpc"),
    (("momentum by mode", 1), "fedadam, kept momentum", (2, "pipelined"), "never", False, "memory"),
    (("parameters frozen", 1), "kept adam, crops", (2, "pipelined"), "edge", False, "memory"),
    (("parameters frozen", 1), PROXIMAL, (1, "sequential"), "link", True, "memory"),
    (("odd tensors", 1), "proximal, clipped, two epochs", (2, "pipelined"), "edge", False, "tcp"),
    (("odd tensors", 1), BETWEEN_ROUNDS, (1, "sequential"), "link", True, "grpc"),
    (("odd tensors", 1), LEVELS, (1, "sequential"), "never", False, "memory"),
    (("lazy", 1), BETWEEN_ROUNDS, (2, "pipelined"), "link", False, "memory"),
    # What crosses is transposed and its gradient is not: sums before the cut had other last bits
    (("tokens", 2), "plain", (1, "sequential"), "never", False, "memory"),
    (("tokens", 2), "momentum, decay, cosine", (2, "pipelined"), "link", False, "tcp"),
    (("tokens", 2), "proximal, clipped, two epochs", (1, "sequential"), "never", True, "grpc"),
    (("parameters frozen", 2), "momentum, decay, cosine", (1, "sequential"), "never", False, "tcp"),
    (("cnn-group", 1), MOMENTUM, (1, "sequential"), "never", False, "memory"),
    (("cnn-group", [1, 2, 4]), MOMENTUM, (3, "pipelined"), "edge", False, "tcp"),
    (("cnn-group", 2), MOMENTUM, (4, "bounded 2"), "link", True, "memory"),
    (("cnn-group", 1), EMPTY, (1, "sequential"), "edge", False, "memory"),
    (("cnn-group", 2), EMPTY, (2, "pipelined"), "link", False, "grpc"),
    (("cnn-group", 2), PRUNED_PRIVATELY, (2, "pipelined"), "never", False, "memory"),
    (("vgg5-batch", [1, 2, 3]), FUSED, (3, "pipelined"), "link", False, "tcp"),
    (("cnn-batch", [1, 2, 4]), FUSED_CLIPPED, (4, "bounded 2"), "edge", False, "grpc"),
    (("cnn-group", 1), FUSED_PRUNED, (2, "pipelined"), "never", False, "memory"),
    (("cnn-deferred", 1), FUSED_CLIPPED, (3, "pipelined"), "link", True, "memory"),
    (("frozen by train()", 1), FUSED, (1, "sequential"), "edge", False, "memory"),
    (("frozen by forward", 1), FUSED_CLIPPED, (2, "pipelined"), "never", False, "memory"),
    (("vgg5-batch", [1, 2, 3]), BF16, (3, "pipelined"), "link", False, "tcp"),
    (("vgg5-batch", 2), BF16_CLIPPED, (2, "pipelined"), "edge", True, "memory"),
    (("cnn-batch", [1, 2, 4]), BF16_PRUNED, (4, "bounded 2"), "edge", False, "grpc"),
    (("cnn-group", 1), BF16_CLIPPED, (1, "sequential"), "link", True, "tcp"),
    (("cnn-deferred", 2), BF16, (3, "pipelined"), "never", True, "memory"),
    (("resnet18", 0.5), BF16_CLIPPED, (2, "pipelined"), "never", False, "memory"),
    (("mobilenet_v2", 0.5), BF16, (1, "sequential"), "edge", False, "memory"),
    (("tokens", 2), BF16_CLIPPED, (2, "pipelined"), "link", False, "grpc"),
    (("parameters frozen", 1), BF16_PRUNED, (2, "pipelined"), "never", False, "memory"),
    (("odd tensors", 1), BF16, (2, "pipelined"), "never", True, "memory"),
]


def merged(a, b):
    both = dict(a)
    for key, value in b.items():
        nested = isinstance(value, dict) and isinstance(both.get(key), dict)
        both[key] = merged(both[key], value) if nested else value
    return both


@pytest.fixture
def settings(configure):
    """Return a function from a model, a feature and further values to a configuration."""

    def made(model, feature, **more):
        name, arguments = MODELS[model]
        values = dict(ALL_FEATURES[feature])
        strategy = values.pop("strategy", "fedavg")
        base = configure("data=synthetic", f"model={name}", f"strategy={strategy}")
        data = {"data": {"shape": SHAPES[name]}}
        for part in ({"model": arguments}, data, values, more):
            data = merged(data, part)
        return parse(with_values(base.text, **merged(COMMON, data)))

    return made


def ordered(schedule):
    """Return the values for an order of pieces, its depth behind its name if it has one."""
    kind, _, depth = schedule.partition(" ")
    return {"kind": kind, "depth": int(depth or 1)}


def split_in(pieces, cut):
    """Return the values for a number of pieces, or for a number for each device.

    The latter are a policy's to give, also to devices that have the whole model.
    """
    if isinstance(pieces, int):
        return {"schedule": {"micro_batches": pieces}}
    return {"policy": {"kind": "fixed", "cut": cut, "codec": "fp32", "micro_batches": pieces}}


_references: dict[str, object] = {}


@pytest.fixture
def unsplit(settings, carry_out):
    """Return a function that trains without edge servers, once per configuration."""

    def reference(model, feature, pieces):
        config = settings(model, feature, **split_in(pieces, UNITS.get(MODELS[model][0])))
        if config.text not in _references:
            _references[config.text] = carry_out(config)
        return _references[config.text]

    return reference


@pytest.fixture
def interrupt(monkeypatch):
    """Return a function that lets a fault strike every device, or an edge, in the second step."""
    monkeypatch.setattr(fleet_edges, "REDIAL_S", (0.0,))
    servers = []
    start = edges._start

    def started(*arguments):
        servers.append(start(*arguments))
        return servers[-1]

    def arm(what):
        struck: list[LinkFault] = []
        if what == "never":
            return struck
        seen: set[str] = set()

        def connect(address, **options):
            link = dial(address, **options)
            if what == "link":
                fault = LinkFault("cut", 3, of_kind="", direction="recv", when="before")
                return Spy(Faulty(link, [fault], sleep=lambda _: None), struck, [fault])
            fault = LinkFault("cut", 2, of_kind="activation")
            if "first" in seen:
                return link
            seen.add("first")
            return Killing(link, {s.address: s for s in servers}[address], struck, fault)

        monkeypatch.setattr("fedsys.offload.dialling.dial", connect)
        return struck

    monkeypatch.setattr(edges, "_start", started)
    return arm


class Spy:
    """A faulty link that notes in a list shared by all what has fired."""

    def __init__(self, link, struck, faults):
        self._link, self._struck, self._faults = link, struck, faults

    def __getattr__(self, name):
        if self._faults and self._link.fired:
            self._struck.append(self._faults.pop())
        return getattr(self._link, name)


class Killing:
    """A link whose edge server is killed when a certain activation is to be sent."""

    def __init__(self, link, server, struck, fault):
        self._link, self._server, self._struck, self._fault = link, server, struck, fault
        self._left = fault.frame

    def send_encoded(self, parts):
        if self._left == 0:
            self._struck.append(self._fault)
            self._server.kill()
        self._left -= 1
        self._link.send_encoded(parts)

    def __getattr__(self, name):
        return getattr(self._link, name)


def identify(row):
    (model, cut), feature, (pieces, schedule), interrupted, private, link = row
    private = "private" if private else "public"
    return f"{model}@{cut}-{feature}-{pieces} {schedule}-{private}-{link}-interrupted {interrupted}"


@pytest.mark.parametrize("row", TABLE, ids=identify)
def test_split_training_gives_the_bits_of_plain_training(
    row, settings, unsplit, carry_out, interrupt
):
    (model, cut), feature, (pieces, schedule), interrupted, private, link = row
    expected = unsplit(model, feature, pieces)
    if private and model.startswith("cnn") and isinstance(cut, list):
        cut = [2, 1, 4]  # 3 would leave nothing for the edge
    config = settings(
        model,
        feature,
        **merged(
            split_in(pieces, cut),
            {
                "schedule": ordered(schedule),
                "policy": {"kind": "fixed", "cut": cut, "codec": "fp32"},
            },
        ),
        client=merged(ALL_FEATURES[feature].get("client", {}), {"label_private": private}),
        link={"kind": link, "skip_zero_gradients": "always"},
        num_edges=2,
    )
    struck = interrupt(interrupted)
    got = carry_out(config)
    assert got.sha256 == expected.sha256
    assert bool(struck) == bool(got.figures["recoveries"]) == (interrupted != "never")
    assert not any(got.lost)
    for name in ("train_loss", "train_accuracy", "steps", "examples", "epsilon"):
        assert [row.get(name) for row in got.rows] == [row.get(name) for row in expected.rows]
    assert ("train_loss" in got.rows[-1]) == (feature not in PRIVATE)
    assert (got.rows[-1].get("sparsity", 0.0) > 0.35) == ("pruning" in ALL_FEATURES[feature])


MOVING = [
    (1, ("cnn-batch", 2), "momentum, decay, cosine", (1, "sequential"), False),
    (3, ("vgg5-batch", 2), "kept adam, crops", (3, "pipelined"), False),
    (10, ("cnn-batch", [1, 2, 2]), "momentum, decay, cosine", (4, "bounded 2"), True),
    (10, ("cnn-deferred", 1), "proximal, clipped, two epochs", (3, "pipelined"), False),
    (3, ("vgg5-batch", [1, 2, 3]), CHANNELS_LAST, (2, "pipelined"), False),
    (10, ("cnn-group", 2), LEVELS, (2, "pipelined"), True),
    (3, ("resnet18", 0.5), BETWEEN_ROUNDS, (1, "sequential"), False),
    (3, ("vgg5-batch", [1, 2, 3]), FUSED, (3, "pipelined"), False),
    (10, ("cnn-deferred", 1), FUSED_CLIPPED, (2, "pipelined"), True),
    (3, ("vgg5-batch", [1, 2, 3]), BF16_CLIPPED, (3, "pipelined"), False),
    (10, ("cnn-group", 2), BF16, (2, "pipelined"), True),
]


@pytest.mark.parametrize("row", MOVING, ids=str)
def test_devices_that_move_train_the_bits_of_those_that_stay(row, settings, unsplit, carry_out):
    count, (model, cut), feature, (pieces, schedule), private = row
    expected = unsplit(model, feature, pieces)
    config = settings(
        model,
        feature,
        schedule={**ordered(schedule), "micro_batches": pieces},
        policy={"kind": "fixed", "cut": cut, "codec": "fp32"},
        client=merged(ALL_FEATURES[feature].get("client", {}), {"label_private": private}),
        link={"skip_zero_gradients": "always"},
        num_edges=3,
    )
    moves = drawn(count, clients=3, rounds=2, edges=3, pieces=pieces, seed=count)
    got = carry_out(config, mobility=Listed(moves))
    assert got.sha256 == expected.sha256
    assert got.figures["moves"] and got.figures["recoveries"] == []
    assert not any(got.lost)
    for name in ("train_loss", "train_accuracy", "steps", "examples"):
        assert [row[name] for row in got.rows] == [row[name] for row in expected.rows]


FUSED_ROWS = sorted({row[0][0] for row in TABLE if row[1] in FUSED_KERNELS})


@pytest.mark.parametrize("model", FUSED_ROWS)
def test_rows_with_fused_kernels_have_units_that_fit(model, settings):
    config = settings(model, FUSED)
    fusion = fusion_in(config, federation(config).dataset)
    assert fusion is not None and fusion.units
    assert len(fusion.units) > 1 or not model.startswith("cnn")  # one of them is the edge's


def test_bounded_rows_take_an_order_of_their_own():
    """A row that left `depth` at 1 trained in the order of `sequential`, whatever it was called."""
    rows = [r for r in TABLE if r[2][1].startswith("bounded")]
    assert len({r[2] for r in rows}) >= 2
    for pieces, schedule in {r[2] for r in rows}:
        for tail in (False, True):
            orders = [
                tuple(operations(made["kind"], pieces, made["depth"], tail=tail))
                for made in map(ordered, (schedule, "sequential", "pipelined"))
            ]
            assert orders[0] not in orders[1:]


def test_any_two_values_of_two_columns_meet_in_some_row():
    met = {
        (a, str(row[a]), b, str(row[b]))
        for row in TABLE
        for a, b in itertools.combinations(range(len(COLUMNS)), 2)
    }
    values = list(COLUMNS.values())
    for a, b in itertools.combinations(range(len(values)), 2):
        for pair in itertools.product(values[a], values[b]):
            assert (a, str(pair[0]), b, str(pair[1])) in met


# --------------------------------------------------------------------------------------------------
# Other tasks than classes, on data, models and losses as users bring them

OWN_DATA = {
    "regression": ("regression", "rows", {"_target_": "fedsys.models.dense.mlp", "hidden": 8}),
    "multilabel": ("multilabel", "labels", {"_target_": "fedsys.models.dense.mlp", "dropout": 0.2}),
    "segmentation": ("segmentation", "pictures", {"_target_": "tests.own_work.Segments"}),
    "next token": (
        "next_token",
        "Sentences",
        {"_target_": "fedsys.models.text.Gpt", "width": 16, "depth": 2, "heads": 2, "dropout": 0.1},
    ),
    "classes of tokens": ("classification", "Words", {"_target_": "tests.own_work.Bag"}),
    "padded words": ("classification", "Padded", {"_target_": "tests.own_work.Masked"}),
    "image and numbers": ("regression", "Twofold", {"_target_": "tests.own_work.Both"}),
    "bert": ("classification", "Padded", {"_target_": "tests.own_work.Bert"}),
    "bert of lists": ("classification", "Padded", {"_target_": "tests.models.hf_style.Bert"}),
    "vit": ("classification", "photos", {"_target_": "tests.own_work.vit"}),
    "gpt of lists": ("next_token", "Sentences", {"_target_": "tests.models.hf_style.Gpt2"}),
    "own loss": ("regression", "rows", {"_target_": "fedsys.models.dense.mlp", "hidden": 8}),
    "own loss with a weight": ("regression", "rows", {"_target_": "fedsys.models.dense.mlp"}),
}
OWN_LOSSES = {"own loss": "steep", "own loss with a weight": "weighted"}
OWN_TABLE = [
    ("regression", 1, "momentum, decay, cosine", (3, "pipelined"), "link", False, "tcp"),
    ("regression", 1, "kept adam, plain", (1, "sequential"), "never", True, "memory"),
    ("multilabel", [1, 2, 1], "proximal, clipped, two epochs", (4, "bounded 2"), "edge", False,
     "grpc"),
    ("segmentation", 1, "plain", (2, "pipelined"), "link", True, "memory"),
    ("segmentation", 2, PROXIMAL, (4, "sequential"), "edge", False, "memory"),
    ("next token", 3, "kept adam, plain", (3, "pipelined"), "edge", False, "tcp"),
    ("next token", 2, "momentum, decay, cosine", (2, "pipelined"), "link", True, "memory"),
    ("classes of tokens", 1, "momentum, decay, cosine", (2, "pipelined"), "link", False, "grpc"),
    ("next token", 2, "lora, kept adam", (2, "pipelined"), "edge", False, "tcp"),
    ("next token", 1, "lora, proximal, clipped", (1, "sequential"), "link", True, "memory"),
    ("padded words", 2, "lora, proximal, clipped", (3, "pipelined"), "never", False, "memory"),
    ("padded words", 2, "kept adam, plain", (3, "pipelined"), "edge", False, "tcp"),
    ("padded words", [1, 2, 2], "momentum, decay, cosine", (1, "sequential"), "link", True,
     "memory"),
    ("image and numbers", 1, "proximal, clipped, two epochs", (2, "pipelined"), "link", False,
     "grpc"),
    ("image and numbers", 2, PROXIMAL, (1, "sequential"), "never", False, "memory"),
    ("bert", 2, "momentum, decay, cosine", (3, "pipelined"), "edge", False, "memory"),
    ("bert of lists", 6, "kept adam, plain", (2, "pipelined"), "never", True, "tcp"),
    ("vit", [1, 2, 3], "kept adam, plain", (1, "sequential"), "never", False, "memory"),
    ("gpt of lists", 4, "proximal, clipped, two epochs", (3, "pipelined"), "link", False, "memory"),
    ("own loss", 1, "proximal, clipped, two epochs", (3, "bounded 2"), "edge", False, "memory"),
    ("own loss with a weight", 1, "plain", (4, "pipelined"), "never", True, "tcp"),
    ("next token", 2, "bf16", (3, "pipelined"), "link", False, "tcp"),
    ("next token", 2, "lora, bf16", (2, "pipelined"), "never", True, "memory"),
    ("segmentation", 1, BF16_CLIPPED, (2, "pipelined"), "edge", True, "memory"),
    ("padded words", [1, 2, 2], "bf16", (1, "sequential"), "never", False, "memory"),
    ("regression", 1, BF16_CLIPPED, (3, "pipelined"), "never", False, "tcp"),
    ("bert", 2, "bf16", (3, "pipelined"), "edge", False, "memory"),
    ("vit", [1, 2, 3], "bf16", (1, "sequential"), "never", True, "memory"),
]  # fmt: skip
KEPT = {"client": {"optimizer": "adam", "lr": 0.003, "keep_optimizer": True}}
LORA = {"train": "lora", "lora": {"rank": 2, "targets": ["qkv", "fc2"]}}
OF_OWN = {
    "kept adam, plain": KEPT,
    "lora, kept adam": merged(KEPT, {"client": LORA}),
    "lora, bf16": merged(KEPT, {"client": LORA | {"precision": "bf16"}}),
    "lora, proximal, clipped": merged(
        FEATURES["proximal, clipped, two epochs"],
        {"client": LORA | {"lora": {"rank": 3, "alpha": 1.0}}},
    ),
}


@pytest.fixture
def of_own(configure):
    """Return a function from data of a task, a feature and further values to a configuration."""

    def made(name, feature, *groups, **more):
        kind, data, model = OWN_DATA[name]
        values = dict((ALL_FEATURES | OF_OWN)[feature])
        strategy = values.pop("strategy", "fedavg")
        given = [f"data._target_=tests.own_work.{data}", "data.partition.min_examples=2"]
        if data == "Words":
            given.append("data.collate=tests.own_work.padded")
        if name in OWN_LOSSES:
            given.append(f"task.loss={{_target_:tests.own_work.{OWN_LOSSES[name]}}}")
        model = dict(model)
        given.append(f"model._target_={model.pop('_target_')}")
        given += [f"+model.{key}={value}" for key, value in model.items()]
        base = configure("data=own", "model=own", f"task={kind}", f"strategy={strategy}", *given,
                         *groups)  # fmt: skip
        common = {key: value for key, value in COMMON.items() if key != "data"}
        return parse(with_values(base.text, **merged(merged(common, values), more)))

    return made


@pytest.mark.parametrize("row", OWN_TABLE, ids=lambda row: f"{row[0]}@{row[1]}-{row[2]}")
def test_split_training_of_other_tasks_gives_the_bits_of_plain_training(
    row, of_own, carry_out, interrupt
):
    name, cut, feature, (pieces, schedule), interrupted, private, link = row
    expected = carry_out(of_own(name, feature, schedule={"micro_batches": pieces}))
    policy = {"policy": {"kind": "fixed", "cut": cut, "codec": "fp32", "micro_batches": None}}
    order = {"schedule": {**ordered(schedule), "micro_batches": pieces}}
    more = merged(merged(policy, order), {"client": {"label_private": private}})
    config = of_own(name, feature, **more, link={"kind": link}, num_edges=2)
    struck = interrupt(interrupted)
    got = carry_out(config)
    assert got.sha256 == expected.sha256
    assert bool(struck) == bool(got.figures["recoveries"]) == (interrupted != "never")
    assert not any(got.lost)
    for key in ("train_loss", f"train_{config.task.measure.name}", "steps", "examples"):
        found = [each[key] for each in got.rows]
        assert found == [each[key] for each in expected.rows]
        assert all(value == value for value in found)


@pytest.mark.parametrize("split", [False, True])
def test_adapters_alone_travel_and_learn(split, of_own, carry_out):
    """What does not learn is made by each machine itself, also the half of an edge server."""
    policy = {"policy": {"kind": "fixed", "cut": 2, "codec": "fp32"}, "num_edges": 1}
    told = carry_out(of_own("next token", "lora, kept adam", **(policy if split else {})))
    assert len(told.state) == 8  # of two layers in each of two blocks
    assert all(name.endswith((".lora_a", ".lora_b")) for name in told.state)
    assert all(told.state[n].any() for n in told.state if "lora_b" in n)  # which began as 0


def test_devices_that_move_with_several_inputs_train_the_bits_of_those_that_stay(of_own, carry_out):
    """What crosses beside the activation depends on the cut, and is sent again after a move."""
    pieces = {"schedule": {"kind": "pipelined", "micro_batches": 3}}
    expected = carry_out(of_own("padded words", "momentum, decay, cosine", **pieces))
    policy = {"kind": "fixed", "cut": 1, "codec": "fp32"}
    mobility = {"cut": 3}
    config = of_own("padded words", "momentum, decay, cosine", **pieces, policy=policy,
                    num_edges=3, mobility=mobility)  # fmt: skip
    moves = drawn(6, clients=3, rounds=2, edges=3, pieces=3, seed=5)
    got = carry_out(config, mobility=Listed(moves))
    assert got.sha256 == expected.sha256 and got.figures["moves"]
