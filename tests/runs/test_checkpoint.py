import dataclasses
import os

import numpy as np
import pytest

from fedsys.errors import RunError
from fedsys.runs.checkpoint import Checkpoint, Checkpoints, StrategyState, layers_of
from fedsys.transport import records


def checkpoint(round_, **strategy):
    arrays = records.record_of({"w": np.full((3, 2), round_, "float32"), "n": np.array(round_)})
    return Checkpoint(round_, arrays, {"S": strategy}, seconds=1.5 * round_, config_sha256="c")


def same(a, b):
    return dataclasses.asdict(dataclasses.replace(a, arrays=None)) == dataclasses.asdict(
        dataclasses.replace(b, arrays=None)
    ) and {n: v.data for n, v in a.arrays.items()} == {n: v.data for n, v in b.arrays.items()}


@pytest.fixture
def held(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        yield checkpoints


def files_of(held, round_):
    return sorted(held.path.glob(f"round-{round_:06d}.*"))


def test_the_newest_checkpoint_comes_back_as_it_was_written(held):
    for round_ in (1, 2):
        held.write(checkpoint(round_, m_t={"w": [1, 2.5]}, step=round_))
    assert same(held.newest(), checkpoint(2, m_t={"w": [1, 2.5]}, step=2))


def test_there_is_none_before_the_first(held):
    assert held.newest() is None


def test_two_checkpoints_are_kept(held):
    for round_ in (1, 2, 3, 10):
        held.write(checkpoint(round_))
    assert held.rounds() == [3, 10]
    assert len(list(held.path.iterdir())) == 5  # two files for each, and the lock


def test_a_crash_before_the_tree_is_written_leaves_the_former_checkpoint(held):
    class Crash(Exception):
        pass

    def crash():
        raise Crash

    held.write(checkpoint(1))
    with pytest.raises(Crash):
        held.write(checkpoint(2), halfway=crash)
    assert held.newest().round == 1
    held.write(checkpoint(2))
    assert held.newest().round == 2


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_damaged_checkpoint_is_passed_over_said_and_removed_by_the_next(held, suffix):
    for round_ in (1, 2):
        held.write(checkpoint(round_))
    file = held.path / f"round-000002{suffix}"
    good = file.read_bytes()
    for position in range(0, len(good), 7):  # a flipped bit anywhere
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        file.write_bytes(bad)
        with pytest.raises(RunError, match="is damaged"):
            held.read(2)
    for length in (0, 1, 9, len(good) // 2, len(good) - 1):  # cut off anywhere
        file.write_bytes(good[:length])
        with pytest.raises(RunError, match="is damaged"):
            held.read(2)
    assert held.newest().round == 1
    assert "round-000002" in held.problems[0]
    held.write(checkpoint(3))
    assert held.rounds() == [1, 3]


def test_a_checkpoint_without_arrays_is_damaged(held):
    held.write(checkpoint(1))
    (held.path / "round-000001.safetensors").unlink()
    with pytest.raises(RunError, match=r"round-000001.safetensors is damaged: No such file"):
        held.newest()


def test_arrays_of_another_checkpoint_are_noticed(held):
    held.write(checkpoint(1))
    held.write(checkpoint(2))
    os.replace(held.path / "round-000001.safetensors", held.path / "round-000002.safetensors")
    with pytest.raises(RunError, match="is missing"):
        held.read(2)


def test_if_none_is_good_that_is_an_error(held):
    held.write(checkpoint(1))
    for file in files_of(held, 1):
        file.write_bytes(b"")
    with pytest.raises(RunError, match="no other is good, so run again into another folder"):
        held.newest()


def test_a_checkpoint_of_a_later_format_is_refused(held, monkeypatch):
    monkeypatch.setattr("fedsys.runs.checkpoint.FORMAT", 2)
    held.write(checkpoint(1))
    monkeypatch.undo()
    with pytest.raises(RunError, match="has format 2; this version reads 1"):
        held.read(1)


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / ".round-000001.json.ab12.part").write_bytes(b"half")
    with Checkpoints(tmp_path):
        assert [p.name for p in folder.iterdir()] == ["lock"]


def test_nobody_else_can_work_on_a_run_at_the_same_time(tmp_path):
    with (
        Checkpoints(tmp_path),
        pytest.raises(RunError, match="another process is at work on this run"),
    ):
        Checkpoints(tmp_path)
    with Checkpoints(tmp_path):  # leaving the block frees the run
        pass


def test_a_full_disk_leaves_the_former_checkpoint(held, monkeypatch):
    held.write(checkpoint(1))

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("fedsys.files._sync", full)
    with pytest.raises(RunError, match="No space left on device; free some space"):
        held.write(checkpoint(2))
    assert held.newest().round == 1
    assert not list(held.path.glob(".*.part"))


# --- the state of a strategy ---


class Averaging:
    def __init__(self):
        self.rate, self.momentum, self.rule = 0.5, None, len


class Wrapper:
    STATE = ("seen", "totals")

    def __init__(self, inner):
        self.inner, self.seen, self.secret = inner, {}, object()
        self.totals = Totals()


@dataclasses.dataclass
class Totals:
    steps: int = 0
    moves: list = dataclasses.field(default_factory=list)


def test_state_is_taken_from_every_layer_and_put_back():
    strategy = Wrapper(Averaging())
    state = StrategyState(strategy)
    strategy.inner.momentum = [np.ones(2)]
    strategy.seen[3] = records.record_of({"m": np.zeros(1)})
    strategy.totals.steps, strategy.secret = 7, object()
    taken = state.take()
    assert taken["Wrapper"].keys() == {"seen", "totals"}
    assert taken["Wrapper.Averaging"].keys() == {"rate", "momentum"}

    other = Wrapper(Averaging())
    StrategyState(other).put(taken)
    assert np.array_equal(other.inner.momentum[0], np.ones(2))
    assert other.totals == Totals(7)
    assert other.seen.keys() == {3}


def test_the_paths_of_layers_tell_how_they_are_stacked():
    assert [path for path, _ in layers_of(Wrapper(Averaging()))] == ["Wrapper", "Wrapper.Averaging"]


def test_flowers_own_wrappers_are_seen_through():
    from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

    wrapped = DifferentialPrivacyServerSideFixedClipping(FedAvg(), 1.0, 1.0, 2)
    assert [type(layer) for _, layer in layers_of(wrapped)][1] is FedAvg


def test_an_attribute_that_changes_and_cannot_be_kept_is_refused_by_name():
    strategy = Averaging()
    state = StrategyState(strategy)
    state.take()
    strategy.rule = max
    with pytest.raises(RunError, match=r"strategy: Averaging\.rule changes from round to round"):
        state.take()


def test_an_attribute_that_holds_what_cannot_be_kept_only_later_is_refused():
    strategy = Averaging()
    state = StrategyState(strategy)
    strategy.momentum = object()
    with pytest.raises(RunError, match=r"Averaging\.momentum .* of type object"):
        state.take()


def test_what_shows_only_when_it_is_written_is_refused_by_name(held):
    import torch

    bad = checkpoint(1, momentum=torch.ones(1, dtype=torch.bfloat16))
    with pytest.raises(RunError, match=r"\['momentum'\] is a tensor of torch.bfloat16, which"):
        held.write(bad)


def test_state_of_another_stack_is_refused():
    taken = StrategyState(Wrapper(Averaging())).take()
    with pytest.raises(RunError, match=r"stacked as Averaging, .* of Wrapper\.Averaging"):
        StrategyState(Averaging()).put(taken)


@pytest.mark.parametrize("name", ["FedAvg", "FedAvgM", "FedAdam", "FedYogi", "FedAdagrad", "Krum"])
def test_flowers_strategies_hold_only_what_can_be_kept(name, held):
    import flwr.serverapp.strategy as flower

    strategy = getattr(flower, name)()
    held.write(dataclasses.replace(checkpoint(1), strategy=StrategyState(strategy).take()))
    fresh = getattr(flower, name)()
    StrategyState(fresh).put(held.newest().strategy)
    numbers = {k: v for k, v in vars(strategy).items() if not callable(v)}
    assert {k: vars(fresh)[k] for k in numbers} == numbers
