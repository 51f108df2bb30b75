"""Weights changed column by column so that the error of a layer's outputs on known inputs stays small.

With inputs of second moment ``H = mean(x x^T)``, the mean squared error of the outputs is ``tr(E H E^T)`` for an error
``E`` of the weight. Sources: GPTQ (https://arxiv.org/abs/2210.17323) and LeanQuant (https://arxiv.org/abs/2407.10032).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ..numerics.errors import layer_prefix
from ..numerics.panels import panels
from ..ops.codes import column_groups
from .codebooks import assign_codes, check_finite, fit_codebooks, midpoints

# Of the refit. With a smaller one, float32 products leave singular systems indefinite, and their rows unchanged.
_RIDGE = 1e-5


def check_moment(hessian: Tensor, cols: int, name: str = "") -> None:
    """Check the second moment of ``cols`` inputs.

    Raises:
        ValueError: another shape, numbers that are not finite, or a negative diagonal.
    """
    if tuple(hessian.shape) != (cols, cols):
        raise ValueError(
            f"{layer_prefix(name)}a second moment of shape {tuple(hessian.shape)} for {cols} inputs: ({cols}, {cols}) "
            "is expected"
        )
    diagonal = hessian.diagonal()
    if not bool(hessian.isfinite().all()) or bool((diagonal < 0).any()):
        raise ValueError(
            f"{layer_prefix(name)}the second moment of its inputs has numbers that are not finite, or negative ones "
            "on the diagonal; check the data, and try float32 or bfloat16 where the model runs in float16"
        )


def inverse_factor(moment: Tensor, damping: float, name: str = "") -> Tensor:
    """Upper triangular ``U`` with ``U^T U`` the inverse of the damped moment.

    ``moment = V V^T`` with ``V`` upper triangular, the Cholesky factor counted from the last input; ``U = V^-1``.

    Args:
        moment: ``(cols, cols)`` second moment of the inputs.
        damping: share of the mean diagonal that is added to the diagonal.
        name: the layer's name, for error messages.

    Raises:
        ValueError: the damped moment is singular.
    """
    damped = moment.flip(0, 1)
    damped.diagonal().add_(damping * moment.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise ValueError(
            f"{layer_prefix(name)}the second moment of its inputs is singular with damping={damping}; give more data "
            "or a larger damping"
        )
    identity = torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device)
    return torch.linalg.solve_triangular(factor.flip(0, 1), identity, upper=True)


@torch.no_grad()
def compensated_sketch(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    groups: int = 1,
    *,
    codebooks: Tensor | None = None,
    method: str = "dp",
    damping: float = 0.1,
    act_order: bool = True,
    block: int = 128,
    name: str = "",
) -> tuple[Tensor, Tensor]:
    """Codes chosen column by column; later columns compensate each column's error.

    The sweep is that of GPTQ (https://arxiv.org/abs/2210.17323), with the tables of LeanQuant
    (https://arxiv.org/abs/2407.10032), fitted to the original weights. Weights of inputs that are always 0 compensate
    nothing and get the nearest entry.

    Args:
        weight: ``(rows, cols)`` in floats.
        hessian: ``(cols, cols)`` float32 or float64 second moment of the inputs; its scale does not matter.
        bits: per code.
        groups: tables per row.
        codebooks: ``(rows, groups, 2**bits)`` float32 tables, ascending; by default fitted by ``method``.
        method: of [`fit_codebooks`][sparse_peft.calibrate.fit_codebooks].
        damping: share of the mean diagonal that is added to the diagonal, at least 0; needed with fewer samples than
            inputs.
        act_order: begin with the columns of the largest inputs, whose errors weigh most.
        block: columns between two updates of all following columns; affects speed only.
        name: the layer's name, for error messages.

    Returns:
        ``(codebooks, codes)``: ``(rows, groups, 2**bits)`` float32 and ``(rows, cols)`` uint8, not packed.

    Raises:
        ValueError: weights or moments that are not finite, shapes that do not match, or a moment that is singular
            despite the damping.
    """
    rows, cols = weight.shape
    check_moment(hessian, cols, name)
    if not damping >= 0 or block < 1:
        raise ValueError(
            f"{layer_prefix(name)}damping={damping}, block={block}: at least 0 and at least 1 are expected"
        )
    if codebooks is None:
        codebooks = fit_codebooks(weight, bits, groups, method=method, name=name)
    if tuple(codebooks.shape) != (rows, groups, 1 << bits):
        raise ValueError(
            f"{layer_prefix(name)}codebooks of shape {tuple(codebooks.shape)}: {(rows, groups, 1 << bits)} is expected"
        )
    moment = hessian.to(torch.promote_types(hessian.dtype, torch.float32), copy=True)
    diagonal = moment.diagonal()
    dead = diagonal == 0
    if bool(dead.all()):
        return codebooks, assign_codes(weight, codebooks)
    diagonal[dead] = diagonal[~dead].mean()
    order = torch.arange(cols, device=weight.device)
    if act_order:
        order = diagonal.argsort(descending=True, stable=True)
        moment = moment[order][:, order]
    factor = inverse_factor(moment, damping, name).to(torch.float32)
    del moment
    group_of = column_groups(cols, groups, weight.device)[order].tolist()
    codes = torch.empty(rows, cols, dtype=torch.uint8, device=weight.device)
    for start, stop in panels(rows, cols * 4 * torch.float32.itemsize):
        panel = weight[start:stop].to(torch.float32)
        check_finite(panel, name)
        found = _swept_codes(panel[:, order], codebooks[start:stop], factor, group_of, block)
        codes[start:stop, order] = found
    return codebooks, codes


def compensated_sweep(left: Tensor, factor: Tensor, store: Callable[[int, Tensor], Tensor], block: int) -> None:
    """Change weights column by column; later columns compensate each column's error (GPTQ, algorithm 1).

    Args:
        left: ``(rows, cols)`` float32 weights, which are overwritten.
        factor: ``(cols, cols)`` of ``inverse_factor``.
        store: ``store(column, ahead)``: what is stored of a column. ``ahead`` has the current weights of this and of
            the block's later columns, ``(up to block, rows)``; its first row is the column. It must not be changed.
        block: columns between two updates of all following columns.
    """
    cols = left.shape[1]
    for first in range(0, cols, block):
        last = min(first + block, cols)
        columns = left[:, first:last].t().contiguous()  # contiguous per column
        errors = torch.empty_like(columns)
        for at, column in enumerate(range(first, last)):
            errors[at] = (columns[at] - store(column, columns[at:])).div_(factor[column, column])
            columns[at + 1 :].addr_(factor[column, column + 1 : last], errors[at], alpha=-1)
        left[:, last:].addmm_(errors.t(), factor[first:last, last:], alpha=-1)


def _swept_codes(left: Tensor, codebooks: Tensor, factor: Tensor, group_of: list[int], block: int) -> Tensor:
    """The codes ``(rows, cols)`` of the weights ``left``, which are overwritten."""
    codes = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    # contiguous per column
    tables = codebooks.permute(1, 2, 0).contiguous()
    borders = midpoints(codebooks).permute(1, 2, 0).contiguous()

    def store(column: int, ahead: Tensor) -> Tensor:
        group = group_of[column]
        code = (ahead[0] > borders[group]).sum(0)
        codes[:, column] = code
        return tables[group].gather(0, code[None]).squeeze(0)

    compensated_sweep(left, factor, store, block)
    return codes


@torch.no_grad()
def refit_codebooks(
    weight: Tensor,
    codes: Tensor,
    hessian: Tensor,
    codebooks: Tensor,
    *,
    ridge: float = _RIDGE,
    name: str = "",
) -> Tensor:
    """The tables with the least output error for given codes, by least squares with one system per row.

    ``P`` is the ``(cols, groups * entries)`` matrix that maps a row's entries to its columns. The change ``d`` of the
    entries ``c`` solves ``(P^T H P + ridge) d = P^T H (w - P c)``. The ridge pulls towards the given entries, so the
    error never grows, and entries without weights keep their value.

    Args:
        weight: ``(rows, cols)`` in floats.
        codes: ``(rows, cols)`` uint8, not packed.
        hessian: ``(cols, cols)`` second moment of the inputs, not damped.
        codebooks: ``(rows, groups, entries)`` float32 that the codes were assigned with.
        ridge: share of the system's mean diagonal; above 0.
        name: the layer's name, for error messages.

    Returns:
        ``(rows, groups, entries)`` float32; the tables may no longer ascend.

    Raises:
        ValueError: moments that are not finite or have another shape.
    """
    rows, cols = weight.shape
    check_moment(hessian, cols, name)
    if not ridge > 0:
        raise ValueError(f"{layer_prefix(name)}ridge={ridge}: a number above 0 is expected, such as 1e-5")
    _, groups, entries = codebooks.shape
    group_of = column_groups(cols, groups, weight.device)
    ends = torch.searchsorted(group_of, torch.arange(groups + 1, device=weight.device)).tolist()
    moment = hessian.to(torch.float32)
    out = codebooks.clone()
    # the map from a part's entries to its columns, its product with the moment, and the systems
    row_bytes = 2 * entries * cols * torch.float32.itemsize + (groups * entries) ** 2 * 3 * torch.float64.itemsize
    for start, stop in panels(rows, row_bytes):
        places = codes[start:stop].long() + group_of * entries
        panel, tables = weight[start:stop].to(torch.float32), codebooks[start:stop].flatten(1)
        error = panel - tables.gather(1, places)
        system, side = _normal_equations(codes[start:stop], error @ moment, moment, ends, entries)
        out[start:stop] = (tables + _change(system, side, ridge, tables)).unflatten(1, (groups, entries))
    return out


def _normal_equations(
    codes: Tensor, pulled: Tensor, moment: Tensor, ends: list[int], entries: int
) -> tuple[Tensor, Tensor]:
    """``P^T H P`` as ``(rows, n, n)`` and ``P^T`` times the rows of ``pulled`` as ``(rows, n)``, in float64."""
    spreads = [
        (codes[:, None, first:last] == torch.arange(entries, device=codes.device)[:, None]).to(torch.float32)
        for first, last in itertools.pairwise(ends)
    ]
    n = entries * len(spreads)
    system = torch.empty(codes.shape[0], n, n, dtype=torch.float64, device=codes.device)
    side = torch.empty(codes.shape[0], n, dtype=torch.float64, device=codes.device)
    for g, (spread, first, last) in enumerate(zip(spreads, ends[:-1], ends[1:], strict=True)):
        at = slice(g * entries, (g + 1) * entries)
        side[:, at] = (spread @ pulled[:, first:last, None]).squeeze(2)
        met = spread @ moment[first:last, first:]
        for h in range(g, len(spreads)):
            other = slice(h * entries, (h + 1) * entries)
            product = met[:, :, ends[h] - first : ends[h + 1] - first] @ spreads[h].transpose(1, 2)
            system[:, at, other] = product
            system[:, other, at] = product.transpose(1, 2)
    return system, side


def _change(system: Tensor, side: Tensor, ridge: float, tables: Tensor) -> Tensor:
    """The change of ``(rows, n)`` float32 tables; 0 in rows where rounding leaves no gain."""
    diagonal = system.diagonal(dim1=1, dim2=2)
    scale = diagonal.mean(1, keepdim=True)
    damped = system.clone()
    damped.diagonal(dim1=1, dim2=2).add_(torch.where(scale > 0, ridge * scale, 1.0))
    factor, failed = torch.linalg.cholesky_ex(damped)
    change = torch.cholesky_solve(side[:, :, None], factor).squeeze(2)
    rounded = (tables + change).to(torch.float32).double() - tables.double()
    gain = 2 * (side * rounded).sum(1) - (system @ rounded[:, :, None]).squeeze(2).mul_(rounded).sum(1)
    better = (failed == 0) & (gain > 0)
    return torch.where(better[:, None], rounded, 0.0).to(torch.float32)


def output_error(weight: Tensor, decoded: Tensor, hessian: Tensor) -> float:
    """The outputs' relative error: ``tr(E H E^T) / tr(W H W^T)`` for the error ``E`` of a decoded weight."""
    moment = hessian.double()
    weight = weight.detach().double()
    error = weight - decoded.detach().double()
    return float((error @ moment).mul_(error).sum() / (weight @ moment).mul_(weight).sum())
