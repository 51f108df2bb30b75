"""The CUDA C++ kernels without a GPU: they compile for it, and run right when a host compiler makes them plain code.

What this cannot show is anything of the hardware: memory order between blocks, half precision's PTX, speed. Tests
marked ``gpu`` in ``test_kernels.py`` run the real thing.
"""

import ctypes
import ctypes.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_peft.ops import cuda_kernels, effective_entries
from sparse_peft.ops.cuda_kernels import INDICES, PER_THREAD, THREADS, WRITE_MODES, options, source
from sparse_peft.ops.cuda_kernels.nvrtc import compile_cubin
from sparse_peft.ops.transposed import token_contiguous
from sparse_peft.support import Support

pytestmark = pytest.mark.compile
HERE = Path(__file__).parent
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
HOST_FLOATS = [torch.float32, torch.bfloat16]


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", list(cuda_kernels.FLOATS), ids=str)
@pytest.mark.parametrize("file", ["entries.cu", "support_grad.cu"])
def test_sources_compile_without_spilling(file, dtype, arch, tmp_path):
    (tmp_path / file).write_text(source(file))
    for index in INDICES:
        command = ["nvcc", f"-arch={arch}", "-cubin", "-Xptxas", "-v", *options(file, dtype, index), file]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "0 bytes spill stores" in done.stderr and "warning" not in done.stderr, done.stderr


def nvrtc():
    """The compiler library, if PyTorch or a package has brought it; it needs no GPU."""
    found = ctypes.util.find_library("nvrtc")
    for folder in map(Path, sys.path):
        found = found or next((str(path) for path in folder.glob("nvidia/*/lib/libnvrtc.so.*")), None)
    return found


@pytest.mark.skipif(nvrtc() is None, reason="needs the NVRTC library")
@pytest.mark.parametrize("file", ["entries.cu", "support_grad.cu"])
def test_nvrtc_compiles_without_headers_and_says_what_is_wrong(file):
    library = ctypes.CDLL(nvrtc())
    for dtype in cuda_kernels.FLOATS:
        for index in INDICES:
            assert compile_cubin(library, source(file), options(file, dtype, index), "90")[:4] == b"\x7fELF"
    with pytest.raises(RuntimeError, match=r"does not compile with --gpu-architecture=sm_90(.|\n)*error"):
        compile_cubin(library, source(file), [], "90")


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    folder, built = tmp_path_factory.mktemp("cuda"), {}

    def build(file: str, dtype: torch.dtype, index: torch.dtype) -> ctypes.CDLL:
        key = (file, dtype, index)
        if key not in built:
            (folder / file).write_text(source(file))
            library = folder / f"{file}-{dtype}-{index}.so"
            flags = ["-DHAS_WARPS"] if file == "support_grad.cu" else []
            command = [
                "g++",
                "-std=c++20",
                "-O1",
                "-shared",
                "-fPIC",
                "-pthread",
                "-w",
                f'-DKERNELS="{folder / file}"',
            ]
            command += [*flags, *options(file, dtype, index), str(HERE / "cuda_on_host.cpp"), "-o", str(library)]
            subprocess.run(command, check=True)
            built[key] = ctypes.CDLL(str(library))
        return built[key]

    return build


def address(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def random_entries(shape, nnz, dtype, index, offset):
    """A weight, positions and values; the last two start ``offset`` elements into their memory: maybe not aligned."""
    support = Support.random(shape, nnz, seed=nnz, name="layer")
    weight = torch.randn(shape).to(dtype)
    indices = torch.cat([torch.zeros(offset), support.indices]).to(index)[offset:]
    return weight, indices, torch.randn(nnz + offset)[offset:]


@needs_gxx
@pytest.mark.parametrize("dtype", HOST_FLOATS, ids=str)
@pytest.mark.parametrize("index", list(INDICES), ids=str)
@pytest.mark.parametrize(("nnz", "offset"), [(1, 0), (3, 0), (4, 0), (1030, 0), (1030, 1), (517, 2)])
def test_scatter_add(on_host, dtype, index, nnz, offset):
    weight, indices, values = random_entries((37, 53), nnz, dtype, index, offset)
    expected = weight.clone().view(-1)
    expected[indices.long()] = effective_entries(expected[indices.long()], values)
    grid = -(-nnz // (THREADS * PER_THREAD))
    on_host("entries.cu", dtype, index).run_scatter_add(
        grid, THREADS, address(weight), address(indices), address(values), nnz
    )
    assert torch.equal(weight.view(-1), expected)


@needs_gxx
@pytest.mark.parametrize("dtype", HOST_FLOATS, ids=str)
@pytest.mark.parametrize("index", list(INDICES), ids=str)
def test_write_many(on_host, dtype, index):
    cases = [random_entries((41, 59), nnz, dtype, index, offset) for nnz, offset in [(700, 0), (5, 1), (1, 0), (0, 0)]]
    weights, indices, values = zip(*cases, strict=True)
    own = [weight.view(-1)[i.long()].clone() for weight, i in zip(weights, indices, strict=True)]
    originals = [torch.full_like(entries, torch.nan) for entries in own]
    before = [weight.clone() for weight in weights]
    columns = [[t.data_ptr() for t in group] for group in (weights, indices, originals, values)]
    table = torch.tensor([*columns, [i.numel() for i in indices]])
    library = on_host("entries.cu", dtype, index)

    def launch(mode):
        library.run_write_many(2, THREADS, address(table), len(cases), WRITE_MODES[mode])

    def holds(entries):
        return all(
            torch.equal(w, b.view(-1).scatter(0, i.long(), e).view(b.shape))
            for w, b, i, e in zip(weights, before, indices, entries, strict=True)
        )

    launch("take")
    assert all(torch.equal(o, e) for o, e in zip(originals, own, strict=True)) and holds(own)
    launch("resync")
    assert holds([effective_entries(o, v) for o, v in zip(own, values, strict=True)])
    launch("restore")
    assert all(torch.equal(weight, b) for weight, b in zip(weights, before, strict=True))


@needs_gxx
def test_bfloat16_rounds_as_torch_does(on_host):
    special = torch.tensor(
        [0.0, -0.0, 1e-40, 3.3e38, 3.4e38, torch.inf, -torch.inf, torch.nan, 1.00390625, 1.01171875]
    )
    values = torch.cat([special, torch.randn(2000) * torch.logspace(-30, 30, 2000)])
    weight = torch.zeros(values.numel(), dtype=torch.bfloat16)
    indices = torch.arange(values.numel(), dtype=torch.int32)
    on_host("entries.cu", torch.bfloat16, torch.int32).run_scatter_add(
        8, THREADS, address(weight), address(indices), address(values), values.numel()
    )
    expected = (torch.zeros_like(values) + values).to(torch.bfloat16)
    assert torch.equal(weight.isnan(), expected.isnan())
    assert torch.equal(weight[~weight.isnan()], expected[~expected.isnan()])


@needs_gxx
@pytest.mark.parametrize("dtype", HOST_FLOATS, ids=str)
@pytest.mark.parametrize("index", list(INDICES), ids=str)
@pytest.mark.parametrize(("shape", "nnz", "tokens"), [((1, 1), 1, 1), ((7, 5), 20, 3), ((23, 31), 90, 300)])
def test_support_grad(on_host, dtype, index, shape, nnz, tokens):
    support = Support.random(shape, nnz, seed=1, name="layer")
    left, right = torch.randn(tokens, shape[0]).to(dtype), torch.randn(tokens, shape[1]).to(dtype)
    turned = token_contiguous(left, dtype), token_contiguous(right, dtype)
    indices, out = support.indices.to(index), torch.full((nnz,), torch.nan)
    grid = -(-nnz // 16)
    for add in (0, 1):
        on_host("support_grad.cu", dtype, index).run_support_grad(
            grid, THREADS, address(turned[0]), address(turned[1]), address(indices), address(out), nnz, shape[1],
            turned[0].stride(0), add,
        )  # fmt: skip
    expected = 2 * (left.double().t() @ right.double()).view(-1)[support.indices.long()]
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-5)
