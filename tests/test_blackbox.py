import copy
import warnings

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from torch import nn
from torch.testing import assert_close

from fisher_reg import BlackBox, BlackBoxMax, Exact, blackbox_spectral_norm, fisher_spectral_norm, fisher_trace
from fisher_reg.blackbox.questions import Questions
from fisher_reg.blackbox.result import CLIPPED, CONSTANT, UNRESOLVED
from fisher_reg.blackbox.service import Service
from fisher_reg.blackbox.sketch import _jackknife
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
    predict = _softmax_regression(np.eye(3, 6))
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
        (lambda x: x[:, :3], "sum of a row differs from one by .* pass lambda x: predict\\(x\\).softmax"),
        (lambda x: torch.full((len(x), 3), 0.3), "differs from one by 0.1"),
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

    with pytest.raises(ValueError, match="rounding errors; convert inputs and network to float32"):
        blackbox_spectral_norm(never, torch.zeros(2, 3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="floating-point tensor"):
        blackbox_spectral_norm(never, torch.zeros(2, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="input_std must be positive"):
        blackbox_spectral_norm(never, torch.zeros(2, 3), input_std=torch.zeros(3))
    with pytest.raises(ValueError, match="BlackBox needs num_queries >= 2, a point and a step; got 1"):
        BlackBox(1)
    with pytest.raises(ValueError, match="BlackBoxMax needs a positive step; got 0"):
        BlackBoxMax(step=0.0)


def _network(num_pixels=64, num_classes=6):
    """Logits as steep and as confident as those of a trained network."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(num_pixels, 20), nn.Tanh(), nn.Linear(20, num_classes)).eval()
    with torch.no_grad():
        network[1].weight.mul_(4)
        network[3].weight.mul_(10)
    return network


def _images(count=30, num_pixels=64):
    """Dark background, some pixels in between, some white: as the range of an image clips it."""
    return (1.6 * torch.rand(count, num_pixels) - 0.5).clamp(0, 1)


def _exact(network, x):
    return fisher_spectral_norm(copy.deepcopy(network).double(), x.double(), solver=Exact()).eigenvalue


def _coverage(result, exact):
    stands = ~result.eigenvalue.isnan()
    return ((result.eigenvalue - exact).abs() <= 2 * result.standard_error)[stands].double().mean()


FAULTS = {
    "8-bit inputs": (lambda x: (x * 255).round() / 255, lambda p: p),
    "labels": (lambda x: x, lambda p: nn.functional.one_hot(p.argmax(1), p.shape[1]).to(p)),
    "half-precision inputs": (lambda x: x.bfloat16().float(), lambda p: p),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_service_whose_answers_are_steps_gives_nan_with_the_reason(fault):
    network, x = _network(), _images(100)
    before, after = FAULTS[fault]
    with pytest.warns(UserWarning, match=r"The eigenvalue is NaN at .* of 100 because"):
        result = blackbox_spectral_norm(lambda t: after(network(before(t)).softmax(1)), x)
    missing = result.eigenvalue.isnan()
    assert missing.double().mean() >= 0.5
    if not missing.all():  # an image where the network is so smooth that a step of several units of rounding will do
        assert _coverage(result, _exact(network, x)) >= 0.85
    for numbers in (result.standard_error, result.bias_bound, result.trace):
        assert torch.equal(numbers.isnan(), missing)
    assert [bool(reason) for reason in result.reason] == missing.tolist()
    assert set(result.reason) <= {UNRESOLVED, CONSTANT, ""}


@pytest.mark.parametrize("digits", [3, 4, 5, 6])
def test_rounded_answers_give_the_eigenvalue_or_nan(digits):
    network, x = _network(), _images(100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = blackbox_spectral_norm(lambda t: (network(t).softmax(1) * 10**digits).round() / 10**digits, x)
    stands = ~result.eigenvalue.isnan()
    if digits <= 3:
        assert stands.double().mean() < 0.5
    if digits >= 5:
        assert stands.double().mean() > 0.5
    if stands.any():
        assert _coverage(result, _exact(network, x)) >= 0.85


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_answers_give_the_eigenvalue_or_nan(dtype):
    network, x = _network(), _images(100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = blackbox_spectral_norm(lambda t: network(t).softmax(1).to(dtype).float(), x)
    if (~result.eigenvalue.isnan()).any():
        assert _coverage(result, _exact(network, x)) >= 0.85


def test_a_likely_class_has_what_the_others_leave():
    # so that rounding of a probability near one does not hide how the small ones move
    service = Service(lambda x: torch.tensor([[1.0, 1e-10, 2e-10]]), torch.zeros(1, 2), None, None, 1)
    p = torch.tensor([[1 - 3e-10, 1e-10, 2e-10]], dtype=torch.float64)
    assert_close(service.roots(torch.zeros(1, 2)).square() / 4 - p, torch.zeros_like(p), rtol=0, atol=1e-15)


def test_a_longer_step_is_chosen_where_the_answers_are_rounded():
    network, x = _network(), _images()
    plain = blackbox_spectral_norm(lambda t: network(t).softmax(1), x)
    rounded = blackbox_spectral_norm(lambda t: (network(t).softmax(1) * 1e6).round() / 1e6, x)
    assert (rounded.step > 3 * plain.step).double().mean() > 0.7
    assert (rounded.eigenvalue / plain.eigenvalue - 1).abs().median() < 0.02


def test_a_forest_has_no_eigenvalue():
    x = np.random.RandomState(0).randn(200, 6)
    forest = RandomForestClassifier(20, random_state=0).fit(x, (x[:, 0] > 0) + 2 * (x[:, 1] > 0))
    with pytest.warns(UserWarning, match="such as a forest"):
        result = blackbox_spectral_norm(forest.predict_proba, x[:20])
    assert result.eigenvalue.isnan().all()


def test_constant_answers_have_no_eigenvalue():
    with pytest.warns(UserWarning, match="NaN at 2 of 2 because no prediction differs.* more digits"):
        result = blackbox_spectral_norm(lambda x: torch.tensor([[1.0, 0.0]]).expand(len(x), -1), torch.zeros(2, 5))
    assert result.eigenvalue.isnan().all()
    assert result.reason == (CONSTANT, CONSTANT)
    with pytest.warns(UserWarning, match="no prediction differs"):  # also where the budget has no room for the check
        few = blackbox_spectral_norm(lambda x: torch.full((len(x), 4), 0.25), torch.zeros(2, 5), estimator=BlackBox(9))
    assert few.reason == (CONSTANT, CONSTANT)


def test_the_paper_s_estimate_of_constant_answers_is_zero():
    result = blackbox_spectral_norm(lambda x: x.new_full((len(x), 4), 0.25), torch.zeros(2, 5), estimator=BlackBoxMax())
    assert_close(result.eigenvalue, torch.zeros(2))
    assert result.reason == ("", "")


def test_rare_jumps_that_carry_the_estimate_are_noticed():
    weight = torch.randn(4, 64)
    calls = []

    def predict(x):
        calls.append(len(x))
        shift = 5.0 if len(calls) in (100, 150) else 0.0
        return (x @ weight.T + shift * torch.eye(4)[0]).softmax(1)

    with pytest.warns(UserWarning, match="do not resolve"):
        result = blackbox_spectral_norm(predict, 0.1 * torch.randn(3, 64))
    assert result.eigenvalue.isnan().all()


def test_a_service_that_clips_is_noticed_and_right_within_bounds():
    network, x = _network(), _images(100)

    def clipping(t):
        return network(t.clamp(0, 1)).softmax(1)

    with pytest.warns(
        UserWarning, match=r"100 of 100 because steps that leave the range.*pass the range.*bounds=\(0, 1\)"
    ):
        result = blackbox_spectral_norm(clipping, x)
    assert set(result.reason) == {CLIPPED}
    bounded = blackbox_spectral_norm(clipping, x, bounds=(0, 1))
    assert set(bounded.reason) == {""}
    exact = _exact(network, x)
    assert 0.95 < (bounded.eigenvalue / exact).median() < 1.05
    assert _coverage(bounded, exact) >= 0.9


@pytest.mark.parametrize("estimator", [BlackBox(), BlackBox(9), BlackBox(60, step=1e-2), BlackBoxMax(10, step=0.05)])
@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0.0, np.inf), (torch.zeros(64), 1.0), (np.zeros((1, 64)), 1 + torch.rand(64)), (-1e-3, 1.0003)],
)
def test_no_question_leaves_the_bounds(estimator, low, high):
    network, x = _network(), _images(5)
    asked = []

    def predict(t):
        asked.append(t.clone())
        return network(t).softmax(1)

    result = blackbox_spectral_norm(predict, x, estimator=estimator, bounds=(low, high), input_std=torch.rand(64) + 0.5)
    questions = torch.stack(asked)
    assert bool((questions >= torch.as_tensor(low)).all())
    assert bool((questions <= torch.as_tensor(high)).all())
    assert torch.equal(questions[0], x) or isinstance(estimator, BlackBoxMax)
    assert result.eigenvalue.isfinite().all()


def test_round_off_leaves_no_bounds_either():
    low = torch.rand(200, 50)
    high = low + 0.1 + torch.rand(200, 50)
    questions = Questions(low + torch.rand(200, 50) * (high - low), torch.rand(50) + 0.5, low, high)
    for sign in (-1, 1):
        direction = sign * 3**0.5 / questions.std.expand(200, 50)  # the longest
        points = questions.point(questions.largest_step(), direction)
        assert bool((points >= low).all())
        assert bool((points <= high).all())


def test_steps_within_bounds_are_as_long_as_there_is_room():
    weight, x = 1e-3 * torch.randn(4, 64).double(), _images(100).double()
    result = blackbox_spectral_norm(lambda t: (t @ weight.T).softmax(1), x, bounds=(0, 1))
    assert 0.95 < (result.eigenvalue / _closed_form(weight.numpy(), x.numpy())).median() < 1.05
    assert bool((result.step <= 1 / 12**0.5).all())


def test_wide_bounds_change_the_directions_alone():
    network, x = _network(), _images(100)
    result = blackbox_spectral_norm(lambda t: network(t).softmax(1), x, bounds=(-100, 100))
    assert 0.95 < (result.eigenvalue / _exact(network, x)).median() < 1.05


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((0, 0.9), "one is above high by 0.1, and they reach from 0 to 1"),
        ((0.25, 1), "one is below low by 0.25"),
        ((0, 0), "low < high everywhere; the smallest difference is 0"),
        ((0, torch.nan), "low < high everywhere"),
        ((1, 0), "low < high"),
        ((0, torch.ones(7)), r"broadcastable to the inputs \(5, 64\)"),
        (1.0, r"bounds must be a pair \(low, high\)"),
    ],
)
def test_bounds_that_the_inputs_violate_are_refused_before_any_query(bounds, message):
    def never(x):
        raise AssertionError

    x = _images(5)
    x[0, 0], x[0, 1] = 0, 1
    with pytest.raises(ValueError, match=message):
        blackbox_spectral_norm(never, x, bounds=bounds)


def test_options_without_meaning_are_refused_before_any_query():
    def never(x):
        raise AssertionError

    x = _images(5)
    with pytest.raises(ValueError, match="max_batch_size must be a whole number, at least 1; got 0"):
        blackbox_spectral_norm(never, x, max_batch_size=0)
    with pytest.raises(ValueError, match="num_queries >= 3 within bounds"):
        blackbox_spectral_norm(never, x, bounds=(0, 1), estimator=BlackBox(2))
    with pytest.raises(ValueError, match=r"BlackBox\(step=1\) leaves the bounds; .* 0.0577"):
        blackbox_spectral_norm(never, x, bounds=(0, 1), estimator=BlackBox(step=1))
    with pytest.raises(ValueError, match=r"BlackBoxMax\(step=1\) leaves the bounds; pass at most 0.289"):
        blackbox_spectral_norm(never, x, bounds=(0, 1), estimator=BlackBoxMax(step=1))


@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("gap", [12.0, 20.0, 30.0, 60.0])
def test_the_step_adapts_where_the_probability_rounds_to_one(unit, gap):
    weight, bias = torch.randn(10, 50), torch.zeros(10)
    bias[0] = gap
    x = torch.zeros(30, 50)

    def logits(v):
        return v @ weight.T.to(v) / unit + bias.to(v)

    result = blackbox_spectral_norm(lambda v: logits(v).softmax(1), x)
    exact = fisher_spectral_norm(logits, x[:1].double(), solver=Exact()).eigenvalue
    assert 0.93 < (result.eigenvalue / exact).median() < 1.07  # 11 % / sqrt(30) = 2 %
    assert _coverage(result, exact) >= 0.9


@pytest.mark.parametrize("bounds", [None, (0, 1)])
def test_trained_networks_are_covered_on_flat_backgrounds(trained, digits, bounds):
    x = cases.test_images(digits, 60)
    result = blackbox_spectral_norm(lambda x: trained(x).softmax(1), x, bounds=bounds)
    assert result.eigenvalue.isnan().double().mean() <= 0.05
    assert _coverage(result, _exact(trained, x)) >= 0.9


@pytest.mark.parametrize("bounds", [None, (0, 1)])
def test_the_error_is_larger_at_kinks(bounds):
    # the maximum of four equal pixels: the derivative that autograd picks is that of the first
    layers = nn.Sequential(nn.MaxPool1d(4), nn.Flatten(), nn.Linear(64, 5)).eval()
    x = torch.zeros(40, 1, 256)
    pooled = blackbox_spectral_norm(lambda t: layers(t).softmax(1), x, bounds=bounds)
    plain = blackbox_spectral_norm(lambda t: layers[2](t[:, 0, ::4]).softmax(1), x, bounds=bounds)
    relative = [(result.standard_error / result.eigenvalue).nanmedian() for result in (pooled, plain)]
    assert pooled.eigenvalue.isnan().double().mean() <= 0.05
    assert relative[0] > 1.5 * relative[1]


def test_the_mean_of_the_columns_is_removed():
    # b mean |v| has the energy 2 b^2 / pi, and (1 - 2 / pi) b^2 / 300 about its mean, beside 300 of the linear part
    weight = torch.randn(4, 300)

    def predict(t):
        return (t @ weight.T + 30 * t.abs().mean(1, keepdim=True) * torch.eye(4)[0]).softmax(1)

    x = torch.zeros(50, 300)
    exact = fisher_spectral_norm(lambda t: t @ weight.T.to(t), x.double(), solver=Exact()).eigenvalue
    result = blackbox_spectral_norm(predict, x)
    assert (result.eigenvalue / exact).median() < 1.15
    assert _coverage(result, exact) >= 0.9


@pytest.mark.parametrize("bounds", [None, (0, 1)])
@pytest.mark.parametrize(("num_pixels", "num_classes"), [(1, 2), (1, 10), (2, 2), (50, 2), (50, 300)])
def test_few_pixels_and_few_or_many_classes_are_covered(num_pixels, num_classes, bounds):
    weight, x = torch.randn(num_classes, num_pixels), _images(100, num_pixels)
    result = blackbox_spectral_norm(lambda v: (v @ weight.T).softmax(1), x, bounds=bounds, estimator=BlackBox(120))
    exact = _closed_form(weight.double().numpy(), x.double().numpy())
    assert result.eigenvalue.isnan().double().mean() <= 0.02
    assert _coverage(result, exact) >= 0.9


def test_any_array_is_taken_and_a_native_one_is_given():
    weight = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    x = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
    expected = blackbox_spectral_norm(_softmax_regression(weight), x).eigenvalue
    read_only = x.copy()
    read_only.flags.writeable = False
    kinds = {
        "negative strides": x[:, ::-1].copy()[:, ::-1],
        "read-only": read_only,
        "big-endian": x.astype(">f4"),
        "Fortran order": np.asfortranarray(x),
        "a part of another": np.repeat(x, 2, axis=1)[:, ::2],
    }
    for name, given in kinds.items():
        kept = given.copy()

        def in_place(t, given=given):
            assert t.dtype == np.float32
            assert t.dtype.isnative
            assert t.flags.c_contiguous
            assert t.flags.writeable
            assert not np.shares_memory(t, given)
            answer = _softmax_regression(weight)(t)
            t += 7
            return answer

        assert_close(blackbox_spectral_norm(in_place, given).eigenvalue, expected, msg=name)
        assert np.array_equal(given, kept), name


@pytest.mark.parametrize(
    "kind", ["negative strides", "read-only", "big-endian", "the same buffer", "the same tensor", "a list"]
)
def test_any_answer_is_taken(kind):
    plain = _softmax_regression(np.random.default_rng(0).normal(size=(3, 6)))
    buffer = np.zeros((4, 3))

    def predict(x):
        p = plain(x)
        if kind == "negative strides":
            return p[:, ::-1]
        if kind == "read-only":
            p.flags.writeable = False
        if kind.startswith("the same"):
            buffer[: len(p)] = p
            return buffer[: len(p)] if kind == "the same buffer" else torch.from_numpy(buffer[: len(p)])
        return p.astype(">f8") if kind == "big-endian" else p.tolist() if kind == "a list" else p

    x = np.random.default_rng(1).normal(size=(4, 6))
    expected = blackbox_spectral_norm(plain, x).eigenvalue
    dtype_loss = 1e-3 if kind == "a list" else 1e-9
    for size in (None, 3):
        got = blackbox_spectral_norm(predict, x, max_batch_size=size).eigenvalue
        assert_close(got, expected, rtol=dtype_loss, atol=0)


def test_a_tensor_of_the_caller_is_neither_changed_nor_handed_out():
    network = cases.tiny_network().eval()
    x = torch.randn(6, 4).T  # strided
    kept, expected = x.clone(), blackbox_spectral_norm(lambda t: network(t).softmax(1), x)

    def in_place(t):
        assert t.is_contiguous()
        assert t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        answer = network(t).softmax(1)
        t.zero_()
        return answer

    assert torch.equal(blackbox_spectral_norm(in_place, x).eigenvalue, expected.eigenvalue)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", ["float16", "uint8", "int64", "bool"])
def test_arrays_that_cannot_take_small_steps_are_refused_by_name(dtype):
    def never(x):
        raise AssertionError

    with pytest.raises(ValueError, match=rf"float32 or float64 array; got {dtype}.*astype\(np.float32\)"):
        blackbox_spectral_norm(never, np.zeros((2, 3), dtype=dtype))


@pytest.mark.parametrize("estimator", [BlackBox(), BlackBox(9), BlackBoxMax(11)])
def test_calls_are_of_limited_size_and_progress_counts_questions(estimator):
    network, x = cases.tiny_network().eval(), torch.randn(5, 6)
    sizes, done = [], []

    def predict(t):
        sizes.append(len(t))
        return network(t).softmax(1)

    whole = blackbox_spectral_norm(predict, x, estimator=estimator)
    sizes.clear()
    result = blackbox_spectral_norm(
        predict, x, estimator=estimator, max_batch_size=2, progress=lambda *numbers: done.append(numbers)
    )
    assert sizes == [2, 2, 1] * result.num_queries
    assert done == [(number + 1, result.num_queries) for number in range(result.num_queries)]
    assert_close(result.eigenvalue, whole.eigenvalue, rtol=1e-2, atol=0)
