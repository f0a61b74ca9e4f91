#!/usr/bin/env bash
# MaxPool and GlobalMaxPool of ONNX Runtime 1.32, given a NaN.
#
# PyTorch's pools hand a NaN on, as Relu, Clip and ReduceMax of ONNX Runtime do. Its pools drop it
# (unless it comes last in a 2-D window), and in 1-D a window of nothing but NaN is -3.4e38, the
# smallest float32. So a network with a max pool behind its input answers a broken image with finite
# numbers, and a check for NaN at the output never fires.
# Hurt: endpoints that watch their outputs instead of their inputs.
#
# Seen on 30 November 2026, with onnxruntime 1.32.0 and onnx 1.23.2 (see the output below).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cd "$folder"
cat > look.py <<'PY'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper


def answer(operator, image, **how):
    node = helper.make_node(operator, ["x"], ["y"], **how)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, image.shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, list("abcd")[: image.ndim])
    graph = helper.make_graph([node], "g", [x], [y])
    opset = helper.make_opsetid("", 20)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": image})[0].ravel().tolist()


nan = float("nan")
image = np.array([[[[nan, 1], [2, 3]]]], np.float32)
lost = np.full((1, 1, 2), nan, np.float32)
onnxruntime.set_default_logger_severity(3)
ways = {"MaxPool": {"kernel_shape": [2, 2]}, "GlobalMaxPool": {}, "ReduceMax": {}}
for operator, how in ways.items():
    print(operator, {"one NaN": answer(operator, image, **how)})
print("MaxPool in 1-D", {"all NaN": answer("MaxPool", lost, kernel_shape=[2])})
PY
output=$("$folder/env/bin/python" look.py)
echo "$output"
expected="MaxPool {'one NaN': [3.0]}
GlobalMaxPool {'one NaN': [3.0]}
ReduceMax {'one NaN': [nan]}
MaxPool in 1-D {'all NaN': [-3.4028234663852886e+38]}"
[ "$output" = "$expected" ] || { echo "changed; expected: $expected" >&2; exit 1; }
