import pytest

from tests.helpers.language_models import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()
