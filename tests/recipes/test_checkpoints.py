import argparse
import copy

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.testing import assert_close

from recipes.data.spec import ImageSpec
from recipes.models.checkpoints import built_network, check_network, load_weights

SPEC = ImageSpec(num_classes=3, num_channels=1, image_size=8, mean=(0.5,), std=(0.25,))


def _network(num_classes=3, width=4, kernel=3):
    return nn.Sequential(
        nn.Conv2d(1, width, kernel),
        nn.BatchNorm2d(width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, num_classes),
    )


class Module(pl.LightningModule):
    def __init__(self, network=None):
        super().__init__()
        self.backbone = network or _network()
        self.loss = nn.CrossEntropyLoss(weight=torch.ones(3))

    def forward(self, images):
        return self.backbone(images)


class Dictionary(nn.Module):
    def forward(self, images):
        return {"logits": images}


def _not_a_module():
    return 3


def _saved(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def _prefixed(weights, prefix):
    return {prefix + key: value for key, value in weights.items()}


def _config(target, normalize=None, checkpoint=None, **arguments):
    model = {"_target_": target, **arguments}
    return OmegaConf.create({"model": model, "checkpoint": checkpoint, "prefix": None, "normalize": normalize})


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": _prefixed(weights, "model.") | {"loss.weight": torch.ones(3)}, "epoch": 3},
        lambda weights: {"model": _prefixed(weights, "module."), "optimizer": {"state": {}}},
        lambda weights: {"model_state_dict": _prefixed(weights, "anything._orig_mod.")},
        lambda weights: {"state_dict": _prefixed(weights, "net.") | _prefixed(weights, "ema.")},
        lambda weights: {key: value for key, value in weights.items() if "num_batches" not in key},
    ],
    ids=["plain", "lightning", "torchvision", "compiled", "two equal copies", "without counters"],
)
def test_weights_are_found_wherever_they_are_kept(tmp_path, wrap):
    torch.manual_seed(1)
    source, network = _network(), _network()
    load_weights(network, _saved(tmp_path, wrap(source.state_dict())))
    assert_close(network.state_dict(), source.state_dict(), rtol=0, atol=0)


def test_a_checkpoint_of_lightnings_own_trainer_is_read(tmp_path):
    torch.manual_seed(1)
    module, network = Module(), _network()
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", default_root_dir=tmp_path)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    load_weights(network, tmp_path / "last.ckpt")
    assert_close(network.state_dict(), module.backbone.state_dict(), rtol=0, atol=0)
    whole = Module()
    load_weights(whole, tmp_path / "last.ckpt")
    assert_close(whole.state_dict(), module.state_dict(), rtol=0, atol=0)


def test_safetensors_are_read(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    torch.manual_seed(1)
    source, network = _network(), _network()
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    load_weights(network, tmp_path / "weights.safetensors")
    assert_close(network.state_dict(), source.state_dict(), rtol=0, atol=0)
    (tmp_path / "weights.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"weights\.safetensors is damaged"):
        load_weights(network, tmp_path / "weights.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            _network(kernel=5).state_dict(),
            r"another network: 1 keys .* '0.weight': \(4, 1, 5, 5\) in the file, \(4, 1, 3, 3\)",
        ),
        (_network(width=6).state_dict(), r"another network: 7 keys .* '0.weight': \(6, 1, 3, 3\) in the file"),
        (
            nn.Linear(2, 2).state_dict(),
            r"'0.weight': missing in the file, \(4, 1, 3, 3\) in the network.*Choose the factory",
        ),
        (_network().state_dict() | {"5.weight": torch.ones(2)}, r"'5.weight': unexpected, \(2,\) in the file"),
        (_network(num_classes=7).state_dict(), r"has 7 classes, the network was built for 3: .* from '4.weight' on"),
        (
            {"model": _network().state_dict(), "args": argparse.Namespace(lr=1)},
            r"argparse.Namespace was rejected.*state_dict\(\)",
        ),
        (_network(), r"torch.nn.modules.container.Sequential was rejected"),
        ({"epoch": 3}, r"must hold a state dict.* it holds a dict of \['epoch'\]"),
        (torch.ones(2), "it holds a Tensor"),
        (
            _prefixed(_network().state_dict(), "student.") | _prefixed(_network().state_dict(), "teacher."),
            r"several networks that fit, under \['student.', 'teacher.'\]; choose one with prefix=",
        ),
    ],
    ids=["kernel", "width", "architecture", "more", "classes", "objects", "module", "no weights", "tensor", "two"],
)
def test_a_file_that_does_not_fit_is_refused_and_the_network_untouched(tmp_path, content, message):
    network = _network()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=rf"weights\.pt (?s:.*){message}"):
        load_weights(network, _saved(tmp_path, content))
    assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_one_of_several_networks_is_chosen_by_its_prefix(tmp_path):
    student, teacher, network = _network(), _network(), _network()
    both = _prefixed(student.state_dict(), "student.") | _prefixed(teacher.state_dict(), "teacher.")
    load_weights(network, _saved(tmp_path, both), prefix="teacher.")
    assert_close(network.state_dict(), teacher.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("keep", [0, 40, 0.5, 0.99], ids=["empty", "start", "half", "almost all"])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = _saved(tmp_path, _network().state_dict())
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(ValueError, match=r"weights\.pt is damaged.*Copy or save it again") as caught:
        load_weights(_network(), path)
    assert "weights_only" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt; set its path with checkpoint="):
        load_weights(_network(), tmp_path / "nowhere.pt")


def test_only_a_factory_that_asks_for_the_spec_gets_it(tmp_path):
    ours = built_network(_config("recipes.models.zoo.vgg", layers=[4]), SPEC)
    assert ours(torch.zeros(1, 1, 8, 8)).shape == (1, 3)
    assert not ours.training
    linear = built_network(_config("torch.nn.Linear", in_features=2, out_features=5), SPEC)
    assert linear(torch.zeros(1, 2)).shape == (1, 5)


def test_normalisation_comes_before_the_loaded_weights(tmp_path):
    source = nn.Linear(2, 2)
    config = _config(
        "torch.nn.Linear",
        {"mean": [0.5], "std": [0.25]},
        str(_saved(tmp_path, source.state_dict())),
        in_features=2,
        out_features=2,
    )
    pixels = torch.rand(1, 1, 3, 2)
    assert_close(built_network(config, SPEC)(pixels), source((pixels - 0.5) / 0.25))


def test_a_factory_of_something_else_or_with_other_arguments_is_refused():
    with pytest.raises(ValueError, match=r"torch.nn.Linear rejected the arguments \['layers'\](?s:.*)after ~model"):
        built_network(_config("torch.nn.Linear", layers=3), SPEC)
    with pytest.raises(ValueError, match=r"_not_a_module must return a torch.nn.Module; it returned int"):
        built_network(_config(f"{__name__}._not_a_module"), SPEC)


def test_a_network_is_tried_on_one_image_before_any_work():
    network = _network().train()
    check_network(network, torch.rand(1, 1, 8, 8), 3)
    assert network.training
    with pytest.raises(ValueError, match=r"The network has K=3 outputs, the data 10 classes;.*num_classes=10"):
        check_network(network, torch.rand(1, 1, 8, 8), 10)
    with pytest.raises(ValueError, match=r"cannot take an image of shape \(3, 8, 8\)(?s:.*)to have 1 channels"):
        check_network(network, torch.rand(1, 3, 8, 8), 3)
    with pytest.raises((ValueError, TypeError), match="logits|Tensor|dict"):
        check_network(Dictionary(), torch.rand(1, 1, 8, 8), 3)
