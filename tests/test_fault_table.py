"""Whatever fails in split training costs time and never changes the model.

Each row is a fault; all rows of a table train the same configuration, whose model must be, to the
bit, that of the same run without faults and without edge servers.
"""

import pytest

from fedsys.faults import KINDS

SMALL = (
    "data.max_examples=200",
    "rounds=2",
    "num_clients=2",
    "client.epochs=1",
    "model.width=4",
    "model.hidden=16",
    "json=true",
)
SPLIT = ("policy=fixed", "policy.cut=0.3", "num_edges=2")


def fault(kind, position, **more):
    values = {"kind": kind, "who": 0, "round": 2, "step": 1, "position": position, **more}
    return "faults.list=[" + ",".join([f"{{{pairs(values)}}}"]) + "]"


def pairs(values):
    return ",".join(f"{key}:{'null' if value is None else value}" for key, value in values.items())


@pytest.fixture
def train(configure, carry_out):
    """Train without what a run folder needs."""
    return lambda *overrides: carry_out(configure(*SMALL, *overrides))


_undisturbed = {}


@pytest.fixture
def undisturbed(train):
    """Return the model of plain training, without edges and faults."""

    def model(*overrides):
        if overrides not in _undisturbed:
            _undisturbed[overrides] = train(*overrides).sha256
        return _undisturbed[overrides]

    return model


TABLE = [
    (kind, position)
    for kind, about in KINDS.items()
    if about.target in ("edge", "link")
    for position in about.positions
]


@pytest.mark.parametrize(("kind", "position"), TABLE)
def test_a_fault_does_not_change_the_model(kind, position, train, undisturbed):
    run = train(*SPLIT, fault(kind, position))
    assert run.sha256 == undisturbed()
    assert [f["fired"] for f in run.faults] == [True]
