"""Slow, obvious and independent: what the library must agree with. Nothing here imports it."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def fisher_by_scores(model, x):
    """The definition, one example and one label at a time: F = sum_y p_y g g^T with g = grad log p(y|x). (B, d, d)."""
    matrices = []
    for example in x:
        point = example[None].clone().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            log_p = model(point).log_softmax(1)[0]
        matrix = 0
        for label in range(len(log_p)):
            (score,) = torch.autograd.grad(log_p[label], point, retain_graph=True)
            score = score.flatten()
            matrix = matrix + log_p[label].exp().detach() * torch.outer(score, score)
        matrices.append(matrix)
    return torch.stack(matrices)


def root_jacobian(model, x):
    """F = J_g^T J_g with g = 2 sqrt(p): any Jacobian tool gives it. (B, K, d)."""

    def g(example):
        return 2 * (0.5 * model(example[None]).log_softmax(1)).exp()[0]

    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.vmap(torch.func.jacrev(g))(x).flatten(2)


def top_eigenvalue(matrices):
    return torch.linalg.eigvalsh(matrices)[:, -1]


def dense_jacobian(function, shape, dtype=torch.float64):
    """The matrix of a function at a random point."""
    x = torch.randn(shape, dtype=dtype)
    return torch.autograd.functional.jacobian(function, x).reshape(-1, x.numel())


class MatrixOperator:
    """A batch of explicit matrices A (B, K, d), for testing solvers without a network."""

    def __init__(self, matrix, start=None, noise=0.0, counter=None):
        self.matrix = matrix
        self.start = matrix.new_ones(matrix.shape[:2]) if start is None else start
        self.noise = noise
        self.counter = [] if counter is None else counter

    @property
    def count(self):
        return len(self.counter)

    def starts(self, count):
        units = torch.eye(self.start.shape[1], dtype=self.start.dtype).expand(len(self.start), -1, -1)
        return torch.cat([self.start[:, None], units], 1)[:, : min(count, self.start.shape[1])]

    def slope_along(self, u, row):
        return row.norm(dim=1)

    def apply(self, v, exact=False, slope=None):
        self.counter.append(len(v))
        image = (self.matrix @ v[:, :, None]).squeeze(2)
        return (
            image
            if exact or slope is None
            else image + self.noise * image.norm(dim=1, keepdim=True) * torch.randn_like(image)
        )

    def adjoint(self, u):
        self.counter.append(len(u))
        return (self.matrix.mT @ u[:, :, None]).squeeze(2)

    def restrict(self, keep):
        return MatrixOperator(self.matrix[keep], self.start[keep], self.noise, self.counter)


def with_singular_values(values, num_rows, num_columns, batch=3):
    """Random matrices (B, K, d) with the given singular values."""
    rank = len(values)
    left = torch.linalg.qr(torch.randn(batch, num_rows, rank, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(batch, num_columns, rank, dtype=torch.float64)).Q
    return left @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ right.mT
