"""What a record or a turn says about itself: that it is wrong, weighs nothing, or shows a picture."""

import re
from typing import Any

from finetuning.readers.fields import Fields
from finetuning.readers.names import meaning, word_set, words
from finetuning.readers.sample import BrokenRecordError, LeftOutError
from finetuning.readers.values import shown
from finetuning.readers.verdicts import asks, asks_for_verdict, is_of_record, name_polarity, refuses

_MEDIA = word_set("media image images img imgs picture pictures photo audio audios video videos")
_MEDIA_CHINESE = ("图片", "图像", "音频", "视频", "配图")
_MEDIA_FORM = word_set("path paths url urls file files bytes base64 data list")
_RIGHT = word_set(
    "correct correctness label passed good valid right usable accepted acceptable desirable accurate "
    "reliable satisfactory satisfied satisfies meets kto ok okay"
)
_CHECKED = word_set("verified reviewed checked approved")
_WRONG = word_set(
    "incorrect wrong deleted discarded cancelled canceled rejected bad invalid skip skipped exclude excluded "
    "ignore ignored discard drop dropped disabled hallucination hallucinated"
)
_TROUBLE = word_set("error errors issue issues mistake mistakes problem problems")
_REPAIR = word_set("fix fixes fixing correction corrections rework rewrite rewriting")
_HAS, _NEEDS = word_set("has have contains contain"), word_set("need needs needed require requires")
_STATE = word_set(
    "status state review verdict result verify verification judge judgement judgment feedback outcome vote"
)
_STATE_CHINESE = ("状态", "审核", "复核", "质检", "评判", "判定", "反馈")
_OUTCOME, _OUTCOME_CHINESE = word_set("verdict result outcome"), re.compile("结果|结论")
# A name with one of these asks whether there is a verdict, not which: a false of it refuses nothing.
_OPEN = word_set("need needs needed has have require requires required pending under use")
_REFUSED = word_set(
    "discarded rejected reject invalid deleted wrong incorrect fail failed dislike disliked bad downvote "
    "驳回 不通过 未通过 不合格 已删除 废弃 作废 错误 差评 踩 点踩 不正确 不采纳 拒绝"
)
_NO = word_set(
    "false no n 0 否 不 不是 错 不对 错误 不正确 不合格 × ✗ ✘ ❌ incorrect wrong failed fail"
)
_NONE = word_set("无 没有")
_FALSE = word_set("false")
_YES = word_set("true yes y 1 是 有 存在 对 √ ✓ ✔ ✅")
_OF_ANYTHING = word_set("0 1 有 存在")  # no answers where the name asks nothing
_VERDICTS = ("right", "checked", "state")
_LOSS = word_set("loss weight train trainable learn supervise supervised trained training")
_LOSS_BESIDE = word_set(
    "loss is weight scale mask turn this compute calculate on need needs do token tokens use used for in to"
)
_LOSS_CHINESE = word_set(
    "损失 权重 是否训练 训练 是否学习 可训练 参与训练 是否参与训练 用于训练 是否用于训练"
)
_LOSS_ALONE = {
    "mask",
    "loss",
    "损失",
    "权重",
    "training",
    "trained",
}  # of a record: a measure, or a name of a run
_MEASURE = word_set("loss train training trained")  # with a number: what a run has measured
_NO_LOSS = {
    "no train",
    "do not train",
    "exclude",
    "ignore",
    "ignore loss",
    "no loss",
    "masked",
    "mask out",
    "skip loss",
    "ignored",
}
_BAD_LABELS = word_set("false bad undesirable negative rejected incorrect wrong 错误")
_SPLIT = word_set(
    "split splits subset partition fold 划分 数据划分 数据集划分 拆分 子集 数据子集 集合"
)
_SPLIT_BESIDE = word_set("data dataset set of 数据 数据集 所属")
_FOR_TESTS = word_set(
    "test testing validation valid val dev eval evaluation holdout "
    "测试 测试集 验证 验证集 评测 评测集 评估 评估集"
)
_NUMBER = re.compile(r"\d{1,3}\.\d{1,6}")
_WITH_REASON = re.compile(r"([是否])[，,。.；;：:（(、\s]")
_WEIGHTS = {"weight", "loss weight", "sample weight", "权重", "样本权重"}


def _word(value: Any) -> str:
    """A flag's value as a word; a number as it is written shortest, 否 where a reason stands behind it."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    elif isinstance(value, str) and (answer := _WITH_REASON.match(value.lstrip())):
        value = answer[1]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip().casefold() if isinstance(value, (bool, int, float, str)) else ""


def _flag(name: str) -> str:
    """media, right, checked, wrong, state, weight, split or training: what a column says of its record."""
    found = words(name)
    latin, chinese = {w for w in found if w.isascii()}, _chinese(name)
    joined = " ".join(found)
    if joined in _WEIGHTS:
        return "weight"
    if _SPLIT & set(found) and set(found) <= _SPLIT | _SPLIT_BESIDE:
        return "split"
    media = _MEDIA & latin or any(word in chinese for word in _MEDIA_CHINESE)
    if media and latin <= _MEDIA | _MEDIA_FORM:
        return "media"
    if _says_trouble(latin):
        return "wrong"
    for kind, signs in (
        ("wrong", _WRONG),
        ("right", _RIGHT),
        ("checked", _CHECKED),
        ("state", _STATE),
    ):
        if signs & latin:
            return kind
    speaks_for = name_polarity(chinese)
    if speaks_for is not None:
        return "right" if speaks_for else "wrong"
    if any(word in chinese for word in _STATE_CHINESE):
        return "state"
    return "training" if joined not in _LOSS_ALONE and _is_loss(name) else ""


def _chinese(name: str) -> str:
    return "".join(word for word in words(name) if not word.isascii())


def _says_trouble(latin: set[str]) -> bool:
    """has_errors, needs_fix; has_problem_statement is no trouble."""
    has = latin & _TROUBLE and latin & _HAS and latin <= _TROUBLE | _HAS
    return bool(has or (latin & _REPAIR and latin & _NEEDS and latin <= _REPAIR | _NEEDS))


def may_refuse(name: str, value: Any) -> bool:
    """Whether a value that nothing heeds may say that its record is not to be learnt: a yes or a no whose
    question is not understood, or a word that refuses."""
    if not isinstance(value, str):
        return isinstance(value, bool)
    said, asked = _word(value), asks(name)
    if said in _YES | _NO:
        return asked or said not in _OF_ANYTHING
    return said in _REFUSED or (asked and said in _NONE) or refuses(said)


def heed_flags(fields: Fields) -> None:
    """Take the flags of a record. Raises LeftOutError where it says that it is not to be learnt, and
    BrokenRecordError where it is about a picture or a sound."""
    for name, value in fields.flags(_flag):
        flag = _flag(name)
        if flag == "media":
            _heed_media(fields, name, value)
        elif flag == "weight":
            _heed_weight(fields, name, value)
        elif flag == "split":
            _heed_split(fields, name, value)
        elif _says_no(flag, name, value):
            _say_no(fields, flag, name, value)
        elif _says_yes(flag, name, value):
            fields.take(name)  # it says yes; any other false stays, and is told


def _heed_media(fields: Fields, name: str, value: Any) -> None:
    if _word(value) in _NO | _NONE or isinstance(value, (bool, int, float)):
        fields.take(name)  # whether there is one, or how many
        return
    raise BrokenRecordError(
        f"column {name} holds pictures or sounds ({shown(value)}), which a text model can't see"
    )


def _heed_weight(fields: Fields, name: str, value: Any) -> None:
    if not _word(value):
        return
    fields.take(name)
    if _word(value) == "0":
        raise LeftOutError(f"its {name} is 0")
    if _word(value) != "1":
        fields.remark(f"{name} other than 1 is not heeded; --data-weights weighs whole files")


def _heed_split(fields: Fields, name: str, value: Any) -> None:
    """Tell it only: a file of such records may be meant for them, as one of `--eval-path` is."""
    if _word(value) in _FOR_TESTS:
        fields.take(name)
        fields.remark(f"its {name} is {_word(value)}; it is read all the same")


def _say_no(fields: Fields, flag: str, name: str, value: Any) -> None:
    fields.take(name)
    if flag == "checked":
        fields.remark(f"{name} is {_word(value)}; the record is trained like the others")
        return
    raise LeftOutError(f"its {name} is {_word(value) or 'false'}")


def _says_no(flag: str, name: str, value: Any) -> bool:
    """Whether a flag's value speaks against the record. Texts that merely look so (an answer “wrong”,
    a label 0 of a classification) are none."""
    if isinstance(value, list):  # one verdict for each of several answers
        return flag == "right" and bool(value) and all(item is False for item in value)
    text = isinstance(value, str) and meaning(name) is not None
    said = _word(value)
    if flag == "state":
        return not text and _state_refuses(name, said)
    if flag == "training":
        if _is_inverse(name):
            return _word(value) in _YES
        measure = "loss" in words(name) and set(words(name)) <= _MEASURE
        return _word(value) in (_NO - {"0"} if measure else _NO)
    if flag == "wrong":
        return not text and (said in _YES or _refuses(name, said))
    if text or ("label" in words(name) and not isinstance(value, bool)):
        return not text and said in _BAD_LABELS
    return said in _NO or _refuses(name, said)


def _refuses(name: str, said: str) -> bool:
    """Whether a word that is no plain no refuses the record that it is said of."""
    return refuses(said) and is_of_record(_chinese(name))


def _state_refuses(name: str, said: str) -> bool:
    if said in _REFUSED or _refuses(name, said):
        return True
    if _asks(name):
        return False
    chinese = _chinese(name)
    outcome = bool(_OUTCOME.intersection(words(name)) or _OUTCOME_CHINESE.search(chinese))
    return said in (_NO - {"0"} if outcome or asks(chinese) else _FALSE)


def _says_yes(flag: str, name: str, value: Any) -> bool:
    """Whether a flag speaks for the record: one of right is true, or one such as deleted is false."""
    if flag == "wrong" or (flag == "training" and _is_inverse(name)):
        return _word(value) in _NO | _NONE
    return value is True or (flag in _VERDICTS and isinstance(value, str) and _word(value) in _YES)


def _asks(name: str) -> bool:
    """Whether a state is still to be told: needs_review, 待审核."""
    return bool(_OPEN.intersection(words(name))) or asks_for_verdict(_chinese(name))


def _is_inverse(name: str) -> bool:
    """Whether a flag of the loss says yes for a record or turn that is not to be learnt."""
    return " ".join(words(name)) in _NO_LOSS


def _is_loss(name: str) -> bool:
    found = words(name)
    joined = " ".join(found)
    return (
        joined in _NO_LOSS
        or joined == "mask"
        or joined in _LOSS_CHINESE
        or (bool(_LOSS & set(found)) and set(found) <= _LOSS | _LOSS_BESIDE)
    )


def carries_no_loss(fields: Fields) -> str:
    """Take the flags of a turn; which one says that the turn is not to be learnt, '' for none."""
    said = ""
    for name, value in fields.flags(_is_loss):
        if not _word(value):
            continue
        fields.take(name)
        if words(name) == ("mask",):
            told = (
                "mask of a turn may mean either way and is not heeded; loss: true or false says it"
            )
            fields.remark(told)
            continue
        inverse = _is_inverse(name)
        if _word(value) in (_YES if inverse else _NO):
            said = f"{name} {_word(value)}"
        elif not inverse and _word(value) not in _YES:
            fields.remark(f"{name} of a turn other than 0 or 1 is read as 1")
    return said
