"""What a user sees where a model, its outputs or a batch are not what is expected: what was called, and the remedy."""

import re
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fisher_reg as fr
from fisher_reg.callbacks.batch import find_inputs
from tests import cases

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def _says(error, *parts):
    return pytest.raises(error, match="(.|\n)*".join(re.escape(part) for part in parts))


class Returning(nn.Module):
    """A network whose forward returns something made of its logits."""

    def __init__(self, make):
        super().__init__()
        self.network = cases.tiny_network()
        self.make = make

    def forward(self, x):
        return self.make(self.network(x))


Output = namedtuple("Output", ["loss", "logits"])


@pytest.mark.parametrize(
    ("make", "returned", "remedy"),
    [
        (lambda z: {"logits": z, "features": z}, "'logits': a tensor of shape (4, 4)", "module(x)['logits']"),
        (lambda z: {"emb": z[0], "out": z}, "dict with {'emb'", "module(x)['out']"),
        (lambda z: {"class_logits": z, "box": z}, "dict with", "module(x)['class_logits']"),
        (lambda z: (z.sum(), z), "tuple of [a tensor of shape ()", "module(x)[1]"),
        (lambda z: SimpleNamespace(logits=z), "SimpleNamespace", "module(x).logits"),
        (lambda z: Output(z.sum(), z), "Output of", "module(x).logits"),
        (lambda z: z[..., None, None].expand(-1, -1, 5, 5), "(4, 4, 5, 5)", "module(x).flatten(2).mean(2)"),
        (lambda z: z[:, None].expand(-1, 7, -1), "(4, 7, 4). There is one prediction per position", "module(x)[:, -1]"),
        (lambda z: z[:, 0], "(4,). One number per example", "module(x)[:, None]"),
        (lambda z: z[0], "(4,)", "module(x)[:, None]"),
        (lambda z: z[:3], "(3, 4). The first axis", "module((x, None))"),
        (lambda z: None, "NoneType", "module(x).logits"),
    ],
)
@pytest.mark.parametrize("measure", [fr.fisher_spectral_norm, fr.KLPenalty(), fr.fisher_trace])
def test_other_outputs_than_logits_are_described_with_the_way_to_the_logits(make, returned, remedy, measure):
    head = "Returning.forward, called with inputs (4, 6) torch.float32, must return logits"
    with _says(ValueError, head, returned, f"logits_fn=lambda module, x: {remedy}", "LogitsOf(module, logits_fn)"):
        measure(Returning(make).eval(), X)


def test_one_output_is_a_label_or_a_regression():
    with _says(ValueError, "Returning.forward", "K = 1", "likelihood=Bernoulli() for", "likelihood=Gaussian() for"):
        fr.fisher_spectral_norm(Returning(lambda z: z[:, :1]), X)
    with _says(ValueError, "K = 1, with likelihood=Gaussian() for a regression"):
        fr.fisher_spectral_norm(Returning(lambda z: z[:, 0]), X, likelihood=fr.Gaussian())
    fr.fisher_spectral_norm(Returning(lambda z: z[:, :1]), X, likelihood=fr.Gaussian())


def test_predicted_classes_are_no_logits():
    with _says(ValueError, "Returning.forward", "it returned torch.int64", "before argmax"):
        fr.fisher_spectral_norm(Returning(lambda z: z.argmax(1, keepdim=True).expand(-1, 4)), X)


def test_a_function_is_named_too():
    def my_network(x):
        return {"z": x}

    with _says(ValueError, "my_network, called with inputs (4, 6)", "module(x)['z']"):
        fr.fisher_spectral_norm(my_network, X)
    with _says(ValueError, "The logits_fn of Linear, called with inputs (4, 6)"):
        fr.fisher_spectral_norm(fr.LogitsOf(nn.Linear(6, 3), lambda module, x: {}), X)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("measure", [fr.fisher_spectral_norm, fr.KLPenalty(), fr.fisher_bound])
def test_integer_inputs_are_converted_and_divided_only_if_the_model_does_not(dtype, measure):
    remedy = "inputs.float(), and divide as in training only if the model does not"
    with _says(ValueError, f"{dtype} (2, 6)", remedy, "Token ids", "embeddings") as caught:
        measure(cases.tiny_network(), torch.zeros(2, 6, dtype=dtype))
    assert "255" not in str(caught.value)


def test_inputs_that_are_no_batch_are_refused_with_the_remedy():
    with _says(ValueError, "got list", "inputs_fn=lambda batch: batch[0]"):
        fr.fisher_spectral_norm(cases.tiny_network(), [X])
    with _says(ValueError, "got shape (6,)", "inputs[:, None]"):
        fr.fisher_spectral_norm(cases.tiny_network(), X[0])


IMAGES = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("batch", "remedy"),
    [
        (["id", X, torch.zeros(4)], "inputs_fn=lambda batch: batch[1]"),
        ([torch.arange(4), X], "inputs_fn=lambda batch: batch[1]"),
        (((X, X), torch.zeros(4)), "inputs_fn=lambda batch: batch[0][0]"),
        ({"left": X, "right": X}, "inputs_fn=lambda batch: batch['left']"),
        ({"data": {"pixels": X}}, "inputs_fn=lambda batch: batch['data']['pixels']"),
        (SimpleNamespace(x=X, y=torch.zeros(4)), "inputs_fn=lambda batch: batch.x"),
        ((IMAGES.byte(), torch.zeros(2)), "inputs_fn=lambda batch: batch[0].float()"),
        ({"image": IMAGES.byte()}, "inputs_fn=lambda batch: batch['image'].float()"),
        ((torch.zeros(2, 7).long(), torch.zeros(2)), "Token ids have no derivative: pass their embeddings"),
    ],
)
def test_a_batch_in_another_form_is_described_with_the_inputs_fn_for_it(batch, remedy):
    with _says(MisconfigurationException, "The inputs cannot be found in this batch", remedy) as caught:
        find_inputs(batch)
    assert "255" not in str(caught.value)


class NoForward(cases.Plain):
    forward = cases.pl.LightningModule.forward

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        pass


class TakesBatch(NoForward):
    def forward(self, batch):
        x, _, _ = batch if isinstance(batch, tuple) else batch.unbind(0)
        return self.network(x)


class TakesKeys(NoForward):
    def forward(self, batch):
        return self.network(batch["image"])


class Flattens(cases.Plain):
    """Its step makes the inputs ``(B, 2, 3)`` of the batch to vectors."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0].flatten(1), batch[1]), batch_idx)

    def validation_step(self, batch, batch_idx):
        pass


def _batches(shape=(6,)):
    return DataLoader(TensorDataset(torch.randn(4, *shape), torch.zeros(4, dtype=torch.long)), batch_size=4)


KINDS = [
    (NoForward, (6,), "NoForward.forward, called with inputs", "(4, 6) torch.float32", "The module has no forward"),
    (TakesBatch, (6,), "TakesBatch.forward, called with inputs", "(4, 6)", "module((x, None))"),
    (TakesKeys, (6,), "TakesKeys.forward, called with inputs", "(4, 6)", "inputs_fn=lambda batch"),
    (Flattens, (2, 3), "Flattens.forward, called with inputs", "(4, 2, 3)", "module(x.flatten(1))"),
]


@pytest.mark.parametrize(("kind", "shape", "head", "size", "remedy"), KINDS)
@pytest.mark.parametrize(
    "callback",
    [
        fr.FisherRegularizer,
        lambda: fr.FisherRegularizer(use_running_statistics=True, batch_fraction=1.0),
        fr.FisherMonitor,
    ],
)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_an_error_in_forward_says_what_was_called_with_what(
    tmp_path, kind, shape, head, size, remedy, callback, batch_norm
):
    trainer = cases.trainer(tmp_path, callbacks=[callback()])
    with _says(fr.ForwardError, head, size, remedy) as caught:
        trainer.fit(kind(cases.tiny_network(batch_norm)), _batches(shape), _batches(shape))
    assert caught.value.__cause__ is not None
    assert str(caught.value.__cause__) in str(caught.value)


def test_the_remedies_work(tmp_path):
    for kind, shape, logits_fn in (
        (NoForward, (6,), lambda module, x: module.network(x)),
        (TakesBatch, (6,), lambda module, x: module((x, None, None))),
        (Flattens, (2, 3), lambda module, x: module(x.flatten(1))),
    ):
        callbacks = [fr.FisherRegularizer(logits_fn=logits_fn), fr.FisherMonitor(logits_fn=logits_fn, bounds=())]
        trainer = cases.trainer(tmp_path, callbacks=callbacks)
        trainer.fit(kind(cases.tiny_network()), _batches(shape), _batches(shape))
        assert trainer.callback_metrics["fisher/penalty"] >= 0


def test_what_this_package_refuses_inside_a_forward_is_no_error_of_the_model():
    with _says(ValueError, "no per-example Fisher matrix exists") as caught:
        fr.fisher_spectral_norm(nn.BatchNorm1d(6, track_running_stats=False), X)
    assert not isinstance(caught.value, fr.ForwardError)


def test_errors_in_functions_keep_their_cause():
    with _says(fr.ForwardError, "Linear.forward, called with inputs (4, 6)", "RuntimeError: mat1") as caught:
        fr.fisher_spectral_norm(nn.Linear(3, 2), X)
    assert isinstance(caught.value.__cause__, RuntimeError)
    with _says(fr.ForwardError, "Module.forward", "has no forward"):
        fr.fisher_spectral_norm(nn.Module(), X)
