"""The rules of moves under every order of messages, losses and crashes that Hypothesis thinks of.

The edges of this model run `fedsys.offload.migration`, as edge servers do. A session's state is the
number of steps that were done on it, so a step that is lost or done twice shows at once.
"""

from dataclasses import dataclass, field, replace
from functools import partial

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedsys.offload import fencing, migration
from fedsys.offload.fencing import TRAINS, Copy, CopyPhase, Epoch, Presented

EDGES = ("a", "b", "c")
PLACES = st.sampled_from(EDGES)
SAFE = settings(max_examples=300, stateful_step_count=50)


@dataclass
class ModelEdge:
    """An edge server: its copy, the steps that were done on it, and those that it sent ahead."""

    name: str
    up: bool = True
    copy: Copy | None = None
    steps: int = 0

    def become(self, copy, steps=None):
        self.copy = copy
        if steps is not None:
            self.steps = steps


@dataclass
class ModelDevice:
    """A device: what it did, under which token, where it is, and where it was told to go."""

    steps: int = 0
    shown: Presented = field(default_factory=Presented)
    at: str = ""  # the edge to which it has a link; empty: none
    last: str = "a"
    told: str = ""


@dataclass(frozen=True)
class Message:
    kind: str
    source: str
    to: str
    epoch: Epoch
    steps: int = 0


class Moves(RuleBasedStateMachine):
    """One device, three edge servers, a server app, and a network that does what it likes."""

    def __init__(self):
        super().__init__()
        self.edges = {name: ModelEdge(name) for name in EDGES}
        self.device = ModelDevice()
        self.flying: list[Message] = []
        self.generation, self.replica, self.crashed = 1, 0, False
        self.edges["a"].become(Copy(Epoch(1, 0, "a")), 0)

    # --- what the device does ---------------------------------------------------------------------

    @rule(answered=st.booleans())
    def train(self, answered):
        """It has a step done, whose answer may be lost with the link."""
        device = self.device
        if not device.at:
            return
        edge = self.edges[device.at]
        if not fencing.may_train(edge.copy, device.shown.epoch):
            device.at = ""  # the edge ends the link
            return
        edge.copy = fencing.trained(edge.copy)
        assert edge.steps in (device.steps, device.steps + 1)
        edge.steps = device.steps + 1  # done now, or answered from memory
        if answered:
            device.steps += 1
        else:
            device.at = ""

    @rule(to=PLACES)
    def announce(self, to):
        if self.device.at:
            self.begin(self.device.at, to)

    @rule()
    def lose_link(self):
        self.device.at = ""

    @rule(name=PLACES, answered=st.booleans())
    def greet(self, name, answered):
        """It asks an edge, whose answer may be lost."""
        if not self.device.at:
            self.ask(name, answered)

    def ask(self, name, answered=True, fetched=True):
        device, edge = self.device, self.edges[name]
        if not edge.up:
            self.missed(name)
            return
        looked = False
        while True:
            edge.copy, said = migration.on_hello(edge.copy, name, device.shown)
            if said[0].kind == "unknown" and not looked and device.last != name:
                looked = True
                if self.fetch(edge, fetched):
                    told = replace(device.shown, told=edge.copy.epoch)
                    edge.copy, said = migration.on_hello(edge.copy, name, told)
            break
        for say in said[1:]:
            self.flying.append(Message(say.kind, name, say.to, say.epoch))
        if answered:
            self.hear(edge, said[0])

    def hear(self, edge, say):
        device = self.device
        if say.kind == "welcome":
            newer = say.epoch.generation > device.shown.epoch.generation
            if newer:  # both halves return to a step that both have kept
                device.steps = edge.steps
            assert edge.steps in (device.steps, device.steps + 1)
            device.shown, device.at, device.last = Presented(say.epoch), edge.name, edge.name
            device.told = ""
        elif say.kind == "redirect":
            if device.shown.told != say.epoch:
                device.shown = Presented(device.shown.epoch, say.epoch)
            device.told = say.epoch.holder
        elif say.kind == "unknown":
            self.missed(edge.name)

    def missed(self, name):
        if name == self.device.told:
            self.device.shown = replace(self.device.shown, back=True)

    def fetch(self, edge, arrives):
        """An edge without a copy asks the one where the device was; its answer may be lost."""
        source = self.edges[self.device.last]
        for _ in EDGES:
            if not source.up or source is edge:
                return False
            source.copy, (say,) = migration.on_fetch(
                source.copy, source.name, edge.name, self.device.shown
            )
            if say.kind != "redirect":
                break
            source = self.edges[say.epoch.holder]
        if say.kind != "transfer" or not arrives:
            return False
        return self.arrive(edge, source, say.epoch, source.steps)

    def arrive(self, edge, source, epoch, steps):
        before = edge.copy
        edge.copy, (say,) = migration.on_transfer(edge.copy, source.name, epoch)
        if edge.copy is not before:
            edge.steps = steps
        return say.kind == "committed"

    # --- what edges and the network do ------------------------------------------------------------

    def begin(self, name, to):
        edge = self.edges[name]
        if edge.up:
            edge.copy, said = migration.on_move(edge.copy, name, to)
            self.send(edge, said)

    def send(self, edge, said):
        for say in said:
            if say.to == migration.DEVICE:
                if say.kind == "redirect" and self.device.at == edge.name:
                    self.device.at = ""
                    self.hear(edge, say)
            else:
                self.flying.append(Message(say.kind, edge.name, say.to, say.epoch, edge.steps))

    @rule(name=PLACES, to=PLACES)
    def command(self, name, to):
        self.begin(name, to)

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), again=st.booleans())
    def deliver(self, data, again):
        """A message arrives: any of those that are on their way, and perhaps once more later."""
        message = data.draw(st.sampled_from(self.flying))
        if not again:
            self.flying.remove(message)
        self.receive(message)

    def receive(self, message):
        edge, source = self.edges[message.to], self.edges[message.source]
        if not edge.up:
            return
        copy, epoch = edge.copy, message.epoch
        if message.kind == "transfer":
            if self.arrive(edge, source, epoch, message.steps):
                self.flying.append(Message("committed", edge.name, source.name, epoch))
            return
        decide = {
            "prepare": partial(migration.on_prepare, source=source.name),
            "prepared": migration.on_prepared,
            "committed": migration.on_committed,
            "refused": migration.on_failed,
            "release": migration.on_release,
            "cancel": migration.on_cancel,
        }[message.kind]
        edge.copy, said = decide(copy, epoch=epoch)
        self.send(edge, said)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def lose_message(self, data):
        self.flying.remove(data.draw(st.sampled_from(self.flying)))

    @rule(name=PLACES)
    def time_out(self, name):
        """An edge waits no longer for another one."""
        edge = self.edges[name]
        if edge.up and edge.copy is not None and edge.copy.offered is not None:
            edge.copy, said = migration.on_failed(edge.copy, edge.copy.offered)
            self.send(edge, said)

    @rule(name=PLACES)
    def crash(self, name):
        self.crashed = True
        self.edges[name] = ModelEdge(name, up=False)
        if self.device.at == name:
            self.device.at = ""

    @rule(name=PLACES)
    def restart(self, name):
        self.edges[name].up = True

    # --- what the server app does -----------------------------------------------------------------

    @rule(name=PLACES)
    def replicate(self, name):
        edge = self.edges[name]
        if edge.copy is not None and edge.copy.phase in TRAINS and name == self.device.at:
            self.replica = max(self.replica, min(edge.steps, self.device.steps))

    @rule(name=PLACES)
    def recover(self, name):
        """It takes an edge for lost, rightly or not, and opens the session at another one."""
        edge = self.edges[name]
        if edge.up:
            self.crashed = True
            self.generation += 1
            epoch = Epoch(self.generation, 0, name)
            edge.copy, (say,) = migration.on_open(edge.copy, epoch)
            assert say.kind == "opened"
            edge.steps = self.replica

    # --- what must hold ---------------------------------------------------------------------------

    @invariant()
    def at_most_one_edge_trains_the_device(self):
        bound = self.device.shown.epoch
        trainers = [e.name for e in self.edges.values() if fencing.may_train(e.copy, bound)]
        assert len(trainers) <= 1

    @invariant()
    def no_two_copies_train_under_one_token(self):
        tokens = [e.copy.epoch for e in self.edges.values() if e.copy and e.copy.phase in TRAINS]
        assert len(set(tokens)) == len(tokens)

    def teardown(self):
        """Once nothing fails any more, the device goes on; without a crash, from where it is."""
        for edge in self.edges.values():
            edge.up = True
        for message in self.flying:
            self.receive(message)
        for name in EDGES:
            self.time_out(name)
        self.flying = []
        where = self.device.steps
        if not self.find():
            assert self.crashed  # what no crash destroyed is not lost
            self.recover("a")
            assert self.find()
        if not self.crashed:
            assert self.device.steps == where
        for edge in self.edges.values():  # the server app releases a session wherever it was
            edge.become(None)

    def find(self):
        for _ in range(4):
            told = [self.device.told] if self.device.told else []
            for name in (*told, self.device.last, *EDGES):
                if not self.device.at:
                    self.ask(name)
        return bool(self.device.at)


TestMoves = Moves.TestCase
TestMoves.settings = SAFE


def test_a_release_that_comes_late_leaves_the_copy_that_is_back():
    """The copy was there again and waited for its device when the word of its first leaving came.

    It was taken for one that nobody needs; the model check found that.
    """
    back = Copy(Epoch(1, 2, "a"), issued=2, granted=Epoch(1, 1, "b"))
    assert migration.on_release(back, Epoch(1, 1, "b"))[0] is back


def test_a_copy_that_was_left_trains_no_more():
    """The path without a fault, token by token."""
    source = Copy(Epoch(1, 0, "a"))
    source, (prepare,) = migration.on_move(source, "a", "b")
    assert fencing.may_train(source, Epoch(1, 0, "a"))
    source, _ = migration.on_prepared(source, prepare.epoch)
    assert not fencing.may_train(source, Epoch(1, 0, "a"))
    target, _ = migration.on_transfer(None, "a", prepare.epoch)
    assert target.phase is CopyPhase.STAGED
    source, (redirect,) = migration.on_committed(source, prepare.epoch)
    shown = Presented(Epoch(1, 0, "a"), redirect.epoch)
    target, (welcome, release) = migration.on_hello(target, "b", shown)
    assert welcome.epoch == (1, 1, "b")
    assert migration.on_release(source, release.epoch)[0] is None
    assert migration.on_hello(source, "a", Presented(welcome.epoch))[0] is None
