import copy
import dataclasses
import threading
import time

import pytest
import torch

from fedsys import models
from fedsys.config import parse, with_values
from fedsys.errors import FrameError, ModelError, SessionError
from fedsys.offload.emulation import Workers
from fedsys.offload.processors import Processors
from fedsys.offload.session import Session
from fedsys.offload.snapshot import SessionSpec, Snapshot
from fedsys.randomness import Address, drawing, rows
from fedsys.training import plain as training
from fedsys.training.federation import layered_model
from fedsys.training.optimizers import make_optimizer
from fedsys.training.part import Part, filled_stages, names_between, safe_input
from fedsys.training.plain import Proximal
from fedsys.training.schedule import micro_batch_bounds
from fedsys.transport.wire import Frame, decode, encode
from tests.waiting import until

SHAPE, CLASSES, ROUND, CLIENT = (1, 8, 8), 10, 3, 2
CPU = torch.device("cpu")


@pytest.fixture
def settings(configure):
    """Return a function from values to a configuration of the small CNN, which has dropout."""

    def made(pieces=1, kind="cnn", **client):
        base = configure("data=synthetic", f"model={kind}")
        model = {"width": 4, "hidden": 16} if kind == "cnn" else {"width": 4}
        return parse(
            with_values(base.text, model=model, client=client, schedule={"micro_batches": pieces})
        )

    return made


def state_of(config):
    model = models.build(dict(config.model), input_shape=SHAPE, num_classes=CLASSES, seed=1)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def batches_of(count, size=8):
    for step in range(count):
        generator = Address(7).torch("test", step)
        labels = torch.randint(0, CLASSES, (size - step % 3,), generator=generator)
        yield torch.randn(len(labels), *SHAPE, generator=generator), labels


def spec_of(config, first, last, **more):
    return SessionSpec(
        id="s", token="t", client=CLIENT, round=ROUND, first=first, last=last, config=config.text,
        input_shape=SHAPE, num_classes=CLASSES, micro_batches=config.schedule.micro_batches, **more,
    )  # fmt: skip


def over_the_wire(frame):
    return decode(encode(frame))


class Pair:
    """A device and the session on its edge, without a link between them."""

    def __init__(self, config, first=1, last=4, **more):
        self.config, self.cuts = config, (first, last)
        self.model = layered_model(config, SHAPE, CLASSES)
        whole = state_of(config)
        names = names_between(self.model, self.cuts)
        mine = {n: t for n, t in whole.items() if n in names[1]}
        start = Snapshot.from_frame(
            over_the_wire(Frame("open", {"step": 0}, Snapshot(0, mine, {}).tensors()))
        )
        self.spec = spec_of(config, first, last, **more)
        self.session = Session(self.spec, start, CPU)
        state = {n: t for n, t in whole.items() if n not in names[1]}
        stages = filled_stages(self.model, self.cuts, [0, 2], state, CPU)
        self.part = Part(stages, config, ROUND, proximal_mu=self.spec.proximal_mu)
        self.address = Address(config.seed, CLIENT, ROUND)
        self.private = last < len(self.model)

    def ask(self, frame):
        return [over_the_wire(reply) for reply in self.session.handle(over_the_wire(frame))]

    def bounds(self, size):
        return list(micro_batch_bounds(size, self.spec.micro_batches))

    def activations(self, step, x, y):
        """Return the activations of a step, and the frames that carry them."""
        with drawing(self.address, step, len(y)):
            for piece, (start, stop) in enumerate(self.bounds(len(y))):
                with rows(start, stop):
                    z = self.part.modules[0](x[start:stop])
                labels = {} if self.private else {"labels": y[start:stop]}
                tensors = {"x": z.detach(), **labels}
                meta = {"step": step, "piece": piece, "batch": len(y), "codec": "fp32"}
                meta["needs_gradient"] = z.requires_grad
                yield z, Frame("activation", meta, tensors)

    def tail(self, step, piece, answer, y, size):
        """Return the gradient of what came back from the edge, as the frame that carries it."""
        z = answer.tensors["x"].requires_grad_()
        back = self.part.modules[1]
        with drawing(self.address, step, size), rows(*self.bounds(size)[piece]):
            outputs = back(safe_input(back, z))
        training.loss_of(outputs, y, len(y) / size).backward()
        meta = {"step": step, "piece": piece, "codec": "fp32"}
        return Frame("gradient", meta, {"x": z.grad})

    def step(self, step, x, y, *, ask=None, order=lambda frames: frames):
        ask = ask or self.ask
        self.part.zero_grad()
        made = list(self.activations(step, x, y))
        answers = [a for _, frame in order(made) for a in ask(frame)]
        if self.private:
            grads = [
                self.tail(step, a.meta["piece"], a, y[start:stop], len(y))
                for a, (start, stop) in zip(answers, self.bounds(len(y)), strict=True)
            ]
            answers = [a for frame in grads for a in ask(frame)]
        assert [a.meta["piece"] for a in answers] == list(range(len(made)))
        for (z, _), answer in zip(made, answers, strict=True):
            if z.requires_grad:
                z.backward(answer.tensors["x"])
        norms = self.part.norms()
        if self.part.clips:
            (answer,) = ask(Frame("norms", {"step": step, "norms": norms}))
            norms = {**norms, **answer.meta["norms"]}
        self.part.step(norms)

    def state(self):
        return {**self.part.state(), **self.session.snapshot().state}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def plainly_trained(config, batches, mu=0.0):
    model = models.build(dict(config.model), input_shape=SHAPE, num_classes=CLASSES, seed=1)
    model.load_state_dict(state_of(config))
    optimizer = make_optimizer(model.parameters(), config.client, config.client.lr)
    training.train(
        model, optimizer, batches, Address(config.seed, CLIENT, ROUND),
        micro_batches=config.schedule.micro_batches, clip_norm=config.client.clip_norm,
        anchor=Proximal.at(model, mu) if mu else None,
    )  # fmt: skip
    return dict(model.state_dict())


CASES = {
    "one piece": ({}, {}, 1, 4),
    "three pieces": ({"pieces": 3}, {}, 2, 4),
    "inputs leave the device": ({"pieces": 2}, {}, 0, 4),
    "private labels": ({"pieces": 3}, {}, 1, 3),
    "private labels, clipped, proximal": (
        {"pieces": 2, "clip_norm": 0.3, "weight_decay": 0.01}, {"proximal_mu": 0.1}, 1, 3,
    ),
    "clipped": ({"clip_norm": 0.3}, {}, 2, 4),
}  # fmt: skip


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request, settings):
    client, more, first, last = request.param
    config = settings(**client)
    return config, (lambda: Pair(config, first, last, **more)), more.get("proximal_mu", 0.0)


def test_a_session_and_its_device_compute_what_the_plain_loop_computes(case):
    config, made, mu = case
    pair = made()
    for step, (x, y) in enumerate(batches_of(4)):
        pair.step(step, x, y)
    assert same(dict(sorted(pair.state().items())), dict(sorted(
        plainly_trained(config, batches_of(4), mu).items()
    )))  # fmt: skip


def test_an_operation_that_comes_again_is_answered_again_and_not_done_again(case):
    _, made, _ = case
    once, often = made(), made()
    past = []

    def repeatedly(frame):
        answers = often.ask(frame)
        past.append((frame, answers))
        # all that this step and the one before have sent so far, as after a lost link
        for old, expected in past:
            if old.meta["step"] >= frame.meta["step"] - 1:
                assert [encode(a) for a in often.ask(old)] == [encode(a) for a in expected]
        return answers

    for step, (x, y) in enumerate(batches_of(4)):
        once.step(step, x, y)
        often.step(step, x, y, ask=repeatedly)
    assert same(once.state(), often.state())


def test_an_answer_is_forgotten_when_the_step_after_the_next_begins(settings):
    pair = Pair(settings())
    steps = list(batches_of(3))
    first = [frame for _, frame in pair.activations(0, *steps[0])]
    for step, (x, y) in enumerate(steps):
        pair.step(step, x, y)
    with pytest.raises(SessionError, match="step 0 of session s, where step 3 is due"):
        pair.ask(first[0])


def test_pieces_that_overtake_each_other_are_done_in_their_order(settings):
    config = settings(pieces=4)
    straight, mixed = Pair(config), Pair(config)
    orders = [(3, 2, 1, 0), (1, 0, 3, 2), (2, 3, 0, 1)]
    for step, (x, y) in enumerate(batches_of(3)):
        straight.step(step, x, y)
        mixed.step(step, x, y, order=lambda made, s=step: [made[i] for i in orders[s]])
    assert same(straight.state(), mixed.state())


def changed(frame, tensors=None, **meta):
    kept = {k: v for k, v in {**frame.meta, **meta}.items() if v != "absent"}
    named = {k: v for k, v in {**frame.tensors, **(tensors or {})}.items() if v is not None}
    return Frame(frame.kind, kept, named)


REFUSED = {
    "a step ahead": lambda f: changed(f, step=f.meta["step"] + 1),
    "no step": lambda f: changed(f, step="absent"),
    "a step in words": lambda f: changed(f, step="one"),
    "a step that is true": lambda f: changed(f, step=True),
    "half a step": lambda f: changed(f, step=0.5),
    "a negative step": lambda f: changed(f, step=-1),
    "a piece too many": lambda f: changed(f, piece=3),
    "a negative piece": lambda f: changed(f, piece=-1),
    "no piece": lambda f: changed(f, piece="absent"),
    "an empty mini-batch": lambda f: changed(f, batch=0),
    "another mini-batch": lambda f: changed(f, batch=f.meta["batch"] + 3),
    "no mini-batch": lambda f: changed(f, batch="absent"),
    "no activation": lambda f: changed(f, {"x": None}),
    "an example too many": lambda f: changed(f, {"x": torch.cat([f.tensors["x"][:1]] * 9)}),
    "no example": lambda f: changed(f, {"x": f.tensors["x"][:0]}),
    "a channel too few": lambda f: changed(f, {"x": f.tensors["x"][:, :-1]}),
    "one number": lambda f: changed(f, {"x": torch.tensor(1.0)}),
    "doubles": lambda f: changed(f, {"x": f.tensors["x"].double()}),
    "integers": lambda f: changed(f, {"x": f.tensors["x"].long()}),
    "an unknown codec": lambda f: changed(f, codec="gzip"),
    "no labels": lambda f: changed(f, {"labels": None}),
    "a label too few": lambda f: changed(f, {"labels": f.tensors["labels"][1:]}),
    "short labels": lambda f: changed(f, {"labels": f.tensors["labels"].int()}),
    "a class that is not there": lambda f: changed(f, {"labels": f.tensors["labels"] + CLASSES}),
    "a negative class": lambda f: changed(f, {"labels": f.tensors["labels"] - CLASSES}),
    "a gradient out of turn": lambda f: Frame("gradient", f.meta, f.tensors),
    "norms out of turn": lambda f: Frame("norms", {"step": f.meta["step"], "norms": {}}),
    "norms in words": lambda f: Frame("norms", {"step": f.meta["step"], "norms": {"a": "b"}}),
    "an unknown operation": lambda f: Frame("format-disk", f.meta, f.tensors),
    "an evaluation of another shape": lambda f: Frame(
        "evaluate", {"index": 0, "codec": "fp32"}, {"x": torch.ones(2, 3)}
    ),
}


@pytest.mark.parametrize("wrong", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused_changes_nothing(wrong, settings):
    config = settings(pieces=3)
    pair, undisturbed = Pair(config), Pair(config)

    def disturbed(frame):
        with pytest.raises((FrameError, SessionError)):
            pair.ask(wrong(frame))
        answers = pair.ask(frame)
        return answers

    for step, (x, y) in enumerate(batches_of(2)):
        undisturbed.step(step, x, y)
        pair.step(step, x, y, ask=disturbed)
    assert same(pair.state(), undisturbed.state())
    assert same(pair.session.snapshot().optimizer, undisturbed.session.snapshot().optimizer)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda f: changed(f, {"x": f.tensors["x"][:1]}),
        lambda f: changed(f, {"x": f.tensors["x"].double()}),
        lambda f: changed(f, {"x": None}),
        lambda f: changed(f, piece=2),
        lambda f: changed(f, step=f.meta["step"] + 1),
    ],
    ids=["short", "double", "nothing", "too early", "of another step"],
)
def test_a_refused_gradient_changes_nothing(wrong, settings):
    config = settings(pieces=2)
    pair, undisturbed = Pair(config, 1, 3), Pair(config, 1, 3)

    def disturbed(frame):
        if frame.kind == "gradient":
            with pytest.raises((FrameError, SessionError)):
                pair.ask(wrong(frame))
        return pair.ask(frame)

    for step, (x, y) in enumerate(batches_of(2)):
        undisturbed.step(step, x, y)
        pair.step(step, x, y, ask=disturbed)
    assert same(pair.state(), undisturbed.state())


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_session_restored_from_a_snapshot_goes_on_bit_for_bit(case, at):
    _, made, _ = case
    straight, moved = made(), made()
    for step, (x, y) in enumerate(batches_of(4)):
        if step == at:
            snapshot = moved.session.snapshot()
            frame = over_the_wire(Frame("state", {"step": at}, snapshot.tensors()))
            moved.session = Session(moved.spec, Snapshot.from_frame(frame), CPU)
            assert moved.session.steps == at
        straight.step(step, x, y)
        moved.step(step, x, y)
    assert same(straight.state(), moved.state())


def test_a_snapshot_is_frozen(settings):
    pair = Pair(settings())
    steps = list(batches_of(2))
    pair.step(0, *steps[0])
    frozen = pair.session.snapshot()
    before = copy.deepcopy(frozen)
    pair.step(1, *steps[1])
    assert frozen.step == 1
    assert same(frozen.state, before.state) and same(frozen.optimizer, before.optimizer)


def test_a_session_in_the_middle_of_a_step_gives_no_snapshot(settings):
    for late in (0, 1):  # the piece that is there: in its turn, and early
        pair = Pair(settings(pieces=2))
        x, y = next(batches_of(1))
        made = list(pair.activations(0, x, y))
        pair.ask(made[late][1])
        with pytest.raises(SessionError, match="in the middle of step 0"):
            pair.session.snapshot()


def test_replicas_are_made_after_every_so_many_steps(settings):
    replicas = []
    pair = Pair(settings(), replicate_every=2)
    start = pair.session.snapshot()
    pair.session = Session(pair.spec, start, CPU, lambda spec, s: replicas.append((spec, s)))
    for step, (x, y) in enumerate(batches_of(5)):
        pair.step(step, x, y)
    assert [(spec.id, s.step) for spec, s in replicas] == [("s", 2), ("s", 4)]


def test_an_evaluation_in_the_middle_of_a_step_leaves_everything_as_it_is(settings):
    config = settings(pieces=2)
    pair, undisturbed = Pair(config), Pair(config)
    given = []

    def between(frame):
        answers = pair.ask(frame)
        z = frame.tensors["x"]
        for size in (len(z), 1):
            meta = {"index": 4, "codec": "fp32"}
            (answer,) = pair.ask(Frame("evaluate", meta, {"x": z[:size]}))
            assert answer.kind == "outputs" and answer.meta["index"] == 4
            given.append(answer.tensors["x"])
        return answers

    for step, (x, y) in enumerate(batches_of(3)):
        undisturbed.step(step, x, y)
        pair.step(step, x, y, ask=between)
    assert same(pair.state(), undisturbed.state())
    assert all(outputs.isfinite().all() for outputs in given)


def test_an_evaluation_gives_the_outputs_of_the_whole_model(settings):
    config = settings()
    pair = Pair(config, 2, 4)
    model = models.build(dict(config.model), input_shape=SHAPE, num_classes=CLASSES, seed=1)
    model.load_state_dict(state_of(config))
    x, _ = next(batches_of(1))
    model.eval()
    pair.part.modules[0].eval()
    with torch.no_grad():
        expected, z = model(x), pair.part.modules[0](x)
    (answer,) = pair.ask(Frame("evaluate", {"index": 0, "codec": "fp32"}, {"x": z}))
    assert torch.equal(answer.tensors["x"], expected)


def test_the_norms_of_a_step_are_answered_by_those_of_the_edge_and_make_it_step(settings):
    pair = Pair(settings(clip_norm=1.0), 2, 4)
    x, y = next(batches_of(1))
    ((_, frame),) = pair.activations(0, x, y)
    with pytest.raises(SessionError, match="not all done"):
        pair.ask(Frame("norms", {"step": 0, "norms": {}}))
    pair.ask(frame)
    assert pair.session.steps == 0
    (answer,) = pair.ask(Frame("norms", {"step": 0, "norms": {"conv1.conv.weight": 4.0}}))
    assert pair.session.steps == 1
    parameters = [n for n in pair.session.snapshot().state if n.startswith("fc")]
    assert set(answer.meta["norms"]) == set(parameters)
    assert all(norm >= 0 for norm in answer.meta["norms"].values())


def test_a_session_has_the_units_between_its_cuts_and_nothing_else(settings):
    config = settings(momentum=0.9)
    for cuts in ((1, 4), (1, 3), (0, 2), (2, 4)):
        pair = Pair(config, *cuts)
        pair.step(0, *next(batches_of(1)))
        names = {n for unit in pair.model.units[slice(*cuts)] for n in unit.names}
        snapshot = pair.session.snapshot()
        assert set(snapshot.state) == names
        assert {n.partition("|")[0] for n in snapshot.optimizer} <= names
        whole = (*pair.model.graph.parameters(), *pair.model.graph.buffers())
        assert all(tensor.is_meta for tensor in whole)


def test_the_size_of_a_session_is_that_of_weights_and_momentum(settings):
    pair = Pair(settings(momentum=0.9), 2, 4)
    state = pair.session.snapshot().state
    weights = sum(t.nbytes for t in state.values())
    assert pair.session.nbytes() == weights
    pair.step(0, *next(batches_of(1)))
    assert pair.session.nbytes() == 2 * weights  # the units from 2 on have no buffers


def test_a_batchnorm_that_sees_one_value_is_named(settings):
    pair = Pair(settings(kind="resnet18"), 7, 10)  # from here on, maps of 2x2 and 1x1
    x, y = next(batches_of(1, size=1))
    ((_, frame),) = pair.activations(0, x, y)
    with pytest.raises(ModelError, match=r"block7\.\S*norm\S* \(BatchNorm2d\): gets one value"):
        pair.ask(frame)


def test_a_specification_survives_the_header_of_a_frame(settings):
    spec = spec_of(settings(), 1, 3, proximal_mu=0.5, holder="device-2", replicate_every=4)
    meta = over_the_wire(Frame("open", {"spec": spec.to_meta()})).meta["spec"]
    assert SessionSpec.from_meta(meta) == spec


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(SessionSpec)])
def test_a_specification_with_a_value_of_another_type_is_refused(name, settings):
    meta = {**spec_of(settings(), 1, 4).to_meta(), "input_shape": list(SHAPE)}
    for wrong in (None, True, {"a": 1}, b"x"):
        with pytest.raises(FrameError, match=name):
            SessionSpec.from_meta({**meta, name: wrong})
    with pytest.raises(FrameError, match=name):
        SessionSpec.from_meta({k: v for k, v in meta.items() if k != name})


@pytest.mark.parametrize(
    "wrong",
    [
        {"input_shape": []},
        {"input_shape": [1] * 9},
        {"input_shape": [1, 8, "8"]},
        {"input_shape": [1, 8, 0]},
        {"num_classes": 0},
        {"micro_batches": 0},
        {"codec_up": "gzip"},
    ],
)
def test_a_specification_with_an_impossible_value_is_refused(wrong, settings):
    with pytest.raises(FrameError, match="open: "):
        SessionSpec.from_meta(
            {**spec_of(settings(), 1, 4).to_meta(), "input_shape": [1, 8, 8], **wrong}
        )


@pytest.mark.parametrize("cuts", [(3, 2), (1, 5), (-1, 2)])
def test_cuts_that_the_model_does_not_have_are_refused(cuts, settings):
    with pytest.raises(FrameError, match="of 4"):
        Session(spec_of(settings(), *cuts), Snapshot(0, {}, {}), CPU)


def test_a_state_that_is_not_that_of_the_units_is_refused(settings):
    config = settings()
    mine = Pair(config, 2, 4).session.snapshot().state
    name = next(iter(mine))
    lacking = {n: t for n, t in mine.items() if n != name}
    foreign = {**mine, "elsewhere.weight": torch.zeros(2)}
    reshaped = {**mine, name: torch.zeros(3, 3)}
    for wrong in (lacking, foreign, reshaped):
        with pytest.raises(ModelError):
            Session(spec_of(config, 2, 4), Snapshot(0, wrong, {}), CPU)
    stray = {"elsewhere.weight|momentum_buffer": torch.zeros(2)}
    with pytest.raises(ModelError, match="no parameter"):
        Session(spec_of(config, 2, 4), Snapshot(0, mine, stray), CPU)


def test_waiting_for_a_processor_is_not_computing(last_layer):
    """It was taken for a slow edge, which sent devices home, and counted twice with contention."""
    workers = Workers("edge")
    workers.processors = Processors(1)
    session = Session(last_layer.spec(), last_layer.start(), CPU, workers=workers)
    taken, free = threading.Event(), threading.Event()
    other = threading.Thread(
        target=workers.processors.do, args=(lambda: (taken.set(), free.wait(30)), 1)
    )
    replies = []
    ours = threading.Thread(target=lambda: replies.extend(session.handle(last_layer.activation(0))))
    other.start()
    assert taken.wait(30)
    ours.start()
    until(session.at_work)
    time.sleep(0.05)  # it comes to the processor meanwhile
    freed_s = time.monotonic()
    free.set()
    ours.join(30)
    other.join(30)
    _, began, middle, ended = replies[0].meta["at_us"]
    assert 1e6 * freed_s - 1 <= began <= middle <= ended
