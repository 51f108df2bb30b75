"""A plugin of axolotl: sparse adapters from its YAML files.

```yaml
plugins:
  - sparse_peft.integrations.axolotl.SparsePlugin
adapter: sparse_peft
sparse_peft:
  method: sparse
  density: 0.01
  target_modules: [q_proj, v_proj]
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import BaseModel, Field, field_validator

from ..registry import method_named, methods
from ..training.callback import SparsityCallback
from ..tuners.base_config import BaseSparseConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer, TrainerCallback

NAME = "sparse_peft"
"""The value of ``adapter`` in the YAML file, and the name of the section with the adapter's fields."""


def config_from(section: dict[str, Any] | None, task_type: str | None = None) -> BaseSparseConfig:
    """An adapter's config from its section of the YAML file.

    Args:
        section: ``method``, by default ``"sparse"``, and fields of its config.
        task_type: where the section has none.

    Raises:
        ValueError: an unknown method, or a value out of range; names the field.
        TypeError: an unknown field, or a value of another type.
    """
    fields = dict(section or {})
    method = method_named(str(fields.pop("method", "sparse")))
    return method.config_class(**{"task_type": task_type, **fields})


class SparseArguments(BaseModel):
    """The section that the plugin adds to axolotl's configuration files."""

    sparse_peft: dict[str, Any] | None = Field(
        default=None,
        description="method, "
        f"one of {', '.join(method.name for method in methods())}, and fields of its config; see sparse-peft fields",
    )

    @field_validator(NAME)
    @classmethod
    def _has_known_fields(cls, section: dict[str, Any] | None) -> dict[str, Any] | None:
        try:
            config_from(section)
        except TypeError as error:
            raise ValueError(str(error)) from error  # the only kind of error that pydantic reports with the others
        return section


class SparsePlugin(BasePlugin):
    """Makes the adapter that the section ``sparse_peft`` describes, and changes it during training.

    Preference training gets the config, and its trainer makes the adapter. ``lora_model_dir`` names the folder of an
    adapter to go on with.
    """

    def get_input_args(self) -> str:
        return f"{SparseArguments.__module__}.{SparseArguments.__qualname__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=NAME)]

    def load_adapter(
        self, model: PreTrainedModel, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig] | None:
        if cfg.adapter != NAME:
            return None
        options: dict[str, Any] = {}
        if cfg.peft_autocast_adapter_dtype is not None:
            options["autocast_adapter_dtype"] = cfg.peft_autocast_adapter_dtype
        if cfg.lora_model_dir and not config_only:
            loaded = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference, **options)
            return loaded, loaded.active_peft_config
        config = config_from(_plain(cfg.sparse_peft), task_type_of(model))
        return (None if config_only else get_peft_model(model, config, **options)), config

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Trainer) -> list[TrainerCallback]:
        return [SparsityCallback(trainer)] if cfg.adapter == NAME else []


def _plain(section: Any) -> dict[str, Any] | None:
    """A section without axolotl's own kind of dict, which has every key that is asked for."""
    return section.to_dict() if hasattr(section, "to_dict") else section


def task_type_of(model: PreTrainedModel) -> str:
    """PEFT's name of what a model is trained for, after its class."""
    kinds = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}
    found = [task for kind, task in kinds.items() if kind in type(model).__name__]
    return found[0] if found else "CAUSAL_LM"
