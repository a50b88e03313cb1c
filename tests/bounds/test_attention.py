import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fisher_reg.bounds.operator_norms.attention import (
    AttentionWeights,
    dot_product_attention_gains,
    layer_norm_tokens,
    self_attention_lipschitz,
    self_attention_norm_at,
)
from fisher_reg.bounds.operator_norms.ranges import Ball, Tokens

ROUND_OFF = 1 + 1e-9  # where a bound is exact, it may come out below by rounding
SCALES = 0.3, 1.0, 3.0


@pytest.fixture(autouse=True)
def _one_thread():
    """On matrices this small, threads wait for each other, a hundred times longer where cores are shared."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def _random_attention(seed, num_heads, scale, bias=True):
    torch.manual_seed(seed)
    norm = nn.LayerNorm(8).double()
    attention = nn.MultiheadAttention(8, num_heads, batch_first=True, bias=bias).double().eval()
    with torch.no_grad():
        for parameter in (*norm.parameters(), *attention.parameters()):
            parameter.copy_(scale * torch.randn_like(parameter))
    return norm, attention


def _random_mask(kind, num_queries, num_keys):
    """An additive mask: none, causal, or entries gone at random; every row keeps its first."""
    gone = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    if kind == "causal":
        gone = torch.ones_like(gone).triu(1)
    elif kind == "random":
        gone = torch.rand(num_queries, num_keys) < 0.5
        gone[:, 0] = False
    return torch.zeros(num_queries, num_keys, dtype=torch.float64).masked_fill(gone, -math.inf)


def _norm_of_jacobian(function, point):
    jacobian = torch.autograd.functional.jacobian(function, point.detach(), vectorize=True)
    return torch.linalg.matrix_norm(jacobian.reshape(-1, point.numel()), 2)


def _exact(attention, tokens, mask=None):
    return _norm_of_jacobian(lambda x: attention(x, x, x, attn_mask=mask, need_weights=False)[0], tokens)


def _local(attention, tokens, mask=None):
    probabilities = attention(tokens, tokens, tokens, attn_mask=mask, average_attn_weights=False)[1]
    return self_attention_norm_at(AttentionWeights.of(attention), tokens, probabilities)


@cache
def _norms_of_100_random_layers():
    """Rows of scale, exact norm, local and global bound."""
    rows = []
    for seed in range(100):
        scale, num_heads, num_tokens = SCALES[seed % 3], (1, 2, 4)[seed // 3 % 3], 2 + seed % 4
        norm, attention = _random_attention(seed, num_heads, scale, bias=seed % 5 > 0)
        mask = _random_mask(("none", "causal", "random")[seed // 9 % 3], num_tokens, num_tokens)
        tokens = norm(5 * torch.randn(1, num_tokens, 8, dtype=torch.float64)).detach()
        bound = self_attention_lipschitz(
            AttentionWeights.of(attention), num_tokens, layer_norm_tokens(norm.weight, norm.bias)
        )
        exact, local = _exact(attention, tokens, mask), _local(attention, tokens, mask)
        rows.append([scale, exact.item(), local.item(), bound.item()])
    return torch.tensor(rows, dtype=torch.float64)


def test_the_dense_jacobian_stays_below_the_local_and_that_below_the_global_bound_for_100_random_layers():
    _, exact, local, global_ = _norms_of_100_random_layers().T
    assert (exact <= local * ROUND_OFF).all()
    assert (local <= global_ * ROUND_OFF).all()


@pytest.mark.parametrize(("scale", "to_global", "to_exact"), [(0.3, 0.5, 1.6), (1.0, 0.1, 2.6), (3.0, 1e-3, 1.6)])
def test_the_local_bound_is_near_the_norm_and_far_below_the_global_one(scale, to_global, to_exact):
    # Over the range all tokens may lie at its far ends with even attention; loud scores saturate the attention, whose
    # covariances vanish, while their bound over the range grows with the fourth power of the scale.
    scales, exact, local, global_ = _norms_of_100_random_layers().T
    assert (local / global_)[scales == scale].median() < to_global
    assert (local / exact)[scales == scale].median() < to_exact


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_both_bounds_are_exact_for_one_token(num_heads):
    norm, attention = _random_attention(1, num_heads, 1.0)
    tokens = norm(torch.randn(1, 1, 8, dtype=torch.float64))
    exact = torch.linalg.matrix_norm(attention.out_proj.weight @ attention.in_proj_weight[16:], 2)
    bound = self_attention_lipschitz(AttentionWeights.of(attention), 1, layer_norm_tokens(norm.weight, norm.bias))
    assert_close(_exact(attention, tokens), exact.detach())
    assert_close(_local(attention, tokens), exact[None])
    assert_close(bound, exact)


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_the_local_bound_is_exact_for_heads_that_attend_alike_whatever_the_tokens(num_heads):
    _, attention = _random_attention(2, num_heads, 1.0)
    with torch.no_grad():
        attention.in_proj_weight[:8] = 0  # no queries: every head attends to what the mask leaves, evenly
        attention.in_proj_bias[:8] = 0
    tokens, mask = torch.randn(1, 5, 8, dtype=torch.float64), _random_mask("causal", 5, 5)
    assert_close(_local(attention, tokens, mask)[0], _exact(attention, tokens, mask))


def test_attention_of_all_tokens_to_the_first_reaches_both_bounds():
    # Without queries nothing moves the weights; the mask makes them (1, 0, ..., 0) in each row, of norm root n.
    norm, attention = _random_attention(0, 1, 1.0)
    with torch.no_grad():
        attention.in_proj_weight[:8] = 0
        attention.in_proj_bias[:8] = 0
    mask = torch.full((5, 5), -math.inf, dtype=torch.float64)
    mask[:, 0] = 0
    tokens = torch.randn(1, 5, 8, dtype=torch.float64)
    exact = _exact(attention, tokens, mask)
    merged = attention.out_proj.weight @ attention.in_proj_weight[16:]
    bound = self_attention_lipschitz(AttentionWeights.of(attention), 5, layer_norm_tokens(norm.weight, norm.bias))
    assert_close(exact, math.sqrt(5) * torch.linalg.matrix_norm(merged, 2).detach())
    assert_close(_local(attention, tokens, mask)[0], exact)
    assert_close(bound, exact)


def _single_entries(query=0.0, key=0.0, value=1.0, query_bias=0.0):
    """One head of 8 channels with q = query * x_0 + query_bias, k = key * x_1, v = value * x_2, each on one channel."""
    weights = AttentionWeights(*torch.zeros(3, 1, 8, 8).double(), torch.zeros(1, 8), torch.eye(8)[None], 1.0)
    weights.query[0, 0, 0], weights.key[0, 0, 1], weights.value[0, 0, 2] = query, key, value
    weights.query_bias[0, 0] = query_bias
    return weights


def _apply(weights, tokens, mask):
    """One head, by the definition."""
    query, key, value = (tokens @ part[0].mT for part in (weights.query, weights.key, weights.value))
    scores = weights.scale * (query + weights.query_bias[0]) @ key.mT + mask
    return scores.softmax(-1) @ value @ weights.out[0].double().mT


def test_a_loud_query_bias_reaches_the_key_term():
    # q = b for all five tokens; they share their attention between the first two, whose values are as far apart as can
    # be, and a new key moves it by b / 4 * (v_1 - v_2). Only the value term, root of 5, is left beside.
    weights, mask = _single_entries(query_bias=100.0, key=1.0), torch.zeros(5, 5).double()
    mask[:, 2:] = -math.inf
    tokens = torch.zeros(1, 5, 8).double()
    radius = math.sqrt(8)
    tokens[0, :2, 2] = torch.tensor([radius, -radius])
    probabilities = mask.softmax(-1)[None, None]
    exact = _norm_of_jacobian(lambda x: _apply(weights, x, mask), tokens)
    local = self_attention_norm_at(weights, tokens, probabilities)[0]
    bound = self_attention_lipschitz(weights, 5, layer_norm_tokens(torch.ones(8), torch.zeros(8)))
    assert exact >= 100 * radius * math.sqrt(5 / 2) / ROUND_OFF
    assert exact <= local <= exact + math.sqrt(5)
    assert local <= bound <= exact + math.sqrt(5)


def test_quiet_queries_reach_the_query_term():
    # All x_0 = 0, so that q = 0, attention is even and keys move nothing; but a new x_0 reads Cov(v, k) = 100 * 8.
    weights, tokens = _single_entries(query=1.0, key=100.0), torch.zeros(1, 2, 8).double()
    tokens[0, :, 1] = tokens[0, :, 2] = torch.tensor([2.0, -2.0])
    exact = _norm_of_jacobian(lambda x: _apply(weights, x, torch.zeros(2, 2)), tokens)
    local = self_attention_norm_at(weights, tokens, torch.full((1, 1, 2, 2), 0.5))[0]
    assert 400 / ROUND_OFF <= exact <= local <= exact + 1  # even attention has norm 1


def test_the_global_bound_of_one_head_is_the_sum_of_its_three_terms():
    torch.manual_seed(0)
    query, key, value, out = torch.randn(4, 6, 6).double()
    query_bias, gamma, beta = torch.randn(3, 6).double()
    weights = AttentionWeights(query[None], key[None], value[None], query_bias[None], out[None], 0.4)
    bound = self_attention_lipschitz(weights, 7, Tokens(gamma, beta, 2.0))
    norm = lambda matrix: torch.linalg.matrix_norm(matrix, 2)  # noqa: E731
    values = 2 * norm(out @ value @ gamma.diag())
    through_queries = values * 2 * norm(0.4 * query.T @ key @ gamma.diag())
    longest = 2 * norm(0.4 * key.T @ query @ gamma.diag()) + 0.4 * (key.T @ (query @ beta + query_bias)).norm()
    expected = math.sqrt(7) * norm(out @ value) + through_queries + math.sqrt(7 / 2) * values * longest
    assert_close(bound, expected)


def test_heads_that_share_nothing_do_not_add_up():
    # Four heads, each from and to two channels of its own: the Jacobian is block-diagonal.
    blocks = torch.eye(8).double().reshape(4, 2, 8)
    tokens = layer_norm_tokens(torch.ones(8), torch.zeros(8))
    together = AttentionWeights(blocks, blocks, blocks, torch.zeros(4, 2), blocks.mT, 0.5)
    alone = AttentionWeights(blocks[:1], blocks[:1], blocks[:1], torch.zeros(1, 2), blocks[:1].mT, 0.5)
    assert_close(self_attention_lipschitz(together, 5, tokens), self_attention_lipschitz(alone, 5, tokens))


def test_the_covariance_terms_depend_on_the_function_and_not_on_its_factors():
    norm, attention = _random_attention(3, 2, 1.0)
    weights, tokens = AttentionWeights.of(attention), layer_norm_tokens(norm.weight, norm.bias)
    change = torch.randn(2, 4, 4).double()
    inverse_query = torch.linalg.inv(change).mT
    other = replace(
        weights, query=inverse_query @ weights.query, key=change @ weights.key,
        query_bias=(inverse_query @ weights.query_bias[..., None])[..., 0],
    )  # fmt: skip
    assert_close(self_attention_lipschitz(other, 5, tokens), self_attention_lipschitz(weights, 5, tokens))


@pytest.mark.parametrize("seed", range(6))
def test_scaled_tokens_bound_the_map_in_scaled_coordinates(seed):
    norm, attention = _random_attention(seed, 2, SCALES[seed % 3])
    scale = torch.rand(8).double() + 0.2
    tokens = norm(torch.randn(1, 4, 8).double()).detach()
    exact = _norm_of_jacobian(
        lambda z: attention(z / scale, z / scale, z / scale, need_weights=False)[0], scale * tokens
    )
    weights = AttentionWeights.of(attention).on_scaled_tokens(scale)
    probabilities = attention(tokens, tokens, tokens, average_attn_weights=False)[1]
    local = self_attention_norm_at(weights, scale * tokens, probabilities)[0]
    bound = self_attention_lipschitz(weights, 4, layer_norm_tokens(scale * norm.weight, scale * norm.bias))
    assert exact <= local * ROUND_OFF
    assert local <= bound * ROUND_OFF


def test_a_batch_is_bounded_example_by_example():
    _, attention = _random_attention(4, 2, 1.0)
    tokens = torch.randn(3, 4, 8).double()
    assert_close(_local(attention, tokens), torch.cat([_local(attention, example[None]) for example in tokens]))


def test_separate_projections_are_read_like_packed_ones():
    _, packed = _random_attention(5, 2, 1.0)
    separate = nn.MultiheadAttention(8, 2, kdim=4, vdim=4).double()  # torch packs those of equal width
    for name, matrix in zip("qkv", packed.in_proj_weight.chunk(3), strict=True):
        setattr(separate, f"{name}_proj_weight", nn.Parameter(matrix.detach().clone()))
    separate.in_proj_bias, separate.out_proj = packed.in_proj_bias, packed.out_proj
    tokens = layer_norm_tokens(torch.ones(8), torch.zeros(8))
    bounds = [self_attention_lipschitz(AttentionWeights.of(module), 3, tokens) for module in (packed, separate)]
    assert_close(*bounds)


def _as_functions_of_weights():
    norm, attention = _random_attention(6, 2, 0.5)
    weights, tokens = AttentionWeights.of(attention), torch.randn(1, 3, 8).double()
    probabilities = attention(tokens, tokens, tokens, average_attn_weights=False)[1].detach()
    parts = weights.query, weights.key, weights.value, weights.query_bias, weights.out
    over_range = lambda *parts: self_attention_lipschitz(  # noqa: E731
        AttentionWeights(*parts, 0.5), 3, layer_norm_tokens(norm.weight.detach(), norm.bias.detach())
    )
    at_tokens = lambda *parts: self_attention_norm_at(AttentionWeights(*parts, 0.5), tokens, probabilities)  # noqa: E731
    return (over_range, at_tokens), [part.detach().requires_grad_() for part in parts]


def test_the_gradient_in_the_weights_is_that_of_finite_differences():
    functions, parts = _as_functions_of_weights()
    for function in functions:
        assert torch.autograd.gradcheck(function, parts, fast_mode=True)


@pytest.mark.parametrize("zero", [[0], [1], [2], [4], [0, 1, 2, 3, 4]])
def test_the_gradient_is_finite_where_a_projection_is_zero(zero):
    functions, parts = _as_functions_of_weights()
    parts = [(0 * part).detach().requires_grad_() if place in zero else part for place, part in enumerate(parts)]
    for function in functions:
        gradients = torch.autograd.grad(function(*parts).sum(), parts)
        assert all(gradient.isfinite().all() for gradient in gradients)


def _in_ball(shape, centre, radius):
    points = torch.randn(*shape).double()
    return centre + radius * points / points.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("seed", range(30))
def test_the_gains_of_bare_attention_bound_the_jacobian_in_each_input(seed):
    torch.manual_seed(seed)
    num_queries, num_keys, radius = 1 + seed % 5, 1 + seed // 5 % 5, SCALES[seed % 3]
    mask = _random_mask(("none", "causal", "random")[seed % 3], num_queries, num_keys)
    centres = torch.randn(3, 4).double()
    query, key, value = (
        _in_ball((2, size, 4), centre, radius)
        for size, centre in zip((num_queries, num_keys, num_keys), centres, strict=True)
    )
    balls = [Ball(torch.tensor(radius).double(), radius + centre.norm()) for centre in centres]
    gains = dot_product_attention_gains(num_queries, 0.5, *balls)
    attend = nn.functional.scaled_dot_product_attention
    through_query = _norm_of_jacobian(lambda q: attend(q, key, value, attn_mask=mask), query)
    through_key = _norm_of_jacobian(lambda k: attend(query, k, value, attn_mask=mask), key)
    through_value = _norm_of_jacobian(lambda v: attend(query, key, v, attn_mask=mask), value)
    assert through_query <= gains.query * ROUND_OFF
    assert through_key <= gains.key * ROUND_OFF
    assert through_value <= gains.value * ROUND_OFF


def test_the_gains_of_bare_attention_are_reached_with_three_queries_and_two_keys():
    unit = torch.eye(4).double()
    two, unused = torch.tensor([2.0, math.nan]).double()
    gains = dot_product_attention_gains(3, 0.5, Ball(unused, two), Ball(two, unused), Ball(two, unused))
    attend = lambda q, k, v: nn.functional.scaled_dot_product_attention(q[None], k[None], v[None])  # noqa: E731
    loud, quiet = 2 * unit[0].expand(3, 4), torch.zeros(3, 4).double()
    apart, elsewhere = 2 * torch.stack([unit[0], -unit[0]]), 2 * torch.stack([unit[1], -unit[1]])
    assert_close(_norm_of_jacobian(lambda q: attend(q, apart, elsewhere), quiet), gains.query)
    assert_close(_norm_of_jacobian(lambda k: attend(loud, k, elsewhere), torch.zeros(2, 4).double()), gains.key)
    assert_close(_norm_of_jacobian(lambda v: attend(100 * loud, apart, v), elsewhere), gains.value)


def test_layer_norm_outputs_lie_in_their_range():
    torch.manual_seed(0)
    norm = nn.LayerNorm(8).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    tokens = layer_norm_tokens(norm.weight, norm.bias)
    outputs = norm(100 * torch.randn(1000, 8, dtype=torch.float64))
    lengths = ((outputs - tokens.beta) / tokens.gamma).norm(dim=1)
    assert lengths.max() <= tokens.radius + 1e-9
    assert lengths.max() > 0.99 * tokens.radius
