"""A chain of three host processes behind the endpoint, as docs/partition.md has it."""

import threading
import time
from contextlib import closing

import pytest
import torch
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http

from fedsys.commands.bench.partition_hosts import host_processes
from fedsys.config.serving import ServingConfig
from fedsys.models import layered
from fedsys.partition.remote_host import RemoteHost
from fedsys.serving.chain import Chain, ChainEngine
from fedsys.serving.chain_parts import UnitParts
from fedsys.serving.http import Endpoint
from tests.serving.chains import CARD, NAMES, SHAPE, cut, images, model

BOTH = ServingConfig(
    address="http://127.0.0.1:0",
    grpc="grpc://127.0.0.1:0",
    name="chain",
    max_delay_ms=0.0,
    max_batch=1,
)
MOVES = [(0, 3), (2, 5), (1, 2)]


def ask(kind, client, x):
    given = kind.InferInput("input", list(x.shape), "FP32")
    given.set_data_from_numpy(x.numpy())
    reply = client.infer("chain", [given], outputs=[kind.InferRequestedOutput("scores")])
    return torch.from_numpy(reply.as_numpy("scores").copy())


@pytest.mark.slow  # three host processes, and three more for each move of the way `process`
@pytest.mark.timeout(600)
def test_tritonclients_get_the_bits_of_the_whole_model_while_cuts_change_in_each_way():
    net, x = model(), images(1)
    with torch.inference_mode():
        expected = net(x)
    with host_processes(NAMES) as hosts:
        parts = UnitParts(layered(net, SHAPE), SHAPE)
        for way in ("beside", "pause", "warm", "process"):
            ends = [RemoteHost(r.path, r.name, r.address, token=hosts.token) for r in hosts.remotes]
            chain = Chain(ends, parts, token=hosts.token)
            engine = ChainEngine(chain, CARD, cut(1, 2), way, name="chain")
            if way == "warm":
                engine.prepare([cut(*cuts) for cuts in MOVES])
            asked_of_both(engine, x, expected, MOVES[: 1 if way == "process" else 3])
        assert all(remote.ask("status").meta["pipelines"] == 0 for remote in hosts.remotes)
        assert all(remote.ask("status").meta["computed"] > 0 for remote in hosts.remotes)


def asked_of_both(engine, x, expected, moves):
    done, wrong, stop = {"http": 0, "grpc": 0}, [], threading.Event()

    def loop(name, kind, address):
        with closing(kind.InferenceServerClient(address)) as client:
            while not stop.is_set():
                try:
                    assert torch.equal(ask(kind, client, x), expected)
                    done[name] += 1
                except Exception as error:
                    wrong.append(error)
                    return

    endpoint = Endpoint(engine, BOTH)
    try:
        places = {
            "http": (over_http, endpoint.address.removeprefix("http://")),
            "grpc": (over_grpc, endpoint.grpc_address.removeprefix("grpc://")),
        }
        threads = [threading.Thread(target=loop, args=(n, *p)) for n, p in places.items()]
        for thread in threads:
            thread.start()
        try:
            for cuts in moves:
                before, until = dict(done), time.monotonic() + 60
                engine.move(cut(*cuts))
                while any(done[n] < before[n] + 2 for n in done) and time.monotonic() < until:
                    assert not wrong
                    time.sleep(0.01)
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)
        assert wrong == [] and min(done.values()) >= 2
    finally:
        endpoint.close()
