"""A set of flwr-datasets in a cache, as it is after it was loaded once from the network.

python -m tests.flwr_cache FOLDER
fedsys train data=flwr_datasets data.name=tests/mini data.cache=FOLDER json=true
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
from PIL import Image

NAME, SEEN, TEST = "tests/mini", 41, 9
KINDS = {
    "image": datasets.Image(),
    "label": datasets.ClassLabel(names=["even", "odd"]),
    "site": datasets.Value("string"),
    "age": datasets.Value("int32"),
    "mass": datasets.Value("float32"),
    "series": datasets.List(datasets.Value("float32")),
}


class _Mini(datasets.GeneratorBasedBuilder):  # the library makes caches of such classes alone
    VERSION = datasets.Version("0.0.0")

    def _info(self) -> Any:
        return datasets.DatasetInfo(features=datasets.Features(KINDS))

    def _split_generators(self, _: Any) -> list[Any]:
        return [
            datasets.SplitGenerator(name=name, gen_kwargs={"count": count})
            for name, count in (("train", SEEN), ("test", TEST))
        ]

    def _generate_examples(self, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for k in range(count):
            image = Image.fromarray(np.full((12, 12), k, np.uint8))
            row = (image, k % 2, f"s{k % 3}", k, k / 2, [float(k)] * (1 + k % 3))
            yield k, dict(zip(KINDS, row, strict=True))


def make(folder: str) -> str:
    """Make the cache in a folder, and return that."""
    datasets.disable_progress_bars()
    made = _Mini(cache_dir=folder, repo_id=NAME, dataset_name="mini", hash="0" * 16)
    made.download_and_prepare()
    return folder


if __name__ == "__main__":
    make(sys.argv[1])
