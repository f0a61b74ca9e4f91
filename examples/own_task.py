"""A model, data and a loss of one's own: trained plainly, split, planned and pruned.

python examples/own_task.py
"""

import torch
from torch import nn
from torch.utils.data import TensorDataset

import fedsys

x = torch.rand(600, 8, generator=torch.Generator().manual_seed(0))
data = TensorDataset(x, torch.sin(6 * x[:, 0]) + x[:, 1] * x[:, 2])
model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Count large errors more than small ones, but less than their squares would."""
    return (outputs - targets).abs().pow(1.5).mean()


own = {"model": model, "data": data, "loss": loss}
asked = ("task=regression", "num_clients=4", "rounds=3", "client.lr=0.1")
plain = fedsys.train(*asked, **own)
split = fedsys.train(*asked, "policy=fixed", "policy.cut=0.5", **own)
pruned = fedsys.train(*asked, "pruning=magnitude", "pruning.steps=1", **own)
plan = fedsys.plan(*asked, "fleet=pi_lab", "network=wifi", model=model, data=data)
same = plain.figures["model_sha256"] == split.figures["model_sha256"]
print(f"split: {'the same model, to the bit' if same else 'ANOTHER MODEL'}; {plan.why}")
print(f"error {plain.figures['mae']:.3f}; {plain.model(x[:1]).item():.3f} for {data[0][1]:.3f}")
print(
    f"error {pruned.figures['mae']:.3f}, {pruned.history[-1]['sparsity']:.0%} of the weights pruned"
)
