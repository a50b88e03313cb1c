"""float32 is float32 in what is measured, and torch's settings are found as they were."""

import inspect
import subprocess
import sys
import threading

import pytest
import torch
from torch.testing import assert_close

from fisher_reg import Categorical, Exact, ForwardError, KLPenalty, Lanczos, fisher_spectral_norm
from fisher_reg.evaluation import strictly
from fisher_reg.operator import InputFisher
from fisher_reg.solvers.result import EigenResult
from tests import cases

GPU = torch.device("cuda")  # of which the settings can be read without one
_HAS_OPERATIONS = hasattr(torch._C, "_get_fp32_precision_getter")


def _settings():
    """Read every getter; where torch refuses to answer, note that it does."""
    import torch

    pairs = [(backend, kind) for backend in ("cuda", "mkldnn") for kind in ("all", "conv", "rnn", "matmul")]
    getters = {
        "cudnn": lambda: torch.backends.cudnn.allow_tf32,
        "cublas": lambda: torch.backends.cuda.matmul.allow_tf32,
        "matmul": torch.get_float32_matmul_precision,
    }
    if hasattr(torch._C, "_get_fp32_precision_getter"):
        for pair in [("generic", "all"), *pairs]:
            getters[pair] = lambda pair=pair: torch._C._get_fp32_precision_getter(*pair)
    found = {}
    for name, getter in getters.items():
        try:
            found[name] = getter()
        except RuntimeError:
            found[name] = "mixed"
    return found


_SCRIPT = """
import os, sys, traceback
import torch
from fisher_reg.evaluation import strict

def check(change, how, inside, after):
    exec(change)
    before, seen = _settings(), []
    opened = strict.ProcessWide(getattr(strict, how))
    try:
        with opened, opened:
            seen.append(_settings())
            exec(inside)
            raise KeyError
    except KeyError:
        pass
    names = before if how == "strict_by_operation" else ("cudnn", "cublas", "matmul")  # all that torch before 2.9 has
    assert all(_settings()[name] == before[name] for name in names), (before, _settings())
    operations = {name: value for name, value in seen[0].items() if isinstance(name, tuple)}
    of_flags = {"cudnn": seen[0]["cudnn"], "matmul": seen[0]["matmul"]}
    looked_at = operations if how == "strict_by_operation" else operations | of_flags
    reduced = {name: value for name, value in looked_at.items() if value in ("tf32", "bf16", True, "high", "medium")}
    assert not reduced, reduced
    exec(after)

for case in CASES:  # each in a process of its own, since a setting that was once made never follows another again
    pid = os.fork()
    if pid == 0:
        try:
            check(*case)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(pid, 0)[1] != 0:
        sys.exit(f"failed: {case}")
"""


def _run(*cases):
    script = f"{inspect.getsource(_settings)}\nCASES = {cases!r}\n{_SCRIPT}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


_OF_OPERATIONS = {
    "default": "",
    "general": "torch.backends.fp32_precision = 'tf32'",
    "of a backend": "torch.backends.cudnn.fp32_precision = 'tf32'",
    "of convolutions": "torch.backends.cudnn.conv.fp32_precision = 'tf32'",
    "of products on a CPU": "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "strict but for products": "torch.backends.fp32_precision = 'ieee'; torch.backends.cuda.matmul.fp32_precision = "
    "'tf32'",
}
_CONV_IS_BF16 = "torch.backends.mkldnn.conv.fp32_precision == 'bf16'"
_OF_FLAGS = {
    "default": "",
    "medium": "torch.set_float32_matmul_precision('medium')",
    "high": "torch.set_float32_matmul_precision('high'); torch.backends.cudnn.allow_tf32 = True",
    "off": "torch.backends.cudnn.allow_tf32 = False; torch.backends.cuda.matmul.allow_tf32 = True",
}


_NATIVE = "strict_by_operation" if _HAS_OPERATIONS else "strict_by_flags"
_OPENS_FLAGS = "with torch.backends.cudnn.flags(enabled=False): pass"
_FOLLOWS = [
    ("", "torch.backends.fp32_precision = 'ieee'", "torch.backends.cudnn.conv.fp32_precision == 'ieee'"),
    ("torch.backends.fp32_precision = 'tf32'", "torch.backends.fp32_precision = 'bf16'", _CONV_IS_BF16),
]


@pytest.mark.skipif(not _HAS_OPERATIONS, reason="torch before 2.9 has flags alone")
def test_settings_of_operations_are_strict_in_the_block_and_found_again():
    changes = [*_OF_OPERATIONS.values(), *_OF_FLAGS.values()]
    follow = [(change, "strict_by_operation", "", f"{later}; assert {holds}") for change, later, holds in _FOLLOWS]
    _run(*[(change, "strict_by_operation", "", "") for change in changes], *follow)


def test_flags_are_strict_in_the_block_and_found_again_and_a_model_may_open_them_as_before():
    flags = [(change, "strict_by_flags", "", "") for change in _OF_FLAGS.values()]
    _run(*flags, (_OPENS_FLAGS, _NATIVE, _OPENS_FLAGS, ""))


def test_the_block_lasts_until_the_last_thread_leaves_it():
    before, left = _settings(), threading.Event()

    def other():
        with strictly(GPU):
            left.wait(10)

    thread = threading.Thread(target=other)
    with strictly(GPU):
        thread.start()
        inside = _settings()
    still = _settings()
    left.set()
    thread.join()
    assert inside == still != before
    assert _settings() == before


@pytest.fixture
def _medium():
    """Matrix products in bfloat16 on a CPU."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def _is_reduced(settings):
    return settings.get(("mkldnn", "matmul"), settings["matmul"]) in ("bf16", "medium")


@pytest.mark.usefixtures("_medium")
def test_what_is_measured_is_strict_and_a_penalty_is_as_precise_as_its_step():
    before, seen = _settings(), []
    network = cases.tiny_network()

    def model(x):
        seen.append(_settings())
        return network(x)

    x = torch.randn(3, 6)
    fisher_spectral_norm(model, x)
    assert _is_reduced(before)
    assert not any(_is_reduced(settings) for settings in seen)
    seen.clear()
    KLPenalty()(model, x)
    assert all(settings == before for settings in seen)
    assert _settings() == before


def test_an_error_of_the_model_leaves_the_settings_as_they_were():
    before = _settings()
    with pytest.raises(ForwardError, match="inside"):
        fisher_spectral_norm(lambda x: {}["inside"], torch.randn(3, 6))
    assert _settings() == before


def test_dual_numbers_and_quotients_give_the_same_numbers(family, digits):
    x = cases.test_images(digits, 8)
    x = x + 0.05 * torch.randn_like(x)  # flat backgrounds lie on the kinks of max pooling
    network, solver = cases.network(family, digits).eval(), Lanczos()
    by_quotients: EigenResult = fisher_spectral_norm(network, x, solver=solver)
    by_duals = solver.solve(InputFisher(network, x, Categorical(), quotients=False), None)
    assert_close(by_quotients.eigenvalue, by_duals.eigenvalue, rtol=solver.tolerance, atol=0)


class _OpensFlags(torch.nn.Module):
    """An LSTM as one is advised to run it for second derivatives."""

    def __init__(self):
        super().__init__()
        self.recurrent, self.head = torch.nn.LSTM(4, 6, batch_first=True), torch.nn.Linear(6, 8)

    def forward(self, x):
        with torch.backends.cudnn.flags(enabled=False):
            return self.head(self.recurrent(x)[0][:, -1])


def test_a_model_may_open_flags_of_cudnn_on_a_cpu():
    model, x = _OpensFlags(), torch.randn(3, 5, 4)
    expected = fisher_spectral_norm(model, x, solver=Exact()).eigenvalue
    assert_close(fisher_spectral_norm(model, x).eigenvalue, expected, rtol=0.05, atol=0)


_ON_A_GPU = """
import pytest, torch
from fisher_reg import ForwardError, fisher_spectral_norm
from fisher_reg.evaluation import strictly
from tests.evaluation.test_strict import _OpensFlags
with strictly(torch.device("cuda")), pytest.raises(ForwardError, match="Set torch.backends.cudnn.allow_tf32, to True"):
    fisher_spectral_norm(_OpensFlags(), torch.randn(3, 5, 4))
"""


@pytest.mark.skipif(not _HAS_OPERATIONS, reason="torch before 2.9 has flags alone")
def test_on_a_gpu_the_error_of_flags_says_what_to_do():
    # in a process of its own: once flags have been opened they may be opened again
    done = subprocess.run([sys.executable, "-c", _ON_A_GPU], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_on_a_cpu_nothing_changes_unless_less_was_asked_for():
    before = _settings()
    with strictly(torch.device("cpu")):
        assert _settings() == before
