import pytest
from small import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()
