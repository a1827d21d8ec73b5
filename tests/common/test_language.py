"""Texts in the language of the reader: found by their form, and none of the first hour is missing."""

import ast
import dataclasses
import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pytest

import compare_runs
import convergence
import dataset_stats
from finetuning.command_line import CommandLine
from finetuning.common import language
from finetuning.common.arguments import parsed
from finetuning.common.errors import UserError
from finetuning.config import DirectTrainingConfig
from finetuning.events.metric_table import METRICS, description
from finetuning.monitoring.advice import ADVICE, advice, ending
from finetuning.monitoring.alerts import Alert, AlertMonitor
from finetuning.monitoring.detector_memory import Finding
from finetuning.runs import report
from finetuning.runs.before_after import BEFORE_AND_AFTER
from finetuning.runs.comparison import told
from tests.helpers.mixed_text import is_mixed

ROOT = Path(__file__).parents[2]
# Where texts for people come from; what stays in English is made in no way of `SAYING`.
SPEAKING = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.py"), *(ROOT / "finetuning").rglob("*.py")]
    if not path.name.startswith("test_") and "import" in path.read_text(encoding="utf-8")
)
# Functions and classes -> the arguments that are shown.
SHOWING = (
    "info warning final say warn _warn working _tell remark UserError RunStopped NothingLeftError Absent "
    "BrokenRecordError LeftOutError RenderingFault TemplateLimitError _TooLongError translated problem "
    "DamagedBundle DamagedCheckpoint Oddity Undelivered _NoTrialError embedded_because release_graph _fail "
    "_said _section"
)
SAYING = {
    **dict.fromkeys(SHOWING.split(" "), (0,)), "note": (1,), "Remark": (2,), "Finding": (2, 3),
    "BrokenSample": (2,), "WorseSource": (1,), "_tell": (0, 1), "_refuse": (1,), "as_user_error": (1,),
    "read_model_json": (1,), "RowProof": (1,),
}  # fmt: skip
CHINESE = re.compile("[\u4e00-\u9fff]")
VALUES = ("X1", "12", ".csv", "")
ENGLISH = re.compile("[a-z]+ [a-z]+ [a-z]+")  # a part of a sentence; names and commands are shorter


@pytest.fixture
def chinese() -> Iterator[None]:
    language.use("zh")
    yield
    language.use("en")


def form(node: ast.AST) -> str | None:
    """A text as the catalogue has it, `{}` for each value; None where it is made elsewhere."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else "{}" for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = form(node.left), form(node.right)
        return None if left is None else left + ("{}" if right is None else right)
    return None


def said(file: str) -> Iterator[str]:
    """Every text that a file hands to somebody who shows it."""
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            for place in SAYING.get(name, ()):
                text = form(node.args[place]) if place < len(node.args) else None
                if text and ENGLISH.search(text):
                    yield from text.split("\n")


def missing(texts: Iterator[str]) -> list[str]:
    """Texts without a translation, whatever kind of value they are given."""
    forms = [[text.replace("{}", value) for value in VALUES] for text in texts]
    return [form[0] for form in forms if all(language.in_chinese(text) == text for text in form)]


@pytest.mark.parametrize("file", SPEAKING)
def test_every_text_for_people_has_a_translation(file: str):
    assert not missing(said(file))


def test_alerts_settings_charts_and_headings_have_one():
    assert not missing(re.sub(r"\{\w+\}", "", text) for text in ADVICE.values())
    settings = language.meanings("settings_zh.tsv")
    fields = [
        f.name for kind in (DirectTrainingConfig, CommandLine) for f in dataclasses.fields(kind)
    ]
    groups = [kind.__name__ for kind in DirectTrainingConfig.__bases__]
    assert settings.keys() == {*fields, *groups} - {"training"}
    assert {m.tag for m in METRICS} <= language.meanings("metrics_zh.tsv").keys()
    titles = [*report.CHARTS, *(title for _, title in report.TEXTS), *BEFORE_AND_AFTER]
    assert not missing(iter(titles))


def test_every_fault_of_settings_has_one():
    """What a setting must be, and what is wrong between settings."""
    texts = []
    files = [ROOT / "finetuning" / name for name in ("config.py", "rules.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Yield):
            texts.append(form(node.value))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Rule":
            texts.append(form(node.args[1]))
        elif isinstance(node, ast.Dict):  # remedies, which end a fault
            texts += [form(key) for key in node.keys]
    texts = [text for text in texts if text]
    assert len(texts) > 20 and not missing(iter(texts))


SETTINGS = dataclasses.asdict(DirectTrainingConfig(learning_rate=3e-4)) | {"precision": "bf16"}


@pytest.mark.parametrize("name", ADVICE)
@pytest.mark.parametrize("settings", [{}, SETTINGS], ids=["unknown", "known"])
@pytest.mark.parametrize("evidence", [{}, {"samples": ["a.jsonl:7", "b.jsonl:3"]}])
def test_an_alert_is_shown_whole(chinese, name: str, settings: dict, evidence: dict):
    """Its advice is filled with settings before it is shown; nothing of it stays in English."""
    finding = Finding(2.5, 1.25, {"metric": "Eval/Format_Valid_Rate"})
    told = advice(name, settings), ending(name, finding)
    line = Alert(name, 7, finding.value, finding.threshold, evidence, *told).line()
    for text in (*told, " ".join(told), line, f"warning: {line}"):
        shown = language.translated(text)
        assert CHINESE.search(shown) and not ENGLISH.search(shown), shown
    assert ("a.jsonl:7" in language.translated(line)) == bool(evidence)
    if settings and "{rate}" in ADVICE[name]:
        assert "（现为 0.0003，可试 --learning-rate 0.0001）" in language.translated(told[0])


def test_the_table_of_alerts_says_what_to_do_and_what_ends_it(chinese):
    monitor = AlertMonitor(settings=SETTINGS)
    assert monitor.observe(3, {"GPU_0/Temperature_C": 95.0})
    assert "检查风扇" in monitor.table() and "时报警结束" in monitor.table()


@pytest.mark.parametrize(
    "name", ["messages_zh.tsv", "metrics_zh.tsv", "options_zh.tsv", "settings_zh.tsv"]
)
def test_a_catalogue_has_each_text_once(name: str):
    keys = [key for key, chinese in language.pairs(name) if chinese.strip()]
    assert len(keys) == len(set(keys)) == len(list(language.pairs(name)))


def test_translations_have_the_values_of_their_texts():
    """The same kinds, each as often; those without a name in their order, or all by number."""
    for text, translation in language.pairs("messages_zh.tsv"):
        theirs, ours = (language.PLACE.findall(side) for side in (text, translation))
        named = sorted(filter(None, theirs))
        assert not any(name.isdecimal() for name in named) and len(named) == len(set(named)), text
        assert sorted(name for name in ours if name and not name.isdecimal()) == named, text
        bare = [name for name in ours if not name or name.isdecimal()]
        numbers = [str(place) for place, name in enumerate(theirs) if not name]
        assert sorted(bare) in ([""] * len(numbers), sorted(numbers)), text


def test_every_text_of_the_catalogue_finds_its_own_translation(chinese):
    """No other text of the catalogue takes its words, or a part of them for a value."""
    values = {"said": "X1", "names": "X1", "one": "1 or more"}
    values |= {f"n{number}": f"1{number}" for number in range(1, 6)}
    values |= dict.fromkeys(("word", "word1", "word2"), "question")
    words = {"1 or more": language.in_chinese("1 or more"), "question": "问题"}
    for text, translation in language.pairs("messages_zh.tsv"):
        names = language.PLACE.findall(text)
        given = [
            values.get(name, "") if name else f"a/x{place}.y" for place, name in enumerate(names)
        ]
        rest = iter(given)
        line = language.PLACE.sub(lambda _, rest=rest: next(rest), text)
        told = [words.get(value, value) for value in given]
        message = language.Message(text, translation)
        if not text.startswith(" "):  # the end of a text, found within it
            assert language.in_chinese(line) == message.filled(told, [x in words for x in given])


def test_no_translation_is_half_in_english():
    mixed = [zh for _, zh in language.pairs("messages_zh.tsv") if is_mixed(zh)]
    assert not mixed


@pytest.mark.parametrize(
    "line",
    [
        "warning: data: without thinking: 36 of 108 (33.3%) have no thinking to learn; an empty think "
        "block carries no loss",
        "error: --resume latest: that run is finished at step 30, and its learning rate has come to its "
        "end, so it is not made longer. To train on, start a new run from its model: uv run python a.py "
        "--init-adapter b/c",
        "error: data: 36 of 108 samples have no thinking to learn, more than max_broken_fraction 0.05 "
        "allows. What helps: mend them (--check-data lists them); or raise --max-broken-fraction",
        "nothing to train on: 14 broken, 2 no thinking",
        "up to 1; at most 1 are kept",
        "3; at most 1 are kept",
        "no: try --quantization 4bit, --max-seq-length 1024, more GPUs with --parallel fsdp",
        "none: nothing is held out",
        "serve it: ollama create crypto -f a/b/Modelfile",
        "warning: GPU_0/Power_W is absent: NVMLError: Not Supported",
        "warning: no CUDA graph, kernels are launched one by one: dropout draws random numbers",
        "warning: mirror a/b: old checkpoints can't be removed (OSError: X1); the run goes on, and the next "
        "save tries again",
        "total, tokens, estimated",
        "error: configuration: fp16 is 'true', must be False here; learning_rate is 'fast', must be 'auto' "
        "or float",
        "error: template is not a setting here: the tokenizer's own chat template is used",
        "a/b.jsonl:4: broken: broken JSON at column 71: Invalid control character at",
        "  … and 33 more of 36 no thinking",
        "error: --config a.toml: not valid TOML (Expected '=' after a key (at line 1, column 7))",
    ],
)
def test_a_text_is_whole(chinese, line: str):
    shown = language.translated(line)
    assert CHINESE.search(shown) and not is_mixed(shown), shown


@pytest.mark.parametrize(
    "words",
    [
        "up to nobody knows",
        "it is {}, must be said",
        "2 of 3 (66%) were seen by nobody, {}",
        "about time",
    ],
)
def test_what_has_no_translation_stays_as_it_is(chinese, words: str):
    line = words.format("as its learning rate has come to its end")
    assert language.translated(line) == line
    assert language.translated(f"warning: {line}") == f"警告：{line}"
    assert not is_mixed(f"警告：{line}")
    assert is_mixed(f"{line}，数据")


def test_a_text_is_found_by_what_stands_between_its_values(chinese):
    told = language.translated
    assert told("step 3/12  loss 1.2") == "第 3/12 步  损失 1.2"
    assert (
        told("held-out loss 2.1 -> 1.9, best 1.8 at step 7")
        == "留出损失 2.1 -> 1.9，最低 1.8，在第 7 步"
    )
    missing = "no usable checkpoint in a/b; --resume auto starts fresh where there is none"
    assert told(f"error: --resume latest: {missing}").startswith(
        "错误：--resume latest：a/b 里没有"
    )
    columns = "error: a.csv:1: 5,000 columns, more than 4,096 columns; split the table"
    assert told(columns).startswith("错误：a.csv:1")
    assert told("one\nevaluation") == "one\n评估"
    assert told("words of nobody, evaluation in them") == "words of nobody, evaluation in them"
    assert told("") == ""


WORDS = [
    key
    for key, _ in language.pairs("messages_zh.tsv")
    if " " not in key and not language.PLACE.search(key)
]
TEXTS = [
    key
    for key, _ in language.pairs("messages_zh.tsv")
    if " " in key and not re.search("[{“”`\"']", key)
]
WORDS_A_FORM = 8
OF_PATHS = [  # and of names
    "there is no {}; give an existing file, folder or glob",
    "there is no {} in a/b; give an existing file, folder or glob",
    "{}: no such file or folder",
    "{}: no such directory; give an output directory or a run's logs",
    "{}: broken JSON (x)",
    "{} is empty; remove it or fill it",
    "no data file matches {}; readable are .csv",
    "--adapter {}: no such folder, here or below {}; give a folder, or a name such as final_model, "
    "best_model or checkpoint-50",
    "--resume: {} is not the name of a run of this program",
    "--resume {}: not a usable checkpoint (x); name another directory below checkpoints/, or use "
    "--resume latest",
    "output_dir {}: another run is writing there; wait for it or choose another --output-dir",
    "model_name {}: no such folder; check the path",
    "model_name {} can't be had. Tried: local folder {} (not there); hub https://a.b (answers 404). "
    "Download it where there is network (hf download {}, or modelscope download --model {}), set "
    "HF_ENDPOINT to a mirror you can reach, or give --model-name the path of a local folder",
    "model folder {} has no x.safetensors; download the folder again",
    "init_adapter {}: its base model is {}, and the weights of a/b are others; give --model-name that "
    "base, or another adapter",
]


@pytest.mark.parametrize("form", OF_PATHS)
def test_a_word_of_the_user_is_no_word_of_the_program(chinese, form: str):
    """Folders, models and runs may be called what a text of the program is: data, model, none."""
    for word in WORDS:
        shown = language.translated(f"error: {form.replace('{}', word)}")
        assert CHINESE.search(shown) and shown.count(word) >= form.count("{}"), shown
        assert not is_mixed(shown), shown


def filled_in(form: str, values: Iterable[str], others: Mapping[str, str]) -> str:
    """values: of places without a name; others: of the named ones, empty where none is given."""
    rest = iter(values)
    return language.PLACE.sub(
        lambda place: others.get(place[1], "") if place[1] else next(rest), form
    )


def test_no_text_translates_a_word_that_is_put_into_it(chinese):
    """Save where the catalogue says that the place is for a word of the program."""
    others = {"n1": "12", "n2": "12", "n3": "12", "one": "1 or more", "said": "X1", "names": "X1"}
    others |= dict.fromkeys(("word", "word1", "word2"), "question")
    words = itertools.cycle(WORDS)
    forms = [form for form, _ in language.pairs("messages_zh.tsv") if "{}" in form]
    for form in forms * WORDS_A_FORM:
        if form.startswith(language.FRAMES) or form.startswith(" "):  # a text; the end of one
            continue
        given = [next(words) for _ in re.findall("{}", form)]
        text = filled_in(form, given, others)
        shown = language.translated(text)
        assert shown == text or not [word for word in given if word not in shown], text


@pytest.mark.parametrize(
    "form",
    [
        "“{}” stands above the header and is not used",
        "sheet “{}” is hidden; it is read",
        "unknown role '{}'",
        "alert_actions: no alert '{}'; there are Divergence",
    ],
)
def test_what_stands_in_quotes_is_nobodys_to_translate(chinese, form: str):
    for text in TEXTS:
        shown = language.translated(form.replace("{}", text))
        assert CHINESE.search(shown) and text in shown, shown


def test_faults_of_settings_are_translated_one_by_one(chinese):
    with pytest.raises(UserError) as caught:
        DirectTrainingConfig(learning_rate=0.0, batch_size=0)
    told = language.translated(f"error: {caught.value}")
    assert told.startswith("错误：配置有误：") and "batch_size 是 0，应为" in told
    assert not re.search(r"must be|above", told)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "en_US.UTF-8"}, "en"),
        ({"LC_MESSAGES": "zh_TW", "LANG": "de_DE"}, "zh"),
        ({"LANG": "C"}, "en"),
        ({"HOME": "/"}, "en"),
        ({"LANG": "en_US.UTF-8", "LANGUAGE": "zh_CN:en"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LANGUAGE": "en:zh"}, "en"),
        ({"LANG": "de_DE", "LANGUAGE": "de:zh_CN:en"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LANGUAGE": ""}, "zh"),
        ({"LC_ALL": "C", "LANG": "en_US.UTF-8", "LANGUAGE": "zh_CN"}, "en"),
        ({"LANG": "C.UTF-8", "LANGUAGE": "zh_CN"}, "en"),
        ({"LANGUAGE": "zh_CN"}, "en"),
    ],
)
def test_the_locale_says_which_language(environment: dict, expected: str):
    assert language.of_locale(environment) == expected


@pytest.mark.parametrize(
    ("system", "expected"),
    [("zh_CN", "zh"), ("Chinese (Simplified)_China", "zh"), ("de_DE", "en"), ("", "en")],
)
def test_where_no_variable_is_set_the_system_says_it(
    monkeypatch: pytest.MonkeyPatch, system: str, expected: str
):
    for name in ("LC_ALL", "LC_MESSAGES", "LANG", "LANGUAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(language.locale, "getlocale", lambda: (system or None, "UTF-8"))
    language.use("auto")
    assert language.current() == expected
    monkeypatch.setenv("LANG", "en_US.UTF-8")
    language.use("auto")
    assert language.current() == "en"


def test_a_program_without_its_documents_speaks_english(
    chinese, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(language, "DOCS", tmp_path)
    caches = (language._catalogue, language._whole)
    for cache in caches:
        cache.cache_clear()
    try:
        for line in ("error: the question is empty", "warning: data: x", "saving", "saved a/b"):
            assert language.translated(line) == line
    finally:
        for cache in caches:
            cache.cache_clear()


def test_notes_of_charts(chinese):
    assert CHINESE.search(description("Training/Loss"))
    assert "`evaluation.loss_metrics`" in description("Training/Loss")


def english(lines: Iterable[str]) -> list[str]:
    """Lines that are English, or half English."""
    return [line for line in lines if language.is_prose(line) or is_mixed(line)]


def test_statistics_of_data_speak_chinese(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """The terminal and the page, with another data set beside the first and what is wrong with both."""
    monkeypatch.setenv("COLUMNS", "300")  # a cell is a line
    bad = tmp_path / "bad.jsonl"
    lines = [
        '{"question": "什么是杂凑？", "answer": "压缩。"}',
        '{"question": "空？", "answer": ""}',
        "{",
    ]
    bad.write_text("\n".join([*lines, lines[0]]), encoding="utf-8")
    page = tmp_path / "page.html"
    words = ["--language", "zh", str(bad), "--compare", str(bad), "--html", str(page)]
    try:
        parsed("dataset_stats.py", dataset_stats.main, words)()
    finally:
        language.use("en")
    text = page.read_text(encoding="utf-8")
    cells = re.findall(r"<(?:h1|h2|th|td|p[^>]*)>([^<]+)<", text)
    assert len(cells) > 60 and not english(cells)
    assert not english(capfd.readouterr().out.splitlines())


@pytest.mark.slow
def test_a_whole_run_speaks_chinese(
    tiny_run: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture
):
    """Every line of the terminal, the report's heads and tables, and what other programs make of the run; the
    log stays in English."""
    first = ("--max-steps", "4", "--eval-steps", "2", "--num-probes", "1")
    zh = ("--language", "zh")
    try:
        assert tiny_run(tmp_path, *zh, "--plan", first=first) == 0
        assert tiny_run(tmp_path, *zh, first=first) == 0
        assert tiny_run(tmp_path, *zh, "--resume", "latest", "--max-steps", "9", first=first) == 2
        (page,) = (tmp_path / "out").glob("training_logs/*/report.html")
        parsed("compare_runs.py", compare_runs.main, [*zh, str(tmp_path / "out")])()
        run = str(page.parent)
        convergence.show(parsed("convergence.py", convergence.Options, [*zh, run]))
        rows = [("held-out loss", ["1 ± 0.2"]), ("seconds of training", ["3"])]
        assert told(rows)[0][0] == "留出损失"
    finally:
        language.use("en")
    told_lines = capfd.readouterr()
    lines = [line for line in (told_lines.out + told_lines.err).splitlines() if line.strip()]
    silent = [line for line in lines if not CHINESE.search(line)]
    assert len(lines) > 60 and not english(lines)
    assert not [line for line in silent if re.search("[a-z]{3}", line) and "/" not in line]
    text = page.read_text(encoding="utf-8")
    heads = re.findall(r"<(?:h2|figcaption|summary|th)>([^<]+)<", text)
    assert len(heads) > 20 and not english(heads)
    (log,) = (tmp_path / "out").glob("training_logs/*/training.log")
    assert "held-out loss" in log.read_text(encoding="utf-8")


def test_a_long_line_takes_no_time(chinese):
    """However often its parts could be joined: a list of thousands is cut once."""
    started = time.process_time()
    for line in (
        ", ".join(f"name{i}" for i in range(2000)),
        "; ".join(f"a/{i}.jsonl:3: broken: nobody, knows: this" for i in range(200)),
    ):
        assert language.translated(line) == line
    broken = "; ".join(f"a/{i}.jsonl:3: broken: empty answer" for i in range(200))
    assert language.translated(broken).startswith("a/0.jsonl:3：损坏：答案为空；")
    assert time.process_time() - started < 5
