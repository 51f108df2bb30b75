"""The config of sparse-aware fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, cast

from ...constraints import Count, CountOrZero, OneOf, Positive, PositiveOrZero, Share, Steps
from ...sparsify import NM, Unstructured, as_pattern
from ...support import steps_of
from ..base_config import BaseSparseConfig, explains_fields, required
from ..scale import LORA_RATE, LORA_SCALE
from .recipes import DECAYS, LADDERS, RECIPES, Recipe, Timeline, ladder_of

TRAINS = ("low_rank", "sparse", "low_rank+sparse", "weights")
SCORES = ("magnitude", "random", "nonzero")
SCOPES = ("row", "matrix")
SELECTIONS = ("random", "magnitude", "residual")
FLOWS = ("decayed", "straight")
# By default, of recipes whose pull has one.
RAMP = 0.25


@explains_fields
@dataclass
class PruneConfig(BaseSparseConfig):
    """Sparse-aware fine-tuning: the weight in use is ``mask * (W + delta)``.

    The base weight ``W`` stays as it is: it comes back bit for bit, and a model with its adapter disabled is the dense
    one. Merging writes the masked weight, zeros included. A *recipe* says when the mask changes and what trains
    meanwhile. Recipes that change it need [`SparsityCallback`][sparse_peft.SparsityCallback] or a
    [`SparsityController`][sparse_peft.SparsityController].

    - ``"static"``: fixed ([SPDF](https://arxiv.org/abs/2303.10464));
      [`release_masks`][sparse_peft.release_masks] lets zeros grow again.
    - ``"gradual"``: fewer weights stay, cubically between 25 and 75 % of the run
      ([Zhu and Gupta](https://arxiv.org/abs/1710.01878)).
    - ``"pst"``: likewise, by magnitude plus scores that train ([PST](https://arxiv.org/abs/2205.11005)).
    - ``"ast"``: chosen anew every 10 steps; masked weights decay ([AST](https://arxiv.org/abs/2407.20584)).
    - ``"cast"``: dense until masked weights were pulled to zero ([CAST](https://arxiv.org/abs/2509.25996)).
    - ``"mdgf"``: the mask's zeros begin as ones and decay ([Progressive Gradient
      Flow](https://arxiv.org/abs/2402.04744)); ``"sdgf"``: a ladder of n:m patterns, likewise.
    - ``"bdwp"``: a second mask, along the outputs, for the input's gradient
      ([BDWP](https://arxiv.org/abs/2309.13015)).
    - ``"l1"``: dense with an L1 norm until half of the run, then pruned
      ([Sparse then Prune](https://arxiv.org/abs/2307.11988)).
    - ``"dsee"``: of the base alone, ``mask * W + delta`` ([DSEE](https://arxiv.org/abs/2111.00160)).

    Masks bring no speed: a masked weight is multiplied densely.

    Args:
        recipe: see above.
        pattern: share of the weights that become zero, or ``"n:m"`` for ``n`` weights kept of ``m`` inputs.
        scope: what the weights of a share are compared within: ``"matrix"`` or ``"row"``.
        score: what a first mask is chosen by: ``"magnitude"``, ``"random"``, or ``"nonzero"``, which keeps the zeros
            that the base has. For other scores prune a copy and pass its masks to
            [`set_masks`][sparse_peft.set_masks].
        trains: what the delta is: ``"low_rank"``, ``"sparse"``, both as ``"low_rank+sparse"``, or all ``"weights"``.
        r: rank of the low-rank part.
        alpha: it is scaled by ``alpha / r``.
        density: share of the weights in the sparse part.
        selection: how its positions are chosen: ``"random"``, ``"magnitude"``, or ``"residual"``: what the weight's
            best low-rank approximation misses most, as DSEE does.
        start: completed steps (int) or share of the run (float) from which the mask changes.
        stop: likewise, after which it is final.
        mask_every: optimizer steps from one choice of the mask to the next.
        grad_flow: ``"decayed"``: the delta's gradient is multiplied by the mask; ``"straight"``: it is not, until the
            mask is final.
        pull: weight of what pulls weights to zero: with ``"ast"`` and ``"bdwp"`` the masked weights are added to the
            gradient (SR-STE), with ``"l1"`` the signs of all. With ``"cast"``, masked weights move towards zero by the
            learning rate times the weight in each step, and never across.
        pull_ramp: completed steps, or share of the run, until the pull has this weight.
        mask_decay: with ``"mdgf"``: ``"exp"`` or ``"linear"``.
        ladder: with ``"sdgf"``: ``"stepwise"`` (7:8, 4:8, 2:8) or ``"geometric"`` (16:64, 8:32, 4:16).
        score_rank: with ``"pst"``: rank of the scores.
        preserve_zeros: with ``"dsee"``: multiply the update by the mask, too.
        slorb: with ``"ast"``: run of inputs that share a trained residual, beside the mask; 0 for none.
        seed: of random masks and positions.
        weight_shapes: resolved ``[rows, cols]`` of the layers' stored weights; recorded, not to be set.

    Raises:
        ValueError, TypeError: a field that is out of range, or two that contradict each other.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import PruneConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, PruneConfig(recipe="static", pattern="2:4", r=4, target_modules=["0"]))
        >>> merged = model.merge_and_unload()
        >>> int((merged[0].weight == 0).sum())
        1024
    """

    method: ClassVar[str] = "SPARSE_PEFT_PRUNE"

    recipe: Annotated[str, OneOf(RECIPES)] = field(
        default="static", metadata={"help": "When the mask changes, and what trains meanwhile."}
    )
    pattern: float | str | None = field(
        default=None, metadata={"help": "Share of zeros, or n:m for n weights kept of m; 0.5 or the recipe's."}
    )
    scope: Annotated[str, OneOf(SCOPES)] = field(
        default="matrix", metadata={"help": "What the weights of a share are compared within."}
    )
    score: Annotated[str, OneOf(SCORES)] = field(
        default="magnitude", metadata={"help": "What a first mask is chosen by."}
    )
    trains: Annotated[str, OneOf(TRAINS)] | None = field(
        default=None, metadata={"help": "What the delta is: low rank, sparse, both, or all weights."}
    )
    r: Count = field(default=8, metadata={"help": "Rank of the low-rank part."})
    alpha: Positive = field(default=16, metadata={"help": "The low-rank part is scaled by alpha / r."})
    density: Share = field(default=0.01, metadata={"help": "Share of the weights in the sparse part."})
    selection: Annotated[str, OneOf(SELECTIONS)] | None = field(
        default=None, metadata={"help": "How the sparse part's positions are chosen."}
    )
    start: Steps | None = field(
        default=None, metadata={"help": "Steps (int) or share of the run (float) from which the mask changes."}
    )
    stop: Steps | None = field(
        default=None, metadata={"help": "Steps (int) or share of the run (float) after which the mask is final."}
    )
    mask_every: Count = field(default=10, metadata={"help": "Optimizer steps between two choices of the mask."})
    grad_flow: Annotated[str, OneOf(FLOWS)] | None = field(
        default=None, metadata={"help": "Whether the delta's gradient is multiplied by the mask."}
    )
    pull: PositiveOrZero | None = field(default=None, metadata={"help": "Weight of what pulls weights to zero."})
    pull_ramp: Steps = field(
        default=RAMP, metadata={"help": "Steps (int) or share of the run (float) until the pull is at its height."}
    )
    mask_decay: Annotated[str, OneOf(DECAYS)] = field(
        default="exp", metadata={"help": "With recipe='mdgf': how the mask's zeros decay."}
    )
    ladder: Annotated[str, OneOf(LADDERS)] = field(
        default="stepwise", metadata={"help": "With recipe='sdgf': the patterns before the last."}
    )
    score_rank: Count = field(default=8, metadata={"help": "With recipe='pst': rank of the scores."})
    preserve_zeros: bool = field(
        default=False, metadata={"help": "With recipe='dsee': whether the mask multiplies the update, too."}
    )
    slorb: CountOrZero = field(
        default=0, metadata={"help": "With recipe='ast': run of inputs that share a residual; 0 for none."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of random masks and positions."})

    @property
    def plan(self) -> Recipe:
        """What the recipe's name stands for."""
        return RECIPES[self.recipe]

    def fill_in(self) -> None:
        super().fill_in()
        for name in ("pattern", "trains", "start", "stop"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(self.plan, name))
        if self.grad_flow is None:
            self.grad_flow = "straight" if self.plan.straight else "decayed"
        if self.pull is None:
            self.pull = self.plan.pull_weight
        if self.selection is None:
            self.selection = "residual" if self.plan.outside else "random"

    def check(self) -> None:
        super().check()
        pattern = self.mask_pattern
        needs_nm = "sdgf" if self.plan.shrinks == "ladder" else "bdwp" if self.plan.back else None
        if needs_nm and not isinstance(pattern, NM):
            raise ValueError(f"pattern={self.pattern!r} with recipe={needs_nm!r}: n:m is expected, such as '2:8'")
        if self.recipe == "gradual" and isinstance(pattern, NM):
            raise ValueError(
                f"pattern={self.pattern!r} with recipe='gradual': a share of zeros is expected, such as 0.5; 'sdgf' "
                "approaches n:m patterns by a ladder"
            )
        if self.slorb and self.preserve_zeros:
            raise ValueError(
                f"slorb={self.slorb} with preserve_zeros=True: the residual is in all weights; leave one out"
            )
        if self.slorb and self.recipe != "ast":
            raise ValueError(f"slorb={self.slorb} with recipe={self.recipe!r}: only 'ast' has this residual")
        if self.score != "magnitude" and self.plan.changes:
            raise ValueError(
                f"score={self.score!r} with recipe={self.recipe!r}: its masks follow the magnitude of weights as they "
                "train; 'static' and 'dsee' have a fixed mask"
            )

    @property
    def mask_pattern(self) -> NM | Unstructured:
        """The last mask's pattern.

        Raises:
            ValueError: ``pattern`` is neither a share nor n:m.
        """
        made = as_pattern(cast("float | str", self.pattern), self.scope)
        assert isinstance(made, (NM, Unstructured))  # what numbers and texts stand for
        return made

    @property
    def is_straight(self) -> bool:
        """Whether gradients pass the mask whole, while it changes."""
        return self.grad_flow == "straight"

    @property
    def fills_zeros(self) -> bool:
        """Whether the weight in use has numbers where the mask has zeros."""
        return self.is_outside or self.slorb > 0

    @property
    def is_outside(self) -> bool:
        """Whether the delta is added behind the mask from the start."""
        return self.plan.outside and not self.preserve_zeros

    def timeline(self, total_steps: int | None) -> Timeline:
        """The recipe in a run of this many optimizer steps.

        Raises:
            ValueError: shares of a run whose length is not known.
        """
        pattern, recipe = self.mask_pattern, self.plan
        if not recipe.changes:
            return Timeline(recipe, pattern, 0, 0, 1)
        start = steps_of(required(self.start, "start"), total_steps, "start")
        stop = steps_of(required(self.stop, "stop"), total_steps, "stop")
        if stop < max(1, start):
            raise ValueError(f"stop={self.stop!r} is step {stop}, before start={self.start!r}, step {start}")
        ladder: tuple[NM, ...] = ()
        if recipe.shrinks == "ladder" and isinstance(pattern, NM):
            ladder = ladder_of(pattern, self.ladder)
        pull = required(self.pull, "pull")
        ramp = steps_of(self.pull_ramp, total_steps, "pull_ramp") if pull else 0
        return Timeline(recipe, pattern, start, stop, self.mask_every, ladder, self.mask_decay, pull, ramp)

    def opening(self) -> Timeline:
        """The recipe before its first step, whatever the length of the run."""
        ladder = ladder_of(self.mask_pattern, self.ladder) if isinstance(self.mask_pattern, NM) else ()
        return Timeline(self.plan, self.mask_pattern, 0, 1, 1, ladder, self.mask_decay)

    @property
    def scale(self) -> float:
        """The factor of the low-rank part."""
        return self.alpha / self.r

    def entries(self, numel: int) -> int:
        """Entries of the sparse part of a weight of ``numel``."""
        return max(1, round(self.density * numel))

    def suited_rate(self) -> float | None:
        return LORA_RATE * LORA_SCALE / self.scale if self.trains == "low_rank" else None

    def claimed_sizes(self, layer: str) -> Iterator[tuple[str, int, str]]:
        if "low_rank" in required(self.trains, "trains"):
            yield "r", self.r, "A.0"
        if self.plan.learns_scores:
            yield "score_rank", self.score_rank, "score_down.0"
        numel = math.prod((self.weight_shapes or {}).get(layer, [0]))
        if "sparse" in required(self.trains, "trains") and numel:
            yield "density", self.entries(numel), "values.0"
        if self.trains == "weights":
            yield "trains", 1, "dense.0"
        if self.slorb:
            yield "slorb", 1, "residual.0"

    @property
    def changes_in_training(self) -> bool:
        return self.plan.changes

    @property
    def controller_role(self) -> str:
        return "changes its masks"

    def unreached_events(self, total_steps: int | None) -> Iterator[str]:
        if total_steps is None:
            return
        stop = steps_of(required(self.stop, "stop"), total_steps, "stop")
        if stop > total_steps:
            yield f"the mask never gets to pattern={self.pattern!r}: stop={self.stop!r} is after step {total_steps}"
