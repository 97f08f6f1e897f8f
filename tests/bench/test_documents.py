"""What the documents say is what the code says and the results hold: messages by their words, figures to the letter."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.measured import newest, picture, read_results, table
from scripts.pack import ROOT

GAP = "…"
LOGGED = ("warning", "error", "exception")
PREFIX = "LayerStream: "
REFUSAL = "refusal"


def test_the_readme_has_the_table_and_the_picture_of_the_results_that_lie_beside_it() -> None:
    results = newest(read_results(ROOT / "bench" / "results"))
    assert results and table(results) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert picture(results) == (ROOT / "docs" / "images" / "measured.svg").read_text(encoding="utf-8")


def test_every_error_and_warning_has_its_section() -> None:
    assert sorted(messages() - set(explained())) == []


def test_every_message_that_is_explained_is_one_of_the_code() -> None:
    shown = {words(text) for path in sources() for text in texts(ast.parse(path.read_text(encoding="utf-8")))}
    shown |= set(strings(json.loads((ROOT / "locales" / "en" / "main.json").read_text(encoding="utf-8"))))
    assert sorted(set(explained()) - messages() - shown) == []


def test_every_section_says_more_than_its_messages_and_no_message_is_in_two() -> None:
    quoted = explained()
    assert len(quoted) == len(set(quoted)) > 50
    for title, section in sections():
        assert len(re.sub(QUOTE, "", section, flags=re.M | re.S).split()) > 5, title


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no clone")
def test_the_commands_of_the_readme_end_their_lines_as_bash_takes_them_wherever_they_are_cloned() -> None:
    scripts = {path.relative_to(ROOT).as_posix() for path in (ROOT / "scripts").glob("*.sh")}
    named = re.findall(r"^bash (\S+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert named and set(named) <= scripts
    command = ["git", "check-attr", "eol", "--", *scripts]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert sorted(said) == sorted(f"{name}: eol: lf" for name in scripts)


# -- what the code says ------------------------------------------------------------------------------------------------


def sources() -> list[Path]:
    return [*(ROOT / "streaming").rglob("*.py"), *(ROOT / "nodes").glob("*.py")]


def messages() -> set[str]:
    """The texts of all errors that are raised, warnings that are logged and requests that are refused."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sources()]
    functions = {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    found = {words(text) for tree in trees for said in what_is_said(tree) for text in spoken(said, functions)}
    return {text for text in found if re.search(r"\w", text)}


def what_is_said(tree: ast.Module) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield from node.exc.args[:1]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOGGED:
            yield node.args[0]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == REFUSAL:
            yield node.args[1]


def spoken(said: ast.expr, functions: dict[str, ast.FunctionDef]) -> Iterator[str]:
    """The text of an expression; of a call of a function of ours, all texts that it may return."""
    if isinstance(said, ast.Call) and isinstance(said.func, ast.Name) and said.func.id in functions:
        for node in ast.walk(functions[said.func.id]):
            if isinstance(node, ast.Return) and node.value is not None:
                yield from spoken(node.value, functions)
    else:
        yield from texts(said, nested=False)


def texts(tree: ast.AST, nested: bool = True) -> Iterator[str]:
    """The strings of `tree`, with a gap where a formatted one has a value; or the one that it is."""
    for node in ast.walk(tree) if nested else (tree,):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)


def words(text: str) -> str:
    """A text as the documents have it."""
    return " ".join(re.sub(r"%(\.\d)?[sdf]", GAP, text.removeprefix(PREFIX)).split())


def strings(value: object) -> Iterator[str]:
    for entry in value.values() if isinstance(value, dict) else ():
        yield from [entry] if isinstance(entry, str) else strings(entry)


# -- what the documents say --------------------------------------------------------------------------------------------

QUOTE = r'^- "(.+?)"$'


def sections() -> Iterator[tuple[str, str]]:
    """The heading and the text of each section that explains messages."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    for section in re.split(r"^#+ ", text, flags=re.M):
        title, _, body = section.partition("\n")
        if re.search(QUOTE, body, re.M | re.S):
            yield title, body


def explained() -> list[str]:
    return [" ".join(quote.split()) for _, body in sections() for quote in re.findall(QUOTE, body, re.M | re.S)]
