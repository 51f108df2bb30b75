"""Every implementation of every op against a dense float64 reference, on random problems.

Without a GPU, Triton's kernels run in its interpreter, which does float32 and float16; in bfloat16 it multiplies bit
patterns. Tests marked ``gpu`` do the same on a CUDA device, bfloat16 and the CUDA C++ kernels included.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_peft.ops import resync_, support_grad, triton_kernels, use_backend
from sparse_peft.support import Support
from tests.ops import kernel_checks as check
from tests.ops.kernel_cases import SIZES, expert_problems, problems

interpreted = [
    pytest.mark.compile,  # beside the compiled kernels: minutes in Triton's interpreter
    pytest.mark.skipif(not triton_kernels.usable(torch.device("cpu")), reason="needs Triton and TRITON_INTERPRET=1"),
]
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

STOCK = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTERPRETER = [torch.float32, torch.float16]
KERNEL = [torch.float32, torch.bfloat16, torch.float16]


def places(stock: list[str], kernels: list[str]) -> list:
    """``(backend, device, dtypes, examples)`` of every implementation."""
    return [
        *(pytest.param(name, "cpu", STOCK, 60, id=name) for name in stock),
        pytest.param("triton", "cpu", INTERPRETER, 20, id="triton-interpreted", marks=interpreted),
        *(pytest.param(name, "cuda", STOCK, 60, id=f"{name}-gpu", marks=gpu) for name in stock),
        *(pytest.param(name, "cuda", KERNEL, 200, id=f"{name}-kernel-gpu", marks=gpu) for name in kernels),
    ]


def run(test, examples: int) -> None:
    settings(max_examples=examples, deadline=None, derandomize=True)(test)()


@pytest.mark.parametrize(
    ("backend", "device", "dtypes", "examples"), places(["panels", "sampled", "tiles", "auto"], ["triton", "cuda"])
)
def test_support_grad(backend, device, dtypes, examples):
    run(given(problems(dtypes, device))(lambda problem: check.check_support_grad(backend, problem)), examples)


@pytest.mark.parametrize(
    ("backend", "device", "dtypes", "examples"), places(["panels", "sampled", "tiles", "auto"], ["triton", "cuda"])
)
def test_expert_support_grad(backend, device, dtypes, examples):
    problems = expert_problems(dtypes, device)
    run(given(problems)(lambda problem: check.check_expert_support_grad(backend, problem)), examples)


@pytest.mark.parametrize(("backend", "device", "dtypes", "examples"), places(["auto"], ["triton"]))
def test_masked_dw(backend, device, dtypes, examples):
    shares = st.sampled_from([0.0, 0.02, 0.3, 1.0])
    run(given(problems(dtypes, device), shares)(lambda p, s: check.check_masked_dw(backend, p, s)), examples)


@pytest.mark.parametrize(("backend", "device", "dtypes", "examples"), places(["auto"], ["triton", "cuda"]))
def test_entries_of_many_weights(backend, device, dtypes, examples):
    several = st.lists(problems([torch.float32], device), min_size=1, max_size=4)
    kinds = st.sampled_from(dtypes)
    run(given(several, kinds)(lambda ps, dtype: check.check_entries(backend, ps, dtype)), examples)


@pytest.mark.parametrize(("backend", "device", "dtypes", "examples"), places(["auto"], ["triton"]))
def test_delta_matmul_add(backend, device, dtypes, examples):
    run(given(problems(dtypes, device))(lambda p: check.check_delta_matmul_add(backend, p.right, p.support)), examples)


@pytest.mark.parametrize(("backend", "device", "dtypes", "examples"), places(["auto"], ["triton"]))
def test_codes(backend, device, dtypes, examples):
    @given(SIZES, SIZES, st.integers(1, 5), st.sampled_from([2, 3, 4, 8]), st.sampled_from(dtypes))
    def test(rows, cols, groups, bits, dtype):
        check.check_codes(backend, rows, cols, min(groups, cols), bits, dtype, device)

    run(test, examples)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_kernels_are_deterministic_and_fit_a_cuda_graph(backend):
    support = Support.random((257, 129), 1500, seed=0, name="layer").to("cuda")
    left, right = (torch.randn(300, n, device="cuda", dtype=torch.bfloat16) for n in support.shape)
    weight = torch.randn(support.shape, device="cuda", dtype=torch.bfloat16)
    originals, values = torch.empty(support.nnz, device="cuda", dtype=torch.bfloat16), torch.randn(support.nnz).cuda()

    def step():
        resync_([weight], [support.indices], [originals], [values])
        return support_grad(left, right, support)

    with use_backend(backend):
        originals.copy_(weight.view(-1)[support.indices.long()])
        first = step()
        assert torch.equal(first, step())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        captured.fill_(torch.nan)
        graph.replay()
    assert torch.equal(first, captured)
