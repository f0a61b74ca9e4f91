"""What the header of a run says of layers that see pieces of mini-batches."""

from __future__ import annotations

import re

import pytest

from fedsys.training import federation
from strategies.heading import about_pieces

PARTLY = ("model=lenet", "model._target_=tests.models.partly.Partly", "model.dropout=0.1")
FEW = ("data=synthetic", "data.shape=[1,8,8]", "data.examples=40")


def said(configure, *overrides: str) -> str:
    config = configure(*FEW, *overrides)
    dataset = federation.federation(config).dataset
    model = federation.build_model(config, dataset)
    lines = about_pieces(config, model, dataset)
    return "\n".join(lines)


@pytest.mark.parametrize(
    "options",
    [
        ("policy=fixed", "schedule=pipelined"),
        ("schedule.micro_batches=4",),  # pieces of plain training are pieces too
        ("policy=fixed", "policy.cut=[1,2]", "policy.micro_batches=[1,4]"),
    ],
)
def test_pieces_with_batchnorm_are_another_model_and_the_header_says_the_ways_out(
    configure, options
) -> None:
    """`schedule=pipelined` of the default model trained another one, and only a page said so."""
    text = said(configure, *options)
    assert text.startswith("4 pieces of a mini-batch: BatchNorm (conv1.norm and 1 more) sees these")
    assert "model.norm=deferred keeps the statistics of mini-batches" in text
    assert "model.norm=group is exact up to rounding" in text


@pytest.mark.parametrize(
    ("options", "begins"),
    [
        (("policy=auto", "schedule=pipelined", "fleet=pi_lab"), "pieces as planned: BatchNorm"),
        (("policy=auto", "policy.micro_batches=[1,2]", "fleet=pi_lab"), "pieces as planned: Batch"),
        (("policy=fixed", "schedule=pipelined", "model.norm=deferred"), "4 pieces .*not quite the"),
        (("policy=auto", "fleet=pi_lab"), ""),  # one after the other, pieces save nothing
        (("policy=splitfed", "schedule=pipelined", "fleet=pi_lab"), ""),
        (("policy=fixed", "schedule=pipelined", "model.norm=group"), ""),
        (("policy=fixed",), ""),
        (("policy=fixed", "schedule=pipelined", *PARTLY, "+model.frozen=root"), ""),
        (("policy=fixed", "schedule=pipelined", *PARTLY, "+model.frozen=forward"), ""),
        (("policy=fixed", "schedule=pipelined", *PARTLY, "+model.frozen=stem"), "4 pieces .*norm"),
    ],
)
def test_it_is_said_where_it_is_so(configure, options, begins: str) -> None:
    text = said(configure, *options)
    assert re.match(begins, text) if begins else not text
