"""What becomes of an adapter after training: files of models without PEFT's wrapper, and other adapters' forms."""

from .files import load_adapter, save_adapter
from .lora import save_as_lora, save_lora_as_s2ft
from .pool import AdapterPool, PoolStatistics

__all__ = ["AdapterPool", "PoolStatistics", "load_adapter", "save_adapter", "save_as_lora", "save_lora_as_s2ft"]
