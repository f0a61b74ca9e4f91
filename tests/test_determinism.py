"""One configuration gives one model, to the bit, however the run is carried out."""

import random
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedsys.runs.folder import RunFolder
from fedsys.runtime import run
from fedsys.runtime.local import LocalGrid

ALL_AT_ONCE = (
    "rounds=3",
    "num_clients=5",
    "json=true",
    "strategy=fedadam",
    "strategy.fraction_train=0.6",
    "model=cnn",  # BatchNorm and dropout
    "data.max_examples=240",
    "data.augmentation=crop_flip",
    "client.batch_size=16",
    "client.momentum=0.9",
)


@pytest.fixture
def train(configure, tmp_path):
    """Return a function that trains and returns the run's folder."""
    count = 0

    def of(*overrides):
        nonlocal count
        count += 1
        folder = tmp_path / str(count)
        run(configure(*ALL_AT_ONCE, *overrides, f"run.dir={folder}"))
        return RunFolder.open(folder)

    return of


def sha(folder):
    return folder.info["result"]["model_sha256"]


WAYS = {
    "four workers": ("runtime.workers=4",),
    "one worker": ("runtime.workers=1",),
    "kept optimizers": ("client.keep_optimizer=true", "runtime.workers=3"),
    "micro-batches": ("schedule.micro_batches=4", "runtime.workers=3"),
    "evaluation by the clients": ("strategy.fraction_evaluate=0.5", "runtime.workers=2"),
}


def test_one_worker_and_four_give_the_same_model_and_the_same_rounds(train):
    one, four = train(*WAYS["one worker"]), train(*WAYS["four workers"])
    assert sha(one) == sha(four)
    assert len(one.rounds()) == 3
    for before, after in zip(one.rounds(), four.rounds(), strict=True):
        figures = [key for key in before if not key.startswith("seconds") and "client_s" not in key]
        assert [before[key] for key in figures] == [after[key] for key in figures]
    state = load_file(one.path / "model.safetensors")
    assert any(name.endswith("num_batches_tracked") for name in state)
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


@pytest.mark.parametrize("way", ["kept optimizers", "micro-batches"])
def test_a_run_repeats_whatever_its_clients_do(train, way):
    assert sha(train(*WAYS[way])) == sha(train(*WAYS[way], "runtime.workers=1"))


def test_evaluation_by_the_clients_changes_nothing(train):
    assert sha(train(*WAYS["evaluation by the clients"])) == sha(train())


@pytest.mark.parametrize(
    "change",
    [
        "seed=1",
        "data.augmentation=none",
        "model.dropout=0",
        "client.keep_optimizer=true",
        "strategy.fraction_train=1.0",
        "client.batch_size=15",
    ],
)
def test_another_seed_or_setting_is_another_model(train, change):
    assert sha(train(change)) != sha(train())


def test_process_wide_generators_and_threads_decide_nothing(train):
    shas = []
    for seed in (1, 2):
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            drawn = random.getstate(), torch.get_rng_state()
            shas.append(sha(train()))
            assert torch.equal(torch.get_rng_state(), drawn[1])
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
    assert shas[0] == shas[1]


def test_the_order_in_which_clients_finish_decides_nothing(train, monkeypatch):
    """The clients of a phase answer in the order of their ids, then in the reverse order."""
    original = LocalGrid._answer
    shas = []
    for backwards in (False, True):
        turn = Turns(backwards)

        def in_turn(self, message, content, turn=turn):
            reply = original(self, message, content)
            turn.wait_for(self, message)
            return reply

        monkeypatch.setattr(LocalGrid, "_answer", in_turn)
        shas.append(sha(train("runtime.workers=3")))
        assert turn.taken
    assert shas[0] == shas[1]


class Turns:
    """Lets the threads that answer one phase of three messages go one after another."""

    def __init__(self, backwards):
        self.backwards, self.taken = backwards, 0
        self.changed = threading.Condition()
        self.waiting: list[int] = []

    def wait_for(self, grid, message):
        if message.metadata.message_type != "train":
            return
        with self.changed:
            me = message.metadata.dst_node_id
            self.waiting.append(me)
            self.changed.notify_all()
            # Three of five clients train, by three workers: all are here before one may go.
            assert self.changed.wait_for(lambda: self.may_go(me), timeout=60)
            self.taken += 1
            self.changed.notify_all()

    def may_go(self, me):
        if len(self.waiting) % 3:
            return False
        phase = sorted(self.waiting[-3:], reverse=self.backwards)
        return phase[self.taken % 3] == me
