"""Plans and the budget: what is charged, when, and when a run must end."""

import dataclasses
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsys.config.privacy import PrivacyConfig
from fedsys.errors import ConfigError
from fedsys.privacy import accountant
from fedsys.privacy.accountant import Releases, epsilon
from fedsys.privacy.budget import (
    PrivacyLedger,
    RecordPlan,
    epoch_steps,
    record_plans,
    sampling_rate,
    spent,
)
from fedsys.privacy.claim import Claim

RECORD = PrivacyConfig("record", epsilon=4.0, accountant="rdp")


def run(batch_size=32, epochs=2, rounds=5, privacy=RECORD):
    client = SimpleNamespace(batch_size=batch_size, epochs=epochs)
    return SimpleNamespace(client=client, rounds=rounds, privacy=privacy)


def test_a_client_trains_as_often_as_without_and_each_example_takes_part_at_a_rate():
    plans = record_plans(run(), [320, 20, 33])
    assert [plan.steps for plan in plans] == [20, 2, 2]
    assert [plan.rate for plan in plans] == [0.1, 1.0, 32 / 33]
    assert [plan.expected for plan in plans] == [32.0, 20.0, 32.0]


@given(st.integers(1, 500), st.integers(2, 64))
def test_there_are_as_many_mini_batches_as_without_sampling(examples, batch_size):
    from fedsys.planning.workload import mini_batches

    assert epoch_steps(examples, batch_size) == len(mini_batches(examples, batch_size))
    assert 0 < sampling_rate(examples, batch_size) <= 1


def test_all_rounds_of_all_clients_are_within_the_budget_and_nearly_use_it_up():
    config = run()
    plans = record_plans(config, [320, 100, 20])
    ledger = PrivacyLedger()
    for round_ in range(1, config.rounds + 1):
        ledger = ledger.charged(round_, range(3))
        assert spent(ledger, plans, RECORD) <= RECORD.epsilon
    assert spent(ledger, plans, RECORD) > 0.98 * RECORD.epsilon
    assert spent(ledger.charged(6, [2]), plans, RECORD) > RECORD.epsilon


def test_many_sizes_share_noise_that_is_enough_for_each(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "fedsys.privacy.budget.cached_noise", lambda *a: asked.append(a[2:4]) or 100 / a[2]
    )
    sizes = list(range(50, 450, 3))
    plans = record_plans(run(), sizes)
    assert len(asked) == 12
    for size, plan in zip(sizes, plans, strict=True):
        enough = [count >= 5 * plan.steps for rate, count in asked
                  if 100 / rate == plan.noise and rate >= plan.rate]  # fmt: skip
        assert any(enough), size


def test_noise_that_is_given_is_taken():
    privacy = dataclasses.replace(RECORD, noise_multiplier=1.5)
    assert {plan.noise for plan in record_plans(run(privacy=privacy), [100, 50])} == {1.5}


@pytest.mark.parametrize("delta", [0.01, 0.5])
def test_a_delta_within_which_an_example_could_be_published_is_refused(delta):
    privacy = dataclasses.replace(RECORD, delta=delta)
    with pytest.raises(ConfigError, match=r"privacy.delta=0.\d+: must be below 1/100"):
        record_plans(run(privacy=privacy), [60, 40])


# --------------------------------------------------------------------------------------------------
# The ledger


def test_a_round_that_is_done_again_is_charged_again_only_if_its_noise_is_new():
    ledger = PrivacyLedger().charged(1, [0, 1]).charged(2, [0])
    assert [ledger.count(client) for client in (0, 1, 2)] == [2, 1, 0]
    again = ledger.charged(2, [0, 1])
    assert [again.count(client) for client in (0, 1)] == [2, 2]
    new = ledger.charged(2, [0, 1], new_noise=True)
    assert [new.count(client) for client in (0, 1)] == [3, 2]


def test_clients_do_not_add_up_since_each_example_is_of_one():
    plans = [RecordPlan(1.0, 0.1, 10, 32.0), RecordPlan(2.0, 0.1, 10, 32.0)]
    ledger = PrivacyLedger().charged(1, [0, 1])
    alone = [epsilon([Releases(plan.noise, 0.1, 10)], RECORD.delta, "rdp") for plan in plans]
    assert spent(ledger, plans, RECORD) == max(alone)
    assert spent(PrivacyLedger(), plans, RECORD) == 0.0


ROUNDS = st.lists(st.tuples(st.integers(1, 5), st.sets(st.integers(0, 3)), st.booleans()))


@given(ROUNDS, ROUNDS)
def test_merging_forgets_nothing_and_charging_never_lowers_what_is_charged(first, second):
    def charged(entries):
        ledger = PrivacyLedger()
        for round_, clients, new in entries:
            after = ledger.charged(round_, clients, new_noise=new)
            assert all(after.count(c) >= ledger.count(c) for c in range(4))
            ledger = after
        return ledger

    one, other = charged(first), charged(second)
    both = one.merged(other)
    assert both.merged(one) == both and one.merged(one).rounds.keys() == one.rounds.keys()
    assert all(both.count(c) >= max(one.count(c), other.count(c)) for c in range(4))


def test_a_claim_says_unit_neighbours_sampling_delta_and_accountant():
    claim = Claim("record", "example", 3.999, 1e-5, "Poisson samples at rate 0.1", "pld", True)
    text = claim.sentence()
    for part in ("(4, 1e-05)", "each example", "added or removed", "rate 0.1", "privacy loss"):
        assert part in text
    assert "seed" not in text
    assert "seed" in dataclasses.replace(claim, secure=False).sentence()
    assert set(claim.figures()) >= {"unit", "neighbours", "sampling", "delta", "accountant"}
    assert accountant.__doc__ and all(name in accountant.__doc__ for name in ("pld", "rdp", "prv"))
