"""Which implementations are available, and which are forced."""

import pytest
import torch

from sparse_peft.ops import support_grad, triton_kernels, use_backend
from sparse_peft.support import Support
from tests.helpers.processes import run_code

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(not triton_kernels.usable(CPU), reason="needs Triton and TRITON_INTERPRET=1")


def spread(density, size=100):
    return Support.random((size, size), round(density * size * size), seed=0, name="layer")


def random_support(shape, density):
    k = max(1, round(density * shape[0] * shape[1]))
    return Support.random(shape, k, seed=3, name="layer")


def test_unknown_backend_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"'fast' is not a backend.*auto, panels, sampled"), use_backend("fast"):
        pass
    s = random_support((4, 4), 0.5)
    monkeypatch.setenv("SPARSE_PEFT_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="SPARSE_PEFT_BACKEND='nonsense'"):
        support_grad(torch.ones(1, 4), torch.ones(1, 4), s)


def test_forced_kernels_on_the_wrong_device_are_refused(monkeypatch):
    left = right = torch.randn(3, 100)
    with use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' is forced, but the tensors are on cpu"):
        support_grad(left, right, spread(0.01))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"'triton' is forced.*TRITON_INTERPRET=1"):
        support_grad(left, right, spread(0.01))


@interpreted
def test_float64_is_never_rounded_by_a_kernel():
    left, right = torch.randn(9, 100, dtype=torch.float64), torch.randn(9, 100, dtype=torch.float64)
    support = spread(0.02)
    with use_backend("triton"):
        got = support_grad(left, right, support)
    torch.testing.assert_close(got, (left.t() @ right).view(-1)[support.indices.long()], rtol=1e-12, atol=1e-12)


def test_nothing_is_compiled_or_imported_by_importing_the_package():
    code = "import sys, sparse_peft; print([m for m in sys.modules if m == 'triton' or 'triton_kernels.' in m])"
    done = run_code(code, env={"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    found = done.stdout.strip().splitlines()[-1]
    assert "sparse_peft" not in found, found
