"""Runnable examples (`python -m examples.quickstart`), and the real model and text that the benchmarks share."""
