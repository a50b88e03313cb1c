"""The function of a model that is measured or penalised: a copy that shares the parameters and is deterministic.

Public: :func:`deployed` and :func:`trained`, the functions of a model that are measured and penalised;
:func:`differentiable`, a block in which they can be differentiated; :func:`strictly`, a block without TensorFloat-32;
:func:`in_fast_layout`; :class:`LogitsOf`; and the types of arguments :data:`InputStd`, :data:`LogitsFunction` and
:data:`SideInputs`. The other names are internal and can change.
"""

from fisher_reg.evaluation.batch_norm import Recording, Statistics, UnrecordedError, recording_rules
from fisher_reg.evaluation.calls import called, name_of_call
from fisher_reg.evaluation.copying import is_sharded
from fisher_reg.evaluation.evaluated import (
    EvaluatedModel,
    Source,
    deployed,
    deployed_module,
    deployed_with_gradient,
    has_training_batch_norm,
    refuse_random,
    refuse_unseen_batch_norm,
    source_of,
    trained,
    trained_module,
)
from fisher_reg.evaluation.input_std import InputStd, check_input_std, standard_deviation
from fisher_reg.evaluation.inputs import (
    LogitsFunction,
    SideInputs,
    WithSideInputs,
    check_inputs,
    remedy_for_integers,
    select,
)
from fisher_reg.evaluation.layout import in_fast_layout
from fisher_reg.evaluation.logits import LogitsOf
from fisher_reg.evaluation.noise import GlobalState, Noise
from fisher_reg.evaluation.passes import differentiable, eagerly, measured
from fisher_reg.evaluation.rules import Rules, is_checkpointed, second_derivative_rules, twice_differentiable
from fisher_reg.evaluation.shared_copy import SharedCopy
from fisher_reg.evaluation.strict import strictly

__all__ = [
    "EvaluatedModel",
    "GlobalState",
    "InputStd",
    "LogitsFunction",
    "LogitsOf",
    "Noise",
    "Recording",
    "Rules",
    "SharedCopy",
    "SideInputs",
    "Source",
    "Statistics",
    "UnrecordedError",
    "WithSideInputs",
    "called",
    "check_input_std",
    "check_inputs",
    "deployed",
    "deployed_module",
    "deployed_with_gradient",
    "differentiable",
    "eagerly",
    "has_training_batch_norm",
    "in_fast_layout",
    "is_checkpointed",
    "is_sharded",
    "second_derivative_rules",
    "measured",
    "name_of_call",
    "recording_rules",
    "refuse_random",
    "refuse_unseen_batch_norm",
    "remedy_for_integers",
    "select",
    "source_of",
    "standard_deviation",
    "strictly",
    "trained",
    "trained_module",
    "twice_differentiable",
]
