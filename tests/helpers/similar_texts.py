"""Random Chinese texts, some of them changed a little."""

import random


def similar_texts(count: int, seed: int, changed: int = 0) -> list[str]:
    """Random Chinese texts, and `changed` lightly edited copies of the first of them."""
    rng = random.Random(seed)
    alphabet = [chr(c) for c in range(0x4E00, 0x4E00 + 2000)]
    texts = ["".join(rng.choices(alphabet, k=rng.randint(20, 200))) for _ in range(count)]
    for text in texts[:changed]:
        letters = list(text)
        for _ in range(max(1, len(letters) // rng.choice([30, 60, 120]))):
            letters[rng.randrange(len(letters))] = rng.choice(alphabet)
        texts.append("".join(letters))
    rng.shuffle(texts)
    return texts
