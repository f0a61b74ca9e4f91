from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fedsys.errors import ConfigError, ModelError
from fedsys.pruning.dense import architecture
from fedsys.pruning.dense.shrink import shrink
from fedsys.pruning.portfolio import (
    MANIFEST,
    PARENT,
    About,
    Latency,
    Portfolio,
    Variant,
    _digest,
    run,
)
from fedsys.pruning.precision import halved, int8
from fedsys.randomness import seeded_default_generator

ABOUT = About(
    model={"_target_": "fedsys.models.small.cnn"},
    classes=("cat", "dog", "frog"),
    input_shape=(3, 8, 8),
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.2, 0.1),
)


def dense(seed: int = 0, width: int = 6) -> fx.GraphModule:
    with seeded_default_generator(seed):
        net = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(width * 4, 3),
        )
    return shrink(net, (3, 8, 8)).model


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def variant(name: str, accuracy: float = 0.5, p50_ms: float = 2.0, **more: object) -> Variant:
    latencies = (Latency(1, 1, p50_ms, p50_ms + 1.0, 30), Latency(16, 1, p50_ms * 9, 30.0, 30))
    return dataclasses.replace(Variant(name, accuracy, 9, 9, 0, 9, latencies), **more)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pairs = [
        (variant("small", 0.5, 1.0, channels=(("0", 6, 4),)), dense(1, 4)),
        (variant(PARENT, 0.75), dense(0)),
        (variant("fast", 0.5, 0.5), dense(2, 3)),
    ]
    Portfolio.write(tmp_path / "portfolio", ABOUT, pairs)
    return tmp_path / "portfolio"


def test_a_portfolio_is_loaded_as_it_was_written_the_most_accurate_variant_first(
    folder: Path,
) -> None:
    portfolio = Portfolio.load(folder)
    assert [v.name for v in portfolio.variants] == [PARENT, "fast", "small"]
    assert portfolio.about == ABOUT
    assert portfolio.parent.accuracy == 0.75
    small = portfolio.variant("small")
    assert small.channels == (("0", 6, 4),)
    assert small.p50_ms == 1.0 and small.latency(16, 1) == Latency(16, 1, 9.0, 30.0, 30)
    assert small.latency(16, 2) is None
    files = (folder / "variants" / "small").iterdir()
    assert small.bytes == sum(file.stat().st_size for file in files)
    for name, seed, width in ((PARENT, 0, 6), ("small", 1, 4), ("fast", 2, 3)):
        module = portfolio.module(name)
        assert not module.training
        assert torch.equal(run(module, images()), run(dense(seed, width), images()))


@pytest.mark.parametrize("file", ["weights.safetensors", "architecture.json", MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_damaged_file_is_refused_by_its_name(folder: Path, file: str, damage: str) -> None:
    path = folder / file if file == MANIFEST else folder / "variants" / "small" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    if damage != "missing":
        path.write_bytes(content if damage == "flip" else content[:-30])
    with pytest.raises(ModelError, match=f"{path}"):
        Portfolio.load(folder)


def test_the_folder_of_fedsys_prune_is_read_as_its_portfolio(folder: Path, tmp_path: Path) -> None:
    """``fedsys serve`` took what ``fedsys prune`` prints, and ``fedsys partition`` refused it."""
    shutil.copytree(folder, tmp_path / "run" / "portfolio")
    assert Portfolio.load(tmp_path / "run").variants == Portfolio.load(folder).variants


def test_damage_after_loading_is_found_when_the_variant_is_read(folder: Path) -> None:
    portfolio = Portfolio.load(folder)
    (folder / "variants" / "small" / "weights.safetensors").write_bytes(b"other")
    with pytest.raises(ModelError, match=r"weights.safetensors is damaged"):
        portfolio.module("small")


@pytest.mark.parametrize(
    "key, value",
    [
        ("name", "../../etc"),
        ("name", PARENT),
        ("precision", "int3"),
        ("files", {"weights.safetensors": "0"}),
        ("accuracy", "high"),
        ("params", -1),
        ("latencies", [{"batch": 1}]),
    ],
)
def test_a_manifest_that_says_something_impossible_is_refused(
    folder: Path, key: str, value: object
) -> None:
    body = json.loads((folder / MANIFEST).read_bytes())
    del body["sha256"]
    body["variants"][1][key] = value
    (folder / MANIFEST).write_text(json.dumps({"sha256": _digest(body), **body}))
    with pytest.raises(ModelError, match="does not describe a portfolio"):
        Portfolio.load(folder)


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no portfolio: .* make one by fedsys prune"):
        Portfolio.load(tmp_path)
    (tmp_path / MANIFEST).write_text('{"format": "of something else"}')
    with pytest.raises(ModelError, match="is not of the format fedsys-portfolio-1"):
        Portfolio.load(tmp_path)


def test_a_portfolio_is_not_written_over_another(folder: Path) -> None:
    with pytest.raises(ConfigError, match="must not hold a portfolio yet"):
        Portfolio.write(folder, ABOUT, [(variant(PARENT), dense())])


def test_unknown_variants_and_names_of_no_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"variant=smal: must be .*did you mean 'small'"):
        Portfolio.load(folder).variant("smal")
    with pytest.raises(ConfigError, match="variant=a/b: must be of letters"):
        Portfolio.write(tmp_path / "new", ABOUT, [(variant("a/b"), dense())])


@pytest.mark.parametrize("precision, near", [("bfloat16", 2e-2), ("float16", 2e-3)])
def test_fewer_bits_are_saved_as_data_and_compute_nearly_the_same(
    precision: str, near: float, tmp_path: Path
) -> None:
    model = dense()
    pairs = [
        (variant(PARENT), model),
        (variant("half", precision=precision), halved(model, precision)),
    ]
    portfolio = Portfolio.write(tmp_path / "p", ABOUT, pairs)
    got, expected = run(portfolio.module("half"), images()), run(model, images())
    assert got.dtype is torch.float32
    assert not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=0, atol=near)
    assert portfolio.variant("half").bytes < portfolio.parent.bytes


def test_int8_is_an_onnx_file_that_computes_nearly_the_same(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = dense()
    small = int8(model, [images(32), images(16)])
    pairs = [(variant(PARENT), model), (variant("int8", precision="int8"), small)]
    portfolio = Portfolio.write(tmp_path / "p", ABOUT, pairs)
    for count in (1, 5):
        got, expected = run(portfolio.module("int8"), images(count)), run(model, images(count))
        assert not torch.equal(got, expected)
        torch.testing.assert_close(got, expected, rtol=0, atol=0.1)
    (tmp_path / "p" / "variants" / "int8" / "model.onnx").write_bytes(small[:-9])
    with pytest.raises(ModelError, match=r"model\.onnx is damaged"):
        Portfolio.load(tmp_path / "p")


def forged(folder: Path, change: Callable[[dict[str, Any]], None]) -> Portfolio:
    """Change the architecture of a variant and make all checksums right again."""
    place = folder / "variants" / "small"
    body = json.loads((place / architecture.ARCHITECTURE).read_bytes())
    del body["sha256"]
    change(body)
    text = json.dumps({"sha256": architecture._digest(body), **body}).encode()
    (place / architecture.ARCHITECTURE).write_bytes(text)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    del manifest["sha256"]
    (small,) = [v for v in manifest["variants"] if v["name"] == "small"]
    small["files"][architecture.ARCHITECTURE] = hashlib.sha256(text).hexdigest()
    (folder / MANIFEST).write_text(json.dumps({"sha256": _digest(manifest), **manifest}))
    return Portfolio.load(folder)


def test_right_checksums_around_wrong_arguments_are_refused_by_the_name_of_the_variant(
    folder: Path,
) -> None:
    """Layers of torch check their arguments by assertions, and some not before they compute.

    An AssertionError ended ``fedsys serve`` with a traceback.
    """
    place = folder / "variants" / "small" / architecture.ARCHITECTURE
    whole = place.read_bytes()
    layers = json.loads(whole)["layers"]
    asked = [(path, key) for path, (_, given) in layers.items() for key in given["dict"]]
    assert len(asked) > 10
    refused = 0
    for path, key in asked:
        for value in (None, -1, 0, 7, "reflect", {"tuple": [-3, 0]}, {"list": []}):
            place.write_bytes(whole)

            def change(
                body: dict[str, Any], path: str = path, key: str = key, value: object = value
            ) -> None:
                body["layers"][path][1]["dict"][key] = value

            portfolio = forged(folder, change)
            try:
                scores = run(portfolio.module("small"), images())
            except ModelError as error:
                refused += 1
                assert str(place.parent) in str(error) or "allowed" in str(error)
            else:
                assert scores.shape == (4, 3)
    assert refused > 50


def test_a_variant_whose_scores_do_not_fit_the_classes_is_refused(folder: Path) -> None:
    def swap(body: dict[str, Any]) -> None:
        (output,) = [node for node in body["nodes"] if node[1] == "output"]
        output[3] = {"tuple": [{"node": body["nodes"][0][0]}]}

    with pytest.raises(ModelError, match="no scores of 3 classes"):
        forged(folder, swap).module("small")
