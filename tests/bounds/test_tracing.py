"""Reading a network: a functional graph in float64 that computes what the module computes, or a refusal."""

import operator

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fisher_reg import NoBoundError, fisher_bound
from fisher_reg.bounds.tracing import trace
from fisher_reg.bounds.tracing.capture import captured_by_fx
from fisher_reg.bounds.tracing.compare import check_independence, first_difference
from fisher_reg.bounds.tracing.exact import ExactArithmetic
from fisher_reg.bounds.tracing.functional import made_functional


class _Written(nn.Module):
    """Calls ``write`` on a hidden value before the last layer."""

    def __init__(self, write):
        super().__init__()
        self.write, self.first, self.last = write, nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.write(self.first(x)))


def _chain(hidden):
    other = hidden
    hidden.add_(1.0)
    hidden.mul_(2.0)
    torch.relu_(hidden)
    return other


def _disjoint(hidden):
    left, right = hidden[:, :2], hidden[:, 2:]
    left.mul_(3.0)
    return torch.cat([left, right], 1)


def _flat_alias(hidden):
    flat = hidden.view(-1)
    flat.mul_(3.0)
    return hidden


def _read(write, seed=0):
    torch.manual_seed(seed)
    model = _Written(write).double().eval()
    inputs = torch.randn(3, 4, dtype=torch.float64)
    return model, inputs, trace(model, inputs)


@pytest.mark.parametrize("write", [_chain, _disjoint, _flat_alias, nn.ReLU(inplace=True)])
def test_values_are_those_of_the_calls_and_no_call_writes(write):
    model, inputs, traced = _read(write)
    with torch.no_grad():
        assert_close(traced.result, model(inputs))
    for node in traced.graph.nodes:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        is_in_place = name.endswith("_") and not name.endswith("__")
        assert node.op != "call_method" or not is_in_place
        assert node.target not in (operator.iadd, operator.imul)


def test_a_later_use_of_an_old_name_is_a_use_of_what_was_written_last():
    _, _, traced = _read(_chain)
    (last,) = [node for node in traced.graph.nodes if node.target == "model.last"]
    assert traced.values[last.args[0]].min() >= 0  # what came out of the ReLU


def test_another_view_of_a_changed_value_is_no_graph_of_values():
    model, inputs, _ = _read(_flat_alias)
    module = captured_by_fx(model)
    with torch.no_grad(), pytest.raises(NoBoundError, match=r"'mul_' changes 'first' in place, which is used again"):
        made_functional(module, inputs)


def test_what_is_not_returned_is_not_in_the_graph():
    def unused(hidden):
        hidden.sum() / hidden.exp()
        return hidden

    _, _, traced = _read(unused)
    assert [node.target for node in traced.graph.nodes if node.op.startswith("call")] == ["model.first", "model.last"]


def test_the_first_layer_that_differs_is_named():
    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            hidden = self.first(x)
            return self.last(2 * hidden if isinstance(hidden, torch.Tensor) else hidden)

    model = Chooses().double()
    inputs = torch.randn(2, 4, dtype=torch.float64)
    with torch.no_grad():
        module = captured_by_fx(model)
        made_functional(module, inputs)
        assert first_difference(model, module, inputs, sizes=True) == "the input of 'last' (Linear) differs"
        result = trace(model, inputs).result  # by torch.export
        assert_close(result, model(inputs))


def test_control_flow_on_the_size_of_a_batch_is_no_function_of_an_example():
    class Counts(nn.Module):
        def forward(self, x):
            return x * len(x)

    with torch.no_grad(), pytest.raises(NoBoundError, match="depends on the other examples"):
        check_independence(Counts(), torch.ones(2, 3, dtype=torch.float64))


def test_control_flow_on_values_is_refused_although_one_branch_can_be_exported():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.large = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.large(x) if float(x.sum()) > 0 else self.small(x)

    with pytest.raises(NoBoundError, match="cannot be traced"):
        fisher_bound(Branches(), torch.ones(2, 3))


def test_nothing_is_rounded_in_exact_arithmetic():
    value = torch.full((1,), 1 + 2**-40, dtype=torch.float64)
    with ExactArithmetic():
        casts = [value.half(), value.float(), value.bfloat16(), value.to(torch.float16), value.type(torch.float32)]
        casts += [value.to(dtype=torch.float32), torch.zeros(1) + value, torch.tensor([0.5]) * 2 * value]
    for cast in casts:
        assert cast.dtype == torch.float64
        assert_close(cast, value, rtol=0, atol=0)


class _ReadAgain(nn.Module):
    """Uses what an activation in place has overwritten."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 4), nn.LeakyReLU(0.01, inplace=True), nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.first(x)
        return self.last(hidden + 2.0 * self.act(hidden))


def test_a_value_that_an_activation_has_overwritten_is_read_as_the_model_reads_it():
    torch.manual_seed(0)
    model, x = _ReadAgain().double(), torch.randn(3, 4, dtype=torch.float64)
    traced = trace(model, x)
    assert model.act.inplace
    assert_close(traced.result.detach(), model(x).detach())
