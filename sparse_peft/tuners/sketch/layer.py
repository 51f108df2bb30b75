"""The layer of SketchTune."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...calibrate.codebooks import Sketch
from ...ops import CodedWeight, Codes, codebook_linear
from ..backups import SET_ASIDE
from ..base_layer import Step, TunerLayer
from ..four_bit import FourBit
from ..ledger import Weight
from ..transitions import exclusively
from .config import SketchConfig
from .sketched import SketchedLinear
from .state import SketchState


class SketchLinear(TunerLayer[SketchState]):
    """A layer with trained tables beside its weight, or with codes and trained tables in place of it.

    SketchTune, https://arxiv.org/abs/2410.06364. Shapes: tables ``(out, groups, 2**bits)``, packed codes of ``(out,
    in)``.

    Rows are always outputs and columns inputs, also of GPT-2's ``Conv1D``, which stores its weight as ``(in, out)``.

    Args:
        base_layer: the layer that is adapted, or whose weight is replaced.
        name: its full name in the model.
        keep_base: ``"drop"`` a replaced weight, or keep it on the ``"cpu"``.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from sparse_peft import SketchConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> model = get_peft_model(base, SketchConfig(bits=3, target_modules=["0"]))
        >>> layer = model.base_model.model[0]
        >>> type(layer).__name__, layer.path(), tuple(layer.get_delta_weight("default").shape)
        ('SketchLinear', 'decoded', (32, 64))
    """

    config_cls = SketchConfig
    takes_partitions = True

    def __init__(self, base_layer: nn.Module, name: str, keep_base: str = "drop", **kwargs: Any) -> None:
        super().__init__(base_layer, name, **kwargs)
        self.keep_base = keep_base

    @property
    def replaced(self) -> SketchedLinear | None:
        """The layer that replaces the base layer, also while a merged one replaces it in turn; None without."""
        found = self._modules.get(SET_ASIDE, self.base_layer)
        return found if isinstance(found, SketchedLinear) else None

    @property
    def shape(self) -> tuple[int, int]:
        """``(outputs, inputs)``."""
        return self.out_features, self.in_features

    def _as_stored(self, weight: Tensor) -> Tensor:
        return weight if self.product.in_dim == 1 else weight.t()

    # ------------------------------------------------------------------ adapters and their codes

    def add_delta(self, adapter_name: str, delta: SketchState, *, init_weights: bool, inference_mode: bool) -> None:
        if delta.is_fresh and self.has_weight:
            self._settle(delta)
        super().add_delta(adapter_name, delta, init_weights=init_weights, inference_mode=inference_mode)

    @property
    def has_weight(self) -> bool:
        """Whether the layer has a weight or codes in memory; a base on the meta device has none."""
        base = self.get_base_layer()
        return self.replaced is not None or base.weight.device.type != "meta"

    def settled(self, adapter_name: str) -> SketchState:
        state = self.deltas[adapter_name]
        if not state.is_settled:
            exclusively(self._settle, state)
        return state

    def receive(self, adapter_name: str) -> None:
        """Take the codes of an adapter's file; after an exception the state is as before."""
        state = self.deltas[adapter_name]
        with state.receiving():
            self.settled(adapter_name)

    @torch.no_grad()
    def _settle(self, state: SketchState) -> None:
        if state.is_settled:
            return
        if self.merged:
            raise RuntimeError(
                f"layer {self.name}: adapters are merged, so the base's own weights, whose codes a new adapter needs, "
                "are not there; call unmerge_adapter() first"
            )
        if not self.has_weight:
            raise RuntimeError(
                f"layer {self.name}: the base weight is not in memory (it is offloaded, or was never loaded), so the "
                "codes of its values cannot be found; load the base model without offloading"
            )
        replaced = self.replaced
        with torch.inference_mode(False):
            if not state.has_tables:
                state.share(self._four_bit_sketch(), 0)
            elif replaced is not None:
                state.share(replaced.sketch, replaced.nearest_checksum)
            else:
                state.find(self._rows_of_base(), str(self.get_base_layer().weight.dtype).partition(".")[2])
                if state.replaces:
                    self._replace_base(state)

    def _replace_base(self, state: SketchState) -> None:
        """Put an adapter's codes in place of the base weight."""
        if self._is_partitioned():
            raise NotImplementedError(
                f"layer {self.name}: mode='replace' drops the base weight, which ZeRO stage 3 has partitioned; use "
                "mode='delta', or ZeRO stage 1 or 2"
            )
        nearest, keep = int(state.checksum[1]), self.keep_base == "cpu"
        self.base_layer = SketchedLinear(self.base_layer, state.hand_over(), nearest, keep)

    def _rows_of_base(self) -> Callable[[int, int], Tensor]:
        weight = self._as_stored(self.dense_base_weight())
        return lambda start, stop: weight[start:stop]

    def _four_bit(self) -> FourBit:
        found = FourBit.of(self.get_base_layer())
        if found is None:
            raise ValueError(
                f"layer {self.name}: its base had 4-bit weights when the adapter was made, and now has none"
            )
        return found

    def _four_bit_sketch(self) -> Sketch:
        base = self._four_bit()
        tables = base.table.expand(base.codes.shape[0], 1, 16)
        return Sketch(tables, base.codes, bits=4, groups=1, cols=base.cols)

    def sketch(self, adapter_name: str) -> Sketch:
        """An adapter's codes and first tables."""
        state = self.settled(adapter_name)
        codes = state.packed if self.replaced is None else self.replaced.codes.data
        if codes is None:
            return self._four_bit_sketch()
        return Sketch(state.first_tables(), codes, bits=state.bits, groups=state.groups, cols=self.in_features)

    # ------------------------------------------------------------------ the weight

    def _coded(self, names: tuple[str, ...], with_base: bool) -> tuple[list[Tensor], CodedWeight]:
        """Tables and their codes: of the effective weight, or of the adapters' deltas."""
        states = {name: self.settled(name) for name in names}
        tables = [state() for state in states.values()]
        if self.replaced is not None:
            initial = self.replaced.codebook
            if with_base and len(tables) == 1:
                return tables, self.replaced.coded
            total = sum(table - initial for table in tables)
            return [initial + total if with_base else total], self.replaced.coded
        codes, scale_, base, four_bit = [], None, None, None
        for state in states.values():
            packed = state.packed
            if packed is None:
                four_bit = four_bit or self._four_bit()
                packed = four_bit.codes
            codes.append(Codes(packed, state.bits))
        if four_bit is not None:
            scale_ = four_bit.scale_
            if with_base:
                tables[0] = tables[0] + four_bit.table
        elif with_base:
            weight = self._as_stored(self.base_parameter.detach())
            base = lambda start, stop: weight[start:stop]  # noqa: E731
        return tables, CodedWeight(self.shape, tuple(codes), base, scale_)

    def get_delta_weight(self, adapter: str) -> Tensor:
        return self._delta_weight((adapter,))

    @torch.no_grad()
    def _delta_weight(self, names: tuple[str, ...]) -> Tensor:
        tables, coded = self._coded(names, with_base=False)
        dense = coded.rows(tables, 0, self.out_features, tables[0].dtype)
        return self._as_stored(dense)

    # ------------------------------------------------------------------ forward

    def path(self, x: Tensor | None = None) -> str:
        """How the forward pass of the active adapters is computed.

        Returns:
            ``"decoded"``: the effective weight is computed one panel at a time. ``"additive"``: the base layer's own
            forward pass, plus the adapters' output.
        """
        if self._is_hooked():
            return "additive"
        if self.replaced is not None:
            return "decoded"
        if self.quantization_backend is None:
            return "decoded" if self._base_is_stock(x) else "additive"
        names = self._active_names()
        return "decoded" if names and all(not self.deltas[name].has_tables for name in names) else "additive"

    def adapters_step(self, x: Tensor, names: tuple[str, ...], has_more: bool) -> Step:
        self._refuse_transforms()
        if has_more or self.path(x) == "additive":
            return super().adapters_step(x, names, has_more)
        return Step(partial(self._decoded_forward, names), Weight.OWN)

    @torch.compiler.disable  # a graph would materialise the whole weight
    def _decoded_forward(self, names: tuple[str, ...], x: Tensor) -> Tensor:
        if self.quantization_backend is not None:
            self._restore_dtypes(names)
        dtype = self._compute_dtype(x)
        if self.quantization_backend is not None:
            dtype = getattr(self.base_layer, "compute_dtype", None) or dtype
        tables, coded = self._coded(names, with_base=True)
        bias = self.base_bias
        out = codebook_linear(x.to(dtype), tables, None if bias is None else bias.to(dtype), coded)
        return out if self.quantization_backend is None else out.to(x.dtype)

    @torch.compiler.disable
    def adapter_output(self, x: Tensor, adapter_name: str) -> Tensor:
        tables, coded = self._coded((adapter_name,), with_base=False)
        return codebook_linear(x.to(self._compute_dtype(x)), tables, None, coded)

    # ------------------------------------------------------------------ merging

    def merged_layer(self, names: tuple[str, ...]) -> nn.Module | None:
        replaced = self.replaced
        if replaced is None:
            return None
        (table,), _ = self._coded(names, with_base=True)
        return replaced.with_weight(replaced.decode(table, replaced.dtype))

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The ordinary layer with a dense weight that replaces this one when adapters are unloaded."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        replaced = self.replaced
        if replaced is None or (merge and self.merged):
            return self.get_base_layer()
        return replaced.with_weight(replaced.weight) if merge else replaced.original()
