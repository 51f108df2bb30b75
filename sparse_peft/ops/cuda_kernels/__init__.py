"""CUDA C++ kernels, compiled at first use by the NVRTC of PyTorch's CUDA builds.

Nothing is compiled at install or import, and no toolkit or header is needed. Launches go to the current stream and do
not wait for the device.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from importlib.resources import files
from typing import Any, cast

import torch
from torch import Tensor

from .nvrtc import compile_cubin

logger = logging.getLogger(__name__)

# {op: file of its kernel}
OPS = {"scatter_add": "entries.cu", "write_many": "entries.cu", "support_grad": "support_grad.cu"}
THREADS = 128
PER_THREAD = 4  # entries per thread in entries.cu
ENTRIES_A_WARP = 4  # entries per warp in support_grad.cu
GRID_LIMIT = 65_535  # maximum number of tensors in one launch
FLOATS = {torch.float32: "FP32", torch.bfloat16: "BF16", torch.float16: "FP16"}
INDICES = {torch.int32: "int", torch.int64: "long long"}
WRITE_MODES = {"resync": 0, "take": 1, "restore": 2}


def source(name: str) -> str:
    """The source of ``entries.cu`` or ``support_grad.cu``."""
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def options(file: str, dtype: torch.dtype, index: torch.dtype) -> list[str]:
    """Compiler options for one dtype of floats and one of positions."""
    kind = {"entries.cu": "WEIGHT", "support_grad.cu": "VALUE"}[file]
    return [f"-D{kind}_{FLOATS[dtype]}", f"-DINDEX={INDICES[index]}"]


@functools.cache
def _compiled(op: str, dtype: torch.dtype, index: torch.dtype, device: int) -> Callable[..., None] | None:
    file = OPS[op]
    try:
        from torch.cuda._utils import _cuda_load_module, _get_nvrtc_library  # noqa: PLC0415  (private, not in every version)

        with torch.cuda.device(device):
            architecture = "".join(map(str, torch.cuda.get_device_capability(device)))
            cubin = compile_cubin(_get_nvrtc_library(), source(file), options(file, dtype, index), architecture)
            return cast("dict[str, Callable[..., None]]", _cuda_load_module(cubin, [op]))[op]
    except Exception as error:  # of a driver, a compiler or a private function of torch
        logger.warning("the CUDA kernel %s could not be compiled, another path is used: %s", op, error)
        return None


def _kernel(op: str, dtype: torch.dtype, index: torch.dtype, device: torch.device) -> Callable[..., None] | None:
    if device.type != "cuda" or torch.version.cuda is None or dtype not in FLOATS or index not in INDICES:
        return None
    return _compiled(op, dtype, index, torch.cuda.current_device() if device.index is None else device.index)


def usable(op: str, dtype: torch.dtype, index: torch.dtype, device: torch.device) -> bool:
    """Whether an op of ``OPS`` can run on such tensors; compiles its kernel at the first call."""
    return _kernel(op, dtype, index, device) is not None


def _launch(
    op: str, types: tuple[torch.dtype, torch.dtype], device: torch.device, grid: tuple[int, int], args: list[Any]
) -> None:
    """Launch the kernel of an op for one dtype of floats and one of positions."""
    kernel = _kernel(op, *types, device)
    if kernel is None:
        raise RuntimeError(f"the CUDA kernel {op} cannot run for {types} on {device}; ask usable() first")
    with torch.cuda.device(device):
        kernel(grid=(*grid, 1), block=(THREADS, 1, 1), args=args)


def _blocks(items: int, per_block: int) -> int:
    return -(-items // per_block)


def scatter_add_(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """``weight.flat[indices] = round(weight.flat[indices] + values)``, values float32, all contiguous."""
    grid = (_blocks(indices.numel(), THREADS * PER_THREAD), 1)
    args = [weight, indices, values, indices.numel()]
    _launch("scatter_add", (weight.dtype, indices.dtype), weight.device, grid, args)


def write_many_(table: Tensor, largest: int, dtype: torch.dtype, index: torch.dtype, mode: str) -> None:
    """Write the entries of all tensors of a table.

    Args:
        table: ``(5, tensors)`` int64: addresses of weight, indices, originals and values, and the number of entries.
        largest: maximum entry count of any tensor.
        dtype: of the weights.
        index: dtype of the positions.
        mode: a key of ``WRITE_MODES``.
    """
    grid = (_blocks(largest, THREADS * PER_THREAD), table.shape[1])
    _launch("write_many", (dtype, index), table.device, grid, [table, table.shape[1], WRITE_MODES[mode]])


def support_grad_(out: Tensor, left: Tensor, right: Tensor, indices: Tensor, cols: int, add: bool) -> None:
    """As ``sparse_peft.ops.triton_kernels.support_grad.support_grad_``, with tokens padded with zeros to 16 bytes."""
    grid = (_blocks(indices.numel(), THREADS // 32 * ENTRIES_A_WARP), 1)
    args = [left, right, indices, out, indices.numel(), cols, left.stride(0), int(add)]
    _launch("support_grad", (left.dtype, indices.dtype), left.device, grid, args)
