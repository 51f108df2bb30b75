"""A sparse adapter from a base model and a fully fine-tuned one: the entries that changed most.

The selection is LT-SFT's (Ansell et al. 2022, section 3.1) without its second training. Weights are read one at a time
from both models, so neither is in memory as a whole.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ..constraints import Count, Names, OneOf, Pattern, Share, validate_fields
from ..numerics import topk_indices
from ..ops import effective_entries
from ..support import ALLOCATIONS, Budget, Support, allocate, divide, get_criterion
from ..tuners.base_config import FLOAT_DTYPES, BaseSparseConfig
from ..tuners.delta import SparseDelta
from ..tuners.entry_model import of_experts
from ..tuners.files.checks import check_values, values_on_disk
from ..tuners.targets import Targets, experts_among, stored_shape
from .entry_format import ENTRIES, sparse_adapter, sparse_state
from .files import write_adapter
from .modules_to_save import OTHERS, WholeTensors, save_whole
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
    """The part of one layer's difference that was kept.

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
    """An extracted adapter, and its share of the difference.

    Attributes:
        config: the adapter's, a [`SparseConfig`][sparse_peft.SparseConfig].
        layers: those that differ.
        unchanged: target layers whose weights are equal; the adapter leaves them out.
        others: ``{tensor: sum of squares of its difference}`` of tensors that differ and are no target weights:
            embeddings, norms, biases, heads; infinite for those that the base does not have.
        saved: those of them that are stored with the adapter.
    """

    config: BaseSparseConfig
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


@dataclass(frozen=True)
class ExtractOptions:
    """Options of [`extract`][sparse_peft.adapters.extract].

    Args:
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
        target_parameters: names of fused experts' parameters that are compared, as in a config.
        target_experts: compare the parameters of all fused experts.
        others: tensors that differ and are no target weights: ``"leave_out"`` them with a warning,
            ``"save"`` them whole through ``modules_to_save`` (biases of the target layers through ``bias``), or
            ``"refuse"``.
        base_model_name_or_path: for the config; by default the base's folder or name.
        task_type: for the config, such as ``"CAUSAL_LM"``.
        save_dtype: of the values: ``"float32"``, ``"bfloat16"`` or ``"float16"``.

    Raises:
        ValueError: a value that does not exist or is out of range.
    """

    density: Share | None = None
    num_params: Count | None = None
    r: Count | None = None
    density_pattern: dict[Pattern, Share] | None = None
    allocation: Annotated[str, OneOf(ALLOCATIONS)] = "numel"
    criterion: Annotated[str, OneOf(EXTRACTION_CRITERIA)] = "magnitude"
    target_modules: Names | Pattern = "all-linear"
    exclude_modules: Names | Pattern | None = None
    others: Annotated[str, OneOf(OTHERS)] = "leave_out"
    base_model_name_or_path: str | None = None
    task_type: str | None = None
    target_parameters: list[str] | None = None
    target_experts: bool = False
    save_dtype: Annotated[str, OneOf(FLOAT_DTYPES)] = "float32"

    def __post_init__(self) -> None:
        validate_fields(self)
        self.budget()

    def budget(self) -> Budget:
        """The budget that the fields describe."""
        return Budget(self.density, self.num_params, self.r, dict(self.density_pattern or {}), self.allocation)

    def score(self, difference: Tensor, base: Tensor) -> Tensor:
        """Scores of a layer's entries, float32; large ones are kept."""
        return EXTRACTION_CRITERIA[self.criterion](difference, base.float())


def extract(
    base: str | os.PathLike | nn.Module,
    finetuned: str | os.PathLike | nn.Module,
    output: str | os.PathLike,
    options: ExtractOptions | None = None,
    **fields: Any,
) -> Extraction:
    """Write the sparse adapter that takes the base model closest to the fine-tuned one.

    Entries that are equal in both are never stored, so the adapter may have fewer than its budget.

    Args:
        base: folder of the base model (safetensors, in one file or in shards), or the loaded model.
        finetuned: the fine-tuned model, likewise.
        output: the adapter's folder; made if need be.
        options: budget, criterion and more.
        fields: of [`ExtractOptions`][sparse_peft.adapters.ExtractOptions], in place of ``options``.

    Raises:
        ValueError: models that do not fit each other, differences that are not finite, none at all, or a bad budget;
            nothing is written then.

    Example:
        >>> import copy, tempfile, torch
        >>> from sparse_peft.adapters import extract
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> finetuned = copy.deepcopy(base)
        >>> with torch.no_grad():
        ...     _ = finetuned[0].weight[3].add_(1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = extract(base, finetuned, folder, density=0.1, target_modules=["0"])
        >>> found.config.num_entries
        {'0': 64}
    """
    options = options_of(options, fields)
    structure = structure_of(base)
    targets = targets_of(options, structure)
    pair = WeightPair(weights_of(base, structure), weights_of(finetuned, structure), targets)
    found = extract_layers(pair, targets, options)
    states = {name: state for name, (_, state) in found.items()}
    changed = pair.others(set(pair.tensors.values()))
    whole = _whole_tensors(structure, pair.after, states, changed, options.others)
    like = ENTRIES.config_class(
        base_model_name_or_path=options.base_model_name_or_path or name_of(base),
        task_type=options.task_type,
        target_parameters=[name for name in found if name in experts_among(targets)] or None,
        modules_to_save=whole.modules or None,
        bias=whole.bias,
    )
    config, tensors = sparse_adapter(like, states, options.save_dtype)
    layers = tuple(layer for layer, _ in found.values())
    unchanged = tuple(name for name in targets if name not in found)
    result = Extraction(config, layers, unchanged, changed, tuple(sorted(whole.tensors)))
    story = (
        f"Extracted from a fully fine-tuned model with `sparse_peft.adapters.extract`: {result.entries:,} entries by "
        f"`{options.criterion}`, which have {result.kept:.1%} of the squared difference of the adapted layers."
    )
    write_adapter(output, config, {**tensors, **whole.tensors}, story)
    return result


def options_of(options: ExtractOptions | None, fields: dict[str, Any]) -> ExtractOptions:
    """The options, given as one object or by their fields."""
    if options is not None and fields:
        raise TypeError(f"options and {', '.join(fields)} are both given; put all fields into the options")
    return options or ExtractOptions(**fields)


def targets_of(options: ExtractOptions, structure: nn.Module) -> Targets:
    """The layers that are compared, in the model's order."""
    request = ENTRIES.config_class(
        target_modules=options.target_modules,
        exclude_modules=options.exclude_modules,
        target_parameters=options.target_parameters,
        target_experts=options.target_experts,
        save_dtype=options.save_dtype,
    )
    targets = ENTRIES.model_class.find_targets(request, structure)
    ENTRIES.model_class.check_targets(structure, targets)
    return targets


def extract_layers(
    pair: WeightPair, targets: Targets, options: ExtractOptions
) -> dict[str, tuple[ExtractedLayer, SparseDelta]]:
    """``{layer name: its summary and delta}`` of the layers that changed."""
    shapes = {name: stored_shape(module) for name, module in targets.items()}
    budget = of_experts(options.budget(), targets)

    def scores(name: str) -> Tensor:
        before, after = pair.matrices(name, shapes[name])
        return options.score(_difference(name, before, after), before)

    counts = allocate(divide(shapes, budget), options.allocation, scores)
    found = {}
    for name, shape in shapes.items():
        before, after = pair.matrices(name, shape)
        layer = _extract_layer(name, before, after, counts[name], options)
        if layer is not None:
            found[name] = layer
    if not found:
        raise ValueError(
            f"{pair.after.source}: none of the {len(shapes)} target layers differs from {pair.before.source}; is it "
            "the fine-tuned model?"
        )
    return found


def _difference(name: str, before: Tensor, after: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    difference = (after.to(wide) - before.to(wide)).float()
    check_values(difference, name, "take the difference of")
    return difference


def _extract_layer(
    name: str, before: Tensor, after: Tensor, count: int, options: ExtractOptions
) -> tuple[ExtractedLayer, SparseDelta] | None:
    """The ``count`` best entries that changed at all; None where none did."""
    difference = _difference(name, before, after)
    changed = int(difference.count_nonzero())
    if changed == 0:
        return None
    chosen = topk_indices(options.score(difference, before).reshape(-1), count, name=name)
    flat = difference.reshape(-1)
    chosen = chosen[flat[chosen] != 0]
    if chosen.numel() == 0:  # a criterion may favour others; an adapted layer has one entry at least
        chosen = flat.abs().argmax()[None]
    wanted = flat[chosen]
    values = values_on_disk(wanted, getattr(torch, options.save_dtype), name).float()
    energy = float(difference.square().sum(dtype=torch.float64))
    reached = effective_entries(before.reshape(-1)[chosen], values)
    inexact = int((reached != after.reshape(-1)[chosen].to(before.dtype)).sum())
    left = float((wanted.double() - values).square().sum())
    kept = (float(wanted.square().sum(dtype=torch.float64)) - left) / energy if energy else 1.0
    support = Support((before.shape[0], before.shape[1]), chosen, validate=False, name=name)
    layer = ExtractedLayer(name, support.nnz, changed, flat.numel(), energy, kept, inexact)
    return layer, sparse_state(support, values)


class WeightPair:
    """The weights before and after fine-tuning.

    Args:
        before: of the base model.
        after: of the fine-tuned one.
        targets: the layers that are compared.

    Attributes:
        tensors: ``{layer name: its weight's}``.
    """

    def __init__(self, before: Weights, after: Weights, targets: Targets):
        self.before, self.after = before, after
        experts = experts_among(targets)
        self.tensors = {name: name if name in experts else f"{name}.weight" for name in targets}

    def matrices(self, layer: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """A target layer's weight on both sides, as stored."""
        name, found = self.tensors[layer], []
        for side in (self.before, self.after):
            if name not in side.names():
                raise ValueError(
                    f"{side.source}: no tensor {name} for the target layer {layer}; it holds another model, or a "
                    "checkpoint whose tensors are arranged otherwise: pass the loaded model instead"
                )
            size = torch.Size(side.shape(name))
            rows = size[:2].numel() if name == layer else size[0]  # experts lie one above the other
            if rows != shape[0] or size.numel() != shape[0] * shape[1]:
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
        """``{name: squared difference}`` of the tensors that differ and are no target weights."""
        changed = {}
        for name in sorted(self.after.names() - targets):
            if name not in self.before.names() or self.before.shape(name) != self.after.shape(name):
                changed[name] = float("inf")
                continue
            before, after = self.before.read(name), self.after.read(name)
            if not torch.equal(before, after.to(before.dtype)):
                changed[name] = float((after.double() - before.double()).square().sum())
        return changed


def _whole_tensors(
    structure: nn.Module, after: Weights, adapted: dict[str, SparseDelta], changed: dict[str, float], others: str
) -> WholeTensors:
    """The tensors that are stored besides the deltas."""
    if not changed:
        return WholeTensors()
    if others == "save":
        return save_whole(structure, {name: after.shape(name) for name in changed}, adapted, after.read)
    differ = f"{len(changed)} tensors differ and are no target weights, such as {', '.join(list(changed)[:3])}"
    if others == "refuse":
        raise ValueError(f"others='refuse': {differ}")
    warnings.warn(
        f"{differ}: they are left out, and the adapter does not reproduce their part of the fine-tuning. "
        "others='save' stores them whole",
        stacklevel=3,
    )
    return WholeTensors()
