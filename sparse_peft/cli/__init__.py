"""The commands of ``sparse-peft``. Each is a thin layer over functions of the library."""

from _sparse_peft_startup.command import main

__all__ = ["main"]
