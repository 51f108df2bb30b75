"""Pruning a model without training."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..calibrate.activations import FeatureSums, first_two_moments, second_moments
from ..calibrate.blockwise import change_blockwise
from ..calibrate.gradient_sums import CandidateBudget, GradientSums
from ..calibrate.layer_view import LayerView
from ..calibrate.model_pass import ModelPass
from ..constraints import OneOf, ShareOrZero, validated
from ..support.budget import Budget, allocate, apportion, divide
from ..support.criteria import CRITERIA
from .armor import Armor, ArmorLinear
from .dsnot import DSnoT
from .layers import Names, layers_to_prune, rows_of, shape_of
from .masks import LayerMask, Masks, Removed, masks_of, record
from .patterns import NM, Channels, Pattern, PatternLike, Unstructured, as_pattern
from .scores import SCORES, LayerData, Score
from .sparsegpt import SparseGPT

ALLOCATIONS = ("uniform", "erk", "global")
"""How layers share the weights that stay; see [`prune`][sparse_peft.sparsify.prune]."""
REFINEMENTS = (DSnoT.name, Armor.name)
"""What improves on a mask; see [`prune`][sparse_peft.sparsify.prune]."""

LossFn = Callable[[nn.Module, Any], Any]


def prune(
    model: nn.Module,
    pattern: PatternLike,
    score: str | SparseGPT = "magnitude",
    *,
    allocation: str | Mapping[str, float] = "uniform",
    calibration: Iterable[Any] | None = None,
    refine: str | DSnoT | Armor | None = None,
    target_modules: Names = None,
    exclude_modules: Names = None,
    loss_fn: LossFn | None = None,
    sequential: bool | None = None,
    seed: int = 0,
    restorable: bool = False,
    progress: bool = True,
) -> Masks:
    """Set the least important weights of a model's linear layers to zero, in place and without training.

    Masks alone bring no speed: the model stores and multiplies its zeros. They make its files smaller, are a base to
    fine-tune (``SparseConfig(selection="nonzero")`` keeps the zeros) and a baseline to compare with.

    With data, blocks of the model are pruned one by one, each on the outputs of the pruned ones before it. Memory then
    holds the statistics of one block and the hidden states of all data. Layers are changed in place, one at a time.
    Scores from gradients hold one float32 for each weight of all layers, and see the dense model.

    In a distributed run all processes need the same data: masks are not exchanged.

    Args:
        model: without adapters; it runs in its present mode (training or evaluation).
        pattern: share of the weights that become zero, such as ``0.5``; ``"n:m"`` for ``n`` weights *kept* of every
            ``m`` consecutive inputs; or an [`Unstructured`][sparse_peft.sparsify.Unstructured],
            [`NM`][sparse_peft.sparsify.NM], [`Blocks`][sparse_peft.sparsify.Blocks] or
            [`Channels`][sparse_peft.sparsify.Channels].
        score: a name in [`SCORES`][sparse_peft.sparsify.SCORES], of which the largest stay, or a
            [`SparseGPT`][sparse_peft.sparsify.SparseGPT] with other settings.
        allocation: how layers share the weights that stay. ``"uniform"``: the same share of each; ``"erk"``: in
            proportion to ``rows + cols``; ``"global"``: the best scores of all layers, all computed in the dense
            model; ``{layer name: density}``: in proportion to these densities, as
            [`Sensitivity.densities`][sparse_peft.sparsify.Sensitivity.densities] finds them. The sum is always that
            of the pattern. N:M patterns and channels take ``"uniform"`` alone.
        calibration: batches for scores and refinements that need data, each passed as ``model(**batch)`` or to
            ``loss_fn``. Tokens that an ``attention_mask`` leaves out do not count. 128 sequences are usual.
        refine: ``"dsnot"`` or a [`DSnoT`][sparse_peft.sparsify.DSnoT] with other settings: repairs each mask by the
            means of the layer's inputs. ``"armor"`` or an [`Armor`][sparse_peft.sparsify.Armor]: replaces each layer
            by one with N:M weights between block-diagonal matrices, fitted to it; the authors' score is ``"nowag"``.
        target_modules: names, suffixes or regular expressions of layers; by default all linear layers but the head.
        exclude_modules: likewise, of layers to leave out.
        loss_fn: ``loss_fn(model, batch)``: the loss for scores from gradients; otherwise it only runs the model.
        sequential: True prunes block by block or says why it cannot; False takes the dense model's inputs; None does
            the first where it can.
        seed: of random scores.
        restorable: keep the removed values on the CPU, for [`restore`][sparse_peft.sparsify.restore]. SparseGPT and
            ARMOR change weights that stay, so that whole layers are kept.
        progress: show a bar that counts layers.

    Returns:
        The masks, also recorded with the model: [`masks_of`][sparse_peft.sparsify.masks_of].

    Warns:
        RuntimeWarning: a batch with inputs that are not finite is skipped; for SparseGPT, a layer saw fewer tokens
            than it has inputs.

    Raises:
        TypeError: a quantised layer.
        ValueError: a model with adapters, no layer, missing data, a pattern that does not fit a layer, or settings
            that contradict each other. The model is unchanged then. After an exception in a pass over the data some
            blocks may be pruned; with ``restorable=True``, ``restore`` undoes them.

    Example:
        >>> import torch
        >>> from sparse_peft.sparsify import prune
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
        >>> batches = [torch.randn(16, 8) for _ in range(2)]
        >>> masks = prune(model, 0.5, "wanda", calibration=batches, loss_fn=lambda model, x: model(x))
        >>> round(masks.density, 2), int((model[0].weight == 0).sum())
        (0.5, 24)
    """
    data = None if calibration is None else ModelPass(model, list(calibration), loss_fn)
    plan = _plan(model, pattern, score, allocation, refine, data, target_modules, exclude_modules, seed)
    if (old := masks_of(model)) is not None and old.removed:
        raise ValueError("the model is pruned already and keeps its original weights; restore(model) it first")
    with logging.tqdm(total=len(plan.layers), desc="pruning", unit="layer", disable=not progress) as bar:
        run = _Run(plan, data, sequential, restorable, bar.update)
        return run.masks_of_model(model)


@dataclass
class _Plan:
    """What is pruned and how.

    Attributes:
        pattern: of all layers.
        score: of the weights.
        sparsegpt: settings, if that is the score.
        refine: improves on masks; None to leave them.
        allocation: one of ``ALLOCATIONS``, or ``{layer name: density}``.
        layers: ``{layer name: view}``.
    """

    pattern: Pattern
    score: Score
    sparsegpt: SparseGPT | None
    refine: DSnoT | Armor | None
    allocation: str | Mapping[str, float]
    layers: dict[str, LayerView] = field(default_factory=dict)

    @property
    def needs_inputs(self) -> bool:
        return self.refine is not None or self.score.needs in ("activation", "second moment")

    def about(self) -> dict[str, str]:
        refine = {} if self.refine is None else {"refine": str(self.refine)}
        score = str(self.sparsegpt or self.score.name)
        allocation = self.allocation if isinstance(self.allocation, str) else "given"
        return {"pattern": str(self.pattern), "score": score, "allocation": allocation, **refine}

    def counts(self, scores: Callable[[str], Tensor] | None) -> dict[str, int]:
        """``{layer name: units that stay}``, in sum exactly the pattern's share."""
        grids = {name: self.pattern.grid(shape_of(layer)) for name, layer in self.layers.items()}
        if not isinstance(self.allocation, str):
            return self._in_proportion(grids, self.allocation)
        budget = Budget(density=self.pattern.density, allocation="numel")
        how = "numel" if self.allocation == "uniform" else self.allocation
        return allocate(divide(grids, budget), how, scores)

    def _in_proportion(self, grids: Mapping[str, tuple[int, int]], densities: Mapping[str, float]) -> dict[str, int]:
        units = [rows * cols for rows, cols in grids.values()]
        weights = [densities[name] * count for name, count in zip(grids, units, strict=True)]
        total = max(len(units), round(self.pattern.density * sum(units)))
        return dict(zip(grids, apportion(weights, units, total), strict=True))


def _plan(
    model: nn.Module,
    pattern: PatternLike,
    score: str | SparseGPT,
    allocation: str | Mapping[str, float],
    refine: str | DSnoT | Armor | None,
    data: ModelPass | None,
    target_modules: Names,
    exclude_modules: Names,
    seed: int,
) -> _Plan:
    """The arguments of [`prune`][sparse_peft.sparsify.prune], checked."""
    plan = settings(pattern, score, allocation, refine, has_data=data is not None, seed=seed)
    plan.layers = layers = layers_to_prune(model, target_modules, exclude_modules)
    if not isinstance(plan.allocation, str) and set(plan.allocation) != set(layers):
        missing, extra = sorted(set(layers) - set(plan.allocation)), sorted(set(plan.allocation) - set(layers))
        raise ValueError(
            f"allocation: no density of layer {', '.join(missing[:2]) or '-'}, and one of "
            f"{', '.join(map(repr, extra[:2])) or '-'}, which is not pruned; give one for each layer"
        )
    for layer_name, layer in layers.items():
        plan.pattern.check(shape_of(layer), layer_name)
        if isinstance(plan.refine, Armor):
            plan.refine.check_layer(shape_of(layer), layer_name)
    return plan


def settings(
    pattern: PatternLike,
    score: str | SparseGPT,
    allocation: str | Mapping[str, float],
    refine: str | DSnoT | Armor | None,
    *,
    has_data: bool,
    seed: int = 0,
) -> _Plan:
    """What is to be done, checked as far as that goes without a model; no layers yet.

    Raises:
        ValueError: an unknown name, missing data, or settings that contradict each other.
    """
    sparsegpt = score if isinstance(score, SparseGPT) else None
    name = validated("score", sparsegpt.name if sparsegpt else score, Annotated[str, OneOf(SCORES)])
    scored = Score(name, seed)
    if name == SparseGPT.name:
        sparsegpt = sparsegpt or SparseGPT()
    if allocation == "sensitivity":
        raise ValueError(
            "allocation='sensitivity': the damage of each layer is measured first; pass "
            "allocation=sensitivity(model, evaluate, by='layer').densities(0.5)"
        )
    allocation = validated("allocation", allocation, Annotated[str, OneOf(ALLOCATIONS)] | dict[str, ShareOrZero])
    made = as_pattern(pattern, "matrix" if allocation == "global" else scored.scope)
    if refine is not None and not isinstance(refine, (DSnoT, Armor)):
        refine = DSnoT() if validated("refine", refine, Annotated[str, OneOf(REFINEMENTS)]) == DSnoT.name else Armor()
    plan = _Plan(made, scored, sparsegpt, refine, allocation)
    _check_together(plan)
    if not has_data and (plan.needs_inputs or scored.needs == "gradient"):
        asking = f"score={name!r}" if scored.needs not in ("none", "weight") else f"refine={refine.name!r}"  # type: ignore[union-attr]
        raise ValueError(f"{asking} needs data: pass calibration=, batches of text like the model's own")
    return plan


def _check_together(plan: _Plan) -> None:
    """Refuse settings that contradict each other."""
    pattern, allocation = plan.pattern, plan.allocation
    if allocation != "uniform" and isinstance(pattern, (NM, Channels)):
        raise ValueError(f"allocation={allocation!r}: {pattern} has its own count in every layer; use 'uniform'")
    if allocation == "global" and getattr(pattern, "scope", "matrix") != "matrix":
        raise ValueError(
            f"allocation='global' compares the weights of all layers, and scope={getattr(pattern, 'scope', None)!r} "
            "those of a part of one; leave the scope out"
        )
    if allocation == "global" and plan.score.name == "random":
        raise ValueError("allocation='global' compares scores, and random ones say nothing; use 'uniform' or 'erk'")
    if plan.sparsegpt is not None:
        _check_sparsegpt(plan)
    if plan.refine is not None:
        plan.refine.check(pattern)


def _check_sparsegpt(plan: _Plan) -> None:
    if not isinstance(plan.pattern, (Unstructured, NM)):
        raise ValueError(f"score='sparsegpt' prunes n:m or single weights, not {plan.pattern}; use 'wanda'")
    if plan.allocation == "global":
        raise ValueError("allocation='global': SparseGPT scores a layer while it prunes it; use 'uniform' or 'erk'")
    if plan.refine is not None:
        raise ValueError(
            f"refine={plan.refine.name!r} starts from original weights, and score='sparsegpt' changes those that "
            "stay; use one of the two, or another score"
        )


@dataclass
class _Run:
    """One run of [`prune`][sparse_peft.sparsify.prune].

    Attributes:
        plan: what is done.
        data: the model's batches; None without.
        sequential: as in ``prune``.
        restorable: whether removed values are kept.
        done: called after each layer.
        counts: ``{layer name: units that stay}``.
        masks, removed: of the layers so far.
    """

    plan: _Plan
    data: ModelPass | None
    sequential: bool | None
    restorable: bool
    done: Callable[[], Any]
    counts: dict[str, int] = field(default_factory=dict)
    masks: dict[str, LayerMask] = field(default_factory=dict)
    removed: dict[str, Removed] = field(default_factory=dict)
    _gradients: dict[str, LayerData] = field(default_factory=dict)
    _scarce: dict[str, int] = field(default_factory=dict)

    def masks_of_model(self, model: nn.Module) -> Masks:
        """Prune the layers, and record their masks with the model, also those of a run that fails half-way."""
        if self.plan.score.needs == "gradient":
            self._gradients = self._collect_gradients()
        try:
            with torch.no_grad():
                self._prune_all()
        finally:
            made = Masks(self.masks, self.plan.about(), self.removed)
            if self.masks:
                record(model, made)
        self._warn_if_scarce()
        return made

    def _prune_all(self) -> None:
        if self.plan.allocation == "global":
            self._prune_globally()
            return
        self.counts = self.plan.counts(None)
        if not self.plan.needs_inputs:
            self._prune({name: self._gradients.get(name, LayerData()) for name in self.plan.layers})
            return
        assert self.data is not None
        measure = second_moments if self.plan.sparsegpt is not None else first_two_moments
        change_blockwise(self.data, self._modules, measure, self._prune_measured, sequential=self.sequential)

    def _prune_globally(self) -> None:
        """Layers compete with scores of the dense model, which are computed twice rather than held."""
        found = self._gradients
        if self.plan.needs_inputs:
            assert self.data is not None
            sums = first_two_moments(self._modules)
            sums.run(self.data)
            found = {name: self._data_of(sums, name) for name in self.plan.layers}
        found = {name: found.get(name, LayerData()) for name in self.plan.layers}
        self.counts = self.plan.counts(lambda name: self.plan.pattern.unit_scores(self._scores(name, found[name])))
        self._prune(found)

    @property
    def _modules(self) -> dict[str, nn.Module]:
        return {name: layer.module for name, layer in self.plan.layers.items()}

    def _collect_gradients(self) -> dict[str, LayerData]:
        """Sums over the data of all entries' gradients, or of their squares."""
        assert self.data is not None
        views = self.plan.layers
        everything = CandidateBudget(
            {name: name for name in views}, {name: layer.numel for name, layer in views.items()}, 1.0
        )
        collected = GradientSums(list(views.values()), CRITERIA[self.plan.score.name], everything)
        collected.run(copy.copy(self.data))
        return {
            name: LayerData(
                gradient=rows_of(layer, collected.sums[name].total.view(layer.shape)), batches=collected.batches[name]
            )
            for name, layer in views.items()
        }

    def _data_of(self, sums: FeatureSums, name: str) -> LayerData:
        own, tokens, gradient = sums.sums.pop(name), sums.tokens[name], self._gradients.get(name, LayerData())
        if self.plan.sparsegpt is not None:
            return LayerData(moment=own.div_(tokens), tokens=tokens)
        return LayerData(own, None, tokens, gradient.gradient, gradient.batches)

    def _prune_measured(self, sums: FeatureSums) -> None:
        for name in sums.targets:
            self._prune({name: self._data_of(sums, name)})

    def _scores(self, name: str, data: LayerData) -> Tensor:
        layer = self.plan.layers[name]
        return self.plan.score.of(rows_of(layer, layer.weight()), data, name)

    def _prune(self, layers: Mapping[str, LayerData]) -> None:
        for name, data in layers.items():
            if self.plan.sparsegpt is not None:
                self._compensated(name, data)
            else:
                self._chosen(name, data)
            self.done()

    def _chosen(self, name: str, data: LayerData) -> None:
        """Choose a layer's mask, and set its other weights to zero."""
        pattern, refine = self.plan.pattern, self.plan.refine
        weight = self.plan.layers[name].weight()
        kept = pattern.keep(self._scores(name, data), self.counts[name], name=name)
        if refine is None:
            return self._masked(name, weight, kept)
        assert data.sums is not None
        mean, square = data.sums / data.tokens
        if isinstance(refine, DSnoT):
            rows = rows_of(self.plan.layers[name], weight)
            return self._masked(name, weight, refine.refine(rows, kept, mean, square, pattern))
        return self._wrapped(name, weight, kept, square, refine)

    def _masked(self, name: str, weight: Tensor, kept: Tensor) -> None:
        gone = ~rows_of(self.plan.layers[name], kept)
        if self.restorable:
            self.removed[name] = Removed(weight[gone].cpu(), whole=False)
        self.masks[name] = LayerMask.of(~gone)
        weight.masked_fill_(gone, 0)

    def _wrapped(self, name: str, weight: Tensor, kept: Tensor, square: Tensor, armor: Armor) -> None:
        """Replace a layer by its factors."""
        layer, pattern = self.plan.layers[name], self.plan.pattern
        assert isinstance(pattern, NM) and self.data is not None
        made = armor.refine(rows_of(layer, weight), kept, square, pattern)
        self._replace(name, weight, rows_of(layer, made.core), rows_of(layer, made.kept))
        self.data.model.set_submodule(name, ArmorLinear(layer.module, made.left, made.right))

    def _replace(self, name: str, weight: Tensor, new: Tensor, kept: Tensor) -> None:
        """Write a weight of which the entries that stay have other values."""
        if self.restorable:
            self.removed[name] = Removed(weight.to("cpu", copy=True), whole=True)
        self.masks[name] = LayerMask.of(kept)
        weight.copy_(new)

    def _compensated(self, name: str, data: LayerData) -> None:
        """Prune a layer by SparseGPT."""
        layer, sparsegpt = self.plan.layers[name], self.plan.sparsegpt
        assert sparsegpt is not None and data.moment is not None
        weight = layer.weight()
        if data.tokens < shape_of(layer)[1]:
            self._scarce[name] = data.tokens
        new, kept = sparsegpt.prune(rows_of(layer, weight), data.moment, self.plan.pattern, self.counts[name], name)
        self._replace(name, weight, rows_of(layer, new), rows_of(layer, kept))

    def _warn_if_scarce(self) -> None:
        if self._scarce:
            name, tokens = min(self._scarce.items(), key=lambda item: item[1])
            warnings.warn(
                f"{len(self._scarce)} layers saw fewer tokens of the data than they have inputs, layer {name} "
                f"{tokens}; SparseGPT's compensation is then as much chance as the text's nature: give more data",
                RuntimeWarning,
                stacklevel=4,
            )
