"""The bound rules of attention: the module with its projections, and the function."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fisher_reg.bounds.operator_norms.attention import (
    AttentionWeights,
    dot_product_attention_gains,
    dot_product_attention_norms_at,
    self_attention_lipschitz,
    self_attention_norm_at,
)
from fisher_reg.bounds.operator_norms.ranges import ball_of, largest_entry, largest_length
from fisher_reg.bounds.rules.call import Call, Operand
from fisher_reg.bounds.rules.extents import range_of, width_of
from fisher_reg.bounds.rules.layer import Ball, Gain, Layer, ScaledGain, Tokens
from fisher_reg.bounds.rules.registry import register, register_bound_rule
from fisher_reg.bounds.sensitivity import Sensitivity, log, log_sum, shifted
from fisher_reg.errors import NoBoundError


def _self_attention(module: nn.MultiheadAttention, layer: Layer) -> Gain:
    if module.bias_k is not None or module.add_zero_attn or (module.kdim, module.vdim) != (module.embed_dim,) * 2:
        raise NoBoundError("Only attention among the tokens, with no added keys and one width, has a bound rule.")
    queries = layer.sources["query"]
    varying = {name for name, source in layer.sources.items() if source is not None}
    if varying != {"query", "key", "value"} or any(layer.sources[name] != queries for name in varying):
        raise NoBoundError("Only self-attention, of one value with itself and constant masks, has a bound rule.")
    if layer.input.ndim != 3:
        raise NoBoundError("Attention has a bound rule for batches (B, n, E) only.")
    scale = layer.scale_along(-1)
    weights = AttentionWeights.of(module).on_scaled_tokens(scale)
    if layer.is_local:
        return ScaledGain(_attention_at(module, layer, weights, scale), of_one_input=True)
    known = layer.input_range if isinstance(layer.input_range, Tokens) else _tokens_around(layer)
    if known is None:
        raise NoBoundError(
            "Dot-product attention has no global Lipschitz constant on an unbounded domain, and there is no layer norm "
            "directly before this one to bound its input. Only pre-norm attention has a global bound."
        )
    tokens = Tokens(scale * known.gamma, scale * known.beta, known.radius)
    num_tokens = layer.input.shape[1 if module.batch_first else 0]
    norm = self_attention_lipschitz(weights, num_tokens, tokens)
    domain = "attention: the range of the layer norm before it, which contains all its outputs"
    return ScaledGain(norm, domain=domain, of_one_input=True)


def _tokens_around(layer: Layer) -> Tokens | None:
    """Return a ball around the mean of the tokens that contains all tokens of all examples over the region."""
    if layer.deviation is None:
        return None
    hidden, width = layer.input, layer.deviation.width
    mean = hidden.flatten(0, -2).mean(0)
    lengths = torch.linalg.vector_norm(hidden - mean, dim=-1) + torch.linalg.vector_norm(width, dim=-1)
    return Tokens(torch.ones_like(mean), mean, float(lengths.max()))


def _ball_around(operand: Operand) -> Ball | None:
    """Return the range of the vectors along the last axis over the region; those of one head share their centre."""
    if operand.around is None:
        return None
    vectors, width = operand.value, torch.linalg.vector_norm(operand.around.width, dim=-1)
    centres = vectors.mean(-2, keepdim=True)
    radius = (torch.linalg.vector_norm(vectors - centres, dim=-1) + width).max()
    return Ball(radius, (torch.linalg.vector_norm(vectors, dim=-1) + width).max())


def _attention_at(module: nn.MultiheadAttention, layer: Layer, weights: AttentionWeights, scale: Tensor) -> Tensor:
    """Bound the Jacobian at the example, with the attention weights that the module computes there."""
    masks = {name: mask for name, mask in layer.inputs.items() if name in ("attn_mask", "key_padding_mask")}
    operands = [layer.inputs[name] for name in ("query", "key", "value")]
    _, probabilities = module(*operands, **masks, need_weights=True, average_attn_weights=False)
    hidden = layer.input if module.batch_first else layer.input.transpose(0, 1)
    return self_attention_norm_at(weights, scale * hidden.double(), probabilities.double())


def _dot_product_attention(call: Call) -> Sensitivity:
    query, key, value = (call.operands[name] for name in ("query", "key", "value"))
    if call.argument("dropout_p", 0.0) != 0:
        raise NoBoundError(f"{call.name} drops in evaluation mode.")
    call.argument("attn_mask")
    scale = call.argument("scale")
    scale = query.value.shape[-1] ** -0.5 if scale is None else scale
    if call.at_example:
        return _dot_product_attention_at(call, scale)
    terms = []
    for number, item in enumerate((query, key, value)):
        if not isinstance(item.sensitivity, Sensitivity) or item.is_constant:
            continue
        balls = [_POINT if item is value else _ball(call, other) for other in (query, key, value)]
        gains = dot_product_attention_gains(query.value.shape[-2], scale, *balls)
        gain = (gains.query, gains.key, gains.value)[number]
        # heads, groups of heads or examples that share a value use copies of it
        copies = _heads(call.value) / _heads(item.value)
        terms.append(shifted(item.sensitivity.plain(), log(gain) + 0.5 * math.log(copies)))
    return Sensitivity(log_sum(terms))


def _dot_product_attention_at(call: Call, scale: float) -> Sensitivity:
    """Bound the Jacobian at the example, with the attention weights at the example."""
    operands = [call.operands[name] for name in ("query", "key", "value")]
    query, key, value = (item.value.double() for item in operands)
    if call.argument("enable_gqa", False):
        key, value = (item.repeat_interleave(query.shape[-3] // item.shape[-3], -3) for item in (key, value))
    shape = call.value.shape[:-2]
    query, key, value = (item.expand(*shape, *item.shape[-2:]) for item in (query, key, value))
    scores = scale * query @ key.mT
    if call.argument("is_causal", False):
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    mask = call.argument("attn_mask")
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    gains = dot_product_attention_norms_at(scores.softmax(-1).nan_to_num(0.0), query, key, value, scale)
    terms = []
    for item, gain in zip(operands, (gains.query, gains.key, gains.value), strict=True):
        if item.is_constant or not isinstance(item.sensitivity, Sensitivity):
            continue
        is_apart = all(other.is_apart for other in operands) and call.value.ndim > 2
        size = gain.reshape(len(gain), -1).amax(1) if is_apart else gain.amax()
        copies = _heads(call.value) / _heads(item.value)
        terms.append(shifted(item.sensitivity.plain(), log(size) + 0.5 * math.log(copies)))
    return Sensitivity(log_sum(terms))


def _dot_product_attention_width(call: Call) -> Tensor | None:
    """Return the widths: each output is a mean of values, between the lowest and the highest of them."""
    value = call.operands["value"]
    width = width_of(value)
    if width is None or value.value.shape[:-2] != call.value.shape[:-2]:
        return None
    lowest, highest = ((value.value + side).double() for side in (-width, width))
    moved = torch.maximum(highest.amax(-2, keepdim=True) - call.value, call.value - lowest.amin(-2, keepdim=True))
    return moved.clamp_min(0)


_dot_product_attention.width = _dot_product_attention_width  # type: ignore[attr-defined]
_POINT = Ball(torch.zeros(()).double(), torch.zeros(()).double())


def _heads(value: Tensor) -> int:
    """Return the number of matrices along the last two axes."""
    return math.prod(value.shape[:-2])


def _ball(call: Call, operand: Operand) -> Ball:
    """Return the range of the vectors of a query, key or value; that of a constant is known."""
    if operand.is_constant:
        vectors = operand.value.double()
        centred = vectors - vectors.mean(-2, keepdim=True)
        radius, norm = (torch.linalg.vector_norm(item, dim=-1).amax() for item in (centred, vectors))
        return Ball(radius, norm)
    known, around = range_of(operand), _ball_around(operand)
    found = [] if around is None else [around]
    if isinstance(known, Ball):
        found.append(known.of_tokens)
    elif isinstance(known, Tokens):
        found.append(ball_of(known))
    elif largest_entry(known) < math.inf:
        length = torch.tensor(largest_length(known, operand.value.shape[-1]), dtype=torch.float64)
        found.append(Ball(length, length))
    if found:
        return Ball(*(torch.stack(sizes).amin() for sizes in zip(*((b.radius, b.norm) for b in found), strict=True)))
    raise NoBoundError(
        f"{call.name}: dot-product attention has no global Lipschitz constant on an unbounded domain, and there is no "
        "layer norm and linear layer directly before it to bound its input. Only pre-norm attention has a global bound."
    )


def register_rules() -> None:
    """Register the rules of this family."""
    register_bound_rule(nn.MultiheadAttention)(_self_attention)
    register(
        _dot_product_attention,
        "query key value attn_mask dropout_p is_causal scale enable_gqa",
        *(F.scaled_dot_product_attention, "scaled_dot_product_attention"),
    )
