"""Sketches of a model's layers from data, before the adapter is made."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from transformers.utils import logging

from ...calibrate import assign_codes, compensated_sketch, fit_codebooks, refit_codebooks
from ...calibrate.activations import FeatureSums, second_moments
from ...calibrate.blockwise import change_blockwise
from ...calibrate.codebooks import Sketch, ascending
from ...calibrate.model_pass import ModelPass
from ...ops import code_gather, pack_codes
from ..base_config import required
from ..four_bit import prepare_four_bit
from ..targets import base_of, dense_weight, in_dim_of
from .config import SketchConfig
from .model import SketchModel


@dataclass(frozen=True)
class Recipe:
    """How [`sketch_model`][sparse_peft.sketch_model] makes one layer's sketch of its weight and inputs' moment."""

    config: SketchConfig
    compensate: bool
    refit: bool
    importance: float
    damping: float
    act_order: bool
    block: int

    def sketch(self, name: str, weight: Tensor, moment: Tensor) -> Sketch:
        """A sketch of a weight ``(outputs, inputs)``."""
        dtype = getattr(torch, required(self.config.initial_dtype, "initial_dtype"))
        bits, groups = self.config.bits, self.config.groups_of(name)
        counts = moment.diagonal().pow(self.importance)
        tables = fit_codebooks(weight, bits, groups, weights=counts, method=self.config.clustering, name=name)
        # files have rounded tables, and the codes are chosen for these
        tables = tables.to(dtype).float()
        if self.compensate:
            tables, codes = compensated_sketch(
                weight,
                moment,
                bits,
                groups,
                codebooks=tables,
                damping=self.damping,
                act_order=self.act_order,
                block=self.block,
                name=name,
            )
        else:
            codes = assign_codes(weight, tables)
        if self.refit:
            tables = refit_codebooks(weight, codes, moment, tables, name=name)
            tables, codes = ascending(tables.to(dtype).float(), codes)
        return Sketch(tables, pack_codes(codes, bits), bits, groups, weight.shape[1])


def sketch_model(
    model: nn.Module,
    config: SketchConfig,
    data: Iterable,
    *,
    loss_fn: Callable[[nn.Module, Any], Any] | None = None,
    sequential: bool | None = None,
    compensate: bool = True,
    refit: bool = True,
    importance: float | None = None,
    damping: float = 0.1,
    act_order: bool = True,
    block: int = 128,
    progress: bool = True,
) -> SketchConfig:
    """Make the sketches of every target layer from calibration data, before the adapter is made.

    A layer's tables are fitted to its weights, weighted by the size of their inputs. Codes are chosen by column; later
    columns compensate the output errors of earlier ones (GPTQ, https://arxiv.org/abs/2210.17323, and LeanQuant,
    https://arxiv.org/abs/2407.10032). Least squares then refit the tables. All three steps need the second moment of
    the layer's inputs, which passes over the data collect.

    Where the model's blocks can run one by one, each receives the outputs of the sketched blocks before it and
    compensates their errors too. Memory then holds the moments of one block and the hidden states of all data.
    Otherwise all inputs are those of the dense model, and memory holds the moments of all layers.

    The model does not change, even after an exception, and runs in its present mode (training or evaluation).
    In a distributed run all processes call it, and all get what process 0 made from its data.

    Args:
        model: the base model, without adapters.
        config: the adapter's.
        data: batches, each passed to the model as ``model(**batch)``, or to ``loss_fn``; tokens that an
            ``attention_mask`` leaves out do not count. A few ten thousand tokens of text like the model's own are
            usual; with fewer tokens than a layer has inputs, damping makes up for the rest.
        loss_fn: ``loss_fn(model, batch)`` runs the model; its result is not used.
        sequential: True runs blocks one by one, or says why it cannot; False takes the dense model's inputs; None
            does the first where it can.
        compensate: choose codes by the compensated sweep; otherwise they are the nearest entries.
        refit: refit the tables to the codes.
        importance: power of an input's mean square by which its weights count in the tables; 0 for all alike. By
            default 1, or 1/2 for codes that are compensated. Without both other steps the codes are nearest entries
            of the tables, which ``index_storage="recompute"`` can find again.
        damping: share of the mean diagonal added to the second moment's diagonal; at least 0.
        act_order: begin with the columns of the largest inputs, whose errors count most.
        block: columns between two updates of all that follow; changes speed alone.
        progress: show a bar that counts layers.

    Returns:
        A copy of ``config`` that carries the sketches; pass it to ``get_peft_model`` or a trainer's ``peft_config``.

    Warns:
        RuntimeWarning: a batch with inputs that are not finite is skipped; a layer saw fewer tokens than it has
            inputs.

    Raises:
        TypeError: batches that are no mappings, without ``loss_fn``.
        ValueError: no usable batch, a layer that no token reached, weights that are not finite, blocks that cannot
            be run one by one though ``sequential=True``, or steps none of which looks at the data.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SketchConfig, sketch_model
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> config = SketchConfig(bits=3, target_modules=["0"])
        >>> batches = [torch.randn(32, 64) for _ in range(4)]
        >>> config = sketch_model(base, config, batches, loss_fn=lambda model, x: model(x), progress=False)
        >>> get_peft_model(base, config).base_model.model[0].path()
        'decoded'
    """
    if importance is None:
        importance = 0.5 if compensate else 1.0
    if not 0 <= importance < float("inf"):
        raise ValueError(f"importance={importance}: a power of at least 0 is expected")
    if not (compensate or refit or importance):
        raise ValueError(
            "compensate=False, refit=False, importance=0: then nothing looks at the data; pass the config to "
            "get_peft_model as it is"
        )
    config = copy.copy(config)
    targets = SketchModel.checked_targets(config, model)
    prepare_four_bit(model.modules())
    recipe = Recipe(config, compensate, refit, importance, damping, act_order, block)
    with logging.tqdm(total=len(targets), desc="sketching", unit="layer", disable=not progress) as bar:
        batches = ModelPass(model, list(data), loss_fn)
        sketches = _Calibration(model, targets, recipe, bar.update).run(batches, sequential)
    if distributed.is_available() and distributed.is_initialized():
        sketches = _same_everywhere(sketches)
    # not a field: codes are saved in a file of their own, or with the adapter's tables
    config.sketches = {name: sketches[name] for name in targets}
    return config


def _same_everywhere(sketches: dict[str, Sketch]) -> dict[str, Sketch]:
    for name, mine in sketches.items():
        parts: list[Any] = [(mine.codebooks.cpu(), mine.codes.cpu())]
        distributed.broadcast_object_list(parts, src=0)
        tables, codes = (tensor.to(mine.codes.device) for tensor in parts[0])
        sketches[name] = Sketch(tables, codes, mine.bits, mine.groups, mine.cols)
    return sketches


def _rows(module: nn.Module) -> Tensor:
    """A target's weight, an output in each row."""
    weight = dense_weight(module)
    return weight if in_dim_of(module) == 1 else weight.t()


class _Calibration:
    """One run of [`sketch_model`][sparse_peft.sketch_model]."""

    def __init__(
        self, model: nn.Module, targets: dict[str, nn.Module], recipe: Recipe, done: Callable[[], Any]
    ) -> None:
        self.model, self.targets, self.recipe, self.done = model, targets, recipe, done
        self.sketches: dict[str, Sketch] = {}
        self._scarce: dict[str, int] = {}

    @torch.no_grad()
    def run(self, data: ModelPass, sequential: bool | None) -> dict[str, Sketch]:
        change_blockwise(data, self.targets, second_moments, self._sketch, self._decoded, sequential=sequential)
        self._warn_if_scarce()
        return self.sketches

    def _decoded(self, names: Iterable[str]) -> AbstractContextManager[None]:
        return _computing_with({self.targets[name]: self.sketches[name] for name in names})

    def _sketch(self, moments: FeatureSums) -> None:
        for name, module in moments.targets.items():
            weight, tokens = _rows(module), moments.tokens[name]
            if tokens < weight.shape[1]:
                self._scarce[name] = tokens
            moment = moments.sums.pop(name).div_(tokens)
            self.sketches[name] = self.recipe.sketch(name, weight, moment)
            self.done()

    def _warn_if_scarce(self) -> None:
        if self._scarce:
            name, tokens = min(self._scarce.items(), key=lambda item: item[1])
            warnings.warn(
                f"{len(self._scarce)} layers saw fewer tokens of the data than they have inputs, layer {name} "
                f"{tokens}; what they compensate is as much chance as the text's nature: give more data",
                RuntimeWarning,
                stacklevel=3,
            )


@contextmanager
def _computing_with(sketches: dict[nn.Module, Sketch]) -> Iterator[None]:
    """Inside the block linear layers compute with decoded weights; their own are not touched."""
    before = {module: module.__dict__.get("forward") for module in sketches}
    try:
        for module, sketch in sketches.items():
            module.forward = _forward(sketch, getattr(base_of(module), "bias", None))
        yield
    finally:
        for module, forward in before.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward


def _forward(sketch: Sketch, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight = code_gather(sketch.codebooks, sketch.codes, sketch.bits, sketch.cols, x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    return forward
