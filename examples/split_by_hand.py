"""Split a model by hand and see that it is exact.

A small network learns handwritten digits twice: once whole, and once cut in two halves, as if the
first were on a device and the second on an edge server. Between the halves travel the activations
of a mini-batch one way, and their gradients back. Both ways give the same model, to the bit.

    python examples/split_by_hand.py
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsys.config import compose_text, parse
from fedsys.data import eval_batches, load, train_batches
from fedsys.identity import state_sha256
from fedsys.models import build, layered, split
from fedsys.randomness import Address
from fedsys.training import evaluate

config = parse(compose_text("data=digits model=cnn model.dropout=0"))
digits = load(config.data, seed=config.seed)


def new_model() -> nn.Module:
    """Return the network as it is before training: the same weights each time."""
    shape = digits.input_shape
    return build(config.model, input_shape=shape, num_classes=10, seed=config.seed)


def mini_batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images of one epoch, shuffled, 32 at a time, with their labels."""
    everyone = range(len(digits.train))
    yield from train_batches(digits.train, everyone, digits, 32, Address(0), epoch=0, first_step=0)


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of a model, or of one half: each side steps its own parameters."""
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


torch.set_num_threads(1)  # bits depend on it

whole = new_model()
optimizer = sgd(whole)
for images, labels in mini_batches():
    optimizer.zero_grad()
    F.cross_entropy(whole(images), labels).backward()
    optimizer.step()

layers = layered(new_model(), digits.input_shape)
print("units:", " → ".join(unit.name for unit in layers.units))
for cut in layers.cuts:
    layers = layered(new_model(), digits.input_shape)
    device, edge = split(layers, cut)
    device_optimizer, edge_optimizer = sgd(device), sgd(edge)
    sent = 0
    for images, labels in mini_batches():
        device_optimizer.zero_grad()
        edge_optimizer.zero_grad()
        activations = device(images)  # on the device …
        received = activations.detach().requires_grad_()  # … over the network …
        F.cross_entropy(edge(received), labels).backward()  # … on the edge server …
        activations.backward(received.grad)  # … and back
        device_optimizer.step()
        edge_optimizer.step()
        sent += 2 * received.nbytes
    halves = {**device.state_dict(), **edge.state_dict()}
    same = state_sha256(halves) == state_sha256(whole.state_dict())
    print(
        f"cut {cut}, behind {layers.units[cut - 1].name}: {sent / 1e6:.1f} MB travelled;", end=" "
    )
    print("the same model, to the bit" if same else "ANOTHER MODEL")

score = evaluate(whole, eval_batches(digits.test, digits, 500))
print(f"after one epoch it reads {score.accuracy:.1%} of {score.examples} unseen digits")
