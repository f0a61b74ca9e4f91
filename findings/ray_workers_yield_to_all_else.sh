#!/usr/bin/env bash
# Flower 1.42 with Ray 2.55: the share of the processor that the clients of a simulation get.
#
# One would guess that a simulation is a program like any other. Ray starts its workers, in which
# the clients train, at niceness 15, and Flower leaves it at that: beside one ordinary process that
# computes, a client gets some 3 % of a processor that both want, while the server app, which
# waits, has the usual priority. Rounds that take seconds alone take minutes beside a build or a
# notebook; limits of time in the run fire; timings of two engines compare priorities, not engines.
# Hurt: who simulates on a machine that does something else, or times a simulation on one.
# The way out: RAY_worker_niceness=0 in the environment of the simulation, as shown.
#
# Seen on 1 December 2026, with flwr 1.42.0 and ray 2.55.1 (see the output below).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q 'flwr[simulation]==1.42.0' ray==2.55.1
cd "$folder"
cat > look.py <<'PY'
import os
import sys
import time

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation

client, server = ClientApp(), ServerApp()


@client.query()
def niceness(message, context):
    """Reply with the niceness of the process in which a client computes."""
    return Message(RecordDict({"m": MetricRecord({"niceness": os.nice(0)})}), reply_to=message)


@server.main()
def main(grid, context):
    """Ask two clients."""
    while len(nodes := list(grid.get_node_ids())) < 2:
        time.sleep(0.1)
    asked = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes]
    seen = [int(reply.content["m"]["niceness"]) for reply in grid.send_and_receive(asked)]
    with open("seen", "a") as file:
        print(sys.argv[1], {"server app": os.nice(0), "clients": seen}, file=file)


run_simulation(server, client, 2, backend_config={"client_resources": {"num_cpus": 1}})
PY
export FLWR_HOME="$folder/flower" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 RAY_USAGE_STATS_ENABLED=0
"$folder/env/bin/python" look.py "as it comes:" > log 2>&1 || { cat log >&2; exit 1; }
RAY_worker_niceness=0 "$folder/env/bin/python" look.py "told so:" > log 2>&1 || { cat log >&2; exit 1; }
output=$(cat seen)
echo "$output"
expected="as it comes: {'server app': 0, 'clients': [15, 15]}
told so: {'server app': 0, 'clients': [0, 0]}"
[ "$output" = "$expected" ] || { echo "changed; expected: $expected" >&2; exit 1; }
