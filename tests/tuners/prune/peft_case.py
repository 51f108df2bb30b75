"""The method under PEFT's own tests."""

from tests.peft_suite.case import Case

CASE = Case(
    "prune",
    "sparse_peft:PruneConfig",
    {"recipe": "gradual", "pattern": 0.4, "r": 4, "alpha": 4},  # starts as the base model, as upstream's tests expect
    {"pattern": 0.2, "r": 2, "alpha": 2},
    groups=False,
)
