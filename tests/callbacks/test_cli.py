from importlib import import_module

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from fisher_reg import (
    Categorical,
    ConstantSchedule,
    FisherMonitor,
    FisherRegularizer,
    KLPenalty,
    Lanczos,
    LinearSchedule,
    LInf,
    MarginTempered,
    blockwise_fisher_bound,
    fisher_bound,
    local_fisher_bound,
)
from tests.callbacks import yaml_functions

NAMESPACES = ("pytorch_lightning", "lightning.pytorch")

FUNCTIONS = yaml_functions.__name__

NESTED = f"""
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: fisher_reg.FisherMonitor
      init_args:
        num_samples: 8
        solver: {{class_path: fisher_reg.Lanczos, init_args: {{num_steps: 5}}}}
        geometry: {{class_path: fisher_reg.LInf}}
        likelihood: {{class_path: fisher_reg.MarginTempered, init_args: {{margin: 2.0}}}}
        bounds: [fisher_reg.blockwise_fisher_bound, fisher_reg.local_fisher_bound]
        inputs_fn: {FUNCTIONS}.images
        logits_fn: {FUNCTIONS}.logits
    - class_path: fisher_reg.FisherRegularizer
      init_args:
        weight: 0.2
        penalty:
          class_path: fisher_reg.KLPenalty
          init_args: {{step: 0.3, likelihood: fisher_reg.Categorical}}
        schedule: {{class_path: fisher_reg.LinearSchedule, init_args: {{end: 0.1}}}}
        inputs_fn: {FUNCTIONS}.images
        labels_fn: {FUNCTIONS}.labels
"""


def run_cli(namespace, *args):
    class Classifier(import_module(namespace).LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, inputs):
            return self.layer(inputs)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch["image"]), batch["label"])

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

        def train_dataloader(self):
            generator = torch.Generator().manual_seed(0)
            images = torch.randn(8, 6, generator=generator)
            return DataLoader([{"image": image, "label": k % 4} for k, image in enumerate(images)], batch_size=4)

        val_dataloader = train_dataloader

    command_line = import_module(f"{namespace}.cli").LightningCLI
    return command_line(Classifier, args=list(args), save_config_callback=None)


def fisher_callbacks(trainer):
    return [callback for callback in trainer.callbacks if isinstance(callback, FisherMonitor | FisherRegularizer)]


def assert_as_in_nested(monitor, regularizer):
    assert monitor.num_samples == 8
    assert monitor.solver == Lanczos(num_steps=5)
    assert monitor.likelihood == MarginTempered(margin=2.0)
    assert monitor.geometry == LInf()
    assert monitor.bounds == (blockwise_fisher_bound, local_fisher_bound)
    assert monitor.inputs_fn is yaml_functions.images
    assert monitor.logits_fn is yaml_functions.logits
    assert regularizer.weight == 0.2
    assert regularizer.penalty == KLPenalty(step=0.3)
    assert regularizer.schedule == LinearSchedule(end=0.1)
    assert regularizer.labels_fn is yaml_functions.labels


@pytest.fixture
def nested(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["main.py"])  # LightningCLI warns of other arguments than its own
    path = tmp_path / "config.yaml"
    path.write_text(NESTED)
    return path


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_the_callbacks_belong_to_each_namespace(namespace):
    callback = import_module(namespace).Callback
    assert issubclass(FisherMonitor, callback)
    assert issubclass(FisherRegularizer, callback)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_nested_yaml_trains(namespace, nested):
    cli = run_cli(namespace, "fit", f"--config={nested}")
    monitor, regularizer = fisher_callbacks(cli.trainer)
    assert_as_in_nested(monitor, regularizer)
    assert monitor.history[0]["fisher/lambda_max_mean"] > 0
    assert "fisher/bound_local_mean" in monitor.history[0]
    assert cli.trainer.callback_metrics["fisher/penalty"] > 0


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_the_printed_config_gives_the_same_callbacks(namespace, nested, capsys):
    with pytest.raises(SystemExit, match="0"):
        run_cli(namespace, "fit", f"--config={nested}", "--print_config")
    nested.write_text(capsys.readouterr().out)
    cli = run_cli(namespace, "fit", f"--config={nested}", "--trainer.fast_dev_run=true")
    assert_as_in_nested(*fisher_callbacks(cli.trainer))


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_the_command_line_appends_a_callback_with_its_defaults(namespace, nested):
    cli = run_cli(
        namespace,
        "fit",
        "--trainer.fast_dev_run=true",
        "--trainer.accelerator=cpu",
        "--trainer.callbacks+=fisher_reg.FisherMonitor",
        "--trainer.callbacks.num_samples=8",
        f"--trainer.callbacks.inputs_fn={FUNCTIONS}.images",
        "--trainer.callbacks+=fisher_reg.FisherRegularizer",
        "--trainer.callbacks.weight=0.3",
    )
    monitor, regularizer = fisher_callbacks(cli.trainer)
    assert (monitor.num_samples, monitor.bounds, monitor.likelihood) == (8, (fisher_bound,), Categorical())
    assert (regularizer.weight, regularizer.penalty, regularizer.schedule) == (0.3, KLPenalty(), ConstantSchedule())


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_one_yaml_has_two_monitors(namespace, nested):
    second = (
        "    - class_path: fisher_reg.FisherMonitor\n"
        f"      init_args: {{prefix: second/, num_samples: 4, bounds: [], inputs_fn: {FUNCTIONS}.images}}\n"
    )
    nested.write_text(NESTED + second)
    cli = run_cli(namespace, "fit", f"--config={nested}")
    assert [callback.num_samples for callback in fisher_callbacks(cli.trainer)[::2]] == [8, 4]


CATALOGUE = {
    "solver": ("Exact", "HutchinsonMax", "Lanczos", "PowerIteration"),
    "geometry": ("L2", "LInf"),
    "likelihood": ("Bernoulli", "Categorical", "Gaussian", "MarginTempered"),
    "penalty": (
        "BoundPenalty",
        "GradientNormPenalty",
        "KLPenalty",
        "LabelContrastPenalty",
        "NuclearNormPenalty",
        "SpectralPenalty",
        "TracePenalty",
    ),
    "schedule": ("ConstantSchedule", "CosineSchedule", "LinearSchedule"),
}


@pytest.mark.parametrize(("argument", "name"), [(key, name) for key, names in CATALOGUE.items() for name in names])
def test_each_value_of_the_package_can_be_named(argument, name, nested):
    callback = "FisherMonitor" if argument in ("solver", "likelihood", "geometry") else "FisherRegularizer"
    cli = import_module("pytorch_lightning.cli").LightningCLI(
        run=False,
        args=[f"--trainer.callbacks+=fisher_reg.{callback}", f"--trainer.callbacks.{argument}=fisher_reg.{name}"],
        model_class=import_module("pytorch_lightning.demos.boring_classes").BoringModel,
        save_config_callback=None,
    )
    value = getattr(fisher_callbacks(cli.trainer)[0], argument)
    assert value == getattr(import_module("fisher_reg"), name)()


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_yaml_gives_the_standard_deviation_as_a_list(namespace, nested):
    nested.write_text(
        NESTED.replace("num_samples: 8", "num_samples: 8\n        input_std: [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]")
    )
    cli = run_cli(namespace, "fit", f"--config={nested}")
    assert cli.trainer.callbacks[0].history[0]["fisher/lambda_max_mean"] > 0


def test_hydra_gives_the_standard_deviation_as_a_list():
    config = OmegaConf.create({"_target_": "fisher_reg.FisherMonitor", "input_std": [0.5, 0.25]})
    assert torch.equal(torch.as_tensor(instantiate(config).input_std), torch.tensor([0.5, 0.25]))


def test_hydra_builds_both_callbacks_from_nested_targets():
    config = OmegaConf.create(
        {
            "monitor": {
                "_target_": "fisher_reg.FisherMonitor",
                "solver": {"_target_": "fisher_reg.Lanczos", "num_steps": 5},
                "likelihood": {"_target_": "fisher_reg.MarginTempered", "margin": 2.0},
                "geometry": {"_target_": "fisher_reg.LInf"},
                "bounds": [{"_target_": "hydra.utils.get_method", "path": "fisher_reg.local_fisher_bound"}],
                "inputs_fn": {"_target_": "hydra.utils.get_method", "path": f"{FUNCTIONS}.images"},
            },
            "regularizer": {
                "_target_": "fisher_reg.FisherRegularizer",
                "penalty": {"_target_": "fisher_reg.KLPenalty", "step": 0.3},
                "schedule": {"_target_": "fisher_reg.LinearSchedule", "end": 0.1},
            },
        }
    )
    monitor, regularizer = instantiate(config.monitor), instantiate(config.regularizer)
    assert monitor.geometry == LInf()
    assert (monitor.solver, monitor.likelihood) == (Lanczos(num_steps=5), MarginTempered(margin=2.0))
    assert (monitor.bounds, monitor.inputs_fn) == ((local_fisher_bound,), yaml_functions.images)
    assert (regularizer.penalty, regularizer.schedule) == (KLPenalty(step=0.3), LinearSchedule(end=0.1))
