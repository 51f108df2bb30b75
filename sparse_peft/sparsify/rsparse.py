"""R-Sparse: input channels chosen for each token, and a low rank for the rest (https://arxiv.org/abs/2504.19449).

Nothing is trained and no weight becomes zero: what is sparse is the product. A channel ``j`` of a token counts where
``|x_j| * |W_:j|``, the norm of its part in the output, reaches a threshold from calibration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging

from ..calibrate.activations import FeatureSums
from ..calibrate.blockwise import change_blockwise
from ..calibrate.layer_view import LayerView
from ..calibrate.model_pass import ModelPass
from ..constraints import Count, Share, validated
from .layers import Names, layers_to_prune, rows_of, shape_of
from .patterns import Sparsity
from .pruning import LossFn
from .replaced import ReplacedLinear, check_replaceable, replaced_layers

SHARES = (1.0, 0.8, 0.6, 0.4, 0.2)
"""Of the budget that channels may get; the rest is the low rank's."""


class RSparseLinear(ReplacedLinear):
    """A linear layer that multiplies a token's largest channels, and approximates the others by a low rank.

    Several tokens at once, or one with gradients, take the *masked* path, which multiplies the whole weight and the
    low rank besides: it costs more than the plain layer. A single token without gradients takes the *gathered* path,
    which reads the chosen channels alone.

    Args:
        original: the layer.
        norms: ``(in_features,)`` of the weight's columns.
        threshold: of ``|x_j| * norms_j``, from which a channel counts.
        left: ``(out_features, rank)``.
        right: ``(rank, in_features)``.
        decode_only: several tokens at once, such as a prompt, take the whole weight.
    """

    changes_weight = False
    weight: nn.Parameter
    norms: Tensor
    left: Tensor
    right: Tensor

    def __init__(
        self, original: nn.Module, norms: Tensor, threshold: float, left: Tensor, right: Tensor, decode_only: bool
    ) -> None:
        super().__init__(original, "weight")
        self.threshold, self.decode_only = threshold, decode_only
        # no part of the model's state: files have the plain model
        for name, tensor in (("norms", norms), ("left", left), ("right", right)):
            self.register_buffer(name, tensor, persistent=False)
        if not self.is_transposed:
            self.weight.data = self.weight.data.t().contiguous().t()  # a channel's weights beside each other

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        if x.numel() == self.in_features and not torch.is_grad_enabled():
            out = self._gathered(x.reshape(-1)).view(*x.shape[:-1], -1)
        elif self.decode_only and x.numel() != self.in_features:
            out = self.product(x)
        else:
            out = self._masked(x)
        return out if self.bias is None else out + self.bias

    def counts(self, x: Tensor) -> Tensor:
        """Which channels of ``(..., in_features)`` count: bool of that shape."""
        return x.abs() * self.norms >= self.threshold

    def _masked(self, x: Tensor) -> Tensor:
        counted = self.counts(x)
        out = self.product(x * counted)
        return out if not len(self.right) else out + x.mul(~counted) @ self.right.t() @ self.left.t()

    def _gathered(self, x: Tensor) -> Tensor:
        chosen = self.counts(x).nonzero().squeeze(1)
        # the sum of the weight's columns, times the inputs, without a copy of them
        start = chosen.new_zeros(1)
        out = F.embedding_bag(chosen, self.rows().t(), start, mode="sum", per_sample_weights=x[chosen]).squeeze(0)
        return out if not len(self.right) else out + self.left @ (self.right @ x.index_fill(0, chosen, 0))

    def given_back(self) -> nn.Module:
        self.weight.data = self.weight.data.contiguous()
        return self.original


@dataclass(frozen=True)
class LayerChannels:
    """How one layer computes.

    Attributes:
        shape: ``(outputs, inputs)``.
        threshold: from which a channel counts.
        share: of the budget that the channels got.
        kept: share of the channels that counted in calibration.
        rank: of the rest's approximation.
        error: squared error of the outputs in calibration, as a share of the outputs' squares.
    """

    shape: tuple[int, int]
    threshold: float
    share: float
    kept: float
    rank: int
    error: float


@dataclass(frozen=True)
class RSparseReport:
    """What [`r_sparse`][sparse_peft.sparsify.r_sparse] did.

    Attributes:
        layers: ``{layer name: how it computes}``.
    """

    layers: dict[str, LayerChannels] = field(repr=False)

    @property
    def multiplications(self) -> dict[str, int]:
        """``{path: multiplications}`` of one token in all layers, as counted in calibration.

        ``"dense"``: the plain layers; ``"gathered"``: the chosen channels, the low rank and the scores; ``"masked"``:
        the whole weight, the low rank and the scores.
        """
        found = dict.fromkeys(("dense", "gathered", "masked"), 0)
        for layer in self.layers.values():
            rows, cols = layer.shape
            beside = layer.rank * (rows + cols) + cols
            found["dense"] += rows * cols
            found["gathered"] += round(layer.kept * rows * cols) + beside
            found["masked"] += rows * cols + beside
        return found

    @property
    def low_rank_numbers(self) -> int:
        """Numbers that the low ranks store beside the model."""
        return sum(layer.rank * sum(layer.shape) for layer in self.layers.values())


@torch.no_grad()
def r_sparse(
    model: nn.Module,
    calibration: Iterable[Any],
    sparsity: float,
    *,
    share: float | None = None,
    tokens: int = 512,
    decode_only: bool = False,
    target_modules: Names = None,
    exclude_modules: Names = None,
    loss_fn: LossFn | None = None,
    sequential: bool | None = None,
    progress: bool = True,
) -> RSparseReport:
    """Let each token use a part of the input channels of a model's linear layers, without training.

    With ``d`` inputs and ``n`` outputs, ``1 - sparsity`` of the ``d * n`` multiplications are the budget. A share of
    it goes to channels, the rest to a low rank ``(1 - sparsity) * (1 - share) * d * n / (d + n)``. The authors search
    the shares by evolution; here each layer takes the one of [`SHARES`][sparse_peft.sparsify.SHARES] with the least
    error on its inputs. Saved time is that of one token at a time, see
    [`RSparseLinear`][sparse_peft.sparsify.RSparseLinear]; everything else costs more than before.

    The model's state is unchanged, and [`restore`][sparse_peft.sparsify.restore] gives the layers back.

    Args:
        model: without adapters.
        calibration: batches, each passed as ``model(**batch)`` or to ``loss_fn``.
        sparsity: share of the multiplications that is saved; 0 leaves all outputs as they are.
        share: of the budget that channels get in every layer; None to choose it for each layer.
        tokens: of each layer's inputs, that thresholds and shares are found on.
        decode_only: use the whole weight for several tokens at once, such as a prompt.
        target_modules: names, suffixes or regular expressions of layers; by default all linear layers but the head.
        exclude_modules: likewise, of layers to leave out.
        loss_fn: ``loss_fn(model, batch)`` runs the model.
        sequential: True changes block by block or says why it cannot; False takes the plain model's inputs; None does
            the first where it can.
        progress: show a bar that counts layers.

    Raises:
        TypeError: a quantised layer.
        ValueError: a model with adapters or with such layers already, no layer, no data, or a field out of range.

    Example:
        >>> import torch
        >>> from sparse_peft.sparsify import r_sparse, restore
        >>> model, data = torch.nn.Sequential(torch.nn.Linear(64, 32)), [torch.randn(100, 64)]
        >>> report = r_sparse(model, data, 0.5, share=1.0, loss_fn=lambda model, x: model(x), progress=False)
        >>> report.multiplications["gathered"] / report.multiplications["dense"]
        0.53125
        >>> restore(model)
        >>> type(model[0]).__name__
        'Linear'
    """
    sparsity, tokens = validated("sparsity", sparsity, Sparsity), validated("tokens", tokens, Count)
    shares = SHARES if share is None else (validated("share", share, Share),)
    if any(isinstance(layer, RSparseLinear) for layer in replaced_layers(model).values()):
        raise ValueError(f"{type(model).__name__} has layers of r_sparse already; restore(model) it first")
    layers, batches = layers_to_prune(model, target_modules, exclude_modules), list(calibration)
    for name in layers:
        check_replaceable(name)
    found: dict[str, LayerChannels] = {}
    with logging.tqdm(total=len(layers), desc="calibrating", unit="layer", disable=not progress) as bar:

        def change(samples: FeatureSums) -> None:
            for name in samples.targets:
                made, found[name] = _fitted(layers[name], samples.sums.pop(name), sparsity, shares, decode_only)
                model.set_submodule(name, made)
                bar.update()

        measure = partial(_samples, each=-(-tokens // max(1, len(batches))))
        modules = {name: layer.module for name, layer in layers.items()}
        change_blockwise(ModelPass(model, batches, loss_fn), modules, measure, change, sequential=sequential)
    return RSparseReport(found)


def _samples(targets: Mapping[str, nn.Module], each: int) -> FeatureSums:
    """Tokens of each layer's inputs, evenly spaced, up to ``each`` of a batch."""

    def pick(x: Tensor) -> Tensor:
        chosen = torch.linspace(0, len(x) - 1, min(each, len(x)), device=x.device).round().long()
        return x[chosen]

    return FeatureSums(targets, pick, join=lambda before, new: torch.cat((before, new)))


def _fitted(
    layer: LayerView, x: Tensor, sparsity: float, shares: tuple[float, ...], decode_only: bool
) -> tuple[RSparseLinear, LayerChannels]:
    """A layer's replacement, with the share of least error on the inputs ``(tokens, inputs)``."""
    weight, (rows, cols) = rows_of(layer, layer.weight()), shape_of(layer)
    wide, x = weight.to(torch.promote_types(weight.dtype, torch.float32)), x.to(weight.dtype)
    norms = wide.norm(dim=0).to(weight.dtype)
    budget = 1 - sparsity
    ranks = [round(budget * (1 - share) * rows * cols / (rows + cols)) if sparsity else 0 for share in shares]
    left, right = _low_rank(wide, max(ranks))
    scores, total = x.abs() * norms, x.to(wide.dtype) @ wide.t()
    best: LayerChannels | None = None
    for share, rank in zip(shares, ranks, strict=True):
        threshold = _threshold(scores, budget * share if sparsity else 1.0)
        rest = torch.where(scores >= threshold, 0, x).to(wide.dtype)
        error = rest @ wide.t() - rest @ right[:rank].t() @ left[:, :rank].t()
        relative = float(error.square().sum() / total.square().sum().clamp(min=torch.finfo(wide.dtype).tiny))
        if best is None or relative < best.error:
            kept = float((scores >= threshold).double().mean())
            best = LayerChannels((rows, cols), threshold, share, kept, rank, relative)
    assert best is not None
    sides = left[:, : best.rank].to(weight.dtype).contiguous(), right[: best.rank].to(weight.dtype).contiguous()
    return RSparseLinear(layer.module, norms, best.threshold, *sides, decode_only), best


def _threshold(scores: Tensor, share: float) -> float:
    """The score that a share of all reaches."""
    count = round(share * scores.numel())
    if count >= scores.numel():
        return 0.0
    if count == 0:
        return torch.inf
    return float(scores.flatten().float().kthvalue(scores.numel() - count + 1).values)


def _low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation, from the shorter side's eigenvectors; its first ranks are the best of fewer."""
    if rank == 0:
        return weight.new_zeros(weight.shape[0], 0), weight.new_zeros(0, weight.shape[1])
    if weight.shape[0] > weight.shape[1]:
        right, left = _low_rank(weight.t(), rank)
        return left.t(), right.t()
    wide = weight.double()
    vectors = torch.linalg.eigh(wide @ wide.t()).eigenvectors.flip(1)[:, :rank].to(weight.dtype)
    return vectors, vectors.t() @ weight
