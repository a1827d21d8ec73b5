"""What the name of a column, of a key or of a label says: which part of a sample it holds.

A name is taken to words, whatever its case, separators, width and script: `modelAnswer`, `MODEL-ANSWER`
and `model_answer` are one. Its last telling word decides, as in English and Chinese the head stands last:
`answer_reasoning` and `答案解析` are reasonings, `reasoning_answer` and `参考答案` answers. A name
that is *about* a text (`question_id`, `答案长度`) holds none.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetuning.common.bounds import NAME, NAMES

STRONG, EXPLAINING, NEUTRAL = 100, 200, 300
"""Ranks of names by their words: one means the role, one explains an answer, one says little."""


def word_set(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


# The names of old, in the order in which they are looked for; every one goes before what words say.
_USUAL = {
    "question": "question|instruction|prompt|query|problem|input",
    "answer": "answer|output|response|completion|solution",
    "thinking": "thinking|reasoning|reasoning content|think|cot|complex cot",
    "messages": "messages|conversations|conversation",
    "system": "system",
    "history": "history",
    "tools": "tools",
    "difficulty": "difficulty",
}
# Names that mean something only when they are the whole name.
_WHOLE = {
    "q": "question", "问": "question", "user": "question", "human": "question", "用户": "question",
    "a": "answer", "答": "answer", "解": "answer", "assistant": "answer", "gpt": "answer", "bot": "answer",
    "助手": "answer", "final": "answer", "ground truth": "answer", "developer": "system", "系统": "system",
    "思": "thinking", "想": "thinking", "人设": "system", "角色设定": "system", "chosen": "chosen",
    "rejected": "rejected", "functions": "tools", "工具": "tools", "chat": "messages",
}  # fmt: skip
_ENGLISH = {
    "question": (
        STRONG,
        "question questions instruction prompt query problem ask exercise request inquiry",
    ),
    "answer": (STRONG, "answer answers output response reply completion solution attempt"),
    "thinking": (
        STRONG,
        "thinking think thought thoughts reasoning cot rationale scratchpad monologue "
        "deliberation reflection",
    ),
    "messages": (STRONG, "messages conversations conversation dialog dialogue dialogs turns"),
    "history": (STRONG, "history"),
    "context": (
        STRONG,
        "context contexts passage passages background material materials article evidence",
    ),
    "options": (STRONG, "options choices"),
    "tools": (STRONG, "tools"),
    "chosen": (STRONG, "chosen preferred"),
    "rejected": (STRONG, "rejected dispreferred"),
}
_ENGLISH_EXPLAINING = {
    "thinking": "explanation analysis explain reason justification derivation deduction steps"
}
_ENGLISH_NEUTRAL = {
    "question": "input", "answer": "content generation target",
    "context": "reference references document documents",
}  # fmt: skip
_CHINESE = {
    "question": "问题 题目 提问 提示 题干 问句 疑问 指令 咨询 输入 试题 考题 询问 请求",
    "answer": "答案 回答 回复 答复 解答 输出 应答 响应 回应 作答 解决方案 解决办法 解决方法",
    "thinking": "思考 思路 思维 推理 推导 推断 推演 论证 演算 草稿 独白 解题过程 解答过程 求解过程 计算过程 "
    "解题步骤 解答步骤 求解步骤",
    "messages": "对话 会话 消息 多轮",
    "history": "历史",
    "context": "上下文 背景 材料 参考资料 参考文档 原文",
    "options": "选项 备选项 备选答案 候选答案",
    "difficulty": "难度",
}
_CHINESE_EXPLAINING = {"thinking": "解析 分析 解释 理由 讲解"}
_CHINESE_NEUTRAL = {"answer": "内容 正文", "context": "资料 文档 段落"}
# A name with one of these is about a text, or about the record; it holds no part of the sample.
_ABOUT = word_set(
    "id ids idx index uuid guid no type types kind source src origin length len count num "
    "number n score scores rating grade quality reward rank level lang language languages "
    "url urls uri link links path paths file files filename date time timestamp created "
    "updated tokens token hash md5 sha category categories domain topic topics tag tags "
    "status state version license effort config configs params temperature usage cost "
    "embedding vector split format style generator annotator author reviewer title name "
    "names summary translation image images"
    " from by has is complete completed"
)
_ABOUT_CHINESE = word_set(
    "编号 序号 类型 类别 分类 来源 出处 长度 得分 评分 分数 时间 日期 作者 语言 标签 "
    "状态 链接 数量 字数 个数 次数 模型名 版本 网址 路径 文件名 标题 名称 摘要 图片 图像"
)
ASKING = re.compile("是否|是不是|有没有|有无|能否|可否")
"""A name with one of these asks about a text or a record: it holds no part of the sample."""
_SYSTEM = word_set("system sys prompt message msg instruction instructions content role text")
_SYSTEM_CHINESE = re.compile("系统(?:提示|指令|消息|设定|角色|人设)")
_WRONG = word_set("incorrect wrong false bad rejected negative distractor distractors")
_SURE, _SURE_CHINESE = word_set("correct gold golden reference right"), ("正确", "参考", "标准")
_UNSURE, _UNSURE_CHINESE = word_set("student user predicted"), ("学生", "考生", "学员", "初始")
_WRONG_CHINESE = ("错误答案", "错误回答", "错误回复", "干扰项")
NAMELESS = ", which has no name in the header"
"""What a table's column without a name is called by, behind its place; it is told whatever it holds."""

_SENTENCE = re.compile("[。？！?!；;，]")
_LONGEST = 16  # characters or words of a name; a longer one is a text

# Options have a column each: A, option_b, choice3, 选项D. A single letter is one only beside another.
_OPTION = re.compile(r"(?:(?:option|choice|opt|选项|答案选项) ?)?([a-h]|[1-8])")

# Labels of a text, as they stand in front of a colon; every one is a whole name.
_USUAL_LABELS = {
    "question": "问 问题 题目 提问 题 题干 q question 用户 user human 指令 instruction prompt 输入 客户",
    "answer": "答 答案 回答 回复 答复 解答 参考答案 标准答案 正确答案 解 a answer 助手 assistant 输出 output "
    "response reply",
    "thinking": "思考 思考过程 思维过程 思路 推理 推理过程 推导过程 思维链 解析 分析过程 解题思路 解题过程 "
    "答案解析 thinking reasoning thought cot explanation rationale",
    "system": "系统 系统提示 system 角色设定",
    "context": "材料 背景 上下文 阅读材料 context passage 背景资料",
    "options": "选项 options 备选项",
    "difficulty": "难度 difficulty",
}
LABELS = {name: role for role, text in _USUAL_LABELS.items() for name in text.split()}
"""The role of each usual label."""

# Traditional characters of the words above, and what else is written in two ways.
_SIMPLIFIED = str.maketrans(
    "問題問題答覆復維鏈過釋參標準內輸選項統歷語說導論據難點對話會訊資料檔材應響評測術總結類別編號長時間圖續論詢"
    "請環實體關鍵證書簽驗認協議個數據庫來處將錯誤確絕讀寫導講計師學記錄識別設備輯註備",
    "问题问题答复复维链过释参标准内输选项统历语说导论据难点对话会讯资料档材应响评测术总结类别编号长时间图续论询"
    "请环实体关键证书签验认协议个数据库来处将错误确绝读写导讲计师学记录识别设备辑注备",
)


def words(name: str) -> tuple[str, ...]:
    """Lower-case words of a name: letters, digits and Chinese characters apart, simplified."""
    return _words(name[: NAME.limit])


@functools.lru_cache(maxsize=4096)
def _words(name: str) -> tuple[str, ...]:
    text = unicodedata.normalize("NFKC", name)
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", " ", text)
    found = re.findall(r"[a-z]+|\d+|[\u4e00-\u9fff]+", text.casefold().translate(_SIMPLIFIED))
    return tuple(found)


@dataclass(frozen=True)
class Meaning:
    """The role of a name, and how sure the name is: the lowest rank goes first."""

    role: str
    rank: int


def _by_role(table: Mapping[str, str], rank: int) -> dict[str, Meaning]:
    return {word: Meaning(role, rank) for role, text in table.items() for word in text.split()}


_ENGLISH_WORDS = {
    **_by_role(_ENGLISH_NEUTRAL, NEUTRAL),
    **_by_role(_ENGLISH_EXPLAINING, EXPLAINING),
    **_by_role({role: text for role, (_, text) in _ENGLISH.items()}, STRONG),
}
_CHINESE_WORDS = {**_by_role(_CHINESE_EXPLAINING, EXPLAINING), **_by_role(_CHINESE, STRONG)}
_CHINESE_LITTLE = _by_role(_CHINESE_NEUTRAL, NEUTRAL)
_NAMES = {
    **{name: Meaning(role, 50) for name, role in _WHOLE.items()},
    **{
        name: Meaning(role, rank)
        for role, text in _USUAL.items()
        for rank, name in enumerate(text.split("|"))
    },
}


def meaning(name: str) -> Meaning | None:
    """What a name means, None where it says nothing."""
    return _meaning(name[: NAME.limit])


@functools.lru_cache(maxsize=4096)
def _meaning(name: str) -> Meaning | None:
    found = words(name)
    latin, chinese = [w for w in found if w.isascii()], "".join(w for w in found if not w.isascii())
    whole = " ".join(found)
    if whole in _NAMES:
        return _NAMES[whole]
    if _SENTENCE.search(name) or len(chinese) > _LONGEST or len(latin) > _LONGEST:
        return None
    named = bool({"system", "sys"}.intersection(latin)) and _SYSTEM.issuperset(latin)
    if named or _SYSTEM_CHINESE.search(chinese):
        return Meaning("system", STRONG)
    if _ABOUT.intersection(latin) or any(word in chinese for word in _ABOUT_CHINESE):
        return None
    if ASKING.search(chinese):
        return None
    meant = _by_chinese(chinese) or _by_english(latin)
    if meant and meant.role in ("answer", "thinking", "options"):
        wrong = _WRONG.intersection(latin) or any(word in chinese for word in _WRONG_CHINESE)
        return Meaning("rejected", STRONG) if wrong else _graded(meant, latin, chinese)
    return meant


def _graded(meant: Meaning, latin: list[str], chinese: str) -> Meaning:
    """An answer that is said to be right goes before others, and one of a pupil behind them."""
    if meant.role == "options" and (
        _SURE.intersection(latin) or any(word in chinese for word in _SURE_CHINESE)
    ):
        return Meaning("answer", meant.rank)  # the right one of them
    if meant.role != "answer":
        return meant
    if {"chosen", "preferred"}.intersection(latin):
        return Meaning("chosen", STRONG)
    if _SURE.intersection(latin) or any(word in chinese for word in _SURE_CHINESE):
        return Meaning("answer", meant.rank - 1)
    if _UNSURE.intersection(latin) or any(word in chinese for word in _UNSURE_CHINESE):
        return Meaning("answer", meant.rank + 1)
    return meant


def _by_english(latin: list[str]) -> Meaning | None:
    """The last word that means a role; one that says little only where no other means anything."""
    meant = [_ENGLISH_WORDS[word] for word in latin if word in _ENGLISH_WORDS]
    return next((m for m in reversed(meant) if m.rank < NEUTRAL), meant[-1] if meant else None)


def _by_chinese(text: str) -> Meaning | None:
    for table in (_CHINESE_WORDS, _CHINESE_LITTLE):
        ends = [
            (text.rfind(word) + len(word), len(word), m)
            for word, m in table.items()
            if word in text
        ]
        if ends:
            return max(ends, key=lambda end: end[:2])[2]
    return None


# ---- all names of a record ----------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Which columns of a record hold which part of a sample, the likeliest first."""

    names: tuple[str, ...]
    columns: Mapping[str, tuple[str, ...]]
    explaining: frozenset[str]
    """Columns that explain an answer rather than think: they are the reasoning where nothing else is."""
    meant: frozenset[str] = frozenset()
    """Columns whose name says clearly that they are a part of a sample."""
    _picked: dict[Callable, tuple[str, ...]] = field(default_factory=dict)

    @functools.cached_property
    def has_material(self) -> bool:
        """Whether a question may go on in other columns."""
        roles = {"context", "option", "options", "input"}.intersection(self.columns)
        return bool(roles) or len(self.of("question")) > 1

    @functools.cached_property
    def is_record(self) -> bool:
        """Whether these are the columns of a conversation, or of a question with its answer."""
        roles = self.columns
        return "messages" in roles or (
            "question" in roles and ("answer" in roles or "chosen" in roles)
        )

    def of(self, role: str) -> tuple[str, ...]:
        """Columns of a role."""
        return self.columns.get(role, ())

    def picked(self, sign: Callable[[str], Any]) -> tuple[str, ...]:
        """Columns whose names have a sign: it is looked for once, not in every record."""
        if sign not in self._picked:
            self._picked[sign] = tuple(name for name in self.names if sign(name))
        return self._picked[sign]


def layout(names: tuple[str, ...], chosen: tuple[tuple[str, str], ...] = ()) -> Layout:
    """What each of a record's names is for; `chosen` says (role, name) as the user does, and wins."""
    found = _kept_layout if sum(map(len, names)) <= NAMES.limit else _layout
    return found(names, chosen)


def _layout(names: tuple[str, ...], chosen: tuple[tuple[str, str], ...]) -> Layout:
    ruled = dict(chosen)
    taken = set(ruled.values())
    free = [name for name in names if name not in taken]
    options = _options(free)
    ranked: dict[str, list[tuple[int, str]]] = {}
    explaining, clear = set(), set(taken)
    for name in free:
        meant = Meaning("option", 0) if name in options else meaning(name)
        if name.endswith(NAMELESS):
            meant = None
            clear.add(name)
        if meant and meant.rank < NEUTRAL and meant.role != "difficulty":
            clear.add(name)
        if meant and meant.role not in ruled:
            ranked.setdefault(meant.role, []).append((meant.rank, name))
            if meant.rank == EXPLAINING:
                explaining.add(name)
    columns = {role: tuple(name for _, name in sorted(found)) for role, found in ranked.items()}
    if "messages" not in ruled and ("question" in ruled or "answer" in ruled):
        columns.pop("messages", None)  # the user says that it is no conversation
    columns.update({role: (name,) for role, name in ruled.items()})
    return Layout(names, columns, frozenset(explaining), frozenset(clear))


_kept_layout = functools.lru_cache(maxsize=128)(_layout)


def _options(names: Iterable[str]) -> set[str]:
    """Columns that hold one option each: at least two, and an answer beside them."""
    found = {}
    for name in names:
        joined = " ".join(words(name[:40]))
        if (match := _OPTION.fullmatch(joined)) and not joined.isdigit():
            found[name] = match[1]
    rest = [meaning(name) for name in names if name not in found]
    answered = any(m and m.role == "answer" for m in rest)
    return set(found) if len(set(found.values())) > 1 and answered else set()


def is_record(names: Iterable[str]) -> bool:
    """Whether these names are those of a record: a conversation, or a question with its answer."""
    return layout(tuple(names)).is_record
