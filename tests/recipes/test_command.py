"""What the command line takes, completes and refuses."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from recipes.data.sources import Digits
from recipes.models.runs import check_unused
from recipes.runtime import arguments
from recipes.runtime.command import CONF, command_line, composed, in_folder
from recipes.runtime.mistakes import message
from recipes.runtime.provenance import _without_folder, commit, provenance

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted((CONF / "experiment").glob("*/*.yaml"))
RECIPES = sorted(path.stem for path in CONF.glob("*.yaml"))


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("data.num_train=300", "data.num_train", 300),
        ("+data.num_train=300", "data.num_train", 300),
        ("++data.num_train=300", "data.num_train", 300),
        ("data.batch_size=8", "data.batch_size", 8),
        ("callbacks.monitor.every_n_epochs=2", "callbacks.monitor.every_n_epochs", 2),
        ("trainer.limit_train_batches=3", "trainer.limit_train_batches", 3),
        ("trainer.max_epochs=3", "trainer.max_epochs", 3),
        ("penalty.target_lambda=0.5", "penalty.target_lambda", 0.5),
        ("optimizer.weight_decay=0.1", "optimizer.weight_decay", 0.1),
    ],
)
def test_a_parameter_of_the_target_needs_no_plus(override, key, value):
    assert OmegaConf.select(composed("train", [override]), key) == value


def test_parameters_of_a_factory_are_those_of_the_one_that_was_chosen():
    factory = ["~model", "model._target_=torchvision.models.resnet18", "model.num_classes=10"]
    assert composed("evaluate", factory).model == {"_target_": "torchvision.models.resnet18", "num_classes": 10}
    assert composed("train", ["data=npz", "data.path=x", "data.sha256=a"]).data.sha256 == "a"
    with pytest.raises(ValueError, match="data has no sha256"):
        composed("train", ["data.sha256=a"])


@pytest.mark.parametrize(
    ("override", "text"),
    [
        (
            "data.num_trian=300",
            "data has no num_trian. Did you mean data.num_train\\?",
        ),
        ("+data.num_trian=300", "data has no num_trian"),
        ("trainer.max_epoch=3", "trainer has no max_epoch. Did you mean trainer.max_epochs"),
        ("penalty.weigth=3", "Did you mean penalty.weight"),
        ("data.colour=red", "data has no colour. .*Digits takes image_size,.*num_train"),
        ("+ckpt_path=nonexistent", "recipes.train has no ckpt_path. It has callbacks, data,"),
        ("+attack=pgd", "recipes.train has no attack. It has"),
        ("seeed=1", "recipes.train has no seeed. Did you mean seed\\? It has callbacks"),
        ("modle=vit", "recipes.train has no modle. Did you mean model\\?"),
        ("callbacks.x=1", "callbacks has no x. It has checkpoint, monitor. Add one with \\+callbacks.x="),
        ("callbacks.monitr=null", "callbacks has no monitr. Did you mean callbacks.monitor"),
        ("penalty.penalty.step=1", "no settings below penalty.penalty. .* set penalty.penalty._target_=… first"),
        ("seed.x=1", "seed.x cannot be set: the configuration has no settings below seed"),
        (
            "experiment=compare/cpu",
            "belongs to another recipe: python -m recipes.compare experiment=compare/cpu.*: smoke",
        ),
        ("experiment=frontier", "python -m recipes.compare_penalties experiment=frontier"),
    ],
)
def test_a_name_that_nothing_knows_is_refused_with_those_that_are_known(override, text):
    with pytest.raises(ValueError, match=text):
        composed("train", [override])


def test_an_object_is_built_where_the_yaml_has_none_once_its_target_is_given():
    given = ["penalty.penalty._target_=fisher_reg.KLPenalty", "penalty.penalty.step=0.3"]
    assert composed("train", given).penalty.penalty == {"_target_": "fisher_reg.KLPenalty", "step": 0.3}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes(recipe):
    assert composed(recipe, ["seed=1"] if "seed" in composed(recipe) else [])


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_need_neither_a_folder_nor_a_plus(path):
    recipe = path.parent.name
    config = composed(recipe, [f"experiment={path.stem}"])
    assert config == composed(recipe, [f"+experiment={recipe}/{path.stem}"])
    assert config != composed(recipe)


def test_flags_and_sweeps_pass_through():
    given = ["--multirun", "model=vgg,resnet", "data.num_train=300,400", "hydra.sweep.dir=x", "trainer.max_epochs=1,2"]
    done = ["--multirun", "model=vgg,resnet", "++data.num_train=300,400", "hydra.sweep.dir=x", "trainer.max_epochs=1,2"]
    assert arguments.completed(CONF, "train", given) == done
    assert arguments.completed(CONF, "train", ["--help", "nonsense=1"]) == ["--help", "nonsense=1"]


def test_folders_of_a_sweep_are_named_by_what_is_swept():
    done = arguments.completed(
        CONF, "train", ["-m", "data.num_train=300,400", "seed=1", "~callbacks.monitor", "hydra.verbose=true"]
    )
    assert done[-1] == "hydra.job.config.override_dirname.exclude_keys=['seed','callbacks.monitor']"
    assert OverridesParser.create().parse_override(done[-1]).value() == ["seed", "callbacks.monitor"]
    assert arguments.completed(CONF, "train", ["-m", *done[1:]]) == done


@pytest.mark.parametrize(
    ("overrides", "sweeper", "name"),
    [
        ("model=vgg,penalty=kl,seed=0", "basic", "vgg_kl_seed0"),
        ("++data.num_train=300,+a.b=c/d,seed=1", "basic", "num_train300_bc-d_seed1"),
        ("model.layers=[1,0,0],penalty.weight=1e-05", "basic", "layers-1-0-0_weight1e-05"),
        ("penalty=kl", "optuna", "kl_7"),  # which may try it twice
        ("", "basic", "7"),
    ],
)
def test_a_run_of_a_sweep_has_a_short_name(overrides, sweeper, name):
    assert arguments.run_name(overrides, 7, sweeper) == name


def test_a_printed_command_means_the_same_after_the_shell_and_hydra():
    for folder in ("outputs/train/2026-01-01_10-00-00", "runs/model=vgg,seed=1", 'a b/it"s {x}'):
        words = shlex.split(command_line("evaluate", run=folder))
        assert words[:3] == ["python", "-m", "recipes.evaluate"]
        override = OverridesParser.create().parse_override(words[3])
        assert (override.key_or_group, override.value()) == ("run", folder)


def test_the_folder_of_a_resumed_run_is_hydras_own(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no run.*Pass the folder"):
        in_folder("resume")([f"resume={tmp_path}"])
    (tmp_path / "config.yaml").touch()
    assert in_folder("resume")([f"resume={tmp_path}"])[1:] == [f"hydra.run.dir={tmp_path}", "hydra.output_subdir=null"]
    assert in_folder("resume")(["seed=1"]) == ["seed=1"]


def test_the_command_that_goes_on_with_a_training_is_quoted(tmp_path):
    folder = tmp_path / "a b=c"
    folder.mkdir()
    (folder / "config.yaml").touch()
    with pytest.raises(ValueError, match='python -m recipes.train \'resume="[^"]*a b=c"\''):
        check_unused(folder)


def test_what_our_code_refuses_is_told_and_the_same_error_of_others_is_not(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ValueError, match="already has a training") as caught:
        check_unused(tmp_path)
    assert message(caught.value) == str(caught.value)
    with pytest.raises(ValueError, match="could not convert") as caught:
        torch.nn.Linear(float("x"), 2)
    assert message(caught.value) is None


def test_what_cannot_be_built_is_told_in_one_line():
    with pytest.raises(InstantiationException) as caught:
        instantiate({"_target_": "recipes.data.sources.Digits", "num_trian": 3})
    assert "unexpected keyword argument 'num_trian'" in message(caught.value)
    with pytest.raises(InstantiationException) as caught:
        instantiate({"_target_": "torch.nn.Linear", "in_features": -1, "out_features": 1})
    assert message(caught.value) is None


def test_provenance_names_no_folder_and_holds_the_digest():
    digits, numbers = ({"_target_": f"recipes.data.sources.{name}"} for name in ("Digits", "Numbers"))
    found = provenance(OmegaConf.create({"seeds": [0, 1], "device": "cpu", "datasets": {"a": digits, "b": numbers}}))
    assert (found["seed"], found["environment"]["device"]) == ([0, 1], "cpu")
    assert found["data"]["a"] != found["data"]["b"]
    assert provenance({"data": digits})["data"] == found["data"]["a"] == Digits().digest()
    assert provenance({})["data"] == {}
    assert str(ROOT) not in json.dumps(found)
    assert found["commit"] == commit()


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("run=/home/my user/b c=d/run 1", "run=run 1"),
        ('run="/home/me/run"', "run=run"),
        ("data.path=x.npz", "data.path=x.npz"),
        ("/usr/lib/recipes/train.py", "train.py"),
        ("trainer.max_epochs=3", "trainer.max_epochs=3"),
        ("datasets={a: {path: /home/me/x.npz}}", "datasets={a: {path: x.npz}}"),
    ],
)
def test_the_recorded_command_has_no_folder_of_the_machine(word, kept):
    assert _without_folder(word) == kept


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["-m", "penalty=glob(k*)"], ["-m", "penalty=glob(k*)"]),
        (["-m", "seed=range(3)"], ["-m", "seed=range(3)"]),
        (["hydra.searchpath=[file://elsewhere]", "model=mine"], ["hydra.searchpath=[file://elsewhere]", "model=mine"]),
        (["--config-dir", "elsewhere", "model=mine"], ["--config-dir", "elsewhere", "model=mine"]),
        (["-m", "seed=0,1", "model=vgg,resnet"], ["-m", "seed=0,1", "model=vgg,resnet"]),
        (["-m", "seed=0,1,0"], ["-m", "seed=0,1,0", "hydra.sweep.subdir=${hydra.job.num}"]),
        (["-m", "optimizer.lr=1e-3,0.001"], ["-m", "optimizer.lr=1e-3,0.001", "hydra.sweep.subdir=${hydra.job.num}"]),
        (["-m", "seed=0,0", "hydra.sweep.subdir=x"], ["-m", "seed=0,0", "hydra.sweep.subdir=x"]),
    ],
)
def test_what_hydra_can_do_is_left_to_it_and_folders_of_a_sweep_differ(given, wanted):
    assert arguments.completed(CONF, "train", given) == wanted


@pytest.mark.parametrize("penalties", ["trace,kl", "kl,trace"])
def test_an_option_that_some_choices_of_a_sweep_name_holds_for_all(penalties):
    done = arguments.completed(CONF, "train", ["-m", f"penalty={penalties}", "penalty.every_n_steps=2"])
    assert done[:3] == ["-m", f"penalty={penalties}", "++penalty.every_n_steps=2"]


@pytest.mark.parametrize("penalties", ["none,kl", "kl,none"])
def test_an_option_that_one_choice_of_a_sweep_cannot_have_is_refused(penalties):
    with pytest.raises(ValueError, match="penalty has no weight. It has nothing"):
        arguments.completed(CONF, "train", ["-m", f"penalty={penalties}", "penalty.weight=0.1"])
