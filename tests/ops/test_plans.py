"""Which path runs, what calibration measures and keeps, and what is shared between layers."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_peft.ops import (
    GradientPlan,
    backends,
    gradient_paths,
    plan_support_grad,
    support_grad,
    transposed,
    triton_kernels,
    use_backend,
)
from sparse_peft.ops import crossover as calibration
from sparse_peft.ops import torch_library as library
from sparse_peft.ops.crossover import Bench, crossover, meeting_point
from sparse_peft.support import Support, layout_of
from tests.helpers.processes import run_code

CPU = torch.device("cpu")
SMALL = Bench(0.1, 64, 32, (0.05, 0.2))
interpreted = pytest.mark.skipif(not triton_kernels.usable(CPU), reason="needs Triton and TRITON_INTERPRET=1")


def spread(density, size=100):
    return Support.random((size, size), round(density * size * size), seed=0, name="layer")


# ---------------------------------------------------------------------------------------------------------- choosing


def test_the_path_follows_structure_then_density():
    assert plan_support_grad(spread(0.01), torch.float32, CPU).path == "sampled"
    assert plan_support_grad(spread(0.5), torch.float32, CPU).path == "panels"
    columns = Support.from_columns((100, 100), range(0, 60))
    plan = plan_support_grad(columns, torch.float32, CPU)
    assert plan.path == "tiles" and "rows that train the same columns" in plan.why


def test_density_counts_within_the_rows_and_columns_that_are_used():
    mask = torch.zeros(100, 100, dtype=torch.bool)
    mask[::10, ::10] = torch.rand(10, 10) < 0.8
    crowded = Support.from_mask(mask)
    assert crowded.density < 0.01 and plan_support_grad(crowded, torch.float32, CPU).path == "panels"


def test_a_forced_backend_is_taken_and_named(monkeypatch):
    with use_backend("panels"):
        assert plan_support_grad(spread(0.01), torch.float32, CPU) == GradientPlan("panels", "forced")
    monkeypatch.setenv("SPARSE_PEFT_BACKEND", "sampled")
    assert plan_support_grad(spread(0.5), torch.float32, CPU).path == "sampled"


def test_tiles_without_groups_are_chosen_by_density_and_said_once(caplog):
    backends._logged.clear()
    with caplog.at_level(logging.INFO, logger="sparse_peft"), use_backend("tiles"):
        for _ in range(2):
            assert plan_support_grad(spread(0.01), torch.float32, CPU).path == "sampled"
    assert caplog.text.count("'tiles' is forced") == 1


def test_forced_kernels_on_the_wrong_device_are_refused(monkeypatch):
    left = right = torch.randn(3, 100)
    with use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' is forced, but the tensors are on cpu"):
        support_grad(left, right, spread(0.01))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with use_backend("triton"), pytest.raises(RuntimeError, match="'triton' is forced.*TRITON_INTERPRET=1"):
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


# ------------------------------------------------------------------------------------------------------- calibration


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSE_PEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SPARSE_PEFT_CALIBRATE", "1")
    monkeypatch.setattr(calibration, "_known", {})
    monkeypatch.setattr(calibration, "BENCHES", {"cpu": SMALL})
    return tmp_path / "cache" / "calibration.json"


def test_the_meeting_point_lies_between_the_densities_on_a_logarithmic_scale():
    assert meeting_point({0.01: 0.5, 0.04: 1.5}) == pytest.approx(0.02)
    assert meeting_point({0.01: 1.2, 0.1: 3.0}) == 0.01
    assert meeting_point({0.01: 0.2, 0.1: 0.9}) == 0.1


def test_the_crossover_is_measured_once_and_kept(cache, monkeypatch):
    first = crossover(CPU, torch.float32, 0.1)
    assert first.source == "measured" and first.path == "sampled" and 0.05 <= first.density <= 0.2
    assert set(first.ratios) == {"0.05", "0.2"} and all(ratio > 0 for ratio in first.ratios.values())
    (key, kept) = next(iter(json.loads(cache.read_text()).items()))
    assert "float32" in key and kept["density"] == first.density
    monkeypatch.setattr(calibration, "measure", lambda *_: pytest.fail("measured again"))
    assert crossover(CPU, torch.float32, 0.1) is first
    calibration._known.clear()  # a new process
    again = crossover(CPU, torch.float32, 0.1)
    assert again.source == "cached" and again.density == first.density


def test_where_the_answer_is_clear_nothing_is_measured(cache, monkeypatch):
    monkeypatch.setattr(calibration, "measure", lambda *_: pytest.fail("measured"))
    assert crossover(CPU, torch.float32, 0.01).source == "default"
    assert crossover(CPU, torch.float32, 0.9).source == "default"
    monkeypatch.setenv("SPARSE_PEFT_CALIBRATE", "0")
    assert crossover(CPU, torch.float32, 0.1).source == "default"


@pytest.mark.parametrize("content", ["no json", "[]", '{"KEY": {"path": 1}}'])
def test_a_damaged_cache_is_measured_anew(cache, content):
    cache.parent.mkdir()
    cache.write_text(content.replace("KEY", calibration._key(CPU, torch.float32)))
    assert crossover(CPU, torch.float32, 0.1).source == "measured"
    assert json.loads(cache.read_text())


def test_a_cache_that_cannot_be_written_is_said_and_done_without(cache, monkeypatch, caplog):
    cache.parent.write_text("a file where the folder should be")
    with caplog.at_level(logging.INFO, logger="sparse_peft"):
        assert crossover(CPU, torch.float32, 0.1).source == "measured"
    assert "cannot be written" in caplog.text


def test_a_kernel_that_is_wrong_is_not_used(cache, monkeypatch, caplog):
    right = calibration.grad_by_path
    wrong = lambda path, *args: right(path, *args) * (1.01 if path == "sampled" else 1)  # noqa: E731
    monkeypatch.setattr(calibration, "grad_by_path", wrong)
    found = crossover(CPU, torch.float32, 0.1)
    assert found.path == "panels" and "is wrong on cpu" in caplog.text


# ----------------------------------------------------------------------------------------------------------- sharing


@interpreted
def test_layers_with_one_input_transpose_it_once(monkeypatch):
    monkeypatch.setattr(gradient_paths, "KERNEL_TILE", 8)
    made = []
    original = transposed._Kept.__init__

    def count(self, x, result):
        made.append(tuple(x.shape))
        original(self, x, result)

    monkeypatch.setattr(transposed._Kept, "__init__", count)
    support = Support.random((64, 48), 200, seed=0, name="layer")

    class Weighted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, values):
            ctx.save_for_backward(x)
            return x.new_ones(x.shape[0], 64)

        @staticmethod
        def backward(ctx, grad):
            with use_backend("triton"):
                return None, support_grad(grad, ctx.saved_tensors[0], support)

    x, other = torch.randn(20, 48), torch.randn(20, 48)
    values = [torch.zeros(support.nnz, requires_grad=True) for _ in range(4)]
    outputs = [Weighted.apply(x, value) for value in values[:3]] + [Weighted.apply(other, values[3])]
    gradient = torch.randn(20, 64)
    sum((output * gradient).sum() for output in outputs).backward()
    # three tiles of 20 tokens, of two inputs; nothing outlives the backward pass
    assert made == [(8, 48), (8, 48), (4, 48)] * 2 and transposed._kept == {}
    for value, source in zip(values, (x, x, x, other), strict=True):
        expected = (gradient.t() @ source).view(-1)[support.indices.long()]
        torch.testing.assert_close(value.grad, expected)


def test_an_activation_that_was_written_to_is_transposed_anew():
    kept = transposed._Kept(x := torch.randn(8, 4), x.t().contiguous())
    assert kept.is_of(x, torch.float32)
    x.mul_(2)
    assert not kept.is_of(x, torch.float32)


# -------------------------------------------------------------------------------------------------------- registration


def cases():
    s = spread(0.1, 12)
    csr = (s.row_ptr, s.cols, s.indices)
    left, right = torch.randn(5, 12), torch.randn(5, 12)
    values, entries = torch.randn(s.nnz), torch.randn(s.nnz)
    codes = torch.randint(0, 255, (3, 4), dtype=torch.uint8)
    return {
        "support_grad": (left, right, *csr, 12, 12, 0),
        "masked_dw": (left, right, *csr, 12, 12, 7),
        "delta_matmul_add_": (torch.randn(5, 12), right, values, s.row_ptr, s.cols),
        "scatter_add_": (torch.randn(12, 12), s.indices, values),
        "resync_": ([torch.randn(12, 12)], [s.indices], [entries], [values]),
        "take_": ([torch.randn(12, 12)], [s.indices], [entries]),
        "restore_": ([torch.randn(12, 12)], [s.indices], [entries]),
        "code_gather": (torch.randn(3, 2, 16), codes, 4, 8, torch.float32),
        "code_scatter_add": (torch.randn(3, 8), codes, 4, 2),
    }


@pytest.mark.parametrize("name", list(cases()))
def test_opcheck(name):
    torch.library.opcheck(getattr(library, name), cases()[name])
    assert getattr(torch.ops.sparse_peft, name)


# ------------------------------------------------------------------------------------------------------------- Triton


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_of_row_groups(dtype):
    kernels = triton_kernels.kernels("support_grad_tiles")
    for support in (
        Support.from_blocks((150, 140), (16, 32), [0, 2, 3, 7, 8, 20, 33, 49]),
        Support.from_columns((130, 90), list(range(0, 90, 1))),
    ):
        layout = layout_of(support)
        rows = torch.arange(support.shape[0]) if layout.rows is None else layout.rows
        cols = torch.arange(support.shape[1]) if layout.cols is None else layout.cols
        left, right = (torch.randn(45, n).to(dtype) for n in support.shape)
        out = torch.full((support.nnz,), torch.nan)
        kernels.support_grad_tiles_(out, left[:, rows], right[:, cols], *layout.work(kernels.work_list))
        expected = (left.double().t() @ right.double()).view(-1)[support.indices.long()]
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.compile
@pytest.mark.skipif(not triton_kernels.installed(), reason="needs Triton")
def test_every_kernel_compiles_for_sm_80_and_sm_90(tmp_path):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.ops.aot", "80", "90"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = {line.split()[0] for line in done.stdout.splitlines() if "_kernel" in line}
    assert len(kernels) == 8, kernels
    for kernel in kernels:
        for dtype in ("float32", "bfloat16", "float16"):
            assert done.stdout.count(f"{kernel} torch.{dtype} sm_80") >= 1
            assert done.stdout.count(f"{kernel} torch.{dtype} sm_90") >= 1
