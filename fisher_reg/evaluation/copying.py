"""A structural copy of a model that shares its parameters. A Fisher pass runs it instead of the user's module.

The copy has the same classes. Its parameters are those of the user, so that gradients reach them; or, if no gradient of
a weight is needed, constants that share their storage. It has its own flags, buffers, containers, hooks and random
generators, so that a forward writes only to these. Functions and methods that refer to a copied module refer to its
copy instead.

Besides the parameters, the copy shares objects that cannot be copied (a lock, an open file, a process group), objects
with a finaliser (``__del__``), large NumPy arrays, data sets, optimisers and the trainer. A forward that writes to
these, or to a parameter, changes the user's objects.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import random
import sys
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from fisher_reg.evaluation.precision import at_least_float32


class Copier:
    """Copies a model and everything that it reaches, each object once.

    Args:
        dtype: Precision of the floating-point tensors of the copy; None keeps theirs, but promotes half precision to
            float32. A parameter of another precision is replaced by its conversion, through which gradients pass.
        has_constant_weights: Whether a parameter is replaced by one that shares its storage and requires no gradient. A
            graph then saves nothing for gradients of weights. Subclasses of parameters are shared unchanged, since
            their data may be stored elsewhere.

    Attributes:
        modules: Pairs of a module and its copy.
        generators: Copies of the random generators that the model holds.
        promoted: Whether a tensor was converted.
    """

    def __init__(self, dtype: torch.dtype | None = None, has_constant_weights: bool = False) -> None:
        self.dtype = dtype
        self.has_constant_weights = has_constant_weights
        self.modules: list[tuple[nn.Module, nn.Module]] = []
        self.generators: list[Any] = []
        self.promoted = False
        self._tensors: list[Tensor] = []
        self._copies: dict[int, Any] = {}
        self._methods: dict[type, Callable[[Copier, Any], Any] | None] = {}
        self._cells: dict[int, types.CellType] = {}
        self._num_open_modules = 0
        self._originals: list[Any] = []  # kept alive, so that no id is used twice

    def __call__(self, value: Any) -> Any:
        """Return the copy of ``value``, or ``value`` itself where it is shared."""
        kind: Any = type(value)
        if kind not in self._methods:
            self._methods[kind] = _method_for(kind)
        copy_of_kind = self._methods[kind]
        if copy_of_kind is None:
            return value
        known = self._copies.get(id(value))
        if known is not None:
            return known
        return self._remember(value, copy_of_kind(self, value))

    def root(self, model: Any) -> Any:
        """Return the copy of a model; a callable that holds no module is its own copy."""
        return self._reached(model)

    def origins(self) -> dict[int, int]:
        """Return the identity of the original of each copied tensor, by the identity of the copy."""
        return {id(self._copies[id(original)]): id(original) for original in self._tensors}

    def _remember(self, value: Any, copied: Any) -> Any:
        self._copies[id(value)] = copied
        self._originals.append(value)
        return copied

    # Tensors

    def _tensor(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise ValueError(
                "The model has lazy layers whose weights do not exist yet. Call it on a batch first: model(inputs)."
            )
        is_shared = isinstance(tensor, nn.Parameter) or tensor.requires_grad
        self._tensors.append(tensor)
        copied = self._converted(tensor)
        if copied is tensor and (not is_shared or tensor.is_inference()):
            copied = tensor.clone()
        is_plain = type(tensor) in (Tensor, nn.Parameter)
        return _constant(copied, tensor) if self.has_constant_weights and is_shared and is_plain else copied

    def _converted(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        dtype = at_least_float32(tensor.dtype) if self.dtype is None else self.dtype
        if dtype == tensor.dtype:
            return tensor
        self.promoted = True
        return tensor.to(dtype)

    def _generator(self, generator: Any) -> Any:
        if isinstance(generator, torch.Generator):
            copied = torch.Generator(generator.device)
            copied.set_state(generator.get_state())
        else:
            copied = copy.deepcopy(generator)
        self.generators.append(copied)
        return copied

    # Modules

    def _module(self, module: nn.Module) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            return self._script(module)
        if (name := _wrapped_name(module)) is not None:
            inner: nn.Module = vars(module)["_modules"][name]
            return _Unwrapped(name, self(inner))
        copied: nn.Module = object.__new__(type(module))
        self._remember(module, copied)
        self.modules.append((module, copied))
        state = vars(copied)
        self._num_open_modules += 1
        for name, value in vars(module).items():
            is_bare = name in _OWN and not value  # most of a module's dictionaries of hooks are empty
            state[name] = type(value)() if is_bare else self(value)
        for base in type(module).__mro__:
            for name in vars(base).get("__slots__", ()):
                if name not in ("__dict__", "__weakref__") and hasattr(module, name):
                    setattr(copied, name, self(getattr(module, name)))
        self._num_open_modules -= 1
        if _is_of_a_trainer(type(module)):
            state["log"] = state["log_dict"] = _log_nothing
        if state.get("_compiled_call_impl") is not None:
            state["_compiled_call_impl"] = None
        return copied

    def _script(self, module: nn.Module) -> nn.Module:
        try:
            copied = copy.deepcopy(module)  # its weights exist twice until they are replaced below
        except RuntimeError:
            return module  # frozen and optimised: a forward cannot change it
        for original, part in zip(module.modules(), copied.modules(), strict=True):
            for name, parameter in original._parameters.items():
                part._parameters[name] = self(parameter)
            for name, buffer in original._buffers.items():
                if buffer is not None:
                    part._buffers[name] = self(buffer)
            self.modules.append((original, part))
        return copied

    # Containers and objects

    def _dtype(self, dtype: torch.dtype) -> torch.dtype:
        return at_least_float32(dtype) if self.dtype is None else dtype

    def _reference(self, reference: weakref.ref[Any]) -> weakref.ref[Any]:
        return weakref.ref(self(reference())) if isinstance(reference(), nn.Module) else reference

    def _container(self, value: Any) -> Any:
        kind = type(value)
        if issubclass(kind, dict):
            copied = defaultdict(value.default_factory) if kind is defaultdict else kind()
            self._remember(value, copied)
            for key, item in value.items():
                copied[self(key)] = self(item)
            return copied
        if issubclass(kind, list | deque):
            copied = self._remember(value, deque(maxlen=value.maxlen) if kind is deque else [])
            copied.extend(self(item) for item in value)
            return copied
        return kind(self(item) for item in value)

    def _object(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, tuple):  # a named tuple
            return kind._make(self(item) for item in value) if hasattr(kind, "_make") else value
        if isinstance(value, np.ndarray) and value.nbytes > _LARGE:
            return value
        try:
            make, arguments, state, items, pairs = (*value.__reduce_ex__(4), None, None, None)[:5]
            has_means = hasattr(kind, "__setstate__") or hasattr(kind, "__deepcopy__") or hasattr(kind, "__copy__")
            if make is not _NEW or len(arguments) != 1 or has_means:
                return self._by_its_own_means(value)
            copied = _NEW(kind)
            self._remember(value, copied)
            named, slots = state if isinstance(state, tuple) else (state, None)
            for key, item in {**(named or {}), **(slots or {})}.items():
                object.__setattr__(copied, key, self(item))
            for item in items or ():
                copied.append(self(item))
            for key, item in pairs or ():
                copied[self(key)] = self(item)
            return copied
        except Exception:  # any error of a user's object: it cannot be copied
            return self._remember(value, value)

    def _by_its_own_means(self, value: Any) -> Any:
        for item in (*_items(value), *getattr(value, "__dict__", {}).values()):
            self(item)  # so that a module or parameter in it is not copied again
        return copy.deepcopy(value, dict(self._copies))

    # Functions

    def _callable(self, value: Any) -> Any:
        if isinstance(value, types.MethodType):
            copy_of = self if self._num_open_modules else self._reached
            return types.MethodType(self(value.__func__), copy_of(value.__self__))
        if isinstance(value, types.BuiltinFunctionType | types.MethodWrapperType):
            owner = value.__self__
            is_bound = owner is not None and type(owner) in _CONTAINERS and id(owner) in self._copies
            return getattr(self(owner), value.__name__) if is_bound else value
        if isinstance(value, functools.partial):
            arguments, keywords = map(self._reached, value.args), value.keywords.items()
            return functools.partial(
                self(value.func), *arguments, **{key: self._reached(item) for key, item in keywords}
            )
        compiled_from = vars(value).get("_torchdynamo_orig_callable")
        return self._function(value) if compiled_from is None else self(compiled_from)

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        """Copy a function with the objects in its closure, its defaults and the globals that it names.

        A function that a module holds (a hook) has its own variables in the copy. Of another function, which is a model
        itself, only the modules are copied.

        Returns:
            The copy; the function itself if it refers to no such object.
        """
        if _is_torchs_own(function):
            return function
        copy_of = self if self._num_open_modules else self._reached
        named = {name: function.__globals__.get(name) for name in _global_names(function.__code__)}
        is_open = self._num_open_modules > 0
        named = {
            name: item
            for name, item in named.items()
            if _is_of_the_file(item, function) or _reaches(item) or (is_open and type(item) in _CONTAINERS)
        }
        cells, defaults = function.__closure__ or (), function.__defaults__ or ()
        if not (cells or named or defaults):
            return function
        namespace = dict(function.__globals__) if named else function.__globals__
        closure = tuple(self._cells.setdefault(id(cell), types.CellType()) for cell in cells)
        copied = types.FunctionType(function.__code__, namespace, function.__name__, None, closure)
        self._remember(function, copied)  # it may hold itself
        copied.__defaults__ = tuple(map(copy_of, defaults)) or None
        copied.__kwdefaults__ = function.__kwdefaults__
        copied.__dict__.update(function.__dict__)
        namespace.update({name: copy_of(item) for name, item in named.items()})
        for cell, new in zip(cells, closure, strict=True):
            if _is_filled(cell) and not _is_filled(new):
                new.cell_contents = copy_of(cell.cell_contents)
        return copied

    def _reached(self, value: Any) -> Any:
        """Return the copy of an object of a function if it is or contains a module; else the object itself."""
        if type(value) in _CALLABLES or _reaches(value):
            return self(value)
        return self._copies.get(id(value), value)


def _constant(copied: Tensor, original: Tensor) -> Tensor:
    """Return a tensor of the type of the original that shares the storage of its copy and requires no gradient."""
    constant = copied.detach()
    if isinstance(original, nn.Parameter):
        constant = nn.Parameter(constant, requires_grad=False)
    constant.__dict__.update(original.__dict__)  # attributes that the user has given it
    return constant


class _Unwrapped(nn.Module):
    """Replaces a wrapper around a module whose forward only calls the module, perhaps in another precision."""

    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self._name = name
        self.add_module(name, inner)
        self.training = getattr(inner, "training", False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules[self._name](*args, **kwargs)  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = vars(self)["_modules"].get(vars(self)["_name"])
            return getattr(inner, name)


def _wrapped_name(module: nn.Module) -> str | None:
    """Return the attribute in which a wrapper holds its module; None for any other module, FSDP's included."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "module"
    parts = vars(module).get("_modules", ())
    if "_forward_module" in parts and "_original_module" in parts:  # Fabric's, which refuses a backward of ours
        return "_forward_module"
    return "_orig_mod" if "_orig_mod" in parts else None


def is_sharded(model: object) -> bool:
    """Whether the weights of a part are divided among processes by FSDP, whose hooks work on that very module."""
    # Nothing is sharded before FSDP is imported. We do not import it: that takes half as long as importing torch.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(model, nn.Module):
        return False
    names = ("FSDPModule", "FullyShardedDataParallel")
    sharded_by = tuple(getattr(fsdp, name) for name in names if hasattr(fsdp, name))
    return any(isinstance(part, sharded_by) for part in model.modules())


def _method_for(kind: Any) -> Callable[[Copier, Any], Any] | None:
    """Return the method that copies objects of a type; None where they are shared."""
    if kind in _IMMUTABLE or issubclass(kind, _SHARED_TYPES):
        return None
    if issubclass(kind, nn.Module):
        return Copier._module
    if _is_of_a_trainer(kind) or hasattr(
        kind, "__del__"
    ):  # the finaliser of a copy would release resources of the original
        return None
    for types_, method in _METHODS:
        if kind in types_ if isinstance(types_, frozenset) else issubclass(kind, types_):
            return method
    return Copier._object


def _is_of_a_trainer(kind: type) -> bool:
    return any(base.__module__.partition(".")[0] in _TRAINER_PACKAGES for base in kind.__mro__)


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        return iter((*value.keys(), *value.values()))
    return iter(value) if isinstance(value, list | tuple | set | frozenset | deque) else iter(())


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # the variable is not assigned yet
        return False


def _reaches(value: Any, depth: int = 3) -> bool:
    """Whether an object is a module or a random generator, or contains one, at most ``depth`` levels down."""
    if isinstance(value, _REACHED):
        return True
    if depth == 0 or isinstance(value, type | types.ModuleType | types.FunctionType | Tensor):
        return False
    inside = _items(value) if type(value) in _CONTAINERS else iter(getattr(value, "__dict__", {}).values())
    return any(_reaches(item, depth - 1) for item in itertools.islice(inside, 1000))


def _is_of_the_file(value: Any, function: types.FunctionType) -> bool:
    return isinstance(value, types.FunctionType) and value.__globals__ is function.__globals__


def _is_torchs_own(function: types.FunctionType) -> bool:
    """Whether it is a public function of torch, such as the ``F.relu`` of an attribute, which holds no module."""
    home = sys.modules.get(function.__module__ or "")
    return (function.__module__ or "").split(".")[0] == "torch" and getattr(home, function.__name__, None) is function


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Replace the logging of a module that a trainer runs: a measurement is not a training step."""


@functools.lru_cache(maxsize=1024)
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    """Return the names that a function and those inside it look up, attributes among them."""
    inner: Iterable[str] = (
        name for item in code.co_consts if isinstance(item, types.CodeType) for name in _global_names(item)
    )
    return tuple(dict.fromkeys((*code.co_names, *inner)))


_NEW: Any = object().__reduce_ex__(4)[0]
"""The function by which a plain object is reconstructed; an object with its own ``__reduce__`` has another one."""

_LARGE = 2**20  # bytes of an array that is taken for data, which no forward writes to

_TRAINER_PACKAGES = frozenset({"accelerate", "deepspeed", "lightning", "lightning_fabric", "pytorch_lightning"})
"""Packages whose objects (a trainer, a data module, a logger) are not part of the function of a model."""

_CONTAINERS = frozenset({dict, OrderedDict, defaultdict, list, tuple, set, frozenset, deque})
_CALLABLES = frozenset(
    {types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.MethodWrapperType, functools.partial}
)
_REACHED = (nn.Module, torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
_IMMUTABLE = frozenset(
    {type(None), bool, int, float, complex, str, bytes, type, range, slice, types.ModuleType, torch.Size, torch.device}
    | {torch.layout, torch.memory_format, torch.finfo, torch.iinfo, types.CodeType, types.CellType}
)
_SHARED_TYPES = (
    type,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
    torch.utils.data.Dataset,
    torch.utils.data.DataLoader,
    torch.utils.data.Sampler,
    torch.fx.Graph,
    torch.fx.Node,
    logging.Logger,
    weakref.ProxyType,
    weakref.CallableProxyType,
    random.SystemRandom,
)

_OWN = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set))

_METHODS: tuple[tuple[Any, Callable[[Copier, Any], Any]], ...] = (
    (Tensor, Copier._tensor),
    (torch.dtype, Copier._dtype),
    (_CONTAINERS, Copier._container),
    ((torch.Generator, random.Random, np.random.Generator, np.random.RandomState), Copier._generator),
    (_CALLABLES, Copier._callable),
    (weakref.ref, Copier._reference),
)
