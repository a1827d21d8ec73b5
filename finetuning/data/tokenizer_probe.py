"""A model's tokenizer, tried in a child process with limits on samples as they are.

Its file holds expressions that split text. One that goes back and forth in a text for hours would do so in
code that no signal reaches.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from finetuning.common.bounds import PROBE_WALL, TOKENIZER_CPU, TOKENIZER_MEMORY, TOKENIZER_TEXT
from finetuning.common.errors import UserError
from finetuning.common.limited import Limits, run_limited
from finetuning.readers.sample import Sample, strings_of

LIMITS = Limits(TOKENIZER_MEMORY, TOKENIZER_CPU, PROBE_WALL)
TRIED = 13  # samples, from the first to the last
_PASSED: set[bytes] = set()  # digests of what this process has tried: a tokenizer with its texts


def check_tokenizer(tokenizer: Any, samples: Sequence[Sample]) -> None:
    """UserError if loading it and encoding some of the samples takes more than the limits. A tokenizer
    that is written in Python hears of signals, and is not tried."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    written = backend.to_str() if backend is not None else ""
    if not written:
        return
    count = min(TRIED, len(samples))
    places = [i * (len(samples) - 1) // max(1, count - 1) for i in range(count)]
    texts = ["\n".join(strings_of(samples[i].messages()))[: TOKENIZER_TEXT.limit] for i in places]
    given = json.dumps({"tokenizer": written, "texts": texts}).encode()
    digest = hashlib.blake2b(given).digest()
    if digest in _PASSED:
        return
    ended = run_limited(__name__, (), LIMITS, given=given)
    if ended.code:
        reason = f" ({ended.complaint})" if ended.complaint else ""
        raise UserError(
            f"the model's tokenizer does not encode {len(texts)} of the samples within {TOKENIZER_CPU} and "
            f"{TOKENIZER_MEMORY}{reason}; use the original model's tokenizer files"
        )
    _PASSED.add(digest)


def main() -> None:
    """Load and encode; what it makes is nobody's."""
    from tokenizers import Tokenizer

    given = json.load(sys.stdin)
    Tokenizer.from_str(given["tokenizer"]).encode_batch(given["texts"])


if __name__ == "__main__":
    main()
