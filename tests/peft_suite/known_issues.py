"""Upstream tests that cannot pass here for a reason that is not ours. Each is written out; nothing else may fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class KnownIssue:
    """One upstream test; with any of the other fields only the cases that have those.

    ``config`` is the name of the config class; ``autocast`` what the test passes as ``autocast_adapter_dtype``, or
    does by itself.
    """

    test: str
    action: Literal["skip", "xfail"]
    reason: str
    model_id: str | None = None
    target_modules: str | None = None
    config: str | None = None
    autocast: bool | None = None

    def covers(self, test: str, parameters: Mapping[str, Any]) -> bool:
        targets = parameters.get("config_kwargs", {}).get("target_modules")
        return (
            test == self.test
            and self.model_id in (None, parameters.get("model_id"))
            and self.target_modules in (None, targets)
            and self.config in (None, getattr(parameters.get("config_cls"), "__name__", None))
            and self.autocast in (None, parameters.get("autocast_adapter_dtype"))
        )


_HUB = "reads peft-internal-testing/tiny-opt-lora-revision from the Hugging Face hub, and there is no hub here"
_FLAT = "OPT joins batch and sequence before its feed-forward layers, which cannot know then whose row is whose"
_INDEXED = "layers_to_transform goes with module names only, not with 'all-linear': PEFT's own rule, in LoraConfig too"
_PADDED = "takes padding for end tokens, and Bart has two different ones; the generated tokens are equal"
_DISTANCES = "the kernel's factors are float32 in every model: rounded distances have no order"
_GATES = "gates are float32 in every model: a proximal step is less than bfloat16 can tell from nothing"
_TABLES = "tables are float32 in every model: bfloat16 ones stand still at a fine-tuning learning rate"
_VECTORS = "singular vectors are float32 in every model: rounded ones are not orthogonal"
_RATE = "SGD at 0.5 without a controller, at which singular vectors diverge; upstream lowers the rate of others"
_OTHER_BASE = "loads on a base of other random weights, which have other codes: such a base is refused"

KNOWN_ISSUES = (
    KnownIssue("test_from_pretrained", "skip", _HUB),
    KnownIssue("test_from_pretrained_cache_dir", "skip", _HUB),
    KnownIssue("test_save_pretrained_with_runtime_config", "skip", _HUB),
    KnownIssue("test_mixed_adapter_batches", "skip", _FLAT, "tiny-opt", "all-linear"),
    KnownIssue("test_generate_with_mixed_adapter_batches", "skip", _FLAT, "tiny-opt", "all-linear"),
    KnownIssue("test_training_decoders_layer_indexing", "skip", _INDEXED, target_modules="all-linear"),
    KnownIssue("test_training_encoder_decoders_layer_indexing", "skip", _INDEXED, target_modules="all-linear"),
    KnownIssue("test_adapter_dtype_autocast", "skip", _GATES, config="SoRAConfig", autocast=False),
    KnownIssue("test_add_adapter_no_autocast_adapter_dtype", "skip", _GATES, config="SoRAConfig"),
    KnownIssue("test_adapter_dtype_autocast", "skip", _DISTANCES, config="SnellaConfig", autocast=False),
    KnownIssue("test_add_adapter_no_autocast_adapter_dtype", "skip", _DISTANCES, config="SnellaConfig"),
    KnownIssue("test_adapter_dtype_autocast", "skip", _TABLES, config="SketchConfig", autocast=False),
    KnownIssue("test_add_adapter_no_autocast_adapter_dtype", "skip", _TABLES, config="SketchConfig"),
    KnownIssue("test_adapter_dtype_autocast", "skip", _VECTORS, config="SSTConfig", autocast=False),
    KnownIssue("test_add_adapter_no_autocast_adapter_dtype", "skip", _VECTORS, config="SSTConfig"),
    KnownIssue("test_parameters_after_loading_model", "skip", _RATE, config="SSTConfig"),
    KnownIssue("test_loading_model_requires_grad_set_correctly", "skip", _OTHER_BASE, config="SketchConfig"),
    KnownIssue(
        "test_loading_model_with_modules_to_save_requires_grad_set_correctly",
        "skip",
        _OTHER_BASE,
        config="SketchConfig",
    ),
    KnownIssue(
        "test_generate_with_mixed_adapter_batches", "skip", _PADDED, "tiny-bart", "all-linear", config="SnellaConfig"
    ),
)
