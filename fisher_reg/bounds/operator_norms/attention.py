r"""Certified operator norms of softmax self-attention.

Dot-product attention has no Lipschitz constant on an unbounded domain (Kim, Papamakarios, Mnih 2021, arXiv 2006.04710).
After a layer norm the tokens are :math:`x = \gamma \odot y + \beta` with :math:`\|y\| \le r`, and the constant is
finite; at given tokens the norm of the Jacobian is always finite.

For one head let :math:`q_i, k_j, v_j \in R^h` be the projected tokens, :math:`c` the scale of the scores,
:math:`p_i = \mathrm{softmax}_j(c\, q_i^\top k_j)` and :math:`o_i = \sum_j p_{ij} v_j`. The differential is a sum of a
term of the values, one of the queries and one of the keys,

.. math:: do_i = \sum_j p_{ij}\, dv_j + c\, C_i\, dq_i + c\, N_i (q_i^\top dk_j)_j , \quad
          N_i = [p_{ij} (v_j - o_i)]_j , \quad C_i = \mathrm{Cov}_{j \sim p_i}(v_j, k_j) .

Biases of keys and values cancel. An additive mask is a constant in the softmax; masked entries have
:math:`p_{ij} = 0`, and each row needs an entry that is not masked. The norms of the operators on all n tokens together
(Euclidean norms):

- Values: :math:`\|P\| \le \sqrt n` for a row-stochastic :math:`P`, since :math:`\sum_i p_{ij} \le n`.
- Queries: the operator is block-diagonal, :math:`c \max_i \|C_i\|`. If all v and k lie in balls of radius
  :math:`R_v, R_k`, it is at most :math:`c R_v R_k`, since a standard deviation in a ball is at most its radius.
- Keys: :math:`\sum_i \|N_i (q_i^\top dk_j)_j\|^2 \le \sum_j \|D Q\, dk_j\|^2` with :math:`D = \mathrm{diag} \|N_i\|`
  and rows :math:`q_i` of Q, hence :math:`c \|D Q\|`, in a ball at most :math:`c \sqrt{n/2}\, R_v \max_i \|q_i\|`: with
  the softmax's Jacobian :math:`S = \mathrm{diag}(p) - p p^\top \preceq 1/2`, a unit u and :math:`w_j = u^\top v_j`
  :math:`\|N_i^\top u\|^2 = w^\top S^2 w \le w^\top S w / 2 = \mathrm{Var}(w) / 2 \le R_v^2 / 2`.

**Heads.** An invertible matrix and its inverse can be inserted between :math:`W_o` and :math:`W_v`, or between
:math:`W_q` and :math:`W_k`. Each term becomes :math:`\sum_h U_h T_h V_h^\top` with (nearly) orthonormal columns of
:math:`U_h, V_h`, bases of the head's outputs and inputs, and the other factors in :math:`T_h`. With
:math:`\|T_h\| \le t_h`, by Cauchy-Schwarz,

.. math:: \Big\| \sum_h U_h T_h V_h^\top \Big\|^2
          \le \Big\| \sum_h t_h U_h U_h^\top \Big\|\, \Big\| \sum_h t_h V_h V_h^\top \Big\| ,

which is at most :math:`(\sum_h t_h)^2` (the triangle inequality), and :math:`\max_h t_h^2` for heads with orthogonal
inputs and outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fisher_reg.bounds.operator_norms.ranges import Ball, Tokens


@dataclass(frozen=True)
class AttentionWeights:
    """The weights of H heads of h channels; biases of keys, values and outputs are not needed."""

    query: Tensor  # (H, h, E)
    key: Tensor  # (H, h, E)
    value: Tensor  # (H, h, E)
    query_bias: Tensor  # (H, h)
    out: Tensor  # (H, E_out, h)
    scale: float  # multiplies the scores, usually h ** -0.5

    @classmethod
    def of(cls, module: nn.MultiheadAttention) -> AttentionWeights:
        """Return the weights of torch's module, in float64; keys, values and queries must have the same width."""
        heads, embed_dim = module.num_heads, module.embed_dim
        separate = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
        projections = separate if module.in_proj_weight is None else module.in_proj_weight.chunk(3)
        query, key, value = (matrix.double().unflatten(0, (heads, -1)) for matrix in projections)
        bias = query.new_zeros(embed_dim) if module.in_proj_bias is None else module.in_proj_bias[:embed_dim].double()
        out = module.out_proj.weight.double().unflatten(1, (heads, -1)).movedim(1, 0)
        return cls(query, key, value, bias.reshape(heads, -1), out, module.head_dim**-0.5)

    def on_scaled_tokens(self, token_scale: Tensor) -> AttentionWeights:
        """Return the weights of the same map as a function of ``token_scale * x``; ``token_scale`` ``(E,)`` > 0."""
        query, key, value = (matrix / token_scale for matrix in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value)


@dataclass(frozen=True)
class AttentionGains:
    """Lipschitz constants of dot-product attention with respect to each input, ``()``."""

    query: Tensor
    key: Tensor
    value: Tensor


def self_attention_lipschitz(weights: AttentionWeights, num_tokens: int, tokens: Tokens) -> Tensor:
    r"""Bound the Lipschitz constant of self-attention over a range of tokens, masked or not.

    Derived in the docstring of the module; W maps the tokens into a ball of radius :math:`\|W \Gamma\| r`.

    Args:
        weights: The weights.
        num_tokens: n.
        tokens: The range of the tokens.

    Returns:
        The constant ``()`` in float64, Euclidean over all tokens together, differentiable. Exact for one token.
    """
    parts = _Parts.of(weights)
    if num_tokens == 1:
        return _norm(parts.merged)
    # ||W Gamma|| r
    query, key, value = (_norm(part * tokens.gamma) * tokens.radius for part in (parts.query, parts.key, parts.value))
    centre = torch.linalg.vector_norm(parts.query @ tokens.beta.double() + parts.query_bias, dim=-1)
    plain = _norm(_beside(weights.out.double())) * _norm(_beside(weights.value.double().mT))
    # ||P|| <= sqrt(n); c R_v R_k; c sqrt(n / 2) R_v max ||q_i||
    through_values = torch.minimum(plain, _over_heads(parts.value_norm, parts.out_basis, parts.value_basis))
    through_queries = _over_heads(value * key, parts.out_basis, parts.query_basis)
    through_keys = _over_heads(value * (query + centre), parts.out_basis, parts.key_basis)
    return math.sqrt(num_tokens) * (through_values + through_keys / math.sqrt(2)) + through_queries


def self_attention_norm_at(weights: AttentionWeights, hidden: Tensor, probabilities: Tensor) -> Tensor:
    r"""Bound the norm of the Jacobian of self-attention at given tokens.

    As derived in the docstring of the module, with the actual :math:`P, C_i, N_i` instead of their bounds. In addition:

    - values: with :math:`M_h = W_o^h W_v^h` and the mean :math:`\bar P` over heads, :math:`\sum_h P_h \otimes M_h =
      \bar P \otimes \sum_h M_h + \sum_h (P_h - \bar P) \otimes M_h`, which is exact for heads of equal attention;
    - queries: the triangle inequality over heads at each token;
    - keys: the Schur test, by row and column sums of the blocks' norms :math:`c p_{ij} \|v_j - o_i\| \|q_i\|`.

    Args:
        weights: The weights.
        hidden: ``(B, n, E)``, the tokens x.
        probabilities: ``(B, H, n, n)``, the attention at these tokens; rows sum to one.

    Returns:
        The bounds ``(B,)`` in float64, differentiable, at most :func:`self_attention_lipschitz` of a range that
        contains these tokens. Cost: eigenvalues of two ``h x h`` matrices per token and head; without gradients memory
        is ``O(n * n * h)``.
    """
    parts = _Parts.of(weights)
    hidden, probabilities = hidden.double(), probabilities.double()
    projections = parts.value, parts.key, parts.query, parts.query_bias
    terms = [
        _terms_at(attention, tokens @ value.mT, tokens @ key.mT, tokens @ query.mT + bias)
        for tokens, attentions in zip(hidden, probabilities, strict=True)
        for attention, value, key, query, bias in zip(attentions, *projections, strict=True)
    ]
    queries, keys = (torch.stack(term).unflatten(0, probabilities.shape[:2]) for term in zip(*terms, strict=True))
    merged_queries = _over_heads(queries.amax(-1), parts.out_basis, parts.query_basis)
    through_queries = torch.minimum(merged_queries, queries.sum(1).amax(-1))
    through_keys = _over_heads(keys, parts.out_basis, parts.key_basis)
    return _through_values_at(weights, parts, probabilities) + through_queries + through_keys


def dot_product_attention_gains(num_queries: int, scale: float, query: Ball, key: Ball, value: Ball) -> AttentionGains:
    r"""Bound the Lipschitz constants of ``softmax(scale * q @ k.mT + mask) @ v`` in q, k and v.

    Derived in the docstring of the module. For m queries and n keys only m matters: :math:`\sum_i p_{ij} \le m` bounds
    the m x n matrix P by :math:`\sqrt m`, and :math:`D Q` has m rows. Heads act on separate entries, so that the
    constants of one head hold for all together; keys or values that heads share must be counted once per head.

    Args:
        num_queries: m.
        scale: Multiplies the scores.
        query: The range of each head's queries; only their norm matters.
        key: The range of each head's keys; only their radius matters.
        value: The range of each head's values; only their radius matters.

    Returns:
        :math:`c R_v R_k`, :math:`c \sqrt{m/2}\, R_v \max \|q\|` and :math:`\sqrt m`, with the other inputs in range.
    """
    radius = abs(scale) * torch.as_tensor(value.radius, dtype=torch.float64)
    root = radius.new_tensor(num_queries).sqrt()
    return AttentionGains(query=radius * key.radius, key=root / math.sqrt(2) * radius * query.norm, value=root)


def dot_product_attention_norms_at(
    probabilities: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> AttentionGains:
    r"""Bound the Jacobians of dot-product attention at given tokens, as derived in the docstring of the module.

    Args:
        probabilities: ``(*S, m, n)``, the attention P at these tokens.
        query: ``(*S, m, h)``.
        key: ``(*S, n, h)``.
        value: ``(*S, n, e)``.
        scale: c, multiplies the scores.

    Returns:
        :math:`c \max_i \|C_i\|`, the smaller of :math:`c \|D Q\|` and the Schur test, and :math:`\|P\|`, of shape S.
    """
    shape = probabilities.shape[:-2]
    flat = (item.double().reshape(-1, *item.shape[-2:]) for item in (probabilities, value, scale * key, scale * query))
    terms = [_terms_at(*head) for head in zip(*flat, strict=True)]
    queries, keys = (torch.stack(term) for term in zip(*terms, strict=True))
    return AttentionGains(queries.amax(-1).view(shape), keys.view(shape), _norm(probabilities.double()))


def layer_norm_tokens(gamma: Tensor, beta: Tensor) -> Tokens:
    r"""Return the range of a layer norm: :math:`\gamma \odot y + \beta` with :math:`\|y\| \le \sqrt d`."""
    return Tokens(torch.as_tensor(gamma), torch.as_tensor(beta), math.sqrt(gamma.numel()))


@dataclass(frozen=True)
class _Parts:
    """Bases ``(H, E, h)`` of each head's outputs and inputs, and projections ``(H, h, E)`` with the other factors."""

    out_basis: Tensor
    value_basis: Tensor
    query_basis: Tensor
    key_basis: Tensor
    value: Tensor
    key: Tensor
    query: Tensor
    query_bias: Tensor
    value_norm: Tensor  # (H,): of each head's W_o W_v
    merged: Tensor  # (E_out, E): the sum over heads of W_o W_v

    @classmethod
    def of(cls, weights: AttentionWeights) -> _Parts:
        query, key, value, out = (part.double() for part in (weights.query, weights.key, weights.value, weights.out))
        (out_basis, out_rest), (value_basis, value_rest) = _basis(out), _basis(value.mT)
        (query_basis, query_rest), (key_basis, key_rest) = _basis(query.mT), _basis(key.mT)
        to_query = weights.scale * key_rest  # q^T dk = (key_rest q)^T (key_basis^T dx)
        bias = (to_query @ weights.query_bias.double()[..., None])[..., 0]
        projections = out_rest @ value, weights.scale * query_rest @ key, to_query @ query, bias
        norm = _norm(out_rest @ value_rest.mT)
        return cls(out_basis, value_basis, query_basis, key_basis, *projections, norm, (out @ value).sum(0))


def _basis(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return a basis ``(H, E, h)`` and a rest ``(H, h, h)`` whose product is the given ``(H, E, h)``."""
    # X = U R with R^T R = X^T X. Any invertible R is valid; the ridge makes it so if columns are linearly dependent.
    gram = columns.mT @ columns
    ridge = 1e-12 * gram.diagonal(dim1=-2, dim2=-1).sum(-1) + 1e-30
    lower = torch.linalg.cholesky(gram + torch.diag_embed(ridge[:, None].expand(gram.shape[:-1])))
    return torch.linalg.solve_triangular(lower, columns.mT, upper=False).mT, lower.mT


def _through_values_at(weights: AttentionWeights, parts: _Parts, probabilities: Tensor) -> Tensor:
    norms, mean, bases = _norm(probabilities), probabilities.mean(1), (parts.out_basis, parts.value_basis)
    unlike = _norm(probabilities - mean[:, None]) * parts.value_norm
    alike = _norm(mean) * _norm(parts.merged) + _over_heads(unlike, *bases)
    plain = _norm(_beside(weights.out.double())) * _root(_largest_sum(norms**2, weights.value.double().mT))
    return torch.minimum(torch.minimum(plain, alike), _over_heads(norms * parts.value_norm, *bases))


def _terms_at(attention: Tensor, value: Tensor, key: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norms of one head's query term at each token ``(n,)`` and of its key term ``()``."""
    centred = value - (attention @ value)[:, None]  # v_j - o_i, (n, n, h)
    moved = attention[..., None] * centred  # N_i^T
    key_rows = _norm(moved)[:, None] * query  # c D Q, since the queries are scaled by c
    lengths = torch.linalg.vector_norm(query, dim=-1, keepdim=True)
    blocks = attention * torch.linalg.vector_norm(centred, dim=-1) * lengths
    # row and column sums of c p_ij ||v_j - o_i|| ||q_i||
    schur = _root(blocks.sum(1).amax() * blocks.sum(0).amax())
    return _norm(moved.mT @ key), torch.minimum(_norm(key_rows), schur)  # c ||C_i||; c ||D Q||


def _over_heads(norms: Tensor, out_basis: Tensor, in_basis: Tensor) -> Tensor:
    """Bound the norm of the sum over heads of ``U T V^T`` for ``||T|| <= t`` ``(..., H)``: the formula for heads."""
    return _root(_largest_sum(norms, out_basis) * _largest_sum(norms, in_basis))


def _largest_sum(factors: Tensor, basis: Tensor) -> Tensor:
    """Return the largest eigenvalue of the sum over heads of ``factor * basis @ basis.mT``."""
    columns = _beside(basis)
    factors = factors.repeat_interleave(basis.shape[-1], -1)[..., None, :]
    eigenvalues: Tensor = torch.linalg.eigvalsh((columns * factors) @ columns.mT)
    return eigenvalues[..., -1]


def _beside(matrices: Tensor) -> Tensor:
    """Concatenate the matrices ``(H, a, b)`` along their columns, ``(a, H b)``."""
    return matrices.movedim(0, 1).flatten(1)


def _norm(matrices: Tensor) -> Tensor:
    """Return the spectral norms of ``(..., a, b)``, by the largest eigenvalue of the smaller Gram matrix."""
    gram = matrices @ matrices.mT if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT @ matrices
    return _root(torch.linalg.eigvalsh(gram)[..., -1])


def _root(square: Tensor) -> Tensor:
    """Return the square root, with gradient 0 at 0."""
    return square.clamp_min(1e-300).sqrt()
