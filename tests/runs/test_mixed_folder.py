"""A folder as an engineer has it trains with one command, and every file in it is accounted for."""

from finetuning.readers.dataset import read_samples
from tests.helpers.reading_cases import all_cases, write_file

QUESTIONS = [f"第{i}种密码机的密钥多长？" for i in range(1, 9)]


def test_a_mixed_folder_trains_and_every_file_is_accounted_for(tiny_run, tmp_path, capsys):
    (case,) = [case for case in all_cases() if case.title.startswith("Excel, Word, CSV, two kinds")]
    folder = tmp_path / "资料"
    folder.mkdir()
    case.write(folder)
    rows = [
        [i, question, "128比特。", "标准这样规定，所以是128比特。", ""]
        for i, question in enumerate(QUESTIONS)
    ]
    write_file(
        folder / "更多.xlsx",
        {"sheets": {"问答": [["序号", "问题", "答案", "解析", "备注"], *rows]}},
    )

    found = read_samples([str(folder)])
    accounted = [*found.samples_per_file, *(remark.source for remark in found.skipped)]
    assert sorted(accounted) == sorted(path.as_posix() for path in folder.iterdir())
    assert len(found.samples) == 13 and not found.broken

    assert tiny_run(tmp_path, "--data-path", str(folder), "--check-data") in (0, 1)
    assert "13 samples" in capsys.readouterr().out

    assert tiny_run(tmp_path, "--data-path", str(folder)) == 0
    assert (tmp_path / "out" / "final_model" / "adapter_model.safetensors").is_file()
