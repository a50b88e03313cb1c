"""Dense linear algebra on small batches: orthonormal vectors, Gram matrices and their eigenvalues."""

from __future__ import annotations

import torch
from torch import Tensor

from fisher_reg.errors import NonFiniteJacobianError
from fisher_reg.solvers.protocols import FactoredOperator


def unit(vector: Tensor) -> Tensor:
    """Scale ``(..., n)`` to unit length; zero stays zero."""
    # Divide by the largest entry first: the squares of the gradients of a saturated network underflow.
    tiny = torch.finfo(vector.dtype).tiny
    scaled = vector / vector.abs().amax(-1, keepdim=True).clamp_min(tiny)
    length: Tensor = scaled.norm(dim=-1, keepdim=True)
    return scaled / length.clamp_min(tiny)


def outside(vector: Tensor, basis: Tensor) -> Tensor:
    """Return the component of ``vector`` ``(B, n)`` orthogonal to the orthonormal rows of ``basis`` ``(B, m, n)``."""
    for _ in range(2):  # x - W^T W x; twice is enough (Giraud, Langou, Rozloznik 2005)
        vector = vector - ((basis @ vector[:, :, None]).mT @ basis).squeeze(1)
    return vector


def new_direction(vector: Tensor, basis: Tensor) -> Tensor:
    """Return the unit component of ``vector`` ``(B, n)`` outside ``basis``; zero where only round-off is left."""
    rest = outside(unit(vector), basis)
    is_exhausted = rest.norm(dim=1, keepdim=True) <= 100 * torch.finfo(vector.dtype).eps
    return torch.where(is_exhausted, 0.0, unit(rest))


def inner_products(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left rightᵀ`` ``(B, m, n)`` in double precision, of ``(B, m, d)`` and ``(B, n, d)``.

    Raises:
        NonFiniteJacobianError: If a number of ``right`` is not finite.
    """
    check_finite(right)
    return products(left, right)


def products(left: Tensor, right: Tensor) -> Tensor:
    """Return :func:`inner_products` without the check. Only a part of the vectors is converted at a time."""
    total = left.new_zeros(len(left), left.shape[1], right.shape[1], dtype=torch.float64)
    for some, others in zip(left.split(_CHUNK, 2), right.split(_CHUNK, 2), strict=True):
        total += some.double() @ others.double().mT
    return total


def symmetric_eigen(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(B, m)``, ascending, and eigenvectors ``(B, m, m)`` of symmetric matrices, in double precision.

    Small matrices are decomposed on the CPU, at the cost of one synchronisation: an accelerator launches many kernels
    for each matrix, reads an error code, and may be slow in double precision.

    Returns:
        Both. If the algorithm does not converge for a matrix, only the results of that matrix are NaN.
    """
    if matrices.device.type != "cpu" and matrices.shape[1] <= _SMALL:
        values, vectors = symmetric_eigen(matrices.cpu())
        return values.to(matrices.device), vectors.to(matrices.device)
    scale = matrices.diagonal(dim1=1, dim2=2).abs().amax(1).clamp_min(torch.finfo(torch.float64).tiny)
    wide = matrices.double() / scale[:, None, None]
    try:
        values, vectors = torch.linalg.eigh(wide)
    except _NOT_CONVERGED:
        pairs = [_one_eigen(matrix) for matrix in wide]
        values, vectors = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    return values * scale[:, None], vectors


def beyond_rank(values: Tensor, rounding: Tensor, num_outputs: int) -> Tensor:
    """Return which eigenvalues ``(B, k)``, descending, are only rounding errors of norm ``rounding`` ``(B,)``.

    Returns:
        ``(B, k)``, boolean; false for the first eigenvalue, unless it is zero.
    """
    # eta^2 of the products with A, and eps theta_1 of the eigenvalues of the Gram matrix in double precision
    noise = rounding.square() + torch.finfo(torch.float64).eps * values[:, 0]
    is_noise = values <= num_outputs * noise[:, None]
    is_noise[:, 0] = values[:, 0] == 0
    return is_noise


def dense_rows(operator: FactoredOperator) -> Tensor:
    """Form ``A`` ``(B, K, d)`` by ``K`` VJPs: its rows are ``Aᵀ e_k``."""
    like = operator.starts(1)[:, 0]
    identity = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
    return torch.stack([operator.adjoint(row.expand_as(like)) for row in identity], 1)


def cat_padded(tensors: list[Tensor], value: float) -> Tensor:
    """Concatenate tensors ``(B, m, ...)`` along ``B``; where ``m`` differs, they are padded with ``value``."""
    width = max(tensor.shape[1] for tensor in tensors)
    whole = []
    for tensor in tensors:
        missing = tensor.new_full((len(tensor), width - tensor.shape[1], *tensor.shape[2:]), value)
        whole.append(torch.cat([tensor, missing], 1))
    return torch.cat(whole)


def check_finite(values: Tensor) -> None:
    """Raise an error for NaN and infinite products ``(B, ...)`` of an operator.

    Raises:
        NonFiniteJacobianError: With the number of examples.
    """
    broken = ~torch.isfinite(values).flatten(1).all(1)
    if bool(broken.any()):
        raise NonFiniteJacobianError(
            f"The logits of {int(broken.sum())} of {len(values)} examples are finite, but their derivatives with "
            "respect to the inputs are not. Look for a norm, root or division at zero, or for overflowing weights."
        )


def check_positive(value: object, **counts: int) -> None:
    """Raise an error for counts below one.

    Raises:
        ValueError: With the name of the class and of the argument.
    """
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{type(value).__name__} needs {name} >= 1; got {count}.")


def _one_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    try:
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors
    except _NOT_CONVERGED:
        return torch.full_like(matrix[0], torch.nan), torch.full_like(matrix, torch.nan)


_NOT_CONVERGED: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
_CHUNK = 2**14
_SMALL = 64
