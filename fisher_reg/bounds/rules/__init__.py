"""The bound rules: one per layer type, which returns the Lipschitz constant of the layer.

A family of layers is one file, with its modules, functions and methods. Shared code is in ``layer`` (argument and
result of a rule), ``call`` (a function with its arguments) and ``registry`` (from modules and functions to rules).
"""

from fisher_reg.bounds.rules import (
    activations,
    arithmetic,
    attention,
    constants,
    copies,
    elementwise,
    functional,
    gates,
    identity,
    linear,
    matmul,
    normalization,
    orders,
    padding,
    pooling,
    reductions,
    resampling,
    shapes,
    steps,
    vectors,
    writes,
)

for family in (
    activations,
    arithmetic,
    attention,
    constants,
    copies,
    elementwise,
    functional,
    gates,
    identity,
    linear,
    matmul,
    normalization,
    orders,
    padding,
    pooling,
    reductions,
    resampling,
    shapes,
    steps,
    vectors,
    writes,
):
    family.register_rules()
