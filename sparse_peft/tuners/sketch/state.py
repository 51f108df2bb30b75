"""The trained state of one SketchTune adapter in one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...calibrate.codebooks import Sketch, assign_codes, codes_checksum, fit_codebooks
from ...numerics import panels
from ...ops import pack_codes, packed_width
from ..base_state import TrainedState
from .config import SketchConfig

# In place of a checksum: no codes are known yet, a file may bring them.
UNSET = -1


def nearest_codes(rows: Callable[[int, int], Tensor], initial: Tensor, bits: int, cols: int) -> Tensor:
    """The packed codes of the nearest entries, a panel of the weight at a time.

    Args:
        rows: ``rows(start, stop)`` gives these rows of the weight.
        initial: ``(rows, groups, 2**bits)`` float32.
        bits: of a code.
        cols: weights in a row.
    """
    parts = [
        pack_codes(assign_codes(rows(start, stop), initial[start:stop]), bits)
        for start, stop in panels(initial.shape[0], cols * torch.int64.itemsize)
    ]
    return torch.cat(parts)


class SketchState(TrainedState):
    """A trained table for each part of each row, with the codes that say which entry is which weight's.

    ``codebook`` ``(rows, groups, 2**bits)`` trains: what is added to the base's weights, from zero, or what takes
    their place. The buffer ``initial`` has the first tables as bytes, which no cast of the model rounds: codes
    are found again from the very same numbers. ``checksum`` ``(2,)`` is that of the packed codes, and of those that
    are nearest to the base's weights.

    The codes are no buffer: they are a function of what is, and distributed wrappers copy buffers in every pass.

    Args:
        shape: ``(outputs, inputs)`` of the layer.
        groups: tables in a row.
        name: the layer's name, for error messages.
        config: the adapter's.
        sketch: codes and first tables that are known beforehand.
        has_tables: whether the codes come from tables; those of a 4-bit base do not.
        is_fresh: whether no file is to bring the tables, so that they are made when the adapter is.
    """

    value_name = "codebook"
    always_float32 = frozenset({"codebook"})
    combinations = ("linear",)
    why_these_combinations = "tables of the same codes add up exactly"
    why_no_parts = "its tables change every weight"
    position_names = ("initial", "checksum", "codes")

    def __init__(
        self,
        shape: tuple[int, int],
        groups: int,
        name: str,
        config: SketchConfig,
        sketch: Sketch | None = None,
        has_tables: bool = True,
        is_fresh: bool = True,
    ):
        super().__init__(name)
        self.shape, self.bits, self.groups = shape, config.bits, groups
        self.replaces, self.storage, self.clustering = (
            config.mode == "replace",
            config.index_storage,
            config.clustering,
        )
        self.initial_dtype, self.base_dtype = getattr(torch, config.initial_dtype), config.base_dtype
        self.has_tables, self.is_fresh = has_tables, is_fresh
        tables = (shape[0], groups, 1 << self.bits)
        self.codebook = nn.Parameter(torch.zeros(tables))
        initial = self._pattern(torch.zeros(tables if has_tables else 0))
        self.register_buffer("initial", initial, persistent=has_tables and self.storage != "sidecar")
        self.register_buffer("checksum", torch.tensor([UNSET, UNSET]))
        if not is_fresh and self.storage == "embed":
            self.register_buffer("codes", torch.zeros(self._packed_shape, dtype=torch.uint8))
        self._sketch = sketch
        self._packed: Tensor | None = None
        self._incoming: dict[str, Tensor] = {}
        self._settled_by: tuple | None = None
        self._fingerprint: tuple[int, ...] | None = None
        self.keep_dtype()

    @property
    def _packed_shape(self) -> tuple[int, int]:
        return self.shape[0], packed_width(self.shape[1], self.bits)

    def forward(self) -> Tensor:
        """The trained tables; called, not read, so that hooks of sharding wrappers run."""
        return self.codebook

    def randomise(self) -> None:
        with torch.no_grad():
            self.codebook.add_(torch.randn_like(self.codebook))

    # ------------------------------------------------------------------ codes

    def _buffers_now(self) -> tuple:
        return tuple(
            (buffer, 0 if buffer.is_inference() else buffer._version) for buffer in (self.initial, self.checksum)
        )

    def _print_now(self) -> tuple[int, ...]:
        tables = codes_checksum(self.initial.reshape(1, -1)) if self.has_tables else 0
        return *self.checksum.tolist(), tables

    @property
    def is_settled(self) -> bool:
        """Whether the codes are known, and are those of the tables and the checksum that are here now."""
        if self._settled_by is None:
            return False
        if all(
            old is new and a == b for (old, a), (new, b) in zip(self._settled_by, self._buffers_now(), strict=True)
        ):
            return True
        # loading writes, and copies have other counts of writes, what is most often the same numbers
        same = self._print_now() == self._fingerprint
        self._settled_by = self._buffers_now() if same else None
        return same

    @property
    def packed(self) -> Tensor | None:
        """The packed codes; None where the base layer has them."""
        return self._packed

    def first_tables(self) -> Tensor:
        """``(rows, groups, 2**bits)`` float32."""
        return self.initial.view(self.initial_dtype).float()

    def settle(
        self, rows: Callable[[int, int], Tensor] | None, shared: Sketch | None, nearest: int | None, base: str
    ) -> None:
        """Find the codes: those that the layer has, that were given, or the nearest entries of the base's weights.

        Args:
            rows: ``rows(start, stop)`` gives rows of the base's weight ``(outputs, inputs)``; None with ``shared``.
            shared: what the layer has already in the place of its weight, which are then this adapter's codes as well.
            nearest: with ``shared``: checksum of the codes that were nearest to the weight.
            base: what the base weight is, in words, for error messages.

        Raises:
            ValueError: a file's checksum is not that of these codes, so that its tables belong to others, or codes
                that could not be found again are to be.
        """
        wanted = self.checksum.tolist()
        is_new = wanted[0] == UNSET
        sketch = shared or self._sketch
        if sketch is not None:
            self._check_sizes(sketch)
            initial, packed = sketch.codebooks, sketch.codes
        else:
            initial, packed = self._own_tables(rows, is_new), self._brought_codes(is_new)
        if self.has_tables:
            initial = self._pattern(initial)
        if shared is None:
            device = rows(0, 1).device  # the state itself follows the base there only afterwards
            tables = initial.to(device).view(self.initial_dtype).float()
            found = nearest_codes(rows, tables, self.bits, self.shape[1])
            packed = found if packed is None else packed.to(device)
            nearest = codes_checksum(found)
        found = [codes_checksum(packed), nearest]
        if not is_new and wanted != found:
            raise ValueError(self._mismatch(shared, base))
        if shared is None and self.storage == "recompute" and found[0] != found[1]:
            raise ValueError(
                f"layer {self.name}: index_storage='recompute', but its codes are not the nearest entries of its "
                f"tables in {self.initial_dtype}, so they could not be found again; use 'sidecar' or 'embed', or "
                "another initial_dtype"
            )
        if self.has_tables:
            self.initial = initial.to(self.initial.device)
        if is_new:
            self.checksum = torch.tensor(found, device=self.checksum.device)
            if self.replaces and self.codebook.device.type != "meta":
                with torch.no_grad():
                    self.codebook.copy_(self.first_tables())
        self._buffers.pop("codes", None)
        self._packed, self._sketch = None if shared is not None else packed, None
        self._settled_by, self._fingerprint = self._buffers_now(), self._print_now()

    def _own_tables(self, rows: Callable[[int, int], Tensor], is_new: bool) -> Tensor:
        if not is_new:
            return self.first_tables()
        tables = [
            fit_codebooks(rows(start, stop), self.bits, self.groups, method=self.clustering, name=self.name)
            for start, stop in panels(self.shape[0], self.shape[1] * torch.int64.itemsize)
        ]
        return torch.cat(tables)

    def _brought_codes(self, is_new: bool) -> Tensor | None:
        """The packed codes that a file brought; None for those that are nearest."""
        if is_new or self.storage == "recompute":
            return None
        packed = self._buffers.get("codes", self._packed)
        if packed is None:
            raise ValueError(
                f"layer {self.name}: index_storage={self.storage!r}, but no file brought this layer's codes; load the "
                "adapter with PeftModel.from_pretrained from the folder it was saved in"
            )
        return packed

    def _pattern(self, tables: Tensor) -> Tensor:
        """Bytes: no cast of a model changes them, and every distributed backend takes them."""
        return tables.to(self.initial_dtype).contiguous().view(torch.uint8)

    def hand_over(self) -> Sketch:
        """Codes and first tables, for the base layer to have instead."""
        packed, self._packed = self._packed, None
        tables = self.first_tables().to(packed.device)
        return Sketch(tables, packed, bits=self.bits, groups=self.groups, cols=self.shape[1])

    def _check_sizes(self, sketch: Sketch) -> None:
        have = sketch.codes.shape[0], sketch.cols, sketch.bits, sketch.groups
        want = *self.shape, self.bits, self.groups if self.has_tables else sketch.groups
        if have != want:
            raise ValueError(
                f"layer {self.name}: its codes are of {have[0]} x {have[1]} weights, bits={have[2]}, groups={have[3]} "
                f"where the adapter's config has {want[0]} x {want[1]}, bits={want[2]}, groups={want[3]}; adapters "
                "that share a layer's codes need the same bits and groups"
            )

    def _mismatch(self, shared: Sketch | None, base: str) -> str:
        if shared is not None and self.replaces:
            return (
                f"layer {self.name}: the adapter was trained on other codes than those that stand in the place of the "
                "layer's weight already; adapters of mode='replace' share them: load this one on a fresh base model"
            )
        return (
            f"layer {self.name}: the codes of this model's weights ({base}) are not those that the adapter was made "
            f"with, on {self.base_dtype}: their checksums differ. The base is another one, was changed or merged "
            "into, has another dtype (a cast rounds weights over the middle between two entries), or is quantised "
            "differently; load the base model as it was then"
        )

    # ------------------------------------------------------------------ files and devices

    def file_buffers(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        expected = super().file_buffers()
        if self.has_tables and self.storage == "embed":
            expected["codes"] = self._packed_shape, torch.uint8
        return expected

    def take_file(self, positions: dict[str, Tensor], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.storage != "sidecar" and self.has_tables != ("initial" in positions):
            kinds = "bitsandbytes' 4-bit codes", "codes of its own"
            raise ValueError(
                f"layer {self.name}: the adapter was made for {kinds['initial' in positions]}, and this model's base "
                f"gives it {kinds[self.has_tables]}; load the base model quantised as it was then"
            )
        super().take_file(positions, parameters)
        self._incoming = {name: tensor.to(self.checksum.device) for name, tensor in positions.items()}
        return {name: tensor for name, tensor in self._incoming.items() if name != "codes"}

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """Inside the block the state is as the file has it; after an exception, as it was before."""
        incoming, self._incoming = self._incoming, {}
        before = self._buffers.copy(), self._packed, self._settled_by
        codes = incoming.pop("codes", None)
        self._buffers.update({name: tensor.clone() for name, tensor in incoming.items()})
        if codes is not None and not self.is_settled:
            self._buffers.pop("codes", None)
            self._packed = codes
        try:
            yield
        except BaseException:
            self._buffers, self._packed, self._settled_by = before
            raise

    def _apply(self, fn, *args, **kwargs):
        settled = self.is_settled
        module = super()._apply(fn, *args, **kwargs)
        if self._packed is not None:
            self._packed = fn(self._packed)
        if settled:
            self._settled_by = self._buffers_now()
        return module

    def extra_repr(self) -> str:
        rows, cols = self.shape
        return f"rows={rows}, cols={cols}, bits={self.bits}, groups={self.groups}"
