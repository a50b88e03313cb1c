"""Self-attention whose backward pass stacks the gradients of query, key and value, instead of adding padded ones."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import linear, multi_head_attention_forward, scaled_dot_product_attention

from fisher_reg.evaluation.rules import Rule


def packed_attention_rules() -> dict[Any, Rule]:
    """Rule for the self-attention of ``nn.MultiheadAttention`` in evaluation mode, without masks and weights.

    ``torch.nn.functional.multi_head_attention_forward`` selects query, key and value out of one projection; the
    backward pass of each selection fills a tensor of the size of all three with zeros. Here ``unbind`` is used, whose
    backward pass stacks the three gradients. The products and their order are the same, so the numbers are equal.

    Returns:
        From torch functions to their replacements.
    """
    return {multi_head_attention_forward: _multi_head_attention}


def _multi_head_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    if not _is_plain(given):
        return multi_head_attention_forward(*args, **kwargs)
    query, num_heads = given["query"], given["num_heads"]
    length, batch_size, width = query.shape
    packed = linear(query, given["in_proj_weight"], given["in_proj_bias"])
    packed = packed.view(length, batch_size, 3, num_heads, width // num_heads)
    q, k, v = packed.permute(2, 1, 3, 0, 4).unbind(0)
    heads = scaled_dot_product_attention(q, k, v)
    joined = heads.permute(2, 0, 1, 3).reshape(length, batch_size, width)
    return linear(joined, given["out_proj_weight"], given["out_proj_bias"]), None


def _is_plain(given: Mapping[str, Any]) -> bool:
    query = given["query"]
    is_self_attention = given["key"] is query and given["value"] is query and query.ndim == 3
    is_packed = given["in_proj_weight"] is not None and not given["use_separate_proj_weight"]
    fits = query.shape[-1] == given["embed_dim_to_check"] and query.shape[-1] % given["num_heads"] == 0
    has_more = any(given[name] is not None for name in _OPTIONAL) or given["add_zero_attn"] or given["is_causal"]
    has_dropout = given["training"] and given["dropout_p"] > 0
    return is_self_attention and is_packed and fits and not (has_more or has_dropout or given["need_weights"])


_SIGNATURE = inspect.signature(multi_head_attention_forward)
_OPTIONAL = ("bias_k", "bias_v", "key_padding_mask", "attn_mask", "static_k", "static_v")
