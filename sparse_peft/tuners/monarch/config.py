"""The config of Monarch adapters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from ...constraints import Count, OneOf, Probability
from ..base_config import BaseSparseConfig, explains_fields

STARTS = ("zero", "residual")


@explains_fields
@dataclass
class MonarchConfig(BaseSparseConfig):
    """Monarch (https://arxiv.org/abs/2204.00595): a product of two block-diagonal factors beside the weight.

    The adapter is MoRe's (https://arxiv.org/abs/2408.17383): ``nblocks`` blocks of rank ``blk_r`` in ``A``
    ``(nblocks, blk_r, in / nblocks)`` and ``B`` ``(nblocks, out / nblocks, blk_r)``, with a fixed permutation
    between them; sizes that ``nblocks`` does not divide are padded. It has ``blk_r * (in + out)`` parameters, as LoRA
    of rank ``blk_r``, and a rank of up to ``nblocks * blk_r``. There is no scale: its output is added as it is.

    With ``blk_r`` below ``nblocks`` the blocks do not mix: a share of ``1 - blk_r / nblocks`` of the delta is zero
    whatever is trained. A warning says so.

    Args:
        nblocks: number of blocks of each factor.
        blk_r: rank of a block.
        dropout: probability with which an input is left out in training.
        init: ``"zero"``: ``B`` starts as zeros, ``"residual"``: the factors start as the
            [projection][sparse_peft.monarch_project] of the weight, of which frozen copies are subtracted. They
            take the same memory again, and another pair of products. The base weight stays as it is.
        weight_shapes: resolved ``[rows, cols]`` of the layers' stored weights; filled in when the adapter is made.

    Raises:
        ValueError, TypeError: a field that is out of range.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import MonarchConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, MonarchConfig(nblocks=4, blk_r=4, target_modules=["0"]))
        >>> {name: tuple(p.shape) for name, p in model.base_model.model[0].deltas["default"].named_parameters()}
        {'A': (4, 4, 16), 'B': (4, 8, 4)}
    """

    method: ClassVar[str] = "SPARSE_PEFT_MONARCH"

    nblocks: Count = field(default=4, metadata={"help": "Number of blocks of each factor."})
    blk_r: Count = field(default=4, metadata={"help": "Rank of a block."})
    dropout: Probability = field(
        default=0.0, metadata={"help": "Probability with which an input is left out in training."}
    )
    init: Annotated[str, OneOf(STARTS)] = field(
        default="zero", metadata={"help": "'zero', or 'residual': from the weight's projection."}
    )

    def claimed_sizes(self, layer: str) -> Iterator[tuple[str, int, str]]:
        yield "nblocks", self.nblocks, "A.0"
        yield "blk_r", self.blk_r, "A.1"
