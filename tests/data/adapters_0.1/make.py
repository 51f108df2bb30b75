"""Adapters as version 0.1.0 saved them: one folder a case, which later versions must load with the same results.

Made once, with that version's code; run again, this gives the same files:

    cd <checkout of the version> && OMP_NUM_THREADS=1 PYTHONPATH=. python <this file>

Each folder holds the adapter's files and `expected.safetensors`: the input `x`, the adapted model's `output`, the
layers' merged weights as `merged.<layer>`, and in the metadata the seed of the base model's weights.

Bases' weights and inputs are small multiples of powers of two, and trained parameters are rounded to such numbers
after training. Sums of products are then exact in float32 in any order, so that results can be compared bit for bit on
every machine. Only SNELL's kernel takes roots: its results agree up to rounding.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

FOLDER = Path(__file__).parent
FEATURES = 16
LINEAR = ("first", "second", "third")
STEPS = 12


class Base(nn.Module):
    """Layers side by side on one input: linear with a bias, Conv1D, linear without a bias, a convolution; a head.

    Args:
        seed: of the weights: multiples of 1/256 in (-1, 1), drawn as integers.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.first = nn.Linear(FEATURES, 12)
        self.second = Conv1D(10, FEATURES)
        self.third = nn.Linear(FEATURES, 24, bias=False)
        self.conv = nn.Conv2d(4, 6, 2, padding=1)
        self.head = nn.Linear(FEATURES, 3)
        integers = np.random.RandomState(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.from_numpy(integers.randint(-255, 256, tuple(parameter.shape))) / 256)

    def forward(self, x: Tensor) -> Tensor:
        image = self.conv(x.view(-1, 4, 2, 2)).flatten(1)
        return torch.cat([self.first(x), self.second(x), self.third(x), image, self.head(x)], 1)


def inputs() -> Tensor:
    """``(4, features)``, integers from -3 to 3."""
    return torch.from_numpy(np.random.RandomState(99).randint(-3, 4, (4, FEATURES))).float()


@dataclass(frozen=True)
class Case:
    """One adapter.

    Attributes:
        config: name of the config's class.
        fields: of the config.
        targets: layers that are adapted.
        exact: whether results are the same on every machine, bit for bit.
        before: what is done with the base and the config first, such as choosing positions from data.
    """

    config: str
    fields: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = LINEAR
    exact: bool = True
    before: Callable[[nn.Module, Any], Any] = lambda base, config: config


def from_gradients(base: nn.Module, config: Any) -> Any:
    import sparse_peft

    return sparse_peft.select_support(base, config, [inputs()], loss_fn=lambda model, x: model(x).square().mean())


def from_data(base: nn.Module, config: Any) -> Any:
    import sparse_peft

    return sparse_peft.sketch_model(base, config, [inputs()], loss_fn=lambda model, x: model(x))


ALL = (*LINEAR, "conv")
DYNAMIC = {"reselect_every": 3, "accumulate": 1, "replace_rate": 0.5}
CASES = {
    "sparse-flat": Case("SparseConfig", {"density": 0.03}, ALL),  # fewer entries than rows: flat positions
    "sparse-csr": Case("SparseConfig", {"density": 0.2, "selection": "magnitude"}, ALL),
    "sparse-bfloat16": Case("SparseConfig", {"density": 0.2, "save_dtype": "bfloat16", "bias": "all"}, ALL),
    "sparse-block": Case("SparseConfig", {"density": 0.25, "granularity": "block", "block_size": [2, 4]}),
    "sparse-gradient": Case("SparseConfig", {"density": 0.1, "selection": "gradient"}, before=from_gradients),
    "sparse-rigl": Case("SparseConfig", {"density": 0.2, "selection": "rigl", **DYNAMIC}, ALL),
    "sparse-modules-to-save": Case("SparseConfig", {"density": 0.2, "modules_to_save": ["head"]}),
    "sara": Case("SaRAConfig", {"threshold": 0.2, "progressive": 6}, ALL),
    "s2ft-in": Case("S2FTConfig", {"k": 3, "side": "in"}),
    "s2ft-out": Case("S2FTConfig", {"k": 2, "side": "out"}, ALL),
    "sora": Case("SoRAConfig", {"r": 4, "alpha": 8, "target_rank": 0.5, "target_step": 9, "report_every": 3}, ALL),
    "sora-compacted": Case(
        "SoRAConfig",
        {"r": 4, "alpha": 4, "target_rank": 0.5, "target_step": 6, "compact_every": 2, "rank_pattern": {"first": 2}},
    ),
    "sltrain": Case("SLTrainConfig", {"r": 4, "alpha": 8, "density": 0.1}),
    "sltrain-pretrain": Case(
        "SLTrainConfig", {"mode": "pretrain", "r": 4, "alpha": 4, "density": 0.1}, ("first", "third")
    ),
    "snella": Case("SnellaConfig", {"r": 4, "sparsity": 0.5}, exact=False),
    "snella-mixed": Case(
        "SnellaConfig", {"r": 4, "kernel": "mixed", "sparsity": 0.25, "threshold": "hard_ste"}, exact=False
    ),
    "snella-allocated": Case(
        "SnellaConfig",
        {"r": 4, "target_sparsity": 0.6, "allocate_start": 2, "allocate_stop": 9, "allocate_every": 2},
        exact=False,
    ),
    "sketch-recompute": Case("SketchConfig", {"bits": 4, "clustering": "quantile"}),
    "sketch-sidecar": Case("SketchConfig", {"bits": 2, "groups": 2}, before=from_data),
    "sketch-embed": Case("SketchConfig", {"bits": 3, "index_storage": "embed"}),
    "sketch-replace": Case("SketchConfig", {"bits": 4, "mode": "replace", "clustering": "uniform"}),
}


def train(model: nn.Module) -> None:
    """A few steps with a controller, then every trained number rounded to a multiple of 1/16."""
    from sparse_peft import SparsityController

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    controller = SparsityController(model, optimizer, total_steps=STEPS)
    x = inputs()
    for _ in range(STEPS):
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        controller.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_((parameter * 16).round() / 16)


def results(model: nn.Module, targets: tuple[str, ...]) -> dict[str, Tensor]:
    """A loaded model's output, and its targets' merged weights; it is merged afterwards."""
    with torch.no_grad():
        output = model.eval()(inputs())
    merged = model.merge_and_unload()
    weights = {f"merged.{name}": merged.get_submodule(name).weight.detach().clone() for name in targets}
    return {"output": output, **weights}


def make(case: Case, seed: int, folder: Path) -> None:
    """Train and save one case, and what the saved adapter computes once it is loaded."""
    from peft import PeftModel, get_peft_model

    import sparse_peft

    torch.manual_seed(seed)
    base = Base(seed)
    config = getattr(sparse_peft, case.config)(target_modules=list(case.targets), **case.fields)
    model = get_peft_model(base, case.before(base, config)).train()
    train(model)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    found = results(PeftModel.from_pretrained(Base(seed), folder), case.targets)
    save_file({"x": inputs(), **found}, folder / "expected.safetensors", metadata={"seed": str(seed)})


def main() -> None:
    for seed, (name, case) in enumerate(CASES.items(), 1):
        with tempfile.TemporaryDirectory() as scratch:
            make(case, seed, Path(scratch))
            shutil.rmtree(FOLDER / name, ignore_errors=True)
            shutil.copytree(scratch, FOLDER / name)


if __name__ == "__main__":
    main()
