"""Estimators by others of the largest eigenvalue of the input-space Fisher matrix, one image at a time.

Each function maps a classifier in evaluation mode and images ``(B, C, H, W)`` to eigenvalues ``(B,)``.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Generator

import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def paper_white_box(model: nn.Module, images: Tensor, num_quotients: int = 100) -> Tensor:
    r"""The authors' default white-box value (arXiv 2606.04767), reimplemented from their published code.

    For each image ``K`` backward passes of :math:`\log p_k` give the ``K x K`` Gram matrix of
    :math:`\sqrt{p_k} \nabla \log p_k`.

    Returns:
        The largest of ``num_quotients`` Rayleigh quotients of that matrix at Gaussian vectors, per image.
    """
    return torch.stack([_paper_white_box(model, image[None], num_quotients) for image in images])


def _paper_white_box(model: nn.Module, image: Tensor, num_quotients: int) -> Tensor:
    image = image.detach().requires_grad_()
    log_probabilities = model(image).log_softmax(1)[0]
    scores = torch.stack(
        [torch.autograd.grad(value, image, retain_graph=True)[0].flatten() for value in log_probabilities]
    )
    rows = log_probabilities.detach().div(2).exp()[:, None] * scores
    gram = rows @ rows.T
    vectors = torch.randn(num_quotients, len(gram), device=image.device, dtype=image.dtype)
    result: Tensor = (((vectors @ gram) * vectors).sum(1) / vectors.square().sum(1)).max()
    return result


@torch.no_grad()
def paper_black_box(model: nn.Module, images: Tensor, num_directions: int = 100, step: float = 1e-3) -> Tensor:
    r"""The authors' black-box value: the largest :math:`v^\top F v` over random unit ``v``, by central differences."""
    values = []
    for image in images:
        probabilities = model(image[None]).softmax(1)[0]
        quotients = []
        for _ in range(num_directions):
            direction = torch.randn_like(image)
            direction = direction / direction.norm()
            ahead, behind = (model((image + sign * step * direction)[None]).log_softmax(1)[0] for sign in (1, -1))
            slopes = (ahead - behind) / (2 * step)
            quotients.append((probabilities * slopes.square()).sum())
        values.append(torch.stack(quotients).max())
    return torch.stack(values)


@contextlib.contextmanager
def _twice_differentiable(model: nn.Module) -> Generator[None, None, None]:
    """Restrict attention to kernels with forward mode and double backward, and exclude weights from the graph."""
    fast = torch.backends.mha.get_fastpath_enabled()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for parameter in weights:
            parameter.requires_grad_(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for parameter in weights:
            parameter.requires_grad_(True)


class _Shifted(nn.Module):
    """A classifier whose only parameter is a shift of its inputs: its Gauss-Newton matrix is F."""

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        super().__init__()
        self.model = model
        self.shift = nn.Parameter(torch.zeros_like(image))

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.model(images + self.shift)
        return result


def curvlinops_eigsh(model: nn.Module, images: Tensor, tol: float = 1e-2) -> Tensor:
    """curvlinops-for-pytorch: the Gauss-Newton operator of the cross-entropy for a shift of the input, with ARPACK."""
    from curvlinops import GGNLinearOperator

    label = torch.zeros(1, dtype=torch.long, device=images.device)
    values = []
    with _twice_differentiable(model):
        for image in images:
            shifted, loss = _Shifted(model, image), nn.CrossEntropyLoss(reduction="sum")
            data = [(image[None], label)]
            operator = GGNLinearOperator(shifted, loss, [shifted.shift], data, check_deterministic=False)
            values.append(float(eigsh(operator.to_scipy(), k=1, tol=tol, return_eigenvectors=False)[0]))
    return images.new_tensor(values)


class _Roots(nn.Module):
    """``2 √p``, whose Gauss-Newton matrix without weights is F."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = 2 * self.model(images).log_softmax(1).div(2).exp()
        return result


def plenoptic_power(model: nn.Module, images: Tensor, max_iter: int = 20, stop_criterion: float = 1e-3) -> Tensor:
    """Plenoptic's ``Eigendistortion`` by its default power method, which also computes the smallest eigenvalue."""
    return _plenoptic(model, images, method="power", max_iter=max_iter, stop_criterion=stop_criterion)


def plenoptic_randomized_svd(model: nn.Module, images: Tensor) -> Tensor:
    """Plenoptic's ``Eigendistortion`` by its randomised decomposition."""
    return _plenoptic(model, images, method="randomized_svd")


def _plenoptic(model: nn.Module, images: Tensor, **options: object) -> Tensor:
    from plenoptic import Eigendistortion

    quiet = io.StringIO()
    values = []
    with (
        _twice_differentiable(model),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(quiet),
        contextlib.redirect_stderr(quiet),
    ):
        warnings.simplefilter("ignore")
        for image in images:
            distortion = Eigendistortion(image[None], _Roots(model).eval())
            distortion.synthesize(**options)
            values.append(distortion.eigenvalues.flatten()[0])
    return torch.stack(values)
