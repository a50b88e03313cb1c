"""What holds for every network and input, tried on many."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fisher_reg import Bernoulli, Categorical, Exact, Gaussian, Lanczos, fisher_spectral_norm, fisher_trace
from fisher_reg.operator import InputFisher

LIKELIHOODS = st.sampled_from([Categorical(), Bernoulli(), Gaussian(0.5)])


@st.composite
def problems(draw):
    """A two-layer network with random sizes and slopes, its inputs, and a generator for what the test needs."""
    num_inputs, num_outputs = draw(st.integers(1, 8)), draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    slope = 10 ** draw(st.floats(-2, 1))
    first, last = slope * normal(7, num_inputs), normal(num_outputs, 7)
    return lambda x: (x @ first.T).tanh() @ last.T, normal(draw(st.integers(1, 5)), num_inputs), normal


deterministic = settings(max_examples=40, deadline=None, derandomize=True)


@deterministic
@given(problems(), LIKELIHOODS)
def test_f_is_symmetric_and_positive_semidefinite(problem, likelihood):
    function, x, normal = problem
    fisher = InputFisher(function, x, likelihood)
    v, w = normal(*x.shape), normal(*x.shape)
    fv, fw = fisher.adjoint(fisher.apply(v)), fisher.adjoint(fisher.apply(w))
    scale = fv.norm() * w.norm() + 1e-30
    assert_close((fv * w).sum(1) / scale, (v * fw).sum(1) / scale, rtol=0, atol=1e-12)
    assert ((v * fv).sum(1) >= -1e-12 * scale).all()


@deterministic
@given(problems(), LIKELIHOODS)
def test_examples_do_not_depend_on_order_or_company(problem, likelihood):
    function, x, _ = problem
    whole = fisher_spectral_norm(function, x, likelihood=likelihood, solver=Lanczos())
    turned = fisher_spectral_norm(function, x.flip(0), likelihood=likelihood, solver=Lanczos())
    alone = [fisher_spectral_norm(function, one[None], likelihood=likelihood, solver=Lanczos()) for one in x]
    for name in ("eigenvalue", "converged"):
        assert_close(getattr(turned, name).flip(0), getattr(whole, name), rtol=1e-6, atol=1e-30)
        assert_close(torch.cat([getattr(one, name) for one in alone]), getattr(whole, name), rtol=1e-6, atol=1e-30)


@deterministic
@given(problems(), st.floats(-50, 50))
def test_a_shift_of_all_logits_changes_nothing(problem, shift):
    function, x, _ = problem
    # softmax rounds to 1e-16 of the shift
    moved = fisher_spectral_norm(lambda x: function(x) + shift * (1 + x.sum(1, keepdim=True)), x, solver=Exact())
    still = fisher_spectral_norm(function, x, solver=Exact())
    assert_close(moved.eigenvalue, still.eigenvalue, rtol=1e-9, atol=1e-20)


@deterministic
@given(problems(), LIKELIHOODS, st.floats(-3, 3))
def test_another_unit_of_the_inputs_divides_by_its_square(problem, likelihood, decades):
    function, x, _ = problem
    factor = 10**decades
    plain = fisher_spectral_norm(function, x, likelihood=likelihood, solver=Lanczos())
    scaled = fisher_spectral_norm(lambda y: function(y / factor), x * factor, likelihood=likelihood, solver=Lanczos())
    assert_close(scaled.eigenvalue * factor**2, plain.eigenvalue, rtol=1e-6, atol=1e-30)


@deterministic
@given(problems(), LIKELIHOODS, st.integers(1, 4))
def test_ritz_values_are_below_and_trace_and_residual_above(problem, likelihood, num_steps):
    function, x, _ = problem
    exact = fisher_spectral_norm(function, x, likelihood=likelihood, solver=Exact()).eigenvalue
    solver = Lanczos(num_steps, num_starts=1, rtol=0.0)
    result = fisher_spectral_norm(function, x, likelihood=likelihood, solver=solver)
    trace = fisher_trace(function, x, likelihood=likelihood, estimator=Exact())
    slack = 1 + 1e-9
    assert (result.eigenvalue <= exact * slack).all()
    assert (exact <= trace * slack).all()
    assert (exact <= result.interval(trace=trace).upper).all()
    spectrum = fisher_spectral_norm(function, x, likelihood=likelihood, solver=Exact()).ritz_values
    distance = (spectrum - result.eigenvalue[:, None]).abs().amin(1)
    # round-off of the difference quotients: half the digits
    assert (distance <= result.residual + 1e-6 * exact).all()
