"""The method under PEFT's own tests."""

from tests.peft_suite.case import Case

CASE = Case(
    "sora",
    "sparse_peft:SoRAConfig",
    {"r": 4, "alpha": 4, "penalty": 0.0},
    {"r": 2, "alpha": 2},
    groups=False,
    low_rank=True,
)
