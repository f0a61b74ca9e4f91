"""Ask the planner where to cut a model, for five small computers and three networks.

Nothing is trained: the planner knows from tables what a Raspberry Pi or a Jetson takes for each
unit of the model (`conf/fleet/pi_lab.yaml`) and how fast a network is (`conf/network/`).
`fedsys profile` measures such a table for a machine of your own.

    python examples/where_to_cut.py
"""

from fedsys.config import compose_text, parse
from fedsys.planning import PlanOptions, evaluate, machines_of, plan, run_workload
from fedsys.training import layered_model

EXAMPLES = [10_000] * 5  # images on each device

for network in ("4g", "wifi", "ethernet"):
    config = parse(
        compose_text(
            f"fleet=pi_lab network={network} model=vgg5 data=synthetic_32x32 num_clients=5 "
            "client.batch_size=100 client.epochs=1 schedule=pipelined"
        )
    )
    layers = layered_model(config, (3, 32, 32), num_classes=10)
    machines = machines_of(config, layers)
    load = run_workload(config, layers, machines, EXAMPLES, PlanOptions(codec=("fp32", "fp16")))

    alone = plan(load, "classic")  # everything on the devices: classic federated learning
    best = plan(load, "auto")
    print(f"\n{network}: a round takes {best.seconds:.0f} s instead of {alone.seconds:.0f} s")
    for device, choice, seconds, before in zip(
        load.devices, best.choices, best.round_s, alone.round_s, strict=True
    ):
        if choice.cut == len(layers):
            what = "trains the whole model"
        else:
            last = layers.units[choice.cut - 1].name
            what = f"trains up to {last}, the edge the rest, in {choice.pieces} pieces"
        kind = device.costs.name.rpartition(".")[2]
        print(f"  {kind:8}{what}: {seconds:.0f} s (alone {before:.0f} s)")

    same = evaluate(load, [best.choices[0]] * 5)  # a choice of one's own: all like the first
    print(f"  were all like the first device, a round would take {same.seconds:.0f} s")
