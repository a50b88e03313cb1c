r"""Lipschitz constant of self-attention on a bounded set of tokens.

Dot-product attention has none on an unbounded domain (Kim, Papamakarios, Mnih 2021, arXiv 2006.04710). Behind a layer
norm its tokens are :math:`x = \gamma \odot y + \beta` with :math:`\|y\| \le r`, and it has one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fisher_reg.bounds.conv import linear_norm
from fisher_reg.bounds.registry import Tokens


def self_attention_lipschitz(
    in_weight: Tensor, in_bias: Tensor | None, out_weight: Tensor, num_heads: int, num_tokens: int, tokens: Tokens
) -> float:
    r"""Bound the Lipschitz constant of multi-head self-attention over the given range of tokens.

    For one head let :math:`q_i, k_j, v_j` be linear in the n tokens, :math:`p_i = \mathrm{softmax}_j(q_i^\top k_j /
    \sqrt h)` and :math:`o_i = \sum_j p_{ij} v_j`. Then

    .. math:: do_i = \sum_j p_{ij}\, dv_j
                     + \mathrm{Cov}_{j \sim p_i}\big(v_j,\ (dq_i^\top k_j + q_i^\top dk_j)/\sqrt h\big) .

    A row-stochastic matrix has spectral norm at most :math:`\sqrt n`, which bounds the first sum over all heads by
    :math:`\sqrt n\,\sigma(W_v)`. By Cauchy-Schwarz the covariance is at most the product of the standard deviations;
    those of :math:`v` and :math:`k` in any direction are at most :math:`R_v = \sigma(W_v \Gamma) r` and
    :math:`R_k = \sigma(W_k \Gamma) r` (a shift drops out), and that of :math:`q_i^\top dk_j` is at most
    :math:`R_q (\sum_j p_{ij} \|dk_j\|^2)^{1/2}` with :math:`R_q = \sigma(W_q \Gamma) r + \|W_q \beta + b_q\|`.
    Summing over i, with :math:`\sum_i p_{ij} \le n`, the second term is at most

    .. math:: \frac{R_v}{\sqrt h} \big( R_k\, \sigma(W_q) + \sqrt n\, R_q\, \sigma(W_k) \big)

    per head. Heads are concatenated (root of squares) and projected by :math:`W_o`.

    Args:
        in_weight: ``(3 E, E)``: queries, keys, values.
        in_bias: ``(3 E,)`` or None.
        out_weight: ``(E, E)``.
        num_heads: Heads; each has ``h = E / num_heads`` channels.
        num_tokens: n. Masks only remove summands and keep the bound.
        tokens: The range of the tokens.

    Returns:
        The constant, Euclidean over all tokens together.
    """
    embed_dim = in_weight.shape[1]
    head_dim = embed_dim // num_heads
    weight = in_weight.detach().double()
    bias = weight.new_zeros(3 * embed_dim) if in_bias is None else in_bias.detach().double()
    gamma, beta = tokens.gamma.detach().double(), tokens.beta.detach().double()
    root_n = math.sqrt(num_tokens)

    def bound_of_head(query: Tensor, key: Tensor, value: Tensor, query_bias: Tensor) -> float:
        query_radius = linear_norm(query * gamma) * tokens.radius + float((query @ beta + query_bias).norm())
        key_radius, value_radius = (linear_norm(matrix * gamma) * tokens.radius for matrix in (key, value))
        through_queries, through_keys = key_radius * linear_norm(query), root_n * query_radius * linear_norm(key)
        return value_radius / math.sqrt(head_dim) * (through_queries + through_keys)

    queries, keys, values = (part.split(head_dim) for part in weight.split(embed_dim))
    query_biases = bias[:embed_dim].split(head_dim)
    heads = [bound_of_head(*head) for head in zip(queries, keys, values, query_biases, strict=True)]
    through_values = root_n * linear_norm(weight[2 * embed_dim :])
    return linear_norm(out_weight) * (through_values + math.hypot(*heads))


def layer_norm_tokens(gamma: Tensor, beta: Tensor) -> Tokens:
    r"""Return the range of a layer norm: :math:`\gamma \odot y + \beta` with :math:`\|y\| \le \sqrt d`."""
    return Tokens(torch.as_tensor(gamma), torch.as_tensor(beta), math.sqrt(gamma.numel()))
