"""Data: named sources of labelled images, their split over clients, and mini-batches.

`load` reads a data set whole into uint8 tensors, `partition` deals the indices of its training
part to the clients, and `train_batches` turns the indices of one client into normalised and
augmented mini-batches. Everything drawn is a function of the seed and an address
(`fedsys.randomness`), so a partition or an epoch repeats bit for bit wherever it is asked for.
"""

from fedsys import TYPE_CHECKING, face

__all__ = [
    "Dataset",
    "Images",
    "class_counts",
    "drawn_batches",
    "eval_batches",
    "load",
    "partition",
    "plot_class_counts",
    "train_batches",
    "write_class_counts",
]

if TYPE_CHECKING:
    from fedsys.data.counts import class_counts, plot_class_counts, write_class_counts
    from fedsys.data.dataset import Dataset, Images
    from fedsys.data.loader import drawn_batches, eval_batches, train_batches
    from fedsys.data.partitioners import partition
    from fedsys.data.sources import load
else:
    __getattr__, __dir__ = face(
        __name__,
        {
            "counts": "class_counts plot_class_counts write_class_counts",
            "dataset": "Dataset Images",
            "loader": "drawn_batches eval_batches train_batches",
            "partitioners": "partition",
            "sources": "load",
        },
    )
