"""Every configuration composes and builds what it names."""

import math
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from fisher_reg import (
    BoundPenalty,
    FisherRegularizer,
    GradientNormPenalty,
    KLPenalty,
    LabelContrastPenalty,
    NuclearNormPenalty,
    SpectralPenalty,
    TracePenalty,
    blockwise_fisher_bound,
    fisher_bound,
    local_fisher_bound,
)
from recipes.attacks import CarliniWagner, ProjectedGradient
from recipes.data.spec import ImageSpec

CONF = Path(__file__).parents[2] / "conf"
CHOICES = [
    f"{group.name}={choice.stem}"
    for group in sorted(path for path in CONF.iterdir() if path.is_dir())
    for choice in sorted(group.glob("*.yaml"))
]


def _compose(tmp_path, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [f"output_dir={tmp_path}", *overrides])


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_and_resolves(tmp_path, choice):
    extra = [f"data.path={tmp_path / 'x.npz'}"] if choice == "data=npz" else []
    added = "+" if choice.startswith(("attack=", "engine=")) else ""  # which recipes.train does not know
    OmegaConf.to_container(_compose(tmp_path, added + choice, *extra), resolve=True, throw_on_missing=True)


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if choice.startswith("attack=")])
def test_attacks_are_built_and_that_of_the_paper_is_the_papers(tmp_path, choice):
    attack = instantiate(_compose(tmp_path, f"+{choice}").attack)
    if choice == "attack=none":
        assert not attack
    elif choice == "attack=pgd":
        assert attack == ProjectedGradient(math.inf, 8 / 255, 20, 2 / 255)
    elif choice == "attack=carlini_wagner":
        assert attack == CarliniWagner(1.0, 20, 0.01, 1)
    else:
        assert callable(attack)


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if choice.startswith("data=")])
def test_data_are_built_or_say_where_their_files_belong(tmp_path, choice):
    extra = [f"data.path={tmp_path / 'x.npz'}"] if choice == "data=npz" else []
    config = _compose(tmp_path, choice, f"data_dir={tmp_path}", "+data.num_workers=1", *extra).data
    if "recipes.data.files" in config._target_ or choice == "data=npz":
        with pytest.raises(
            InstantiationException,
            match=f"FileNotFoundError.*There is no .* {tmp_path.resolve()}(.|\n)*data.(root|path)=…",
        ):
            instantiate(config)
    else:
        assert instantiate(config).num_workers == 1


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if choice.startswith("model=")])
def test_models_are_built_for_the_data(tmp_path, choice):
    model = _compose(tmp_path, choice).model
    channels, size = (3, 32) if "torchvision" in model._target_ else (1, 16)
    spec = ImageSpec(10, channels, size, (0.5,) * channels, (0.2,) * channels)
    assert instantiate(model, spec=spec)(torch.rand(2, channels, size, size)).shape == (2, 10)


def test_published_networks_refuse_grey_images(tmp_path):
    with pytest.raises(
        InstantiationException, match=r"vgg16 takes RGB images; the data has 1 channels.*num_channels=3"
    ):
        instantiate(_compose(tmp_path, "model=vgg16").model, spec=ImageSpec(10, 1, 32, (0.5,), (0.2,)))


def test_callbacks_loggers_and_penalties_are_built(tmp_path):
    config = _compose(tmp_path)
    assert instantiate(config.callbacks.monitor).bounds == (fisher_bound,)
    bounds = (fisher_bound, local_fisher_bound, blockwise_fisher_bound)
    assert instantiate(_compose(tmp_path, "callbacks=all_bounds").callbacks.monitor).bounds == bounds
    assert {type(instantiate(logger)).__name__ for logger in config.logger.values()} == {
        "TensorBoardLogger",
        "CSVLogger",
    }
    assert isinstance(instantiate(config.trainer, logger=False), pl.Trainer)
    built = {"kl": KLPenalty, "spectral": SpectralPenalty, "trace": TracePenalty, "jacobian": TracePenalty}
    built |= {"gradient_norm": GradientNormPenalty, "nuclear_norm": NuclearNormPenalty}
    for choice, penalty in (built | {"bound": BoundPenalty, "label_contrast": LabelContrastPenalty}).items():
        regularizer = instantiate(_compose(tmp_path, f"penalty={choice}").penalty)
        assert isinstance(regularizer, FisherRegularizer)
        assert isinstance(regularizer.penalty, penalty)
    assert not _compose(tmp_path, "penalty=none").penalty
    recommended, default = instantiate(_compose(tmp_path).penalty), FisherRegularizer()
    assert (recommended.weight, recommended.every_n_steps) == (default.weight, default.every_n_steps)


def test_an_unknown_value_is_named_by_hydra(tmp_path):
    with pytest.raises(HydraException, match=r"Could not find 'model/lenet'(.|\n)*vit"):
        _compose(tmp_path, "model=lenet")
    with pytest.raises(HydraException, match="weigth"):
        _compose(tmp_path, "penalty.weigth=3")
