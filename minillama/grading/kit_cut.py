"""Cuts bodies out of Python source by `ast`, takes definitions from our modules, and searches texts for solutions."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
Function = ast.FunctionDef | ast.AsyncFunctionDef
SHAPE = re.compile(r"\([A-Z][\w /]*(, ?[\w /]+)+\)|\([A-Z],\)")  # such as (B, T, H, hd) or (V,)
WORD = re.compile(r"\w+|[^\w\s]")
SHORTEST = 6  # tokens: a shorter line, such as `x = x + 1`, is nobody's
EVERYBODYS = frozenset({" super ( ) . __init__ ( ) ", " with torch . no_grad ( ) : "})


def functions(source: str) -> dict[str, Function]:
    """All functions of a module by their dotted names."""
    found: dict[str, Function] = {}

    def visit(body: Iterable[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found[prefix + node.name] = node
            elif isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")

    visit(ast.parse(source).body, "")
    return found


def after_docstring(function: Function) -> list[ast.stmt]:
    """The statements of a function without its docstring."""
    return function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body


def cut_bodies(source: str, names: Iterable[str]) -> str:
    """The source with these functions' bodies replaced by an error that says "NAME is not implemented yet".

    Signature, decorators and docstring stay, and comments on lines of their own that state a shape.
    """
    known, lines = functions(source), source.splitlines(keepends=True)
    for name in sorted(names, key=lambda name: known[name].lineno, reverse=True):
        body = after_docstring(known[name])
        documented = len(body) < len(known[name].body)
        start = known[name].body[0].end_lineno if documented else header_end(source, known[name])
        end = known[name].end_lineno
        assert body and start is not None and end is not None and start < end, f"{name} has no body of its own"
        indent = " " * body[0].col_offset
        comments = (line.strip() for line in lines[start:end])
        kept = [line for line in comments if line.startswith("#") and SHAPE.search(line)]
        error = f'raise NotImplementedError("{unwritten(name)}")'
        lines[start:end] = [f"{indent}{line}\n" for line in [*kept, error]]
    return "".join(lines)


def unwritten(name: str) -> str:
    return f"{name} is not implemented yet"


def header_end(source: str, function: Function) -> int:
    """The last line of a function's signature: the line before its first statement or a comment above that."""
    first = function.body[0].lineno - 1
    lines = source.splitlines()
    while lines[first - 1].lstrip().startswith("#"):
        first -= 1
    return first


@lru_cache
def read_source(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@lru_cache
def parsed_source(name: str) -> ast.Module:
    return ast.parse(read_source(name))


def take(file: str, name: str = "", drop: Iterable[str] = (), swap: Mapping[str, str] | None = None) -> str:
    """A definition of one of our modules, as its lines stand there; without a name, the module's docstring.

    drop: lines that contain this text are left out. swap: texts to replace. Raises ValueError if something is missing
    there, so that a change of the module cannot go by unseen.
    """
    source, tree = read_source(file), parsed_source(file)
    if not name:
        return swapped(ast.get_docstring(tree) or "", file, swap or {})
    body: list[ast.stmt] = tree.body
    for part in name.split("."):
        own = [one for one in body if part in (getattr(one, "name", None), assigned_name(one))]
        if not own:
            raise ValueError(f"{file} has no {name} any more, which the kit takes from there")
        node = own[0]
        body = getattr(node, "body", [])
    first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])
    lines = source.splitlines(keepends=True)[first - 1 : node.end_lineno]
    for text in drop:
        if not any(text in line for line in lines):
            raise ValueError(f"{file}, {name}: no line has {text!r} any more, which the kit leaves out")
        lines = [line for line in lines if text not in line]
    return swapped("".join(lines).rstrip("\n"), f"{file}, {name}", swap or {})


def swapped(text: str, source: str, swap: Mapping[str, str]) -> str:
    """The text with other texts in it. Raises ValueError if one to replace is missing."""
    for old, new in swap.items():
        if old not in text:
            raise ValueError(f"{source}: {old!r} is not there any more, which the kit replaces")
        text = text.replace(old, new)
    return text


def assigned_name(statement: ast.stmt) -> str | None:
    """The name that a plain assignment gives a value to."""
    target = statement.targets[0] if isinstance(statement, ast.Assign) else None
    return target.id if isinstance(target, ast.Name) else None


def solution_lines(source: str, names: Iterable[str] | None = None) -> set[str]:
    """The token streams of the statements in these functions' bodies (default: all functions'), without docstrings
    and comments; of a compound statement, its head. Left out are those of fewer than SHORTEST tokens, and EVERYBODYS.
    """
    known, tokens = functions(source), code_tokens(source)
    starts = [start for start, _ in tokens]
    lines = source.splitlines()
    found = set()
    for name in known if names is None else names:
        for statement in (node for one in after_docstring(known[name]) for node in ast.walk(one)):
            if isinstance(statement, ast.stmt) and not isinstance(statement, ast.Raise | ast.Import | ast.ImportFrom):
                first = place(lines, statement.lineno, statement.col_offset)
                inner = getattr(statement, "body", None)
                if isinstance(inner, list):
                    end = place(lines, inner[0].lineno, inner[0].col_offset)
                else:
                    end = place(lines, statement.end_lineno or 0, statement.end_col_offset or 0)
                inside = tokens[bisect_left(starts, first) : bisect_left(starts, end)]
                stream = stream_of(" ".join(word for _, word in inside))
                if stream.count(" ") > SHORTEST and stream not in EVERYBODYS:
                    found.add(stream)
    return found


def place(lines: list[str], line: int, offset: int) -> tuple[int, int]:
    """The line and column of a place that `ast` gives in bytes."""
    return line, len(lines[line - 1].encode()[:offset].decode())


def code_tokens(source: str) -> list[tuple[tuple[int, int], str]]:
    """The tokens of a module with their places, without comments and line ends."""
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [(token.start, token.string) for token in tokens if token.type not in skipped]


def stream_of(text: str) -> str:
    """The words and signs of a text, with a space on both sides of each. The comma before a closing bracket is left
    out, because a formatter adds it.
    """
    words = WORD.findall(text)
    kept = [word for word, following in zip(words, (words + [""])[1:], strict=True) if (word, following) != (",", ")")]
    return f" {' '.join(kept)} "


def readable_text(name: str, content: bytes) -> str:
    """The text of a kit's file: of a notebook its cells, and nothing of numbers and labelled sentences."""
    if name.endswith(".ipynb"):
        return "\n".join("".join(cell["source"]) for cell in json.loads(content)["cells"])
    is_data = name.endswith((".safetensors", ".model")) or name.startswith("data/demo-")
    return "" if is_data else content.decode("utf-8", "replace")


def leaks(files: Mapping[str, bytes], lines: Iterable[str]) -> list[str]:
    """The files of a kit that have a line of a solution, each with that line. lines: see `solution_lines`."""
    lines = sorted(lines)
    streams = {name: stream_of(readable_text(name, content)) for name, content in sorted(files.items())}
    return [f"{name}:{line}" for name, stream in streams.items() for line in lines if line in stream]
