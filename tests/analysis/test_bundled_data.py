"""The bundled Q&A: its form, its spread, and every number after 最终答案 computed again.

The parameters of a calculation are read from the text of its question, so that text and number
cannot drift apart. Where the answer's own method could carry its own mistake, the result is found
another way: by trying every key, by running the register, by solving the definition.
"""

import re
from collections import Counter
from collections.abc import Callable
from itertools import combinations, product
from math import ceil, gcd, log, log2, prod, sqrt
from pathlib import Path

import pytest

from finetuning.analysis.crypto_terms import citation_conflicts
from finetuning.readers.dataset import read_samples
from finetuning.readers.sample import Sample

RAW = Path(__file__).resolve().parents[2] / "data" / "raw"
FILES = sorted(RAW.glob("*.md"))
FINAL = "最终答案："
# fmt: off
TOPICS = [
    "SM2", "SM3", "SM4", "SM9", "ZUC", "AES", "RSA", "椭圆曲线", "ECDSA", "ElGamal", "Shamir",
    "杂凑", "HMAC", "消息鉴别码", "TLS", "TLCP", "IPSec", "密钥管理", "主密钥", "证书", "CRL",
    "OCSP", "证书透明", "GB/T 39786", "密评", "密码模块", "后量子", "ML-KEM", "ML-DSA", "抗量子",
    "侧信道", "掩码", "填充预言机", "长度扩展", "降级", "反射攻击", "中间相遇", "随机数",
    "最小熵", "前向安全", "数字信封", "量子",
]
# fmt: on


def numbered(path: Path) -> dict[int, str]:
    """Question number → question, as written; the reader drops the numbers."""
    text = path.read_text(encoding="utf-8")
    return {int(n): q.strip() for n, q in re.findall(r"^### Q(\d+): (.+)$", text, re.MULTILINE)}


NUMBERED = {number: question for path in FILES for number, question in numbered(path).items()}
SAMPLES = list(read_samples([str(RAW)]).samples)
BY_QUESTION = {sample.question: sample for sample in SAMPLES}


# Arithmetic of our own, on plain integers.


Point = tuple[int, int] | None


def curve_sum(first: Point, second: Point, a: int, p: int) -> Point:
    """Chord and tangent on y² = x³ + ax + b over GF(p); None is the point at infinity."""
    if first is None or second is None:
        return first or second
    (x1, y1), (x2, y2) = first, second
    if x1 == x2 and (y1 + y2) % p == 0:
        return None
    rise, run = (3 * x1 * x1 + a, 2 * y1) if first == second else (y2 - y1, x2 - x1)
    slope = rise * pow(run, -1, p) % p
    x = (slope * slope - x1 - x2) % p
    return x, (slope * (x1 - x) - y1) % p


def multiple(k: int, point: Point, a: int, p: int) -> Point:
    """k times the point by k additions, which cannot share a mistake with double-and-add."""
    total = None
    for _ in range(k):
        total = curve_sum(total, point, a, p)
    return total


def checked_base(a: int, b: int, p: int, point: tuple[int, int], order: int) -> None:
    x, y = point
    assert (y * y - x**3 - a * x - b) % p == 0
    assert multiple(order, point, a, p) is None


def gf256(x: int, y: int) -> int:
    """Carry-less product, then the remainder by x⁸+x⁴+x³+x+1 from the top."""
    total = 0
    for bit in range(8):
        total ^= (x << bit) * (y >> bit & 1)
    for bit in range(14, 7, -1):
        total ^= (0x11B << bit - 8) * (total >> bit & 1)
    return total


def the_only(found) -> object:
    (value,) = found
    return value


def prime_factors(n: int) -> tuple[int, int]:
    p = next(p for p in range(2, n) if n % p == 0)
    return p, n // p


def keys_of_shared_nonce(n: int, signatures, equation: Callable[[int, int, int, int], bool]):
    """All (k, d) that satisfy the signature equation for every (e or nothing, r, s) given."""
    pairs = product(range(1, n), repeat=2)
    return [kd for kd in pairs if all(equation(*kd, *signature) for signature in signatures)]


# One function per calculation question; its arguments are the groups of the pattern, as integers.


def aes_product(modulus, x, y):
    assert modulus == 0x11B
    return f"0x{gf256(x, y):02x}"


def cbc_ciphertext(key, vector, *blocks):
    out = [vector]
    for block in blocks:
        mixed = block ^ out[-1] ^ key
        out.append(mixed << 1 & 15 | mixed >> 3)
    return " ".join(f"{value:04b}" for value in out[1:])


def key_search_hours(base, exponent, bits):
    return f"{2 ** (bits - 1) / base**exponent / 3600:.1f}"


def hash_padding(bits, length_bits):
    zeros = next(k for k in range(512) if (bits + 1 + k + length_bits) % 512 == 0)
    return zeros, (bits + 1 + zeros + length_bits) // 512


def glue_padding(key_bytes, message_bytes):
    length = key_bytes + message_bytes
    total = next(t for t in range(length + 9, length + 9 + 64) if t % 64 == 0)
    return total - length, 8 * total


def birthday_files(bits):
    return f"{sqrt(2 * log(2) * 2**bits) / 1e9:.2f}"


def password_days(length, alphabet, iterations, base, exponent):
    return f"{alphabet**length / 2 * iterations / base**exponent / 86400:.1f}"


def merkle_proof(base, depth):
    leaves, levels = base**depth, 0
    while leaves > 1:
        leaves, levels = leaves // 2, levels + 1
    return levels * 32, levels


def rsa_key(p, q, e):
    phi = (p - 1) * (q - 1)
    return p * q, the_only(d for d in range(phi) if e * d % phi == 1)


def rsa_decrypted(p, q, e, c):
    return the_only(m for m in range(p * q) if pow(m, e, p * q) == c)


def diffie_hellman(p, g, a, b):
    return pow(g, a, p), pow(g, b, p), pow(g, a * b, p)


def elgamal(p, g, x, k, m):
    assert len({pow(g, i, p) for i in range(p - 1)}) == p - 1, "g is called a generator"
    return pow(g, k, p), m * pow(g, x * k, p) % p


def sm2_like(a, b, p, gx, gy, n, d, k, e, x1, y1):
    base = (gx, gy)
    checked_base(a, b, p, base, n)
    assert multiple(k, base, a, p) == (x1, y1)
    public = multiple(d, base, a, p)
    accepted = []
    for r, s in product(range(1, n), repeat=2):
        if s * (1 + d) % n != (k - r * d) % n:
            continue
        point = curve_sum(multiple(s, base, a, p), multiple((r + s) % n, public, a, p), a, p)
        if point and (e + point[0]) % n == r:
            accepted.append((r, s))
    return the_only(accepted)


def broadcast(e, *values):
    moduli, ciphers = values[: len(values) // 2], values[len(values) // 2 :]
    assert prod(gcd(x, y) for x, y in combinations(moduli, 2)) == 1
    pairs = list(zip(moduli, ciphers, strict=True))
    return the_only(m for m in range(min(moduli)) if all(pow(m, e, n) == c for n, c in pairs))


def tls_nonce(vector, sequence):
    return f"{vector ^ sequence:024x}"


def raw_bits(percent, entropy):
    return ceil(entropy / -log2(percent / 100))


def shamir_secret(threshold, holders, modulus, *flat):
    shares = list(zip(flat[::2], flat[1::2], strict=True))
    assert threshold == len(shares) == 3 <= holders
    polynomials = product(range(modulus), repeat=2)
    (x1, y1), *others = shares

    def secret(b, c):
        return (y1 - b * x1 - c * x1 * x1) % modulus

    return the_only(
        secret(b, c)
        for b, c in polynomials
        if all((secret(b, c) + b * x + c * x * x - y) % modulus == 0 for x, y in others)
    )


def passing_samples(total, percent):
    alpha = percent / 100
    limit = 1 - alpha - 3 * sqrt(alpha * (1 - alpha) / total)
    return next(count for count in range(total + 1) if count >= total * limit)


def key_days(rate, base, exponent):
    return f"{base**exponent / rate / 86400:.2f}"


def lwe_bit(q, s1, s2, s3, u1, u2, u3, v, half):
    assert half == q // 2
    rest = (v - s1 * u1 - s2 * u2 - s3 * u3) % q
    noise = {bit: (rest - bit * half + q // 2) % q - q // 2 for bit in (0, 1)}
    bit = min(noise, key=lambda b: abs(noise[b]))
    return bit, noise[bit]


def two_time_pad(c1, c2):
    return f"{c1 ^ c2 ^ int.from_bytes(b'SM4'):06x}"


def sm2_nonce_reuse(n, *flat):
    signatures = list(zip(flat[::2], flat[1::2], strict=True))
    found = keys_of_shared_nonce(
        n, signatures, lambda k, d, r, s: (s * (1 + d) - k + r * d) % n == 0
    )
    return the_only(found)[1]


def common_modulus(n, e1, e2, c1, c2):
    return the_only(m for m in range(n) if pow(m, e1, n) == c1 and pow(m, e2, n) == c2)


def faulty_signature(n, e, m, wrong):
    factors = prime_factors(n)
    right = [p for p in factors if (pow(wrong, e, p) - m) % p == 0]
    return the_only(right)


def inverse(x, modulus):
    return the_only(y for y in range(modulus) if x * y % modulus == 1)


def power(base, exponent, modulus):
    return base**exponent % modulus


def affine_plaintext(a, b, modulus, *cipher):
    table = {(a * x + b) % modulus: x for x in range(modulus)}
    return tuple(table[y] for y in cipher)


def rsa_encrypted(n, e, m):
    return m**e % n


def remainders(*flat):
    wanted = list(zip(flat[::2], flat[1::2], strict=True))
    return next(x for x in range(1, 10**6) if all(x % m == r for r, m in wanted))


def point_sum(a, b, p, x1, y1, x2, y2):
    for x, y in ((x1, y1), (x2, y2)):
        assert (y * y - x**3 - a * x - b) % p == 0
    return curve_sum((x1, y1), (x2, y2), a, p)


def mixed_column(b0, b1, b2, b3):
    return f"0x{gf256(2, b0) ^ gf256(3, b1) ^ b2 ^ b3:02x}"


def register_output(degree, tap, start):
    bits = [int(bit) for bit in f"{start:04d}"]
    state, period = tuple(bits), 0
    while period == 0 or state != tuple(bits[:degree]):
        bits.append(bits[-degree + tap] ^ bits[-degree])
        state, period = tuple(bits[-degree:]), period + 1
    return "".join(map(str, bits[:15])), period


def fermat_factors(n):
    return prime_factors(n)


def point_multiple(a, b, p, x, y, k):
    assert (y * y - x**3 - a * x - b) % p == 0
    return multiple(k, (x, y), a, p)


def ecdsa_signature(a, b, p, gx, gy, n, d, k, e, x1, y1):
    base = (gx, gy)
    checked_base(a, b, p, base, n)
    assert multiple(k, base, a, p) == (x1, y1)
    r = x1 % n
    s = the_only(s for s in range(1, n) if k * s % n == (e + d * r) % n)
    public = multiple(d, base, a, p)
    u1, u2 = (pow(s, -1, n) * value % n for value in (e, r))
    assert curve_sum(multiple(u1, base, a, p), multiple(u2, public, a, p), a, p)[0] % n == r
    return r, s


def ecdsa_nonce_reuse(n, e1, e2, r1, s1, r2, s2):
    signatures = ((e1, r1, s1), (e2, r2, s2))
    found = keys_of_shared_nonce(n, signatures, lambda k, d, e, r, s: (k * s - e - d * r) % n == 0)
    return the_only(found)


def discrete_log(base, value, modulus):
    return next(x for x in range(modulus) if pow(base, x, modulus) == value)


def miller_rabin(n, a, *exponents):
    assert n - 1 == 2 * exponents[-1] and exponents[0] % 2 == 1
    powers = tuple(pow(a, exponent, n) for exponent in exponents)
    assert powers[0] != 1 and n - 1 not in powers, "the answer says: composite"
    return powers


def wiener(n, e):
    p, q = sorted(prime_factors(n), reverse=True)
    phi = (p - 1) * (q - 1)
    return the_only(d for d in range(phi) if e * d % phi == 1), p, q


def pohlig_hellman(g, modulus, value):
    assert len({pow(g, i, modulus) for i in range(modulus - 1)}) == modulus - 1
    return discrete_log(g, value, modulus)


def shortest_register(stream):
    """Every recurrence of every length is tried, shortest first, and the one that fits is run."""
    bits = [int(bit) for bit in str(stream)]
    for length in range(1, len(bits) // 2):
        for taps in product((0, 1), repeat=length):
            made = bits[:length]
            while len(made) < len(bits) + 6:
                past = made[: -length - 1 : -1]
                made.append(sum(t & b for t, b in zip(taps, past, strict=True)) % 2)
            if made[: len(bits)] == bits:
                return length, "".join(map(str, made[-6:]))
    return None


def counting_nonce(n, e1, r1, s1, e2, r2, s2):
    pairs = product(range(1, n), repeat=2)
    return the_only(
        d
        for k, d in pairs
        if (s1 * k - e1 - r1 * d) % n == 0 and (s2 * (k + 1) - e2 - r2 * d) % n == 0
    )


def related_messages(n, e, c1, c2):
    return the_only(m for m in range(n) if pow(m, e, n) == c1 and pow(m + 1, e, n) == c2)


TUPLE = r"\((\d+),\s?(\d+)\)"
CURVE = r"y²=x³\+(\d+)x\+(\d+)（模 (\d+)"
HEX = r"([0-9a-f]+)"
# question number: (pattern over the question, base of its numbers, function)
CALCULATIONS: dict[int, tuple[str, int, Callable]] = {
    7: (rf"0x{HEX}\D.*?\{{{HEX}\}}·\{{{HEX}\}}", 16, aes_product),
    8: (r"k=(\d+).*?IV=(\d+).*?明文 (\d+) (\d+) (\d+)", 2, cbc_ciphertext),
    14: (r"试验 (10)\^(\d+) 个密钥。穷举 (\d+) 比特", 10, key_search_hours),
    22: (r"长度为 (\d+) 比特.*?末尾的 (\d+) 比特长度", 10, hash_padding),
    27: (r"密钥 (\d+) 字节、消息 (\d+) 字节", 10, glue_padding),
    28: (r"截断为 (\d+) 比特", 10, birthday_files),
    29: (
        r"口令为 (\d+) 位.*?取自 (\d+) 个.*?迭代 (\d+) 次.*?可做 (10)\^(\d+) 次",
        10,
        password_days,
    ),
    31: (r"有 (2)\^(\d+) 个叶子", 10, merkle_proof),
    39: (r"p=(\d+)、q=(\d+)、e=(\d+)", 10, rsa_key),
    40: (r"p=(\d+)、q=(\d+)、e=(\d+)，密文 c=(\d+)", 10, rsa_decrypted),
    43: (r"p=(\d+)、g=(\d+).*?a=(\d+).*?b=(\d+)", 10, diffie_hellman),
    44: (r"p=(\d+).*?g=(\d+).*?x=(\d+).*?k=(\d+).*?m=(\d+)", 10, elgamal),
    45: (
        rf"{CURVE}，基点 G={TUPLE}，阶 n=(\d+).*?d=(\d+).*?k=(\d+).*?e=(\d+).*?kG={TUPLE}",
        10,
        sm2_like,
    ),
    48: (r"e=(\d+) 的.*?模数为 (\d+)、(\d+)、(\d+)，密文依次为 (\d+)、(\d+)、(\d+)", 10, broadcast),
    56: (rf"为 {HEX}，记录序号为 (\d+)", 0, tls_nonce),
    72: (r"P\(1\)=0\.(\d+).*?至少 (\d+) 比特", 10, raw_bits),
    73: (rf"\((\d+),(\d+)\) 门限方案，模数 (\d+)。.*?{TUPLE}、{TUPLE}、{TUPLE}", 10, shamir_secret),
    77: (r"取 (\d+) 个样本.*?α=0\.(\d+)", 10, passing_samples),
    78: (r"每秒加密 (\d+) 条.*?最多加密 (2)\^(\d+) 条", 10, key_days),
    87: (
        r"q=(\d+)，私钥 s=\((\d+),(\d+),(\d+)\)，密文 u=\((\d+),(\d+),(\d+)\)、v=(\d+)，.*?=(\d+)",
        10,
        lwe_bit,
    ),
    89: (rf"c1={HEX}，c2={HEX}.*?ASCII 字符串 \"SM4\"", 16, two_time_pad),
    90: (rf"n=(\d+)。.*?={TUPLE}、\(r2,s2\)={TUPLE}", 10, sm2_nonce_reuse),
    91: (r"n=(\d+)、.*?e1=(\d+)、e2=(\d+).*?c1=(\d+)、c2=(\d+)", 10, common_modulus),
    92: (r"n=(\d+)、e=(\d+)，对 m=(\d+) .*?s'=(\d+)", 10, faulty_signature),
    100: (r"求 (\d+) 模 (\d+)", 10, inverse),
    101: (r"计算 (\d+)\^(\d+) mod (\d+)", 10, power),
    102: (r"\((\d+)x\+(\d+)\) mod (\d+).*?数字 \((\d+), (\d+), (\d+)\)", 10, affine_plaintext),
    103: (r"n=(\d+)、e=(\d+)，对明文 m=(\d+)", 10, rsa_encrypted),
    104: ("、".join([r"x≡(\d+) \(mod (\d+)\)"] * 3), 10, remainders),
    105: (rf"{CURVE}）上，计算 P={TUPLE} 与 Q={TUPLE}", 10, point_sum),
    106: (rf"为 {HEX}、{HEX}、{HEX}、{HEX}", 16, mixed_column),
    107: (r"s_\{n\+(\d)\}=s_\{n\+(\d)\}⊕s_n.*?=(\d+)。", 10, register_output),
    108: (r"n=(\d+)", 10, fermat_factors),
    109: (rf"{CURVE}）上，G={TUPLE}，求 (\d+)G", 10, point_multiple),
    110: (
        rf"{CURVE}），G={TUPLE}，阶 n=(\d+)，私钥 d=(\d+)，.*?k=(\d+)，.*?e=(\d+)，已知 kG={TUPLE}",
        10,
        ecdsa_signature,
    ),
    111: (rf"n=(\d+)）对 e1=(\d+) 和 e2=(\d+) .*?{TUPLE} 和 {TUPLE}", 10, ecdsa_nonce_reuse),
    112: (r"(\d+)\^x ≡ (\d+) \(mod (\d+)\)", 10, discrete_log),
    113: (r"n=(\d+) 以 a=(\d+) .*?a\^(\d+)、a\^(\d+)、a\^(\d+)、a\^(\d+)", 10, miller_rabin),
    114: (r"n=(\d+)、e=(\d+)", 10, wiener),
    115: (r"(\d+) 是模 (\d+) 的原根.*?≡ (\d+)", 10, pohlig_hellman),
    116: (r"密钥流 (\d+)", 10, shortest_register),
    117: (rf"n=(\d+)）.*?e1=(\d+) 的签名为 {TUPLE}，e2=(\d+) 的签名为 {TUPLE}", 10, counting_nonce),
    118: (r"n=(\d+)、e=(\d+) .*?c1=(\d+)、c2=(\d+)", 10, related_messages),
}


def written(value: object) -> str:
    return "(" + ", ".join(map(str, value)) + ")" if isinstance(value, tuple) else str(value)


def parameters(question: str, pattern: str, base: int) -> list[int]:
    match = re.search(pattern, question)
    assert match, f"{pattern} does not match {question}"
    if base == 0:  # a hexadecimal number, then a decimal one
        return [int(match[1], 16), int(match[2])]
    return [int(group, base) for group in match.groups()]


def test_final_number_is_what_the_question_gives(subtests):
    for number in sorted(CALCULATIONS):
        with subtests.test(number=number):
            pattern, base, function = CALCULATIONS[number]
            question = NUMBERED[number]
            final = BY_QUESTION[question].answer.rsplit("\n", 1)[-1]
            assert final == FINAL + written(function(*parameters(question, pattern, base)))


def test_every_calculation_is_recomputed():
    stating = {n for n, question in NUMBERED.items() if FINAL in BY_QUESTION[question].answer}
    assert stating == set(CALCULATIONS)
    assert len(stating) >= 16
    for sample in SAMPLES:
        assert sample.answer.count(FINAL) <= 1
        assert FINAL not in sample.thinking


def test_published_constants_that_the_helpers_must_reproduce():
    """Known values: {57}·{83}={c1}, and 2·d4 ⊕ 3·bf ⊕ 5d ⊕ 30 = 04 of FIPS 197's worked example."""
    assert aes_product(0x11B, 0x57, 0x83) == "0xc1"
    assert mixed_column(0xD4, 0xBF, 0x5D, 0x30) == "0x04"
    assert hash_padding(24, 64) == (423, 1)  # the message "abc"


def test_enough_samples_with_unique_numbers():
    written_numbers = [n for path in FILES for n in numbered(path)]
    headings = sum(path.read_text(encoding="utf-8").count("\n### ") for path in FILES)
    assert len(SAMPLES) == len(written_numbers) == headings >= 90
    assert sorted(written_numbers) == list(range(1, len(SAMPLES) + 1))
    assert set(BY_QUESTION) == set(NUMBERED.values())
    assert len(BY_QUESTION) == len(SAMPLES)


def test_nothing_is_broken_or_remarked():
    found = read_samples([str(RAW)])
    assert found.broken == ()
    assert found.remarks == ()
    assert len(found.samples_per_file) == len(FILES) == 7


def test_file_is_clean_utf8_with_balanced_tags(subtests):
    for path in FILES:
        with subtests.test(path=path):
            content = path.read_bytes()
            text = content.decode("utf-8")
            assert not text.startswith("\ufeff")
            assert text.endswith("\n") and not text.endswith("\n\n")
            assert "\r" not in text and "\t" not in text and "\ufffd" not in text
            assert not [line for line in text.splitlines() if line != line.rstrip()]
            tags = re.findall(r"^</?thinking>$", text, re.MULTILINE)
            count = len(numbered(path))
            assert tags == ["<thinking>", "</thinking>"] * count
            assert len(re.findall(r"</?think", text)) == 2 * count
            answers = [int(n) for n in re.findall(r"^A(\d+): ", text, re.MULTILINE)]
            assert answers == list(numbered(path))


def test_four_levels_are_all_well_filled():
    levels = Counter(sample.difficulty for sample in SAMPLES)
    assert set(levels) == {1, 2, 3, 4}
    assert min(levels.values()) >= 15


def test_every_sample_thinks_and_answers_at_length():
    for sample in SAMPLES:
        assert 100 <= len(sample.thinking) <= 1000, sample.question
        assert 80 <= len(sample.answer) <= 650, sample.question
        assert not re.search(r"需要从以下|以下几个角度", sample.thinking), sample.question


def test_topic_occurs(subtests):
    for topic in TOPICS:
        with subtests.test(topic=topic):
            assert any(topic in sample.question + sample.answer for sample in SAMPLES)


def grams(text: str, size: int) -> set[str]:
    text = "".join(text.split())
    return {text[i : i + size] for i in range(len(text) - size + 1)}


def test_thinking_is_not_the_answer_in_advance():
    def share(sample: Sample) -> float:
        answer = grams(sample.answer, 8)
        return len(answer & grams(sample.thinking, 8)) / len(answer)

    assert max(map(share, SAMPLES)) < 0.6


@pytest.mark.parametrize(("part", "limit"), [("question", 0.5), ("answer", 0.3), ("thinking", 0.3)])
def test_no_two_samples_are_near_copies(part, limit):
    shingles = {sample.question: grams(getattr(sample, part), 4) for sample in SAMPLES}
    for (one, first), (other, second) in combinations(shingles.items(), 2):
        assert len(first & second) < limit * len(first | second), f"{one} / {other}"


def test_cited_standards_have_the_subject_they_are_cited_for():
    for sample in SAMPLES:
        assert not citation_conflicts(sample.question + sample.answer), sample.question
