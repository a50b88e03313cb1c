"""Networks of which a bound needs several of the new rules at once, against dense Jacobians."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from fisher_reg import NoBoundError, fisher_bound, lipschitz_bound, local_fisher_bound
from fisher_reg.bounds.compositions import traced_model
from fisher_reg.bounds.operator_norms.attention import dot_product_attention_norms_at
from fisher_reg.bounds.operator_norms.measures import CertifiedNorms
from fisher_reg.bounds.propagate import compose
from fisher_reg.bounds.region import Region
from fisher_reg.bounds.tightening import Tightening
from fisher_reg.likelihood import Categorical


class _Classifier(nn.Module):
    def __init__(self, body, features, classes=3):
        super().__init__()
        self.body, self.head = body, nn.Linear(features, classes)

    def forward(self, x):
        return self.head(self.body(x).flatten(2).mean(-1) if x.ndim == 4 else self.body(x).mean(1))


class _Squeezed(nn.Module):
    """A convolution with a squeeze-and-excitation gate."""

    def __init__(self):
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x):
        h = self.conv(x).relu()
        return h * self.up(self.down(F.adaptive_avg_pool2d(h, 1)).relu()).sigmoid()


class _Windows(nn.Module):
    """Attention in shifted windows, as Swin has it: layer norm, padding, roll, windows, heads."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x):  # (B, 4, 3, 4): pixels of 4 channels
        batch = x.shape[0]
        h = torch.roll(F.pad(self.norm(x), (0, 0, 0, 1)), (-1, -1), (1, 2))
        h = h.view(batch, 2, 2, 2, 2, 4).permute(0, 1, 3, 2, 4, 5).reshape(batch * 4, 4, 4)
        query, key, value = self.qkv(h).reshape(batch * 4, 4, 3, 2, 2).permute(2, 0, 3, 1, 4)
        attention = (query * 0.7) @ key.transpose(-2, -1)
        h = (attention.softmax(-1) @ value).transpose(1, 2).reshape(batch * 4, 4, 4)
        h = self.out(h).view(batch, 2, 2, 2, 2, 4).permute(0, 1, 3, 2, 4, 5).reshape(batch, 4, 4, 4)
        h = torch.roll(h, (1, 1), (1, 2))[:, :, :3]
        return (x + h).permute(0, 3, 1, 2)


def _models():
    torch.manual_seed(0)
    layer = {"d_model": 4, "nhead": 2, "dim_feedforward": 8, "batch_first": True}
    return {
        "squeeze and excitation": (_Classifier(_Squeezed(), 4), (2, 6, 6)),
        "windows": (_Classifier(_Windows(), 4), (4, 3, 4)),
        "pre-norm encoder layer": (_Classifier(nn.TransformerEncoderLayer(**layer, norm_first=True), 4), (5, 4)),
        "post-norm encoder": (
            _Classifier(
                nn.Sequential(nn.LayerNorm(4), nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer), 2)),
                4,
            ),
            (5, 4),
        ),
    }


NAMES = ("squeeze and excitation", "windows", "pre-norm encoder layer", "post-norm encoder")


def _norm_at(model, x):
    rows = torch.autograd.functional.jacobian(model, x[None]).flatten(2).flatten(0, 1)
    return torch.linalg.matrix_norm(rows, 2).item()


@pytest.mark.parametrize("name", NAMES)
def test_a_network_is_bounded_at_the_inputs_in_a_ball_and_over_a_domain(name):
    model, shape = _models()[name]
    model = model.double().eval()
    x = torch.rand(3, *shape, dtype=torch.float64)
    traced = traced_model(model, x, Categorical())
    options = {"tightening": Tightening(head=False)}
    local = compose(traced, CertifiedNorms(), is_local=True, **options).log_norm.exp().expand(3)
    ball = compose(traced, CertifiedNorms(), region=Region.ball(x, 0.1), **options).log_norm.exp().expand(3)
    domain = compose(traced, CertifiedNorms(), region=Region.box(0, 1, x), **options).log_norm.exp().max()
    for example, at, around in zip(x, local, ball, strict=True):
        assert _norm_at(model, example) <= at * (1 + 1e-9)
        for _ in range(3):
            step = torch.randn_like(example)
            assert _norm_at(model, example + 0.1 * step / step.norm()) <= around * (1 + 1e-9)
    assert all(_norm_at(model, torch.rand_like(x[0]).round()) <= domain for _ in range(5))


def test_attention_in_windows_behind_a_layer_norm_has_a_constant_over_all_inputs():
    model, shape = _models()["windows"]
    model = model.double().eval()
    bound = lipschitz_bound(model, torch.rand(2, *shape).double()).value
    assert all(_norm_at(model, scale * torch.randn(shape).double()) <= bound for scale in (0.01, 1, 100))


def test_a_gate_has_a_constant_over_a_domain_only():
    model, shape = _models()["squeeze and excitation"]
    x = torch.rand(2, *shape)
    with pytest.raises(NoBoundError, match="two values that depend on the input"):
        fisher_bound(model, x)
    assert local_fisher_bound(model, x).value.max() <= fisher_bound(model, x, domain=(0, 1)).value


def test_an_encoder_layer_of_torch_is_bounded_with_its_fast_path_left_as_it_was():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, norm_first=True)
    model, shape = nn.Sequential(layer, nn.Flatten(), nn.Linear(20, 3)).eval(), (5, 4)
    before = torch.backends.mha.get_fastpath_enabled()
    bound = lipschitz_bound(model, torch.rand(2, *shape))
    assert torch.backends.mha.get_fastpath_enabled() == before
    assert "0.linear1" in [term.name for term in bound.terms]  # its parts are layers of their own
    assert all(_norm_at(model.double(), torch.randn(shape).double()) <= bound.value for _ in range(5))


@pytest.mark.parametrize("last", [nn.LogSoftmax(1), nn.LogSoftmax(-1)])
def test_a_last_log_softmax_over_the_classes_costs_nothing(last):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(2, 4)
    bare, shifted = (fisher_bound(item, x) for item in (model, nn.Sequential(model, last)))
    assert shifted.value == pytest.approx(bare.value, rel=1e-9)
    assert shifted.terms[-1].layer == bare.terms[-1].layer


def test_a_log_softmax_that_is_no_shift_of_the_logits_is_bounded():
    model = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (3, 2)), nn.LogSoftmax(2), nn.Flatten())
    x = torch.randn(2, 4)
    bound = lipschitz_bound(model, x).value
    assert all(_norm_at(model.double(), 3 * torch.randn(4).double()) <= bound for _ in range(5))


def test_attention_at_given_tokens_is_bounded_in_each_of_its_arguments():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, size, width).double() for size, width in ((3, 4), (5, 4), (5, 2)))
    gains = dot_product_attention_norms_at((0.8 * query @ key.mT).softmax(-1), query, key, value, 0.8)
    operands = [query, key, value]
    for place, gain in enumerate((gains.query, gains.key, gains.value)):
        for head in range(2):

            def attention(moved, place=place, head=head):
                items = [moved if number == place else item[head] for number, item in enumerate(operands)]
                return F.scaled_dot_product_attention(*items, scale=0.8)

            jacobian = torch.autograd.functional.jacobian(attention, operands[place][head]).flatten(2).flatten(0, 1)
            dense = torch.linalg.matrix_norm(jacobian, 2)
            assert dense <= gain[head] * (1 + 1e-9)


def test_a_function_that_a_library_keeps_whole_is_read_by_export():
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    torch.manual_seed(0)
    block = swin.SwinTransformerBlock(8, 2, [2, 2], [1, 1])
    model = nn.Sequential(block, swin.PatchMerging(8), nn.Flatten(), nn.Linear(64, 3)).eval()
    x = torch.rand(1, 4, 4, 8)
    bound = lipschitz_bound(model, x).value
    assert all(_norm_at(model.double(), torch.randn(4, 4, 8).double()) <= bound for _ in range(3))


def test_a_function_of_torch_that_a_module_holds_keeps_its_rule():
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act = nn.Linear(4, 3), F.leaky_relu

        def forward(self, x):
            return self.act(self.fc(x))

    model = Held()
    assert lipschitz_bound(model, torch.zeros(1, 4)).value >= _norm_at(model.double(), torch.randn(4).double())
