"""What a bound claims, checked against dense Jacobians. The oracle uses torch only."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import fisher_reg as fr
from tests.bounds.random_networks import random_network

ROUND_OFF = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Relative room for rounding.

A bound and a Jacobian are products of at most about twenty factors, each right to about a hundred roundings. This is
2000 roundings: of 1.1e-16 in float64, or 2e-13, and of 6e-8 in float32, or 1.2e-4 if all had one sign. They add up at
random, to the root of 2000 times one, or 3e-6. Norms go through Gram matrices in places, which halves the digits of
a value that is small beside the largest: the root of 1.1e-16 is 1e-8. So 1e-6 and 1e-4 leave a factor of 30.
"""

JUMPS = {torch.float64: 1e-11, torch.float32: 1e-3}
"""Room for the rounding of two logits, relative to the largest one, where their difference is looked at."""

TIGHTENINGS = (
    fr.Tightening(),
    fr.Tightening(folded=False, merged=False, head=False, dense=False),
    fr.Tightening(balancing_steps=2),
    fr.Tightening(averaged=True),
    fr.Tightening(merged=False),
    fr.Tightening(head=False),
)

RADII = (0.001, 0.03, 0.3, 3.0)
"""One is asked of each network."""


@dataclass(frozen=True)
class Outcome:
    """What came of one network.

    Attributes:
        description: That of the network.
        has_bound: Whether there is a bound over all inputs.
        has_local_bound: Whether there is one at the inputs.
        violations: One line per claim that is wrong.
    """

    description: object
    has_bound: bool
    has_local_bound: bool
    violations: tuple[str, ...]


# ----------------------------------------------------------------------------------------------------- dense Jacobians


def logits_of(model, x):
    """The logits in double precision, without a gradient."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return model(x.clone()).double()


def jacobians(model, x, create_graph=False):
    """The dense Jacobian of each example, ``(B, K, d)`` in double precision."""
    with sdpa_kernel(SDPBackend.MATH):
        rows = torch.autograd.functional.jacobian(lambda z: model(z.clone()).sum(0), x, create_graph=create_graph)
    return rows.flatten(2).transpose(0, 1).double()


def root_fisher(logits, jacobian):
    """A matrix R with ``R^T R = J^T (diag(p) - p p^T) J``, ``(B, K, d)``.

    It counts from the likeliest class, so that nothing cancels where the softmax is saturated.
    """
    top = logits.argmax(1)
    from_top = jacobian - jacobian.gather(1, top[:, None, None].expand(-1, -1, jacobian.shape[2]))
    probabilities = logits.softmax(1)[:, :, None]
    mean = (probabilities * from_top).sum(1, keepdim=True)
    return probabilities.sqrt() * (from_top - mean)


def norms(matrices):
    return torch.linalg.matrix_norm(matrices, 2)


def centred(jacobian):
    return jacobian - jacobian.mean(1, keepdim=True)


def points_of(model, x, generator):
    """The inputs, random points far and near, special ones, and points with a larger Fisher norm or slope."""

    def noise(like):
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

    level = noise(x[:1]).flatten()[0]
    points = [x, x + 0.01 * noise(x), 3 * noise(x), 100 * noise(x[:2]), 0.01 * noise(x[:2])]
    points += [level + 1e-3 * noise(x[:1]), torch.zeros_like(x[:1])]
    points = torch.cat(points)
    jacobian = jacobians(model, points)
    fisher, slope = norms(root_fisher(logits_of(model, points), jacobian)), norms(centred(jacobian))
    start = torch.stack([x[0], points[fisher.argmax()], points[slope.argmax()]])
    return torch.cat([points, *_ascent(model, start, noise)])


def _ascent(model, point, noise, steps=3):
    """Gradient steps on the spectral norms; where the gradient says nothing, random steps."""
    found = []
    size = 0.3 * point.flatten(1).norm(dim=1).clamp_min(0.1).view(-1, *[1] * (point.ndim - 1))
    for step in range(steps):
        variable = point.detach().requires_grad_()
        with torch.enable_grad():
            try:
                jacobian = jacobians(model, variable, create_graph=True)
                with sdpa_kernel(SDPBackend.MATH):
                    logits = model(variable.clone()).double()
                total = norms(root_fisher(logits, jacobian))[:2].sum() + norms(centred(jacobian))[2:].sum()
                (slope,) = torch.autograd.grad(total, variable, allow_unused=True)
            except RuntimeError:  # nothing to differentiate twice
                slope = None
        slope = torch.zeros_like(point) if slope is None else slope.nan_to_num(0.0, 0.0, 0.0)
        length = slope.flatten(1).norm(dim=1).view_as(size)
        direction = torch.where(length > 0, slope / length.clamp_min(1e-30), noise(point))
        point = (point + size / (step + 1) * direction).detach()
        found.append(point)
    return found


# -------------------------------------------------------------------------------------------------- balls and domains


def along(values, x):
    """Numbers ``(B,)`` in a shape that broadcasts to the inputs."""
    return values.view(-1, *[1] * (x.ndim - 1))


def units(directions, std):
    """Directions ``(..., *S)`` with a length of one in pixels, that is times ``std``; zero stays zero."""
    lengths = torch.linalg.vector_norm((directions * std).flatten(directions.ndim - std.ndim), dim=-1)
    return directions / lengths.clamp_min(1e-30).view(*lengths.shape, *[1] * std.ndim)


def fisher_at(model, points, std):
    """The largest eigenvalues of the Fisher matrix in pixels ``(n,)``, by dense Jacobians."""
    return norms(root_fisher(logits_of(model, points), jacobians(model, points) / std.flatten())).square()


def points_within(model, x, radii, generator, std=None, steps=3, count=4):
    """Points ``(n, B, *S)`` in the ball around each input: on its sphere, inside, and where slopes lead.

    Args:
        model: In the dtype of the inputs.
        x: ``(B, *S)``.
        radii: ``(B,)``, in pixels.
        generator: Of the random directions.
        std: ``S``, what pixels were divided by.
        steps: Of the ascent.
        count: How many random directions there are.
    """
    std = torch.ones_like(x[0]) if std is None else std.to(x).expand(x.shape[1:])
    sizes = along(radii.to(x), x) * (1 - 1e-9)
    noise = torch.randn((count, *x.shape), generator=generator, dtype=torch.float64).to(x)
    corners = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x).sign()[None]
    single = torch.zeros_like(x)
    single.flatten(1)[:, int(torch.randint(x[0].numel(), (), generator=generator))] = 1.0
    directions = units(torch.cat([noise, corners, single[None]]), std)
    jacobian = jacobians(model, x) / std.flatten()
    _, _, top = torch.linalg.svd(root_fisher(logits_of(model, x), jacobian), full_matrices=False)
    steepest = [top[:, 0], *rivals(jacobian, logits_of(model, x).argmax(1))[:4]]
    for slope in steepest:
        step = units(slope.to(x).view_as(x) / std, std)[None]
        directions = torch.cat([directions, step, -step])
    points = [x + sizes * directions, x + 0.3 * sizes * directions[:count], x[None]]
    values = fisher_at(model, torch.cat(points).flatten(0, 1), std).view(-1, len(x))
    point = torch.cat(points)[values.argmax(0), torch.arange(len(x))]
    for _ in range(steps):
        slope = _slope(model, point, std)
        if slope is None:
            break
        point = point + 0.5 * sizes * units(slope / std.square(), std)
        offset = point - x
        lengths = torch.linalg.vector_norm((offset * std).flatten(1), dim=1)
        point = x + offset * along((sizes.flatten() / lengths.clamp_min(1e-30)).clamp_max(1.0), x)
        points += [point[None], (x + sizes * units(offset, std))[None]]
    return torch.cat(points)


def points_in_box(model, low, high, generator, count=6, steps=3):
    """Points ``(n, *S)`` in a box: corners, random ones, and where slopes lead from one of them."""
    shape = (count, *low.shape)
    corners = torch.rand(shape, generator=generator, dtype=torch.float64).to(low) < 0.5
    inside = low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64).to(low)
    points = torch.cat([torch.where(corners, low, high), inside, low[None], high[None], ((low + high) / 2)[None]])
    std = torch.ones_like(low)
    point = points[fisher_at(model, points, std).argmax()][None]
    found = [points]
    for step in range(steps):
        slope = _slope(model, point, std)
        if slope is None:
            break
        point = (point + (high - low) * slope.sign() / (step + 1)).clamp(low, high)
        found.append(point)
    return torch.cat(found)


def rivals(jacobian, predicted):
    """How each rival gains on the predicted class, ``(K, B, d)``."""
    return (jacobian - jacobian[torch.arange(len(jacobian)), predicted][:, None]).transpose(0, 1)


def _slope(model, point, std):
    """The slope of the Fisher norm, None where there is nothing to differentiate twice."""
    variable = point.detach().requires_grad_()
    with torch.enable_grad():
        try:
            rows = jacobians(model, variable, create_graph=True) / std.flatten()
            total = norms(root_fisher(model(variable.clone()).double(), rows)).sum()
            (slope,) = torch.autograd.grad(total, variable, allow_unused=True)
        except RuntimeError:
            return None
    return None if slope is None else slope.nan_to_num(0.0, 0.0, 0.0)


# --------------------------------------------------------------------------------------------------------------- state


def state_of(model):
    """All that a call must leave as it was: tensors, modes, hooks, and what else the modules hold."""
    found = {}
    for name, module in model.named_modules():
        tensors = {**module._parameters, **module._buffers}
        tensors.update({key: value for key, value in vars(module).items() if isinstance(value, torch.Tensor)})
        for key, value in tensors.items():
            if value is not None:
                gradient = None if not value.is_leaf or value.grad is None else value.grad.clone()
                found[name, key] = (id(value), value.detach().clone(), value.requires_grad, gradient)
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        found[name, "rest"] = (
            type(module),
            module.training,
            *[tuple(item) for item in hooks],
            "forward" in vars(module),
        )
    return found


def same_state(first, second):
    if first.keys() != second.keys():
        return False
    return all(_same(before, second[key]) for key, before in first.items())


def _same(first, second):
    if isinstance(first, tuple):
        return len(first) == len(second) and all(_same(*pair) for pair in zip(first, second, strict=True))
    if isinstance(first, torch.Tensor):
        return (
            isinstance(second, torch.Tensor)
            and first.dtype == second.dtype
            and first.shape == second.shape
            and bool(((first == second) | (first.isnan() & second.isnan())).all())
        )
    return first == second


# -------------------------------------------------------------------------------------------------------------- claims


class _Claims:
    """The claims of one network, one after the other; violations are collected."""

    def __init__(self, model, oracle, own, x, description):
        self.model, self.oracle, self.own, self.x = model, oracle, own, x
        self.room = 1 + ROUND_OFF[torch.float32 if description.mixed else description.dtype]
        self.precision = torch.float32 if description.mixed else description.dtype
        self.exact_dtype = x.dtype if description.mixed else torch.float64
        self.generator = torch.Generator().manual_seed(description.seed)
        self.violations = []
        points = points_of(oracle, x.to(self.exact_dtype), self.generator)
        self.points = points[points.flatten(1).isfinite().all(1)]
        self.jacobian = jacobians(oracle, self.points)
        self.logits = logits_of(oracle, self.points)
        self.fisher = norms(root_fisher(self.logits, self.jacobian)).square()
        self.slopes = norms(centred(self.jacobian))

    def asked(self, what, function):
        """Return what a function of the library returns, None where it refuses; any other error is a violation."""
        try:
            return function()
        except fr.NoBoundError:
            return None
        except Exception as error:
            self.violations.append(f"{what} fails: {type(error).__name__}: {str(error)[:300]}")
            return None

    def exceeds(self, what, exact, bound):
        """Note where the exact value lies above a bound."""
        wrong = ~(exact <= bound * self.room + 1e-290)
        if bool(wrong.any()):
            ratio = float((exact / torch.as_tensor(bound))[wrong].nan_to_num(torch.inf).max())
            self.violations.append(f"{what}: {ratio:.4g} times the bound, at {int(wrong.sum())} of {len(exact)} points")

    def check_fisher(self, tightening):
        what = f"fisher_bound({_changed(tightening)})"
        bound = self.asked(what, lambda: fr.fisher_bound(self.model, self.x, tightening=tightening))
        if bound is not None:
            self.exceeds(what, self.fisher, torch.tensor(bound.value).double())
        return bound

    def check_lipschitz(self, tightening):
        what = f"lipschitz_bound({_changed(tightening)})"
        bound = self.asked(what, lambda: fr.lipschitz_bound(self.model, self.x, tightening=tightening))
        if bound is None:
            return None
        self.exceeds(what, self.slopes, torch.tensor(bound.value).double())
        # Secants see jumps, which a Jacobian does not.
        values = self.logits - self.logits.mean(1, keepdim=True)
        rises = torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist")
        flat = self.points.flatten(1).double()
        runs = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
        size = self.logits.abs().amax(1)
        rounding = JUMPS[self.precision] * (size[:, None] + size) + 1e-290
        self.exceeds(f"{what} along secants", (rises - rounding).flatten(), bound.value * runs.flatten())
        return bound

    def check_local(self):
        points = self.points.to(self.x.dtype)
        bound = self.asked("local_fisher_bound", lambda: fr.local_fisher_bound(self.model, points))
        if bound is not None:
            # In exact arithmetic: near a kink, or where the softmax is saturated, float32 is another function.
            exact = fisher_at(self.oracle, points.to(self.exact_dtype), torch.ones_like(self.x[0]).to(self.exact_dtype))
            self.exceeds("local_fisher_bound", exact, bound.value)
        return bound

    def check_radius(self):
        radius = self.asked("certified_radius", lambda: fr.certified_radius(self.model, self.x))
        if radius is None:
            return None
        x = self.x.to(self.exact_dtype)
        predicted = logits_of(self.own, self.x).argmax(1)
        size = (0.999 * radius.clamp_max(1e6)).view(-1, *[1] * (x.ndim - 1)).to(x)

        def away(point):
            """Directions in which each rival gains the most on the predicted class, ``(K, B, *S)``."""
            rows = jacobians(self.oracle, point)
            gains = rows - rows.gather(1, predicted[:, None, None].expand(-1, -1, rows.shape[2]))
            return torch.nn.functional.normalize(gains, dim=2, eps=1e-300).transpose(0, 1).unflatten(2, x.shape[1:])

        noise = torch.randn((4, *x.shape), generator=self.generator, dtype=torch.float64)
        lengths = noise.flatten(2).norm(dim=2).view(4, -1, *[1] * (x.ndim - 1))
        shifts = [away(x), noise / lengths]
        for _ in range(2):
            worst = self._margins(torch.cat(shifts), size, x, predicted).argmin(0)
            chosen = torch.cat(shifts)[worst, torch.arange(len(x))].to(x)
            shifts.append(away(x + size * chosen))
        margins = self._margins(torch.cat(shifts), size, x, predicted)
        if bool((margins < 0).any()):
            self.violations.append(
                f"certified_radius: another class within {radius.tolist()}, margin {margins.min():.3g}"
            )
        return radius

    def check_ball(self, radius):
        """What is claimed of all points within a radius: their Fisher norms, and the divergence to them."""
        bound = self.asked(
            "local_fisher_bound(radius)", lambda: fr.local_fisher_bound(self.model, self.x, radius=radius)
        )
        if bound is None:
            return None
        x, radii = self.x.to(self.exact_dtype), torch.full((len(self.x),), radius, dtype=torch.float64)
        points = points_within(self.oracle, x, radii, self.generator, count=3, steps=2)
        flat, ones = points.flatten(0, 1), torch.ones_like(x[0])
        self.exceeds(
            f"local_fisher_bound(radius={radius})", fisher_at(self.oracle, flat, ones), bound.value.repeat(len(points))
        )
        divergence = self.asked("certified_divergence", lambda: fr.certified_divergence(self.model, self.x, radius))
        if divergence is not None:
            log_p, log_q = logits_of(self.oracle, x).log_softmax(1), logits_of(self.oracle, flat).log_softmax(1)
            log_p = log_p.repeat(len(points), 1)
            rounding = JUMPS[self.precision] * (1 + log_p.abs().amax(1) + log_q.abs().amax(1))
            found = (log_p.exp() * (log_p - log_q)).sum(1) - rounding
            self.exceeds(f"certified_divergence({radius})", found, divergence.repeat(len(points)))
        return bound

    def check_domain(self):
        """What is claimed of all points of a box that holds the inputs."""
        low, high = self.x.amin(0) - 0.2, self.x.amax(0) + 0.1
        bound = self.asked(
            "fisher_bound(domain)", lambda: fr.fisher_bound(self.model, self.x, domain=fr.Box(low, high))
        )
        if bound is not None:
            low, high = low.to(self.exact_dtype), high.to(self.exact_dtype)
            points = points_in_box(self.oracle, low, high, self.generator, steps=2)
            exact = fisher_at(self.oracle, points, torch.ones_like(low))
            self.exceeds("fisher_bound(domain)", exact, torch.tensor(bound.value).double())
        return bound

    def _margins(self, shifts, size, x, predicted):
        """How far the predicted class is ahead at ``x + size * shift``, with room for rounding, ``(n, B)``."""
        moved = x + size * shifts.to(x)
        logits = logits_of(self.oracle, moved.flatten(0, 1)).unflatten(0, moved.shape[:2])
        own = logits.gather(2, predicted[None, :, None].expand(len(logits), -1, 1))
        rivals = logits.scatter(2, predicted[None, :, None].expand(len(logits), -1, 1), -torch.inf)
        return own[..., 0] - rivals.amax(2) + JUMPS[self.precision] * logits.abs().amax(2)


def _changed(tightening):
    """Say which settings are not the default ones."""
    default = fr.Tightening()
    changed = {key: value for key, value in vars(tightening).items() if value != getattr(default, key)}
    return ", ".join(f"{key}={value}" for key, value in changed.items())


def _frozen(model):
    return model.eval().requires_grad_(False)


def check(seed, build=random_network):
    """Check all claims about the network of a seed.

    Args:
        seed: What the network is made from.
        build: From the seed to the network, its inputs and its description, always the same.

    Returns:
        The :class:`Outcome`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of outputs that look like probabilities, and of deprecated ways of writing
        (model, x, description), (own, _, _), (oracle, _, _) = build(seed), build(seed), build(seed)
        own, oracle = _frozen(own), _frozen(oracle)
        claims = _Claims(model, oracle if description.mixed else oracle.double(), own, x, description)
        state, kept = state_of(model), x.clone()
        fisher = claims.check_fisher(fr.Tightening())
        radius, local = claims.check_radius(), claims.check_local()
        ball, domain = claims.check_ball(RADII[seed % len(RADII)]), claims.check_domain()
        bounds = [fisher]  # a gate has a radius and no bound over all inputs
        if fisher is not None:  # for time: a refusal is slow where torch.export is tried
            bounds.append(claims.check_lipschitz(TIGHTENINGS[seed % len(TIGHTENINGS)]))
        if len({item is None for item in bounds}) > 1 and not claims.violations:
            claims.violations.append("one of the global bounds is refused and another is not")
        if fisher is not None and (radius is None or ball is None or domain is None):
            claims.violations.append("there is a bound over all inputs, and none in a ball or a box")
        if not same_state(state, state_of(model)):
            claims.violations.append("the model was changed")
        if not torch.equal(x, kept):
            claims.violations.append("the inputs were changed")
    return Outcome(description, fisher is not None, local is not None, tuple(claims.violations))
