r"""Certified upper bounds of the sensitivity of the output of a network to its input.

The Lipschitz constant of a function f is the smallest L with |f(x) - f(y)| <= L |x - y| for all x and y. For a whole
network it is too hard to compute, but an upper bound is not: the constant of each layer is easy to bound, and constants
combine by simple rules. For f after g they multiply. For f + g they add. For a concatenation of f and g they combine to
the root of the sum of squares. Every step is a proven inequality, so that the result is certified.

Six terms are used in this package:

- A *trace* is the network as a graph of calls, with the value of each call at an example (``tracing``).
- A *rule* bounds the calls of one kind. It gets a *layer*: one call with its inputs and its output (:class:`Layer`).
- A *gain* is the result of a rule (:class:`Gain`): the Lipschitz constant of the layer, and optionally the diagonal
  scaling in which it holds (:class:`ScaledGain`) and the range of the output.
- A *sensitivity* belongs to a value in the graph. It is the logarithm of a Lipschitz constant of that value with
  respect to the input of the network (``sensitivity``). That of the input itself is log 1 = 0.
- *Coordinates* of a value are a positive diagonal scaling of it.
- A *bound* is the report: a number with the share of each layer (:class:`UpperBound`).

Data flows one way:

1. ``tracing`` reads the network as a graph, in float64 and without changes in place, and compares it with the module:
   a graph that gives other logits is not used.
2. ``propagate`` visits the calls in order. For each it calls the rule (``rules``) to get the gain, and computes the
   sensitivity of the output from those of the inputs. ``operator_norms`` has the mathematics: norms of matrices, of
   convolutions, and of attention.
3. A last linear layer, the *head*, is bounded together with the softmax.
4. ``report`` has the result. ``api`` has the functions for bounds over all inputs, ``local`` those at given inputs.

A constant is requested in one of three ways: over all inputs; at given inputs (``layer.is_local``), where the rule may
use the values; and over a region around given inputs (``layer.deviation``), a ball or a box, where it may use the
largest deviation of each entry from its value. ``deviations`` computes these, and ``jacobians`` uses the Jacobian at
the examples.

``tighten`` makes the bound smaller and keeps it certified: it bounds whole blocks at once, or chooses diagonal scalings
of hidden channels for which the product of the norms is small. :class:`Tightening` holds the options.

Diagonal scalings avoid a loss between neighbouring layers. Let a layer multiply its channels by 10 and 1, and the next
one by 0.1 and 1. The product of the norms is 10, but the composed map is the identity. Therefore the rule of the first
layer returns the gain 1 with a ``scale``: it bounds ``scale * output`` instead of the output. The next layer absorbs
the scaling: its rule bounds its weight divided by ``scale``. :func:`diagonal_gain` does this.

Example:
    A residual block by hand, y = x + W2 relu(W1 x), with W1 = [[3, 0], [0, 1]] and W2 = [[0, 2], [2, 0]].

    ==================  ===============================  =====================
    value               Lipschitz constant               sensitivity
    ==================  ===============================  =====================
    x                   1                                log 1 = 0
    W1 x                \|W1\| * 1 = 3                     log 3
    relu(W1 x)          1 * 3 = 3, the slope is <= 1     log 3
    W2 relu(W1 x)       \|W2\| * 3 = 2 * 3 = 6             log 6
    x + W2 relu(W1 x)   1 + 6 = 7                        log(1 + 6) = log 7
    ==================  ===============================  =====================

    The result is 1 + \|W2\| \|W1\|. The code computes the same number, with the share of each layer. The rows of
    ``outer`` have mean zero and norm one, because :func:`lipschitz_bound` bounds the centred logits.

    >>> import torch
    >>> from torch import nn
    >>> class Residual(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
    ...         self.first.weight.data = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    ...         self.second.weight.data = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    ...     def forward(self, x):
    ...         return x + self.second(self.first(x).relu())
    >>> outer = nn.Linear(2, 2)
    >>> outer.weight.data = torch.tensor([[0.5, 0.5], [-0.5, -0.5]])
    >>> bound = lipschitz_bound(nn.Sequential(Residual(), outer), torch.zeros(1, 2))
    >>> round(bound.value, 6)
    7.0
    >>> [(term.name, round(term.norm, 6)) for term in bound.terms]
    [('0.first', 3.0), ('0.relu', 1.0), ('0.second', 2.0), ('1', 1.0)]

Public: all of ``__all__``, and that of ``operator_norms``.
"""

from fisher_reg.bounds import rules  # noqa: F401  (registers the rules of torch's layers)
from fisher_reg.bounds.api import fisher_bound, lipschitz_bound, log_fisher_bound
from fisher_reg.bounds.local import certified_divergence, certified_radius, local_fisher_bound
from fisher_reg.bounds.region import Box, L2Ball
from fisher_reg.bounds.report import BoundTerm, UpperBound
from fisher_reg.bounds.rules.layer import Gain, Layer, ScaledGain, diagonal_gain
from fisher_reg.bounds.rules.registry import register_bound_rule
from fisher_reg.bounds.tightening import Tightening

__all__ = [
    "BoundTerm",
    "Box",
    "Gain",
    "L2Ball",
    "Layer",
    "ScaledGain",
    "Tightening",
    "UpperBound",
    "certified_divergence",
    "certified_radius",
    "diagonal_gain",
    "fisher_bound",
    "lipschitz_bound",
    "local_fisher_bound",
    "log_fisher_bound",
    "register_bound_rule",
]
