"""Prose of docstrings, messages, comments and pages, held to the rules that a machine can check."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = ("fastddim", "kernels", "benchmarks", "examples", "docs", "tests")
PAGES = (".", ".github", "docs", "benchmarks", "examples")

QUESTIONS = ("what", "where", "whether", "how", "when", "why", "which", "who", "whose", "whom")

# With a space between words, so that no pattern matches its own source.
PHRASES = {
    "a process or a caller is not a person": r"\bnobody\b",
    "use `except`, or say what differs": r"\bbut\s+for\b",
    "use `belongs in` or `belongs to`": r"\bbelong(?:s|ed|ing)?\s+into\b",
}

Fault = tuple[int, str]
Check = Callable[[str], Iterator[Fault]]


def docstrings(source: str) -> Iterator[Fault]:
    """The line and the text of each docstring, those of attributes and constants included."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, value.value


def opens_with_a_question_word(source: str) -> Iterator[Fault]:
    for line, text in docstrings(source):
        first = re.search(r"\w+", text)
        if first and first[0].lower() in QUESTIONS:
            yield line, text.strip().splitlines()[0]


def first_sentence_without_an_end(source: str) -> Iterator[Fault]:
    for line, text in docstrings(source):
        paragraph = re.split(r"\n\s*\n", text.strip())[0]
        if not re.search(r"[.:][)\"'`”]*(?:\s|$)", paragraph):
            yield line, paragraph.splitlines()[0] if paragraph else "empty"


def phrases(text: str, line: int = 1) -> Iterator[Fault]:
    for advice, pattern in PHRASES.items():
        for found in re.finditer(pattern, text, re.IGNORECASE):
            yield line + text.count("\n", 0, found.start()), f"{found[0]!r}: {advice}"


def comments(source: str) -> Iterator[Fault]:
    """The line and the text of each comment; lines that follow one another make one comment."""
    block: list[str] = []
    start = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if block and token.start[0] != start + len(block):
                yield start, "\n".join(block)
                block = []
            if not block:
                start = token.start[0]
            block.append(token.string.lstrip("# "))
    if block:
        yield start, "\n".join(block)


def phrases_in_python(source: str) -> Iterator[Fault]:
    """Phrases in docstrings, in other strings (messages among them) and in comments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from phrases(node.value, node.lineno)
    for line, text in comments(source):
        yield from phrases(text, line)


def python_groups() -> dict[str, list[Path]]:
    """The Python files of each package and folder, by its path."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(path for folder in PYTHON for path in (ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).parts
        if "__pycache__" not in parts:
            groups.setdefault("/".join(parts[:-1][:2]), []).append(path)
    groups["."] = sorted(ROOT.glob("*.py"))
    return groups


def pages() -> dict[str, list[Path]]:
    """The Markdown files of each folder, by its path."""
    return {
        folder: sorted((ROOT / folder).glob("*.md" if folder == "." else "**/*.md"))
        for folder in PAGES
        if folder == "." or any((ROOT / folder).rglob("*.md"))
    }


def native_sources() -> list[Path]:
    suffixes = (".h", ".cpp", ".cu", ".cuh")
    return sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes)


GROUPS = python_groups()
FOLDERS = pages()


def assert_no_fault(paths: list[Path], check: Check) -> None:
    """Fails with all faults in files, as `file:line: fault`."""
    assert paths
    found = [
        f"{path.relative_to(ROOT)}:{line}: {fault}"
        for path in paths
        for line, fault in check(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(["faults:", *found])


@pytest.mark.parametrize("group", GROUPS)
class TestPython:
    def test_no_docstring_opens_with_a_question_word(self, group: str) -> None:
        """The first line names the thing or starts with a verb."""
        assert_no_fault(GROUPS[group], opens_with_a_question_word)

    def test_the_first_sentence_of_a_docstring_ends(self, group: str) -> None:
        assert_no_fault(GROUPS[group], first_sentence_without_an_end)

    def test_phrases(self, group: str) -> None:
        # The examples at the end of this file hold the phrases.
        paths = [path for path in GROUPS[group] if path != Path(__file__)]
        assert_no_fault(paths, phrases_in_python)


@pytest.mark.parametrize("folder", FOLDERS)
def test_phrases_of_pages(folder: str) -> None:
    assert_no_fault(FOLDERS[folder], phrases)


def test_phrases_of_native_sources() -> None:
    assert_no_fault(native_sources(), phrases)


@pytest.mark.parametrize(
    ("check", "source", "lines"),
    [
        (opens_with_a_question_word, '"""What it does."""\n', [1]),
        (opens_with_a_question_word, 'def f():\n    """Whether it is."""\n', [2]),
        (opens_with_a_question_word, 'class C:\n    n: int\n    """`How` many."""\n', [3]),
        (opens_with_a_question_word, 'SIZE = 3\n"""Where it\nlies."""\n', [2]),
        (opens_with_a_question_word, '"""The size, which is odd. What else?"""\n', []),
        (opens_with_a_question_word, 'text = "What it does."\n', []),
        (first_sentence_without_an_end, '"""The size"""\n', [1]),
        (first_sentence_without_an_end, '"""The size\n\nof a thing.\n"""\n', [1]),
        (first_sentence_without_an_end, '"""The size of a\nthing (in float32.)\n\nEnd"""\n', []),
        (first_sentence_without_an_end, '"""Arguments:\n    x: a number\n"""\n', []),
        (phrases_in_python, 'x = 1\n"""All,\nbut\nfor one."""\n', [3]),
        (phrases_in_python, 'raise ValueError(f"x: expected {n} but for one")\n', [1]),
        (phrases_in_python, "x = 1  # kept by nobody\n", [1]),
        (phrases_in_python, "def f():\n    # It belongs\n    # into y.\n    pass\n", [2]),
        (phrases_in_python, "nobody = 1\n", []),
        (phrases, "# Title\n\nNobody reads, but forms are kept.\n", [3]),
    ],
)
def test_each_check_finds_its_fault(check: Check, source: str, lines: list[int]) -> None:
    assert [line for line, _ in check(source)] == lines
