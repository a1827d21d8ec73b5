"""Small bugs that developers make, as changes of a file's text.

A sum that is not reset, a setting that is ignored, a denominator left out, a boundary missed, a
condition turned round, a key's part forgotten: each is one change of one place, found in the syntax tree.
"""

import ast
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BOUNDARIES = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"}
_OPPOSITES = {
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.In: "not in",
    ast.NotIn: "in",
    ast.Is: "is not",
    ast.IsNot: "is",
}
_SIGNS = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "//"}
_OTHER_NAMES = {
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "sorted": "list",
    "sum": "max",
}
# What a user reads is no arithmetic, and an assertion is for our own mistakes.
_WITHOUT_BUGS = (ast.JoinedStr, ast.Raise, ast.Assert, ast.Import, ast.ImportFrom)


@dataclass(frozen=True)
class Bug:
    """One change: the characters from `start` to `end` of the file become `new`."""

    path: str
    start: int
    end: int
    new: str
    kind: str
    line: int

    def planted(self, text: str) -> str:
        return text[: self.start] + self.new + text[self.end :]

    def shown(self, text: str) -> str:
        """The line as it was and as it is, for a reader."""
        number = text.count("\n", 0, self.start)
        was = text.splitlines()[number].strip()
        now = self.planted(text).splitlines()[number].strip()
        return f"{self.path}:{self.line}: {self.kind}\n    - {was}\n    + {now}"


def bugs_of(path: str, text: str, settings: Mapping[str, Any]) -> list[Bug]:
    """Every bug of the kinds below that can be planted in a file and still compiles.

    `settings` are the settings' names and defaults: reading one of them may be answered by its default.
    """
    finder = _Finder(path, text, settings)
    finder.visit(ast.parse(text))
    return [bug for bug in finder.bugs if _compiles(bug.planted(text))]


def defaults_of_settings(configuration: type) -> dict[str, Any]:
    """Name and default of every setting whose default can be written down in code."""
    defaults = {field.name: field.default for field in dataclasses.fields(configuration)}
    return {name: value for name, value in defaults.items() if isinstance(value, (int, float, str))}


def _compiles(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


class _Finder(ast.NodeVisitor):
    """Walks a syntax tree and notes what can be changed where."""

    def __init__(self, path: str, text: str, settings: Mapping[str, Any]) -> None:
        self.path, self.text, self.settings = path, text, settings
        self.bugs: list[Bug] = []
        lengths = [len(line.encode()) for line in text.splitlines(keepends=True)]
        self._bytes = text.encode()
        self._starts = [sum(lengths[:number]) for number in range(len(lengths) + 1)]

    # -- Places: the tree counts bytes, we count characters

    def _place(self, line: int, column: int) -> int:
        return len(self._bytes[: self._starts[line - 1] + column].decode())

    def _span(self, node: ast.AST) -> tuple[int, int]:
        begin = self._place(node.lineno, node.col_offset)
        return begin, self._place(node.end_lineno, node.end_col_offset)

    def _source(self, node: ast.AST) -> str:
        begin, end = self._span(node)
        return self.text[begin:end]

    def _add(self, kind: str, node: ast.AST, new: str) -> None:
        begin, end = self._span(node)
        self._add_at(kind, begin, end, new)

    def _add_at(self, kind: str, begin: int, end: int, new: str) -> None:
        line = self.text.count("\n", 0, begin) + 1
        self.bugs.append(Bug(self.path, begin, end, new, kind, line))

    # -- What is walked

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, _WITHOUT_BUGS):
            return
        _KINDS.get(type(node), lambda finder, node: None)(self, node)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    self.visit(child)

    # -- Kinds

    def expression_statement(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self._add("a call left out", node, "pass")

    def assignment(self, node: ast.Assign) -> None:
        if not isinstance(node.targets[0], (ast.Name, ast.Tuple)):
            self._add("an assignment left out", node, "pass")

    def running_sum(self, node: ast.AugAssign) -> None:
        self._add("an addition left out", node, "pass")
        sign = _SIGNS.get(type(node.op))
        if isinstance(node.op, (ast.Add, ast.Sub)):
            target, value = self._source(node.target), self._source(node.value)
            self._add("a sum overwritten", node, f"{target} = {value}")
            self._add("a sign turned", node, f"{target} {sign}= {value}")

    def loop_control(self, node: ast.AST) -> None:
        self._add("a jump left out", node, "pass")

    def condition(self, node: ast.If | ast.IfExp | ast.While) -> None:
        if not (isinstance(node, ast.If) and self._source(node.test) == "TYPE_CHECKING"):
            self._add("a condition turned round", node.test, f"(not ({self._source(node.test)}))")

    def chain(self, node: ast.BoolOp) -> None:
        word = "and" if isinstance(node.op, ast.And) else "or"
        parts = [f"({self._source(value)})" for value in node.values]
        for number in range(len(parts)):
            rest = f" {word} ".join(parts[:number] + parts[number + 1 :])
            self._add("a part of a condition left out", node, f"({rest})")

    def negation(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._add("a condition turned round", node, f"(bool({self._source(node.operand)}))")
        elif isinstance(node.op, ast.USub):
            self._add("a sign turned", node, self._source(node.operand))

    def comparison(self, node: ast.Compare) -> None:
        if len(node.ops) > 1:
            return
        left, right = self._source(node.left), self._source(node.comparators[0])
        for table, kind in (
            (_BOUNDARIES, "a boundary missed"),
            (_OPPOSITES, "a comparison turned round"),
        ):
            if type(node.ops[0]) in table:
                self._add(kind, node, f"({left} {table[type(node.ops[0])]} {right})")

    def arithmetic(self, node: ast.BinOp) -> None:
        if type(node.op) not in _SIGNS or isinstance(node.left, (ast.JoinedStr, ast.List)):
            return
        left, right = self._source(node.left), self._source(node.right)
        if isinstance(node.left, ast.Constant) and isinstance(node.left.value, str):
            return
        self._add("another operator", node, f"(({left}) {_SIGNS[type(node.op)]} ({right}))")
        self._add("an operand left out", node, f"({left})")
        if isinstance(node.op, (ast.Add, ast.Mult)):
            self._add("an operand left out", node, f"({right})")

    def constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self._add("a constant changed", node, str(not value))
        elif isinstance(value, int):
            self._add("a constant changed", node, str(value + 1))
        elif isinstance(value, float):
            self._add("a constant changed", node, repr(value * 1.5 if value else 0.5))

    def call(self, node: ast.Call) -> None:
        for keyword in node.keywords:
            if keyword.arg:
                self._without("an argument left out", [*node.args, *node.keywords], keyword)
        if not isinstance(node.func, ast.Name):
            return
        if node.func.id in _OTHER_NAMES:
            self._add("another function", node.func, _OTHER_NAMES[node.func.id])
        elif (
            len(node.args) == 1 and not node.keywords and not isinstance(node.args[0], ast.Starred)
        ):
            self._add("a step left out", node, f"({self._source(node.args[0])})")

    def elements(self, node: ast.List | ast.Tuple | ast.Set) -> None:
        if len(node.elts) > 1 and isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
            for element in node.elts:
                self._without("an element left out", node.elts, element)

    def pairs(self, node: ast.Dict) -> None:
        for number, (key, value) in enumerate(zip(node.keys, node.values, strict=True)):
            if key is None or len(node.keys) < 2:
                continue
            begin, end = self._span(key)[0], self._span(value)[1]
            if number + 1 < len(node.keys) and node.keys[number + 1] is not None:
                end = self._span(node.keys[number + 1])[0]
            self._add_at("an element left out", begin, end, "")

    def comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._add("a filter left out", test, "True")

    def slice(self, node: ast.Slice) -> None:
        for bound in (node.lower, node.upper):
            if bound is not None:
                self._add("a slice off by one", bound, f"({self._source(bound)}) + 1")

    def attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load) and node.attr in self.settings:
            self._add("a setting ignored", node, repr(self.settings[node.attr]))

    def result(self, node: ast.Return) -> None:
        if node.value is not None and not isinstance(node.value, ast.Constant):
            self._add("a result left out", node.value, "None")

    def _without(self, kind: str, all_of_them: list, one: ast.AST) -> None:
        """The text without one of several neighbours, and without one comma."""
        number = all_of_them.index(one)
        begin, end = self._span(one)
        if number + 1 < len(all_of_them):
            end = self._span(all_of_them[number + 1])[0]
        elif number:
            begin = self._span(all_of_them[number - 1])[1]
        self._add_at(kind, begin, end, "")


_KINDS: dict[type, Callable[[_Finder, Any], None]] = {
    ast.Expr: _Finder.expression_statement,
    ast.Assign: _Finder.assignment,
    ast.AugAssign: _Finder.running_sum,
    ast.Continue: _Finder.loop_control,
    ast.Break: _Finder.loop_control,
    ast.If: _Finder.condition,
    ast.IfExp: _Finder.condition,
    ast.While: _Finder.condition,
    ast.BoolOp: _Finder.chain,
    ast.UnaryOp: _Finder.negation,
    ast.Compare: _Finder.comparison,
    ast.BinOp: _Finder.arithmetic,
    ast.Constant: _Finder.constant,
    ast.Call: _Finder.call,
    ast.List: _Finder.elements,
    ast.Tuple: _Finder.elements,
    ast.Set: _Finder.elements,
    ast.Dict: _Finder.pairs,
    ast.comprehension: _Finder.comprehension,
    ast.Slice: _Finder.slice,
    ast.Attribute: _Finder.attribute,
    ast.Return: _Finder.result,
}


def sources(root: Path, files: list[str]) -> list[str]:
    """The program's own files among a repository's: what tests, benchmarks and scripts are for."""
    at_the_root = [name for name in files if name.endswith(".py") and "/" not in name]
    inside = [name for name in files if name.startswith("finetuning/") and name.endswith(".py")]
    return [
        name
        for name in at_the_root + inside
        if not Path(name).name.startswith("test_") and (root / name).is_file()
    ]


def bugs_of_list(entries: list[dict[str, str]], texts: Mapping[str, str]) -> Iterator[Bug]:
    """The bugs of a list: `old` stands once in the sources, or once in the file of that name.

    Raises LookupError with the number of places where that is not so.
    """
    for entry in entries:
        old = entry["old"]
        hits = [path for path, text in texts.items() for _ in range(text.count(old))]
        if len(hits) > 1:
            hits = [path for path in hits if Path(path).name == Path(entry["file"]).name]
        if len(hits) != 1:
            raise LookupError(f"{entry['id']}: its text stands {len(hits)} times")
        text = texts[hits[0]]
        start = text.index(old)
        line = text.count("\n", 0, start) + 1
        kind = f"{entry['id']}, {entry['breaks']}"
        yield Bug(hits[0], start, start + len(old), entry["new"], kind, line)
