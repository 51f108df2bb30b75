"""The layer of sparse-aware fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...numerics import panels, uniform
from ...numerics.bits import pack_bits, unpack_bits
from ...ops import LinearProduct, MaskedWeight, masked_linear, sums_of_runs
from ...sparsify import NM, Unstructured, keep_in_panels
from ..base_layer import Step, TunerLayer
from ..ledger import Weight
from ..support_recipe import SupportRecipe
from ..transitions import exclusively
from .config import PruneConfig
from .state import PrunedState


class PruneLinear(TunerLayer[PrunedState]):
    """A layer whose weight in use is ``mask * (W + delta)`` (PST, https://arxiv.org/abs/2205.11005).

    The weight is formed one panel of rows at a time, in the forward pass and again in backward. Several active
    adapters add their deltas and multiply their masks. Arguments are those of ``TunerLayer``.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import PruneConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, PruneConfig(pattern=0.75, target_modules=["0"]))
        >>> layer = model.base_model.model[0]
        >>> layer.path(), int((layer.weight_in_use(("default",)) == 0).sum())
        ('masked', 1536)
    """

    config_cls = PruneConfig

    @property
    def sides(self) -> tuple[int, int]:
        """``(outputs, inputs)`` of the weight's matrix."""
        rows, cols = self.stored_shape
        return (rows, cols) if self.product.in_dim == 1 else (cols, rows)

    def _as_stored(self, matrix: Tensor) -> Tensor:
        return (matrix if self.product.in_dim == 1 else matrix.t()).reshape(self.weight_shape)

    def base_rows(self, start: int, stop: int) -> Tensor:
        """Rows of the base weight as ``(outputs, inputs)``, without a copy."""
        self.check_whole("a mask is chosen")
        stored = self.base_parameter.detach().reshape(self.stored_shape)
        return (stored if self.product.in_dim == 1 else stored.t())[start:stop]

    def check_whole(self, purpose: str) -> None:
        """Refuse a weight whose rows other processes have.

        Args:
            purpose: what the whole weight is for.

        Raises:
            NotImplementedError: FSDP2 divides the weight, and no pass has gathered it.
        """
        if isinstance(self.base_parameter, DTensor):
            raise NotImplementedError(
                f"layer {self.name}: {purpose} from the whole weight, which FSDP2 (fully_shard) divides among "
                "processes; use DDP, or a fixed mask (recipe='static')"
            )

    # ------------------------------------------------------------------ masks

    def settled(self, adapter_name: str) -> PrunedState:
        """The adapter's state; a mask that no file has brought is chosen now, from the base weight."""
        state = self.deltas[adapter_name]
        if not state.is_settled:
            exclusively(self._draw, state)
        return state

    def _draw(self, state: PrunedState) -> None:
        if state.is_settled:
            return
        if self.base_parameter.is_meta:
            raise RuntimeError(
                f"layer {self.name}: the base weight is not in memory, so its mask cannot be chosen; load the model's "
                "weights first"
            )
        self.release()
        with torch.inference_mode(False), torch.no_grad():
            opening = state.config.opening()
            state.put(mask=self._first_mask(state))
            if "positions" in state.own_buffers:
                state.put(positions=self._positions(state))
            if "back_mask" in state.own_buffers:
                state.put(back_mask=self._back_mask(MaskedWeight(self.sides, self.base_rows, ()), opening.pattern))
            if "residual" in state.own_parameters:
                state.residual.copy_(self._means_of_pruned(state))
            state.put(beta=0.0 if state.starts_final else opening.beta(0))

    def _first_mask(self, state: PrunedState) -> Tensor:
        config, (outputs, inputs) = state.config, self.sides
        opening = config.opening()
        if opening.starts_open() and not state.starts_final:
            return pack_bits(torch.ones(1, inputs, dtype=torch.bool, device=state.mask.device)).repeat(outputs, 1)
        if config.score == "nonzero":
            bounds = panels(outputs, 2 * inputs)
            return torch.cat([pack_bits(self.base_rows(start, stop) != 0) for start, stop in bounds])
        pattern, units = opening.wanted(opening.stop if state.starts_final else 0, outputs * inputs)
        if config.score == "random":
            drawn = uniform(outputs * inputs, seed=config.seed, name=self.name).view(outputs, inputs)
            return keep_in_panels(pattern, lambda a, b: drawn[a:b], self.sides, units, name=self.name)
        return keep_in_panels(
            pattern, lambda a, b: self.base_rows(a, b).abs().float(), self.sides, units, name=self.name
        )

    def _positions(self, state: PrunedState) -> Tensor:
        """Positions of the sparse part; where the mask is fixed and over it, among the weights that stay."""
        config = state.config
        selection = str(config.selection)
        if selection == "random" and not (config.plan.changes or state.outside):
            selection = "nonzero"

        def weight() -> Tensor:
            rows = self.base_rows(0, self.sides[0])
            return rows if state.outside else rows * unpack_bits(state.mask, self.sides[1])

        recipe = SupportRecipe(selection, state.values.numel(), config.seed, self.name)
        return recipe.draw(weight, self.sides).indices

    def _means_of_pruned(self, state: PrunedState) -> Tensor:
        """The least-squares fit of the pruned weights by one number for each run of inputs."""
        (outputs, inputs), group = self.sides, state.config.slorb
        sizes = sums_of_runs(torch.ones(1, inputs, device=state.mask.device), group)
        parts = []
        for start, stop in panels(outputs, 8 * inputs):
            pruned = self.base_rows(start, stop).float().masked_fill(unpack_bits(state.mask[start:stop], inputs), 0)
            parts.append(sums_of_runs(pruned, group) / sizes)
        return torch.cat(parts)

    @torch.no_grad()
    def chosen_mask(self, adapter_name: str, pattern: NM | Unstructured, units: int | None) -> Tensor:
        """The best mask for the weight as it has been trained to, packed."""
        weight = self.masked_weight((adapter_name,))
        (part,) = weight.parts

        def scores(start: int, stop: int) -> Tensor:
            return part.scores(weight.inside([part.tensors], start, stop), start, stop)

        return keep_in_panels(pattern, scores, self.sides, units, name=self.name)

    @torch.no_grad()
    def chosen_back_mask(self, adapter_name: str, pattern: NM) -> Tensor:
        """Likewise, along the outputs."""
        return self._back_mask(self.masked_weight((adapter_name,)), pattern)

    def _back_mask(self, weight: MaskedWeight, pattern: NM | Unstructured) -> Tensor:
        assert isinstance(pattern, NM)
        outputs, inputs = self.sides
        trained = [part.tensors for part in weight.parts]
        groups = panels(outputs // pattern.m, pattern.m * inputs * 2 * torch.int64.itemsize)
        masks = []
        for first, last in groups:
            scores = weight.inside(trained, first * pattern.m, last * pattern.m).abs_().t()
            masks.append(pack_bits(pattern.keep(scores.contiguous(), name=self.name).t()))
        return torch.cat(masks)

    # ------------------------------------------------------------------ the weight

    def masked_weight(self, names: Sequence[str], minus_base: bool = False) -> MaskedWeight:
        """The weight in use of adapters that act together."""
        parts = tuple(self.settled(name).part() for name in names)
        product = LinearProduct(1) if isinstance(self.product, LinearProduct) else self.product
        return MaskedWeight(self.sides, self.base_rows, parts, product, minus_base)  # type: ignore[arg-type]

    @torch.no_grad()
    def weight_in_use(self, names: Sequence[str], minus_base: bool = False) -> Tensor:
        """The weight in use as it is stored, in float32 or wider."""
        weight = self.masked_weight(names, minus_base)
        trained = [part.tensors for part in weight.parts]
        rows = [weight.rows(trained, start, stop) for start, stop in weight.bounds(torch.float32)]
        return self._as_stored(torch.cat(rows))

    def get_delta_weight(self, adapter: str) -> Tensor:
        return self.weight_in_use((adapter,), minus_base=True)

    def merged_weight(self, names: tuple[str, ...]) -> Tensor:
        return self.weight_in_use(names)

    # ------------------------------------------------------------------ forward

    def path(self, x: Tensor | None = None) -> str:
        """How the forward pass of the active adapters is computed.

        Returns:
            ``"masked"``: with the masked weight, a panel at a time. ``"additive"``: the base layer's own forward pass,
            plus what the masked weight changes of it.
        """
        return "masked" if not self._is_hooked() and self._base_is_stock(x) else "additive"

    def adapters_step(self, x: Tensor, names: tuple[str, ...], has_more: bool) -> Step:
        self._refuse_transforms()
        if has_more or self.path(x) == "additive":
            return Step(partial(self._changed_forward, names), Weight.OWN)
        return Step(partial(self._masked_forward, names), Weight.OWN)

    @torch.compiler.disable  # a graph would materialise the whole weight
    def _masked_forward(self, names: tuple[str, ...], x: Tensor) -> Tensor:
        dtype, bias = self._compute_dtype(x), self.base_bias
        return masked_linear(x.to(dtype), None if bias is None else bias.to(dtype), self.masked_weight(names))

    @torch.compiler.disable
    def _changed_forward(self, names: tuple[str, ...], x: Tensor, *args: object, **kwargs: object) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        change = masked_linear(x.to(self._compute_dtype(x)), None, self.masked_weight(names, minus_base=True))
        return result + change.to(result.dtype)

    def _mixed_deltas_(self, result: Tensor, x: Tensor, adapter_names: list[str]) -> None:
        if self.path(x) == "additive":
            super()._mixed_deltas_(result, x, adapter_names)
        else:
            self._replace_items_(result, x, adapter_names, lambda name, own: self._masked_forward((name,), own))

    @torch.compiler.disable
    def adapter_output(self, x: Tensor, adapter_name: str) -> Tensor:
        weight = self.masked_weight((adapter_name,), minus_base=True)
        return masked_linear(x.to(self._compute_dtype(x)), None, weight)
