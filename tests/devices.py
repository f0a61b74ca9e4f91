"""Devices of sessions that `last_layer` describes, which train mini-batches made by hand."""

import torch

from fedsys.offload.remote import Remote
from fedsys.offload.session import Session
from fedsys.transport.addresses import dial


def device(edges, name="s"):
    """Return the device of a session that is at one of some edge servers."""
    return Remote([e.address for e in edges.values()], name, f"token of {name}", dial)


def send(remote, layer, step):
    frame = layer.activation(step)
    meta = {k: v for k, v in frame.meta.items() if k not in ("step", "piece")}
    remote.send("activation", step, 0, meta, frame.tensors)


def train(remote, layer, steps):
    for step in steps:
        send(remote, layer, step)
        assert remote.receive("activation", step, 0).kind == "gradient"


def is_trained(layer, snapshot, steps):
    """Return whether a session is where undisturbed training would be, to the bit."""
    alone = Session(layer.spec(), layer.start(), torch.device("cpu"))
    for step in range(steps):
        list(alone.handle(layer.activation(step)))
    expected = alone.snapshot().state
    got = snapshot.state
    same = got.keys() == expected.keys() and all(torch.equal(got[n], expected[n]) for n in got)
    return snapshot.step == steps and same
