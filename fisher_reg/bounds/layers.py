"""The bound rules of torch's layers that have no weights of their own to bound, and of attention."""

from __future__ import annotations

from torch import Tensor, nn

from fisher_reg.bounds import activations, linears, normalizations, poolings  # noqa: F401  (they register their rules)
from fisher_reg.bounds.operator_norms.attention import (
    AttentionWeights,
    self_attention_lipschitz,
    self_attention_norm_at,
)
from fisher_reg.bounds.registry import Gain, Layer, ScaledGain, Tokens, register_bound_rule
from fisher_reg.errors import NoBoundError


@register_bound_rule(
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout
)
def passes(module: nn.Module, layer: Layer) -> ScaledGain:
    """Pass everything on: the identity, and dropout in evaluation."""
    return ScaledGain(1.0, layer.reach, scale=layer.scale)


@register_bound_rule(nn.Flatten, nn.Unflatten)
def _moves(module: nn.Module, layer: Layer) -> ScaledGain:
    return ScaledGain(1.0, scale=None if layer.scale is None else module(layer.scale.expand(layer.input.shape)))


@register_bound_rule(nn.Softmax)
def _softmax(module: nn.Softmax, layer: Layer) -> float:
    return 0.5  # the largest eigenvalue of diag(p) - p p'


@register_bound_rule(nn.MultiheadAttention)
def _attention(module: nn.MultiheadAttention, layer: Layer) -> Gain:
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
    if not isinstance(layer.reach, Tokens):
        raise NoBoundError(
            "Dot-product attention has no global Lipschitz constant on an unbounded domain, and no layer norm stands "
            "right before this one to bound it. Only pre-norm attention has a global bound."
        )
    tokens = Tokens(scale * layer.reach.gamma, scale * layer.reach.beta, layer.reach.radius)
    num_tokens = layer.input.shape[1 if module.batch_first else 0]
    norm = self_attention_lipschitz(weights, num_tokens, tokens)
    domain = "attention: the range of the layer norm before it, which no input leaves"
    return ScaledGain(norm, domain=domain, of_one_input=True)


def _attention_at(module: nn.MultiheadAttention, layer: Layer, weights: AttentionWeights, scale: Tensor) -> Tensor:
    """Bound the Jacobian at the example, with the attention weights that the module computes there."""
    masks = {name: mask for name, mask in layer.inputs.items() if name in ("attn_mask", "key_padding_mask")}
    operands = [layer.inputs[name] for name in ("query", "key", "value")]
    _, probabilities = module(*operands, **masks, need_weights=True, average_attn_weights=False)
    hidden = layer.input if module.batch_first else layer.input.transpose(0, 1)
    return self_attention_norm_at(weights, scale * hidden.double(), probabilities.double())
