"""Pairs of code and its docstring, from CPython's own standard library."""

from __future__ import annotations

import ast
import functools
import textwrap
import warnings
from collections.abc import Iterator

from data.documents import Document, score
from data.stdlib import stdlib_texts

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@functools.cache  # parsing takes seconds, and the documents are gone through several times
def docstring_documents() -> tuple[Document, ...]:
    """Every function and class that has a docstring, file by file; all of a file are held out, or
    none.
    """
    return tuple(
        Document(score(name), docstring, source=code)
        for name, text in stdlib_texts()
        for code, docstring in docstring_pairs(text)
    )


def docstring_pairs(text: str) -> Iterator[tuple[str, str]]:
    """(code without its docstring, docstring) of a module's functions and classes, in their order.

    Both are without the indentation of where they stand. Code keeps its decorators, comments and
    the docstrings of what is inside it. What shares a line with its docstring is left out, as is a
    module that this Python cannot read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = text.split("\n")
    for node in _documented(tree.body):
        docstring = ast.get_docstring(node)
        quoted = node.body[0]
        last = quoted.end_lineno or quoted.lineno
        alone = not lines[quoted.lineno - 1][: quoted.col_offset].strip() and (
            len(node.body) == 1 or node.body[1].lineno > last
        )
        if not docstring or not alone:
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        code = [*lines[first - 1 : quoted.lineno - 1], *lines[last : node.end_lineno]]
        yield textwrap.dedent("\n".join(code)) + "\n", docstring


def _documented(body: list[ast.stmt]) -> Iterator[Documented]:
    """The functions and classes among statements and inside them."""
    for statement in body:
        if isinstance(statement, Documented):
            yield statement
        for name in ("body", "handlers", "cases", "orelse", "finalbody"):
            yield from _documented(getattr(statement, name, []))
