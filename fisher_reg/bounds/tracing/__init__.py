"""Reading a network: a graph of calls that is known to compute what the module computes, with a value for each call.

``torch.fx`` keeps the modules as the user sees them, but may misread a forward. So the graph is rewritten without calls
in place and without dead code (:mod:`~fisher_reg.bounds.tracing.functional`) and compared with the module
(:mod:`~fisher_reg.bounds.tracing.compare`). Where it differs, ``torch.export`` is asked, and where that differs too,
the module has no bound.
"""

from fisher_reg.bounds.tracing.capture import asks_for_shape, where
from fisher_reg.bounds.tracing.functional import recomputed
from fisher_reg.bounds.tracing.read import Trace, trace

__all__ = ["Trace", "asks_for_shape", "recomputed", "trace", "where"]
