"""What axolotl 0.19 has of plugins, as the package ``axolotl``: enough to load one, and to call it as axolotl does.

Written after ``axolotl/integrations/base.py`` and the places that call it: configuration, loading and trainer.
"""

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ConfigDict
from transformers import Trainer


@dataclass(frozen=True)
class AdapterCapabilities:
    name: str
    lora_like: bool = False
    relora: bool = False


class BasePlugin:
    """Every hook does nothing. Those of the sparse plugin are here; axolotl has twenty more."""

    def register(self, cfg):
        pass

    def get_input_args(self):
        return None

    def get_adapter_capabilities(self):
        return []

    def load_adapter(self, model, cfg, inference=False, config_only=False):
        return None

    def add_callbacks_pre_trainer(self, cfg, model):
        return []

    def add_callbacks_post_trainer(self, cfg, trainer):
        return []


class Section(dict):
    """axolotl's dict, whose missing keys are None, as attributes too."""

    def __getattr__(self, name):
        value = self.get(name)
        return Section(value) if isinstance(value, dict) else value

    def to_dict(self):
        return dict(self)


class InputConfig(BaseModel):
    """The part of axolotl's schema that concerns adapters; other keys are dropped, as there."""

    model_config = ConfigDict(extra="ignore")
    adapter: str | None = None
    plugins: list[str] | None = None
    rl: str | None = None
    lora_model_dir: str | None = None
    peft_autocast_adapter_dtype: bool | None = None


def install(monkeypatch) -> None:
    """Make ``import axolotl.integrations.base`` find the interface."""
    base = ModuleType("axolotl.integrations.base")
    base.AdapterCapabilities, base.BasePlugin = AdapterCapabilities, BasePlugin
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, "sparse_peft.integrations.axolotl", raising=False)


class Run:
    """One run of ``axolotl train``: plugins, configuration, model and trainer, in axolotl's order.

    Args:
        yaml: the content of the configuration file.
    """

    def __init__(self, yaml: dict[str, Any]) -> None:
        self.plugins = [_imported(name)() for name in yaml.get("plugins", [])]
        for plugin in self.plugins:
            plugin.register(yaml)
        names = {capability.name for plugin in self.plugins for capability in plugin.get_adapter_capabilities()}
        if yaml.get("adapter") not in {"lora", "qlora", *names}:
            raise ValueError(f"Adapter {yaml.get('adapter')!r} is not built in and was not registered by a plugin")
        arguments = [_imported(name) for plugin in self.plugins if (name := plugin.get_input_args())]
        schema = type("Config", (InputConfig, *arguments), {})
        self.cfg = Section(schema(**yaml).model_dump(exclude_none=True))

    def load(self, model, inference=False):
        """``(model, config)``; preference training takes the config alone."""
        if self.cfg.rl in ("dpo", "ipo", "kto"):
            return model, self._load(model, inference=False, config_only=True)[1]
        return self._load(model, inference=inference, config_only=False)

    def _load(self, model, **how):
        found = (plugin.load_adapter(model, self.cfg, **how) for plugin in self.plugins)
        return next(loaded for loaded in found if loaded is not None)

    def trainer(self, model, **arguments):
        """transformers' Trainer with the plugins' callbacks."""
        before = [c for plugin in self.plugins for c in plugin.add_callbacks_pre_trainer(self.cfg, model)]
        trainer = Trainer(model=model, callbacks=before, **arguments)
        for plugin in self.plugins:
            for callback in plugin.add_callbacks_post_trainer(self.cfg, trainer):
                trainer.add_callback(callback)
        return trainer


def _imported(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)
