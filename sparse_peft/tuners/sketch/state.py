"""The trained state of one SketchTune adapter in one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from ...calibrate.codebooks import Sketch, assign_codes, codes_checksum, fit_codebooks
from ...numerics import panels
from ...ops import pack_codes, packed_width
from ..base_config import required
from ..base_state import UNSET, TrainedState
from .config import SketchConfig

OTHER_SHARED_CODES = (
    "the adapter was trained on other codes than those that stand in the place of the layer's weight already; "
    "adapters of mode='replace' share them: load this one on a fresh base model"
)

# Rows ``start`` to ``stop`` of the base's weight ``(outputs, inputs)``.
RowsOfBase = Callable[[int, int], Tensor]
# Bytes of the first tables, and packed codes; None for the codes of the nearest entries.
TablesAndCodes = tuple[Tensor, Tensor | None]


class _Settled(NamedTuple):
    """The tensors that codes were found for.

    Attributes:
        buffers: the buffers and their counts of writes.
        fingerprint: checksums of codes and tables.
    """

    buffers: tuple[tuple[Tensor, int], ...]
    fingerprint: tuple[int, ...]


def nearest_codes(rows: RowsOfBase, initial: Tensor, bits: int, cols: int) -> Tensor:
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
    """A trained table for each part of each row, and the code of each weight: the index of its entry.

    ``codebook`` ``(rows, groups, 2**bits)`` trains. It is added to the base's weights, starting at zero, or replaces
    them. The buffer ``initial`` has the first tables as bytes, which no cast of the model rounds, so that codes are
    recomputed from equal numbers. ``checksum`` ``(2,)`` is of the packed codes, and of the codes nearest to the base's
    weights.

    The codes are no buffer: they follow from weights and tables, and distributed wrappers copy buffers in each pass.

    Args:
        shape: ``(outputs, inputs)`` of the layer.
        groups: tables in a row.
        name: the layer's name, for error messages.
        config: the adapter's.
        sketch: codes and first tables that are known beforehand.
        has_tables: whether the codes belong to tables; codes of a 4-bit base do not.
        is_fresh: whether the tables are made with the adapter, not loaded from a file.
    """

    value_name = "codebook"
    always_float32 = frozenset({"codebook"})
    combinations = ("linear",)
    why_these_combinations = "tables of the same codes add up exactly"
    why_no_parts = "its tables change every weight"
    position_names = ("initial", "checksum", "codes")
    codebook: nn.Parameter
    initial: Tensor
    checksum: Tensor

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
        self.replaces, self.storage = config.mode == "replace", config.index_storage
        self.clustering = config.clustering
        self.initial_dtype, self.base_dtype = (
            getattr(torch, required(config.initial_dtype, "initial_dtype")),
            config.base_dtype,
        )
        self.has_tables, self.is_fresh = has_tables, is_fresh
        tables = (shape[0], groups, 1 << self.bits)
        self.codebook = nn.Parameter(torch.zeros(tables))
        initial = self._pattern(torch.zeros(tables if has_tables else 0))
        self.register_buffer("initial", initial, persistent=has_tables and self.storage != "sidecar")
        self.register_buffer("checksum", torch.tensor([UNSET, UNSET]))
        if not is_fresh and self.storage == "embed":
            self.register_buffer("codes", torch.zeros(self._packed_shape, dtype=torch.uint8))
        self._given = sketch  # until it is settled
        self._packed: Tensor | None = None
        self._settled: _Settled | None = None
        self._incoming: dict[str, Tensor] = {}  # of a file, until it is received
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

    def _settled_now(self) -> _Settled:
        return _Settled(self._buffers_now(), self._fingerprint())

    def _buffers_now(self) -> tuple[tuple[Tensor, int], ...]:
        return tuple(
            (buffer, 0 if buffer.is_inference() else buffer._version) for buffer in (self.initial, self.checksum)
        )

    def _fingerprint(self) -> tuple[int, ...]:
        tables = codes_checksum(self.initial.reshape(1, -1)) if self.has_tables else 0
        return *self.checksum.tolist(), tables

    @property
    def is_settled(self) -> bool:
        """Whether the codes are known, and belong to the present tables and checksum."""
        if self._settled is None:
            return False
        pairs = zip(self._settled.buffers, self._buffers_now(), strict=True)
        if all(old is new and a == b for (old, a), (new, b) in pairs):
            return True
        # loading writes, and copies have other counts of writes, of mostly the same numbers
        same = self._fingerprint() == self._settled.fingerprint
        self._settled = self._settled._replace(buffers=self._buffers_now()) if same else None
        return same

    @property
    def packed(self) -> Tensor | None:
        """The packed codes; None where the base layer has them."""
        return self._packed

    def first_tables(self) -> Tensor:
        """``(rows, groups, 2**bits)`` float32."""
        return self.initial.view(self.initial_dtype).float()

    @property
    def _is_new(self) -> bool:
        """Whether the state has no codes yet, neither new ones nor a file's."""
        return int(self.checksum[0]) == UNSET

    def share(self, sketch: Sketch, nearest: int) -> None:
        """Take the codes that the layer has already: of a 4-bit base, or in place of its weight.

        Args:
            sketch: the layer's codes and first tables.
            nearest: checksum of the codes that were nearest to the weight.

        Raises:
            ValueError: other sizes, or codes other than those of the file that the state was loaded from.
        """
        self._check_sizes(sketch)
        found = [codes_checksum(sketch.codes), nearest]
        self._check_codes(found, OTHER_SHARED_CODES if self.replaces else self._other_base("codes"))
        self._finish(self._pattern(sketch.codebooks) if self.has_tables else None, None, found)

    def find(self, rows: RowsOfBase, base: str) -> None:
        """Take codes for the base's weights: given ones, those of a file, or new ones.

        Args:
            rows: of the base's weight.
            base: its dtype, for error messages.

        Raises:
            ValueError: codes other than those of the file that the state was loaded from, or that ``"recompute"``
                could not find again.
        """
        tables, packed = self._given_codes() or self._loaded_codes() or self._new_codes(rows)
        initial, device = self._pattern(tables), rows(0, 1).device  # the state follows the base there only afterwards
        rounded = initial.to(device).view(self.initial_dtype).float()
        nearest = nearest_codes(rows, rounded, self.bits, self.shape[1])
        packed = nearest if packed is None else packed.to(device)
        found = [codes_checksum(packed), codes_checksum(nearest)]
        self._check_codes(found, self._other_base(base))
        if self.storage == "recompute" and found[0] != found[1]:
            raise ValueError(
                f"layer {self.name}: index_storage='recompute', but its codes are not the nearest entries of its "
                f"tables in {self.initial_dtype}, so they could not be found again; use 'sidecar' or 'embed', or "
                "another initial_dtype"
            )
        self._finish(initial, packed, found)

    def _given_codes(self) -> TablesAndCodes | None:
        """The sketch that the config, or a side file, gave."""
        if self._given is None:
            return None
        self._check_sizes(self._given)
        return self._given.codebooks, self._given.codes

    def _loaded_codes(self) -> TablesAndCodes | None:
        """The tables of a file, with the codes that it has."""
        if self._is_new:
            return None
        if self.storage == "recompute":
            return self.first_tables(), None
        packed = self._buffers.get("codes", self._packed)
        if packed is None:
            raise ValueError(
                f"layer {self.name}: index_storage={self.storage!r}, but no file brought this layer's codes; load the "
                "adapter with PeftModel.from_pretrained from the folder it was saved in"
            )
        return self.first_tables(), packed

    def _new_codes(self, rows: RowsOfBase) -> TablesAndCodes:
        """Tables that fit the base's weights, a panel at a time."""
        tables = [
            fit_codebooks(rows(start, stop), self.bits, self.groups, method=self.clustering, name=self.name)
            for start, stop in panels(self.shape[0], self.shape[1] * torch.int64.itemsize)
        ]
        return torch.cat(tables), None

    def _check_codes(self, found: list[int], why: str) -> None:
        if not self._is_new and self.checksum.tolist() != found:
            raise ValueError(f"layer {self.name}: {why}")

    def _finish(self, initial: Tensor | None, packed: Tensor | None, checksums: list[int]) -> None:
        if initial is not None:
            self.initial = initial.to(self.initial.device)
        if self._is_new:
            self.checksum = torch.tensor(checksums, device=self.checksum.device)
            if self.replaces and self.codebook.device.type != "meta":
                with torch.no_grad():
                    self.codebook.copy_(self.first_tables())
        self._buffers.pop("codes", None)
        self._packed, self._given = packed, None
        self._settled = self._settled_now()

    def _pattern(self, tables: Tensor) -> Tensor:
        """Bytes: no cast of a model changes them, and every distributed backend takes them."""
        return tables.to(self.initial_dtype).contiguous().view(torch.uint8)

    def hand_over(self) -> Sketch:
        """Codes and first tables, for the base layer to have instead."""
        packed, self._packed = self._packed, None
        assert packed is not None  # of a state that has found its codes
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

    def _other_base(self, base: str) -> str:
        return (
            f"the codes of this model's weights ({base}) are not those that the adapter was made with, on "
            f"{self.base_dtype}: their checksums differ. The base is another one, was changed or merged into, has "
            "another dtype (a cast rounds weights over the middle between two entries), or is quantised differently; "
            "load the base model as it was then"
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
        before = self._buffers.copy(), self._packed, self._settled
        codes = incoming.pop("codes", None)
        self._buffers.update({name: tensor.clone() for name, tensor in incoming.items()})
        if codes is not None and not self.is_settled:
            self._buffers.pop("codes", None)
            self._packed = codes
        try:
            yield
        except BaseException:
            self._buffers, self._packed, self._settled = before
            raise

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        settled = self._settled if self.is_settled else None
        super()._apply(fn, recurse)
        if self._packed is not None:
            self._packed = fn(self._packed)
        if settled is not None:
            self._settled = settled._replace(buffers=self._buffers_now())
        return self

    def extra_repr(self) -> str:
        rows, cols = self.shape
        return f"rows={rows}, cols={cols}, bits={self.bits}, groups={self.groups}"
