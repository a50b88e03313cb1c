"""Small random networks from a seed: every layer that has a bound rule, written in plain and in awkward ways."""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.utils import parametrizations, prune

import fisher_reg as fr

MAX_SIZE = 144
"""Numbers per example in a hidden value, so that dense Jacobians stay cheap."""


@dataclass(frozen=True)
class Description:
    """What a network is made of.

    Attributes:
        seed: What it was made from.
        parts: One label per step. ``!`` marks an awkward way of writing.
        dtype: That of the inputs.
        mixed: Whether parts of the network have another dtype, so that it is not the same function after ``.double()``.
    """

    seed: int
    parts: tuple[str, ...]
    dtype: torch.dtype
    mixed: bool

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.dtype}: " + " > ".join(self.parts)

    @property
    def awkward(self) -> tuple[str, ...]:
        """The awkward ways of writing, by name."""
        words = " ".join(self.parts).replace("(", " ").replace(")", " ").replace(",", " ").split()
        return tuple(dict.fromkeys(word for word in words if word.startswith("!")))


class Step(nn.Module):
    """A forward that is given as a function of the module and its input."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


class Network(nn.Module):
    """Steps in a row."""

    def __init__(self, steps):
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


class Checked(Network):
    """The check of the type that many forwards begin with."""

    def forward(self, x):
        if not isinstance(x, torch.Tensor):
            raise TypeError("a tensor is needed")
        return super().forward(x)


class Unpacking(Network):
    """A forward that takes a batch as a tensor or in another form, which is scaled differently."""

    def forward(self, x):
        return super().forward(x) if isinstance(x, torch.Tensor) else super().forward(x * 0.01)


# ------------------------------------------------------------------------------------------------------------- weights


def _filled(rng, module):
    """Give the layer random weights, biases and running statistics, of a random size."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn_like(parameter))
            if parameter.ndim > 1:
                parameter.mul_(rng.choice([0.3, 1.0, 1.0, 2.0]) / parameter[0].numel() ** 0.5)
            elif name.endswith("bias"):
                parameter.mul_(0.5)
            if parameter.ndim > 1 and rng.random() < 0.1:
                rows = 10 ** (4 * torch.rand(len(parameter)) - 2)
                parameter.mul_(rows.view(-1, *[1] * (parameter.ndim - 1)))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn_like(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand_like(buffer) * 2 + 0.05)
    return module


REPARAMETRISATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old_weight_norm": nn.utils.weight_norm,
    "old_spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.4),
    "pruned_rows": lambda layer: prune.ln_structured(layer, "weight", 0.3, 2, 0),
}


def _reparametrised(rng, layer, share=0.15):
    """Return the layer's label and the layer, perhaps with its weight computed from other parameters."""
    label = type(layer).__name__
    _filled(rng, layer)
    if rng.random() >= share:
        return label, layer
    kind = rng.choice(list(REPARAMETRISATIONS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are deprecated, and still in use
        REPARAMETRISATIONS[kind](layer)
    return f"{label} with !{kind}", layer


def _linear(rng, inputs, outputs, share=0.15):
    return _reparametrised(rng, nn.Linear(inputs, outputs, bias=rng.random() < 0.8), share)


def _plain(rng, x, outputs=None):
    """Return a linear layer that keeps the kind of value, and whose output autograd does not need again."""
    if x.ndim == 2 or x.kind == "tokens":
        return _filled(rng, nn.Linear(x.shape[-1], outputs or x.shape[-1]))
    conv = nn.Conv1d if x.ndim == 3 else nn.Conv2d
    return _filled(rng, conv(x.shape[1], outputs or x.shape[1], 3, padding=1))


class Value:
    """A value at an example: its kind and its shape."""

    def __init__(self, tensor, kind):
        self.tensor, self.kind = tensor, kind
        self.shape, self.ndim = tensor.shape, tensor.ndim

    @property
    def width(self):
        """How many channels there are."""
        return self.shape[-1] if self.kind == "tokens" else self.shape[1]

    @property
    def axis(self):
        """The axis of the channels."""
        return -1 if self.kind == "tokens" else 1


# --------------------------------------------------------------------------------------------------------- activations

ACTIVATIONS = [
    lambda rng: nn.ReLU(),
    lambda rng: nn.ReLU6(),
    lambda rng: nn.Hardtanh(-rng.random() - 0.1, rng.random() + 0.1),
    lambda rng: nn.LeakyReLU(rng.choice([0.01, 0.2, -0.3, 1.5])),
    lambda rng: _filled(rng, nn.PReLU()),
    lambda rng: nn.RReLU(0.1, rng.choice([0.3, 2.5])),
    lambda rng: nn.ELU(rng.choice([0.5, 1.0, 2.5])),
    lambda rng: nn.CELU(rng.choice([0.3, 1.0, 3.0])),
    lambda rng: nn.SELU(),
    lambda rng: nn.GELU(rng.choice(["none", "tanh"])),
    lambda rng: nn.SiLU(),
    lambda rng: nn.Mish(),
    lambda rng: nn.Hardswish(),
    lambda rng: nn.Hardsigmoid(),
    lambda rng: nn.Tanh(),
    lambda rng: nn.Sigmoid(),
    lambda rng: nn.Softplus(rng.choice([0.5, 1.0, 2.0])),
    lambda rng: nn.Softsign(),
    lambda rng: nn.LogSigmoid(),
    lambda rng: nn.Tanhshrink(),
    lambda rng: nn.Softshrink(rng.choice([0.1, 0.5])),
]

FUNCTIONS = {
    "F.relu": lambda self, x: F.relu(x),
    "F.relu6": lambda self, x: F.relu6(input=x),
    "F.hardtanh": lambda self, x: F.hardtanh(x, min_val=-0.5, max_val=0.5),
    "F.leaky_relu": lambda self, x: F.leaky_relu(x, negative_slope=-1.7),
    "F.leaky_relu_by_position": lambda self, x: F.leaky_relu(x, 1.4),
    "F.elu": lambda self, x: F.elu(x, 2.0),
    "F.celu": lambda self, x: F.celu(x, alpha=0.5),
    "F.selu": lambda self, x: F.selu(x),
    "F.gelu": lambda self, x: F.gelu(x, approximate="tanh"),
    "F.silu": lambda self, x: F.silu(x),
    "F.mish": lambda self, x: F.mish(x),
    "F.hardswish": lambda self, x: F.hardswish(x),
    "F.hardsigmoid": lambda self, x: F.hardsigmoid(x),
    "F.softplus": lambda self, x: F.softplus(x, beta=2),
    "F.softsign": lambda self, x: F.softsign(x),
    "F.logsigmoid": lambda self, x: F.logsigmoid(x),
    "F.tanhshrink": lambda self, x: F.tanhshrink(x),
    "torch.tanh": lambda self, x: torch.tanh(x),
    "x.tanh": lambda self, x: x.tanh(),
    "x.relu": lambda self, x: x.relu(),
    "torch.relu": lambda self, x: torch.relu(x),
    "x.sigmoid": lambda self, x: x.sigmoid(),
    "torch.sigmoid": lambda self, x: torch.sigmoid(x),
    "x.abs": lambda self, x: x.abs(),
    "-x": lambda self, x: -x,
}


def _activation(rng, x):
    if rng.random() < 0.5:
        module = rng.choice(ACTIVATIONS)(rng)
        return type(module).__name__, module
    name = rng.choice(list(FUNCTIONS))
    return name, Step(FUNCTIONS[name])


def _channel_prelu(rng, x):
    return "PReLU per channel", _filled(rng, nn.PReLU(x.shape[1]))


def _functional_prelu(rng, x):
    return "F.prelu", Step(lambda self, x: F.prelu(x, self.slope), slope=nn.Parameter(2 * torch.randn(1)))


# ---------------------------------------------------------------------------------------- layers on values of any kind


def _constant_product(rng, x):
    shape = rng.choice([(1,), tuple(x.shape[1:]), (x.shape[-1],)])
    factor = 1.5 * torch.randn(shape)
    kind = rng.choice(["x * c", "c * x", "x.mul(c)", "x / c", "torch.mul", "parameter", "number", "addcmul"])
    functions = {
        "x * c": lambda self, x: x * self.c,
        "c * x": lambda self, x: self.c * x,
        "x.mul(c)": lambda self, x: x.mul(self.c),
        "x / c": lambda self, x: x / (self.c.abs() + 0.2),
        "torch.mul": lambda self, x: torch.mul(input=x, other=self.c),
        "parameter": lambda self, x: x * self.c.exp(),
        "number": lambda self, x: 2.5 * x / 3,
        "addcmul": lambda self, x: torch.addcmul(self.c, x, self.c),
    }
    return f"constant product ({kind})", Step(
        functions[kind], c=nn.Parameter(factor) if kind == "parameter" else factor
    )


def _shift(rng, x):
    kind = rng.choice(["x + c", "c - x", "torch.sub", "x.add"])
    functions = {
        "x + c": lambda self, x: x + self.c,
        "c - x": lambda self, x: self.c - x,
        "torch.sub": lambda self, x: torch.sub(x, self.c),
        "x.add": lambda self, x: x.add(other=self.c),
    }
    return f"shift ({kind})", Step(functions[kind], c=torch.randn(x.shape[1:]))


def _dropout(rng, x):
    if rng.random() < 0.4:
        return "F.dropout", Step(lambda self, x: F.dropout(x, 0.5, training=self.training))
    return "Dropout", rng.choice([nn.Dropout(0.5), nn.AlphaDropout(0.3), nn.Identity(), nn.FeatureAlphaDropout(0.3)])


def _move(rng, x):
    kind = rng.choice(["roll", "flip", "chunk and cat", "split", "unsqueeze", "narrow", "view", "mirrored"])
    axis, half = x.axis, max(1, x.width // 2)
    functions = {
        "roll": lambda self, x: torch.roll(x, 1, axis),
        "flip": lambda self, x: x.flip(axis),
        "chunk and cat": lambda self, x: torch.cat(x.chunk(2, dim=axis)[::-1], dim=axis),
        "split": lambda self, x: torch.cat([part * 2.0 for part in torch.split(x, half, dim=axis)], axis),
        "unsqueeze": lambda self, x: x.unsqueeze(1).squeeze(1),
        "narrow": lambda self, x: x.narrow(axis, 0, half),
        "view": lambda self, x: x.reshape(x.size(0), -1).view(x.shape),
        "mirrored": lambda self, x: torch.cat((x, x.flip(axis)), axis),
    }
    return f"move ({kind})", Step(functions[kind])


def _softmax(rng, x):
    axis = x.axis
    kind = rng.choice(["nn", "F", "method"])
    if kind == "nn":
        return "Softmax", nn.Softmax(dim=axis)
    functions = {"F": lambda self, x: F.softmax(x, dim=axis), "method": lambda self, x: 3.0 * x.softmax(axis)}
    return f"softmax ({kind})", Step(functions[kind])


def _gate(rng, x, inner):
    kind = rng.choice(["of itself", "of a layer", "glu"])
    axis = x.axis
    functions = {
        "of itself": lambda self, x: x * torch.sigmoid(x),
        "of a layer": lambda self, x: x * torch.sigmoid(self.fc(x)),
        "glu": lambda self, x: self.fc(x) * x.chunk(2, axis)[0].tanh().mean(axis, keepdim=True),
    }
    return f"gate ({kind})", Step(functions[kind], fc=_plain(rng, x))


def _mixed(rng, x, inner):
    layer = _plain(rng, x)
    kind = rng.choice(["double", "to", "type_as", "float", "to_dtype"])
    if kind in ("float", "to_dtype"):
        layer.float()
    else:
        layer.double()
    own = torch.get_default_dtype()
    back = (lambda y: y.double()) if own == torch.float64 else (lambda y: y.float())
    functions = {
        "double": lambda self, x: back(self.layer(x.double())),
        "to": lambda self, x: self.layer(x.to(torch.float64)).to(own),
        "type_as": lambda self, x: self.layer(x.to(dtype=torch.float64)).type_as(x),
        "float": lambda self, x: back(self.layer(x.float())),
        "to_dtype": lambda self, x: self.layer(x.to(torch.float32)).to(x.dtype),
    }
    return f"!mixed {kind}", Step(functions[kind], layer=layer)


def _elementwise_norm(rng, x):
    shape = tuple(x.shape[rng.choice([1, -1]) :])
    kind = rng.choice(["LayerNorm", "RMSNorm", "F.layer_norm", "LayerNorm without weights", "RMSNorm without eps"])
    eps = rng.choice([1e-5, 1e-3, 0.1])
    if kind == "F.layer_norm":
        function = lambda self, x: F.layer_norm(x, shape, weight=self.w, bias=None, eps=eps)  # noqa: E731
        return kind, Step(function, w=nn.Parameter(torch.randn(shape)))
    module = {
        "LayerNorm": lambda: nn.LayerNorm(shape, eps),
        "LayerNorm without weights": lambda: nn.LayerNorm(shape, eps, elementwise_affine=False),
        "RMSNorm": lambda: nn.RMSNorm(shape, eps),
        "RMSNorm without eps": lambda: nn.RMSNorm(shape),
    }[kind]()
    return kind, _filled(rng, module)


def _channel_norm(rng, x):
    batch_norm_type, instance_norm_type = {
        2: (nn.BatchNorm1d, None),
        3: (nn.BatchNorm1d, nn.InstanceNorm1d),
        4: (nn.BatchNorm2d, nn.InstanceNorm2d),
    }[x.ndim]
    channels = x.shape[1]
    kind = rng.choice(
        ["batch", "batch", "group", "instance", "F.batch_norm", "F.group_norm", "instance with statistics"]
    )
    single = 1 if x.ndim == 2 else 0  # torch refuses one value per group, of a single example
    groups = rng.choice([size for size in range(1, channels + 1 - single) if channels % size == 0])
    if kind == "batch":
        module = batch_norm_type(channels, eps=rng.choice([1e-5, 1e-2]), affine=rng.random() < 0.8)
    elif kind == "group" or instance_norm_type is None:
        module = nn.GroupNorm(groups, channels, eps=rng.choice([1e-5, 1e-2]))
    elif kind.startswith("instance"):
        module = instance_norm_type(channels, affine=rng.random() < 0.7, track_running_stats="statistics" in kind)
    elif kind == "F.batch_norm":
        function = lambda self, x: F.batch_norm(x, self.m, self.v, weight=self.w, training=False)  # noqa: E731
        return kind, Step(function, m=torch.randn(channels), v=torch.rand(channels) + 0.1, w=torch.randn(channels))
    else:
        return kind, Step(lambda self, x: F.group_norm(x, groups, weight=self.w), w=torch.randn(channels))
    return type(module).__name__, _filled(rng, module)


def _reduced_sum(rng, x):
    axis = x.axis
    kind = rng.choice(["centred", "amax", "sum", "mean of a stack", "amax of a stack"])
    functions = {
        "centred": lambda self, x: x - x.mean(axis, keepdim=True),
        "amax": lambda self, x: x + torch.amax(x, dim=axis, keepdim=True),
        "sum": lambda self, x: torch.cat([x, x.sum(axis, keepdim=True)], axis),
        "mean of a stack": lambda self, x: torch.stack([x, self.fc(x)], 1).mean(1),
        "amax of a stack": lambda self, x: torch.stack([x, self.fc(x)]).amax(0),
    }
    return f"reduction ({kind})", Step(functions[kind], fc=_plain(rng, x))


ANYWHERE = [_activation] * 5 + [_constant_product, _shift, _dropout, _move, _softmax, _elementwise_norm, _reduced_sum]


# --------------------------------------------------------------------------------------------------------- by the kind


def _linear_step(rng, x):
    outputs = rng.randint(3, 8)
    kind = rng.choice(["plain", "plain", "plain", "keyword", "F.linear", "no batch axis"])
    if kind == "F.linear":
        function = lambda self, x: F.linear(input=x, weight=self.w, bias=self.b)  # noqa: E731
        weight = nn.Parameter(torch.randn(outputs, x.shape[-1]) / 2)
        return kind, Step(function, w=weight, b=nn.Parameter(torch.randn(outputs)))
    label, layer = _linear(rng, x.shape[-1], outputs)
    if kind == "keyword":
        return f"{label} by keyword", Step(lambda self, x: self.fc(input=x), fc=layer)
    return label, layer


def _conv(rng, x):
    axes = x.ndim - 2
    channels, outputs = x.shape[1], rng.randint(1, 4)
    groups = channels if rng.random() < 0.25 else 1
    kind = rng.choice(["plain", "plain", "plain", "F.conv", "transposed", "padded"])
    kernel, stride, dilation = rng.randint(1, 3), rng.choice([1, 1, 2]), rng.choice([1, 1, 2])
    padding = rng.randint(0, 2)
    if kind == "F.conv":
        function = F.conv1d if axes == 1 else F.conv2d
        weight = nn.Parameter(torch.randn(outputs, channels, *[kernel] * axes) / 2)
        return f"F.conv{axes}d", Step(
            lambda self, x: function(x, self.w, None, stride=stride, padding=padding, dilation=dilation), w=weight
        )
    if kind == "transposed":
        layer = (nn.ConvTranspose1d, nn.ConvTranspose2d)[axes - 1](
            channels, outputs * groups, kernel + 1, stride, padding=rng.randint(0, 1), groups=groups
        )
        return _reparametrised(rng, layer, 0.05)
    mode = rng.choice(["circular", "reflect", "replicate"]) if kind == "padded" else "zeros"
    padding = rng.choice(["same", padding]) if stride == 1 else padding
    layer = (nn.Conv1d, nn.Conv2d)[axes - 1](
        channels, outputs * groups, kernel, stride, padding, dilation, groups, rng.random() < 0.7, mode
    )
    label, layer = _reparametrised(rng, layer)
    return f"{label} ({mode}, stride {stride}, dilation {dilation}, groups {groups})", layer


def _pool(rng, x):
    axes = x.ndim - 2
    kernel, stride = rng.randint(2, 3), rng.randint(1, 2)
    padding, ceil_mode = rng.randint(0, 1), rng.random() < 0.3
    max_pool, avg_pool, adaptive_max, adaptive_avg = (
        (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveMaxPool1d, nn.AdaptiveAvgPool1d),
        (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d),
    )[axes - 1]
    kind = rng.choice(
        ["max", "max", "avg", "adaptive max", "adaptive avg", "F.max_pool2d", "F.avg_pool2d", "F.adaptive"]
    )
    if kind.startswith("F.") and axes == 2:
        functions = {
            "F.max_pool2d": lambda self, x: F.max_pool2d(x, kernel, stride=stride, padding=padding),
            "F.avg_pool2d": lambda self, x: F.avg_pool2d(x, kernel, stride, padding=padding, ceil_mode=ceil_mode),
            "F.adaptive": lambda self, x: F.adaptive_avg_pool2d(x, (2, 3)),
        }
        return kind, Step(functions[kind])
    if kind == "max":
        module = max_pool(kernel, stride, padding, rng.choice([1, 1, 2]), ceil_mode=ceil_mode)
    elif kind == "avg":
        module = avg_pool(kernel, stride, padding, ceil_mode, rng.random() < 0.5)
    else:
        module = (adaptive_max if kind == "adaptive max" else adaptive_avg)(rng.randint(1, 4))
    return type(module).__name__, module


def _pad(rng, x):
    axes = x.ndim - 2
    amounts = tuple(rng.randint(0, 2) for _ in range(2 * axes))
    kinds = (
        (nn.ZeroPad1d, nn.ReflectionPad1d, nn.ReplicationPad1d, nn.CircularPad1d),
        (nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d),
    )[axes - 1]
    if rng.random() < 0.2:
        return "F.pad", Step(lambda self, x: F.pad(x, amounts, value=0.5))
    module = rng.choice([*kinds, lambda pad: (nn.ConstantPad1d, nn.ConstantPad2d)[axes - 1](pad, 1.5)])(amounts)
    return type(module).__name__, module


def _resize(rng, x):
    linear = "linear" if x.ndim == 3 else "bilinear"
    kind = rng.choice(["Upsample", "Upsample linear", "F.interpolate", "area", "aligned"])
    size = tuple(rng.randint(2, 6) for _ in x.shape[2:])
    if kind == "Upsample":
        return kind, nn.Upsample(scale_factor=rng.choice([2, 1.5]))
    if kind == "Upsample linear":
        return kind, nn.Upsample(scale_factor=rng.choice([2, 1.5, 0.7]), mode=linear)
    functions = {
        "F.interpolate": lambda self, x: F.interpolate(x, size=size, mode=linear),
        "area": lambda self, x: F.interpolate(x, size=size, mode="area"),
        "aligned": lambda self, x: F.interpolate(input=x, size=size, mode=linear, align_corners=True),
    }
    return f"interpolation ({kind})", Step(functions[kind])


def _shuffle(rng, x):
    kind = rng.choice(["PixelShuffle", "PixelUnshuffle", "ChannelShuffle", "F.pixel_unshuffle"])
    if kind == "F.pixel_unshuffle":
        return kind, Step(lambda self, x: F.pixel_unshuffle(x, 2))
    return kind, getattr(nn, kind)(2)


def _dropped_channels(rng, x):
    return "Dropout2d", nn.Dropout2d(0.4)


def _folded_tokens(rng, x):
    """Tokens that are examples for a while."""
    layer = _filled(rng, nn.Linear(x.shape[-1], 4))
    return "tokens folded into the batch", Step(
        lambda self, x: self.fc(x.flatten(0, 1)).tanh().view(x.shape[0], x.shape[1], -1), fc=layer
    )


def _mixing(rng, x):
    layer = _filled(rng, nn.Linear(x.shape[1], x.shape[1]))
    return "mixer", Step(lambda self, x: x + self.fc(x.transpose(1, 2)).permute(0, 2, 1), fc=layer)


def _class_token(rng, x):
    token = nn.Parameter(torch.randn(1, 1, x.shape[-1]))
    return "class token", Step(lambda self, x: torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1), token=token)


def _tokens_norm(rng, width):
    eps = rng.choice([1e-3, 0.1, 1.0])
    return _filled(rng, rng.choice([nn.LayerNorm, nn.RMSNorm])(width, eps))


def _multihead(rng, x):
    width, tokens = x.shape[-1], x.shape[1]
    heads = rng.choice([size for size in (1, 2, 4) if width % size == 0])
    batch_first = rng.random() < 0.8
    attention = _filled(rng, nn.MultiheadAttention(width, heads, bias=rng.random() < 0.7, batch_first=batch_first))
    kind = rng.choice(["position", "keyword", "unpacked", "masked"]) if batch_first else "tokens first"

    def unpacked(self, x):
        hidden = self.norm(x)
        out, _ = self.attention(hidden, hidden, hidden)
        return x + out

    def by_keyword(self, x):
        hidden = self.norm(x)
        return x + self.attention(query=hidden, key=hidden, value=hidden, need_weights=False)[0]

    def masked(self, x):
        hidden = self.norm(x)
        return self.attention(hidden, hidden, hidden, attn_mask=self.mask, need_weights=False)[0]

    def by_position(self, x):
        hidden = self.norm(x)
        return x + self.attention(hidden, hidden, hidden, need_weights=False)[0]

    def tokens_first(self, x):
        hidden = self.norm(x.transpose(0, 1))
        return x + self.attention(hidden, hidden, hidden, need_weights=False)[0].transpose(0, 1)

    function = {
        "position": by_position,
        "keyword": by_keyword,
        "unpacked": unpacked,
        "masked": masked,
        "tokens first": tokens_first,
    }[kind]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    step = Step(function, norm=_tokens_norm(rng, width), attention=attention, mask=mask)
    return f"MultiheadAttention ({kind}, {heads} heads)", step


def _dot_product(rng, x):
    width, heads = x.shape[-1], 2
    kind = rng.choice(
        [
            "heads",
            "causal",
            "one head",
            "broadcast",
            "broadcast",
            "expanded",
            "constant_keys",
            "constant_queries",
            "gqa",
        ]
    )
    size = 2
    parts = {
        "norm": _tokens_norm(rng, width),
        "qkv": _filled(rng, nn.Linear(width, 3 * heads * size)),
        "q": _filled(rng, nn.Linear(width, heads * size)),
        "k": _filled(rng, nn.Linear(width, size)),
        "v": _filled(rng, nn.Linear(width, size)),
        "keys": nn.Parameter(2 * torch.randn(1, heads, 3, size)),
        "values": nn.Parameter(torch.randn(1, heads, 3, size)),
        "out": _filled(rng, nn.Linear(heads * size, width)),
    }

    def split(y):
        return y.view(y.shape[0], y.shape[1], heads, size).transpose(1, 2)

    def joined(y):
        return y.transpose(1, 2).reshape(y.shape[0], -1, heads * size)

    def all_heads(self, x, causal=False):
        query, key, value = self.qkv(self.norm(x)).chunk(3, dim=-1)
        query, key, value = split(query), split(key), split(value)
        return x + self.out(joined(F.scaled_dot_product_attention(query, key, value, is_causal=causal)))

    def one_head(self, x):
        query, key, value = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(query, key, value, scale=0.7))

    def broadcast(self, x):
        hidden = self.norm(x)
        key, value = self.k(hidden).unsqueeze(1), self.v(hidden).unsqueeze(1)
        return x + self.out(joined(F.scaled_dot_product_attention(split(self.q(hidden)), key, value)))

    def expanded(self, x):
        hidden = self.norm(x)
        key, value = (layer(hidden).unsqueeze(1).expand(-1, heads, -1, -1) for layer in (self.k, self.v))
        return x + self.out(joined(F.scaled_dot_product_attention(split(self.q(hidden)), key, value)))

    def gqa(self, x):
        hidden = self.norm(x)
        key, value = self.k(hidden).unsqueeze(1), self.v(hidden).unsqueeze(1)
        attended = F.scaled_dot_product_attention(split(self.q(hidden)), key, value, enable_gqa=True)
        return x + self.out(joined(attended))

    def constant_keys(self, x):
        query = split(self.q(self.norm(x)))
        keys, values = (item.expand(x.shape[0], -1, -1, -1) for item in (self.keys, self.values))
        return x + self.out(joined(F.scaled_dot_product_attention(query, keys, values)))

    def constant_queries(self, x):
        _, key, value = self.qkv(self.norm(x)).chunk(3, dim=-1)
        query = self.keys.expand(x.shape[0], -1, -1, -1)
        return self.out(joined(F.scaled_dot_product_attention(query, split(key), split(value))))

    function = {
        "heads": all_heads,
        "causal": lambda self, x: all_heads(self, x, True),
        "one head": one_head,
        "broadcast": broadcast,
        "expanded": expanded,
        "gqa": gqa,
        "constant_keys": constant_keys,
        "constant_queries": constant_queries,
    }[kind]
    mark = "!" if kind in ("broadcast", "expanded", "gqa", "constant_keys", "constant_queries") else ""
    return f"dot product attention {mark}{kind}", Step(function, **parts)


STEPS = {
    "vector": [_linear_step] * 6 + [_channel_norm] * 2 + [_channel_prelu, _functional_prelu, *ANYWHERE],
    "signal": [_conv] * 6 + [_channel_norm] * 2 + [_pool, _pool, _pad, _resize, _channel_prelu, *ANYWHERE],
    "image": [_conv] * 6
    + [_channel_norm] * 2
    + [_pool, _pool, _pad, _resize, _shuffle, _dropped_channels, _functional_prelu, *ANYWHERE],
    "tokens": [_linear_step] * 3
    + [_multihead] * 3
    + [_dot_product] * 4
    + [_folded_tokens, _mixing, _class_token, *ANYWHERE],
}

CONVERSIONS = {
    "signal": {
        "flatten": lambda self, x: x.flatten(1),
        "mean": lambda self, x: x.mean(-1),
        "amax": lambda self, x: x.amax(dim=2),
        "last": lambda self, x: x[:, :, -1],
    },
    "image": {
        "flatten": lambda self, x: torch.flatten(x, 1),
        "mean": lambda self, x: x.mean(dim=(2, 3)),
        "adaptive": lambda self, x: F.adaptive_avg_pool2d(x, 1).flatten(1),
        "reshape": lambda self, x: x.reshape(x.shape[0], -1),
        "sum": lambda self, x: x.sum((-2, -1)),
        "amax": lambda self, x: x.amax((2, 3)),
    },
    "tokens": {
        "mean": lambda self, x: x.mean(1),
        "first": lambda self, x: x[:, 0],
        "flatten": lambda self, x: x.flatten(1),
        "select": lambda self, x: x.select(1, 1),
        "amax": lambda self, x: torch.amax(x, 1),
    },
}


# --------------------------------------------------------------------------------------------- awkward ways of writing


def _dead(rng, x, inner):
    def forward(self, x):
        y = self.inner(x)
        self.unused(y)
        return y

    label, module = inner
    out = module(x.tensor)
    unused = _plain(rng, Value(out, x.kind)) if out.ndim == x.ndim else nn.Identity()
    return f"!dead_layer ({label})", Step(forward, inner=module, unused=unused)


def _residual(rng, x, inner):
    label, module = inner
    functions = [
        lambda self, x: x + self.inner(x),
        lambda self, x: torch.add(x, self.inner(x)),
        lambda self, x: self.inner(x).sub(x),
        lambda self, x: x + 0.5 * self.inner(x),
    ]
    return f"residual ({label})", Step(rng.choice(functions), inner=module)


def _dense(rng, x, inner):
    label, module = inner
    axis = x.axis
    return f"concatenation ({label})", Step(lambda self, x: torch.cat([x, self.inner(x)], axis), inner=module)


def _twice(rng, x, inner):
    label, module = inner
    functions = [
        lambda self, x: self.inner(self.inner(x)),
        lambda self, x: self.inner(x) + self.other(2.0 * x),
        lambda self, x: self.inner(x + self.inner(x)),
    ]
    return f"!shared ({label})", Step(rng.choice(functions), inner=module, other=module)


def _in_place(rng, x, inner):
    axis = x.axis

    def add_method(self, x):
        h = self.layer(x)
        h.add_(x)
        return h

    def add_operator(self, x):
        h = self.layer(x)
        h += x
        return h

    def multiplied(self, x):
        h = self.layer(x)
        h *= 4.0
        return h

    def not_rebound(self, x):
        h = self.layer(x)
        h.mul_(4.0)
        return h

    def divided(self, x):
        h = self.layer(x)
        h /= 0.2
        return h

    def written_view(self, x):
        h = self.layer(x)
        h[:, :2].mul_(5.0)
        return h

    def narrowed(self, x):
        h = self.layer(x)
        h.narrow(1, 0, 1).mul_(6.0)
        return h

    def whole_view(self, x):
        h = self.layer(x)
        g = h.view(h.shape)
        g.mul_(5.0)
        return h

    def view_before(self, x):
        h = self.layer(x)
        g = h.flatten(1)
        h.mul_(5.0)
        return g.view(h.shape)

    def alias(self, x):
        h = self.layer(x)
        a = h
        h.mul_(4.0)
        return a + h

    def alias_added(self, x):
        h = self.layer(x)
        a = h[:, :1]
        h += 3.0 * x
        return torch.cat([a, h], 1)

    def transposed_view(self, x):
        h = self.layer(x)
        h.transpose(1, -1)[:, :1].mul_(4.0)
        return h

    def selected_view(self, x):
        h = self.layer(x)
        first = h.select(axis, 0)
        first += 5.0 * x.select(axis, 1)
        return torch.cat([h, h], axis)

    def assigned(self, x):
        h = self.layer(x)
        h[:, :1] = 5.0 * x[:, :1]
        return h

    def assigned_product(self, x):
        h = self.layer(x)
        h[:, :1] *= 5.0
        return h

    def constant_assigned(self, x):
        h = torch.zeros_like(x)
        h[:, :1] = 5.0 * x[:, :1]
        return h + self.layer(x)

    def copied(self, x):
        h = self.layer(x)
        h.copy_(7.0 * x)
        return h

    def buffer_filled(self, x):
        h = self.layer(x)
        g = torch.empty_like(h)
        g.copy_(h)
        return g * 2.0

    def kept_clone(self, x):
        h = self.layer(x)
        old = h.clone()
        h.mul_(4.0)
        return old + h

    def activation(self, x):
        h = self.layer(x)
        g = self.act(h)
        return h + 2.0 * g

    def functional_activation(self, x):
        h = self.layer(x)
        F.leaky_relu(h, -3.0, inplace=True)
        return h

    def activation_of_view(self, x):
        h = self.layer(x)
        F.leaky_relu_(h[:, :1], 3.0)
        return h

    def residual_of_changed(self, x):
        x = x + self.c
        s = x
        x += self.layer(x * 1.0)
        return x + s

    def input_changed(self, x):
        h = x * 1.0
        y = self.layer(h * 1.0)
        h.mul_(6.0)
        return y + h

    functions = [
        add_method,
        add_operator,
        multiplied,
        not_rebound,
        divided,
        written_view,
        narrowed,
        whole_view,
        view_before,
        alias,
        alias_added,
        transposed_view,
        selected_view,
        assigned,
        assigned_product,
        constant_assigned,
        copied,
        buffer_filled,
        kept_clone,
        activation,
        functional_activation,
        activation_of_view,
        residual_of_changed,
        input_changed,
    ]
    function = rng.choice(functions)
    act = rng.choice([nn.ReLU, nn.LeakyReLU, nn.ELU])(inplace=True)
    step = Step(function, layer=_plain(rng, x), act=act, c=torch.randn(x.shape[1:]))
    return f"!in_place:{function.__name__}", step


# ------------------------------------------------------------------------------------------------------------- endings


def _ending(rng, width, classes):
    """Return the label of what makes the logits, it, and how they are taken from what it returns, None for itself."""

    def dead_after(self, x):
        logits = self.fc(x)
        self.other(x)
        return logits

    def dead_before(self, x):
        self.other(x)
        return self.fc(x)

    def dead_of_logits(self, x):
        logits = self.fc(x)
        self.onto(logits)
        return logits

    def dead_small(self, x):
        h = self.fc(x)
        logits = 5.0 * h
        self.small(x)
        return logits

    def in_place(self, x):
        logits = self.fc(x)
        logits *= 6.0
        return logits

    def not_rebound(self, x):
        logits = self.fc(x)
        logits.mul_(6.0)
        return logits

    def view_written(self, x):
        logits = self.fc(x)
        logits[:, :1].mul_(20.0)
        return logits

    def alias(self, x):
        logits = self.fc(x)
        other = logits.view(-1, classes)
        other.add_(3.0 * self.other(x))
        return logits

    def assigned(self, x):
        logits = self.fc(x)
        logits[:, 0] = 9.0 * x[:, 0]
        return logits

    plain = {
        "head": lambda self, x: self.fc(x),
        "head by keyword": lambda self, x: self.fc(input=x),
        "head F.linear": lambda self, x: F.linear(x, self.w, self.b),
        "head F.linear by keyword": lambda self, x: F.linear(bias=self.b, weight=self.w, input=x),
        "head with temperature": lambda self, x: self.fc(x) / 0.2,
        "head with scales": lambda self, x: self.fc(x) * self.b,
        "two heads": lambda self, x: self.fc(x) + 0.5 * self.other(x),
        "head centred": lambda self, x: self.fc(x) - self.fc(x).mean(1, keepdim=True),
        "head reshaped": lambda self, x: self.fc(x).view(x.size(0), -1),
        "head dropped": lambda self, x: F.dropout(self.fc(x), training=self.training),
        "head squeezed": lambda self, x: self.fc(x.unsqueeze(1)).squeeze(1),
        "head and activation": lambda self, x: F.leaky_relu(self.fc(x), 1.5),
        "head flipped": lambda self, x: self.fc(x).flip(1),
        "head padded": lambda self, x: F.pad(self.fc(x), (0, 1)),
        "head doubled": lambda self, x: torch.cat([self.fc(x), 2.0 * self.other(x)], 1),
    }
    awkward = {
        "!shared_head": lambda self, x: self.fc(x) + self.fc(3.0 * x),
        "!shared_square": lambda self, x: self.square(self.square(x)),
        "!dead_after": dead_after,
        "!dead_before": dead_before,
        "!dead_of_logits": dead_of_logits,
        "!dead_small": dead_small,
        "!in_place_logits": in_place,
        "!in_place_not_rebound": not_rebound,
        "!in_place_view_of_logits": view_written,
        "!in_place_alias_of_logits": alias,
        "!in_place_assigned_logits": assigned,
        "!head_of_head": lambda self, x: self.fc(x) + self.square_of_classes(self.fc(x)),
    }
    several = {
        "!tuple": (lambda self, x: (self.fc(x), self.other(x)), lambda module, x: module(x)[0]),
        "!tuple_second": (lambda self, x: (self.small(x), self.fc(x)), lambda module, x: module(x)[1]),
        "!dict": (lambda self, x: {"aux": self.small(x), "logits": self.fc(x)}, lambda m, x: m(x)["logits"]),
        "!features": (lambda self, x: (x, self.fc(x)), lambda module, x: module(x)[-1]),
        "!auxiliary": (lambda self, x: (self.fc(x), self.small(x)), lambda m, x: m(x)[0] + 0.3 * m(x)[0]),
    }
    none = {
        "no head": lambda self, x: x,
        "no head, tanh": lambda self, x: 2.0 * torch.tanh(x),
        "no head, activation": lambda self, x: F.elu(x),
        "no head, log softmax": lambda self, x: F.log_softmax(x, dim=1),
    }
    share = 1.0 if rng.random() < 0.25 else 0.0
    label, layer = _linear(rng, width, classes, share)
    small = nn.Linear(width, classes)
    with torch.no_grad():
        small.weight.mul_(0.01)
    parts = {
        "fc": layer,
        "other": _filled(rng, nn.Linear(width, classes)),
        "small": small,
        "onto": small if width == classes else nn.Linear(classes, classes),
        "square": _filled(rng, nn.Linear(width, width)),
        "square_of_classes": _filled(rng, nn.Linear(classes, classes)),
        "w": nn.Parameter(torch.randn(classes, width)),
        "b": nn.Parameter(torch.randn(classes)),
    }
    with torch.no_grad():
        parts["onto"].weight.mul_(0.1)
    family = rng.choices([plain, awkward, several, none], [5, 2, 1, 1])[0]
    name = rng.choice(list(family)) if family is not none else rng.choices(list(none), [3, 3, 3, 1])[0]
    function, logits_fn = family[name] if family is several else (family[name], None)
    used = {key: parts[key] for key in parts if key in function.__code__.co_names}
    step = Step(function, **used)
    return f"{name} ({label}, {classes} classes)" if "fc" in used else name, step, logits_fn


# ----------------------------------------------------------------------------------------------------------- generator

INPUTS = {
    "vector": lambda rng: (rng.randint(3, 8),),
    "signal": lambda rng: (rng.randint(1, 3), rng.randint(5, 9)),
    "image": lambda rng: (rng.choice([1, 2, 4]) if rng.random() < 0.7 else 4, *[rng.randint(3, 4)] * 2),
    "tokens": lambda rng: (rng.randint(2, 4), rng.choice([4, 6])),
}
WRAPPERS = [_residual] * 5 + [_dense] * 4 + [_twice] * 3 + [_dead] * 2 + [_in_place] * 2 + [_mixed, _mixed, _gate]


def random_network(seed):
    """Build the network of a seed, always the same one.

    Args:
        seed: A natural number.

    Returns:
        The network, in training mode for every second seed, three inputs, and a :class:`Description`.
    """
    rng = random.Random(seed)
    dtype = torch.float32 if rng.random() < 0.3 else torch.float64
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            network, inputs, labels = _built(rng)
        finally:
            torch.set_default_dtype(before)
    network.train(rng.random() < 0.5)
    dtypes = {item.dtype for item in (*network.parameters(), *network.buffers()) if item.is_floating_point()}
    mixed = dtypes - {dtype} != set() or any("!mixed" in label or "without eps" in label for label in labels)
    return network, inputs, Description(seed, tuple(labels), dtype, mixed)


def _built(rng):
    kind = rng.choices(list(INPUTS), [3, 2, 4, 3])[0]
    inputs = rng.choice([0.3, 1.0, 3.0]) * torch.randn(3, *INPUTS[kind](rng))
    value, steps, labels = Value(inputs[:2], kind), [], [f"{kind} {tuple(inputs.shape[1:])}"]
    for _ in range(rng.choice([1, 1, 2, 3, 4])):
        label, step, value = _next(rng, value)
        steps.append(step)
        labels.append(label)
    if value.kind != "vector":
        names = list(CONVERSIONS[value.kind])
        fitting = [name for name in names if _after(Step(CONVERSIONS[value.kind][name]), value, "vector")]
        name = rng.choice(fitting)
        step = Step(CONVERSIONS[value.kind][name])
        steps.append(step)
        labels.append(name)
        value = _after(step, value, "vector")
        if rng.random() < 0.3:
            label, step, value = _next(rng, value)
            steps.append(step)
            labels.append(label)
    classes = rng.choice([2, 3, 4, 5, 10])
    label, ending, logits_fn = _ending(rng, value.width, classes)
    while _after(ending, value, "vector") is None:
        label, ending, logits_fn = _ending(rng, value.width, classes)
    form = rng.choices([Network, Checked, Unpacking], [0.97, 0.01, 0.02])[0]
    prefix = {Network: [], Checked: ["!isinstance_raises"], Unpacking: ["!isinstance_branches"]}[form]
    network = form([*steps, ending])
    if logits_fn is not None:
        network = fr.LogitsOf(network, logits_fn)
    return network, inputs, [*prefix, *labels, label]


def _next(rng, value):
    """Return a random step that fits the value, and the value after it."""
    while True:
        inner = rng.choice(STEPS[value.kind])(rng, value)
        label, step = inner
        if rng.random() < 0.4:
            if _after(step, value, value.kind) is None:
                continue
            label, step = rng.choice(WRAPPERS)(rng, value, inner)
        after = _after(step, value, value.kind)
        if after is not None:
            return label, step, after


def _after(step, value, kind):
    """Return the value after a step, None where the step does not take it, or autograd not the step."""
    point = value.tensor.clone().requires_grad_()
    try:
        with torch.enable_grad():
            result = step.eval()(point * 1.0)
            outputs = (
                result if isinstance(result, tuple) else list(result.values()) if isinstance(result, dict) else [result]
            )
            torch.autograd.grad(sum(output.sum() for output in outputs), point)
    except (RuntimeError, ValueError, IndexError):
        return None
    if not isinstance(result, torch.Tensor):
        return Value(value.tensor, kind)  # several outputs of an ending
    result = result.detach()
    fits = result.ndim == {"vector": 2, "signal": 3, "image": 4, "tokens": 3}[kind]
    usable = fits and result.dtype == value.tensor.dtype and len(result) == len(value.tensor)
    wide = usable and (result.shape[1] >= 2 or kind != "vector")
    small = 2 <= result[0].numel() <= MAX_SIZE
    return Value(result, kind) if wide and small and result.isfinite().all() else None


# -------------------------------------------------------------------------------------------------- without a constant


class Argmax(nn.Module):
    def forward(self, x):
        return F.one_hot(x.argmax(1), x.shape[1]).to(x.dtype)


def refused_networks():
    """Return networks without a Lipschitz constant, by what takes it from them, each with its inputs.

    They jump, or their slope is unbounded, or the prediction of an example depends on the other examples.
    """
    norm = nn.BatchNorm1d(5, track_running_stats=False)
    functions = {
        "long": lambda self, x: x.long().double(),
        "int": lambda self, x: x.int().to(x.dtype),
        "to int": lambda self, x: x.to(torch.int64).to(torch.float64),
        "to int by keyword": lambda self, x: x.to(dtype=torch.int32).double(),
        "to short": lambda self, x: x.type(torch.int16).double(),
        "type_as int": lambda self, x: x.type_as(self.number).double(),
        "to other int": lambda self, x: x.to(self.number).double(),
        "to bool": lambda self, x: x.relu().bool().double(),
        "softmax dtype of int": lambda self, x: x.sum(1, keepdim=True, dtype=torch.int64).double() + 0.0 * x,
        "round": lambda self, x: torch.round(x),
        "round method": lambda self, x: x.round(),
        "round in place": lambda self, x: (x * 1.0).round_(),
        "floor": lambda self, x: x.floor(),
        "ceil": lambda self, x: torch.ceil(x),
        "trunc": lambda self, x: x.trunc(),
        "fraction": lambda self, x: torch.frac(x),
        "floor division": lambda self, x: x // 0.5,
        "divided to the floor": lambda self, x: torch.div(x, 0.5, rounding_mode="floor"),
        "remainder": lambda self, x: x % 0.5,
        "sign": lambda self, x: torch.sign(x),
        "comparison": lambda self, x: (x > 0).to(x.dtype),
        "mask": lambda self, x: x * (x > 0.3),
        "where": lambda self, x: torch.where(x > 0, x, x + 1.0),
        "heaviside": lambda self, x: torch.heaviside(x, self.zero),
        "sorted places": lambda self, x: x.argsort(1).double(),
        "softplus": lambda self, x: F.softplus(x, 1.0, 0.5),
        "softplus by keyword": lambda self, x: F.softplus(x, threshold=1.0),
        "hardshrink": lambda self, x: F.hardshrink(x, 0.5),
        "threshold": lambda self, x: F.threshold(x, 0.1, 20.0),
        "square": lambda self, x: x * x,
        "power": lambda self, x: x**2,
        "pow": lambda self, x: x.pow(3),
        "exponential": lambda self, x: x.exp(),
        "reciprocal": lambda self, x: 1.0 / x,
        "root": lambda self, x: x.abs().sqrt(),
        "logarithm": lambda self, x: x.abs().log(),
        "product": lambda self, x: x * x.roll(1, 1),
        "product in place": lambda self, x: (x * 1.0).mul_(x),
        "outer product": lambda self, x: (x[:, :, None] @ x[:, None]).sum(2),
        "attention without a norm": lambda self, x: F.scaled_dot_product_attention(*[x[:, :, None]] * 3).squeeze(2),
        "norm without eps": lambda self, x: F.layer_norm(x, (5,), eps=0.0),
        "batch statistics": lambda self, x: F.batch_norm(torch.stack([x, x.flip(1)], 2), None, None, training=True).sum(
            2
        ),
        "mean over the batch": lambda self, x: x * x.mean(0, keepdim=True),
        "dropout that stays on": lambda self, x: F.dropout(x),
        "noise": lambda self, x: x * torch.rand_like(x),
    }
    modules = {
        "nn.Softplus": nn.Softplus(threshold=1.0),
        "nn.Softplus at a negative threshold": nn.Softplus(threshold=-2.0),
        "nn.Softplus of large beta": nn.Softplus(beta=0.01, threshold=0.1),
        "nn.Hardshrink": nn.Hardshrink(0.5),
        "nn.Threshold": nn.Threshold(0.1, 20.0),
        "nn.CELU": nn.CELU(-1.0),
        "nn.BatchNorm1d without statistics": Step(
            lambda self, x: self.norm(torch.stack([x, 2.0 * x], 2)).sum(2), norm=norm
        ),
        "nn.LayerNorm without eps": nn.LayerNorm(5, eps=0.0),
        "argmax": Argmax(),
        "nn.Bilinear": Step(lambda self, x: self.part(x, x), part=nn.Bilinear(5, 5, 5)),
    }
    found = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inputs = 2 * torch.randn(3, 5, dtype=torch.float64)
        steps = {
            name: Step(function, number=torch.zeros(1, dtype=torch.int64), zero=torch.zeros(1, dtype=torch.float64))
            for name, function in functions.items()
        }
        for name, step in {**steps, **modules}.items():
            network = nn.Sequential(nn.Linear(5, 5), step, nn.Linear(5, 3)).double()
            found[name] = (network.eval(), inputs)
    return found
