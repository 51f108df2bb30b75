"""``python -m benchmarks.quality``: what methods gain on real tasks and what they forget, at equal parameters.

Pretrained models and data come out of ordinary packages (``requirements.txt`` beside this file). ``run`` trains, one
JSON line a run, and goes on where it was interrupted; ``table`` and ``picture`` show what the lines say.
"""
