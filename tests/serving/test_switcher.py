import dataclasses
import functools
import gc
import itertools
import linecache
import os
import sys
import threading
import weakref
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.fx import graph_module

from fedsys import models
from fedsys.config.serving import ServingConfig
from fedsys.errors import ConfigError, ModelError, RuntimeFailure
from fedsys.pruning.memory import free_memory, others_load, resident_bytes
from fedsys.pruning.portfolio import Portfolio
from fedsys.serving.portfolio import PortfolioEngine
from fedsys.serving.switch.control import Control
from fedsys.serving.switch.policy import (
    How,
    Objective,
    PassTime,
    Profile,
    Signals,
    latency_at,
    profile_of,
)
from fedsys.serving.switch.relief import Backlog
from fedsys.serving.switch.signals import Meter
from fedsys.serving.switch.slimmable import slimmable
from fedsys.serving.switch.switcher import Loaded, Resident
from tests.waiting import until

NAMES = ("parent", "half", "tenth")


@pytest.fixture
def portfolio(portfolio_folder):
    return Portfolio.load(portfolio_folder)


@pytest.fixture
def quick_turns():
    """Let threads take turns as often as `fedsys serve` does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    yield
    sys.setswitchinterval(before)


def images(rows=2, seed=0):
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def expected(portfolio, x):
    with torch.inference_mode():
        return {name: portfolio.module(name)(x) for name in NAMES}


def switchers(portfolio, first="parent"):
    modules = {name: portfolio.module(name) for name in NAMES}
    return {
        "loaded": Loaded(portfolio.module, first, (images(),)),
        "resident": Resident(modules, first),
    }


# --------------------------------------------------------------------------------------------------
# Switching


@pytest.mark.parametrize("kind", ["loaded", "resident"])
@pytest.mark.parametrize("beside", [True, False])
def test_no_request_is_lost_or_mixed_while_variants_change(portfolio, kind, beside, quick_turns):
    """Each answer must be, to the bit, that of the variant whose name it carries."""
    x = images()
    right = expected(portfolio, x)
    switcher = switchers(portfolio)[kind]
    stop = threading.Event()
    ledgers: list[list[tuple[str, bool]]] = [[] for _ in range(3)]
    issued = [0, 0, 0]

    def ask(number: int) -> None:
        while not stop.is_set():
            issued[number] += 1
            with switcher.lease() as active:
                got = active.run(x)
            ledgers[number].append((active.name, torch.equal(got, right[active.name])))

    def answered_by(name: str, before: list[int]) -> bool:
        return any(name in dict(ledger[n:]) for ledger, n in zip(ledgers, before, strict=True))

    askers = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    for asker in askers:
        asker.start()
    costs = []
    for name in ["half", "tenth", "parent"] * 4:
        costs.append(switcher.switch(name, beside=beside))
        before = list(map(len, ledgers))
        until(functools.partial(answered_by, name, before))
    stop.set()
    for asker in askers:
        asker.join()
    answers = [answer for ledger in ledgers for answer in ledger]
    assert sum(issued) == len(answers)
    assert all(same for _, same in answers)
    assert all(cost.drained for cost in costs)
    assert [cost.after for cost in costs] == ["half", "tenth", "parent"] * 4
    switcher.close()


@pytest.mark.parametrize("kind", ["loaded", "resident"])
def test_a_request_is_answered_by_a_variant_that_is_there_whatever_it_asks_for(
    portfolio, kind, quick_turns
):
    """Variants are kept, dropped and switched to while requests ask for any of them by name."""
    x = images()
    right = expected(portfolio, x)
    switcher = switchers(portfolio)[kind]
    stop = threading.Event()
    ledgers: list[list[tuple[str, bool]]] = [[] for _ in range(3)]

    def ask(number: int) -> None:
        while not stop.is_set():
            with switcher.lease(NAMES[number]) as active:
                got = active.run(x)  # of a variant that was freed it would raise
            ledgers[number].append((active.name, torch.equal(got, right[active.name])))

    def keep() -> None:
        for chosen in itertools.cycle([["tenth", "half"], ["half"], [], ["tenth"], ["parent"]]):
            if stop.is_set():
                return
            switcher.keep(chosen)

    def went_on(before: int) -> bool:
        return sum(map(len, ledgers)) >= before + 3 or not all(t.is_alive() for t in threads)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    threads.append(threading.Thread(target=keep))
    for thread in threads:
        thread.start()
    for name in ["half", "tenth", "parent"] * 8:
        assert switcher.switch(name).after == switcher.current == name
        before = sum(map(len, ledgers))
        until(functools.partial(went_on, before))
    stop.set()
    for thread in threads:
        thread.join()
    answers = [answer for ledger in ledgers for answer in ledger]
    assert len(answers) >= 72
    assert all(same for _, same in answers)
    switcher.keep([])
    if kind == "loaded":
        assert switcher.spare == ()
    switcher.close()


def test_what_answers_is_loaded_anew_beside_the_requests_in_it(portfolio):
    loaded, freed = [], []

    def load(name):
        loaded.append(portfolio.module(name))
        return loaded[-1]

    switcher = Loaded(load, "half", free=freed.append)
    switcher.keep(["tenth"])
    with switcher.lease() as before:
        cost = switcher.renew(drain_s=0.0)
        assert (cost.before, cost.after, cost.drained) == ("half", "half", False)
        assert freed == [] and before.run(images()) is not None
    assert until(lambda: freed == loaded[:1])
    with switcher.lease() as active:
        assert torch.equal(active.run(images()), expected(portfolio, images())["half"])
    assert (switcher.current, switcher.spare, len(loaded)) == ("half", ("tenth",), 3)
    switcher.close()
    switcher.renew()  # too late: what it loaded is freed, as the others are
    assert len(freed) == len(loaded) == 4
    resident = switchers(portfolio)["resident"]
    assert resident.renew().after == "parent"
    resident.close()


def test_what_is_kept_is_loaded_once_and_freed_when_it_is_not_wanted(portfolio):
    loaded = []

    def load(name):
        loaded.append((name, portfolio.module(name)))
        return loaded[-1][1]

    x = images()
    right = expected(portfolio, x)
    switcher = Loaded(load, "parent")
    switcher.keep(["tenth", "parent"])
    assert switcher.spare == ("tenth",)
    with switcher.lease("tenth") as active:
        assert torch.equal(active.run(x), right["tenth"])
    with switcher.lease("half") as active:
        assert active.name == "parent"  # the other is not there
    costs = [switcher.switch(name) for name in ("tenth", "parent", "tenth")]
    assert [name for name, _ in loaded] == ["parent", "tenth"]
    assert costs[0].prepare_ms > 0 and costs[2].prepare_ms == 0  # its loading is told once
    assert switcher.spare == ("parent",)
    switcher.keep([])
    assert (switcher.current, switcher.spare) == ("tenth", ())
    assert all(p.is_meta for p in loaded[0][1].parameters())
    assert not any(p.is_meta for p in loaded[1][1].parameters())
    switcher.close()
    assert all(p.is_meta for p in loaded[1][1].parameters())


def test_what_cannot_be_kept_leaves_the_others(portfolio):
    def load(name):
        if name == "half":
            raise ModelError("half is damaged")
        return portfolio.module(name)

    switcher = Loaded(load, "parent")
    with pytest.raises(ModelError, match="half is damaged"):
        switcher.keep(["tenth", "half"])
    assert (switcher.current, switcher.spare) == ("parent", ("tenth",))


def test_a_request_in_work_keeps_its_variant_until_it_ends(portfolio):
    x = images()
    right = expected(portfolio, x)
    switcher = Loaded(portfolio.module, "parent")
    done = threading.Event()
    with switcher.lease() as old:
        changing = threading.Thread(target=lambda: (switcher.switch("half"), done.set()))
        changing.start()
        while switcher.current == "parent":
            pass
        with switcher.lease() as new:  # nobody waits for the old request
            assert torch.equal(new.run(x), right["half"])
        assert not done.is_set()
        assert torch.equal(old.run(x), right["parent"])
    changing.join()
    assert done.is_set()


def test_the_old_variant_gives_its_weights_back(portfolio):
    modules = []

    def load(name):
        modules.append(portfolio.module(name))
        return modules[-1]

    switcher = Loaded(load, "parent")
    switcher.switch("half")
    assert all(p.is_meta for p in modules[0].parameters())
    assert not any(p.is_meta for p in modules[1].parameters())
    switcher.switch("tenth", beside=False)
    assert all(p.is_meta for p in modules[1].parameters())


def test_layers_of_a_variant_that_was_left_go_without_a_garbage_collection(portfolio):
    layers = []

    def load(name):
        module = portfolio.module(name)
        layers.append(weakref.ref(next(m for m in module.modules() if isinstance(m, nn.Linear))))
        return module

    switcher = Loaded(load, "parent")
    gc.disable()
    try:
        switcher.switch("half")
        switcher.switch("tenth", beside=False)
        assert [layer() is None for layer in layers] == [True, True, False]
    finally:
        gc.enable()
    switcher.close()


def test_nothing_of_a_variant_that_was_left_stays_in_the_process(portfolio):
    """Each load left the source of its graph in caches of torch.fx and linecache."""
    switcher = Loaded(portfolio.module, "parent")

    def kept():
        gc.collect()
        codes = [key for key in linecache.cache if "eval_with_key" in key]
        return len(codes), len(graph_module._loader.eval_cache)

    for name in NAMES * 2:
        switcher.switch(name)
    before = kept()
    for name in NAMES * 4:
        switcher.switch(name)
    assert kept() == before
    switcher.close()


@pytest.mark.parametrize("beside", [True, False])
def test_a_variant_that_cannot_be_loaded_leaves_the_old_one_answering(portfolio, beside):
    def load(name):
        if name == "half":
            raise ModelError("half is damaged")
        return portfolio.module(name)

    x = images()
    switcher = Loaded(load, "parent")
    with pytest.raises(ModelError, match="half is damaged"):
        switcher.switch("half", beside=beside)
    assert switcher.current == "parent"
    with switcher.lease() as active:
        assert torch.equal(active.run(x), expected(portfolio, x)["parent"])


def test_where_nothing_can_be_loaded_requests_wait_for_the_next_switch(portfolio):
    """The old variant, freed and empty, was put back: requests turned in circles for ever."""
    broken, x = set(), images()

    def load(name):
        if name in broken:
            raise ModelError(f"{name} is gone")
        return portfolio.module(name)

    switcher = Loaded(load, "parent")
    broken |= {"parent", "half"}
    with pytest.raises(ModelError, match="parent is gone"):
        switcher.switch("half", beside=False)
    assert not switcher.ready
    answers = []

    def ask():
        with switcher.lease() as active:
            answers.append((active.name, active.run(x)))

    waiting = threading.Thread(target=ask, daemon=True)
    waiting.start()
    for again in ("parent", "half"):
        with pytest.raises(ModelError, match=f"{again} is gone"):
            switcher.switch(again)
    assert not answers and waiting.is_alive()
    cost = switcher.switch("tenth")
    waiting.join(30)
    assert switcher.ready and switcher.current == "tenth"
    assert (cost.before, cost.after) == ("parent", "tenth")
    ((name, outputs),) = answers
    assert name == "tenth"
    assert torch.equal(outputs, expected(portfolio, x)["tenth"])
    switcher.close()
    assert not switcher.ready


def test_a_switcher_with_nothing_in_memory_can_be_closed(portfolio):
    broken = set()

    def load(name):
        if broken:
            raise ModelError("the folder is gone")
        return portfolio.module(name)

    switcher = Loaded(load, "parent")
    broken.add("all")
    with pytest.raises(ModelError, match="the folder is gone"):
        switcher.switch("half", beside=False)
    switcher.close()
    with pytest.raises(RuntimeFailure, match="closed"), switcher.lease():
        pass


def test_the_same_variant_again_costs_nothing(portfolio):
    switcher = Loaded(portfolio.module, "half")
    assert switcher.switch("half").total_ms == 0


@pytest.mark.parametrize("kind", ["loaded", "resident"])
def test_a_closed_switcher_refuses_instead_of_waiting(portfolio, kind):
    switcher = switchers(portfolio)[kind]
    switcher.close()
    with pytest.raises(RuntimeFailure, match="closed"), switcher.lease():
        pass


def test_an_unknown_variant_is_named(portfolio):
    with pytest.raises(ConfigError, match="variant=dense: must be one of parent, half, tenth"):
        switchers(portfolio)["resident"].switch("dense")
    with pytest.raises(ConfigError, match="variant=dense"):
        Loaded(portfolio.module, "dense")


# --------------------------------------------------------------------------------------------------
# One network at several widths


@pytest.mark.parametrize("name", ["vgg5", "resnet18", "mobilenet_v2"])
def test_a_slimmable_network_shares_its_weights(name, configure):
    spec = dict(configure(f"model={name}").model)
    model = models.build(spec, input_shape=(3, 32, 32), num_classes=10, seed=1).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    widths = slimmable(model, x, (1.0, 0.5))
    with torch.no_grad():
        assert torch.equal(widths[1.0](x), model(x))
        assert widths[0.5](x).shape == (2, 10)
    own = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    for narrow in widths.values():
        for module in narrow.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                assert module.weight.untyped_storage().data_ptr() in own


def test_a_narrow_network_computes_what_its_slices_say():
    """By hand: the first half of the hidden units, all outputs."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    first, last = model[0], model[2]
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    half = slimmable(model, x, (0.5,))[0.5]
    with torch.no_grad():
        hidden = torch.relu(x @ first.weight[:3].T + first.bias[:3])
        assert torch.allclose(half(x), hidden @ last.weight[:, :3].T + last.bias)


def test_widths_and_layers_without_a_narrow_form_are_refused():
    x = torch.zeros(1, 4)
    with pytest.raises(ConfigError, match="width=0"):
        slimmable(nn.Linear(4, 2), x, (0,))
    layers = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    with pytest.raises(ModelError, match="LayerNorm, which has no narrower form"):
        slimmable(layers, x, (0.5,))


# --------------------------------------------------------------------------------------------------
# Signals


def meter(clock, variants=(), **more):
    return Meter(variants, clock=lambda: clock[0], free=lambda: 10**9, window_s=2.0, **more)


def test_signals_are_those_of_the_window():
    clock = [0.0]
    variant = Profile("a", 0.9, 1, 1, (PassTime(1, 10.0, 12.0), PassTime(5, 30.0, 40.0)))
    seen = meter(clock, [variant])
    seen.arrived(100)
    seen.left(100)
    clock[0] = 10.0
    for i in range(4):
        seen.arrived(5)
        seen.left(3)
        seen.passed("a", 3, 40.0)  # twice the 20 ms between its measured sizes
        seen.answered(10.0 * (i + 1))
        seen.received(1_000_000, 0.1)
    signals = seen.signals()
    assert signals.arrival_rate == 10.0  # 4 requests in half a second may come by chance
    assert signals.queue == 0  # none waited when signals were last asked for
    assert seen.signals().queue == 8
    assert signals.slowdown == pytest.approx(2.0)
    assert signals.p95_ms == 30.0
    assert signals.link_mbit_s == pytest.approx(80.0)
    assert signals.free_memory == 10**9
    clock[0] = 11.0
    assert seen.signals().arrival_rate == 10.0
    clock[0] = 20.0
    later = seen.signals()
    assert (later.arrival_rate, later.slowdown, later.p95_ms) == (0.0, None, None)


def test_a_rush_counts_at_once_as_far_as_it_is_none_by_chance():
    clock = [0.0]
    seen = meter(clock)
    clock[0] = 10.0
    for _ in range(100):
        seen.arrived(1)
    assert seen.signals().arrival_rate == (100 - 2 * 10) / 0.5  # 50 of the whole window
    clock[0] = 11.0
    assert seen.signals().arrival_rate == 50.0


def test_calm_is_believed_as_soon_as_enough_requests_have_shown_it():
    """After a rush of 400 per second a variant too small answered for two seconds, the window."""
    clock = [0.0]
    seen = meter(clock)
    for rate, seconds in ((400, 2), (100, 1)):
        for _ in range(rate * seconds):
            clock[0] += 1 / rate
            seen.arrived(1)
    # 100 of the last 200 came in one second, the others in a quarter; all 500 came in two
    assert seen.signals().arrival_rate == pytest.approx(200 / 1.25, rel=0.01)
    for _ in range(100):
        clock[0] += 0.01
        seen.arrived(1)
    assert seen.signals().arrival_rate == pytest.approx(100, rel=0.01)


def test_a_queue_that_goes_by_itself_does_not_count_unless_it_is_overdue():
    seen = meter([0.0])
    seen.signals()
    seen.arrived(5)
    seen.left(4)
    seen.arrived(2)
    assert seen.signals().queue == 0  # since the last look it was empty
    seen.arrived(4)
    assert seen.signals().queue == 3
    seen.left(7)
    seen.arrived(6)
    seen.overdue()
    assert seen.signals().queue == 6


def test_small_bodies_say_nothing_about_the_link():
    clock = [0.0]
    seen = meter(clock)
    for _ in range(5):
        seen.received(1000, 0.5)
    assert seen.signals().link_mbit_s is None


@pytest.mark.parametrize(("rows", "ms"), [(1, 20.0), (2, 20.0), (4, 30.0), (6, 40.0), (12, 80.0)])
def test_batches_between_measured_sizes_are_expected_on_a_line(rows, ms):
    variant = Profile("a", 0.9, 1, 1, (PassTime(2, 20.0, 22.0), PassTime(6, 40.0, 44.0)))
    found = latency_at(variant, rows)
    assert found.p50_ms == pytest.approx(ms)
    assert found.p95_ms == pytest.approx(1.1 * ms)


def test_memory_and_load_are_read_from_the_machine():
    import psutil

    assert 0 < free_memory() <= psutil.virtual_memory().total
    before = resident_bytes()
    held = torch.ones(16 << 20)
    grown = resident_bytes()
    del held
    assert grown - before > 50 << 20
    assert resident_bytes() - before < 20 << 20
    assert 0 <= others_load(psutil.Process()) <= 1


# --------------------------------------------------------------------------------------------------
# The loop


def controlled(portfolio, stream, load=None, **aims):
    switcher = Loaded(load or portfolio.module, "parent")
    profiles = [profile_of(v, 1) for v in portfolio.variants]
    moments = iter(stream)
    told = []
    objective = Objective(p95_ms=20.0, **aims)
    control = Control(switcher, profiles, objective, lambda: next(moments), told.append)
    return switcher, control, told


def test_load_makes_it_smaller_and_calm_makes_it_larger_again(portfolio):
    calm, busy = Signals(0.0), Signals(10.0, slowdown=6.0)
    stream = [calm, busy, dataclasses.replace(busy, time_s=11.0), Signals(20.0, p95_ms=3.0)]
    switcher, control, told = controlled(portfolio, stream)
    assert control.step().how is How.STAY
    assert control.step().after == switcher.current == "tenth"
    assert control.step().how is How.STAY
    assert control.step().after == switcher.current == "parent"
    assert [record.cost.after for record in told] == ["tenth", "parent"]
    assert "parent is expected at 48 ms" in told[0].decision.reason
    row = told[1].as_row()
    assert row["predicted_prepare_ms"] is not None  # learnt from the first switch
    assert row["p95_before_ms"] == 3.0
    assert row["prepare_ms"] > 0
    assert control.records[0].p95_after_ms == 3.0


def test_what_is_better_is_loaded_while_the_loop_goes_down(portfolio):
    """The loop waited for a slow load of something better while load called for a smaller one."""
    go, asked = threading.Event(), threading.Event()

    def load(name):
        if name == "parent" and asked.is_set():
            assert go.wait(30)
        return portfolio.module(name)

    calm, busy = Signals(10.0), Signals(20.0, slowdown=6.0)
    seen = [calm]
    switcher = Loaded(load, "half")
    profiles = [profile_of(v, 1) for v in portfolio.variants]
    control = Control(switcher, profiles, Objective(p95_ms=20.0), lambda: seen[0])
    asked.set()
    control.start(0.001)
    until(lambda: control.last is not None and control.last.after == "parent")
    assert switcher.current == "half"
    seen[0] = busy
    until(lambda: switcher.current == "tenth")
    assert not go.is_set()
    seen[0] = Signals(40.0)
    go.set()
    until(lambda: switcher.current == "parent")
    control.close()
    assert [r.cost.after for r in control.records if r.cost] == ["tenth", "parent"]
    switcher.close()


def test_no_thread_that_loads_has_a_lower_priority(portfolio):
    """One had: it waited for a processor with Python's lock, and requests waited for the lock."""
    nice = []

    def load(name):
        nice.append(os.nice(0) if sys.platform != "linux" else os.getpriority(
            os.PRIO_PROCESS, threading.get_native_id()
        ))  # fmt: skip
        return portfolio.module(name)

    stream = [Signals(10.0, slowdown=6.0), Signals(20.0)]
    switcher, control, _ = controlled(portfolio, stream, load)
    assert [control.step().after, control.step().after] == ["tenth", "parent"]
    assert len(set(nice)) == 1
    switcher.close()


def test_standbys_are_kept_and_help_at_once(portfolio):
    stream = (Signals(float(t)) for t in itertools.count())
    switcher = Loaded(portfolio.module, "parent")
    profiles = [profile_of(v, 1) for v in portfolio.variants]
    control = Control(
        switcher, profiles, Objective(p95_ms=20.0, margin=0.0), lambda: next(stream), standby=0.5
    )
    control.step()
    assert (switcher.current, switcher.spare) == ("parent", ("tenth",))
    assert control.pick(Backlog(1)) == ("parent", True)
    assert control.pick(Backlog(1, waited_ms=15.0)) == ("tenth", True)
    assert control.pick(Backlog(1, waited_ms=25.0)) == ("tenth", False)
    peak = {v.name: v.peak_bytes for v in profiles}
    control.aim(dataclasses.replace(control.objective, memory_bytes=peak["parent"]))
    control.step()  # the budget has no room beside the parent
    assert (switcher.current, switcher.spare) == ("parent", ())
    control.aim(dataclasses.replace(control.objective, memory_bytes=peak["tenth"]))
    assert control.pick(Backlog(1))[0] == "parent"  # until there is something that fits
    control.step()
    assert (switcher.current, switcher.spare) == ("tenth", ())
    assert control.records[-1].cost.prepare_ms > 0
    control.close()
    switcher.close()


def test_a_variant_that_cannot_be_loaded_is_left_alone_for_a_while(portfolio):
    def load(name):
        if name == "tenth":
            raise ModelError("tenth is damaged")
        return portfolio.module(name)

    stream = [Signals(float(t), slowdown=2.0) for t in range(10, 14)]
    switcher, control, told = controlled(portfolio, stream, load, down_dwell_s=0.0)
    control.aim(dataclasses.replace(control.objective, p95_ms=5.0))  # only the smallest does
    control.step()
    assert switcher.current == "parent"
    assert told[0].cost is None and told[0].error == "tenth is damaged"
    control.step()  # of the others the smallest answers
    assert switcher.current == "half"
    assert not control.standing.meets


def test_the_loop_tries_again_when_nothing_is_in_memory(portfolio):
    """It saw the name of the old variant, took it for what answers, and left requests waiting."""
    broken = set()

    def load(name):
        if name in broken:
            raise ModelError(f"{name} is gone")
        return portfolio.module(name)

    size = {v.name: profile_of(v, 1).peak_bytes for v in portfolio.variants}
    tight = Signals(10.0, slowdown=2.0, free_memory=0)  # no room for two: stop, load, start
    stream = [dataclasses.replace(tight, time_s=10.0 + t) for t in range(4)]
    switcher, control, told = controlled(portfolio, stream, load, down_dwell_s=0.0)
    control.aim(
        dataclasses.replace(control.objective, p95_ms=5.0, memory_bytes=int(1.3 * size["tenth"]))
    )
    broken |= {"parent", "half", "tenth"}
    assert control.step().how is How.COLD
    assert not switcher.ready
    assert told[-1].error == "parent is gone"
    control.step()
    assert not switcher.ready
    assert told[-1].cost is None
    broken.clear()
    control.step()
    assert switcher.ready
    assert switcher.current == control.standing.current == told[-1].cost.after
    control.step()
    assert switcher.ready
    switcher.close()


def test_a_variant_in_memory_is_not_read_again_where_memory_is_short(portfolio):
    """Standbys were given up before a switch without room for two: also the one that was wanted."""
    read = []

    def load(name):
        read.append(name)
        return portfolio.module(name)

    switcher = Loaded(load, "parent")
    switcher.keep(["tenth", "half"])
    profiles = [profile_of(v, 1) for v in portfolio.variants]
    seen = Signals(20.0, slowdown=6.0, free_memory=0)
    control = Control(switcher, profiles, Objective(p95_ms=20.0), lambda: seen)
    before = list(read)
    decision = control.step()
    assert decision.how is How.COLD
    assert switcher.current == decision.after == "tenth"
    assert read == before
    assert switcher.spare == ()
    control.close()
    switcher.close()


def test_a_budget_that_shrinks_while_it_runs_is_kept(portfolio):
    sizes = {v.name: profile_of(v, 1).peak_bytes for v in portfolio.variants}
    stream = [Signals(float(t)) for t in range(3)]
    switcher, control, _ = controlled(portfolio, stream)
    control.step()
    control.aim(dataclasses.replace(control.objective, memory_bytes=int(1.3 * sizes["half"])))
    decision = control.step()
    assert switcher.current == "half"
    assert decision.meets
    assert "needs" in decision.reason


def test_standbys_are_there_when_the_first_request_comes(portfolio):
    """They were loaded beside the first requests: of a rush at the start nearly all were late."""
    engine = PortfolioEngine(portfolio, ServingConfig(standby=0.5))
    with ExitStack() as stack:
        stack.callback(engine.close)
        assert engine.in_memory == ["parent"]
        engine.control.start(60.0)
        assert engine.in_memory == ["parent", "tenth"]


def test_the_loop_ends_when_it_is_told(portfolio):
    stream = (Signals(t / 10) for t in itertools.count())
    with ExitStack() as stack:
        switcher, control, _ = controlled(portfolio, stream)
        stack.callback(switcher.close)
        control.start(0.001)
        while control.last is None:
            pass
        control.close()
    assert control.last.after == "parent"


def test_a_decision_that_fails_is_logged_and_the_next_one_is_taken(portfolio, caplog):
    """The loop ended without a word: the variant of that moment answered for ever."""
    looks = itertools.count()

    def look():
        if next(looks) == 0:
            raise OSError("no /proc here")
        return Signals(10.0, slowdown=6.0)

    with ExitStack() as stack:
        profiles = [profile_of(v, 1) for v in portfolio.variants]
        switcher = Loaded(portfolio.module, "parent")
        stack.callback(switcher.close)
        control = Control(switcher, profiles, Objective(p95_ms=20.0), look)
        stack.callback(control.close)
        control.start(0.001)
        until(lambda: switcher.current == "tenth")
    assert "no /proc here" in caplog.text


def test_a_portfolio_without_variants_is_refused(portfolio):
    switcher = Loaded(portfolio.module, "parent")
    with pytest.raises(ConfigError, match="at least one variant"):
        Control(switcher, [], Objective(1.0), lambda: Signals(0.0))


def test_a_switch_to_what_is_in_memory_waits_for_no_other_one():
    """Cuts that were changed drained the old pipeline for up to a minute under the lock.

    A host that was lost meanwhile left requests where they were: the way around it stood ready, and
    could not be switched to.
    """
    entered, leave, loading, loaded = (threading.Event() for _ in range(4))

    class Slow(nn.Module):
        def forward(self, x):
            entered.set()
            leave.wait(20)
            return x

    def load(name):
        if name == "late":
            loading.set()
            loaded.wait(20)
        return Slow() if name == "first" else nn.Identity()

    switcher = Loaded(load, "first")
    switcher.keep(["spare"])

    def ask():
        with switcher.lease() as active:
            active.run(torch.ones(1))

    asking = threading.Thread(target=ask)
    asking.start()
    entered.wait(20)
    moving = threading.Thread(target=switcher.switch, args=("second",), daemon=True)
    moving.start()  # drains the first one, in which a request is
    assert until(lambda: switcher.current == "second")
    assert switcher.switch("spare").after == switcher.current == "spare"
    later = threading.Thread(target=switcher.switch, args=("late",), daemon=True)
    later.start()  # loads for long
    loading.wait(20)
    switcher.keep(["second"])
    assert switcher.switch("second").after == switcher.current == "second"
    for event in (leave, loaded):
        event.set()
    for thread in (asking, moving, later):
        thread.join(20)
        assert not thread.is_alive()
    assert switcher.current == "late"
    switcher.close()
    assert switcher.switch("second").after == "late"  # nothing is loaded into what is closed
