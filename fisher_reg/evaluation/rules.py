"""Rules that replace torch functions in a Fisher pass.

A rule replaces the calls of one torch function. Rules act only on calls of the current thread and change no module:
batch norm, attention, recurrent layers and precision are all handled in this way. They change no setting of torch,
except that of cuDNN while a recurrent layer runs.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from fisher_reg.evaluation.recurrent import recurrent_rules

Rule = Callable[..., Any]


class Rules(TorchFunctionMode):
    """Replaces calls of some torch functions in a ``with`` block.

    Args:
        rules: From a torch function to its replacement, with the same arguments.
        needs_graph: Whether a graph that is made in the block must store all tensors it needs. Activation checkpointing
            would recompute them after the block, without the rules; it is therefore disabled inside the block.
    """

    def __init__(self, rules: dict[Any, Rule], needs_graph: bool = False) -> None:
        super().__init__()
        self.rules = rules
        self.needs_graph = needs_graph

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one call."""
        chosen = self.rules.get(function, function)
        if self.needs_graph and is_checkpointed():
            with torch.autograd.graph.saved_tensors_hooks(itself, itself):
                return chosen(*args, **(kwargs or {}))
        return chosen(*args, **(kwargs or {}))


def is_checkpointed() -> bool:
    """Whether hooks for saved tensors are active, as in ``torch.utils.checkpoint``."""
    if _top_hooks is not None:
        return _top_hooks(True) is not None
    frame = inspect.currentframe()  # torch before 2.8 has no function for it
    while frame is not None and not frame.f_code.co_filename.endswith(_CHECKPOINT_FILE):
        frame = frame.f_back
    return frame is not None


_CHECKPOINT_FILE = os.path.join("torch", "utils", "checkpoint.py")
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def itself(tensor: Tensor) -> Tensor:
    """Save a tensor unchanged."""
    return tensor


def attention_by_math(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot-product attention from elementary operations, which support second derivatives and forward mode."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    output, _ = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    result: Tensor = output
    return result


def multi_head_attention_by_math(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Multi-head attention with its weights, for which torch uses elementary operations."""
    bound = _MULTI_HEAD.bind(*args, **kwargs)
    asked = bound.arguments.get("need_weights", True)
    bound.arguments["need_weights"] = True
    output, weights = multi_head_attention_forward(*bound.args, **bound.kwargs)
    return output, weights if asked else None


_MULTI_HEAD = inspect.signature(multi_head_attention_forward)


def second_derivative_rules() -> dict[Any, Rule]:
    """Rules for attention and recurrent layers with second derivatives, which fused kernels and cuDNN do not have."""
    attention: dict[Any, Rule] = {
        multi_head_attention_forward: multi_head_attention_by_math,
        scaled_dot_product_attention: attention_by_math,
        torch.ops.aten.scaled_dot_product_attention.default: attention_by_math,
    }
    return attention | recurrent_rules(differentiates_twice=True)


def twice_differentiable() -> Rules:
    """Open a context in which attention and recurrent layers have second derivatives."""
    return Rules(second_derivative_rules(), needs_graph=True)
