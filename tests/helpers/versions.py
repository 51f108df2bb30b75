"""Marks of tests that need a newer package than the oldest one."""

import peft
import pytest
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

from sparse_peft.ops.kept_inputs import TOP_HOOKS

forms_inputs_again = pytest.mark.skipif(
    TOP_HOOKS is None, reason="torch 2.6 does not say whether saved tensors are packed"
)

transformers_adapters = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"add_adapter and load_adapter of this transformers need peft>={MIN_PEFT_VERSION}",
)
