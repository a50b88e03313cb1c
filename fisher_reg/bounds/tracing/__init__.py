"""Tracing of a network: a graph of calls, verified against the module, with the value of each call.

``torch.fx`` keeps the modules of the user, but may trace a forward wrongly. Therefore the graph is rewritten without
in-place calls and dead code (:mod:`~fisher_reg.bounds.tracing.functional`) and compared with the module
(:mod:`~fisher_reg.bounds.tracing.compare`). If it differs, ``torch.export`` is used. If that graph differs too, the
module has no bound.
"""

from fisher_reg.bounds.tracing.capture import asks_for_shape, where
from fisher_reg.bounds.tracing.functional import recomputed
from fisher_reg.bounds.tracing.read import Trace, trace

__all__ = ["Trace", "asks_for_shape", "recomputed", "trace", "where"]
