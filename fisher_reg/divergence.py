r"""The Kullback-Leibler divergence of two predictions that nearly agree, without cancellation.

:math:`\sum_k p_k \log(p_k / q_k)` has terms of the size of the change, but a sum of the size of its square: in single
precision a small sum is lost by cancellation. With :math:`d = \log q - \log p` it is
:math:`\sum_k p_k (e^{d_k} - 1 - d_k)`, since both distributions sum to one. No term of this sum is negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisher_reg.left_out import change


def categorical_divergence(logits: Tensor, moved: Tensor, difference: Tensor | None = None) -> Tensor:
    r"""Return :math:`\sum_k p_k (e^{d_k} - 1 - d_k)` with :math:`d = \log q - \log p`, in nats.

    The relative error is a few times that of the difference ``moved - logits``, also if ``p`` is saturated. A class
    with a logit of minus infinity has a probability of zero.

    Args:
        logits: ``(B, K)``, of :math:`p`.
        moved: ``(B, K)``, of :math:`q`.
        difference: ``moved - logits``, if it is known more accurately than the difference of the rounded logits.

    Returns:
        ``(B,)``, with gradient to both. Zero, with a gradient of zero, where they are equal; infinite where a logit of
        ``moved`` is minus infinity and that of ``logits`` is finite.

    Example:
        >>> z = torch.tensor([[20.0, 0.0]])
        >>> categorical_divergence(z, z + torch.tensor([0.0, 2**-10]))  # p2 t^2 / 2 = 2.06e-9 * 4.77e-7
        tensor([9.8e-16])
    """
    likeliest = logits.argmax(1, keepdim=True)
    log_p = logits.log_softmax(1)
    p, q = log_p.exp(), moved.softmax(1)
    is_possible = p > 0
    # t = z' - z minus its entry at the most probable class; d = t - c with c = log sum_k p_k exp(t_k)
    t = change(logits, moved) if difference is None else difference
    t = torch.where(is_possible, t - t.gather(1, likeliest), 0.0)
    log_raised = moved - moved.gather(1, likeliest) + log_p.gather(1, likeliest)
    c_large = log_p.gather(1, likeliest) - moved.log_softmax(1).gather(1, likeliest)
    d = torch.where(is_possible, t - _log_mean_exp(p, t, log_raised, c_large), 0.0)
    # for large d, p (exp(d) - 1 - d) = q - p - p d does not overflow
    gains_much = (d >= 1) | ~is_possible
    divergence = torch.where(gains_much, q - p - p * d, p * exp_remainder(d.clamp_max(1))).sum(1)
    is_infinite = (moved.isneginf() & is_possible).any(1)
    return torch.where(is_infinite, torch.inf, divergence)


def exp_remainder(d: Tensor) -> Tensor:
    r"""Return :math:`e^d - 1 - d` to a few roundings, with its derivative :math:`e^d - 1`."""
    small = d.clamp(-_SERIES_UP_TO, _SERIES_UP_TO)
    series = torch.ones_like(small)  # 1 + d/3 (1 + d/4 (1 + ...))
    for n in range(_NUM_TERMS, 2, -1):
        series = 1 + small / n * series
    return torch.where(d.abs() < _SERIES_UP_TO, 0.5 * small.square() * series, torch.expm1(d) - d)


_SERIES_UP_TO = 0.5  # above, expm1(d) - d loses two bits
_NUM_TERMS = 15  # 2 d^14 / 16! = 6e-18 at d = 0.5


def _log_mean_exp(p: Tensor, t: Tensor, log_raised: Tensor, c_large: Tensor) -> Tensor:
    r"""Return :math:`c = \log \sum_k p_k e^{t_k}` ``(B, 1)``.

    Args:
        p: Probabilities ``(B, K)``.
        t: Changes of the logits ``(B, K)``, exactly zero at the most probable class.
        log_raised: The logarithm of :math:`p_k e^{t_k}`, accurate also where :math:`p_k` underflows.
        c_large: The same :math:`c` with an absolute error of a few roundings of the logits: accurate enough if
            :math:`c` is large.
    """
    grown = torch.where((t >= 1) | (p == 0), log_raised.clamp_max(1).exp() - p, p * torch.expm1(t.clamp_max(1)))
    growth = grown.sum(1, keepdim=True)
    is_small = growth.abs() <= 0.5
    return torch.where(is_small, torch.log1p(torch.where(is_small, growth, 0.0)), c_large)
