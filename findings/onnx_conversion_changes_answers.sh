#!/usr/bin/env bash
# onnx.version_converter of onnx 1.23: the same model, moved to another opset.
#
# One would guess that the answers stay, or that it refuses. A Resize of opset 10 (and a linear
# Upsample of 9) gets the meaning of 11, which samples at half pixels; Hardmax of 11 took the
# maximum over all that follows its axis, and of 13 over the axis alone; Softmax of 13 on its way
# back to 11 likewise, so probabilities of a segmentation no longer add up to one for a pixel.
# The checker passes all of them, and there is no word.
# Hurt: who moves old models to a newer opset for an engine. Compare the answers before and after.
#
# Seen on 30 November 2026, with onnx 1.23.2 and onnxruntime 1.32.0 (see the output below).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
cat > look.py <<'PY'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper, version_converter

image = np.random.default_rng(0).normal(size=(1, 4, 6, 6)).astype(np.float32)
sizes = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "s")


def answer(model):
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": image})[0]


def look(operator, before, after, inputs=("x",), **how):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, image.shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, list("abcd"))
    node = helper.make_node(operator, list(inputs), ["y"], **how)
    graph = helper.make_graph([node], "g", [x], [y], [sizes] if "s" in inputs else [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", before)], ir_version=8)
    old, new = answer(model), answer(version_converter.convert_version(model, after))
    same = np.allclose(old, new, atol=1e-6)
    print(operator, before, "to", after, "same" if same else "other answers")


onnxruntime.set_default_logger_severity(3)
look("Softmax", 11, 13, axis=1)
look("Resize", 10, 13, ("x", "s"), mode="linear")
look("Upsample", 9, 13, ("x", "s"), mode="linear")
look("Hardmax", 11, 13, axis=1)
look("Softmax", 13, 11, axis=1)
PY
output=$("$folder/env/bin/python" look.py)
echo "$output"
expected="Softmax 11 to 13 same
Resize 10 to 13 other answers
Upsample 9 to 13 other answers
Hardmax 11 to 13 other answers
Softmax 13 to 11 other answers"
[ "$output" = "$expected" ] || { echo "changed; expected: $expected" >&2; exit 1; }
