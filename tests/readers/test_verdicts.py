"""What a verdict does to its record: left out, told, or silent where it says yes.

uv run pytest tests/readers/test_verdicts.py
"""

import pytest

from finetuning.readers.files import DataFile
from finetuning.readers.findings import Findings
from finetuning.readers.records import record_sample
from finetuning.readers.sample import LeftOutError

LEFT_OUT = """
审核是否有效: 否; 复核结果是否满足需求: 否; 人工复核是否符合预期: 否; 审核是否合规: 否; 数据合规性: 否;
是否可用: 不可用; 有效性标记: 否; 有效数据: 否; 样本有效状态: 无效; 质检结果: 未发现合格; 是否未通过: 是;
是否不完全正确: 是; 审核是否需重新修改: 是; 能否采用: 否; 有无错误: 有; 審核是否有效: 否; 审核结果: N;
verdict: no; review_result: fail; has_errors: yes; needs_fix: true; meets_requirements: no; 未通过: 是;
已作废标记: 是; 是否正确: ×; 审核意见: 不同意; 是否入选: 0; 是否存在明显错误: 是; 是否需要返工: 需要返工;
无错误: 否
"""
TOLD = """
是否合规: 否; 系统是否满足要求: 否; 系统合规性: 否; 判定结果: 不符合; 证书状态: 无效; 是否重复: 是; 审核: 否;
是否需要复核: 否; 无效说明: 是; 错误原因: 是; 常见错误: 是; 是否达到最大长度: 否; has_problem_statement: true;
review: no; is_translated: true; 是否解释错误选项: 是
"""
SILENT = """
审核是否有效: 是; 是否正确: 对; 有无错误: 无; 是否需要返工: 否; 是否未通过: 否; 未通过: 否; has_errors: false;
审核结果: 通过; 通过率: 0; 备注: 无; 质检结果: 无错误; 审核: 未审核
"""


def listed(text: str) -> list[tuple[str, ...]]:
    return [tuple(pair.strip().split(": ")) for pair in text.split(";")]


def outcome(name: str, value: str) -> str:
    findings = Findings()
    try:
        reading = record_sample({"问题": "SM3？", "回复": "256比特。", name: value})
    except LeftOutError:
        return "left out"
    assert (reading.sample.question, reading.sample.answer) == ("SM3？", "256比特。")
    findings.record(1, reading)
    return "told" if findings.remarks(DataFile("", "", "json", 0, "")) else "silent"


@pytest.mark.parametrize(("name", "value"), listed(LEFT_OUT))
def test_a_verdict_against_a_record_leaves_it_out(name, value):
    assert outcome(name, value) == "left out"


@pytest.mark.parametrize(("name", "value"), listed(TOLD))
def test_what_may_be_a_verdict_is_told(name, value):
    """It may be one on what the record is about, or nobody knows what a yes means."""
    assert outcome(name, value) == "told"


@pytest.mark.parametrize(("name", "value"), listed(SILENT))
def test_what_speaks_for_a_record_or_says_nothing_is_silent(name, value):
    assert outcome(name, value) == "silent"
