"""Upstream tests that cannot pass here for a reason that is not ours. Each is written out; nothing else may fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class KnownIssue:
    """One upstream test; with ``model_id`` or ``target_modules`` only the cases that have those."""

    test: str
    action: Literal["skip", "xfail"]
    reason: str
    model_id: str | None = None
    target_modules: str | None = None

    def covers(self, test: str, parameters: Mapping[str, Any]) -> bool:
        targets = parameters.get("config_kwargs", {}).get("target_modules")
        return (
            test == self.test
            and self.model_id in (None, parameters.get("model_id"))
            and self.target_modules in (None, targets)
        )


_HUB = "reads peft-internal-testing/tiny-opt-lora-revision from the Hugging Face hub, and there is no hub here"
_FLAT = "OPT joins batch and sequence before its feed-forward layers, which cannot know then whose row is whose"
_INDEXED = "layers_to_transform goes with module names only, not with 'all-linear': PEFT's own rule, in LoraConfig too"

KNOWN_ISSUES = (
    KnownIssue("test_from_pretrained", "skip", _HUB),
    KnownIssue("test_from_pretrained_cache_dir", "skip", _HUB),
    KnownIssue("test_save_pretrained_with_runtime_config", "skip", _HUB),
    KnownIssue("test_mixed_adapter_batches", "skip", _FLAT, "tiny-opt", "all-linear"),
    KnownIssue("test_generate_with_mixed_adapter_batches", "skip", _FLAT, "tiny-opt", "all-linear"),
    KnownIssue("test_training_decoders_layer_indexing", "skip", _INDEXED, target_modules="all-linear"),
    KnownIssue("test_training_encoder_decoders_layer_indexing", "skip", _INDEXED, target_modules="all-linear"),
)
