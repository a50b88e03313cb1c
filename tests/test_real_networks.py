"""Networks that this project did not write: torchvision, timm and Hugging Face, small, with random weights.

For each one the estimate agrees with a looped definition in float64, and the module is left as it was found.
"""

from __future__ import annotations

from collections import namedtuple

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fisher_reg import Exact, Lanczos, LogitsOf, fisher_spectral_norm
from tests.oracles import fisher_by_scores, top_eigenvalue

NUM_CLASSES = 7
Output = namedtuple("Output", "logits extra")


def from_torchvision(name, size=32, **options):
    return lambda: (torchvision.models.get_model(name, weights=None, num_classes=NUM_CLASSES, **options), size)


def from_timm(name, size=32, **options):
    return lambda: (timm.create_model(name, pretrained=False, num_classes=NUM_CLASSES, **options), size)


def from_hugging_face(name, size=32, **options):
    def build():
        config = getattr(transformers, f"{name}Config")(num_labels=NUM_CLASSES, **options)
        module = getattr(transformers, f"{name}ForImageClassification")(config)
        return LogitsOf(module, lambda module, pixels: module(pixel_values=pixels).logits), size

    return build


def vision_transformer():
    sizes = {"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    return torchvision.models.VisionTransformer(num_classes=NUM_CLASSES, **sizes), 16


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CLASSIFIERS = {
    "torchvision resnet18": from_torchvision("resnet18"),
    "torchvision mobilenet_v3_small": from_torchvision("mobilenet_v3_small"),
    "torchvision vit": vision_transformer,
    "timm convnext": from_timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 16, 32)),
    "timm vit": from_timm("vit_tiny_patch16_224", 16, img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2),
    "timm mobilenetv2": from_timm("mobilenetv2_050"),
    "Hugging Face ViT": from_hugging_face("ViT", 16, image_size=16, patch_size=8, **SMALL),
    "Hugging Face ResNet": from_hugging_face("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    "Hugging Face Swin": from_hugging_face(
        "Swin", 16, image_size=16, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2
    ),
}


def spread_logits(model, inputs, spread=3.0):
    """Draw the last layer anew: some libraries begin it with zeros, and logits that hardly differ show nothing."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    model.eval()
    with torch.no_grad():
        last.weight.normal_()
        last.weight.mul_(spread / model(inputs).std(1).mean())
    return model


def snapshot(model):
    flags = [module.training for module in model.modules()]
    own = [set(vars(module)) for module in model.modules()]
    grads = [parameter.grad for parameter in model.parameters()]
    return flags, own, grads, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def check_against_definition(model, inputs, reference=None):
    """The eigenvalue of the deployed function, from a module in training mode that comes back untouched."""
    model.eval()
    with sdpa_kernel(SDPBackend.MATH):
        expected = top_eigenvalue(fisher_by_scores(reference or model, inputs))
    model.train()
    before = snapshot(model)
    exact = fisher_spectral_norm(model, inputs, solver=Exact()).eigenvalue
    found = fisher_spectral_norm(model, inputs, solver=Lanczos())
    torch.testing.assert_close(exact, expected, rtol=1e-6, atol=0)
    assert bool((found.eigenvalue <= expected * (1 + 1e-9)).all())
    torch.testing.assert_close(found.eigenvalue, expected, rtol=1e-2, atol=0)
    assert bool(found.converged.all())
    flags, own, grads, state = snapshot(model)
    assert (flags, own, grads) == before[:3]
    torch.testing.assert_close(state, before[3], rtol=0, atol=0)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_image_classifiers_of_three_libraries_agree_with_the_definition(name):
    torch.manual_seed(0)
    model, size = CLASSIFIERS[name]()
    inputs = torch.rand(2, 3, size, size, dtype=torch.float64)
    check_against_definition(spread_logits(model.double(), inputs), inputs)


class Text(nn.Module):
    """A pre-norm encoder over embedded tokens with a padding mask and a pooled head."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)

    def forward(self, embedded):
        padding = torch.tensor([False] * 4 + [True] * 2).expand(len(embedded), -1)
        return self.head(self.encoder(embedded, src_key_padding_mask=padding)[:, 0])


class Fused(nn.Module):
    """Attention straight from the fused function."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x):
        query, key, value = self.qkv(x)[:, None].chunk(3, -1)
        return self.head(nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)[:, 0].mean(1))


class Viewing(nn.Module):
    """Activations in place, and ``view``, which refuses another memory layout."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.head = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Linear(4 * 36, 5)

    def forward(self, x):
        x.mul_(2)
        hidden = self.relu(self.conv(x))
        return self.head(hidden.view(len(x), -1))


class TwoInputs(nn.Module):
    """An image and a number in, a dictionary out."""

    def __init__(self):
        super().__init__()
        self.image, self.number = nn.Linear(6, 5), nn.Linear(1, 5)

    def forward(self, image, number):
        return {"logits": self.image(image).tanh() + self.number(number), "image": image}


class Nested(nn.Module):
    """Logits inside a named tuple."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.SiLU(inplace=True), nn.Linear(8, 5))

    def forward(self, x):
        return Output(self.layers(x), None)


def channels_last():
    return torchvision.models.squeezenet1_1(num_classes=5).to(memory_format=torch.channels_last)


ODD_MODULES = {
    "encoder layer with a mask": (Text, (3, 6, 8)),
    "fused causal attention": (Fused, (3, 6, 8)),
    "in place, with view": (Viewing, (3, 3, 8, 8)),
    "several inputs, dictionary output": (
        lambda: LogitsOf(TwoInputs(), lambda module, x: module(x, x.new_ones(len(x), 1))["logits"]),
        (3, 6),
    ),
    "named tuple output": (lambda: LogitsOf(Nested(), lambda module, x: module(x).logits), (3, 6)),
    "compiled": (lambda: torch.compile(Nested().layers, backend="eager"), (3, 6)),
    "channels last": (channels_last, (2, 3, 32, 32)),
}


@pytest.mark.parametrize("name", ODD_MODULES)
def test_modules_with_odd_insides_agree_with_the_definition(name):
    torch.manual_seed(0)
    build, shape = ODD_MODULES[name]
    model = build().double()
    inputs = torch.randn(shape, dtype=torch.float64)
    kept = inputs.clone()
    check_against_definition(model, inputs, lambda x: model(x.clone()))
    torch.testing.assert_close(inputs, kept, rtol=0, atol=0)


def test_embeddings_of_a_language_model_are_inputs():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, max_position_embeddings=8, num_labels=3, **SMALL, attn_implementation="sdpa"
    )
    module = transformers.BertForSequenceClassification(config).double()
    tokens = torch.tensor([[2, 5, 9, 7, 3, 0], [2, 8, 3, 0, 0, 0]])
    embedded = module.get_input_embeddings()(tokens).detach()

    def logits(module, embedded):
        mask = (tokens != 0).long()[: len(embedded)]
        return module(inputs_embeds=embedded, attention_mask=mask).logits

    first = embedded[:1]
    check_against_definition(spread_logits(LogitsOf(module, logits), first), first)
    both = fisher_spectral_norm(LogitsOf(module, logits), embedded).eigenvalue
    torch.testing.assert_close(both[:1], fisher_spectral_norm(LogitsOf(module, logits), first).eigenvalue)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_computed_in_single_precision(dtype):
    torch.manual_seed(0)
    model = Nested().layers.to(dtype)
    inputs = torch.randn(3, 6).to(dtype)
    result = fisher_spectral_norm(model, inputs)
    promoted = Nested().layers
    promoted.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    expected = top_eigenvalue(fisher_by_scores(promoted.double(), inputs.double()))
    torch.testing.assert_close(result.eigenvalue.double(), expected, rtol=1e-5, atol=0)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
