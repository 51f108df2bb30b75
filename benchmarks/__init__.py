"""Benchmarks; they read installed packages only, so nothing here may ask the hub."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
