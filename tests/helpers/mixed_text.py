"""Is a text half in one language and half in another?"""

from finetuning.common.language import CHINESE, FRAMES, NO_PROSE, in_chinese, is_prose


def is_mixed(line: str) -> bool:
    """Whether a line is half in Chinese and half in English: the fault that a whole translation excludes."""
    for frame in FRAMES:
        line = line.removeprefix(in_chinese(f"{frame}X").removesuffix("X"))
    return bool(CHINESE.search(NO_PROSE.sub("|", line))) and is_prose(line)
