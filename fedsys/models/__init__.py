"""Models: the forms that the papers train, every torchvision classifier, and the user's own.

``build`` makes a model from the `model` group of the configuration, with weights that depend on the
seed alone; ``skeleton`` makes the same model without weights. A constructor is any callable that
returns a module; it may ask for `input_shape` (channels, height, width) and `num_classes`::

    spec = {"_target_": "fedsys.models.vgg.vgg5", "norm": "group", "init": None}
    model = build(spec, input_shape=(3, 32, 32), num_classes=10, seed=1)

``layered`` sees a model as a chain of units, and ``split`` cuts it into halves that compute what
the whole computes::

    layers = layered(model, (3, 32, 32))
    device, edge = split(layers, layers.cuts[0])

The project's own models are chains (`nn.Sequential`) of named units with one tensor between two
units, without in-place operations and without control flow on tensors, so that they can be traced,
cut, pruned and skipped unit by unit.
"""

from fedsys import TYPE_CHECKING, face

__all__ = [
    "LayeredModel",
    "build",
    "convert_norm",
    "fractions",
    "layered",
    "resolve_cut",
    "skeleton",
    "split",
    "torchvision_classifier",
    "torchvision_names",
    "trace",
]

if TYPE_CHECKING:
    from fedsys.models.catalog import torchvision_classifier, torchvision_names
    from fedsys.models.construct import build, skeleton
    from fedsys.models.graph import trace
    from fedsys.models.layers import LayeredModel, fractions, layered, resolve_cut, split
    from fedsys.models.norm import convert_norm
else:
    __getattr__, __dir__ = face(
        __name__,
        {
            "catalog": "torchvision_classifier torchvision_names",
            "construct": "build skeleton",
            "graph": "trace",
            "layers": "LayeredModel fractions layered resolve_cut split",
            "norm": "convert_norm",
        },
    )
