"""The methods that are compared: one line of data each in ``methods``, and how it becomes a trainable model."""

from __future__ import annotations

import copy
import gc
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, ShiraConfig, get_peft_model
from torch import Tensor, nn

from sparse_peft import S2FTConfig, SaRAConfig, SketchConfig, SLTrainConfig, SnellaConfig, SoRAConfig, SparseConfig

from .workloads import Workload

FROZEN, FULL = "frozen", "full"
FIRST, SECOND = "default", "second"
SETTLING_STEPS = 2
BLOCK_SIZE = 32
LEAST_DENSE_DENSITY = 0.01


@dataclass(frozen=True)
class Method:
    """One row of the benchmark.

    Args:
        name: how tables and files call it.
        config: makes the adapter's config from a seed and the fields that all configs share; None for no adapter.
        trains_base: train all weights of the base model.
        density: share of each weight that trains, for rows that are defined by it.
        is_sparse: one of this package's methods, which the goals speak of.
        fuses: serving one of several adapters means to merge it; for the others, to activate it.
        takes_quantised: the base may be quantised.
    """

    name: str
    config: Callable[..., PeftConfig] | None = None
    trains_base: bool = False
    density: float | None = None
    is_sparse: bool = False
    fuses: bool = False
    takes_quantised: bool = True


def lora_name(rank: int) -> str:
    return f"lora-r{rank}"


def dropout_name(rank: int) -> str:
    return f"lora-r{rank}-dropout"


def shira_name(rank: int) -> str:
    return f"shira-r{rank}"


def methods(rank: int, densities: Sequence[float]) -> list[Method]:
    """All rows.

    ``sparse-r``, ``sparse-r-product`` and ``shira-r`` train exactly as many entries as LoRA of that rank,
    ``s2ft-in-r`` and ``s2ft-out-r`` as many in whole channels of their inputs or outputs, ``snell-r`` as many in its
    kernel's factors; ``sltrain`` has half the rank and single entries beside it.
    """

    def lora(dropout: float) -> Callable[..., PeftConfig]:
        return lambda seed, **shared: LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, **shared)

    def shira(seed: int, **shared) -> PeftConfig:
        return ShiraConfig(r=rank, random_seed=seed, **shared)

    def sparse(**budget) -> Callable[..., PeftConfig]:
        return lambda seed, **shared: SparseConfig(**budget, seed=seed, **shared)

    def s2ft(side: str) -> Callable[..., PeftConfig]:
        return lambda seed, **shared: S2FTConfig(r=rank, side=side, seed=seed, **shared)

    def sara(density: float) -> Callable[..., PeftConfig]:
        # what is measured is the step of the layers; its nuclear norm is timed by benchmarks.nuclear
        return lambda seed, **shared: SaRAConfig(
            density=density, progressive=None, nuclear_weight=0.0, seed=seed, **shared
        )

    def sora(seed: int, **shared) -> PeftConfig:
        # the proximal step is of the gates alone, a few numbers a layer
        return SoRAConfig(r=rank, alpha=2 * rank, penalty=0.0, **shared)

    def snell(seed: int, **shared) -> PeftConfig:
        return SnellaConfig(r=rank, seed=seed, **shared)

    def sltrain(seed: int, **shared) -> PeftConfig:
        return SLTrainConfig(r=rank // 2, alpha=rank, density=LEAST_DENSE_DENSITY, seed=seed, **shared)

    def sketch(mode: str) -> Callable[..., PeftConfig]:
        # codes of a grid: how the first tables are made decides nothing of what is measured
        return lambda seed, **shared: SketchConfig(mode=mode, clustering="uniform", **shared)

    return [
        Method(FROZEN),
        Method(FULL, trains_base=True, takes_quantised=False),
        Method(lora_name(rank), lora(0.0), fuses=True),
        Method(dropout_name(rank), lora(0.05), fuses=True),
        Method(shira_name(rank), shira, fuses=True, takes_quantised=False),
        *(
            Method(f"sparse-{100 * density:g}%", sparse(density=density), density=density, is_sparse=True)
            for density in densities
        ),
        Method(f"sparse-r{rank}", sparse(r=rank), is_sparse=True),
        Method(f"sparse-r{rank}-product", sparse(r=rank, resident="product"), is_sparse=True),
        *(Method(f"s2ft-{side}-r{rank}", s2ft(side), is_sparse=True) for side in ("in", "out")),
        *(
            Method(f"sara-{100 * density:g}%", sara(density), density=density, is_sparse=True)
            for density in densities
            if density >= LEAST_DENSE_DENSITY
        ),
        Method(f"sora-r{rank}", sora, is_sparse=True),
        Method(f"snell-r{rank}", snell, is_sparse=True),
        Method(f"sltrain-r{rank // 2}-{100 * LEAST_DENSE_DENSITY:g}%", sltrain, is_sparse=True),
        # no sparse deltas: the goals do not speak of them
        Method("sketch-delta-4bit", sketch("delta"), fuses=True),
        Method("sketch-replace-4bit", sketch("replace"), fuses=True, takes_quantised=False),
        *(
            Method(
                f"blocks-{100 * density:g}%",
                sparse(density=density, granularity="block", block_size=BLOCK_SIZE),
                density=density,
                is_sparse=True,
            )
            for density in densities
            if density >= LEAST_DENSE_DENSITY
        ),
    ]


class Subject:
    """A method's model with its optimizer, trained for a few steps so that every lasting buffer exists."""

    def __init__(self, method: Method, workload: Workload, base: nn.Module):
        self.method = method
        self.workload = workload
        torch.manual_seed(0)
        base.train()
        base.requires_grad_(method.trains_base)
        # the base model on the very same weights: where a weight lies in memory decides more of a decode step than
        # anything a method does
        self.bare = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
        self.model = base if method.config is None else get_peft_model(base, self._config(seed=0))
        trained = self.trained
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=True) if trained else None
        self._output: Tensor | None = None
        for _ in range(SETTLING_STEPS):
            self.step()
        gc.collect()

    def _config(self, seed: int) -> PeftConfig:
        return self.method.config(
            seed, target_modules=list(self.workload.target_modules), task_type=self.workload.task_type
        )

    @property
    def trained(self) -> list[Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    # ------------------------------------------------------------------ one training step, in three parts

    def forward(self) -> None:
        self._output = self.workload.forward(self.model)

    def backward(self) -> None:
        self._output.backward(self.workload.output_gradient)
        self._output = None

    def update(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        self.forward()
        self.backward()
        self.update()

    # ------------------------------------------------------------------ serving

    def prepare_serving(self) -> None:
        """Drop the optimizer, go to evaluation, and add a second adapter; both adapters get values that show."""
        self.optimizer = None
        self.bare.eval()
        self.model.eval()
        if self.method.config is None:
            return
        self.model.add_adapter(SECOND, self._config(seed=1))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name in (FIRST, SECOND):
                self.model.set_adapter(name)
                for parameter in self.trained:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(noise.to(parameter), alpha=1e-2)
        self.model.set_adapter(FIRST)
        self.model.eval()

    @torch.no_grad()
    def decode(self) -> Tensor:
        """One token through the adapted layers: what ``generate`` runs for each, PEFT's wrapper being entered once."""
        return self.workload.decode(self.model if self.method.config is None else self.model.get_base_model())

    @torch.no_grad()
    def decode_bare(self) -> Tensor:
        """The same token through the base model, which shares this method's weights."""
        return self.workload.decode(self.bare)

    def begin_switching(self) -> None:
        """Serve one adapter as fast as the method can: merged, for a method that fuses."""
        if self.method.fuses:
            self.model.merge_adapter()

    def end_switching(self) -> None:
        """Back to adapters beside the base weight."""
        if self.method.fuses:
            self.model.unmerge_adapter()

    def switch(self, name: str) -> None:
        """Serve another adapter: by merging it, or by activating it with all that its next forward would do first."""
        if self.method.fuses:
            self.model.unmerge_adapter()
            self.model.set_adapter(name)
            self.model.merge_adapter()
        else:
            self.model.set_adapter(name)
            self.model.base_model.make_resident()

    # ------------------------------------------------------------------ files

    def file_bytes(self) -> int:
        """Size of the weight file that ``save_pretrained`` writes for the trained adapter."""
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder, selected_adapters=[FIRST], save_embedding_layers=False)
            return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
