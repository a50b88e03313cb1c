"""Cases of functions of two values, of orders, copies, vectors and gates, which the tests of functions check.

Each is a function of the module, whose weights are constants, and of ``x`` of shape ``(1, 4, 3)``.
"""

import operator

import torch
import torch.nn.functional as F  # noqa: N812

PRODUCTS = {  # a constant over all inputs only where a normalisation bounds the factors
    "matrices": lambda m, x: x @ x.transpose(1, 2),
    "stacks of matrices": lambda m, x: torch.bmm(x, x.transpose(1, 2)) - torch.matmul(x.relu(), x.mT),
    "matrices by method": lambda m, x: x.matmul(x.mT) + x.bmm(x.mT) + torch.mm(x[0], x[0].t())[None],
    "matrices of a batch": lambda m, x: x[0].mm(x[0].T)[None] + operator.matmul(x, x.mT),
    "a sum and a product": lambda m, x: torch.baddbmm(x, x[:, :, :3], m.loud[None, :3], beta=0.5, alpha=2.0),
    "a sum and a product of two": lambda m, x: x.baddbmm(x[:, :, :3], x[:, :3], alpha=0.5),
    "a shifted product": lambda m, x: torch.addmm(x[0], x[0], m.loud[:3])[None] + x[0].addmm(x[0], x[0, :3])[None],
    "stacks that are broadcast": lambda m, x: x[:, None] @ (x.mT[:, None] * m.channel[:2, None, None]),
    "attention by hand": lambda m, x: (x @ x.mT * 0.5).softmax(-1) @ x,
    "einsum": lambda m, x: torch.einsum("bik,bjk->bij", x, x.sin()),
    "einsum with an ellipsis": lambda m, x: torch.einsum("...ik,...jk->...ij", x[:, None], x[:, None]),
    "einsum over heads": lambda m, x: torch.einsum("bhid,bjd->bhij", x[:, None] * m.gamma[:, None, None], x),
    "einsum with a constant": lambda m, x: torch.einsum("bik,ok->boi", [x, m.w]),
    "a quotient": lambda m, x: x / (x.square().sum(1, keepdim=True) + 0.5),
    "a constant over a value": lambda m, x: m.gamma / (1.0 + x.abs()) + 1 / (x.square() + 0.1),
    "gates": lambda m, x: x * x.mean(2, keepdim=True).sigmoid(),
    "gated linear units": lambda m, x: F.glu(x, 1),
    "gated linear units by torch": lambda m, x: F.glu(torch.cat([x, x.flip(1)], 2), 2),
    "squares": lambda m, x: x.square() + torch.square(x) + x**2 - x.pow(3) + torch.pow(x, 2),
    "roots": lambda m, x: torch.sqrt(x.square() + 0.1) + (x.exp() + 0.1).sqrt() + (x.abs() + 0.1).rsqrt(),
    "powers": lambda m, x: (x.abs() + 0.1) ** 1.5 + (x.abs() + 0.2).pow(-0.5) + torch.rsqrt(x.square() + 1),
    "exponentials": lambda m, x: torch.exp(x) + torch.expm1(x) + x.expm1() + operator.pow(x, 4),
    "logarithms": lambda m, x: (
        torch.log(x.abs() + 0.1) + x.square().log1p() + (x.abs() + 1).log() + torch.log1p(x.exp())
    ),
    "reciprocals": lambda m, x: torch.reciprocal(x.abs() + 0.5) + (x.square() + 1).reciprocal(),
    "variances": lambda m, x: torch.var(x, 2) + x.var(2, unbiased=False) + torch.var_mean(x, 2)[0],
    "layer norm by hand": lambda m, x: (
        (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True, unbiased=False) + 0.1).sqrt()
    ),
    "response norm by hand": lambda m, x: (
        x * (x.norm(dim=1, keepdim=True) / (x.norm(dim=1, keepdim=True).mean(2, keepdim=True) + 0.1))
    ),
    "products of normalised values": lambda m, x: _hand_attention(m, x),
}

BOUNDED = {
    "waves": lambda m, x: (
        torch.sin(x) + x.cos() + x.sin() + torch.cos(x) + torch.erf(x) + x.erf() + x.atan() + torch.atan(x)
    ),
    "absolute": lambda m, x: operator.abs(x) + torch.abs(x) + x.abs(),
    "clamps": lambda m, x: torch.clamp(x, -0.5, 0.3) + x.clamp(min=0.1) + torch.clip(x, max=0.2) + x.clip(-0.1, 0.1),
    "clamps of one side": lambda m, x: (
        torch.clamp_min(x, 0.1) + x.clamp_min(0.2) + torch.clamp_max(x, 0) - x.clamp_max(1)
    ),
    "larger and smaller": lambda m, x: torch.maximum(x, x.flip(1)) + torch.minimum(x, 2 * x) + x.maximum(m.loud),
    "smaller by method": lambda m, x: (
        x.minimum(m.gamma) + torch.fmax(x, -x) + torch.fmin(x, x.flip(2)) + x.fmax(-x) + x.fmin(2 * x)
    ),
    "largest": lambda m, x: torch.max(x, 1)[0] + x.max(1).values + x.min(dim=1)[0] + torch.min(x, 1).values,
    "largest of two": lambda m, x: torch.max(x, x.flip(2)) - x.min(m.loud),
    "median": lambda m, x: torch.median(x, 1)[0] + x.median(1).values + torch.nanmedian(x, 1)[0] + x.nanmedian(1)[0],
    "sorted": lambda m, x: (
        torch.sort(x, 1)[0] + x.sort(1, descending=True).values + torch.msort(x[0])[None] + x[0].msort()
    ),
    "largest k": lambda m, x: torch.topk(x, 2, 1)[0] + x.topk(2, 1).values + x.kthvalue(2, 1, keepdim=True)[0],
    "k-th": lambda m, x: torch.kthvalue(x, 2, 1)[0] + torch.cummax(x, 1)[0][:, 0] + x.cummax(1)[0][:, 1],
    "running smallest": lambda m, x: torch.cummin(x, 1)[0] + x.cummin(1)[0],
    "norms": lambda m, x: torch.norm(x, dim=1) + x.norm(p=2, dim=1) + torch.linalg.norm(x, dim=1) + x.norm(1, dim=1),
    "vector norms": lambda m, x: torch.linalg.vector_norm(x, 3, dim=1) + torch.linalg.vector_norm(x, torch.inf, dim=1),
    "directions": lambda m, x: F.normalize(x, dim=1, eps=0.1) + F.normalize(x, dim=-1, eps=0.2),
    "deviations": lambda m, x: torch.std(x, 2) + x.std(2, unbiased=False) + torch.std_mean(x, 2)[1],
    "soft maxima": lambda m, x: torch.logsumexp(x, 1) + x.logsumexp(1),
    "logarithms of softmaxes": lambda m, x: torch.log_softmax(x, 1) + F.log_softmax(x, 2) + x.log_softmax(1),
    "softmin": lambda m, x: F.softmin(x, 1) + x.softmax(-1),
    "copies": lambda m, x: (
        torch.tile(x, (1, 2, 1)) + x.tile(1, 2, 1) + x.repeat_interleave(2, 1) + torch.repeat_interleave(x, 2, 1)
    ),
    "chosen": lambda m, x: (
        x[:, [0, 0, 3]]
        + x[:, torch.tensor([1, 2, 2])]
        + torch.index_select(x, 1, torch.tensor([1, 1, 1]))
        + x.index_select(1, torch.tensor([0, 1, 3]))
    ),
    "gathered": lambda m, x: (
        torch.gather(x, 1, _INDEX)
        + x.gather(1, _INDEX)
        + torch.take_along_dim(x, _INDEX, 1)
        + x.take_along_dim(_INDEX, 1)
    ),
    "taken": lambda m, x: torch.take(x, torch.tensor([[0, 0, 7]])) + x.take(torch.tensor([[3, 3, 3]])),
    "masked": lambda m, x: x.masked_select(torch.tensor([True, False, True]))[None],
    "windows": lambda m, x: F.unfold(x[:, None], 2) + x.unfold(1, 2, 1).unfold(2, 2, 1).reshape(1, 6, 4).mT,
    "folded windows": lambda m, x: F.fold(x.flatten(1)[:, :8, None].expand(-1, -1, 4), (3, 3), 2),
    "turned": lambda m, x: (
        torch.rot90(x, 1, (1, 2)).rot90(1, (1, 2)) + torch.fliplr(x).flipud() + x.fliplr() + torch.flipud(x)
    ),
    "triangles": lambda m, x: torch.triu(x) + x.triu(1) + torch.tril(x) - x.tril(),
    "diagonals": lambda m, x: (
        torch.diagonal(x, dim1=1, dim2=2)
        + x.diagonal(0, 1, 2)
        + torch.diag_embed(x[:, 0])[:, 1]
        + x[:, 0].diag_embed()[:, 2]
    ),
    "moved axes": lambda m, x: torch.movedim(x, 1, 2).movedim(1, 2) + torch.moveaxis(x, 1, 2).moveaxis(1, 2),
    "swapped axes": lambda m, x: torch.swapdims(x, 1, 2).swapdims(1, 2) + torch.adjoint(x.adjoint()) + x.mT.mT,
    "flat": lambda m, x: torch.ravel(x)[None] + x.ravel()[None] + torch.t(x.flatten(1)).t(),
    "parts": lambda m, x: torch.tensor_split(x, 2, 1)[0] + x.tensor_split((1, 3), 1)[1],
    "shuffled": lambda m, x: F.channel_shuffle(x[..., None], 2)[..., 0] + x,
    "expanded": lambda m, x: (
        torch.broadcast_to(x[:, :1], (1, 4, 3))
        + x[:, :1].broadcast_to((1, 4, 3))
        + torch.unflatten(x, 1, (2, 2)).flatten(1, 2)
    ),
    "running sums": lambda m, x: torch.cumsum(x, 1) + x.cumsum(1),
    "differences": lambda m, x: torch.diff(x, dim=1) + x.diff(1, 1),
    "padded by copies": lambda m, x: (
        F.pad(x, (2, 1), mode="circular")[..., :5]
        + F.pad(x, (1, 1), mode="reflect")
        + F.pad(x, (1, 1), mode="replicate")
    ),
    "bicubic": lambda m, x: F.interpolate(x[:, None], scale_factor=1.7, mode="bicubic"),
    "bicubic by size": lambda m, x: F.interpolate(x[:, None], size=(7, 2), mode="bicubic", antialias=True),
    "bilinear and smoothed": lambda m, x: F.interpolate(x[:, None], size=(2, 2), mode="bilinear", antialias=True),
    "pooled lines": lambda m, x: F.avg_pool1d(x, 2, 1) + F.max_pool1d(x, 2, 1) + torch.max_pool1d(x, 2, 1),
    "pooled volumes": lambda m, x: (
        F.avg_pool3d(x[:, None, None], (1, 2, 2), 1)
        + F.max_pool3d(x[:, None, None], (1, 2, 2), 1)
        + torch.max_pool3d(x[:, None, None], (1, 2, 2), 1)
    ),
    "adapted pools": lambda m, x: F.adaptive_avg_pool3d(x[:, None, None], (1, 2, 2)),
    "transposed convolutions": lambda m, x: F.conv_transpose1d(x, m.conv[:4, :3], stride=2),
    "transposed convolutions of planes": lambda m, x: F.conv_transpose2d(
        x[..., None], m.conv[:4, :3, :, None], padding=(1, 0)
    ),
    "transposed convolutions of volumes": lambda m, x: F.conv_transpose3d(
        x[..., None, None], m.conv[:4, :3, :, None, None]
    ),
    "instance norm": lambda m, x: F.instance_norm(x, weight=m.channel, eps=0.1),
    "root mean square norm": lambda m, x: F.rms_norm(x, (3,), m.gamma, 0.1) + torch.rms_norm(x, (3,), m.gamma, 0.2),
    "leaky in the mean": lambda m, x: F.rrelu(x, training=False) + F.softshrink(x, 0.1),
    "local response norm": lambda m, x: F.local_response_norm(x, 3, alpha=2.0, beta=0.75, k=1.5),
    "pools of powers": lambda m, x: F.lp_pool1d(x + 3, 2, 2, 1) - 2 * F.lp_pool2d(x[:, None] + 3, 2.0, (1, 2), 1)[:, 0],
    "not dropped": lambda m, x: (
        F.alpha_dropout(x, 0.5, m.training)
        + F.feature_alpha_dropout(x, 0.5, m.training)
        + torch.alpha_dropout(x, 0.5, False)
    ),
    "normalised vectors multiplied": lambda m, x: (
        F.layer_norm(x, (3,), eps=0.1) @ F.layer_norm(x, (3,), m.gamma, eps=0.1).mT
    ),
    "normalised gate": lambda m, x: F.layer_norm(x, (3,), m.gamma, m.gamma, eps=0.1) * x.sigmoid(),
}

_INDEX = torch.tensor([[[0, 1, 2], [3, 3, 0], [1, 1, 1], [2, 0, 3]]])

ONLY_TRACED_EVERYWHERE = {"leaky in the mean", "local response norm", "pools of powers"}
"""Of ``BOUNDED``, what torch.export takes apart into parts without a constant over all inputs."""

ONLY_TRACED = {  # torch.export takes these apart, or returns more than the value
    "adapted maxima": lambda m, x: (
        F.adaptive_max_pool1d(x, 2) + F.adaptive_max_pool3d(x[:, None, None], (1, 4, 2))[:, 0, 0]
    ),
}

NEVER_TRACED = {operator.pow}


def _hand_attention(m, x):
    h = F.layer_norm(x, (3,), m.gamma, m.gamma, 0.1)
    query, key, value = (F.linear(h, m.w[i : i + 3]) for i in range(3))
    return ((query @ key.transpose(-2, -1)) * 0.5).softmax(-1) @ value
