"""Prune and regrow of a sparse delta: SpIEL-AG, SpIEL-MA, SET and RigL."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...dynamics.full_tensor import full_tensor, write_full_tensor_
from ...dynamics.optimizer_state import ObservedMoments, remap_, replace_parameter
from ...dynamics.protocol import Dynamics, TrainingContext
from ...dynamics.sm3_accumulators import KeepsAccumulators, accumulate_
from ...ops import observe
from ...support import RANDOM_SCORE, Candidates, Exchange, Support, exchange, random_inactive, topk_outer
from ..delta import SparseDelta
from ..delta_layer import SparseTunerLayer
from .candidates import CandidateWindow
from .config import SparseConfig
from .records import AGE_EDGES, LayerChange, Reselection


class _Track:
    """What is known of one layer during training."""

    def __init__(self, layer: SparseTunerLayer[SparseDelta], adapter: str):
        self.layer, self.adapter = layer, adapter
        self.window: CandidateWindow | None = None
        self.gradient: Tensor | None = None  # what the optimizer uses in this step
        self.accumulators: tuple[Tensor, Tensor] | None = None  # of its rows and columns
        self.begin(step=0)

    def begin(self, step: int) -> None:
        self.support = self.layer.support(self.adapter)
        self.born = torch.full((self.support.nnz,), step, dtype=torch.int32, device=self.support.device)
        self.watch(None)

    def watch(self, window: CandidateWindow | None) -> None:
        self.window = window
        observe(self.layer.observer_key, window)

    @property
    def delta(self) -> SparseDelta:
        return self.layer.deltas[self.adapter]

    def fingerprint(self) -> int:
        """A number that other positions do not have, in all likelihood."""
        weights = torch.arange(1, 2 * self.support.nnz, 2, device=self.support.device)
        return int((self.support.indices.long() * weights).sum())


class ReselectionDynamics(Dynamics[SparseConfig, SparseTunerLayer[SparseDelta]]):
    """The reselection of one adapter's positions, as its config describes it.

    Args:
        context: see ``TrainingContext``.

    Raises:
        ValueError: the positions are fixed, or the schedule needs the length of the run and it is not known.
        NotImplementedError: ``redistribute=True`` in a distributed run.
    """

    def __init__(self, context: TrainingContext[SparseConfig, SparseTunerLayer[SparseDelta]]):
        super().__init__(context)
        self.schedule = self.config.reselection_schedule(context.total_steps)
        regrowth = self.config.regrowth
        assert regrowth is not None  # fixed positions have no schedule
        self.regrowth = regrowth
        if self.config.redistribute and not self.collectives.alone:
            raise NotImplementedError(
                f"redistribute=True of adapter {self.adapter} in a run of {self.collectives.size} processes: layers "
                "would get other numbers of entries, and DDP and FSDP fix the parameters' sizes when they wrap the "
                "model; use redistribute=False, or train in one process"
            )
        self.tracks = {name: _Track(layer, self.adapter) for name, layer in self.layers.items()}

    # ------------------------------------------------------------------ the course of a step

    def begin_step(self, step: int) -> None:
        if self.regrowth.observes != "gradients":
            return
        observes = self.schedule.observes(step)
        for track in self.tracks.values():
            if not observes:
                track.watch(None)
            elif track.window is None:
                limit = math.ceil(self.config.candidates * track.support.nnz)
                track.watch(CandidateWindow(track.support, limit, self.schedule.window))

    def before_step(self, step: int) -> None:
        for track in self.tracks.values():
            if track.layer.support(self.adapter) is not track.support:
                track.begin(step - 1)  # another file was loaded
        if self.regrowth.observes == "covers":
            self._accumulate()
        elif self._observing:
            for track in self.tracks.values():
                values = track.delta.values
                track.gradient = (
                    torch.zeros(track.support.nnz, device=track.support.device)
                    if values.grad is None
                    else full_tensor(values.grad).to(torch.float32, copy=True)
                )

    def after_step(self, step: int) -> Reselection | None:
        if self._observing:
            self._close_step()
        return self._reselect(step) if self.schedule.is_event(step) else None

    def discard_step(self) -> None:
        for track in self.tracks.values():
            if track.window is not None:
                track.window.discard()

    def close(self) -> None:
        for track in self.tracks.values():
            track.watch(None)

    # ------------------------------------------------------------------ statistics

    @property
    def _observing(self) -> bool:
        return any(track.window is not None for track in self.tracks.values())

    @torch.no_grad()
    def _close_step(self) -> None:
        """Take this step's sums into the windows, if all of them are finite."""
        watched = list(self._observations())
        seen = []
        for _, window, seen_by_optimizer in watched:
            window.reduce(self.collectives)
            own, gradient = window.own.double(), seen_by_optimizer.double()
            finite = window.is_finite() & gradient.isfinite().all()
            seen.append(torch.stack((torch.dot(own, gradient), torch.dot(own, own), (~finite).double())))
        along, total, broken = torch.stack([numbers.to(seen[0].device) for numbers in seen]).sum(0).tolist()
        # whatever lies between backward and the optimizer (a loss scale, clipping) multiplies all gradients alike; the
        # trained entries show by how much
        factor = along / total if total > 0 else 1.0
        for track, window, gradient in watched:
            if not broken and math.isfinite(factor):
                window.commit(factor, gradient)
            else:
                window.discard()
            track.gradient = None

    def _observations(self) -> Iterator[tuple[_Track, CandidateWindow, Tensor]]:
        """The layers with a window, which ``before_step`` gave the optimizer's gradient."""
        for track in self.tracks.values():
            if track.window is not None and track.gradient is not None:
                yield track, track.window, track.gradient

    def _accumulate(self) -> None:
        if isinstance(self.optimizer, KeepsAccumulators):
            return
        for track in self.tracks.values():
            if track.accumulators is None:
                rows, cols = (torch.zeros(size, device=track.support.device) for size in track.support.shape)
                track.accumulators = rows, cols
            values = track.delta.values
            if values.grad is not None:
                accumulate_(*track.accumulators, track.support, full_tensor(values.grad).to(torch.float32))

    def _accumulators(self, track: _Track) -> tuple[Tensor, Tensor] | None:
        if isinstance(self.optimizer, KeepsAccumulators):
            return self.optimizer.row_and_column_accumulators(track.delta.values)
        return track.accumulators

    # ------------------------------------------------------------------ the event

    @torch.no_grad()
    def _reselect(self, step: int) -> Reselection:
        self._check()
        rate = self.schedule.rate_at(step)
        tracks = list(self.tracks.values())
        groups = [tracks] if self.config.redistribute else [[track] for track in tracks]
        changes = {}
        for group in groups:
            values = [full_tensor(track.delta.values) for track in group]
            counts = [int(track.support.nnz * rate) for track in group]
            candidates = [self._candidates(track, count, step) for track, count in zip(group, counts, strict=True)]
            supports = [track.support for track in group]
            together = self.config.redistribute
            exchanges = exchange(supports, values, counts, candidates, together=together)
            for track, old, result in zip(group, values, exchanges, strict=True):
                self._apply(track, old, self._agreed(result), step)
                rows, cols = track.support.shape
                changes[track.layer.name] = LayerChange(
                    entries=track.support.nnz,
                    replaced=result.replaced,
                    numel=rows * cols,
                    drop_threshold=result.drop_threshold,
                    grow_threshold=result.grow_threshold,
                )
                track.watch(None)
        if self.config.redistribute:
            self.config.num_entries = {name: track.support.nnz for name, track in self.tracks.items()}
        edges = tuple(edge * self.schedule.every for edge in AGE_EDGES)
        return Reselection(step, self.adapter, rate, changes, edges, self._ages(step, edges))

    def _check(self) -> None:
        """Refuse before anything is changed."""
        for name, track in self.tracks.items():
            if track.layer.merged:
                raise RuntimeError(
                    f"layer {name}: positions cannot change while adapters are merged "
                    f"({', '.join(track.layer.merged_adapters)}); call unmerge_adapter() before training goes on"
                )
            if not bool(track.delta.values.detach().isfinite().all()):
                raise ValueError(
                    f"layer {name}: values of adapter {self.adapter} are NaN or infinite: the training diverged; go "
                    "back to an earlier checkpoint, with a lower learning rate or with clipping"
                )

    def _candidates(self, track: _Track, count: int, step: int) -> Candidates:
        support = track.support
        positions = torch.empty(0, dtype=torch.int64, device=support.device)
        scores, window = positions.float(), track.window
        own = torch.zeros(support.nnz, device=support.device) if self.regrowth.competes else None
        observed = False
        if window is not None and window.steps > 0:
            observed = True
            scores = (window.total / window.counts().clamp(min=1)).abs()
            seen = scores > 0
            positions, scores = window.positions[seen].long(), scores[seen]
            own = (window.own_total / window.steps).abs()
        elif self.regrowth.observes == "covers" and (accumulators := self._accumulators(track)) is not None:
            wanted = math.ceil(self.config.candidates * support.nnz) if self.config.redistribute else count
            row, col = accumulators
            positions, scores = topk_outer(row, col, wanted, support, name=track.layer.name)
        if self.regrowth.observes == "nothing" or (self.regrowth.fills and observed):
            positions, scores = self._fill(track, positions, scores, count, step)
        return Candidates(positions, scores, own)

    def _fill(self, track: _Track, positions: Tensor, scores: Tensor, count: int, step: int) -> tuple[Tensor, Tensor]:
        """Make up for missing candidates with random positions, which rank below all that have a gradient."""
        rows, cols = track.support.shape
        missing = min(count, rows * cols - track.support.nnz) - positions.numel()
        if missing <= 0:
            return positions, scores
        taken, _ = track.support.union(Support(track.support.shape, positions, validate=False))
        name = f"{track.layer.name}, step {step}"
        drawn = random_inactive(taken, missing, seed=self.config.seed, name=name)
        joined = torch.cat((positions, drawn)).sort()
        return joined.values, torch.cat((scores, scores.new_full((missing,), RANDOM_SCORE)))[joined.indices]

    def _agreed(self, result: Exchange) -> Exchange:
        """The first process's choice: all came to the same, or should have."""
        if self.collectives.alone:
            return result
        indices = self.collectives.from_first(result.support.indices)
        support = Support(result.support.shape, indices, validate=False, name=result.support.name)
        source = self.collectives.from_first(result.source)
        return Exchange(support, source, result.drop_threshold, result.grow_threshold)

    def _apply(self, track: _Track, old: Tensor, result: Exchange, step: int) -> None:
        if result.replaced == 0 and result.support.nnz == track.support.nnz:
            return
        track.layer.release()
        is_new = result.source < 0
        slots = result.source.clamp(min=0)
        if is_new.numel() != old.numel():
            self._resize(track.delta, is_new.numel())
        parameter = track.delta.values
        write_full_tensor_(parameter, old[slots].masked_fill_(is_new, 0))
        remap_(self.optimizer, parameter, result.source, self._seeds(track, result), old_size=old.numel())
        parameter.grad = None  # belongs to the entries before
        track.born = torch.where(is_new, step, track.born[slots])
        track.delta.support = result.support
        track.support = track.layer.support(self.adapter)
        track.layer.rejoin()

    def _resize(self, delta: SparseDelta, entries: int) -> None:
        """Give a layer another number of entries; the optimizer follows."""
        old = delta.values
        delta.resize(entries)
        replace_parameter(self.optimizer, old, delta.values)

    def _seeds(self, track: _Track, result: Exchange) -> ObservedMoments | None:
        window = track.window
        if window is None or window.steps == 0 or self.config.seed_moments == "zero":
            return None
        if window.positions.numel() == 0:
            return None
        # looked up by position: entries that were filled in at random are not among the window's candidates
        positions = result.support.indices.long()
        slots = torch.searchsorted(window.positions, positions).clamp_(max=window.positions.numel() - 1)
        known = (window.positions[slots] == positions) & (result.source < 0)
        steps = torch.where(known, window.counts()[slots], 0)
        divisor = steps.clamp(min=1)
        return ObservedMoments(
            mean=torch.where(known, window.total[slots] / divisor, 0),
            mean_square=torch.where(known, window.squares[slots] / divisor, 0),
            steps=steps,
        )

    def _ages(self, step: int, edges: tuple[int, ...]) -> tuple[int, ...]:
        bounds = torch.tensor(edges, dtype=torch.int32)
        counts = torch.zeros(len(edges) + 1, dtype=torch.int64)
        for track in self.tracks.values():
            bins = torch.bucketize(step - track.born, bounds.to(track.born.device), right=True)
            counts += torch.bincount(bins, minlength=len(edges) + 1).cpu()
        return tuple(counts.tolist())

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        layers = {}
        for name, track in self.tracks.items():
            state: dict[str, Any] = {"positions": track.fingerprint(), "born": track.born.clone()}
            if track.window is not None and track.window.steps:
                state["window"] = track.window.state_dict()
            if track.accumulators is not None:
                state["row"], state["col"] = (accumulator.clone() for accumulator in track.accumulators)
            layers[name] = state
        return {"layers": layers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the saved run was; the adapter and its optimizer state are loaded before.

        Raises:
            ValueError: the state is of other layers or other positions.
        """
        if set(state["layers"]) != set(self.tracks):
            raise ValueError(
                f"the saved reselection state of adapter {self.adapter} is of other layers than the model's "
                f"({len(state['layers'])} against {len(self.tracks)}): resume with the config the run was started with"
            )
        for name, saved in state["layers"].items():
            track = self.tracks[name]
            track.begin(step=0)
            if saved["positions"] != track.fingerprint():
                raise ValueError(
                    f"layer {name}: the adapter's positions are not those that the optimizer's checkpoint was saved "
                    "with; load the adapter of the same checkpoint before the optimizer's state"
                )
            track.born = saved["born"].to(track.born.device)
            if "window" in saved:
                limit = saved["window"]["positions"].numel()
                window = CandidateWindow(track.support, limit, self.schedule.window)
                window.load_state_dict(saved["window"])
                track.watch(window)
            if "row" in saved:
                device = track.support.device
                track.accumulators = saved["row"].to(device), saved["col"].to(device)
