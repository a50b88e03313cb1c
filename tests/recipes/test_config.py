"""Every configuration composes and builds what it names."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from fisher_reg import (
    BoundPenalty,
    FisherRegularizer,
    KLPenalty,
    LabelContrastPenalty,
    SpectralPenalty,
    TracePenalty,
    blockwise_fisher_bound,
    fisher_bound,
    local_fisher_bound,
)

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
    OmegaConf.to_container(_compose(tmp_path, choice, *extra), resolve=True, throw_on_missing=True)


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if choice.startswith("model=")])
def test_models_are_built_for_the_data(tmp_path, choice, digits):
    assert instantiate(_compose(tmp_path, choice).model, spec=digits.spec)(
        digits.splits["test"].tensors[0][:2]
    ).shape == (2, 10)


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
