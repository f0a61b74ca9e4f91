"""The rules of moves under every order of messages, losses and crashes that Hypothesis thinks of.

The edges of this model run `fedsys.offload.migration`, as edge servers do. A session's state is the
number of steps that were done on it, so a step that is lost or done twice shows at once.
"""

from dataclasses import dataclass, field, replace
from functools import partial

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedsys.offload import fencing, migration, mirroring
from fedsys.offload.fencing import TRAINS, Copy, CopyPhase, Epoch, Presented

EDGES = ("a", "b", "c")
PLACES = st.sampled_from(EDGES)
SAFE = settings(max_examples=300, stateful_step_count=50)


FAILS = precondition(lambda self: self.fails)


class Tokens:
    """All tokens that were made: each is to be new, or for the same state as before.

    A device that asked one edge after another and heard none, while words between those were lost,
    left two copies behind that handed different states on under one token: the second was taken for
    the first come again, and its steps were lost. Only some of 300 runs in several hundred showed
    that. Tokens tell since when they are made now.
    """

    def __init__(self):
        self.made, self.lived, self.arrived = {}, set(), set()

    def changed(self, before, after, steps):
        """Look at what became of a copy."""
        if after is None:
            return
        if after.offered is not None and (before is None or before.offered != after.offered):
            self.add(after.offered, steps)
        given = before is not None and before.phase is CopyPhase.GIVEN
        if given and after.phase in TRAINS and after.epoch[0] == before.epoch[0]:
            self.add(after.epoch, steps)  # it is back, and whoever has it may train it, too
        if after.phase in TRAINS:
            self.lived.add(after.epoch)
        self.arrived.add(after.epoch)

    def add(self, token, steps):
        assert self.made.setdefault(token, steps) == steps


class ModelEdge:
    """An edge server: its copy, and the steps that were done on it."""

    def __init__(self, name, tokens, *, up=True, apart=False):
        self.name, self.up, self._tokens = name, up, tokens
        self.apart = apart  # nobody reaches it, and it reaches nobody
        self._copy, self.steps = None, 0
        self.mirror = None  # as a source: the token, and how many operations were sent on
        self.shadow, self.shadow_steps, self.tainted = None, 0, False

    @property
    def copy(self):
        return self._copy

    @copy.setter
    def copy(self, copy):
        self._tokens.changed(self._copy, copy, self.steps)
        self._copy = copy

    @property
    def reached(self):
        return self.up and not self.apart

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
    number: int | None = None  # of an operation; of a transfer: as many has the shadow done


class Moves(RuleBasedStateMachine):
    """One device, three edge servers, a server app, and a network that does what it likes."""

    def __init__(self):
        super().__init__()
        self.tokens = Tokens()
        self.edges = {name: ModelEdge(name, self.tokens) for name in EDGES}
        self.device = ModelDevice()
        self.flying: list[Message] = []
        self.generation, self.replica = 1, 0
        self.destroyed = False  # a crash took the last copy that the device could go on with
        self.recovered = False  # the server app opened the session anew
        self.spotless = True  # nothing has failed so far
        self.litters = False  # a copy may be left that nobody hears of any more
        self.edges["a"].become(Copy(Epoch(1, 0, "a")), 0)

        self.tokens.add(Epoch(1, 0, "a"), 0)
        self.fails = True

    @initialize(fails=st.integers(0, 3))
    def begin_run(self, fails):
        """In one run of four nothing fails, so that nothing excuses what is left behind."""
        self.fails = fails > 0

    def spoil(self, failed=True):
        """Something fails after which a copy may be left that nobody tells to go."""
        self.spotless &= not failed
        self.litters |= failed

    # --- what the device does ---------------------------------------------------------------------

    @rule(answered=st.booleans())
    def train(self, answered):
        """It has a step done, whose answer may be lost with the link."""
        answered |= not self.fails
        self.spoil(not answered)
        self.work(answered)

    def work(self, answered=True):
        device = self.device
        if not device.at:
            return
        edge = self.edges[device.at]
        if not fencing.may_train(edge.copy, device.shown.epoch):
            device.at = ""  # the edge ends the link
            return
        edge.copy, said = migration.on_train(edge.copy)
        self.send(edge, said)
        assert edge.steps in (device.steps, device.steps + 1)
        if edge.steps == device.steps:
            self.pass_on(edge)
        edge.steps = device.steps + 1  # done now, or answered from memory
        if answered:
            device.steps += 1
        else:
            device.at = ""

    def pass_on(self, edge):
        """What is done at the source goes on to the shadow."""
        copy = edge.copy
        if edge.mirror is not None and copy.offered == edge.mirror[0]:
            epoch, number = edge.mirror
            edge.mirror = epoch, number + 1
            self.flying.append(Message("mirror", edge.name, copy.peer, epoch, number=number))

    @rule(to=PLACES, steps=st.integers(0, 3), kept=st.integers(0, 9))
    def foresee(self, to, steps, kept):
        """It is sent ahead, trains on, and leaves; messages may be lost, late, or come twice."""
        edge = self.edges[self.device.at] if self.device.at else None
        if edge is None or edge.copy is None or edge.copy.phase is not CopyPhase.LIVE:
            return
        self.announce(to)
        if edge.copy.phase is not CopyPhase.OFFERED:
            return
        late = [m for m in self.flying if m.kind == "prepare"]
        self.flying = [m for m in self.flying if m.kind != "prepare"]
        edge.mirror = edge.copy.offered, 0
        self.receive(Message("ahead", edge.name, to, edge.copy.offered, edge.steps))
        for _ in range(steps):
            self.work()
        for message in [m for m in self.flying if m.kind == "mirror"][: kept if self.fails else 9]:
            self.flying.remove(message)
            self.receive(message)
        self.flying += late

    @FAILS
    @rule(name=PLACES)
    def compute_otherwise(self, name):
        """A shadow has other bits, as on another kind of processor."""
        self.edges[name].tainted = True

    @rule(to=PLACES)
    def announce(self, to):
        if self.device.at:
            self.begin(self.device.at, to)

    @rule(to=PLACES, far=st.integers(0, 5), steps=st.integers(0, 2), again=st.booleans())
    def go_on(self, to, far, steps, again):
        """It trains a little and begins to move, and some of the messages of that are in time.

        Rules one by one come this far too seldom for what can go wrong behind it.
        """
        again &= self.fails
        self.spoil(again)
        if not self.device.at:
            self.ask(self.device.told or self.device.last)
        for _ in range(steps):
            self.work()
        self.announce(to)
        late = len(self.flying) - 1
        for _ in range(far):
            if not self.flying[late:]:
                break
            message = self.flying[-1] if again else self.flying.pop()
            self.receive(message)
        if far == 5 and not self.device.at:
            self.ask(to)

    @FAILS
    @rule(name=PLACES, answered=st.booleans())
    def appear(self, name, answered):
        """It loses its link, is at an edge, and trains there if it was welcomed."""
        self.spoil()
        self.device.at = ""
        self.ask(name, answered)
        self.work()

    @FAILS
    @rule()
    def lose_link(self):
        self.spoil()
        self.device.at = ""

    @rule(name=PLACES, answered=st.booleans())
    def greet(self, name, answered):
        """It asks an edge, whose answer may be lost."""
        answered |= not self.fails
        self.spoil(not answered)
        if not self.device.at:
            self.ask(name, answered)

    def ask(self, name, answered=True, fetched=True):
        device, edge = self.device, self.edges[name]
        if not edge.reached:
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
        self.send(edge, [say for say in said[1:] if say.kind != "moved"])
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
            if not source.reached or source is edge:
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
                if say.kind == "redirect":
                    assert say.epoch in self.tokens.arrived  # only then its device is told
                if say.kind == "redirect" and self.device.at == edge.name:
                    self.device.at = ""
                    self.hear(edge, say)
            else:
                self.flying.append(self.message(edge, say))

    def message(self, edge, say, shadowed=True):
        number = None
        if shadowed and say.kind == "transfer" and edge.mirror and edge.mirror[0] == say.epoch:
            number = edge.mirror[1]
        return Message(say.kind, edge.name, say.to, say.epoch, edge.steps, number)

    @rule(name=PLACES, to=PLACES)
    def command(self, name, to):
        self.begin(name, to)

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), again=st.booleans())
    def deliver(self, data, again):
        """A message arrives: any of those that are on their way, and perhaps once more later."""
        again &= self.fails
        self.spoil(again)
        message = data.draw(st.sampled_from(self.flying))
        if not (self.edges[message.to].reached and self.edges[message.source].reached):
            return
        if not again:
            self.flying.remove(message)
        self.receive(message)

    def receive(self, message):
        edge, source = self.edges[message.to], self.edges[message.source]
        if not edge.up:
            return
        copy, epoch = edge.copy, message.epoch
        if message.kind in ("ahead", "mirror", "other"):
            self.shadowed(edge, source, message)
            return
        shadowed = message.kind == "transfer" and message.number is not None
        if shadowed and not self.become(edge, message):
            self.flying.append(Message("other", edge.name, source.name, epoch))
            return
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
        if message.kind == "cancel":  # overtook what it is about?
            self.litters |= any((m.kind, m.epoch) == ("transfer", epoch) for m in self.flying)
        edge.copy, said = decide(copy, epoch=epoch)
        if message.kind == "release" and copy is not None and edge.copy is None:
            assert copy.offered in self.tokens.lived  # it trains where it was given to
        self.send(edge, said)

    def shadowed(self, edge, source, message):
        epoch = message.epoch
        if message.kind == "ahead":
            before = edge.shadow
            edge.shadow = mirroring.on_ahead(before, edge.copy, epoch)
            if edge.shadow is not before:
                edge.shadow_steps, edge.tainted = message.steps, False
        elif message.kind == "mirror":
            edge.shadow, due = mirroring.on_mirror(edge.shadow, epoch, message.number)
            edge.shadow_steps += due
        else:  # it has no shadow that is the same: the difference goes instead
            edge.copy, said = migration.on_other(edge.copy, epoch)
            self.flying += [self.message(edge, say, shadowed=False) for say in said]

    def become(self, edge, message):
        """Return whether a shadow is the session; it is no more in any case."""
        had = edge.copy is not None and edge.copy.epoch == message.epoch  # it came before
        shadow, edge.shadow = edge.shadow, None
        same = not edge.tainted
        if had or not mirroring.may_become(shadow, message.epoch, message.number, same):
            return had
        assert edge.shadow_steps == message.steps  # no step is lost or done twice
        return True

    @precondition(lambda self: self.fails and self.flying)
    @rule(data=st.data())
    def lose_message(self, data):
        self.spotless = False
        message = data.draw(st.sampled_from(self.flying))
        self.litters |= message.kind in ("release", "cancel")
        self.flying.remove(message)

    @FAILS
    @rule(name=PLACES)
    def time_out(self, name):
        """An edge waits no longer for another one."""
        self.spotless = False
        self.give_up(name)

    def give_up(self, name):
        edge = self.edges[name]
        if edge.up and edge.copy is not None and edge.copy.offered is not None:
            edge.copy, said = migration.on_failed(edge.copy, edge.copy.offered)
            self.send(edge, said)

    @FAILS
    @rule(name=PLACES, apart=st.booleans())
    def part(self, name, apart):
        """The network leaves an edge alone, or that heals; it keeps what it has."""
        self.spoil()
        self.edges[name].apart = apart
        if apart and self.device.at == name:
            self.device.at = ""

    @FAILS
    @rule(name=PLACES)
    def crash(self, name):
        self.spoil()
        had = self.usable()
        apart = self.edges[name].apart
        self.edges[name] = ModelEdge(name, self.tokens, up=False, apart=apart)
        self.destroyed |= had and not self.usable()
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

    @FAILS
    @rule(name=PLACES)
    def recover(self, name):
        """It takes an edge for lost, rightly or not, and opens the session at another one."""
        edge = self.edges[name]
        if edge.up:
            self.spoil()
            self.recovered = True
            self.generation += 1
            epoch = Epoch(self.generation, 0, name)
            self.tokens.add(epoch, self.replica)
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

    @invariant()
    def no_copy_that_is_needed_is_forgotten(self):
        """Only a crash takes the last copy with which the device can go on."""
        assert self.destroyed or self.usable()

    def usable(self):
        """Return whether there is a copy at which the device, as it is, could go on."""
        device = self.device
        return any(
            edge.copy is not None
            and edge.copy.knows(device.shown)
            and (edge.copy.phase is not CopyPhase.STAGED or device.shown.told == edge.copy.epoch)
            and (edge.steps >= device.steps or edge.copy.epoch.generation > device.shown.epoch[0])
            for edge in self.edges.values()
        )

    def teardown(self):
        """Once nothing fails any more, the device goes on, and nothing is left behind for ever."""
        for edge in self.edges.values():
            edge.up, edge.apart = True, False
        self.calm()
        where = self.device.steps
        if not self.find():
            assert self.destroyed
            self.recover("a")
            assert self.find()
        if not (self.destroyed or self.recovered):
            assert self.device.steps == where
        here = self.device.at
        self.work()
        self.calm()
        if not self.litters:  # else the server app releases what is left of a session at its end
            assert [e.name for e in self.edges.values() if e.copy is not None] == [here]
        if not self.recovered:  # else copies that are newer may be found on the way
            self.move_on()

    def calm(self):
        """Let all messages arrive, and those that wait in vain give up."""
        while self.flying:
            self.receive(self.flying.pop(0))
        for name in EDGES:
            self.give_up(name)
        while self.flying:
            self.receive(self.flying.pop(0))

    def move_on(self):
        """Wherever the session was, it can train and go to another edge, with all its steps."""
        to = next(name for name in EDGES if name != self.device.at)
        self.work()
        done = self.device.steps
        self.announce(to)
        self.calm()
        if not self.device.at:
            self.ask(to)
        assert (self.device.at, self.device.steps) == (to, done)

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


def test_a_copy_that_came_for_nothing_is_told_to_go():
    """Its source heard nothing of it and trains on; or its device found nothing there and is back.

    Edges that never said so, or never listened, passed the model check: it is no matter of who
    trains, but of what stays in memory until the round ends.
    """
    for back in (False, True):
        source, (prepare,) = migration.on_move(Copy(Epoch(1, 0, "a")), "a", "b")
        source, (transfer,) = migration.on_prepared(source, prepare.epoch)
        target, _ = migration.on_transfer(None, "a", transfer.epoch)
        if back:
            source, _ = migration.on_committed(source, transfer.epoch)
            shown = Presented(Epoch(1, 0, "a"), transfer.epoch, back=True)
            source, said = migration.on_hello(source, "a", shown)
        else:
            source, said = migration.on_failed(source, transfer.epoch)
        assert source.phase is CopyPhase.LIVE
        (cancel,) = [say for say in said if say.kind == "cancel"]
        assert (cancel.to, cancel.epoch) == ("b", transfer.epoch)
        assert migration.on_cancel(target, cancel.epoch)[0] is None


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
    target, (welcome, moved) = migration.on_hello(target, "b", shown)
    assert welcome.epoch == moved.epoch == Epoch(1, 1, "b")
    assert migration.on_hello(source, "a", shown)[0] is source  # what it knew may be all there is
    target, (release,) = migration.on_train(target)
    assert migration.on_train(target) == (target, ())
    assert migration.on_release(source, release.epoch)[0] is None
    assert migration.on_hello(source, "a", Presented(welcome.epoch))[0] is None
