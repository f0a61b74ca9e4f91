"""Names of the files of a variant: known to those who read them and to those who count them."""

from __future__ import annotations

WEIGHTS = "weights.safetensors"
ARCHITECTURE = "architecture.json"
ONNX = "model.onnx"
