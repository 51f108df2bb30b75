"""Every method with settings for a small language model."""

import pytest

from sparse_peft import (
    MonarchConfig,
    PruneConfig,
    S2FTConfig,
    SaRAConfig,
    SketchConfig,
    SLTrainConfig,
    SnellaConfig,
    SoRAConfig,
    SparseConfig,
    SparseIFTConfig,
    SSTConfig,
)

METHODS = {
    "sparse": (SparseConfig, {"density": 0.1, "target_modules": "all-linear"}),
    "s2ft": (S2FTConfig, {"ratio": 0.2}),
    "sara": (
        SaRAConfig,
        {"density": 0.1, "target_modules": "all-linear", "nuclear_min_size": 8, "nuclear_weight": 1e-4},
    ),
    "sora": (SoRAConfig, {"r": 4, "target_modules": "all-linear", "penalty": 1.0, "report_every": 2}),
    "snella": (SnellaConfig, {"r": 4, "target_modules": "all-linear", "threshold": "hard_ste"}),
    "sltrain": (SLTrainConfig, {"r": 4, "density": 0.1, "target_modules": "all-linear"}),
    "sketch": (SketchConfig, {"bits": 3, "target_modules": "all-linear"}),
    "prune": (PruneConfig, {"pattern": 0.5, "r": 4, "target_modules": "all-linear"}),
    "monarch": (MonarchConfig, {"nblocks": 2, "target_modules": "all-linear"}),
    "sst": (SSTConfig, {"r": 4, "target_modules": "all-linear"}),
    "sparse_ift": (SparseIFTConfig, {"r": 4, "sparsity": 0.5, "target_modules": "all-linear"}),
}

# What of a method changes during training besides its values, soon and often; the others change nothing.
MOVING = {
    "sparse": {"selection": "accumulated_gradient", "reselect_every": 2, "accumulate": 1, "replace_rate": 0.5},
    "sara": {"progressive": 2},
    "sora": {"penalty": 4.0, "prox_start": 0},
    "snella": {"target_sparsity": 0.5, "allocate_start": 0, "allocate_stop": 6, "allocate_every": 2},
    "sltrain": {"selection": "rigl", "reselect_every": 2, "accumulate": 1},
    "prune": {"recipe": "pst", "pattern": 0.5, "start": 0, "stop": 6, "mask_every": 2},
    "sst": {"resample_every": 2},
    "sparse_ift": {"reselect_every": 2, "reselect_stop": 6},
}

# Where one of each family will do for every run of the tests, the others are slow.
ALWAYS = ("sparse", "sora")
ONE_OF_EACH_FAMILY = [pytest.param(m, marks=() if m in ALWAYS else pytest.mark.slow) for m in METHODS]


def config(method="sparse", **kwargs):
    config_cls, settings = METHODS[method]
    return config_cls(**{**settings, "task_type": "CAUSAL_LM", **kwargs})
