"""What the tests of this room share."""

import pytest
from transformers import PreTrainedTokenizerFast

from tests.helpers.qwen3_tokenizer import qwen3_tokenizer


@pytest.fixture(scope="session")
def qwen3() -> PreTrainedTokenizerFast:
    return qwen3_tokenizer()
