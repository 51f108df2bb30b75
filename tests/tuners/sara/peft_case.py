"""The method under PEFT's own tests."""

from tests.peft_suite.case import Case

CASE = Case(
    "sara",
    "sparse_peft:SaRAConfig",
    {"density": 0.4, "progressive": None, "nuclear_weight": 0.0},
    {"density": 0.2},
    embeddings=True,
)
