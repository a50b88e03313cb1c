import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from fisher_reg import fisher_linf_norm, fisher_spectral_norm
from tests.callbacks.ddp_monitor import Still, images


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    script = [sys.executable, "-m", "tests.callbacks.ddp_monitor", str(folder)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    saved = {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*_*.pt")}
    return saved, done.stderr


def _check_equal(theirs, mine):
    assert set(mine) == set(theirs)
    for key in set(mine) - {"step", "val_loss"}:
        if "seconds" not in key:
            atol = 1e-6 if "log10" in key else 0  # of a logarithm that is a relative error
            # the ratios compare logits in single precision that differ by a tenth
            rtol = 1e-4 if key.endswith("_ratio") else 1e-6
            assert_close(theirs[key], mine[key], rtol=rtol, atol=atol, equal_nan=True, msg=key)


def test_every_process_logs_the_numbers_of_one(done):
    saved, _ = done
    assert set(saved) == {"1_0", "2_0", "2_1", "3_0", "3_1", "3_2"}
    one = saved["1_0"]
    for other in saved.values():
        for prefix, history in one["history"].items():
            for mine, theirs in zip(history, other["history"][prefix], strict=True):
                _check_equal(theirs, mine)
        _check_equal(other["seen"], one["seen"])


def test_repeated_examples_count_once_and_those_that_fail_are_left_out(done):
    saved, _ = done
    x = images()
    x = x[~x.isnan().any(1)]
    expected = fisher_spectral_norm(Still(), x).eigenvalue.double()
    expected_linf = fisher_linf_norm(Still(), x).value.double()
    for share in saved.values():
        (entry,) = share["history"]["more"]
        assert_close(entry["more/lambda_max_mean"], expected.mean().item(), rtol=1e-6, atol=0)
        assert_close(entry["more/lambda_linf_mean"], expected_linf.mean().item(), rtol=1e-6, atol=0)
        assert entry["more/num_left_out"] == 1
        assert 0.3 < entry["more/single_step_ratio"] <= 1
        (entry,) = share["history"]["few"]
        assert_close(entry["few/lambda_max_mean"], expected[:6].mean().item(), rtol=1e-6, atol=0)


def test_what_fails_on_one_process_is_told_once_with_its_number(done):
    _, stderr = done
    assert (
        stderr.count("leaves out bound_that_fails_on_the_last_process, which raised RuntimeError: out of memory") == 2
    )
    assert "(on process 1)" in stderr
    assert "(on process 2)" in stderr
