"""Glow at the paper's size: how large it is, and that recomputed steps keep less and change no bit."""

import copy

import pytest
import torch
from torch import Tensor

from models.glow import Glow
from tests.models.flow_table import generator


def small(**architecture: object) -> Glow:
    """A Glow of a few steps, started on noise."""
    sizes = {"n_block": 2, "n_flow": 3, "hidden": 24, **architecture}
    flow = Glow((3, 16, 16), 5, generator=generator(), **sizes)  # type: ignore[arg-type]  # mixed values
    flow.initialize(torch.rand(8, 3, 16, 16, generator=generator(1)) - 0.5)
    return flow


def gradients(flow: Glow, x: Tensor) -> dict[str, Tensor]:
    """Gradients of the mean nll, the images' own under "x"."""
    flow.zero_grad()
    x = x.clone().requires_grad_()
    (-flow.log_prob(x).mean()).backward()
    return {"x": x.grad, **{name: p.grad for name, p in flow.named_parameters()}}  # type: ignore[dict-item]  # set above


def kept_bytes(flow: Glow, x: Tensor) -> int:
    """What autograd keeps of one evaluation, each storage once, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in flow.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = flow.log_prob(x)  # alive until all is counted, so that no address is used twice
    assert value.requires_grad
    return sum(kept.values())


def test_the_papers_flow_has_as_many_weights_as_published() -> None:
    with torch.device("meta"):
        flow = Glow((3, 128, 128), 5, n_block=4, n_flow=32, hidden=512, affine=False, lu=True)

    assert round(sum(p.numel() for p in flow.parameters()) / 1e6, 1) == 61.2


@pytest.mark.parametrize("architecture", [{}, {"affine": True}, {"lu": False}], ids=["additive", "affine", "plain"])
def test_recomputed_gradients_have_the_bits_of_plain_ones(architecture: dict[str, object]) -> None:
    flow = small(**architecture)
    x = torch.rand(5, 3, 16, 16, generator=generator(2)) - 0.5

    plain = gradients(flow, x)
    flow.recompute_bytes = 0
    recomputed = gradients(flow, x)

    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_recomputed_suffix_gradients_have_the_bits_of_plain_ones() -> None:
    flow = small()
    with torch.no_grad():
        h, share = flow.prefix(torch.rand(5, 3, 16, 16, generator=generator(2)) - 0.5)
    found = []

    for bytes_kept in (2**40, 0):
        flow.recompute_bytes = bytes_kept
        found.append(torch.autograd.grad((share + flow.suffix_log_prob(h)).mean(), flow.suffix_parameters()))

    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_recomputation_keeps_a_small_part() -> None:
    flow = small(hidden=128, n_block=1)
    x = torch.rand(8, 3, 16, 16, generator=generator(2)) - 0.5

    plain = kept_bytes(flow, x)
    flow.recompute_bytes = 0
    recomputed = kept_bytes(flow, x)

    assert recomputed < plain / 10  # what is left: the inputs of the steps, and the last prior


def test_the_threshold_is_held_against_what_a_step_really_keeps() -> None:
    flow = small(hidden=128, n_block=1)
    x = torch.rand(8, 3, 16, 16, generator=generator(2)) - 0.5

    stated = sum(step.kept_bytes(torch.empty(8, 12, 8, 8)) for step in flow.blocks[0].flows)

    # beside the net's wide activations a step keeps its own few channels, and padding adds a border
    assert kept_bytes(flow, x) == pytest.approx(stated, rel=0.35)


def test_what_is_large_is_recomputed_and_what_is_small_is_not() -> None:
    with torch.device("meta"):
        flow = Glow((3, 128, 128), 5, n_block=4, n_flow=1, hidden=512)
    steps = [block.flows[0] for block in flow.blocks]
    inputs = [torch.empty(16, 12 * 2**i, 64 >> i, 64 >> i, device="meta") for i in range(4)]

    large = [step.kept_bytes(x) > flow.recompute_bytes for step, x in zip(steps, inputs, strict=True)]

    assert large == [True, True, False, False]  # of the paper's 16 images
    assert not any(step.kept_bytes(x[:1]) > flow.recompute_bytes for step, x in zip(steps, inputs, strict=True))


def test_a_copy_keeps_the_threshold() -> None:
    flow = small()
    flow.recompute_bytes = 7

    assert copy.deepcopy(flow).recompute_bytes == 7
