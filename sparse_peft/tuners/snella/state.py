"""The trained state of one SNELL adapter in one layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...numerics import uniform
from ...ops import (
    MIX,
    PIECES,
    THRESHOLDS,
    Competition,
    Factors,
    InitialDelta,
    MatrixProduct,
    distance_delta,
    distance_entries,
    find_threshold,
    full_precision,
)
from ...support import Support, index_dtype
from ..base_state import TrainedState
from ..changes import Stamp, note_backward, version
from ..forms import Entries
from ..transitions import exclusively
from .config import SnellaConfig

NOT_FOUND = -1  # the age of a threshold that is still to be found


class _Seen(NamedTuple):
    """Stamp of the parameters and number of kept entries at the last threshold."""

    stamp: Stamp
    kept: int


class KernelState(TrainedState):
    """Factors whose kernel, thresholded, is the delta of a weight seen as a map from inputs to outputs.

    ``A`` is ``(2, inputs, r / 2)``, ``B`` ``(2, outputs, r / 2)``, and ``mix`` the three numbers of the mixed kernel.
    All are float32, or float64 in a float64 model, through any cast of the model. The buffers are the number of kept
    entries (int64), the threshold ``tau``, and ``age``, the number of parameter changes since ``tau`` was computed. If
    the initial delta is subtracted, its ``seed`` and its threshold ``first_tau`` follow.

    Args:
        sizes: ``(inputs, outputs)`` of the layer; a convolution's inputs are its channels times its taps.
        config: of the adapter.
        product: the layer's.
        name: the layer's name, for random numbers and error messages.
        kept: number of nonzero entries; the config's if None.
    """

    value_name = "B"
    full_precision = frozenset({"mix"})
    why_these_combinations = "; sparse_peft.adapters.save_as_sparse writes one as a sparse delta, and those do"
    position_names = ("kept", "tau", "age", "seed", "first_tau")
    A: nn.Parameter
    B: nn.Parameter
    kept: Tensor
    tau: Tensor
    age: Tensor
    seed: Tensor
    first_tau: Tensor
    # caches of parameters and buffers
    _seen: _Seen | None
    _first: InitialDelta | None
    _first_of: tuple[int, torch.dtype] | None
    _dense: tuple[_Seen | None, Tensor] | None
    _numbers: dict[str, tuple[Tensor, int, int]]  # {buffer's name: (buffer, its writes, its number)}

    def __init__(
        self, sizes: tuple[int, int], config: SnellaConfig, product: MatrixProduct, name: str, kept: int | None = None
    ):
        super().__init__(name)
        self.features, self.settings, self.product = sizes, config, product  # (inputs, outputs)
        kept = config.kept(math.prod(sizes)) if kept is None else kept
        first = self._draw(config.seed)
        self.A, self.B = nn.Parameter(first.inputs), nn.Parameter(first.outputs)
        if first.mix is not None:
            self.mix = nn.Parameter(first.mix)
        self.dropout = nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity()
        self.register_buffer("kept", torch.tensor(kept))
        self.register_buffer("tau", torch.zeros(()))
        if config.init == "residual":
            self.register_buffer("seed", torch.tensor(config.seed))
            self.register_buffer("first_tau", torch.tensor(math.nan))
        self.register_buffer("age", torch.tensor(NOT_FOUND))
        self._forget()
        self.keep_dtype()

    def _draw(self, seed: int) -> Factors:
        """The initial factors: uniform within ``1 / sqrt(features r / 2)`` of zero, as the authors'."""
        inputs, outputs = self.features
        mix = torch.tensor(list(MIX.values())) if self.settings.kernel == "mixed" else None
        return Factors(self._drawn(seed, "inputs", inputs), self._drawn(seed, "outputs", outputs), mix)

    def _drawn(self, seed: int, which: str, features: int) -> Tensor:
        shape = (PIECES, features, self.settings.r // PIECES)
        pieces = 1 if self.settings.init == "symmetric" else PIECES
        numbers = uniform(math.prod(shape[1:]) * pieces, seed=seed, name=f"{self.name}\0{which}")
        numbers *= 1 / math.sqrt(math.prod(shape[1:]))
        return numbers.view(pieces, *shape[1:]).expand(shape).contiguous()

    def randomise(self) -> None:
        for parameter in (self.A, self.B):
            nn.init.normal_(parameter)

    def forward(self) -> Factors:
        """The factors; called, not read, so that hooks of sharding wrappers run."""
        return self._as_computed(Factors(self.A, self.B, self._parameters.get("mix")))

    def _as_computed(self, factors: Factors) -> Factors:
        """The factors on the parameters' device and in the dtype of the kernel."""
        device, dtype = self.A.device, self.dtype
        inputs, outputs, mix = factors
        moved = None if mix is None else mix.to(device, dtype)
        return Factors(inputs.to(device, dtype), outputs.to(device, dtype), moved)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the kernel's computation."""
        return torch.promote_types(self.A.dtype, torch.float32)

    @property
    def numel(self) -> int:
        """Entries of the layer's weight."""
        return math.prod(self.features)

    # ------------------------------------------------------------------ number of kept entries

    @property
    def entries(self) -> int:
        """Number of nonzero entries; the buffer is read only if it changed."""
        return self._number("kept", self.kept)

    @property
    def sparsity(self) -> float:
        """Share of the entries that are zero."""
        return 1 - self.entries / self.numel

    def keep(self, entries: int) -> None:
        """Set the number of entries that are kept from now on."""
        self.kept.fill_(entries)
        self.age.fill_(NOT_FOUND)

    def _number(self, name: str, buffer: Tensor) -> int:
        """A buffer's value, read from the device once per write."""
        writes, known = version(buffer), self._numbers.get(name)
        if known is None or known[0] is not buffer or known[1] != writes:
            known = self._numbers[name] = buffer, writes, int(buffer)
        return known[2]

    # ------------------------------------------------------------------ the threshold

    def settle(self) -> None:
        """Compute the threshold if the parameters changed and ``tau_interval`` has passed."""
        if any(p.is_meta or isinstance(p, DTensor) for p in self.own_parameters.values()):
            return  # no values yet: the next forward pass computes it
        if not self._is_settled():
            exclusively(self._settle)

    def _is_settled(self) -> bool:
        seen = self._seen
        if seen is None or self._number("age", self.age) == NOT_FOUND:
            return False
        return seen.kept == self.entries and seen.stamp.is_current()

    def _settle(self) -> None:
        if self._is_settled():
            return
        seen, age = self._seen, self._number("age", self.age)
        stamp = Stamp([self], self.sharded, after_backward=False)
        with torch.inference_mode(False), torch.no_grad():
            # a saved threshold was up to date when it was saved
            grown = age if seen is None else age + 1
            if age == NOT_FOUND or self.settings.tau_interval == 1 or grown >= self.settings.tau_interval:
                self.tau, grown = self._find(self(), self.entries), 0
            if grown != age:
                self.age = torch.full_like(self.age, grown)
        self._seen = _Seen(stamp, self.entries)

    def _find(self, factors: Factors, entries: int) -> Tensor:
        with full_precision(factors.inputs.device):
            return find_threshold(factors, entries, THRESHOLDS[self.settings.threshold])

    def competition(self) -> Competition:
        """Layout, threshold and subtracted delta of the present computation."""
        self.settle()
        threshold = THRESHOLDS[self.settings.threshold]
        return Competition(self.product, threshold, self._subtracted(), partial(note_backward, self))

    def _subtracted(self) -> InitialDelta | None:
        if self.settings.init != "residual":
            return None
        seed = self._number("seed", self.seed)  # not the config's: a checkpoint may have been started with another
        if self._first is None or self._first_of != (seed, self.dtype):
            with torch.inference_mode(False), torch.no_grad():
                factors = self._as_computed(self._draw(seed))
                if bool(self.first_tau.isnan()):
                    self.first_tau = self._find(factors, self.settings.kept(self.numel))
                self._first, self._first_of = InitialDelta(factors, self.first_tau), (seed, self.dtype)
        return self._first

    # ------------------------------------------------------------------ the delta

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The delta ``(outputs, inputs)``, in the factors' dtype if None."""
        how = self.competition()
        return distance_delta(self(), self.tau, how, dtype or self.dtype)

    def kept_delta(self, dtype: torch.dtype) -> Tensor:
        """As ``dense``, cached until a parameter changes or the layer trains again."""
        self.settle()
        if self._dense is None or self._dense[0] is not self._seen or self._dense[1].dtype != dtype:
            with torch.inference_mode(False):
                self._dense = self._seen, self.dense(dtype)
        return self._dense[1]

    def sparse(self) -> tuple[Tensor, Tensor]:
        """``(entries,)`` ascending positions in the flat ``(outputs, inputs)``, and values of the kept entries."""
        how = self.competition()
        return distance_entries(self(), self.tau, how)

    def sparse_part(self) -> Entries:
        positions, values = self.sparse()
        inputs, outputs = self.features
        shape = (outputs, inputs)
        if self.product.in_dim == 0:  # stored the other way round
            shape = (inputs, outputs)
            positions, order = (positions % inputs * outputs + positions // inputs).sort()
            values = values[order]
        return Entries(Support(shape, positions.to(index_dtype(shape)), name=self.name), values.float())

    # ------------------------------------------------------------------ torch's bookkeeping

    sharded = False  # whether FSDP2 gathers the parameters, to another address each time

    def _forget(self) -> None:
        """Drop the caches of parameters and buffers."""
        self._seen = self._first = self._first_of = self._dense = None
        self._numbers = {}

    def _own_tensors(self) -> dict[str, Tensor]:
        return {**self.own_parameters, **self.own_buffers}

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._dense = None
        return super().train(mode)

    def restore_dtype(self) -> None:
        super().restore_dtype()
        for parameter in self.own_parameters.values():
            if parameter.dtype != self.trained_dtype:
                parameter.data = parameter.data.to(self.trained_dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: tensor.detach() for name, tensor in self._own_tensors().items()}
        module = super()._apply(fn, recurse)
        for name, tensor in self._own_tensors().items():
            exact = before[name]
            if tensor.is_floating_point() and tensor.dtype.itemsize < 4 and not exact.is_meta:
                tensor.data = exact.to(tensor.device, torch.promote_types(exact.dtype, torch.float32))
        self._forget()
        self.keep_dtype()
        return module

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.settle()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for parameter in self.own_parameters.values():  # with assign=True the file's own tensors
            if parameter.dtype.itemsize < 4:
                parameter.data = parameter.data.float()
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        nothing = dict.fromkeys(("_seen", "_first", "_first_of", "_dense"))
        return {**self.__dict__, **nothing, "_numbers": {}}

    # ------------------------------------------------------------------ files

    def file_tensors(self) -> dict[str, Tensor]:
        if not isinstance(self.A, DTensor):
            self.competition()  # finds the thresholds
        return super().file_tensors()

    def take_file(self, positions: dict[str, Tensor], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        positions = super().take_file(positions, parameters)
        kept = int(positions["kept"])
        if not 0 <= kept <= self.numel:
            raise ValueError(
                f"layer {self.name}: kept={kept} in the adapter file, where the weight has {self.numel} entries; load "
                "it on the base model it was made for"
            )
        return {name: tensor.to(self.own_buffers[name].dtype) for name, tensor in positions.items()}

    def extra_repr(self) -> str:
        inputs, outputs = self.features
        return f"r={self.settings.r}, inputs={inputs}, outputs={outputs}, kernel={self.settings.kernel}"
