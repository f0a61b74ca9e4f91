"""Codecs at the cut: error, bytes, speed, and the accuracy of training with each.

The tensors are what crosses each cut of the model for one mini-batch of the data: the activation,
and the gradient that comes back. Of each the largest error of an element is given as a share of the
bound that `fedsys.transport.codecs` states for it (above 1, the statement would be wrong), and the
root of the mean squared error beside that of the tensor itself. Rates are in bytes of the tensor
as it is in memory, so that codecs compare; a frame is not part of them (``fedsys bench link``).
Behind a ReLU the gradient is given without what that makes zero, too, and what that costs; the
model is new, and a trained one has other shares.

Then the run of the configuration is carried out with each codec and seed. Data, order, draws and
initial weights of a seed are the same for all codecs, so the differences are the codec's alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from torch import Tensor

from fedsys import data, runtime
from fedsys.commands.bench import Chart
from fedsys.config import Config, parse, with_values
from fedsys.models.layers import layered, split
from fedsys.models.rectified import is_rectified
from fedsys.randomness import Address, drawing
from fedsys.runs.folder import RunFolder
from fedsys.training import federation
from fedsys.training import plain as training
from fedsys.training.part import safe_input
from fedsys.training.tasks import loss_of
from fedsys.transport.codecs import LEAST_PER_SCALE, decode_activation, encode_activation
from fedsys.transport.nonzeros import Nonzeros


def run(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the codecs, then train with each.

    Args:
        config: The run that is carried out with each codec; ``policy`` says where it is cut.
        options: ``codecs``, ``turns`` of encoding and decoding, ``seeds`` of the trainings.

    Returns:
        ``cases``: per codec, cut and direction ``of_bound`` (largest error by its bound; None for
        fp32, which has none), ``relative_rms``, ``bytes``, ``of_fp32``, ``encode_mb_s`` and
        ``decode_mb_s`` (10^6 bytes); of gradients behind a ReLU also ``without_zeros``: the
        ``bytes`` that are left, and medians of milliseconds in which the device writes the
        activation, as usual (``plain_ms``) and with what is needed here (``mark_ms``), the edge
        chooses elements (``choose_ms``), and the device finds their places and fills in zeros
        (``fill_ms``). ``trainings``: per codec and seed the accuracy on the test part and the bytes
        that crossed the cut. ``accuracy``: per codec the mean, and the mean of its differences to
        fp32 with the smallest and the largest, in points.
    """
    training.set_threads(config.client.threads)
    turns = int(options["turns"])
    cases = [
        _case(codec, cut, direction, tensor, turns) | _without_zeros(codec, tensor, front, turns)
        for cut, direction, tensor, front in _crossing(config)
        for codec in options["codecs"]
    ]
    trainings = [
        _trained(config, codec, int(seed))
        for seed in options["seeds"]
        for codec in options["codecs"]
    ]
    return {
        "cases": cases,
        "trainings": trainings,
        "accuracy": _summary(trainings),
        "model": str(config.model["_target_"]).rpartition(".")[2],
        "data": str(config.data.get("source")),
        "rounds": config.rounds,
        "batch_size": config.client.batch_size,
    }


# --------------------------------------------------------------------------------------------------
# Tensors


def _crossing(config: Config) -> Iterator[tuple[str, str, Tensor, Tensor | None]]:
    """Yield what crosses each cut: the unit before it, the direction, the tensor.

    Of a gradient also the activation, where it needs none at zeros of that.
    """
    dataset = federation.federation(config).dataset
    layers = layered(federation.build_model(config, dataset).train(), dataset.input_shape)
    address, size = Address(config.seed, 0, 1), config.client.batch_size
    some = np.arange(min(size, len(dataset.train)), dtype=np.int64)
    x, y = next(data.train_batches(dataset.train, some, dataset, size, address, 0, 0))
    for cut in layers.cuts:
        front, back = split(layers, cut)
        with drawing(address, 0, len(y)):
            activation = front(x)
            inner = activation.detach().requires_grad_()
            loss = loss_of(back(safe_input(back, inner)), y, 1.0)
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no type for it
        name = layers.units[cut - 1].name
        yield name, "activation", activation.detach(), None
        assert inner.grad is not None  # every cut has weights behind it
        zeros = inner.detach() if is_rectified(layers, cut) else None
        yield name, "gradient", inner.grad, zeros


def _case(codec: str, cut: str, direction: str, x: Tensor, turns: int) -> dict[str, Any]:
    tensors, meta = encode_activation(x, codec)
    got = decode_activation(tensors, meta).double()
    error, exact = (got - x.double()).abs(), x.double()
    size = sum(tensor.nbytes for tensor in tensors.values())
    encode = _seconds(lambda: encode_activation(x, codec), turns)
    decode = _seconds(lambda: decode_activation(tensors, meta), turns)
    bound = _bound(exact, codec)
    return {
        "codec": codec,
        "cut": cut,
        "direction": direction,
        "of_bound": None if bound is None else round(float((error / bound).max()), 4),
        "relative_rms": float(error.square().mean().sqrt() / exact.square().mean().sqrt()),
        "bytes": size,
        "of_fp32": round(size / x.nbytes, 4),
        "encode_mb_s": round(x.nbytes / encode / 1e6, 1),
        "decode_mb_s": round(x.nbytes / decode / 1e6, 1),
    }


def _without_zeros(
    codec: str, gradient: Tensor, activation: Tensor | None, turns: int
) -> dict[str, Any]:
    """Return what is left of a gradient that is not needed at zeros, and what that costs."""
    if activation is None:
        return {}
    sent = encode_activation(activation, codec, mark=True)[0]["x"]
    written, _ = encode_activation(gradient, codec)
    x, size = written["x"], sum(tensor.nbytes for tensor in written.values())
    found = Nonzeros(sent).of(x)
    if found is None:
        return {"without_zeros": {"bytes": size}}
    timed = {
        "plain_ms": lambda: encode_activation(activation, codec),
        "mark_ms": lambda: encode_activation(activation, codec, mark=True),
        "choose_ms": lambda: Nonzeros(sent).of(x),
        "fill_ms": lambda: Nonzeros(sent).filled(*found),
    }
    took = {name: round(1e3 * _seconds(work, turns), 3) for name, work in timed.items()}
    return {"without_zeros": {"bytes": size - x.nbytes + found[0].nbytes, **took}}


def _bound(x: Tensor, codec: str) -> Tensor | None:
    """Return the error that `fedsys.transport.codecs` states for each element; None for fp32."""
    match codec:
        case "fp16":
            return (x.abs() * 2**-11).clamp(min=2**-25)
        case "bf16":
            return x.abs() * 2**-8 + 2**-133
        case "int8":
            own = x.dim() > 1 and x.numel() >= LEAST_PER_SCALE * x.shape[1]
            others = [d for d in range(x.dim()) if d != 1 or not own]
            return x.abs().amax(others, keepdim=True) / 127 * (0.5 + 2**-15) + 2e-36
    return None


def _seconds(work: Callable[[], object], turns: int) -> float:
    """Return the median of the times that `work` takes."""
    took = []
    for _ in range(turns + 1):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return median(took[1:])


# --------------------------------------------------------------------------------------------------
# Trainings


def _trained(config: Config, codec: str, seed: int) -> dict[str, Any]:
    folder = Path(str(config.run.dir)) / f"{codec}-{seed}"
    more = {"policy": {"codec": codec}, "seed": seed, "run": {"dir": str(folder), "plots": False}}
    found = runtime.run(parse(with_values(config.text, **more)))
    result = found or RunFolder.open(folder).info["result"]
    return {
        "codec": codec,
        "seed": seed,
        "accuracy": result["accuracy"],
        "bytes_up": result["bytes_up"],
        "bytes_down": result["bytes_down"],
        "model_sha256": result["model_sha256"],
    }


def _summary(trainings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    exact = {row["seed"]: row["accuracy"] for row in trainings if row["codec"] == "fp32"}
    rows = []
    for codec in dict.fromkeys(row["codec"] for row in trainings):
        own = {row["seed"]: row["accuracy"] for row in trainings if row["codec"] == codec}
        apart = [100 * (own[seed] - exact[seed]) for seed in own if seed in exact]
        rows.append(
            {
                "codec": codec,
                "accuracy": mean(own.values()),
                "points_to_fp32": round(mean(apart), 3) if apart else None,
                "least": round(min(apart), 3) if apart else None,
                "most": round(max(apart), 3) if apart else None,
                "seeds": len(own),
            }
        )
    return rows


def chart(figures: Mapping[str, Any]) -> Chart:
    """Return the bytes of each codec at the first cut, and the accuracy of training with it."""
    first = figures["cases"][0]["cut"] if figures["cases"] else ""
    rows = [r for r in figures["cases"] if r["cut"] == first and r["direction"] == "activation"]
    accuracy = {row["codec"]: row["accuracy"] for row in figures["accuracy"]}
    return Chart(
        "Codecs at the cut",
        "codec",
        "share",
        [row["codec"] for row in rows],
        {
            "bytes, fp32 = 1": [row["of_fp32"] for row in rows],
            "accuracy": [accuracy.get(row["codec"], float("nan")) for row in rows],
        },
    )
