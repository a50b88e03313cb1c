r"""Certified spectral norms of matrices, differentiable.

A power or Lanczos iteration returns a lower bound of the largest eigenvalue. A Cholesky factorisation certifies an
upper bound: if it succeeds for :math:`c I - G`, no eigenvalue of G is larger than c.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_NUMBERS = 2**22
"""Largest number of complex entries of a stack (64 MiB, several such stacks); larger ones exceed the CPU caches."""
_MAX_EIGVALSH = 256
"""Up to this size the eigenvalues of one matrix cost less than an estimate with its certificate."""


class Peak(NamedTuple):
    """An estimate of the largest eigenvalue in a stack of matrices, and the index of its matrix (-1: in none)."""

    eigenvalue: float
    place: int = -1


def linear_norm(matrix: Tensor) -> Tensor:
    """Return the spectral norm of a matrix ``(m, n)``, as :func:`largest_norm` does, at most 1e-6 too large."""
    return largest_norm(matrix[None], rtol=1e-6)


def largest_norm(matrices: Tensor, *, rtol: float = 1e-3) -> Tensor:
    r"""Return the largest spectral norm of a stack of matrices, never below the true one beyond round-off.

    Cost: one Gram matrix per matrix on the shorter side, and one Cholesky factorisation of each candidate.

    Args:
        matrices: ``(M, m, n)``, real or complex.
        rtol: The largest relative excess.

    Returns:
        ``()`` in float64. Its gradient is that of the singular value at the largest matrix; zero where the norm is
        zero. NaN entries give NaN.

    Example:
        >>> float(largest_norm(torch.tensor([[[3.0, 0.0], [4.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])))
        5.0
    """
    matrices = matrices.to(torch.promote_types(matrices.dtype, torch.float64))
    if matrices.shape[1] > matrices.shape[2]:
        matrices = matrices.mH
    scale = largest_entry(matrices)
    if is_settled(scale):
        return scale + vanishing(matrices)
    detached = matrices.detach() / scale
    if len(detached) == 1 and detached.shape[1] <= _MAX_EIGVALSH:
        peak, excess = Peak(float(torch.linalg.eigvalsh(detached @ detached.mH).max()), 0), 0.0
    else:
        peak, excess, offset = Peak(0.0), rtol, 0
        for chunk in detached.split(max(1, MAX_NUMBERS // (detached.shape[1] * detached.shape[2]))):
            gram = chunk @ chunk.mH
            found = climb(gram, Peak(peak.eigenvalue), 2 * rtol, roundoff(chunk.shape[1], chunk.shape[2]))
            peak = peak if found.place < 0 else Peak(found.eigenvalue, found.place + offset)
            offset += len(chunk)
    # ||X|| <= scale sqrt((1 + 2 rtol) lambda)
    value: Tensor = scale * (peak.eigenvalue * (1 + 2 * excess)) ** 0.5
    if peak.place < 0 or not carries_gradient(matrices):
        return torch.as_tensor(value)
    return with_gradient(value, matrices[peak.place] / scale)


def climb(gram: Tensor, peak: Peak, rtol: float, slack: float) -> Peak:
    """Return a peak such that no eigenvalue of the stack is larger than ``(1 + rtol)`` times its eigenvalue.

    Args:
        gram: Hermitian positive semidefinite matrices ``(M, n, n)``.
        peak: The initial estimate. It is returned if it is large enough.
        rtol: Larger than the slack.
        slack: As in :func:`may_exceed`.

    Returns:
        ``(1 + rtol) * eigenvalue`` is at least every eigenvalue; the index is that of the largest estimate.
    """
    where, steps = torch.arange(len(gram), device=gram.device), 16
    while True:
        high = may_exceed(gram, (1 + rtol) * peak.eigenvalue, slack)
        if not high.any():
            return peak
        gram, where = gram[high], where[high]
        estimates = lower_estimates(gram, steps)
        top = int(estimates.argmax())
        # none of these matrices was certified below (1 + rtol) times the last peak: raise it at least to that level
        peak = Peak(max(float(estimates[top]), (1 + rtol) * peak.eigenvalue), int(where[top]))
        steps *= 2  # from n steps on the estimate is exact


def may_exceed(gram: Tensor, level: float, slack: float) -> Tensor:
    r"""Return for each matrix whether its largest eigenvalue may exceed a level.

    False is proven: either the Frobenius norm is at most the level, or :math:`c I - G` has a Cholesky factorisation. In
    floating point the latter proves that :math:`c I - G + E` is positive semidefinite with :math:`\|E\|` at most
    ``slack`` times c. Therefore :math:`c = (1 - \text{slack})\, \text{level}`.

    Reference: S. M. Rump (2006), "Verification of positive definiteness", BIT Numerical Mathematics 46, 433-452.

    Args:
        gram: Hermitian positive semidefinite matrices ``(M, n, n)``.
        level: The level.
        slack: The relative error of the factorisation and of the Gram matrices, from :func:`roundoff`.

    Returns:
        Booleans ``(M,)``.
    """
    level *= 1 - slack  # c
    numbers = torch.view_as_real(gram) if gram.is_complex() else gram  # the norm of complex numbers is slow
    high: Tensor = torch.linalg.vector_norm(numbers.flatten(1), dim=1) > level
    if level <= 0 or not high.any():
        return high
    # c I - G
    shifted = -gram if high.all() else -gram[high]
    shifted.diagonal(dim1=1, dim2=2).add_(level)
    high[high.clone()] = torch.linalg.cholesky_ex(shifted).info > 0
    return high


def roundoff(size: int, terms: int) -> float:
    r"""Return a bound of the relative error of Gram matrices of ``size`` rows and of their Cholesky factors.

    The error of a sum of T products is at most T u times the sum of their moduli, with the unit round-off u. Over the
    entries of :math:`X X^*` these sums add up to :math:`\|X\|_F^2 \le n \|X\|_2^2`, and in the same way for
    :math:`L L^*`. The factor 8 covers complex arithmetic.
    """
    return 8 * torch.finfo(torch.float64).eps * size * (size + terms)


def lower_estimates(gram: Tensor, steps: int) -> Tensor:
    """Return lower bounds ``(M,)`` of the largest eigenvalues of ``(M, n, n)``, by Lanczos; exact from n steps on.

    Vectors are not reorthogonalised: loss of orthogonality repeats Ritz values, but raises none above the spectrum.
    """
    if steps >= gram.shape[-1]:
        exact: Tensor = torch.linalg.eigvalsh(gram)
        return exact[:, -1]
    vector = _start(gram).expand(len(gram), -1, -1)
    previous, beta = torch.zeros_like(vector), vector.new_zeros(len(gram), 1, 1).real
    diagonal, off_diagonal = [], []
    for _ in range(steps):
        image = gram @ vector  # G v_j
        alpha = (vector.conj() * image).sum(1, keepdim=True).real  # alpha_j = v_j^* G v_j
        image = image - alpha * vector - beta * previous
        # beta_j = ||G v_j - alpha_j v_j - beta_{j-1} v_{j-1}||
        beta = torch.linalg.vector_norm(image, dim=1, keepdim=True)
        previous, vector = vector, image / beta.clamp_min(torch.finfo(beta.dtype).tiny)
        diagonal.append(alpha.flatten())
        off_diagonal.append(beta.flatten())
    upper = torch.diag_embed(torch.stack(off_diagonal[:-1], 1), 1)
    ritz: Tensor = torch.linalg.eigvalsh(torch.diag_embed(torch.stack(diagonal, 1)) + upper + upper.mT)
    return ritz[:, -1]


def with_gradient(value: Tensor, matrix: Tensor) -> Tensor:
    r"""Return the value, with the relative gradient of the matrix's spectral norm.

    With the leading singular vectors u and v, :math:`\mathrm{d}\|X\|_2 = \mathrm{Re}\, u^* \mathrm{d}X\, v`. They are
    computed by inverse iteration with a shift slightly above the largest eigenvalue of the Gram matrix.
    """
    with torch.no_grad():
        gram = (matrix @ matrix.mH)[None]
        peak = climb(gram, Peak(0.0), 1e-6, roundoff(*matrix.shape))
        gram.neg_().diagonal(dim1=1, dim2=2).add_((1 + 1e-5) * peak.eigenvalue)
        factor = torch.linalg.cholesky(gram)
        left = _start(gram)
        for _ in range(6):
            left = torch.nn.functional.normalize(torch.cholesky_solve(left, factor), dim=1)
        right = torch.nn.functional.normalize(matrix.mH @ left[0], dim=0)
    # Re u^* X v
    norm = (left[0].conj() * (matrix @ right)).sum().real
    return value * (norm / norm.detach())


def largest_entry(weight: Tensor) -> Tensor:
    """Return the largest modulus, by which the weight is divided to avoid overflow; NaN if an entry is NaN."""
    return weight.detach().abs().amax() if weight.numel() else weight.new_zeros((), dtype=torch.float64)


def is_settled(scale: Tensor) -> bool:
    """Return whether the largest modulus is zero, infinite or NaN, so that it is the norm itself."""
    return not 0 < float(scale) < float("inf")


def carries_gradient(weight: Tensor) -> bool:
    """Return whether the norm must carry a gradient with respect to the weight."""
    return torch.is_grad_enabled() and weight.requires_grad


def vanishing(weight: Tensor) -> Tensor:
    """Return a zero with a gradient of zero."""
    return 0.0 * weight.real.nan_to_num(0, 0, 0).sum() if carries_gradient(weight) else weight.real.new_zeros(())


def _start(gram: Tensor) -> Tensor:
    """Return a random unit vector ``(1, n, 1)``, always the same one."""
    numbers = torch.randn(gram.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.nn.functional.normalize(numbers, dim=0).to(gram)[None, :, None]
