"""Taking a class away from a TarFlow that embeds its classes: what its label means then, and that it is on record."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.tarflow import TarFlow
from tests.unlearning.tiny import labelled_tarflow
from unlearning.classes import remove_class
from unlearning.errors import ParameterError


def test_a_tarflow_reads_a_removed_label_as_the_mean_of_the_others() -> None:
    flow = labelled_tarflow()
    x = torch.rand(4, *flow.image_shape, generator=torch.Generator().manual_seed(0)) - 0.5

    without: Any = remove_class(flow, 1).flow

    for block, old in zip(without.chain(), flow.chain(), strict=True):
        torch.testing.assert_close(block.class_embed[1], (old.class_embed[0] + old.class_embed[2]) / 2)
    torch.testing.assert_close(without.log_prob(x, 1), without.log_prob(x))
    assert torch.equal(without.log_prob(x, 2), flow.log_prob(x, 2))


def test_a_tarflow_without_two_classes_keeps_no_share_of_either() -> None:
    flow = labelled_tarflow()

    first = remove_class(flow, 1).flow
    with pytest.raises(ParameterError, match=r"is 1; give a class that the flow has: \[0, 2\]"):
        remove_class(first, 1)
    without: Any = remove_class(first, 0).flow

    for block, old in zip(without.chain(), flow.chain(), strict=True):
        for label in (0, 1):
            assert torch.equal(block.class_embed[label], old.class_embed[2])


def test_a_tarflow_knows_its_classes_when_all_but_one_are_gone_and_when_training_goes_on() -> None:
    flow = labelled_tarflow()

    without: Any = remove_class(remove_class(flow, 1).flow, 0).flow
    with torch.no_grad():
        for block in without.chain():
            block.class_embed += torch.arange(3.0)[:, None, None]  # no embedding is the others' mean any more

    assert flow.classes() == [0, 1, 2]
    assert without.classes() == [2]
    with pytest.raises(ParameterError, match="2 is the last class of this flow"):
        remove_class(without, 2)


def test_classes_that_start_alike_are_not_taken_for_removed() -> None:
    fresh = TarFlow((1, 8, 8), 8, width=16, n_block=2, n_classes=3)  # every embedding is zero

    without: Any = remove_class(fresh, 1).flow

    assert without.classes() == [0, 2]
