"""Partitioners: what must hold for every split, and the same marginals as flwr-datasets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsys.data import class_counts, partition, plot_class_counts
from fedsys.errors import ConfigError

TEN_CLASSES = np.repeat(np.arange(10), 200)


def split(labels, num_clients, seed=0, **spec):
    return partition(labels, num_clients, spec, seed=seed)


@st.composite
def cases(draw):
    num_clients = draw(st.integers(1, 12))
    least = draw(st.integers(1, 4))
    size = draw(st.integers(num_clients * least, 200))
    labels = np.array(draw(st.lists(st.integers(0, 4), min_size=size, max_size=size)))
    kind = draw(st.sampled_from(["iid", "dirichlet", "shards"]))
    alpha = draw(st.sampled_from([1e-300, 1e-3, 0.1, 1.0, 100.0, 1e9]))
    spec = {"kind": kind, "alpha": alpha, "shards_per_client": 1, "min_examples": least}
    return labels, num_clients, spec, draw(st.integers(0, 2**31))


@settings(deadline=None, max_examples=120)
@given(cases())
def test_a_partition_is_disjoint_complete_sorted_and_repeats(case):
    labels, num_clients, spec, seed = case
    parts = partition(labels, num_clients, spec, seed=seed)
    assert len(parts) == num_clients
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    assert all(part.dtype == np.int64 and np.all(np.diff(part) > 0) for part in parts)
    assert min(len(part) for part in parts) >= spec["min_examples"]
    again = partition(labels, num_clients, spec, seed=seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.integers(0, 5),
    st.integers(0, 2**31),
)
def test_fractions_are_kept_to_within_one_example(weights, others, seed):
    total = sum(weights) + (20 if others else 0)
    given_fractions = [weight / total for weight in weights]
    labels = np.arange(500) % 7
    num_clients = len(weights) + others
    parts = split(labels, num_clients, seed, kind="fractions", fractions=given_fractions)
    sizes = np.array([len(part) for part in parts])
    assert np.all(np.abs(sizes[: len(weights)] - np.array(given_fractions) * 500) <= 1.0)
    assert sizes.sum() == 500
    if others:
        assert np.ptp(sizes[len(weights) :]) <= 1
    assert len(np.unique(np.concatenate(parts))) == 500


def test_fractions_for_all_clients_leave_the_remainder_to_nobody():
    parts = split(TEN_CLASSES, 2, kind="fractions", fractions=[0.5, 0.25])
    assert [len(part) for part in parts] == [1000, 500]
    assert not np.intersect1d(*parts).size


@pytest.mark.parametrize("share", [0.2, 0.25, 0.5])
def test_one_client_holds_the_share_that_it_is_given(share):
    parts = split(TEN_CLASSES, 5, kind="fractions", fractions=[share])
    assert len(parts[0]) == share * 2000
    assert all(abs(len(part) - (1 - share) * 500) < 1 for part in parts[1:])


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "shards", "fractions"])
def test_another_seed_gives_another_partition(kind):
    one, other = (
        split(TEN_CLASSES, 4, seed, kind=kind, fractions=[0.25] * 4)[0] for seed in (1, 2)
    )
    assert not np.array_equal(one, other)


def test_tiny_alpha_and_many_clients_still_give_everyone_enough():
    labels = np.arange(20_000) % 10
    parts = split(labels, 2_000, kind="dirichlet", alpha=0.01, min_examples=5)
    assert min(len(part) for part in parts) == 5


def test_repair_leaves_clients_alone_that_nothing_is_missing_to_or_taken_from():
    free = split(TEN_CLASSES, 10, kind="dirichlet", alpha=0.5, min_examples=1)
    sizes = sorted(len(part) for part in free)
    least = sizes[0] + 3
    repaired = split(TEN_CLASSES, 10, kind="dirichlet", alpha=0.5, min_examples=least)
    assert sum(np.array_equal(a, b) for a, b in zip(free, repaired, strict=True)) >= 7


@pytest.mark.parametrize(
    ("num_clients", "spec", "argument"),
    [
        (2001, {"kind": "iid"}, "num_clients=2001"),
        (201, {"kind": "dirichlet", "min_examples": 10}, "num_clients=201"),
        (0, {"kind": "iid"}, "num_clients=0"),
        (True, {"kind": "iid"}, "num_clients=True"),
        (2, {"kind": "dirichlet", "alpha": 0.0}, "data.partition.alpha=0.0"),
        (2, {"kind": "dirichlet", "alpha": -1}, "data.partition.alpha=-1"),
        (2, {"kind": "dirichlet", "alpha": float("nan")}, "data.partition.alpha=nan"),
        (2, {"kind": "dirichlet", "alpha": float("inf")}, "data.partition.alpha=inf"),
        (2, {"kind": "dirichlet", "alpha": "low"}, "data.partition.alpha=low"),
        (2, {"kind": "iid", "min_examples": 0}, "data.partition.min_examples=0"),
        (2, {"kind": "shards", "shards_per_client": 0}, "data.partition.shards_per_client=0"),
        (2, {"kind": "shards", "shards_per_client": 1001}, "shards_per_client=1001"),
        (2, {"kind": "fractions"}, "data.partition.fractions=None"),
        (2, {"kind": "fractions", "fractions": []}, "data.partition.fractions=[]"),
        (2, {"kind": "fractions", "fractions": [0.7, 0.4]}, "must sum to at most 1, not 1.1"),
        (2, {"kind": "fractions", "fractions": [-0.1]}, "data.partition.fractions=[-0.1]"),
        (2, {"kind": "fractions", "fractions": [0.1, "x"]}, "data.partition.fractions"),
        (2, {"kind": "fractions", "fractions": [0.1] * 3}, "at most one fraction for each of 2"),
        (2, {"kind": "fractions", "fractions": [1.0]}, "leaves 0 for client 1"),
        (2, {"kind": "fractions", "fractions": [0.0001]}, "leaves 0 for client 0"),
        (2, {"kind": "dirichle"}, "did you mean 'dirichlet'?"),
    ],
)
def test_an_unusable_option_is_named_in_one_line(num_clients, spec, argument):
    with pytest.raises(ConfigError) as caught:
        partition(TEN_CLASSES, num_clients, spec, seed=0)
    assert argument in str(caught.value)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------
# Beside flwr-datasets


def theirs(make, labels):
    """Class counts of a partitioner of flwr-datasets, shape (clients, classes)."""
    import datasets

    make.dataset = datasets.Dataset.from_dict({"label": labels.tolist()})
    rows = [
        np.bincount(make.load_partition(k)["label"], minlength=labels.max() + 1)
        for k in range(make.num_partitions)
    ]
    return np.array(rows)


def ours(labels, num_clients, seed=0, **spec):
    parts = split(labels, num_clients, seed, **spec)
    return class_counts(labels, parts, int(labels.max()) + 1)


@pytest.mark.parametrize(("size", "num_clients"), [(100, 7), (103, 10), (64, 64)])
def test_iid_sizes_are_those_of_flwr_datasets(size, num_clients):
    from flwr_datasets.partitioner import IidPartitioner

    labels = np.arange(size) % 3
    assert (
        ours(labels, num_clients, kind="iid").sum(axis=1).tolist()
        == theirs(IidPartitioner(num_partitions=num_clients), labels).sum(axis=1).tolist()
    )


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_dirichlet_is_as_uneven_as_that_of_flwr_datasets(alpha):
    from flwr_datasets.partitioner import DirichletPartitioner

    def second_moment(all_counts):
        """Mean square of the share of a class that a client holds."""
        return float(np.mean([(counts / counts.sum(axis=0)) ** 2 for counts in all_counts]))

    def variance_of_sizes(all_counts):
        return float(np.mean([(counts.sum(axis=1) - 800) ** 2 for counts in all_counts]))

    clients, classes, labels = 5, 40, np.repeat(np.arange(40), 100)
    spec = {"kind": "dirichlet", "alpha": alpha, "min_examples": 1}
    mine = [ours(labels, clients, seed, **spec) for seed in range(200)]
    other = [
        theirs(DirichletPartitioner(clients, "label", alpha, seed=s), labels) for s in range(4)
    ]
    # Closed form: a share is Beta(α, (K - 1) α) distributed, independently for each class.
    variance = (clients - 1) / (clients**2 * (clients * alpha + 1))
    assert second_moment(mine) == pytest.approx(variance + 1 / clients**2, rel=0.03)
    assert second_moment(other) == pytest.approx(variance + 1 / clients**2, rel=0.1)
    assert variance_of_sizes(mine) == pytest.approx(classes * variance * 100**2, rel=0.1)
    assert variance_of_sizes(other) == pytest.approx(classes * variance * 100**2, rel=0.5)


# datasets calls pyarrow in a way that pyarrow 25 deprecates; nothing of it is ours.
@pytest.mark.filterwarnings("ignore:Specifying null_placement in SortOptions:FutureWarning")
def test_shards_hold_as_much_and_as_few_classes_as_those_of_flwr_datasets():
    from flwr_datasets.partitioner import ShardPartitioner

    mine = ours(TEN_CLASSES, 10, kind="shards", shards_per_client=2)
    other = theirs(
        ShardPartitioner(10, "label", num_shards_per_partition=2, shard_size=100), TEN_CLASSES
    )
    for counts in (mine, other):
        assert counts.sum(axis=1).tolist() == [200] * 10
        assert np.all((counts > 0).sum(axis=1) <= 2)
        assert np.all(counts % 100 == 0)


# --------------------------------------------------------------------------------------------------
# Class counts


def test_class_counts_count_every_example_once():
    parts = split(TEN_CLASSES, 6, kind="dirichlet", alpha=0.3)
    counts = class_counts(TEN_CLASSES, parts, 11)
    assert counts.shape == (6, 11)
    assert counts.sum(axis=0).tolist() == [200] * 10 + [0]
    assert counts.sum(axis=1).tolist() == [len(part) for part in parts]


@pytest.mark.parametrize(("clients", "kinds"), [(1, 2), (3, 10), (100, 100)])
def test_the_plot_of_class_counts_is_a_png(tmp_path, clients, kinds):
    labels = np.arange(1000) % kinds
    counts = ours(labels, clients, kind="dirichlet")
    names = ["$\\broken$", *(f"class {k}" for k in range(1, kinds))]
    plot_class_counts(counts, names, tmp_path / "counts.png")
    assert (tmp_path / "counts.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
