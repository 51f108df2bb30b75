"""A sparse adapter out of a base model and a fully fine-tuned one: the entries that changed most.

The selection is LT-SFT's (Ansell et al. 2022, section 3.1) without its second training. Weights are read one at a time
from both sides, so neither model is ever in memory whole.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..numerics import topk_indices
from ..ops import effective_entries
from ..support import Budget, Support, allocate, divide, get_criterion
from ..tuners.combination import combined_config
from ..tuners.delta import SparseDelta
from ..tuners.files.checks import check_values
from ..tuners.sparse import SparseConfig, SparseModel
from ..tuners.targets import stored_shape
from .files import write_adapter
from .modules_to_save import OTHERS, save_whole
from .offline_adapter import named_tensors, sparse_state
from .weight_reader import Weights, name_of, structure_of, weights_of


def _relative(difference: Tensor, base: Tensor) -> Tensor:
    # a thousandth of the layer's typical weight: entries next to zero are no better than small ones
    floor = 1e-3 * base.square().mean(dtype=torch.float64).sqrt().item()
    return difference.abs().div_(base.abs().add_(max(floor, torch.finfo(torch.float32).tiny)))


# ``score(difference, base)``, both float32 matrices as stored: float32 scores, large ones are kept.
EXTRACTION_CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "magnitude": lambda difference, base: get_criterion("magnitude").score(difference),
    "relative": _relative,
    "principal": lambda difference, base: get_criterion("principal").score(difference),
}
"""Criteria of [`extract`][sparse_peft.adapters.extract]: ``{name: scores from (difference, base weight)}``."""


@dataclass(frozen=True)
class ExtractedLayer:
    """What was kept of one layer's difference.

    Attributes:
        name: the layer's.
        entries: kept.
        changed: entries of the weight that differ.
        size: entries of the weight.
        energy: sum of squares of the difference.
        kept: share of it that the adapter takes away, as its values are stored.
        inexact: kept entries where base plus delta, rounded to the base's dtype, is not the fine-tuned weight in that
            dtype: next to a much larger weight the last bits of a float32 delta do not suffice.
    """

    name: str
    entries: int
    changed: int
    size: int
    energy: float
    kept: float
    inexact: int


@dataclass(frozen=True)
class Extraction:
    """An adapter that was extracted, and what of the difference it has.

    Attributes:
        config: the adapter's.
        layers: those that differ.
        unchanged: target layers whose weights are equal; the adapter leaves them out.
        others: ``{tensor: sum of squares of its difference}`` of tensors that differ and are no target weights:
            embeddings, norms, biases, heads; infinite for those that the base does not have.
        saved: those of them that are stored with the adapter.
    """

    config: SparseConfig
    layers: tuple[ExtractedLayer, ...]
    unchanged: tuple[str, ...]
    others: dict[str, float]
    saved: tuple[str, ...] = field(default=())

    @property
    def entries(self) -> int:
        return sum(layer.entries for layer in self.layers)

    @property
    def kept(self) -> float:
        """Share of the sum of squares of all target layers' differences that the adapter has."""
        total = sum(layer.energy for layer in self.layers)
        return sum(layer.energy * layer.kept for layer in self.layers) / total


def extract(
    base: str | os.PathLike | nn.Module,
    finetuned: str | os.PathLike | nn.Module,
    output: str | os.PathLike,
    *,
    density: float | None = None,
    num_params: int | None = None,
    r: int | None = None,
    density_pattern: dict[str, float] | None = None,
    allocation: str = "numel",
    criterion: str = "magnitude",
    target_modules: list[str] | str = "all-linear",
    exclude_modules: list[str] | str | None = None,
    others: str = "leave_out",
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    save_dtype: str = "float32",
) -> Extraction:
    """Write the sparse adapter that takes the base model closest to the fine-tuned one.

    Entries that are equal in both are never stored, so the adapter may have fewer than its budget.

    Args:
        base: folder of the base model (safetensors, in one file or in shards), or the loaded model.
        finetuned: likewise the fine-tuned one.
        output: the adapter's folder; made if need be.
        density: share of the target layers' weights that is stored. Exactly one of ``density``, ``num_params`` and
            ``r`` is given; see [`Budget`][sparse_peft.support.Budget].
        num_params: number of stored entries over all target layers.
        r: LoRA-rank equivalent: as many entries as LoRA of this rank has parameters.
        density_pattern: ``{layer name or regular expression: density}`` for layers with a density of their own.
        allocation: how layers share the budget; ``"global"`` compares all layers' scores and reads everything twice.
        criterion: ``"magnitude"``: the largest changes; ``"relative"``: those that are large beside the base's weight;
            ``"principal"``: the largest entries of the best approximation of low rank of the change.
        target_modules: names or a regular expression of the layers that are compared, as in a config.
        exclude_modules: names or a regular expression of layers that are not.
        others: what to do about tensors that differ and are no target weights: ``"leave_out"`` them with a warning,
            ``"save"`` them whole through ``modules_to_save`` (biases of the target layers through ``bias``), or
            ``"refuse"``.
        base_model_name_or_path: what the config says; by default the base's folder or name.
        task_type: the config's, such as ``"CAUSAL_LM"``.
        save_dtype: of the values: ``"float32"``, ``"bfloat16"`` or ``"float16"``.

    Raises:
        ValueError: models that do not fit each other, differences that are not finite, none at all, or a bad budget;
            nothing is written then.
    """
    if criterion not in EXTRACTION_CRITERIA:
        raise ValueError(f"criterion={criterion!r}: one of {', '.join(EXTRACTION_CRITERIA)} is expected")
    if others not in OTHERS:
        raise ValueError(f"others={others!r}: one of {', '.join(OTHERS)} is expected")
    budget = Budget(density, num_params, r, dict(density_pattern or {}), allocation)
    structure = structure_of(base)
    request = SparseConfig(target_modules=target_modules, exclude_modules=exclude_modules, save_dtype=save_dtype)
    targets = SparseModel.find_targets(request, structure)
    SparseModel.check_targets(structure, targets)
    pair = _Pair(weights_of(base, structure), weights_of(finetuned, structure))
    shapes = {name: stored_shape(module) for name, module in targets.items()}

    def scores(name: str) -> Tensor:
        before, after = pair.matrices(name, shapes[name])
        return EXTRACTION_CRITERIA[criterion](_difference(name, before, after), before.float())

    counts = allocate(divide(shapes, budget), allocation, scores)
    layers, unchanged, states = [], [], {}
    for name, shape in shapes.items():
        before, after = pair.matrices(name, shape)
        layer, state = _extract_layer(
            name, before, after, counts[name], EXTRACTION_CRITERIA[criterion], getattr(torch, save_dtype)
        )
        if state is None:
            unchanged.append(name)
        else:
            layers.append(layer)
            states[name] = state
    if not states:
        raise ValueError(
            f"{pair.after.source}: none of the {len(shapes)} target layers differs from {pair.before.source}; is it "
            "the fine-tuned model?"
        )
    changed = pair.others({f"{name}.weight" for name in shapes})
    rest, modules, bias = _rest(structure, pair.after, states, changed, others)
    tensors = {
        name: {"values": state.values.detach().to(getattr(torch, save_dtype)), **state.file_tensors()}
        for name, state in states.items()
    }
    config = combined_config(SparseModel, [_config(base, base_model_name_or_path, task_type, states)], tensors)
    config.modules_to_save, config.bias, config.save_dtype = modules or None, bias, save_dtype
    result = Extraction(config, tuple(layers), tuple(unchanged), changed, tuple(sorted(rest)))
    story = (
        f"Extracted from a fully fine-tuned model with `sparse_peft.adapters.extract`: {result.entries:,} entries by "
        f"`{criterion}`, which have {result.kept:.1%} of the squared difference of the adapted layers."
    )
    write_adapter(output, config, {**named_tensors(SparseModel, tensors), **rest}, story)
    return result


def _config(base, name: str | None, task_type: str | None, states: dict[str, SparseDelta]) -> SparseConfig:
    return SparseConfig(
        base_model_name_or_path=name or name_of(base),
        task_type=task_type,
        weight_shapes={layer: list(state.shape) for layer, state in states.items()},
    )


def _difference(name: str, before: Tensor, after: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    difference = (after.to(wide) - before.to(wide)).float()
    check_values(difference, name, "take the difference of")
    return difference


def _extract_layer(
    name: str,
    before: Tensor,
    after: Tensor,
    count: int,
    score: Callable[[Tensor, Tensor], Tensor],
    dtype: torch.dtype,
) -> tuple[ExtractedLayer | None, SparseDelta | None]:
    """The ``count`` best entries that changed at all; nothing where none did."""
    difference = _difference(name, before, after)
    changed = int(difference.count_nonzero())
    if changed == 0:
        return None, None
    chosen = topk_indices(score(difference, before.float()).reshape(-1), count, name=name)
    flat = difference.reshape(-1)
    chosen = chosen[flat[chosen] != 0]
    if chosen.numel() == 0:  # a criterion may favour others; an adapted layer has one entry at least
        chosen = flat.abs().argmax()[None]
    wanted = flat[chosen]
    values = wanted.to(dtype).float()  # as they are stored
    check_values(values, name, f"store the difference in {dtype} of")
    energy = float(difference.square().sum(dtype=torch.float64))
    reached = effective_entries(before.reshape(-1)[chosen], values)
    inexact = int((reached != after.reshape(-1)[chosen].to(before.dtype)).sum())
    left = float((wanted.double() - values).square().sum())
    kept = (float(wanted.square().sum(dtype=torch.float64)) - left) / energy if energy else 1.0
    support = Support(tuple(before.shape), chosen, validate=False, name=name)
    layer = ExtractedLayer(name, support.nnz, changed, flat.numel(), energy, kept, inexact)
    return layer, sparse_state(support, values)


class _Pair:
    """The weights before and after fine-tuning."""

    def __init__(self, before: Weights, after: Weights):
        self.before, self.after = before, after

    def matrices(self, layer: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """A target layer's weight on both sides, as stored."""
        name, found = f"{layer}.weight", []
        for side in (self.before, self.after):
            if name not in side.names():
                raise ValueError(
                    f"{side.source}: no tensor {name} for the target layer {layer}; it holds another model, or a "
                    "checkpoint whose tensors are arranged otherwise: pass the loaded model instead"
                )
            size = torch.Size(side.shape(name)).numel()
            if side.shape(name)[0] != shape[0] or size != shape[0] * shape[1]:
                raise ValueError(
                    f"{side.source}: {name} has the shape {side.shape(name)}, where the base model's is {shape}; "
                    "these are different models"
                )
            weight = side.read(name)
            if not weight.is_floating_point() or weight.element_size() < 2:
                raise ValueError(
                    f"{side.source}: {name} is {weight.dtype}; extract needs floats of at least 16 bits, not a "
                    "quantised model"
                )
            found.append(weight.reshape(shape))
        return found[0], found[1]

    def others(self, targets: set[str]) -> dict[str, float]:
        """``{name: squared difference}`` of what differs besides the target weights."""
        changed = {}
        for name in sorted(self.after.names() - targets):
            if name not in self.before.names() or self.before.shape(name) != self.after.shape(name):
                changed[name] = float("inf")
                continue
            before, after = self.before.read(name), self.after.read(name)
            if not torch.equal(before, after.to(before.dtype)):
                changed[name] = float((after.double() - before.double()).square().sum())
        return changed


def _rest(
    structure: nn.Module, after: Weights, adapted: dict[str, SparseDelta], changed: dict[str, float], others: str
) -> tuple[dict[str, Tensor], list[str], str]:
    """What is stored besides the deltas: ``(tensors, modules_to_save, bias)``."""
    if not changed or others == "leave_out":
        if changed:
            names = ", ".join(list(changed)[:3])
            warnings.warn(
                f"{len(changed)} tensors differ and are no target weights, such as {names}: they are left out, and "
                "the adapter does not reproduce their part of the fine-tuning. others='save' stores them whole",
                stacklevel=3,
            )
        return {}, [], "none"
    if others == "refuse":
        raise ValueError(
            f"others='refuse': {len(changed)} tensors differ and are no target weights, such as "
            f"{', '.join(list(changed)[:3])}"
        )
    return save_whole(structure, changed, adapted, after.read, {name: after.shape(name) for name in changed})
