"""One rule per layer type: how much longer a perturbation can get in passing it.

A family of layers is one file, with its modules, its functions and its methods. What they share is in ``layer`` (what a
rule sees and returns), ``call`` (a function with its arguments) and ``registry`` (which rule belongs to what).
"""

from fisher_reg.bounds.rules import (
    activations,
    arithmetic,
    attention,
    constants,
    identity,
    linear,
    normalization,
    padding,
    pooling,
    reductions,
    resampling,
    shapes,
    steps,
    writes,
)

for family in (
    activations,
    arithmetic,
    attention,
    constants,
    identity,
    linear,
    normalization,
    padding,
    pooling,
    reductions,
    resampling,
    shapes,
    steps,
    writes,
):
    family.register_rules()
