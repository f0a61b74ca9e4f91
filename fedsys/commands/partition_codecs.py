"""What a codec at the cuts does to the answers of a model, measured on images of ``data=``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fedsys.config import Config
from fedsys.data.loader import eval_batches
from fedsys.models.layers import layered, section
from fedsys.partition.finer_chain import finer_chain
from fedsys.partition.hosted_stage import tensors_of
from fedsys.partition.problem import Partition
from fedsys.training import federation
from fedsys.transport.codecs import decode_activations, encode_activations


def effect(config: Config, partition: Partition) -> Mapping[str, Any]:
    """Return what each codec at these cuts does to the answers.

    Args:
        config: Its model, data and ``partition.images`` count.
        partition: Where the model is cut.

    Returns:
        By codec: ``same_answers``, the share of images that get the same class, the largest
        difference of a score, ``accuracy``, and ``accuracy_alone`` of the model without cuts.

    """
    dataset = federation.federation(config).dataset
    examples = dataset.validation if len(dataset.validation) else dataset.train
    count = min(config.partition.images, len(examples))
    images, labels = next(eval_batches(examples, dataset, count))
    model = federation.build_model(config, dataset).eval()
    whole = layered(model, dataset.input_shape, fc_as_one=config.partition.fc_as_one)
    chain = finer_chain(config, whole, dataset.input_shape)
    used = [cut for cut in dict.fromkeys(partition.cuts) if 0 < cut < len(chain)]
    bounds = pairwise((0, *used, len(chain)))
    parts = [section(chain, first, last).eval() for first, last in bounds]
    with torch.inference_mode():
        alone = model(images)
        return {
            codec: _compared(alone, _through(parts, images, codec), labels)
            for codec in config.partition.codecs
        }


def _through(parts: Sequence[nn.Module], images: Tensor, codec: str) -> Tensor:
    values = tensors_of(parts[0](images), "the model")
    for part in parts[1:]:
        received = decode_activations(*encode_activations(values, codec))
        values = tensors_of(part(*received), "the model")
    return values[0]


def _compared(alone: Tensor, got: Tensor, labels: Tensor) -> dict[str, float]:
    return {
        "same_answers": float((alone.argmax(1) == got.argmax(1)).float().mean()),
        "max_difference": float((alone - got).abs().max()),
        "accuracy": float((got.argmax(1) == labels).float().mean()),
        "accuracy_alone": float((alone.argmax(1) == labels).float().mean()),
    }
