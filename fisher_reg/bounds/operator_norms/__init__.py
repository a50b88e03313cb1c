"""Upper bounds of the norms of linear maps and of attention, as functions of tensors.

Public: all of ``__all__``, the norms of linear maps, for user-defined rules.

Example:
    >>> import torch
    >>> conv = torch.nn.Conv1d(1, 1, 1, bias=False)
    >>> conv.weight.data.fill_(-2.0)
    tensor([[[-2.]]])
    >>> float(conv_norm(conv.weight.detach(), Geometry.of(conv, (8,))))
    2.0
"""

from fisher_reg.bounds.operator_norms.conv import Geometry, conv_norm, conv_transpose_norm
from fisher_reg.bounds.operator_norms.matrix import linear_norm

__all__ = ["Geometry", "conv_norm", "conv_transpose_norm", "linear_norm"]
