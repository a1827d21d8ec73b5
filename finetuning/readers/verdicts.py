"""What Chinese words say of a record, for it or against it, and which names ask for such a word.

Chinese has no blanks: 需 stands in 需求, and 是否有 in 是否有效. So a name is read by its grammar. What it
asks stands behind 是否, whom it asks of in front. A predicate ends the question (审核是否有效), or what is
to be reached does (复核结果是否满足需求), and a negation turns it round (未通过, 无明显错误).
"""

import re

from finetuning.readers.names import ASKING

_GOOD = (
    "正确 准确 有效 可用 合格 无误 通过 采纳 采用 录用 认可 接受 同意 保留 入库 入选 收录 有用 完整 合理 "
    "恰当 对错 无问题 没问题"
)
# So is a system or a certificate as well, which a record may be about.
_CONFORMING = "符合 满足 达标 合规 可信 可靠 规范"
_BAD = (
    "错误 有误 有错 无效 无用 作废 废弃 弃用 剔除 删除 排除 忽略 跳过 禁用 停用 丢弃 驳回 打回 退回 幻觉 "
    "有问题 存在问题"
)
_REVIEWS = (
    "审核 审查 审批 复核 复审 初审 终审 质检 抽检 检查 检验 验收 验证 校验 校对 核验 核对 评审 测试"
)
_REACHED = f"{_REVIEWS} 需求 要求 预期 期望 期待 标准 条件 规范 规定"
_RECORD = (
    f"{_REVIEWS} 数据 样本 记录 条目 内容 问题 题目 问答 回答 答案 回复 解析 思考 过程 推理 标注 代码 质量 "
    "人工 专家 最终 整体 意见 结果 结论 状态"
)
# What may stand behind a predicate without changing it.
_BEHIND = "数据 样本 记录 条目 回答 答案 标记 标志 标识 标签 状态 结果 结论 与否 情况 性 的 了"
_LONGEST = 12  # characters of a value that is a verdict; a longer one is a text


def _one_of(words: str) -> str:
    """Each word once: one that stands twice matches in two ways, and a repeat of it in 2^n."""
    return "(?:" + "|".join(dict.fromkeys(words.split())) + ")"


_NOT = "[不未没无非][^不未没无非]{0,2}?"
_REWORK = "(?:需要?|待|应|须|要)(?:重新)?" + _one_of(
    "修改 修正 更正 改正 返工 返修 重写 重做 重标 完善 补充"
)
_PREDICATE = re.compile(
    f"(?P<no>{_NOT})?(?:(?P<good>{_one_of(_GOOD)})|(?P<conforming>{_one_of(_CONFORMING)})|"
    f"(?P<bad>{_one_of(_BAD)}|{_REWORK})){_one_of(_BEHIND)}*$"
)
_REACHES = re.compile(
    f"{_one_of('已 已经 能 能够 可 可以 完全 基本')}?(?P<no>{_NOT})?{_one_of('符合 满足 达到 通过')}"
    f"[\u4e00-\u9fff]{{0,4}}?{_one_of(_REACHED)}$"
)
# Without a question a name says a trouble in few words; 错误原因 says why.
_STATED = re.compile(f"{_one_of('已 被 标记')}*{_one_of(_BAD)}{_one_of('标记 标志 标识 状态')}?")
_OF_RECORD = re.compile(f"{_one_of(f'{_RECORD} {_GOOD} {_CONFORMING} {_BAD} {_BEHIND} 已 被')}*")
_IS_THERE = re.compile("已?有|需|待|要")
_PENDING = re.compile("待|需")
_VERBS = {"有无": "有", "有没有": "有", "能否": "能", "可否": "可"}


def _parted(name: str) -> tuple[str, str | None]:
    """Of what a name asks, and what; None where it asks nothing."""
    found = list(ASKING.finditer(name))
    if not found:
        return name, None
    last = found[-1]
    return name[: last.start()], _VERBS.get(last[0], "") + name[last.end() :]


def asks(name: str) -> bool:
    """Whether a name is a question."""
    return ASKING.search(name) is not None


def name_polarity(name: str) -> bool | None:
    """Whether a yes below this name speaks for a record; None where the name doesn't say."""
    subject, question = _parted(name)
    if question is None:
        return _stated_polarity(name)
    if found := _REACHES.match(question):
        return not found["no"] if _OF_RECORD.fullmatch(subject) else None
    found = _PREDICATE.search(question)
    if found is None or (found["conforming"] and not _reviewed(subject)):
        return None
    return _speaks_for(found)


def _stated_polarity(name: str) -> bool | None:
    if _STATED.fullmatch(name):
        return False
    found = _PREDICATE.search(name)
    if found is None or (found["conforming"] and not _reviewed(name[: found.start()])):
        return None
    if found["bad"] and not found["no"]:
        return None
    return _speaks_for(found)


def _reviewed(subject: str) -> bool:
    return bool(subject) and _OF_RECORD.fullmatch(subject) is not None


def _speaks_for(found: re.Match) -> bool:
    return (found["bad"] is None) != bool(found["no"])


def refuses(value: str) -> bool:
    """Whether a value by itself speaks against something: 未通过, 不符合要求, 无效."""
    if len(value) > _LONGEST:
        return False
    if found := _REACHES.match(value):
        return bool(found["no"])
    found = _PREDICATE.search(value)
    return found is not None and not _speaks_for(found)


def is_of_record(name: str) -> bool:
    """Whether a verdict below this name is one on the record: that of 证书有效性 is one on a certificate."""
    return _OF_RECORD.fullmatch(_parted(name)[0]) is not None


def asks_for_verdict(name: str) -> bool:
    """Whether a name asks if there is a verdict at all, or is to be one: 是否需要复核, 待审核."""
    question = _parted(name)[1]
    return bool(_PENDING.search(name) if question is None else _IS_THERE.match(question))
