"""From one trained model to a portfolio of small dense variants (DNNShifter).

`one_shot` masks weights of a model, `shrink` turns a masked model into a smaller dense one that
computes the same, and a `Portfolio` holds such variants with what each costs::

    masks = one_shot("magnitude_channel", model, 0.5)
    small = shrink(model, (3, 32, 32), masks=masks).model
"""

from fedsys import TYPE_CHECKING, face

__all__ = [
    "Made",
    "Portfolio",
    "Shrunk",
    "Variant",
    "export_onnx",
    "make",
    "one_shot",
    "shrink",
]

if TYPE_CHECKING:
    from fedsys.pruning.dense.shrink import Shrunk, shrink
    from fedsys.pruning.export import export_onnx
    from fedsys.pruning.making import Made, make
    from fedsys.pruning.portfolio import Portfolio, Variant
    from fedsys.pruning.sparsify import one_shot
else:
    __getattr__, __dir__ = face(
        __name__,
        {
            "dense.shrink": "Shrunk shrink",
            "export": "export_onnx",
            "making": "Made make",
            "portfolio": "Portfolio Variant",
            "sparsify": "one_shot",
        },
    )
