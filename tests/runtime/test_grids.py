"""What the server app's grid does about nodes that hold their answers back."""

from flwr.app import Message, RecordDict

from fedsys.runtime import grids
from fedsys.runtime.grids import AttentiveGrid


class Behind:
    """Flower's grid with nodes of which some send a reply when they get their next message."""

    def __init__(self, behind):
        self.behind, self.sent, self.pulled = behind, [], set()

    def push_messages(self, messages):
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{len(self.sent)}"
            self.sent.append(message)
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids):
        found = []
        for number, message in enumerate(self.sent):
            node, name = message.metadata.dst_node_id, message.metadata.message_id
            later = any(m.metadata.dst_node_id == node for m in self.sent[number + 1 :])
            held = node in self.behind and not later
            if name in message_ids and name not in self.pulled and not held:
                self.pulled.add(name)
                found.append(Message(RecordDict(), reply_to=message))
        return found


def test_a_node_that_holds_its_reply_back_is_nudged_in_every_phase(identity, monkeypatch):
    """A SuperNode stayed one reply behind after a run that had ended: both sides waited."""
    monkeypatch.setattr(grids, "NUDGE_S", 0.05)
    monkeypatch.setattr(grids, "POLL_S", 0.01)
    inner = Behind({7})
    grid = AttentiveGrid(inner)
    for _ in range(2):
        asked = [Message(RecordDict(), node, "train") for node in (5, 7)]
        replies = list(grid.send_and_receive(asked, timeout=60))
        assert sorted(r.metadata.reply_to_message_id for r in replies) == sorted(
            m.metadata.message_id for m in asked
        )
    nudged = [m.metadata.dst_node_id for m in inner.sent if m.metadata.message_type == grids.NUDGE]
    assert nudged == [7, 7]


def test_a_node_at_long_work_is_nudged_once(identity, monkeypatch):
    monkeypatch.setattr(grids, "NUDGE_S", 0.02)
    monkeypatch.setattr(grids, "POLL_S", 0.01)

    class Busy(Behind):
        looks = 0

        def pull_messages(self, message_ids):
            self.looks += len(self.sent) > 1  # since it was nudged
            return super().pull_messages(message_ids) if self.looks > 10 else []

    inner = Busy(set())
    asked = [Message(RecordDict(), 5, "train")]
    assert len(list(AttentiveGrid(inner).send_and_receive(asked, timeout=60))) == 1
    assert [m.metadata.message_type for m in inner.sent] == ["train", grids.NUDGE]
