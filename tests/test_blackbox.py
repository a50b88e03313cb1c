import copy

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from fisher_reg import BlackBox, BlackBoxMax, Exact, blackbox_spectral_norm, fisher_spectral_norm, fisher_trace
from fisher_reg.blackbox import _jackknife
from tests import cases


def _softmax_regression(weight):
    """A NumPy classifier: nothing to differentiate. F = W' (diag p - p p') W."""

    def predict(x):
        assert isinstance(x, np.ndarray)
        logits = x @ weight.T
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)

    return predict


def _closed_form(weight, x):
    p = torch.softmax(torch.from_numpy(x @ weight.T), 1)
    w = torch.from_numpy(weight)
    return torch.stack([torch.linalg.eigvalsh(w.T @ (torch.diag(q) - torch.outer(q, q)) @ w)[-1] for q in p])


def test_a_numpy_classifier_gets_its_closed_form_within_the_stated_error():
    random = np.random.default_rng(0)
    weight, x = random.normal(size=(5, 40)), random.normal(size=(200, 40)) / 10
    result = blackbox_spectral_norm(_softmax_regression(weight), x)
    exact = _closed_form(weight, x)
    covered = ((result.eigenvalue - exact).abs() <= 2 * result.standard_error).double().mean()
    assert covered >= 0.9
    assert (result.eigenvalue / exact - 1).abs().median() < 0.1
    assert (result.eigenvalue / exact - 1).mean().abs() < 0.03


@pytest.mark.parametrize(
    "estimator", [BlackBox(200), BlackBox(37), BlackBox(2), BlackBox(9, step=1e-3), BlackBoxMax(10)]
)
def test_the_budget_is_spent_exactly(estimator):
    calls = []
    predict = _softmax_regression(np.random.default_rng(0).normal(size=(3, 6)))

    def counted(x):
        calls.append(len(x))
        return predict(x)

    result = blackbox_spectral_norm(counted, np.zeros((4, 6)), estimator=estimator)
    assert calls == [4] * estimator.num_queries
    assert result.num_queries == estimator.num_queries


def test_an_odd_budget_leaves_central_differences_one_query_short():
    predict = _softmax_regression(np.ones((3, 6)))
    assert blackbox_spectral_norm(predict, np.zeros((1, 6)), estimator=BlackBoxMax(11)).num_queries == 10


def test_two_hundred_queries_are_within_ten_per_cent_on_trained_networks(trained, digits, record_property):
    # 10 % is the standard error; the median error of a normal variable is 0.67 of that
    # noise, since the flat backgrounds of the digits lie on the kinks of max pooling
    x = cases.test_images(digits, 360)
    x = x + 0.02 * torch.randn_like(x)
    exact = fisher_spectral_norm(trained, x, solver=Exact()).eigenvalue
    result = blackbox_spectral_norm(lambda x: trained(x).softmax(1), x)
    error = (result.eigenvalue - exact).abs()
    covered = (error <= 2 * result.standard_error).float().mean()
    record_property("median_error", (error / exact).median().item())
    record_property("coverage", covered.item())
    assert (error / exact).median() <= 0.1
    assert covered >= 0.9
    trace = fisher_trace(trained, x, estimator=Exact())
    assert ((result.trace - trace).abs() / trace).median() <= 0.1


def test_the_paper_s_largest_quotient_is_the_trace_over_the_dimension(trained, digits):
    model, x = copy.deepcopy(trained).double(), cases.test_images(digits, 32).double()
    exact = fisher_spectral_norm(model, x, solver=Exact()).eigenvalue
    trace = fisher_trace(model, x, estimator=Exact())
    result = blackbox_spectral_norm(lambda x: model(x).softmax(1), x, estimator=BlackBoxMax())
    assert (result.eigenvalue / exact).max() < 0.2
    assert (result.eigenvalue * x[0].numel() / trace).median() < 20
    assert result.standard_error.isnan().all()


def test_the_unit_of_the_inputs_scales_the_step_and_the_result():
    random = np.random.default_rng(0)
    weight, x = random.normal(size=(4, 30)), random.normal(size=(3, 30)) / 10
    plain = blackbox_spectral_norm(_softmax_regression(weight), x, estimator=BlackBox(50))
    scaled = blackbox_spectral_norm(_softmax_regression(weight / 1e5), x * 1e5, estimator=BlackBox(50))
    assert_close(scaled.eigenvalue * 1e10, plain.eigenvalue, rtol=1e-2, atol=0)


def test_input_std_converts_to_pixel_units():
    random = np.random.default_rng(0)
    weight, std = torch.from_numpy(random.normal(size=(4, 30))), torch.rand(30, dtype=torch.float64) + 0.5
    x = torch.zeros(2, 30, dtype=torch.float64)
    outside = blackbox_spectral_norm(lambda z: (z @ weight.T).softmax(1), x, input_std=std)
    inside = blackbox_spectral_norm(lambda pixels: (pixels / std @ weight.T).softmax(1), x)
    assert_close(outside.eigenvalue, inside.eigenvalue, rtol=1e-3, atol=0)


def test_a_saturated_prediction_has_zero_and_not_nan():
    result = blackbox_spectral_norm(lambda x: torch.tensor([[1.0, 0.0]]).expand(len(x), -1), torch.zeros(2, 5))
    assert_close(result.eigenvalue, torch.zeros(2))
    assert_close(result.standard_error, torch.zeros(2))


def test_the_bias_is_below_its_bound_and_the_jackknife_removes_most_of_it():
    # G = diag(1, 0.5, 0.5, 0.5, 0.5): 400 sketches of 100 columns
    root = torch.tensor([1.0, 0.5, 0.5, 0.5, 0.5], dtype=torch.float64).sqrt()
    columns = torch.randn(400, 100, 5, dtype=torch.float64) * root
    plain = torch.linalg.eigvalsh(columns.mT @ columns / 100)[:, -1]
    corrected = _jackknife(columns)
    standard_error = (2 / 100 / 400) ** 0.5
    assert plain.mean() - 1 > 3 * standard_error
    assert plain.mean() - 1 <= (1 + (3 / 100) ** 0.5) ** 2 + 1 / 100 - 1
    assert abs(corrected.mean() - 1) < 0.5 * (plain.mean() - 1)


def test_directions_follow_the_generator():
    predict = _softmax_regression(np.random.default_rng(0).normal(size=(3, 6)))
    first, again, other = (
        blackbox_spectral_norm(predict, np.zeros((1, 6)), generator=torch.Generator().manual_seed(s)).eigenvalue
        for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_network_gets_no_gradient_and_no_new_mode():
    model, x = cases.tiny_network(dropout=True).eval(), torch.randn(3, 6, requires_grad=True)
    seen = []

    def predict(x):
        seen.append((x.requires_grad, torch.is_grad_enabled()))
        return model(x).softmax(1)

    blackbox_spectral_norm(predict, x, estimator=BlackBox(5))
    assert set(seen) == {(False, False)}
    assert x.grad is None


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x[:, :3], "sum is off one by .* pass lambda x: predict\\(x\\).softmax"),
        (lambda x: torch.full((len(x), 3), 0.3), "off one by 0.1"),
        (lambda x: torch.tensor([[1.5, -0.5]]).expand(len(x), -1), "smallest value is -0.5"),
        (lambda x: torch.full((len(x), 2), torch.nan), "NaN or infinite"),
        (lambda x: torch.ones(len(x)), r"\(B, K\) with B = 4 and K >= 2; it returned \(4,\)"),
        (lambda x: torch.ones(len(x), 1), "K >= 2"),
        (lambda x: torch.full((len(x), 2), 0.5, dtype=torch.float16), "float32 or float64, since differences"),
    ],
)
def test_answers_that_are_no_probabilities_are_refused(answer, message):
    with pytest.raises(ValueError, match=message):
        blackbox_spectral_norm(answer, torch.ones(4, 6))


def test_bad_inputs_are_refused_before_any_query():
    def never(x):
        raise AssertionError

    with pytest.raises(ValueError, match="rounding; convert inputs and network to float32"):
        blackbox_spectral_norm(never, torch.zeros(2, 3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="floating-point tensor"):
        blackbox_spectral_norm(never, np.zeros((2, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="input_std must be positive"):
        blackbox_spectral_norm(never, torch.zeros(2, 3), input_std=torch.zeros(3))
    with pytest.raises(ValueError, match="BlackBox needs num_queries >= 2, a point and a step; got 1"):
        BlackBox(1)
    with pytest.raises(ValueError, match="BlackBoxMax needs a positive step; got 0"):
        BlackBoxMax(step=0.0)
