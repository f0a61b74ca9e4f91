#!/usr/bin/env bash
# A parameter that torch.nn.utils.prune had, and what goes by the position of parameters.
#
# One would guess that after `prune.remove` a module is as before, with some zeros. Its pruned
# parameter is registered anew and is the last one then: a layer of normalisation has its bias
# before its weight. Names still fit, so `load_state_dict` of a model is right. By position go
# * torch.optim: a state that was saved behind `prune.remove` and is loaded for a model that was not
#   pruned gives the weight the moments of the bias, without a word, as their shapes are the same;
# * Flower's Bulyan, which chooses replies and averages them as lists of arrays: of five replies
#   that all hold a weight of 5 and a bias of 1, two of them of clients that pruned, it makes a
#   mixture. FedAvg, FedMedian, FedTrimmedAvg and Krum go by names.
# Hurt: federated and resumed training with pruning. Take the state of an optimizer along by names,
# and put a state_dict in the order of the model that is sent before it is returned.
#
# Seen on 1 December 2026, with torch 2.15.0 and flwr 1.42.0 (see the output below).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.15.0 numpy==2.4.6 flwr==1.42.0
cd "$folder"
export FLWR_HOME="$folder/flower" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
cat > look.py <<'PY'
import logging
from types import SimpleNamespace

import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp import strategy
from torch.nn.utils import prune

logging.disable(logging.CRITICAL)


def layer(pruned):
    made = torch.nn.LayerNorm(2)
    with torch.no_grad():
        made.weight.fill_(5.0)
        made.bias.fill_(1.0)
    if pruned:
        prune.l1_unstructured(made, "weight", amount=0)
        prune.remove(made, "weight")
    return made


print("order", list(layer(False).state_dict()), list(layer(True).state_dict()))

before = layer(True)
optimizer = torch.optim.Adam(before.parameters())
(3 * before.weight.sum() + before.bias.sum()).backward()
optimizer.step()
after = layer(False)
resumed = torch.optim.Adam(after.parameters())
resumed.load_state_dict(optimizer.state_dict())
for name in ("weight", "bias"):
    saved = optimizer.state[getattr(before, name)]["exp_avg"].tolist()
    loaded = resumed.state[getattr(after, name)]["exp_avg"].tolist()
    print("moment of", name, [round(v, 2) for v in saved], [round(v, 2) for v in loaded])


def reply(node, pruned):
    arrays = ArrayRecord(layer(pruned).state_dict())
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 10})})
    about = SimpleNamespace(src_node_id=node, dst_node_id=0)
    return SimpleNamespace(content=content, metadata=about, has_error=lambda: False)


for name in ("FedAvg", "FedMedian", "FedTrimmedAvg", "Krum", "Bulyan"):
    chosen = getattr(strategy, name)()
    chosen.current_arrays = ArrayRecord(layer(False).state_dict())
    arrays, _ = chosen.aggregate_train(1, [reply(k, k in (2, 4)) for k in range(1, 6)])
    values = {key: arrays[key].numpy().tolist() for key in ("weight", "bias")}
    print(name, {key: [round(v, 2) for v in value] for key, value in values.items()})
PY
output=$("$folder/env/bin/python" look.py)
echo "$output"
expected="order ['weight', 'bias'] ['bias', 'weight']
moment of weight [0.3, 0.3] [0.1, 0.1]
moment of bias [0.1, 0.1] [0.3, 0.3]
FedAvg {'weight': [5.0, 5.0], 'bias': [1.0, 1.0]}
FedMedian {'weight': [5.0, 5.0], 'bias': [1.0, 1.0]}
FedTrimmedAvg {'weight': [5.0, 5.0], 'bias': [1.0, 1.0]}
Krum {'weight': [5.0, 5.0], 'bias': [1.0, 1.0]}
Bulyan {'weight': [3.4, 3.4], 'bias': [2.6, 2.6]}"
[ "$output" = "$expected" ] || { echo "changed; expected: $expected" >&2; exit 1; }
