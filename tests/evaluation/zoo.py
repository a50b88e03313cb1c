"""Small modules of every kind that keeps a state or draws random numbers, each with a batch of inputs."""

from __future__ import annotations

import contextlib
import random
import tempfile
import threading
import warnings
from collections.abc import Callable, Generator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from fisher_reg import LogitsOf

Case = tuple[nn.Module, Tensor]
BATCH_SIZE, CLASSES = 3, 3
ZOO: dict[str, Callable[[], contextlib.AbstractContextManager[Case]]] = {}


def case(build: Callable[[], Case]) -> Callable[[], Case]:
    """Register what makes a module and a batch; it always makes the same ones."""

    @contextlib.contextmanager
    def opened() -> Generator[Case, None, None]:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what torch wants to see replaced, and is still used
            warnings.simplefilter("ignore", DeprecationWarning)
            model, inputs = build()
        _use(model, inputs)
        yield model, inputs

    ZOO[build.__name__.strip("_")] = opened
    return build


def _use(model: nn.Module, inputs: Tensor) -> None:
    """Leave a module as it is in the middle of a training: with gradients, statistics, modes and frozen weights."""
    parts = [part for part in model.modules() if hasattr(part, "training")]
    for part in parts:
        part.training = not isinstance(part, Frozen)
    loss = model(inputs).float().sum()
    if loss.requires_grad:  # not that of a frozen script
        loss.backward()
        list(model.parameters())[-1].requires_grad_(False)


class Frozen(nn.Dropout):
    """A layer that stays in evaluation mode."""


def randn(*shape: int) -> Tensor:
    return torch.randn(BATCH_SIZE, *shape)


def of_vectors(layer: nn.Module | None = None) -> Case:
    middle = nn.Identity() if layer is None else layer
    return nn.Sequential(nn.Linear(5, 4), middle, nn.Tanh(), Frozen(0.5), nn.Linear(4, CLASSES)), randn(5)


def of_lines(layer: nn.Module) -> Case:
    head = (nn.Tanh(), Frozen(0.5), nn.Flatten(), nn.Linear(4 * 4, CLASSES))
    return nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), layer, *head), randn(2, 4)


def of_images(layer: nn.Module) -> Case:
    head = (nn.Tanh(), Frozen(0.5), nn.Flatten(), nn.Linear(4 * 9, CLASSES))
    return nn.Sequential(nn.Conv2d(2, 4, 2), layer, *head), randn(2, 4, 4)


def of_volumes(layer: nn.Module) -> Case:
    head = (nn.Tanh(), Frozen(0.5), nn.Flatten(), nn.Linear(4 * 8, CLASSES))
    return nn.Sequential(nn.Conv3d(2, 4, 2), layer, *head), randn(2, 3, 3, 3)


class OfTokens(nn.Module):
    """Logits of the last output of a recurrent layer or an attention over tokens."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.num_arguments = 3 if isinstance(layer, nn.MultiheadAttention) else 1
        self.gives_several = isinstance(layer, nn.MultiheadAttention | nn.RNNBase)
        self.frozen = Frozen(0.5)
        self.head = nn.Linear(layer.bidirectional * 4 + 4 if hasattr(layer, "bidirectional") else 4, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        outputs = self.layer(*[tokens] * self.num_arguments)
        return self.head(self.frozen(outputs[0][:, -1] if self.gives_several else outputs[:, -1]))


class OfSteps(nn.Module):
    """Logits of the state of a recurrent cell after the tokens."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell
        self.frozen = Frozen(0.5)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        state = None
        for token in tokens.unbind(1):
            state = self.cell(token, state)
        return self.head(self.frozen(state[0] if isinstance(state, tuple) else state))


def of_tokens(layer: nn.Module, kind: type[nn.Module] = OfTokens) -> Case:
    return kind(layer), randn(3, 4)


# Normalisations


@case
def batch_norm_1d() -> Case:
    return of_vectors(nn.BatchNorm1d(4))


@case
def batch_norm_1d_of_lines() -> Case:
    return of_lines(nn.BatchNorm1d(4, momentum=None))


@case
def batch_norm_2d() -> Case:
    return of_images(nn.BatchNorm2d(4))


@case
def batch_norm_2d_without_affine() -> Case:
    return of_images(nn.BatchNorm2d(4, affine=False))


@case
def batch_norm_3d() -> Case:
    return of_volumes(nn.BatchNorm3d(4))


@case
def batch_norm_without_tracking() -> Case:
    return of_vectors(nn.BatchNorm1d(4, track_running_stats=False))


@case
def batch_norm_of_two_calls() -> Case:
    shared = nn.BatchNorm1d(4)
    return of_vectors(nn.Sequential(shared, nn.Tanh(), nn.Linear(4, 4), shared))


class OwnBatchNorm(nn.Module):
    """Calls the function on buffers of its own, one of which is no part of the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4), persistent=False)
        self.scale = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.batch_norm(hidden, self.mean, self.variance, self.scale, training=self.training)


@case
def functional_batch_norm() -> Case:
    return of_vectors(OwnBatchNorm())


@case
def sync_batch_norm() -> Case:
    return of_images(nn.SyncBatchNorm(4))


@case
def instance_norm_with_tracking() -> Case:
    return of_images(nn.InstanceNorm2d(4, affine=True, track_running_stats=True))


@case
def instance_norm() -> Case:
    return of_lines(nn.InstanceNorm1d(4))


@case
def group_norm() -> Case:
    return of_images(nn.GroupNorm(2, 4))


@case
def layer_norm() -> Case:
    return of_vectors(nn.LayerNorm(4))


@case
def rms_norm() -> Case:
    return of_vectors(nn.RMSNorm(4))


@case
def local_response_norm() -> Case:
    return of_images(nn.LocalResponseNorm(2))


# Noise


@case
def dropout() -> Case:
    return of_vectors(nn.Dropout(0.3))


@case
def dropout_1d() -> Case:
    return of_lines(nn.Dropout1d(0.3))


@case
def dropout_2d() -> Case:
    return of_images(nn.Dropout2d(0.3))


@case
def dropout_3d() -> Case:
    return of_volumes(nn.Dropout3d(0.3))


@case
def alpha_dropout() -> Case:
    return of_vectors(nn.AlphaDropout(0.3))


@case
def feature_alpha_dropout() -> Case:
    return of_images(nn.FeatureAlphaDropout(0.3))


@case
def random_slopes() -> Case:
    return of_vectors(nn.RReLU())


class Noisy(nn.Module):
    """Scales by a number that it draws in training."""

    def __init__(self, draw: Callable[[], float], **held: object) -> None:
        super().__init__()
        self.draw = draw
        self.held = held

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * (1 + self.draw(**self.held)) if self.training else hidden


@case
def numbers_of_an_own_torch_generator() -> Case:
    def draw(generator: torch.Generator) -> Tensor:
        return torch.rand((), generator=generator)

    return of_vectors(Noisy(draw, generator=torch.Generator().manual_seed(3)))


@case
def numbers_of_own_generators() -> Case:
    def draw(python: random.Random, numpy: np.random.Generator, old: np.random.RandomState) -> float:
        return python.random() + float(numpy.random()) + float(old.rand())

    return of_vectors(
        Noisy(draw, python=random.Random(3), numpy=np.random.default_rng(3), old=np.random.RandomState(3))
    )


@case
def numbers_of_the_global_generators() -> Case:
    return of_vectors(Noisy(lambda: random.random() + float(np.random.rand()) + float(torch.rand(()))))


class NoisyInEveryMode(nn.Module):
    """Forgets to say in which mode it is."""

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.dropout(hidden, 0.3)


@case
def noise_in_every_mode() -> Case:
    return of_vectors(NoisyInEveryMode())


# Recurrent layers and attention


@case
def rnn() -> Case:
    return of_tokens(nn.RNN(4, 4, batch_first=True))


@case
def lstm() -> Case:
    return of_tokens(nn.LSTM(4, 4, num_layers=2, dropout=0.3, bidirectional=True, batch_first=True))


@case
def gru() -> Case:
    return of_tokens(nn.GRU(4, 4, batch_first=True))


@case
def rnn_cell() -> Case:
    return of_tokens(nn.RNNCell(4, 4), OfSteps)


@case
def lstm_cell() -> Case:
    return of_tokens(nn.LSTMCell(4, 4), OfSteps)


@case
def gru_cell() -> Case:
    return of_tokens(nn.GRUCell(4, 4), OfSteps)


@case
def multi_head_attention() -> Case:
    return of_tokens(nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True))


@case
def transformer_layer() -> Case:
    return of_tokens(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True))


@case
def transformer() -> Case:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)
    return of_tokens(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))


class Checkpointed(nn.Module):
    """Computes its activations again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3))

    def forward(self, hidden: Tensor) -> Tensor:
        return checkpoint(self.part, hidden, use_reentrant=False)


@case
def checkpointed_activations() -> Case:
    return of_vectors(Checkpointed())


# Weights that are not simply there


@case
def parametrized_by_spectral_norm() -> Case:
    return of_vectors(parametrizations.spectral_norm(nn.Linear(4, 4)))


@case
def parametrized_by_weight_norm() -> Case:
    return of_vectors(parametrizations.weight_norm(nn.Linear(4, 4)))


@case
def parametrized_by_an_orthogonal_matrix() -> Case:
    return of_vectors(parametrizations.orthogonal(nn.Linear(4, 4)))


@case
def old_spectral_norm() -> Case:
    return of_vectors(nn.utils.spectral_norm(nn.Linear(4, 4)))


@case
def old_weight_norm() -> Case:
    return of_vectors(nn.utils.weight_norm(nn.Linear(4, 4)))


@case
def pruned() -> Case:
    return of_vectors(prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5))


@case
def tied_weights() -> Case:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return of_vectors(nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), first))


@case
def lazy_after_its_first_call() -> Case:
    model, inputs = of_vectors(nn.LazyLinear(4))
    model(inputs)
    return model, inputs


@case
def bfloat16() -> Case:
    model, inputs = of_vectors(nn.LayerNorm(4))
    return model.bfloat16(), inputs.bfloat16()


# Compiled, traced, exported and wrapped ones


@case
def scripted() -> Case:
    model, inputs = of_vectors(nn.Sequential(nn.Dropout(0.3), nn.LayerNorm(4)))
    return torch.jit.script(model), inputs


@case
def traced() -> Case:
    model, inputs = of_vectors(nn.LayerNorm(4))
    return torch.jit.trace(model.eval(), inputs), inputs


@case
def frozen_script() -> Case:
    model, inputs = of_vectors(nn.BatchNorm1d(4))
    return torch.jit.freeze(torch.jit.script(model.eval())), inputs


@case
def optimized_script() -> Case:
    model, inputs = of_vectors(nn.BatchNorm1d(4))
    return torch.jit.optimize_for_inference(torch.jit.script(model.eval())), inputs


@case
def scripted_batch_norm() -> Case:
    model, inputs = of_vectors(nn.BatchNorm1d(4))
    return torch.jit.script(model), inputs


@case
def with_a_scripted_part() -> Case:
    return of_vectors(torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3))))


@case
def exported() -> Case:
    model, inputs = of_vectors(nn.LayerNorm(4))
    model.eval()  # else dropout becomes a part of it
    size = {0: torch.export.Dim("batch", min=1, max=64)}
    return torch.export.export(model, (inputs,), dynamic_shapes=(size,)).module(), inputs


@case
def compiled() -> Case:
    model, inputs = of_vectors(nn.BatchNorm1d(4))
    return torch.compile(model, backend="eager"), inputs


@case
def compiled_in_place() -> Case:
    model, inputs = of_vectors(nn.Dropout(0.3))
    model.compile(backend="eager")
    return model, inputs


@case
def with_a_compiled_part() -> Case:
    return of_vectors(torch.compile(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), backend="eager"))


@case
def data_parallel() -> Case:
    model, inputs = of_vectors(nn.BatchNorm1d(4))
    return nn.DataParallel(model), inputs


def distributed_data_parallel() -> Case:
    """Not in the zoo, since it needs a process group."""
    torch.manual_seed(0)
    model, inputs = of_vectors(nn.BatchNorm1d(4))
    wrapped = nn.parallel.DistributedDataParallel(model)
    _use(wrapped, inputs)
    return wrapped, inputs


@case
def logits_of_another_output() -> Case:
    model, inputs = of_vectors(nn.BatchNorm1d(4))
    return LogitsOf(model, lambda module, x: {"logits": module(x)}["logits"]), inputs


# What a user's own module holds


class Failing(nn.Module):
    """Raises at a certain call, over all its copies; a list holds what is raised and how many calls are left."""

    fuse: ClassVar[list[Any]] = []

    def forward(self, hidden: Tensor) -> Tensor:
        if self.fuse:
            error, calls_left = self.fuse
            self.fuse[1] = calls_left - 1
            if calls_left == 0:
                raise error("inside the forward")
        return hidden


@case
def failing() -> Case:
    return of_vectors(nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.3), Averaging(), Failing()))


class Holding(nn.Module):
    """Uses things that cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        self.file.write(b"something")
        self.event = threading.Event()
        self.names = (name for name in ("a", "b"))

    def forward(self, hidden: Tensor) -> Tensor:
        with self.lock:
            return hidden + self.file.fileno() * 0


@case
def a_lock_and_an_open_file() -> Case:
    return of_vectors(Holding())


class Remembering(nn.Module):
    """Keeps notes in a dict, a list, a set, an array, a counter and a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, object] = {"nested": {"sizes": []}}
        self.seen: list[Tensor] = []
        self.sizes: set[int] = set()
        self.array = np.zeros(2)
        self.tensor = torch.zeros(2)
        self.count = 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.count += 1
        self.seen.append(hidden.detach())
        self.sizes.add(self.count)
        self.array += 1
        self.tensor += 1
        self.cache["last"] = hidden.detach()
        self.cache["nested"]["sizes"].append(len(self.seen))
        return hidden.sin()


@case
def notes_in_python_attributes() -> Case:
    return of_vectors(Remembering())


class Averaging(nn.Module):
    """Moves one buffer in place and replaces another one, in every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("replaced", torch.zeros(4))
        self.register_buffer("absent", None)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            self.average.lerp_(hidden.detach().mean(0), 0.1)
            self.replaced = 0.9 * self.replaced + 0.1 * hidden.detach().mean(0)
        return hidden - self.average.clone() - self.replaced


@case
def buffers_that_move() -> Case:
    return of_vectors(Averaging())


class Hooked(nn.Module):
    """Has hooks of both kinds on its layer: a method of itself, which counts, and functions that change values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.count = 0
        factor = nn.Parameter(torch.tensor(1.5))
        self.factor = factor
        self.layer.register_forward_hook(self.counted)
        self.layer.register_forward_hook(lambda module, inputs, output: output * factor)
        self.layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.1,))
        self.layer.register_full_backward_hook(lambda module, before, after: None)
        self.layer.register_forward_hook(lambda module, args, kwargs, output: None, with_kwargs=True, always_call=True)

    def counted(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.count += 1

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layer(hidden)


@case
def hooks() -> Case:
    return of_vectors(Hooked())


@case
def a_hook_that_writes_to_a_list_of_its_module() -> Case:
    layer = nn.Linear(4, 4)
    layer.seen = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        module.seen.append(output.detach())

    layer.register_forward_hook(note)
    return of_vectors(layer)


@case
def a_hook_that_writes_to_a_list_of_its_own() -> Case:
    layer, seen = nn.Linear(4, 4), []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    return of_vectors(layer)


@case
def a_hook_that_counts_in_a_variable_of_its_own() -> Case:
    layer, count = nn.Linear(4, 4), 0

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal count
        count += 1

    layer.register_forward_hook(note)
    return of_vectors(layer)


@case
def a_forward_of_the_instance() -> Case:
    layer = nn.Linear(4, 4)
    layer.count = 0

    def forward(hidden: Tensor) -> Tensor:
        layer.count += 1
        return nn.functional.linear(hidden, layer.weight, layer.bias)

    layer.forward = forward
    return of_vectors(layer)


@case
def operations_in_place() -> Case:
    model, inputs = of_vectors(nn.ReLU(inplace=True))
    return nn.Sequential(nn.ELU(inplace=True), *model), inputs
