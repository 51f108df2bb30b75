"""The method under PEFT's own tests."""

from tests.peft_suite.case import Case

CASE = Case("snella", "sparse_peft:SnellaConfig", {"r": 4, "sparsity": 0.2}, {"r": 2, "sparsity": 0.5}, groups=False)
