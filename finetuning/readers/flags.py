"""What a record or a turn says about itself: that it is wrong, weighs nothing, or shows a picture."""

import re
from typing import Any

from finetuning.readers.fields import Fields
from finetuning.readers.names import meaning, word_set, words
from finetuning.readers.sample import BrokenRecordError, LeftOutError
from finetuning.readers.values import shown

_MEDIA = word_set("media image images img imgs picture pictures photo audio audios video videos")
_MEDIA_CHINESE = ("图片", "图像", "音频", "视频", "配图")
_MEDIA_FORM = word_set("path paths url urls file files bytes base64 data list")
_RIGHT = word_set(
    "correct correctness label passed good valid right usable accepted desirable kto ok okay"
)
_CHECKED = word_set("verified reviewed checked approved")
_WRONG = word_set(
    "incorrect wrong deleted discarded cancelled canceled rejected bad invalid skip skipped exclude excluded "
    "ignore ignored discard drop dropped disabled hallucination hallucinated"
)
_WRONG_CHINESE = re.compile(
    "(?:是否|已|被|标记)*(?:跳过|排除|禁用|停用|有误|有错|错误|作废|废弃|删除|忽略|幻觉)(?:标记)?"
)
_RIGHT_CHINESE = ("正确", "对错", "合格", "可用", "有效", "采纳", "采用", "通过")
_STATE = word_set(
    "status state review verdict result verify verification judge judgement judgment feedback outcome vote"
)
_STATE_CHINESE = ("状态", "审核", "复核", "质检", "评判", "判定", "反馈")
# A name with one of these asks whether there is a verdict, not which: a false of it refuses nothing.
_OPEN = word_set("need needs needed has have require requires required pending under use")
_OPEN_CHINESE = re.compile("待|需|有无|是否有|已有")
_REFUSED = word_set(
    "discarded rejected reject invalid deleted wrong incorrect fail failed dislike disliked bad downvote "
    "驳回 不通过 未通过 不合格 已删除 废弃 作废 错误 差评 踩 点踩 不正确 不采纳"
)
_NO = word_set("false no n 0 否 错 错误 不正确 不合格 incorrect wrong failed fail")
_FALSE = word_set("false")
_YES = word_set("true yes y 1 是")
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
_WEIGHTS = {"weight", "loss weight", "sample weight", "权重", "样本权重"}


def _word(value: Any) -> str:
    """A flag's value as a word; a number as it is written shortest."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip().casefold() if isinstance(value, (bool, int, float, str)) else ""


def _flag(name: str) -> str:
    """media, right, checked, wrong, state, weight, split or training: what a column says of its record."""
    found = words(name)
    latin, chinese = {w for w in found if w.isascii()}, "".join(w for w in found if not w.isascii())
    joined = " ".join(found)
    if joined in _WEIGHTS:
        return "weight"
    if _SPLIT & set(found) and set(found) <= _SPLIT | _SPLIT_BESIDE:
        return "split"
    media = _MEDIA & latin or any(word in chinese for word in _MEDIA_CHINESE)
    if media and latin <= _MEDIA | _MEDIA_FORM:
        return "media"
    for kind, signs in (
        ("wrong", _WRONG),
        ("right", _RIGHT),
        ("checked", _CHECKED),
        ("state", _STATE),
    ):
        if signs & latin:
            return kind
    if _WRONG_CHINESE.fullmatch(chinese):
        return "wrong"
    if any(word in chinese for word in _STATE_CHINESE):
        return "state"
    if joined not in _LOSS_ALONE and _is_loss(name):
        return "training"
    return "right" if any(word in chinese for word in _RIGHT_CHINESE) else ""


def says_no(value: Any) -> bool:
    """Whether a value that nothing heeds may say that its record is not to be learnt."""
    return value is False or (isinstance(value, str) and _word(value) in _REFUSED | _FALSE)


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
        elif value is True or _denies_trouble(flag, name, value):
            fields.take(name)  # it says yes; any other false stays, and is told


def _heed_media(fields: Fields, name: str, value: Any) -> None:
    if _word(value) in _NO or isinstance(value, (bool, int, float)):
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
    if flag == "state":
        no = _REFUSED | _NO if "是否" in name else _REFUSED | _FALSE
        return _word(value) in (_REFUSED if _asks(name) else no) and not text
    if flag == "training":
        if _is_inverse(name):
            return _word(value) in _YES
        measure = "loss" in words(name) and set(words(name)) <= _MEASURE
        return _word(value) in (_NO - {"0"} if measure else _NO)
    if flag == "wrong":
        return _word(value) in _YES and not text
    if text or ("label" in words(name) and not isinstance(value, bool)):
        return not text and _word(value) in _BAD_LABELS
    return _word(value) in _NO


def _denies_trouble(flag: str, name: str, value: Any) -> bool:
    """Whether it says that nothing is wrong: deleted, no_train or a like flag that is false."""
    return _word(value) in _NO and (flag == "wrong" or (flag == "training" and _is_inverse(name)))


def _asks(name: str) -> bool:
    """Whether a state is still to be told: needs_review, 待审核."""
    found = words(name)
    return bool(_OPEN & set(found) or _OPEN_CHINESE.search("".join(found)))


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
