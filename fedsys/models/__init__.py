"""Models: the forms that the papers train, every torchvision classifier, and the user's own.

``build`` makes a model from the `model` group of the configuration, with weights that depend on the
seed alone; ``skeleton`` makes the same model without weights. A constructor is any callable that
returns a module; it may ask for `input_shape` (channels, height, width) and `num_classes`::

    spec = {"_target_": "fedsys.models.vgg.vgg5", "norm": "group", "init": None}
    model = build(spec, input_shape=(3, 32, 32), num_classes=10, seed=1)

The project's own models are chains (`nn.Sequential`) of named units with one tensor between two
units, without in-place operations and without control flow on tensors, so that they can be traced,
cut, pruned and skipped unit by unit.
"""

from fedsys.models.catalog import torchvision_classifier, torchvision_names
from fedsys.models.construct import build, skeleton
from fedsys.models.norm import convert_norm

__all__ = ["build", "convert_norm", "skeleton", "torchvision_classifier", "torchvision_names"]
