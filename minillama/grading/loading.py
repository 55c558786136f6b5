"""The modules of a hand-in in the process that runs them: imported when they are asked for, with a word about each.

Modules import each other, so the one that does not load may be another than the one that was asked for. An import hook
tells when each begins and ends, and marks an exception with the innermost module that it came from.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

NAMES = ("config", "rope", "lora", "optimizer", "llama", "classifier", "tokenizer")
MARK = "_does_not_load"

Tell = Callable[..., None]


class Modules(dict[str, ModuleType]):
    """The student's modules by name, imported when they are asked for."""

    def __init__(self, folder: Path, tell: Tell) -> None:
        super().__init__()
        self.folder = folder
        self.failed: dict[str, BaseException] = {}
        sys.meta_path.insert(0, Finder(folder, tell))

    def __missing__(self, name: str) -> ModuleType:
        if name in self.failed:
            raise self.failed[name]
        try:
            self[name] = importlib.import_module(name)
        except BaseException as error:
            self.failed[name] = error
            raise
        return self[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (self.folder / f"{name}.py").is_file()


class Finder:
    """Finds the modules of the course in a folder. Raises ModuleNotFoundError for one that is not there."""

    def __init__(self, folder: Path, tell: Tell) -> None:
        self.folder, self.tell = folder, tell

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name not in NAMES or (self.folder / name / "__init__.py").is_file():
            return None
        file = self.folder / f"{name}.py"
        if not file.is_file():
            error = ModuleNotFoundError(f"there is no {name}.py", name=name)
            mark(error, name)
            raise error
        return spec_from_file_location(name, file, loader=Loader(name, str(file), self.tell))


class Loader(SourceFileLoader):
    """Runs the file of a module, and tells when it begins and when it has ended."""

    def __init__(self, name: str, path: str, tell: Tell) -> None:
        super().__init__(name, path)
        self.tell = tell

    def exec_module(self, module: ModuleType) -> None:
        self.tell(loading=self.name)
        try:
            super().exec_module(module)
        except BaseException as error:
            mark(error, self.name)
            raise
        finally:
            self.tell(loaded=self.name)


def mark(error: BaseException, name: str) -> None:
    """Notes the module that an exception comes from, if none is noted yet."""
    with suppress(Exception):  # a student's exception may refuse it
        if not hasattr(error, MARK):
            setattr(error, MARK, name)


def does_not_load(error: BaseException) -> str:
    """The module in which an exception ended an import; "" if it is no such exception."""
    found = getattr(error, MARK, "")
    return found if isinstance(found, str) else ""
