"""What runs with privacy=cut and privacy=client promise, by the command."""

import json

import pytest

from fedsys.main import main
from fedsys.privacy.budget import PrivacyLedger
from fedsys.privacy.cut import cut_epsilon
from fedsys.privacy.promises import round_promise
from fedsys.privacy.release import Noise
from strategies import PrivateRounds
from strategies.around import find

SMALL = [
    "data=synthetic", "data.examples=60", "data.test_examples=10", "data.validation=0.1",
    "model.width=4", "model.hidden=16", "client.batch_size=10",
    "client.epochs=1", "rounds=2", "num_clients=1", "policy=fixed", "policy.cut=1",
    "privacy=cut",
]  # fmt: skip


def test_the_claim_says_what_it_is_about_and_stays_within_the_budget(tmp_path, capsys):
    call = ["train", *SMALL, "privacy.epsilon=8", "run.plots=false", "json=true"]
    assert main([*call, f"run.dir={tmp_path / 'run'}"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 7.9 < result["epsilon"] <= 8.0 and result["delta"] == 1e-5
    claim = result["privacy"]["claim"]
    for words in ("each example", "replaced by any other", "against edge servers",
                  "labels leave devices as they are", "privacy.secure=true"):  # fmt: skip
        assert words in claim


def test_a_run_ends_before_the_round_that_would_exceed_the_budget(tmp_path, capsys):
    call = ["train", *SMALL, "privacy.noise_multiplier=6", "rounds=20",
            "privacy.epsilon=4", "run.plots=false", "json=true"]  # fmt: skip
    assert main([*call, f"run.dir={tmp_path / 'run'}"]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out.splitlines()[-1])
    assert 1 <= result["rounds"] < 20 and result["epsilon"] <= 4
    assert "would spend" in shown.err


@pytest.mark.parametrize("accountant", ["pld", "rdp", "prv"])
def test_noise_at_the_cut_is_computed_by_the_accountant_that_is_asked_for(accountant, configure):
    given = [f"privacy.accountant={accountant}", "privacy.epsilon=6", "rounds=5"]
    config = configure(*SMALL, *given)
    promise = round_promise(config, [60])
    spent = promise.spent(PrivacyLedger().charged(1, [0]))
    assert 0 < spent < promise.cost(5) <= 6.0
    exact = cut_epsilon(Noise(1.0, promise.noise), 1e-5, 5)
    assert exact <= 6.001 and exact > 5.0


def test_clients_that_were_asked_more_often_have_less_left(configure):
    promise = round_promise(configure("privacy=client", "num_clients=10", "rounds=4"), [60] * 10)
    ledger = PrivacyLedger().charged(1, [0, 1]).charged(2, [0])
    assert promise.spent(ledger) == promise.cost(2) > promise.cost(1)
    assert promise.cost(4) <= 8.0 < promise.cost(5)
    assert promise.cost(0) == 0.0


def test_a_client_level_run_over_split_devices_says_what_it_promises(configure, carry_out):
    given = [o for o in SMALL if not o.startswith(("privacy", "num_clients"))]
    done = carry_out(configure(*given, "privacy=client", "privacy.epsilon=8", "num_clients=3"))
    rounds = find(done.strategy, PrivateRounds)
    assert 7.9 < rounds.claim().epsilon <= 8.0
    assert "each client, where the update of one is replaced by none" in rounds.claim().sentence()
    assert [row["epsilon"] for row in done.rows] == sorted(row["epsilon"] for row in done.rows)
