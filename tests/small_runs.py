"""The overrides of a run of seconds, for tests of what happens in it."""

SMALL = (
    "data.max_examples=200",
    "rounds=2",
    "num_clients=2",
    "client.epochs=1",
    "model.width=4",
    "model.hidden=16",
    "json=true",
)
