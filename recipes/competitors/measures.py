r"""Measures of the sensitivity of a classifier at an image, to compare with the Fisher matrix.

Each function maps logits, or a network from pixels to logits and images, to one number per image. Networks run in
evaluation mode and are not modified. Distances and norms are Euclidean, in input units.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fisher_reg import NoBoundError, UpperBound, evaluation_operator, local_fisher_bound

_MAX_NUMBERS = 2**26
"""Largest number of gradient entries in memory at once (256 MiB in float32)."""
_MAX_IMAGES = 256
"""Largest number of images whose activations are in memory at once."""


def margin(logits: Tensor) -> Tensor:
    """Return the largest logit minus the second largest, ``(B, K)`` to ``(B,)``, in nats.

    It is the log-odds of the predicted class against the next one: the distance of the logits from another prediction,
    without their derivative with respect to the input. No passes in addition to the forward.

    Raises:
        ValueError: If there are fewer than two classes.

    Example:
        >>> margin(torch.tensor([[1.0, 4.0, 2.0]]))
        tensor([2.])
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must be (B, K) with K >= 2; got shape {tuple(logits.shape)}.")
    first, second = logits.topk(2, dim=1).values.unbind(1)
    return first - second


def local_lipschitz(network: nn.Module, images: Tensor) -> Tensor:
    r"""Return :math:`\max_k \|\nabla_x p_k\|` with :math:`p` the softmax, as in arXiv 2606.04767.

    To first order a step of length ``eps`` changes a probability by at most ``eps`` times this number. It tends to zero
    where the softmax saturates. One forward and ``K`` backward passes.

    Args:
        network: From pixels to logits ``(B, K)``.
        images: ``(B, C, H, W)``.

    Returns:
        ``(B,)``, in probability per input unit, without gradient; exact to round-off.

    Raises:
        ValueError: As in :func:`fisher_reg.fisher_spectral_norm`.

    Example:
        >>> network = nn.Linear(1, 2, bias=False)
        >>> _ = network.weight.data.copy_(torch.tensor([[4.0], [0.0]]))
        >>> local_lipschitz(network, torch.zeros(1, 1))  # p (1 - p) |4 - 0|
        tensor([1.])
    """
    values = []
    for logits, gradients in class_gradients(network, images):
        p = logits.softmax(1)[:, :, None]
        values.append((p * (gradients - (p * gradients).sum(1, keepdim=True))).norm(dim=2).amax(1))
    return torch.cat(values)


def input_gradient_norm(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    r"""Return :math:`\|\nabla_x \mathrm{CE}(x, y)\|`: the largest rate of increase of the loss on the given label.

    One forward and one backward pass.

    Args:
        network: From pixels to logits ``(B, K)``.
        images: ``(B, C, H, W)``.
        labels: ``(B,)``, classes from 0 to ``K - 1``.

    Returns:
        ``(B,)``, in nats per input unit, without gradient; exact to round-off.

    Raises:
        ValueError: If ``labels`` is not one class for each image, or as in :func:`fisher_reg.fisher_spectral_norm`.
    """
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels must hold one class for each of the {len(images)} images; "
            f"got shape {tuple(labels.shape)} of {labels.dtype}."
        )
    values = []
    for part, known in zip(images.split(_MAX_IMAGES), labels.split(_MAX_IMAGES), strict=True):
        with evaluation_operator(network, part) as fisher:
            p = fisher.logits.detach().softmax(1)
            values.append(fisher.slope(p - nn.functional.one_hot(known, p.shape[1])).norm(dim=1))
    return torch.cat(values)


def linearised_distance(network: nn.Module, images: Tensor) -> Tensor:
    r"""Return :math:`\min_{j \ne c} (z_c - z_j) / \|\nabla_x (z_c - z_j)\|` with :math:`c` the predicted class.

    The distance to the nearest decision boundary of the network linearised at the image: the length of the first step
    of DeepFool (arXiv 1511.04599). Exact for linear networks; otherwise neither an upper nor a lower bound of the
    distance. One forward and ``K`` backward passes.

    Args:
        network: From pixels to logits ``(B, K)``.
        images: ``(B, C, H, W)``.

    Returns:
        ``(B,)``, in input units, without gradient; infinite where no gradient separates the classes.

    Raises:
        ValueError: As in :func:`fisher_reg.fisher_spectral_norm`.

    Example:
        >>> network = nn.Linear(1, 2)
        >>> _ = network.weight.data.copy_(torch.tensor([[4.0], [0.0]])), network.bias.data.copy_(torch.tensor([2.0, 0]))
        >>> linearised_distance(network, torch.zeros(1, 1))
        tensor([0.5000])
    """
    values = []
    for logits, gradients in class_gradients(network, images):
        predicted = logits.argmax(1, keepdim=True)
        gaps = logits.gather(1, predicted) - logits
        slopes = (gradients.take_along_dim(predicted[:, :, None], 1) - gradients).norm(dim=2)
        values.append(torch.where(slopes == 0, torch.inf, gaps / slopes).scatter(1, predicted, torch.inf).amin(1))
    return torch.cat(values)


def class_gradients(network: nn.Module, images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    r"""Yield the logits ``(b, K)`` and their gradients ``(b, K, D)`` for consecutive parts of the images.

    A part is at most 256 images and 2^26 gradient numbers. One forward and ``K`` backward passes for each, and one
    forward of one image.
    """
    with evaluation_operator(network, images[:1]) as fisher:
        num_numbers = fisher.logits.shape[1] * images[:1].numel()
    for part in images.split(max(1, min(_MAX_IMAGES, _MAX_NUMBERS // num_numbers))):
        with evaluation_operator(network, part) as fisher:
            logits = fisher.logits.detach()
            choices = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
            gradients = torch.stack([fisher.slope(choice.expand_as(logits)) for choice in choices], 1)
        yield logits, gradients


def product_bound(network: nn.Module, images: Tensor, **options: Any) -> UpperBound:
    """Return the product of the layers' norms at the images, which is much larger than the exact value."""
    bound = local_fisher_bound(network, images, **options)
    if "product" not in bound.candidates:
        raise NoBoundError("A part of the network has no bound rule; fisher_bound says which.")
    return replace(bound, log10_value=bound.candidates["product"], evidence=())
