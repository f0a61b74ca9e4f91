"""pfl-research as its own examples use it, for `fedsys.commands.bench.simulators`.

``python simulators_pfl.py WORK`` reads ``WORK/work.json`` and its arrays, and trains with
federated averaging: a `FederatedDataset` of users, `SimulatedBackend`, `PyTorchModel`, and where
``PFL_WORKER_ADDRESSES`` names several processes, pfl's own sums over them (gloo). It is a program
by itself, so that its process holds nothing of fedsys but the code of the model.

It speaks by lines of JSON: one on standard output when it is ready and one after each round, which
begins when a line comes on standard input.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch


def main(folder: Path) -> None:
    """Train for the rounds of a work, each when it is asked for."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # pfl prints the metrics of each round
    work = json.loads((folder / "work.json").read_text())
    torch.set_num_threads(1)
    np.random.seed(work["seed"])  # pfl draws its users by it, alike in all processes
    model = _model(work)
    pfl = importlib.import_module  # no dependency: it is installed for the benchmark
    algorithm = pfl("pfl.algorithm.federated_averaging").FederatedAveraging()
    params = pfl("pfl.algorithm.base").NNAlgorithmParams(
        central_num_iterations=work["rounds"],
        evaluation_frequency=1 << 30,  # of the first round alone
        train_cohort_size=work["cohort"],
        val_cohort_size=0,
    )
    steps = pfl("pfl.hyperparam").NNTrainHyperParams(
        local_num_epochs=work["epochs"],
        local_learning_rate=work["lr"],
        local_batch_size=work["batch_size"],
    )
    users = _users(work, folder)
    whole = pfl("pfl.model.pytorch").PyTorchModel(
        model,
        lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=work["momentum"]),
        torch.optim.SGD(model.parameters(), lr=1.0),
    )

    backend = pfl("pfl.aggregate.simulate").SimulatedBackend(training_data=users, val_data=users)
    algorithm.run(
        params,
        backend,
        whole,
        steps,
        callbacks=[_gate(work, folder, out)],
        send_metrics_to_platform=False,
    )


def _gate(work: dict[str, Any], folder: Path, out: TextIO) -> Any:
    """Return the callback that tells that a round is over, and waits until one is asked for."""
    nothing = importlib.import_module("pfl.metrics").Metrics
    base: Any = importlib.import_module("pfl.callback.base").TrainingProcessCallback

    def say(**told: Any) -> None:
        out.write(json.dumps(told) + "\n")
        out.flush()

    class Gate(base):  # type: ignore[misc]
        def on_train_begin(self, *, model: Any) -> Any:
            say(parameters=sum(p.numel() for p in model.pytorch_model.parameters()))
            sys.stdin.readline()
            return nothing()

        def after_central_iteration(
            self, aggregate_metrics: Any, model: Any, *, central_iteration: int
        ) -> Any:
            del aggregate_metrics
            say(round=central_iteration + 1, loss=_loss(model.pytorch_model, work, folder))
            if central_iteration + 1 < work["rounds"]:
                sys.stdin.readline()
            return False, nothing()

    return Gate()


def _model(work: dict[str, Any]) -> torch.nn.Module:
    """Return the model of the run from the same draws, with what pfl asks of one."""
    from fedsys.models.construct import build

    shape = tuple(work["shape"])
    inner = build(work["model"], input_shape=shape, num_classes=work["classes"], seed=work["seed"])

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner
            self.forward = inner.forward

        def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            self.train()
            return torch.nn.functional.cross_entropy(self.inner(x), y)

        @torch.no_grad()
        def metrics(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
            self.eval()
            weighted = importlib.import_module("pfl.metrics").Weighted
            loss = torch.nn.functional.cross_entropy(self.inner(x), y, reduction="sum")
            return {"loss": weighted(loss.item(), len(y))}

    return Model()


def _arrays(folder: Path, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, labels = (np.load(folder / f"{part}_{what}.npy") for what in ("pixels", "labels"))
    return torch.from_numpy(pixels), torch.from_numpy(labels)


def _normal(pixels: torch.Tensor, work: dict[str, Any]) -> torch.Tensor:
    mean, std = (torch.tensor(work[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return pixels.float().div_(255).sub_(mean).div_(std)


def _users(work: dict[str, Any], folder: Path) -> Any:
    """Return all users; the pixels of one are made numbers when it trains, as on our side."""
    made = importlib.import_module("pfl.data.dataset").Dataset
    federated = importlib.import_module("pfl.data").FederatedDataset
    pixels, labels = _arrays(folder, "train")
    parts = torch.from_numpy(np.load(folder / "parts.npy"))

    def dataset(user: int) -> Any:
        own = parts[user]
        inputs = _normal(pixels[own], work)
        return made(raw_data=[inputs, labels[own]], user_id=str(user))

    get = importlib.import_module("pfl.data.sampling").get_user_sampler
    return federated(dataset, get("minimize_reuse", list(range(len(parts)))))


@torch.no_grad()
def _loss(model: torch.nn.Module, work: dict[str, Any], folder: Path) -> float:
    """Return the loss of the global model on the few examples on which rounds are judged."""
    pixels, labels = _arrays(folder, "validation")
    model.eval()
    return float(torch.nn.functional.cross_entropy(model(_normal(pixels, work)), labels))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
