"""Prune and regrow of a sparse delta: SpIEL-AG, SpIEL-MA, SET and RigL; LIFT's refresh."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...dynamics.full_tensor import full_tensor
from ...dynamics.optimizer_state import ObservedMoments
from ...dynamics.protocol import Dynamics, TrainingContext
from ...dynamics.sm3_accumulators import KeepsAccumulators
from ...support import RANDOM_SCORE, Candidates, Exchange, Support, exchange, exchange_for, random_inactive, topk_outer
from ..base_config import required
from ..delta import SparseDelta
from ..delta_layer import SparseTunerLayer
from .candidates import Window
from .config import SparseConfig
from .records import AGE_EDGES, LayerChange, Reselection
from .track import LayerTrack

Layer = SparseTunerLayer[SparseDelta]


class ReselectionDynamics(Dynamics[SparseConfig, Layer]):
    """The reselection of one adapter's positions, as its config describes it.

    Args:
        context: see ``TrainingContext``.

    Raises:
        ValueError: the schedule needs the length of the run and it is not known.
        NotImplementedError: ``redistribute=True`` in a distributed run.
    """

    takes_partitions = True

    def __init__(self, context: TrainingContext[SparseConfig, Layer]):
        super().__init__(context)
        self.regrowth = required(self.config.regrowth, "regrowth")
        self.schedule = self.config.reselection_schedule(context.total_steps)
        if self.config.redistribute and not self.collectives.alone:
            raise NotImplementedError(
                f"redistribute=True of adapter {self.adapter} in a run of {self.collectives.size} processes: layers "
                "would get other numbers of entries, and DDP and FSDP fix the parameters' sizes when they wrap the "
                "model; use redistribute=False, or train in one process"
            )
        self.tracks = {name: LayerTrack(layer, self.adapter) for name, layer in self.layers.items()}

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
                track.watch(track.new_window(limit, self.schedule.window))

    def before_step(self, step: int) -> None:
        for track in self.tracks.values():
            if track.layer.support(self.adapter) is not track.support:
                track.begin(step - 1)  # another file was loaded
        if self.regrowth.observes == "covers" and not isinstance(self.optimizer, KeepsAccumulators):
            for track in self.tracks.values():
                track.accumulate(self.optimizer)
        elif self._observing:
            for track in self.tracks.values():
                track.keep_gradient(self.optimizer)

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
        """Add this step's sums to the windows, if all of them are finite."""
        tracks = self.tracks.values()
        watched = [(t.window, t.gradient) for t in tracks if t.window is not None and t.gradient is not None]
        factor = self._factor(watched)
        for window, gradient in watched:
            if factor is None:
                window.discard()
            else:
                window.commit(factor, gradient)
        for track in tracks:
            track.gradient = None

    def _factor(self, watched: list[tuple[Window, Tensor]]) -> float | None:
        """The common factor between gradients in backward and in the optimizer; None if any is not finite.

        The delta's scale, a loss scale and clipping multiply all gradients alike; those of the trained entries show by
        how much.
        """
        seen = []
        for window, gradient in watched:
            window.reduce(self.collectives)
            own, used = window.own.double(), gradient.double()
            finite = window.is_finite() & used.isfinite().all()
            seen.append(torch.stack((torch.dot(own, used), torch.dot(own, own), (~finite).double())))
        along, total, broken = torch.stack([numbers.to(seen[0].device) for numbers in seen]).sum(0).tolist()
        factor = along / total if total > 0 else self.config.value_scale
        return None if broken or not math.isfinite(factor) else factor

    def _accumulators(self, track: LayerTrack) -> tuple[Tensor, Tensor] | None:
        if isinstance(self.optimizer, KeepsAccumulators):
            return self.optimizer.row_and_column_accumulators(track.delta.values)
        return track.accumulators

    # ------------------------------------------------------------------ the event

    @torch.no_grad()
    def _reselect(self, step: int) -> Reselection:
        for track in self.tracks.values():
            track.check()  # before anything is changed
        rate = self.schedule.rate_at(step)
        tracks = list(self.tracks.values())
        groups = [tracks] if self.config.redistribute else [[track] for track in tracks]
        changes = {}
        for group in groups:
            changes.update(self._exchange(group, rate, step))
        if self.config.redistribute:
            self.config.num_entries = {name: track.support.nnz for name, track in self.tracks.items()}
        edges = tuple(edge * self.schedule.every for edge in AGE_EDGES)
        return Reselection(step, self.adapter, rate, changes, edges, self._ages(step, edges))

    def _exchange(self, group: list[LayerTrack], rate: float, step: int) -> dict[str, LayerChange]:
        """Exchange entries within a group of layers."""
        values = [full_tensor(track.delta.values) for track in group]
        deltas = [track.delta.scaled(own) for track, own in zip(group, values, strict=True)]
        refreshes = self.regrowth.observes == "weights"
        exchanges = self._refresh(group, deltas) if refreshes else self._regrow(group, deltas, rate, step)
        changes = {}
        for track, old, result in zip(group, values, exchanges, strict=True):
            agreed = self._agreed(result)
            track.apply(agreed, old, step, self.optimizer, self._seeds(track, agreed))
            track.watch(None)
            rows, cols = track.support.shape
            changes[track.layer.name] = LayerChange(
                entries=track.support.nnz,
                replaced=result.replaced,
                numel=rows * cols,
                drop_threshold=result.drop_threshold,
                grow_threshold=result.grow_threshold,
            )
        return changes

    def _refresh(self, group: list[LayerTrack], deltas: list[Tensor]) -> list[Exchange]:
        """Choose all positions anew, from the weights as trained so far."""
        chosen = [track.delta.draw(track.weight, track.support.shape).to(track.support.device) for track in group]
        parts = zip(group, chosen, deltas, strict=True)
        return [exchange_for(track.support, new, delta) for track, new, delta in parts]

    def _regrow(self, group: list[LayerTrack], deltas: list[Tensor], rate: float, step: int) -> list[Exchange]:
        """Drop entries of least use, and grow as many."""
        counts = [int(track.support.nnz * rate) for track in group]
        candidates = [self._candidates(track, count, step) for track, count in zip(group, counts, strict=True)]
        supports = [track.support for track in group]
        return exchange(supports, deltas, counts, candidates, together=self.config.redistribute)

    def _candidates(self, track: LayerTrack, count: int, step: int) -> Candidates:
        support, window = track.support, track.window
        positions = torch.empty(0, dtype=torch.int64, device=support.device)
        scores = positions.float()
        own = torch.zeros(support.nnz, device=support.device) if self.regrowth.competes else None
        fills = self.regrowth.observes == "nothing"
        if window is not None and window.steps > 0:
            positions, scores, own = window.scores()
            fills = self.regrowth.fills
        elif self.regrowth.observes == "covers" and (accumulators := self._accumulators(track)) is not None:
            wanted = math.ceil(self.config.candidates * support.nnz) if self.config.redistribute else count
            positions, scores = topk_outer(*accumulators, wanted, support, name=track.layer.name)
        if fills:
            positions, scores = self._fill(track, positions, scores, count, step)
        return Candidates(positions, scores, own)

    def _fill(
        self, track: LayerTrack, positions: Tensor, scores: Tensor, count: int, step: int
    ) -> tuple[Tensor, Tensor]:
        """Add random positions for missing candidates; they rank below all that have a gradient."""
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
        """The first process's choice, which should equal that of the others."""
        if self.collectives.alone:
            return result
        indices = self.collectives.from_first(result.support.indices)
        support = Support(result.support.shape, indices, validate=False, name=result.support.name)
        source = self.collectives.from_first(result.source)
        return Exchange(support, source, result.drop_threshold, result.grow_threshold)

    def _seeds(self, track: LayerTrack, result: Exchange) -> ObservedMoments | None:
        if track.window is None or track.window.steps == 0 or self.config.seed_moments == "zero":
            return None
        return track.window.moments_of(result.support, result.source < 0)

    def _ages(self, step: int, edges: tuple[int, ...]) -> tuple[int, ...]:
        bounds = torch.tensor(edges, dtype=torch.int32)
        counts = torch.zeros(len(edges) + 1, dtype=torch.int64)
        for track in self.tracks.values():
            bins = torch.bucketize(step - track.born, bounds.to(track.born.device), right=True)
            counts += torch.bincount(bins, minlength=len(edges) + 1).cpu()
        return tuple(counts.tolist())

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {"layers": {name: track.state_dict() for name, track in self.tracks.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state["layers"]) != set(self.tracks):
            raise ValueError(
                f"the saved reselection state of adapter {self.adapter} is of other layers than the model's "
                f"({len(state['layers'])} against {len(self.tracks)}): resume with the config the run was started with"
            )
        for name, saved in state["layers"].items():
            self.tracks[name].load_state_dict(saved, self.schedule.window)
