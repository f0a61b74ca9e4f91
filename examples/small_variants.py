"""Prune a trained model, and compare the small models that come out.

A network learns handwritten digits. Then ever more of its channels are pruned, and each pruned
network becomes a smaller one of ordinary dense layers that computes exactly the same. A short
training afterwards wins back most of what pruning has cost.

    python examples/small_variants.py
"""

import copy
import time

import torch
from torch import nn

from fedsys.config import compose_text, parse
from fedsys.data import eval_batches, load, train_batches
from fedsys.models import build
from fedsys.pruning import one_shot, shrink
from fedsys.randomness import Address
from fedsys.training import evaluate, make_optimizer, train

config = parse(compose_text("data=digits model=cnn model.width=32 model.dropout=0 client.lr=0.05"))
digits = load(config.data, seed=config.seed)


def learn(model: nn.Module, epochs: int) -> None:
    """Train a model on the digits."""
    everyone, address = range(len(digits.train)), Address(config.seed)
    optimizer = make_optimizer(model.parameters(), config.client, config.client.lr)
    for epoch in range(epochs):
        batches = train_batches(digits.train, everyone, digits, 32, address, epoch, first_step=0)
        train(model, optimizer, batches, address)


def accuracy(model: nn.Module) -> float:
    """Return the share of the unseen digits that a model reads."""
    return evaluate(model, eval_batches(digits.test, digits, 500)).accuracy


def milliseconds(model: nn.Module) -> float:
    """Return how long a model takes for 32 images, at best."""
    images, _ = next(eval_batches(digits.test, digits, 32))
    taken = []
    with torch.inference_mode():
        for _ in range(20):
            began = time.perf_counter()
            model(images)
            taken.append(time.perf_counter() - began)
    return 1e3 * min(taken)


torch.set_num_threads(1)
trained = build(config.model, input_shape=digits.input_shape, num_classes=10, seed=config.seed)
learn(trained, epochs=6)
trained.eval()
parameters = sum(p.numel() for p in trained.parameters())

print("pruned  parameters    time  reads   after 2 epochs more")
print(f"  none  {parameters:10,} {milliseconds(trained):5.2f} ms  {accuracy(trained):.1%}")
for share in (0.3, 0.45, 0.6):
    masks = one_shot("group_norm", trained, share, leave=["fc2"], keep_channels=1)
    masked = copy.deepcopy(trained)
    masks.apply(masked)
    small = shrink(masked, digits.input_shape, masks=masks)
    dense, before = small.model, accuracy(small.model)
    assert abs(before - accuracy(masked)) < 1e-9, "the small model computes what the masked one did"
    speed = milliseconds(dense)
    learn(dense, epochs=2)
    count = small.report.parameters
    print(f"  {share:4.0%}  {count:10,} {speed:5.2f} ms  {before:.1%}   {accuracy(dense):.1%}")
