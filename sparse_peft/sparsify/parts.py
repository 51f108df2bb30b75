"""What a model loses when one part of it is pruned: layers, kinds of layers, widths, whole blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor, nn
from transformers.utils import logging

from ..calibrate.block_chain import chains_of
from ..calibrate.model_pass import layer_input
from ..constraints import OneOf, validated
from ..support.budget import apportion
from .curve import Evaluate, measured, pruned
from .layers import layers_to_prune
from .patterns import Channels, PatternLike, Sparsity

PARTS = ("layer", "kind", "width", "depth")
"""What is pruned at a time; see [`sensitivity`][sparse_peft.sparsify.sensitivity]."""
DEFAULTS: dict[str, PatternLike] = {"layer": 0.5, "kind": 0.5, "width": Channels(0.25)}


@dataclass(frozen=True)
class Sensitivity:
    """A metric for each part of a model that was pruned alone.

    Attributes:
        by: one of ``PARTS``.
        dense: the metric of the whole model.
        metrics: ``{part: metric}``.
        sizes: ``{part: weights}``.
        higher_is_better: of the metric.
    """

    by: str
    dense: float
    metrics: dict[str, float]
    sizes: dict[str, int]
    higher_is_better: bool

    @property
    def damage(self) -> dict[str, float]:
        """``{part: by how much the metric got worse}``, the most sensitive part first."""
        sign = 1 if self.higher_is_better else -1
        damage = {part: sign * (self.dense - metric) for part, metric in self.metrics.items()}
        return dict(sorted(damage.items(), key=lambda item: -item[1]))

    def densities(self, sparsity: float) -> dict[str, float]:
        """Shares of each layer that stay, for ``prune(..., allocation=...)``.

        If a layer's damage grows with the square of its share of zeros, the sum of all damages is least with shares in
        proportion to ``weights / damage``. No layer keeps less than half of the mean density.

        Args:
            sparsity: share of zeros in all layers together.

        Raises:
            ValueError: parts other than layers.
        """
        if self.by != "layer":
            raise ValueError(f"by={self.by!r}: densities are of single layers; measure sensitivity(..., by='layer')")
        sparsity = validated("sparsity", sparsity, Sparsity)
        sizes, damage = list(self.sizes.values()), [max(0.0, self.damage[name]) for name in self.sizes]
        # a layer that loses nothing is no better known than one that loses a thousandth of the mean
        least = max(sum(damage) / len(damage) / 1000, 1e-30)
        weights = [size * size / max(lost, least) for size, lost in zip(sizes, damage, strict=True)]
        most = [int(size * (1 + sparsity) / 2) for size in sizes]
        zeros = apportion(weights, most, min(round(sparsity * sum(sizes)), sum(most)), floor=0)
        return {name: 1 - count / size for (name, size), count in zip(self.sizes.items(), zeros, strict=True)}


def sensitivity(
    model: nn.Module,
    evaluate: Evaluate,
    by: str = "layer",
    pattern: PatternLike | None = None,
    score: str = "magnitude",
    *,
    higher_is_better: bool = True,
    progress: bool = True,
    **options: Any,
) -> Sensitivity:
    """Measure a model with one part pruned at a time.

    Args:
        model: without adapters; it has its weights back after each part, bit for bit.
        evaluate: ``evaluate(model)``: a number; called without gradients.
        by: the parts. ``"layer"``: each linear layer; ``"kind"``: all layers of the same last name, such as
            ``"q_proj"``; ``"width"``: each linear layer, of which input channels go; ``"depth"``: each block, which is
            skipped.
        pattern: of the part; by default 0.5, for ``"width"`` a quarter of the input channels. ``"depth"`` has none.
        score: of [`prune`][sparse_peft.sparsify.prune].
        higher_is_better: of the number; False for a loss or a perplexity.
        progress: show a bar that counts parts.
        options: of [`prune`][sparse_peft.sparsify.prune]; ``target_modules`` and ``exclude_modules`` say which layers
            and blocks have parts.

    Raises:
        ValueError: no parts, a pattern for ``"depth"``, or what ``prune`` raises.

    Example:
        >>> import torch
        >>> from sparse_peft.sparsify import prune, sensitivity
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 4)), torch.randn(64, 16)
        >>> y = model(x).detach()
        >>> found = sensitivity(model, lambda m: -float((m(x) - y).square().mean()), progress=False)
        >>> masks = prune(model, 0.5, allocation=found.densities(0.5), progress=False)
        >>> sorted(found.damage) == ["0", "1"], masks.kept
        (True, 160)
    """
    by = validated("by", by, Annotated[str, OneOf(PARTS)])
    if by == "depth" and pattern is not None:
        raise ValueError(f"pattern={pattern!r}: by='depth' skips whole blocks; leave the pattern out")
    names = {key: options.pop(key, None) for key in ("target_modules", "exclude_modules")}
    layers = {name: layer.numel for name, layer in layers_to_prune(model, **names).items()}
    if options.get("calibration") is not None:
        options["calibration"] = list(options["calibration"])
    pattern = DEFAULTS.get(by) if pattern is None else pattern
    parts = _blocks(model, layers) if by == "depth" else _groups(by, layers)

    def change(part: str) -> AbstractContextManager[Any]:
        if pattern is None:
            return skipped(model.get_submodule(part))
        # whole names, which may be suffixes of others
        exact = rf"\A(?:{'|'.join(map(re.escape, parts[part]))})"
        return pruned(model, pattern, score, target_modules=[exact], **options)

    dense, metrics = measured(evaluate, model), {}
    for part in logging.tqdm(parts, desc="measuring", unit="part", disable=not progress):
        with change(part):
            metrics[part] = measured(evaluate, model)
    sizes = {part: sum(layers[member] for member in members) for part, members in parts.items()}
    return Sensitivity(by, dense, metrics, sizes, higher_is_better)


def _groups(by: str, layers: dict[str, int]) -> dict[str, list[str]]:
    """``{part: its layers}``."""
    groups: dict[str, list[str]] = {}
    for name in layers:
        groups.setdefault(name.rpartition(".")[2] if by == "kind" else name, []).append(name)
    return groups


def _blocks(model: nn.Module, layers: dict[str, int]) -> dict[str, list[str]]:
    """``{block: its layers}``."""
    blocks: dict[str, list[str]] = {}
    for chain in chains_of(model, list(layers)):
        for name, index in chain.places.items():
            blocks.setdefault(f"{chain.name}.{index}", []).append(name)
    if not blocks:
        raise ValueError(
            f"by='depth': no layer of {type(model).__name__} is in an nn.ModuleList of blocks; use by='layer'"
        )
    return blocks


@contextmanager
def skipped(block: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block a model's block passes on its input; its own output is computed and dropped."""

    def pass_on(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = layer_input(args, kwargs)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    hook = block.register_forward_hook(pass_on, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
