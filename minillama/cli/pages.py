"""HTML pages from the templates in minillama/templates/: one file each, which asks nothing of any other.

A page's content security policy allows its own style and its own script (by the script's hash), and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from minillama.environment import HERE

TEMPLATES = HERE / "minillama" / "templates"
STYLE = TEMPLATES / "style.css"
# What HTML forbids, and lone surrogates, which no file can hold.
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
NONE = "–"  # shown for a missing number


def decimals(value: Any) -> str:
    """A number with three decimals; a dash for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100
    return f"{value:.3f}" if is_number else NONE


class Table(NamedTuple):
    """A table. rows: text cells; link: where the first cell of each row leads; note: below it. words: indices of the
    columns that hold text; the others hold numbers.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    links: Sequence[str] = ()
    notes: Sequence[str] = ()
    words: Sequence[int] = (0,)

    def without_empty(self) -> Table:
        """The table without the columns that have a dash in every row."""
        kept = [i for i in range(len(self.head)) if any(row[i] != NONE for row in self.rows)]
        words = [kept.index(i) for i in self.words if i in kept]
        rows = [[row[i] for i in kept] for row in self.rows]
        return self._replace(head=[self.head[i] for i in kept], rows=rows, words=words)


def clean(value: Any) -> Any:
    """A text without the characters that HTML forbids: each becomes U+FFFD. HTML and other values stay as they are."""
    return FORBIDDEN.sub("\ufffd", value) if type(value) is str else value


@lru_cache(maxsize=1)
def _environment() -> Any:
    """The templates, in which every value is escaped unless it is marked as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=clean,
    )


def render(template: str, **values: Any) -> str:
    """The page of a template with these values.

    script: the name of a script to include; data: what it reads, anything that JSON can hold: no text in it can end the
    script element; connects: whether the script may ask the page's own server.
    """
    from jinja2.utils import markupsafe

    Markup = markupsafe.Markup

    script, data = values.pop("script", None), values.pop("data", None)
    connects = "; connect-src 'self'" if values.pop("connects", False) else ""
    code = (TEMPLATES / script).read_text(encoding="utf-8") if script else ""
    allowed = "'none'"
    if code:
        allowed = f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return (
        _environment()
        .get_template(template)
        .render(
            style=Markup(STYLE.read_text(encoding="utf-8")),
            policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}{connects}",
            script=Markup(code),
            data=Markup(text),
            **values,
        )
    )


def write_page(path: str | Path, page: str) -> None:
    """Writes a page, whole or not at all."""
    from minillama.formats.files import atomic_file

    with atomic_file(path) as file:
        file.write(page)
