"""Raw CUDA C++ kernels, compiled at their first use by the NVRTC that CUDA builds of PyTorch carry.

Nothing is compiled at install or import, no toolkit and no header is needed. Launches go to the current stream and
never wait for the device.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from importlib.resources import files

import torch
from torch import Tensor

from .nvrtc import compile_cubin

logger = logging.getLogger(__name__)

THREADS = 128
PER_THREAD = 4  # entries, in entries.cu
ENTRIES_A_WARP = 4  # in support_grad.cu
GRID_LIMIT = 65_535  # tensors in one launch
FLOATS = {torch.float32: "FP32", torch.bfloat16: "BF16", torch.float16: "FP16"}
INDICES = {torch.int32: "int", torch.int64: "long long"}
WRITE_MODES = {"resync": 0, "take": 1, "restore": 2}


def source(name: str) -> str:
    """The text of ``entries.cu`` or ``support_grad.cu``."""
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def options(file: str, dtype: torch.dtype, index: torch.dtype) -> list[str]:
    """Compiler options for one type of number and of position."""
    kind = {"entries.cu": "WEIGHT", "support_grad.cu": "VALUE"}[file]
    return [f"-D{kind}_{FLOATS[dtype]}", f"-DINDEX={INDICES[index]}"]


@functools.cache
def _compiled(file: str, kernel: str, dtype: torch.dtype, index: torch.dtype, device: int) -> Callable | None:
    try:
        from torch.cuda._utils import _cuda_load_module, _get_nvrtc_library  # noqa: PLC0415  (private, not in every version)

        with torch.cuda.device(device):
            architecture = "".join(map(str, torch.cuda.get_device_capability(device)))
            cubin = compile_cubin(_get_nvrtc_library(), source(file), options(file, dtype, index), architecture)
            return _cuda_load_module(cubin, [kernel])[kernel]
    except Exception as error:  # whatever a driver, a compiler or a private function of torch may raise
        logger.warning("the CUDA kernel %s could not be compiled, another path is used: %s", kernel, error)
        return None


def _kernel(file: str, kernel: str, dtype: torch.dtype, index: torch.dtype, device: torch.device) -> Callable | None:
    if device.type != "cuda" or torch.version.cuda is None or dtype not in FLOATS or index not in INDICES:
        return None
    return _compiled(file, kernel, dtype, index, torch.cuda.current_device() if device.index is None else device.index)


def usable(op: str, dtype: torch.dtype, index: torch.dtype, device: torch.device) -> bool:
    """Whether ``scatter_add``, ``write_many`` or ``support_grad`` can run on such tensors; compiles it if need be."""
    return _kernel("support_grad.cu" if op == "support_grad" else "entries.cu", op, dtype, index, device) is not None


def _launch(kernel: Callable, device: torch.device, grid: tuple[int, int], args: list) -> None:
    with torch.cuda.device(device):
        kernel(grid=(*grid, 1), block=(THREADS, 1, 1), args=args)


def _blocks(items: int, per_block: int) -> int:
    return -(-items // per_block)


def scatter_add_(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """``weight.flat[indices] = round(weight.flat[indices] + values)``, values float32, all contiguous."""
    kernel = _kernel("entries.cu", "scatter_add", weight.dtype, indices.dtype, weight.device)
    grid = (_blocks(indices.numel(), THREADS * PER_THREAD), 1)
    _launch(kernel, weight.device, grid, [weight, indices, values, indices.numel()])


def write_many_(table: Tensor, largest: int, dtype: torch.dtype, index: torch.dtype, mode: str) -> None:
    """Write the entries of all tensors of a table, ``(5, tensors)`` int64, the largest of so many entries."""
    kernel = _kernel("entries.cu", "write_many", dtype, index, table.device)
    grid = (_blocks(largest, THREADS * PER_THREAD), table.shape[1])
    _launch(kernel, table.device, grid, [table, table.shape[1], WRITE_MODES[mode]])


def support_grad_(out: Tensor, left: Tensor, right: Tensor, indices: Tensor, cols: int, add: bool) -> None:
    """As ``sparse_peft.ops.triton_kernels.support_grad.support_grad_``; tokens padded with zeros to 16 bytes."""
    kernel = _kernel("support_grad.cu", "support_grad", left.dtype, indices.dtype, left.device)
    grid = (_blocks(indices.numel(), THREADS // 32 * ENTRIES_A_WARP), 1)
    args = [left, right, indices, out, indices.numel(), cols, left.stride(0), int(add)]
    _launch(kernel, left.device, grid, args)
