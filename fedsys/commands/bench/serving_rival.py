"""What people would write instead of ``fedsys serve``, as programs of their own.

``python -m fedsys.commands.bench.serving_rival KIND PORTFOLIO VARIANT PORT`` serves one variant
with one thread until it is ended:

* ``fastapi-torch``, ``fastapi-onnx``: FastAPI on uvicorn with its own choice of loop and parser
  (uvloop, httptools), one ``async def`` that computes where it is called, which is the fastest for
  a model of a millisecond: JSON as the Open Inference Protocol has it, or bare bytes;
* ``mlserver``: a runtime of MLServer that computes with ONNX Runtime, without worker processes.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Compute = Callable[[NDArray[np.float32]], NDArray[np.float32]]

PATH = "/infer"
"""Of the rivals made with FastAPI: JSON, or with the type ``application/octet-stream`` raw."""


def by_torch(portfolio: str, variant: str) -> Compute:
    """Return what computes a variant with PyTorch."""
    import torch

    from fedsys.pruning.portfolio import Portfolio

    torch.set_num_threads(1)
    module = Portfolio.load(Path(portfolio)).module(variant)

    def compute(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            scores: NDArray[np.float32] = module(torch.from_numpy(images)).numpy()
            return scores

    return compute


def by_onnx(portfolio: str, variant: str) -> Compute:
    """Return what computes a variant with ONNX Runtime; nothing else is imported."""
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    path = Path(portfolio) / "variants" / variant / "model.onnx"
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def compute(images: NDArray[np.float32]) -> NDArray[np.float32]:
        scores: NDArray[np.float32] = session.run(None, {name: images})[0]
        return scores

    return compute


def fastapi(compute: Compute, shape: tuple[int, ...], port: int) -> None:
    """Serve with FastAPI until the process is ended."""
    import uvicorn

    made = importlib.import_module("fastapi")  # no dependency: it is installed for the benchmark
    app = made.FastAPI()

    async def infer(request: Any) -> Any:
        if request.headers.get("content-type") == "application/octet-stream":
            raw = np.frombuffer(bytearray(await request.body()), "<f4").reshape(-1, *shape)
            return made.Response(compute(raw).tobytes(), media_type="application/octet-stream")
        (given,) = (await request.json())["inputs"]
        images = np.array(given["data"], np.float32).reshape(given["shape"])
        scores = compute(images)
        output = {"name": "scores", "datatype": "FP32", "shape": list(scores.shape)}
        return {
            "model_name": "classifier",
            "outputs": [{**output, "data": scores.ravel().tolist()}],
        }

    infer.__annotations__ = {"request": made.Request}  # of names that are local here
    app.add_api_route(PATH, infer, methods=["POST"], response_model=None)
    uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, log_level="warning")


_RUNTIME = """
import numpy as np
from mlserver import MLModel
from mlserver.types import InferenceResponse, ResponseOutput
from fedsys.commands.bench.serving_rival import by_onnx


class Runtime(MLModel):
    async def load(self):
        about = self.settings.parameters.extra
        self._compute = by_onnx(about["portfolio"], about["variant"])
        return True

    async def predict(self, payload):
        given = payload.inputs[0]
        images = np.array(given.data.root, np.float32).reshape(given.shape)
        scores = self._compute(images)
        output = ResponseOutput(
            name="scores", shape=list(scores.shape), datatype="FP32", data=scores.ravel().tolist()
        )
        return InferenceResponse(model_name=self.name, outputs=[output])
"""


def mlserver(portfolio: str, variant: str, port: int) -> None:
    """Serve with MLServer until the process is ended."""
    main = importlib.import_module("mlserver.cli").main
    with tempfile.TemporaryDirectory(prefix="fedsys-mlserver-") as name:
        folder = Path(name)
        (folder / "runtime_of_bench.py").write_text(_RUNTIME)
        about = {"portfolio": portfolio, "variant": variant}
        model = {
            "name": "classifier",
            "implementation": "runtime_of_bench.Runtime",
            "parameters": {"extra": about},
        }
        settings = {
            "host": "127.0.0.1", "http_port": port, "grpc_port": port + 1, "metrics_port": port + 2,
            "parallel_workers": 0, "debug": False,
        }  # fmt: skip
        (folder / "settings.json").write_text(json.dumps(settings))
        (folder / "model-settings.json").write_text(json.dumps(model))
        sys.path.insert(0, name)
        sys.argv = ["mlserver", "start", name]
        main()


def serve(kind: str, portfolio: str, variant: str, port: int) -> None:
    """Serve until the process is ended."""
    if kind == "mlserver":
        mlserver(portfolio, variant, port)
        return
    manifest = json.loads((Path(portfolio) / "manifest.json").read_text())
    compute = by_torch if kind == "fastapi-torch" else by_onnx
    fastapi(compute(portfolio, variant), tuple(manifest["about"]["input_shape"]), port)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
