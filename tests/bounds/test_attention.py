import math

import torch
from torch import nn

from fisher_reg.bounds.attention import layer_norm_tokens, self_attention_lipschitz


def _random_attention(seed, num_heads, scale):
    torch.manual_seed(seed)
    norm = nn.LayerNorm(8).double()
    attention = nn.MultiheadAttention(8, num_heads, batch_first=True).double().eval()
    with torch.no_grad():
        for parameter in (*norm.parameters(), *attention.parameters()):
            parameter.copy_(scale * torch.randn_like(parameter))
    return norm, attention


def test_the_dense_jacobian_stays_below_for_100_random_layers():
    for seed in range(100):
        num_heads, num_tokens, scale = (1, 2, 4)[seed % 3], 2 + seed % 4, (0.3, 1.0, 3.0)[seed % 3]
        norm, attention = _random_attention(seed, num_heads, scale)
        mask = torch.zeros(num_tokens, num_tokens).double()
        if seed % 2:
            mask = mask.masked_fill(torch.ones_like(mask).triu(1).bool(), -math.inf)

        def function(tokens, attention=attention, mask=mask):
            return attention(tokens, tokens, tokens, attn_mask=mask, need_weights=False)[0]

        tokens = norm(5 * torch.randn(1, num_tokens, 8, dtype=torch.float64)).detach()
        jacobian = torch.autograd.functional.jacobian(function, tokens).reshape(num_tokens * 8, -1)
        exact = torch.linalg.matrix_norm(jacobian, 2).item()
        bound = self_attention_lipschitz(
            attention.in_proj_weight,
            attention.in_proj_bias,
            attention.out_proj.weight,
            num_heads,
            num_tokens,
            layer_norm_tokens(norm.weight, norm.bias),
        )
        assert exact <= bound


def test_attention_of_all_tokens_to_the_first_reaches_the_bound():
    # Without queries nothing moves the weights; the mask makes them (1, 0, ..., 0) in each row, of norm root n.
    norm, attention = _random_attention(0, 1, 1.0)
    with torch.no_grad():
        attention.in_proj_weight[:8] = 0
        attention.in_proj_bias[:8] = 0
        attention.out_proj.weight.copy_(torch.eye(8))
    mask = torch.full((5, 5), -math.inf, dtype=torch.float64)
    mask[:, 0] = 0
    function = lambda x: attention(x, x, x, attn_mask=mask, need_weights=False)[0]  # noqa: E731
    jacobian = torch.autograd.functional.jacobian(function, torch.randn(1, 5, 8, dtype=torch.float64)).reshape(40, 40)
    weights = attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight
    bound = self_attention_lipschitz(*weights, 1, 5, layer_norm_tokens(norm.weight, norm.bias))
    assert math.isclose(torch.linalg.matrix_norm(jacobian, 2).item(), bound, rel_tol=1e-9)


def test_a_loud_query_bias_moves_the_weights_through_the_keys():
    # q = b for all tokens, k = x_1, v = x_2: two tokens with equal keys share the attention, and a new key moves
    # it by b (1/4) (v_1 - v_2), which outgrows the value term with b.
    norm, attention = _random_attention(0, 1, 0.0)
    with torch.no_grad():
        norm.weight.fill_(1.0)
        attention.in_proj_bias[0] = 100.0
        attention.in_proj_weight[8, 0] = 1.0
        attention.in_proj_weight[16, 1] = 1.0
        attention.out_proj.weight.copy_(torch.eye(8))
    tokens = torch.zeros(1, 2, 8, dtype=torch.float64)
    tokens[0, :, 1] = torch.tensor([2.0, -2.0])
    function = lambda x: attention(x, x, x, need_weights=False)[0]  # noqa: E731
    jacobian = torch.autograd.functional.jacobian(function, tokens).reshape(16, 16)
    exact = torch.linalg.matrix_norm(jacobian, 2).item()
    weights = attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight
    bound = self_attention_lipschitz(*weights, 1, 2, layer_norm_tokens(norm.weight, norm.bias))
    assert 10 * math.sqrt(2) < exact <= bound  # the value term alone is the root of 2
    assert bound < 5 * exact


def test_layer_norm_outputs_lie_in_their_range():
    norm = nn.LayerNorm(8).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    tokens = layer_norm_tokens(norm.weight, norm.bias)
    outputs = norm(100 * torch.randn(1000, 8, dtype=torch.float64))
    lengths = ((outputs - tokens.beta) / tokens.gamma).norm(dim=1)
    assert lengths.max() <= tokens.radius + 1e-9
    assert lengths.max() > 0.99 * tokens.radius
