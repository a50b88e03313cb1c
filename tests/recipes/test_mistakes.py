"""What a user gets wrong on the command line: one line that says what to do."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from recipes.runtime import arguments
from recipes.runtime.command import CONF, composed
from recipes.runtime.environment import chosen_device
from recipes.runtime.mistakes import message

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("recipe", "given", "said"),
    [
        ("train", ["penalty=klx"], "There is no penalty=klx. Choose one of bound, gradient_norm, jacobian, kl, "),
        ("train", ["hydra.run.x=1"], "hydra.run.x cannot be set: Hydra has no such setting"),
        ("train", ["+hydra.x=1"], "hydra has no x. It has defaults, mode, searchpath, run, "),
        ("train", ["hydra/launcher=nope"], "There is no hydra/launcher=nope. Choose one of basic"),
        ("train", ["-m", "model=vgg,vggx"], "There is no model=vggx. Choose one of densenet"),
        ("train", ["seed=1,2"], "To sweep over it, add --multirun"),
        ("train", ["model"], "model cannot be read: .* Write key=value or group=choice."),
        ("train", ["model=[vgg"], r"model=\[vgg cannot be read: "),
        ("train", ["experiment=smokes"], "There is no experiment=smokes. --help lists those that there are."),
        ("train", ["penalty=null"], "penalty=null is no configuration: write penalty=none."),
        ("train", ["experiment=null"], "experiment=null is no configuration: leave experiment out."),
        ("train", ["model=null"], "model=null is no configuration: choose one of densenet, "),
        ("train", ["~penalty"], "~penalty leaves recipes.train without penalty, which it needs. Leave ~penalty out."),
        ("train", ["data.num_train=x"], "data.num_train=x must be an integer or null."),
        ("train", ["data.batch_size=null"], "data.batch_size=null must be an integer."),
        ("train", ["trainer.max_epochs=many"], "trainer.max_epochs=many must be an integer or null."),
        ("train", ["trainer.max_epochs=1e3"], "trainer.max_epochs=1000.0 must be an integer or null."),
        ("train", ["optimizer.lr=high"], "optimizer.lr=high must be a number."),
        ("train", ["penalty.target_lambda=true"], "penalty.target_lambda=true must be a number or null."),
        ("train", ["model.layers=3"], r"model.layers=3 must be a list \(each an integer\)."),
        ("train", ["model.layers=[a]"], r"must be a list \(each an integer\)."),
        ("train", ["callbacks.monitor.input_std=x"], "input_std=x must be a number or a list .* or null."),
        ("train", ["seed=a"], "seed=a must be an integer; the default is 0."),
        ("train", ["-m", "seed=1,a"], "seed=a must be an integer; the default is 0."),
        ("bounds", ["tightness=often"], "tightness=often must be true or false; the default is true."),
        ("rank", ["seeds=3"], r"seeds=3 must be a list, as in seeds=\[3\]."),
        ("rank", ["seeds=[a]"], "must be a list of numbers."),
        ("rank", ["models=[x]"], "must be a list of mappings"),
        ("rank", ["solver=x"], "solver=x must be a mapping"),
        ("gpu_check", ["max_seconds.numbers=x"], "max_seconds.numbers=x must be a number; the default is 150.0."),
    ],
)
def test_a_wrong_override_is_refused_in_one_line_before_hydra_starts(recipe, given, said):
    with pytest.raises(ValueError, match=said) as caught:
        arguments.completed(CONF, recipe, given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        ["trainer.limit_train_batches=0.5"],
        ["trainer.max_time=00:01:00"],
        ["trainer.devices=[0,1]", "trainer.precision=16-mixed", "trainer.deterministic=warn"],
        ["callbacks.monitor.input_std=[0.1,0.2]", "callbacks.monitor.num_samples=null"],
        ["optimizer.lr=1", "seed=null", "model=vgg", "model.layers=[8,M]"],
        ["data_dir=5", "trainer.default_root_dir=${data_dir}", "seed=${data_dir}"],
        ["penalty.schedule={_target_: fisher_reg.LinearSchedule, num_steps: 3}"],
        ["+hydra.job.env_set.COLOUR=red", "hydra.verbose=true"],
        ["-m", "seed=range(3)", "penalty.weight=interval(0.1,1)", "hydra/launcher=basic"],
        ["--cfg", "job", "seed=1"],
        ["-m", "experiment=train/smoke,train/smoke"],
    ],
)
def test_values_of_the_right_type_are_taken(given):
    done = arguments.completed(CONF, "train", given)
    assert [text.lstrip("+") for text in done[: len(given)]] == [text.lstrip("+") for text in given]


def test_what_others_refuse_while_an_object_is_built_is_told_with_its_place(tmp_path):
    config = composed("train", ["trainer.accelerator=gpux", f"output_dir={tmp_path}"])
    with pytest.raises(InstantiationException) as caught:
        instantiate(config.trainer)
    assert message(caught.value).startswith("trainer: You selected an invalid accelerator name")


def test_a_batch_without_images_and_a_device_that_is_not_there_are_refused():
    with pytest.raises(InstantiationException, match="batch_size must be at least 1; got 0"):
        instantiate(composed("train", ["data.batch_size=0"]).data)
    with pytest.raises(ValueError, match="device=gpu is not known to torch: choose cpu, cuda, or null"):
        chosen_device("gpu")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["trainer.accelerator=gpux"], "trainer: You selected an invalid accelerator name"),
        (["data=npz"], "data.path has no value: give data.path=…"),
    ],
)
def test_the_command_ends_with_this_line_and_status_1(given, said, tmp_path):
    command = [sys.executable, "-m", "recipes.train", *given, f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(said)
    assert done.returncode == 1
