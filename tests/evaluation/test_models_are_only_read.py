"""No call of this package changes the model that it is given, nor anything of the process."""

import copy
import pickle
import random
import threading

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.testing import assert_close

from fisher_reg import (
    BlackBox,
    BoundPenalty,
    Exact,
    FisherMonitor,
    FisherRegularizer,
    FisherSpectralNorm,
    FisherTrace,
    GradientNormPenalty,
    KLPenalty,
    LabelContrastPenalty,
    Lanczos,
    NuclearNormPenalty,
    PowerIteration,
    SpectralPenalty,
    TracePenalty,
    blackbox_spectral_norm,
    blockwise_fisher_bound,
    certified_radius,
    check_model,
    fisher_bound,
    fisher_effective_rank,
    fisher_eigenpairs,
    fisher_spectral_norm,
    fisher_trace,
    lipschitz_bound,
    local_fisher_bound,
    universal_spectral_norm,
)
from tests import cases
from tests.evaluation import zoo
from tests.evaluation.state import changes, form_of, reached_from, state_of, state_of_the_process
from tests.evaluation.zoo import BATCH_SIZE, CLASSES, ZOO


def _checked(model, x):
    findings = check_model(model, x).findings
    assert findings[0].passed, findings[0].detail
    return ()


def _blackbox(model, x):
    predict = lambda question: model(question).softmax(1)  # noqa: E731
    result = blackbox_spectral_norm(predict, x, estimator=BlackBox(8))
    return (result.eigenvalue.nan_to_num(),)  # NaN where fixed dropout leaves constant answers


def _metric(metric):
    def updated(model, x):
        metric.reset()
        metric.update(model, x)
        return (metric.compute(),)

    return updated


def _penalty(penalty, **options):
    def differentiated(model, x):
        value = penalty(model, x, generator=torch.Generator().manual_seed(0), **options)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        gradients = torch.autograd.grad(value, weights, allow_unused=True) if weights else ()
        return (value.detach(), *(gradient for gradient in gradients if gradient is not None))

    return differentiated


LABELS = torch.arange(BATCH_SIZE) % CLASSES

ESTIMATES = {
    "spectral norm": lambda model, x: (fisher_spectral_norm(model, x).eigenvalue,),
    "spectral norm, exact": lambda model, x: (fisher_spectral_norm(model, x, solver=Exact()).eigenvalue,),
    "spectral norm, Lanczos": lambda model, x: (fisher_spectral_norm(model, x, solver=Lanczos()).eigenvalue,),
    "spectral norm, power": lambda model, x: (fisher_spectral_norm(model, x, solver=PowerIteration(3)).eigenvalue,),
    "eigenpairs": lambda model, x: (fisher_eigenpairs(model, x, 2).eigenvalue,),
    "effective rank": lambda model, x: (fisher_effective_rank(model, x),),
    "trace": lambda model, x: (fisher_trace(model, x),),
    "universal": lambda model, x: (universal_spectral_norm(model, [x, x.flip(0)]).eigenvalue,),
    "check": _checked,
    "black box": _blackbox,
    "metric of the norm": _metric(FisherSpectralNorm()),
    "metric of the trace": _metric(FisherTrace()),
}
BOUNDS = {
    "bound": lambda model, x: (torch.tensor(fisher_bound(model, x).log10_value),),
    "Lipschitz bound": lambda model, x: (torch.tensor(lipschitz_bound(model, x).log10_value),),
    "local bound": lambda model, x: (local_fisher_bound(model, x).log10_value,),
    "blockwise bound": lambda model, x: (blockwise_fisher_bound(model, x).log10_value,),
    "certified radius": lambda model, x: (certified_radius(model, x),),
}
PENALTIES = {
    "KL penalty": _penalty(KLPenalty()),
    "spectral penalty": _penalty(SpectralPenalty()),
    "spectral penalty, 3 steps": _penalty(SpectralPenalty(3)),
    "trace penalty": _penalty(TracePenalty()),
    "label penalty": _penalty(LabelContrastPenalty(), labels=LABELS),
    "gradient norm penalty": _penalty(GradientNormPenalty(), labels=LABELS),
    "nuclear norm penalty": _penalty(NuclearNormPenalty(bounds=None), labels=LABELS),
    "bound penalty": _penalty(BoundPenalty()),
}
CALLS = ESTIMATES | BOUNDS | PENALTIES


@pytest.fixture(autouse=True)
def _one_core():
    """Layers this small are slower on several."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


_CERTIFIED = ("bound", "Lipschitz bound", "local bound", "certified radius", "bound penalty")
_REFUSALS = (ValueError, NotImplementedError, RuntimeError)


def _refused(calls, message):
    return dict.fromkeys(calls, message)


_NO_RULE = _refused((name for name in _CERTIFIED if name != "local bound"), "No bound rule")  # that needs none
_NO_CONSTANT = _refused(("bound", "Lipschitz bound", "bound penalty"), "no global Lipschitz constant")
_ALL_BUT_CHECK = tuple(name for name in ESTIMATES if name not in ("check", "black box"))
REFUSALS = {
    "batch_norm_without_tracking": {
        **_refused(_ALL_BUT_CHECK, "keeps no running statistics"),
        **_refused(("check",), "keeps no running statistics"),
        **_refused(BOUNDS, "depends on the other examples"),
    },
    "batch_norm_of_two_calls": _refused(("bound penalty",), "called 2 times"),
    "noise_in_every_mode": {
        **_refused(_ALL_BUT_CHECK, "random, also in evaluation"),
        **_refused((*_CERTIFIED, "blockwise bound"), "random, also in evaluation"),
    },
    "bfloat16": _refused(("black box",), "only rounding errors"),
    "multi_head_attention": _NO_CONSTANT,
    **dict.fromkeys(("transformer_layer", "transformer"), _NO_CONSTANT),
    **dict.fromkeys(("frozen_script", "optimized_script"), _refused((*BOUNDS, "bound penalty"), "TorchScript")),
    "buffers_that_move": _refused((*BOUNDS, "bound penalty"), "or changes its own buffers"),
    "failing": _refused((*BOUNDS, "bound penalty"), "random, also in evaluation|fails on inputs|depends on the other"),
    "scripted_batch_norm": _NO_RULE | _refused(PENALTIES, "fixed inside a TorchScript module"),
    **dict.fromkeys(
        (
            "rnn",
            "lstm",
            "gru",
            "rnn_cell",
            "lstm_cell",
            "gru_cell",
            "scripted",
            "traced",
            "with_a_scripted_part",
            "hooks",
            "a_hook_that_writes_to_a_list_of_its_module",
            "a_hook_that_writes_to_a_list_of_its_own",
            "a_hook_that_counts_in_a_variable_of_its_own",
            "a_forward_of_the_instance",
        ),
        _NO_RULE,
    ),
}
"""The calls that say of these modules why they give no number; all others give one."""


def _check_call(call, model, x, refusal):
    if refusal is None:
        values = CALLS[call](model, x)
        assert all(bool(torch.isfinite(value).all()) for value in values)
        return
    with pytest.raises((*_REFUSALS, AssertionError), match=refusal):
        CALLS[call](model, x)


def _problems(name, model, x, expected):
    """Make every call, and tell of each one that changes something or does not end as it should."""
    problems = []
    for call in CALLS:
        before, process, inputs = state_of(model), state_of_the_process(), x.clone()
        try:
            _check_call(call, model, x, expected.get(call))
        except BaseException as error:  # also the failure of pytest.raises
            problems.append(f"{name}, {call}: {type(error).__name__}: {str(error)[:300]}")
        found = changes(before, state_of(model)) + changes(process, state_of_the_process())
        problems += [f"{name}, {call} changes {change}" for change in found[:4]]
        if not torch.equal(x, inputs) or x.requires_grad or x.grad is not None:
            problems.append(f"{name}, {call} changes its inputs")
    return problems


@pytest.mark.parametrize("name", ZOO)
def test_no_call_changes_a_model_or_the_process(name):
    with ZOO[name]() as (model, x):
        assert _problems(name, model, x, REFUSALS.get(name, {})) == []


def test_no_call_changes_a_distributed_model(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert _problems("distributed", *zoo.distributed_data_parallel(), {}) == []
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("setting", ["no_grad", "inference_mode", "autocast", "float64"])
def test_no_call_changes_the_settings_that_it_is_made_in(setting):
    contexts = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }
    refusals = REFUSALS["transformer"]
    if setting == "autocast":
        refusals = refusals | _refused(("black box",), "must return float32 or float64")
    with ZOO["transformer"]() as (model, x):
        if setting == "float64":
            model, x = model.double(), x.double()
            torch.set_default_dtype(torch.float64)
        try:
            with contexts.get(setting, torch.enable_grad)():
                assert _problems(setting, model, x, refusals) == []
        finally:
            torch.set_default_dtype(torch.float32)


# An exception inside the forward


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_no_exception_leaves_a_change_behind(error):
    fuse = zoo.Failing.fuse
    with ZOO["failing"]() as (model, x):
        raised = 0
        for num_before in (0, 1, 2, 5):
            for call, function in CALLS.items():
                before, process = state_of(model), state_of_the_process()
                fuse[:] = [error, num_before]
                try:
                    function(model, x)
                except (*_REFUSALS, AssertionError, KeyboardInterrupt) as caught:
                    raised += "inside the forward" in f"{caught} {caught.__context__}"
                finally:
                    has_burnt = fuse[1] < 0
                    fuse.clear()
                assert has_burnt or num_before > 0, call
                found = changes(before, state_of(model)) + changes(process, state_of_the_process())
                assert found == [], (call, num_before)
        assert raised > len(CALLS)  # some calls run the forward but once


# Threads


_IN_THREADS = (
    "spectral norm",
    "spectral norm, Lanczos",
    "trace",
    "universal",
    "check",
    "black box",
    "bound",
    "local bound",
    "KL penalty",
    "spectral penalty",
)
_SHARED = (
    "batch_norm_2d",
    "dropout",
    "numbers_of_own_generators",
    "numbers_of_the_global_generators",
    "lstm",
    "transformer_layer",
    "parametrized_by_spectral_norm",
    "old_spectral_norm",
    "scripted",
    "compiled",
    "notes_in_python_attributes",
    "buffers_that_move",
    "hooks",
)


def _agree(value, expected):
    """TorchScript optimises the calls of each thread anew, which rounds otherwise."""
    return torch.allclose(value, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", _SHARED)
def test_four_threads_get_the_numbers_of_one_and_change_nothing(name):
    refusals = REFUSALS.get(name, {})
    calls = [call for call in _IN_THREADS if call not in refusals]
    with ZOO[name]() as (model, x):
        expected = {call: CALLS[call](model, x) for call in calls}
        before, process = state_of(model), state_of_the_process()
        problems, start = [], threading.Barrier(4)

        def work(first):
            start.wait()
            for call in (calls[first:] + calls[:first]) * 2:
                try:
                    values = CALLS[call](model, x)
                    if not all(_agree(*pair) for pair in zip(values, expected[call], strict=True)):
                        problems.append(f"{call}: {values[0]} instead of {expected[call][0]}")
                except Exception as error:
                    problems.append(f"{call}: {type(error).__name__}: {error}")

        threads = [threading.Thread(target=work, args=(2 * index % len(calls),)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert problems == []
        assert changes(before, state_of(model)) + changes(process, state_of_the_process()) == []


# The comparison itself


def _replaced_buffer(model):
    model[1].running_mean = model[1].running_mean.clone()


def _hook(model):
    model[0].register_forward_hook(lambda *_: None)


def _written(model):
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.clone())


@pytest.mark.parametrize(
    "change",
    [
        _replaced_buffer,
        _hook,
        _written,
        lambda model: model.eval(),
        lambda model: model[0].requires_grad_(False),
        lambda model: model[0].weight.grad.zero_(),
        lambda model: setattr(model[0].weight, "grad", None),
        lambda model: setattr(model[1], "running_mean", None),
        lambda model: setattr(model[2], "forward", model[2].forward),
        lambda model: setattr(model[2], "__class__", nn.ReLU),
        lambda model: model[2].notes["list"].append(1),
        lambda model: model[2].cell(),
        lambda model: model[2].lock.acquire(),
        lambda model: model[2].random.random(),
    ],
)
def test_the_comparison_sees_a_change_of_the_model(change):
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh())
    model(torch.randn(3, 5)).sum().backward()
    count = 0

    def cell():
        nonlocal count
        count += 1

    model[2].notes, model[2].cell, model[2].lock = {"list": []}, cell, threading.Lock()
    model[2].random = random.Random(0)
    before = state_of(model)
    assert changes(before, state_of(model)) == []
    change(model)
    assert changes(before, state_of(model)) != []


@pytest.mark.parametrize(
    "change", [lambda: torch.rand(1), random.random, np.random.rand, lambda: torch.set_grad_enabled(False)]
)
def test_the_comparison_sees_a_change_of_the_process(change):
    before = state_of_the_process()
    assert changes(before, state_of_the_process()) == []
    with torch.enable_grad():
        change()
        assert changes(before, state_of_the_process()) != []


# Callbacks


class _Tokens(nn.Module):
    """Takes the vectors of the batches as three tokens."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.layer(x.view(-1, 3, 2))[0][:, -1])


def _vectors(*layers):
    return nn.Sequential(nn.Linear(6, 4), *layers, nn.Tanh(), zoo.Frozen(0.5), nn.Linear(4, 4))


_NETWORKS = {
    "batch norm": lambda: _vectors(nn.BatchNorm1d(4)),
    "dropout": lambda: _vectors(nn.Dropout(0.3)),
    "notes": lambda: _vectors(zoo.Remembering()),
    "buffers that move": lambda: _vectors(zoo.Averaging()),
    "functional batch norm": lambda: _vectors(zoo.OwnBatchNorm()),
    "spectral norm": lambda: _vectors(nn.utils.spectral_norm(nn.Linear(4, 4))),
    "LSTM": lambda: _Tokens(nn.LSTM(2, 4, batch_first=True)),
}
_CALLBACKS = {
    "monitor": lambda: [FisherMonitor(bounds=(fisher_bound,))],
    "regularizer": lambda: [FisherRegularizer(1e-20, every_n_steps=1, batch_fraction=1.0)],
    "regularizer, twice": lambda: [FisherRegularizer(1e-20, SpectralPenalty(), every_n_steps=1, batch_fraction=1.0)],
    "both": lambda: [FisherMonitor(), FisherRegularizer(1e-20, every_n_steps=1, batch_fraction=1.0)],
}


_COPIES = []


def _copy(module):
    state = {name: value.clone() for name, value in module.state_dict().items()}
    _COPIES.extend([(copy.deepcopy(module), state), (pickle.loads(pickle.dumps(module)), state)])


class _CopiedInTheStep(cases.Plain):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        _copy(self)
        return loss


class _CopiedAfterTheStep(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        _copy(pl_module)


def _module(name, module_type=cases.Plain):
    torch.manual_seed(1)
    module = module_type(_NETWORKS[name]())
    for part in module.modules():
        part.training = not isinstance(part, zoo.Frozen)
    module(torch.zeros(2, 6))
    return module


def _fit(folder, module, callbacks):
    torch.manual_seed(2)
    trainer = cases.trainer(folder, callbacks=callbacks)
    trainer.fit(module, cases.tiny_batches(), cases.tiny_batches(seed=1))
    return trainer


@pytest.mark.parametrize("callbacks", _CALLBACKS)
def test_a_fit_with_a_callback_leaves_the_module_as_one_without(tmp_path, callbacks):
    problems = []
    for name in _NETWORKS:
        plain, module = _module(name), _module(name)
        trainer = _fit(tmp_path, plain, [])
        settings = state_of_the_process()
        watched = _fit(tmp_path, module, _CALLBACKS[callbacks]())
        # both fits begin with the same seed and draw the same numbers
        found = changes(settings, state_of_the_process()) + changes(form_of(plain), form_of(module))
        problems += [f"{name}: {change}" for change in found]
        assert set(vars(watched.strategy)) == set(vars(trainer.strategy)), name
        assert any(key.startswith("fisher/") for key in watched.callback_metrics), name
    assert problems == []


@pytest.mark.parametrize("callbacks", ["monitor", "regularizer", "regularizer, twice"])
@pytest.mark.parametrize("name", ["batch norm", "dropout", "notes", "buffers that move", "LSTM"])
def test_a_module_that_is_copied_during_a_fit_is_whole_and_knows_nothing_of_it(tmp_path, name, callbacks):
    _COPIES.clear()
    module = _module(name, _CopiedInTheStep)
    _fit(tmp_path, module, [*_CALLBACKS[callbacks](), _CopiedAfterTheStep()])
    copies = list(_COPIES)
    assert len(copies) == 8  # two ways, twice in each of two steps
    before = state_of(module)
    for copied, state in (copies[0], copies[-1]):  # inside the first step, and after the last one
        assert type(copied) is _CopiedInTheStep
        assert not reached_from(copied) & reached_from(module)
        assert_close(copied.state_dict(), state, rtol=0, atol=0)
        assert set(vars(copied)) == set(vars(module))
        alone = _module(name)
        alone.load_state_dict(state)
        _fit(tmp_path, alone, [])
        trainer = _fit(tmp_path, copied, [])
        assert not any(key.startswith("fisher/") for key in trainer.callback_metrics)
        assert_close(copied.state_dict(), alone.state_dict(), rtol=0, atol=0)
        assert not all(torch.equal(weight, state[key]) for key, weight in copied.named_parameters())
        assert changes(before, state_of(module)) == []
    _COPIES.clear()
