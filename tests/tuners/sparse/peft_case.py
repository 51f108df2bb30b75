"""The method under PEFT's own tests."""

from tests.peft_suite.case import Case

CASE = Case("sparse", "sparse_peft:SparseConfig", {"density": 0.4}, {"density": 0.2}, embeddings=True)
