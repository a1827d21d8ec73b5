"""Ways to write the same number or formula become one: what a reader takes for the same is spelled the same.

What means something else stays apart: an exponent is no digit (2¹²⁸ is not 2128), a comma that separates is
no comma of thousands, `x1` is not `×1`, and a character of private use, of which nobody knows the meaning,
is only itself.
"""

import re
import unicodedata
from decimal import Decimal

_LOOKS = "left right big Big bigl bigr displaystyle limits mathrm mathbf mathbb mathit mathsf mathcal text"
_COMMANDS = {  # of LaTeX
    **{"times": "×", "cdot": "×", "ast": "×", "oplus": "⊕", "otimes": "⊗", "equiv": "≡", "ne": "≠"},
    **{"neq": "≠", "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "lt": "<", "gt": ">", "in": "∈"},
    **{"mid": "|", "vert": "|", "parallel": "‖", "Vert": "‖", "pm": "±", "to": "→", "prime": "'"},
    **{"bmod": "%", "mod": "%", "pmod": "%", "quad": " ", "qquad": " ", "operatorname": ""},
    **dict.fromkeys(_LOOKS.split(), ""),
}
_SIGNS = {
    **dict.fromkeys("·⋅∙•∗✕✖⨯", "×"),
    **dict.fromkeys("’‘′ʹ", "'"),
    **{
        "`": "",
        "−": "-",
        "∕": "/",
        "÷": "/",
        "∣": "|",
        "∥": "‖",
        "″": "''",
        "，": ", ",
        "。": ". ",
    },
}
_DIGITS = re.compile(r"\d", re.ASCII)
_PAIRS = {"==": "=", ":=": "=", "<=": "≤", ">=": "≥", "!=": "≠", "||": "‖"}
_THOUSANDS = re.compile(
    r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?!\d|,\d)|(?<![\d.])\d{1,3}(?:\u2009\d{3})+(?!\d)"
    r"|(?<![\d,.])(?<!\d )\d{1,3}(?: \d{3})+(?! ?\d)",
    re.ASCII,
)
_VALUE = re.compile(r"-?\d+(?:\.\d+)?", re.ASCII)


def plain(text: str) -> str:
    """The text in one notation. Spaces are kept where they may separate two things."""
    text = re.sub(r"(?<=[０-９])，(?=[０-９]{3}(?![０-９]))", ",", text)
    text = "".join(map(_character, _with_scripts(unicodedata.normalize("NFC", text))))
    text = _without_emphasis(_without_commands(re.sub("[ \\t]+", " ", text)))
    for pair, sign in _PAIRS.items():
        text = text.replace(pair, sign)
    text = re.sub(r"\{([A-Za-z0-9]|\d+)\}(?![A-Za-z0-9])", r"\1", text)
    text = text.replace("{", "(").replace("}", ")")
    text = re.sub(r"\^\((-?\w{1,40})\)(?!\w)", r"^\1", text, flags=re.ASCII)
    text = re.sub(r"(?<=[^\W\d])_(?=\d)", "", text)  # x_1 is x1
    text = re.sub(r"(?<=\d) [xX] (?=\d)", "×", text)  # but 3x1 may be three times x1
    text = re.sub(r"(?<=[A-Za-z0-9)\]]) ?\* ?(?=[A-Za-z0-9(\[])", "×", text)
    return _THOUSANDS.sub(_in_one_piece, text).replace("\u2009", " ")


def number(text: str) -> Decimal | int | None:
    """The value of a number that is written in one piece, exactly; None for anything else."""
    if re.fullmatch(r"0[xX][0-9a-fA-F]+", text):
        return int(text, 16)
    return Decimal(text) if _VALUE.fullmatch(text) else None


def _with_scripts(text: str) -> str:
    """Raised digits become ^ and the digits, lowered ones _ and the digits; NFKC would make plain ones."""
    kinds = [unicodedata.decomposition(c).partition(" ")[0] for c in text]
    found, last = [], ""
    for character, kind in zip(text, kinds, strict=True):
        sign = {"<super>": "^", "<sub>": "_"}.get(kind, "")
        if last and sign != last:
            found.append("}")
        if sign and sign != last:
            found.append(sign + "{")
        found.append(unicodedata.normalize("NFKC", character) if sign else character)
        last = sign
    return "".join(found) + "}" * bool(last)


def _character(character: str) -> str:
    if character in _SIGNS:
        return _SIGNS[character]
    category = unicodedata.category(character)
    if category == "Pd":  # every dash; GB/T 39786—2021 is written with one of them
        return "-"
    if category == "Cf" or "VARIATION SELECTOR" in unicodedata.name(character, ""):
        return ""  # not seen
    if character in "\u00a0\u2009\u202f":
        return "\u2009"  # may separate thousands
    normal = unicodedata.normalize("NFKC", character)
    is_apart = len(normal) > 1 or "<circle>" in unicodedata.decomposition(character)
    if normal != character and is_apart and _DIGITS.search(normal):
        return f" {normal} ".replace("⁄", "/")  # ①, ½ and ⒈ do not belong to the digits beside them
    return _SIGNS.get(normal, normal)


def _without_commands(text: str) -> str:
    """LaTeX's commands become signs, Greek letters included; what only says that there is a formula goes."""
    text = re.sub(r"\\[dt]?frac ?\{([^{}]{0,99})\} ?\{([^{}]{0,99})\}", r"{\1}/{\2}", text)
    text = re.sub(r"\\[,;:!> ]|~", " ", text).replace("\\|", "‖")
    text = re.sub(r"\\([A-Za-z]+)", _command, text)
    text = re.sub(r"\$([^$\n]{1,300})\$|\\\(([^$\n]{1,300}?)\\\)", _without_spaces, text)
    return re.sub(r"\$+|\\[()\[\]]?", " ", text)


def _without_spaces(match: re.Match[str]) -> str:
    """A formula; spaces in it mean nothing but between two names or numbers."""
    inner = match[1] or match[2]
    return f" {re.sub(r'(?<![A-Za-z0-9]) | (?![A-Za-z0-9])', '', inner)} "


def _command(match: re.Match[str]) -> str:
    name = match[1]
    if name in _COMMANDS:
        return _COMMANDS[name]
    size = "CAPITAL" if name[0].isupper() else "SMALL"
    try:
        return unicodedata.lookup(f"GREEK {size} LETTER {name.removeprefix('var').upper()}")
    except KeyError:
        return name


def _without_emphasis(text: str) -> str:
    """Without Markdown's stars; those between a base and an exponent are a power."""
    text = re.sub(r"(?<![A-Za-z0-9)*])\*\*(?=[^\s*])(.{1,99}?)(?<=[^\s*])\*\*", r"\1", text)
    return re.sub(r"(?<=[A-Za-z0-9)]) ?\*\* ?(?=[A-Za-z0-9(])", "^", text).replace("**", "")


def _in_one_piece(match: re.Match[str]) -> str:
    """A number without marks of thousands. (1,234) is a pair; between spaces 128 192 256 may be three
    numbers, but no number begins with a 0."""
    text, start, end = match.string, match.start(), match.end()
    pair = text[max(0, start - 1) : start] + text[end : end + 1] in ("()", "[]")
    several = " " in match[0] and " 0" not in match[0]
    return match[0] if pair or several else re.sub("[, \u2009]", "", match[0])
