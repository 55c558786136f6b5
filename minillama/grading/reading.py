"""Finds functions without a body in a student's files, by reading them; nothing is run."""

from __future__ import annotations

import ast
from pathlib import Path

# The file of each part, and the classes, methods or functions to write; "" is the whole file.
EXERCISES: dict[str, tuple[str, tuple[str, ...]]] = {
    "norm": ("llama.py", ("LayerNorm", "RMSNorm")),
    "rope": ("rope.py", ("",)),
    "scores": ("llama.py", ("Attention.compute_query_key_value_scores",)),
    "attention": ("llama.py", ("Attention.forward", "Attention.attend")),
    "block": ("llama.py", ("LlamaLayer", "FeedForward")),
    "model": ("llama.py", ("Llama.forward", "Llama.residual_stream", "Llama.last_hidden")),
    "generate": ("llama.py", ("Llama.generate",)),
    "adamw": ("optimizer.py", ("AdamW", "one_by_one", "in_one_pass")),
    "zero_shot": ("classifier.py", ("LlamaZeroShotClassifier",)),
    "classifier": ("classifier.py", ("LlamaEmbeddingClassifier",)),
    "lora": ("lora.py", ("",)),
}
# The module of each part.
HOMES = {part: name.removesuffix(".py") for part, (name, _) in EXERCISES.items()}


def unimplemented(folder: Path, part: str) -> list[str]:
    """The functions of a part that have no body yet, as `llama.py, LayerNorm.forward`."""
    name, wanted = EXERCISES[part]
    try:
        tree = ast.parse((folder / name).read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    found = [qualified for qualified, function in functions(tree) if is_empty(function)]
    return [f"{name}, {one}" for one in found if any(f"{one}.".startswith(f"{top}." if top else "") for top in wanted)]


def functions(tree: ast.AST, prefix: str = "") -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """The functions and methods of a module, with their qualified names."""
    found: list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            found += functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.append((f"{prefix}{node.name}", node))
    return found


def is_empty(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function raises NotImplementedError somewhere, or does nothing: `pass`, `...`, `return None`."""
    if any(isinstance(node, ast.Raise) and is_not_implemented(node.exc) for node in ast.walk(function)):
        return True
    return all(does_nothing(statement) for statement in function.body)


def is_not_implemented(raised: ast.expr | None) -> bool:
    named = raised.func if isinstance(raised, ast.Call) else raised
    return isinstance(named, ast.Name) and named.id == "NotImplementedError"


def does_nothing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)  # a docstring or `...`
    if isinstance(statement, ast.Return):
        return statement.value is None or isinstance(statement.value, ast.Constant) and statement.value.value is None
    return isinstance(statement, ast.Pass)
