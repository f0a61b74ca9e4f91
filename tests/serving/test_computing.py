"""Variants answered by PyTorch or by ONNX Runtime: which one, and that answers are the same."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from fedsys.config.serving import ServingConfig
from fedsys.errors import ConfigError, ModelError
from fedsys.pruning.export import TOLERANCE, export_onnx
from fedsys.pruning.portfolio import ONNX, PARENT, Latency, Portfolio
from fedsys.pruning.precision import OnnxModule
from fedsys.serving.computing import is_by_onnx, made_run
from fedsys.serving.portfolio import PortfolioEngine, needs_torch

runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

IMAGES = np.random.default_rng(3).standard_normal((5, 3, 8, 8), np.float32)


@pytest.fixture(scope="module")
def portfolio(portfolio_folder, tmp_path_factory):
    """The portfolio of the other tests, with ONNX files for two of its variants."""
    plain, folder = Portfolio.load(portfolio_folder), tmp_path_factory.mktemp("onnx")
    files, variants = {}, []
    for variant, factor in zip(plain.variants, (0.5, 2.0, None), strict=True):
        if factor is not None:
            module = plain.module(variant.name)
            export_onnx(module, plain.about.input_shape, folder / "file.onnx")
            files[variant.name] = (folder / "file.onnx").read_bytes()
            rows = tuple(
                dataclasses.replace(r, p50_ms=r.p50_ms * factor) for r in variant.latencies
            )
            variant = dataclasses.replace(variant, onnx_latencies=rows)
        variants.append((variant, _content(plain, variant.name)))
    return Portfolio.write(folder / "portfolio", plain.about, variants, files)


def _content(portfolio, name):
    from fedsys.pruning.dense import architecture

    return architecture.load(portfolio.folder / "variants" / name)


def test_both_give_the_same_answers_within_the_tolerance(portfolio):
    for name in ("parent", "half"):
        runs = [made_run(portfolio, name, onnx=by_onnx, threads=1) for by_onnx in (False, True)]
        ours, theirs = (run(IMAGES) for run in runs)
        assert ours.dtype == theirs.dtype == np.float32
        assert np.abs(ours - theirs).max() <= TOLERANCE * max(1.0, np.abs(ours).max())
        for run in runs:
            run.close()


def test_each_variant_is_answered_by_what_was_faster(portfolio):
    parent, half, tenth = portfolio.variants
    assert [is_by_onnx(v, "auto", 1) for v in (parent, half, tenth)] == [True, False, False]
    assert [is_by_onnx(v, "torch", 1) for v in (parent, half, tenth)] == [False] * 3
    mixed = [Latency(1, 1, 1.0, 1.0, 5), Latency(8, 1, 99.0, 99.0, 5)]
    slower = dataclasses.replace(parent, onnx_latencies=tuple(mixed))  # 1/6 and 99/48 of torch's
    assert is_by_onnx(slower, "auto", 1)
    assert not is_by_onnx(dataclasses.replace(slower, onnx_latencies=tuple(mixed[1:])), "auto", 4)


def test_an_engine_that_is_forced_needs_the_files(portfolio, portfolio_folder):
    with pytest.raises(ConfigError, match=r"serving.engine=onnx: .* variant tenth .*variants.onnx"):
        PortfolioEngine(portfolio, ServingConfig(engine="onnx"))
    with pytest.raises(ConfigError, match=r"variants.onnx=true"):
        Portfolio.load(portfolio_folder).onnx("half")
    assert not needs_torch(portfolio, ServingConfig(engine="onnx", variant="half"))
    assert needs_torch(portfolio, ServingConfig(variant="half"))
    assert not needs_torch(portfolio, ServingConfig(variant=PARENT))


def test_the_policy_counts_with_the_times_of_what_answers(portfolio):
    engine = PortfolioEngine(portfolio, ServingConfig(threads=1))
    try:
        assert engine.status()["by_onnx"] == ["parent"]
        first = portfolio.parent
        profile = engine.control._variants["parent"]
        assert profile.latency[0].p50_ms == first.onnx_latencies[0].p50_ms
        answer = engine.answer(IMAGES)
        assert answer.by == "parent"
        assert np.allclose(answer.scores, OnnxModule(portfolio.onnx("parent"))(_tensor(IMAGES)))
    finally:
        engine.close()


def _tensor(array):
    import torch

    return torch.from_numpy(array)


def test_the_files_of_both_are_checked_and_are_no_size_of_the_variant(portfolio, portfolio_folder):
    plain = Portfolio.load(portfolio_folder)
    for variant in portfolio.variants:
        assert variant.bytes == plain.variant(variant.name).bytes
    path = portfolio.folder / "variants" / "half" / ONNX
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ModelError, match=rf"{path} is damaged"):
            Portfolio.load(portfolio.folder)
    finally:
        path.write_bytes(content)


def test_an_endpoint_of_onnx_runtime_alone_does_without_pytorch(portfolio):
    """It took 500 MB for nothing."""
    program = f"""
import json, sys, urllib.request
from contextlib import closing
from pathlib import Path
import fedsys.commands.serve
from fedsys.config.serving import ServingConfig
from fedsys.pruning.portfolio import Portfolio
from fedsys.serving.http import Endpoint
from fedsys.serving.portfolio import PortfolioEngine
options = ServingConfig("http://127.0.0.1:0", variant="parent", threads=1)
engine = PortfolioEngine(Portfolio.load(Path({str(portfolio.folder)!r})), options)
engine.control.start(0.01)
with closing(Endpoint(engine, options)) as endpoint:
    tensor = {{"name": "input", "datatype": "UINT8", "shape": [1, 3, 8, 8], "data": [7] * 192}}
    body = json.dumps({{"inputs": [tensor]}}).encode()
    path = endpoint.address + "/v2/models/classifier/infer"
    told = json.load(urllib.request.urlopen(path, body))
    urllib.request.urlopen(endpoint.address + "/metrics").read()
print(json.dumps([told["parameters"]["variant"], "torch" in sys.modules]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert json.loads(done.stdout) == ["parent", False]
