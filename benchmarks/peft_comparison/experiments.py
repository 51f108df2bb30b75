"""The experiments, as folders in the layout of PEFT's comparison.

`python -m benchmarks.peft_comparison.experiments` writes `<task>/experiments/<method>/<name>/` with
`adapter_config.json` and `training_params.json`. A file has what differs from the defaults.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, ShiraConfig

from sparse_peft import S2FTConfig, SaRAConfig, SparseConfig
from sparse_peft.tuners.base_config import BaseSparseConfig, changed_fields

FOLDER = Path(__file__).parent
# SHiRA's rate in PEFT's table, at which random positions here are the same method.
SHIRA_RATE = 3e-4


@dataclass(frozen=True)
class Experiment:
    """One row.

    Attributes:
        task: folder of PEFT's comparison, `MetaMathQA` or `image-gen`.
        method: folder of the method.
        name: of the row.
        config: of the adapter.
        params: what differs from the task's `default_training_params.json`.
    """

    task: str
    method: str
    name: str
    config: PeftConfig
    params: dict[str, Any]

    @property
    def path(self) -> Path:
        return Path(self.task, "experiments", self.method, self.name)

    def files(self) -> dict[str, str]:
        """`{file name: content}`."""
        contents = {"adapter_config.json": config_content(self.config), "training_params.json": self.params}
        return {name: json.dumps(content, indent=2) + "\n" for name, content in contents.items()}


def config_content(config: PeftConfig) -> dict[str, Any]:
    """A config's type and the fields that are set, as `PeftConfig.from_pretrained` reads them."""
    if isinstance(config, BaseSparseConfig):
        # last and always: whatever the default is by then
        fields = {name: value for name, value in changed_fields(config).items() if name != "scale"}
        fields["scale"] = config.scale
    else:
        usual = type(config)().to_dict()
        fields = {key: value for key, value in config.to_dict().items() if key == "r" or value != usual[key]}
    fields = {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}
    return {"peft_type": config.peft_type.value, "task_type": config.task_type, **fields}


def _rate(rate: float) -> dict[str, Any]:
    return {"optimizer_kwargs": {"lr": rate}}


def _language() -> list[Experiment]:
    """Rows of `MetaMathQA`; without targets, PEFT's default for Llama, q_proj and v_proj."""
    mlp = ["down_proj", "gate_proj", "up_proj"]

    def sparse(name: str, rate: float, **fields: Any) -> Experiment:
        config = SparseConfig(**{"r": 32, "scale": 1.0, "task_type": "CAUSAL_LM", **fields})
        return Experiment("MetaMathQA", "sparse", f"llama-3.2-3B-{name}", config, _rate(rate))

    lora = LoraConfig(r=32, lora_alpha=64, task_type="CAUSAL_LM")
    s2ft = S2FTConfig(ratio=0.03, scale=1.0, task_type="CAUSAL_LM")
    return [
        Experiment("MetaMathQA", "lora", "llama-3.2-3B-rank32", lora, {}),
        Experiment(
            "MetaMathQA",
            "shira",
            "llama-3.2-3B-rank32",
            ShiraConfig(r=32, random_seed=42, task_type="CAUSAL_LM"),
            _rate(SHIRA_RATE),
        ),
        sparse("rank32-random-lr_0.0001", 1e-4, seed=42),
        sparse("rank32-random-lr_0.0003", SHIRA_RATE, seed=42),
        sparse("rank32-random-lr_0.001", 1e-3, seed=42),
        sparse("rank32-magnitude_smallest-lr_0.001", 1e-3, selection="magnitude_smallest"),
        sparse("rank32-fisher-lr_0.0003", 3e-4, selection="fisher"),
        sparse("rank32-gallop-lr_0.0003", 3e-4, selection="gallop"),
        sparse("rank32-lift-lr_0.0003", 3e-4, selection="principal", reselect_every=200),
        sparse("rank32-spiel_ag-lr_0.0003", 3e-4, selection="accumulated_gradient", reselect_every=100, accumulate=10),
        sparse("rank10-mlp-random-lr_0.001", 1e-3, r=10, target_modules=mlp),
        Experiment("MetaMathQA", "s2ft", "llama-3.2-3B-ratio_0.03-lr_0.001", s2ft, _rate(1e-3)),
    ]


# The linear layers of FLUX.2's blocks, as PEFT's LoRA row has them.
FLUX_LAYERS = [
    "add_k_proj", "add_q_proj", "add_v_proj", "linear_in", "linear_out", "to_add_out", "to_k", "to_out.0", "to_q",
    "to_qkv_mlp_proj", "to_v",
]  # fmt: skip


def _images() -> list[Experiment]:
    """Rows of `image-gen`, at its default rate of 3e-4 but for two."""

    def row(method: str, name: str, config: PeftConfig, **params: Any) -> Experiment:
        return Experiment("image-gen", method, f"flux2-klein-{name}", config, params)

    def sparse(**fields: Any) -> SparseConfig:
        return SparseConfig(**{"r": 32, "scale": 1.0, "target_modules": FLUX_LAYERS, **fields})

    return [
        row("lora", "rank32", LoraConfig(r=32, lora_alpha=32, target_modules=FLUX_LAYERS)),
        row("shira", "rank32", ShiraConfig(r=32, random_seed=42, target_modules=FLUX_LAYERS)),
        row("sparse", "rank32-random", sparse(seed=42)),
        row("sparse", "rank32-magnitude_smallest-lr_0.001", sparse(selection="magnitude_smallest"), **_rate(1e-3)),
        row(
            "sparse",
            "rank32-spiel_ag",
            sparse(selection="accumulated_gradient", reselect_every=50, accumulate=5),
        ),
        row("sara", "density_0.01-lr_0.001", SaRAConfig(density=0.01, scale=1.0, target_modules=FLUX_LAYERS),
            **_rate(1e-3)),
    ]  # fmt: skip


def experiments() -> list[Experiment]:
    """All rows."""
    return _language() + _images()


def write(folder: Path = FOLDER) -> None:
    """Write all rows under a folder, in place of those that are there."""
    for task in {experiment.task for experiment in experiments()}:
        shutil.rmtree(folder / task / "experiments", ignore_errors=True)
    for experiment in experiments():
        target = folder / experiment.path
        target.mkdir(parents=True)
        for name, content in experiment.files().items():
            (target / name).write_text(content)


if __name__ == "__main__":
    write()
