"""Losses over a whole batch whose images need not pass through the model at once."""

from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor], Tensor]


def backward(log_prob: Callable[..., Tensor], inputs: tuple[Tensor, ...], loss: Loss, micro_batch: int) -> Tensor:
    """Accumulate the gradient of `loss(nll)` in the parameters behind `log_prob`; returns its value.

    The loss may join the images in any way: its gradient with respect to each image's nll is taken first, then each
    micro-batch is sent back with its own share. More than one micro-batch costs a second forward, and no memory.

    Args:
        log_prob: of images or whatever stands for them: tensors (b, ...) to (b,) nats.
        inputs: its arguments for the whole batch, each (n, ...); n may exceed `micro_batch`.
        loss: nll of the whole batch, (n,) nats, to a scalar.
        micro_batch: most images that pass through the model at once.
    """
    parts = list(zip(*(torch.split(value, micro_batch) for value in inputs), strict=True))
    whole = -log_prob(*parts[0]).float() if len(parts) == 1 else None
    if whole is None:
        with torch.no_grad():
            nll = torch.cat([-log_prob(*part).float() for part in parts])
    else:
        nll = whole.detach().clone()
    leaf = nll.cpu().requires_grad_(True)  # the loss itself is a few numbers: it reads best beside host values
    value = loss(leaf)
    slopes = torch.autograd.grad(value, leaf)[0].to(nll.device)
    if whole is not None:
        torch.autograd.backward(whole, slopes)
        return value.detach()
    for part, slope in zip(parts, torch.split(slopes, micro_batch), strict=True):
        torch.autograd.backward(-log_prob(*part).float(), slope)
    return value.detach()
