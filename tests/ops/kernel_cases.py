"""Random problems for the kernels: odd, tall, wide and prime shapes, empty rows, strided and poisoned inputs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparse_peft.support import Support

SIZES = st.one_of(st.sampled_from([1, 2, 3, 7, 13, 31, 32, 33, 64, 65, 97, 130]), st.integers(1, 80))
SMALL_SIZES = st.one_of(st.sampled_from([1, 2, 7, 31, 32, 33]), st.integers(1, 24))
DENSITIES = st.sampled_from([0.0, 0.0001, 0.01, 0.1, 0.5])


@dataclass
class Problem:
    """Activations and a support; ``dense`` is their float64 weight gradient."""

    left: Tensor
    right: Tensor
    support: Support

    @property
    def dense(self) -> Tensor:
        return self.left.double().t() @ self.right.double()

    def at_support(self) -> Tensor:
        return self.dense.reshape(-1)[self.support.indices.long()]


def poisoned(rows: int, cols: int, dtype: torch.dtype, device: str, layout: str, generator: torch.Generator) -> Tensor:
    """A random matrix; what lies beside it in memory is NaN."""
    if layout == "transposed":
        return poisoned(cols, rows, dtype, device, "padded", generator).t()
    around = torch.full((rows + 2, cols + 3), torch.nan, dtype=dtype, device=device)
    inner = around[1 : rows + 1, 2 : cols + 2]
    inner.copy_(torch.randn(rows, cols, generator=generator))
    return inner if layout == "padded" else inner.contiguous()


@st.composite
def supports(draw, rows: int, cols: int, device: str = "cpu") -> Support:
    """Of any density, in the whole weight or crowded into a corner of it, or of blocks."""
    density = draw(DENSITIES)
    seed = draw(st.integers(0, 2**20))
    kind = draw(st.sampled_from(["spread", "crowded", "blocks", "columns", "rows"]))
    if kind == "spread":
        support = Support.random((rows, cols), round(density * rows * cols), seed=seed, name="layer")
    elif kind == "crowded":
        mask = torch.zeros(rows, cols, dtype=torch.bool)
        generator = torch.Generator().manual_seed(seed)
        mask[: rows // 2, cols // 3 :] = (
            torch.rand(mask[: rows // 2, cols // 3 :].shape, generator=generator) < density
        )
        support = Support.from_mask(mask)
    elif kind == "blocks":
        height, width = draw(st.sampled_from([(8, 8), (16, 4), (9, 5)]))
        blocks = -(-rows // height) * -(-cols // width)
        chosen = Support.random((blocks, 1), max(1, round(density * blocks)), seed=seed, name="layer").indices
        support = Support.from_blocks((rows, cols), (height, width), chosen)
    elif kind == "rows":
        first = list(range(rows // 3)) + list(range(rows // 2, rows))
        support = Support.from_rows((rows, cols), first)
    else:
        chosen = Support.random((cols, 1), max(1, round(density * cols)), seed=seed, name="layer").indices
        support = Support.from_columns((rows, cols), chosen)
    return support.to(device)


@st.composite
def problems(draw, dtypes: list[torch.dtype], device: str = "cpu") -> Problem:
    rows, cols, tokens = draw(SIZES), draw(SIZES), draw(SIZES)
    dtype = draw(st.sampled_from(dtypes))
    layouts = st.sampled_from(["contiguous", "padded", "transposed"])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    left = poisoned(tokens, rows, dtype, device, draw(layouts), generator)
    right = poisoned(tokens, cols, dtype, device, draw(layouts), generator)
    return Problem(left, right, draw(supports(rows, cols, device)))


@dataclass
class ExpertProblem:
    """Activations sorted by expert and a support; ``dense`` is the float64 gradient of all experts."""

    left: Tensor
    right: Tensor
    ends: Tensor
    support: Support

    @property
    def dense(self) -> Tensor:
        left, right = self.left.double(), self.right.double()
        bounds = [0, *self.ends.tolist()]
        return torch.cat([left[a:b].t() @ right[a:b] for a, b in itertools.pairwise(bounds)])

    def at_support(self) -> Tensor:
        return self.dense.reshape(-1)[self.support.indices.long()]


@st.composite
def expert_problems(draw, dtypes: list[torch.dtype], device: str = "cpu") -> ExpertProblem:
    """Experts with and without tokens and entries, and tokens that belong to none."""
    experts, rows, cols, tokens = draw(st.integers(1, 6)), draw(SMALL_SIZES), draw(SMALL_SIZES), draw(SIZES)
    dtype = draw(st.sampled_from(dtypes))
    layouts = st.sampled_from(["contiguous", "padded", "transposed"])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    left = poisoned(tokens, rows, dtype, device, draw(layouts), generator)
    right = poisoned(tokens, cols, dtype, device, draw(layouts), generator)
    ends = sorted(draw(st.lists(st.integers(0, tokens), min_size=experts, max_size=experts)))
    kind = draw(st.sampled_from([torch.int32, torch.int64]))
    support = draw(supports(experts * rows, cols, device))
    return ExpertProblem(left, right, torch.tensor(ends, dtype=kind, device=device), support)
