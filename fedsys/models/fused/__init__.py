"""Units that compute in one pass: convolution, normalisation, ReLU and max pooling.

torch computes such a unit layer by layer, and each layer reads and writes tensors of the size of
the convolution's outputs. Where there are few input channels that costs several times what the
multiplications do. Here the unit is one kernel in C that writes the pooled outputs only, and one
that makes the gradients of all parameters from theirs::

    fusion = fusion_of(layers)           # which units of a chain fit, and why others do not
    fuse(stage, fusion)                  # the modules stay, the first one computes for all of them

The kernels are built on first use by the C compiler of the machine. Where there is none, or where
the input is not what they are made for, the unit's layers run as they are. The same unit gives the
same bits in the whole model and in a part of it, with any number of threads.
"""

from fedsys import TYPE_CHECKING, face

__all__ = ["Fusion", "built", "compiler", "fuse", "fusion_of"]

if TYPE_CHECKING:
    from fedsys.models.fused.building import built, compiler
    from fedsys.models.fused.matching import Fusion, fusion_of
    from fedsys.models.fused.unit import fuse
else:
    __getattr__, __dir__ = face(
        __name__,
        {"building": "built compiler", "matching": "Fusion fusion_of", "unit": "fuse"},
    )
