"""The method under PEFT's own tests."""

from tests.peft_suite.case import Case

CASE = Case(
    "sltrain",
    "sparse_peft:SLTrainConfig",
    {"r": 3, "alpha": 3, "density": 0.2},
    {"r": 2, "density": 0.1},
    groups=False,
    low_rank=True,
)
