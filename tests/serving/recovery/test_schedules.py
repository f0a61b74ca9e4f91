"""No request is lost, wrong or answered twice, whatever hosts fail when."""

import pytest
import torch

from tests.serving.chains import images, model
from tests.serving.recovery.schedules import REQUESTS, play, schedule


@pytest.fixture(scope="module")
def expected():
    net = model()
    with torch.inference_mode():
        return net, {number: net(images(1, number)) for number in range(REQUESTS)}


@pytest.mark.parametrize("seed", range(5))
def test_a_seeded_schedule_of_faults_costs_no_request(seed, expected):
    found = play(seed, *expected)
    assert found["wrong"] == [] and found["lost"] == found["twice"] == 0, schedule(seed)
    assert found["back"], schedule(seed)
