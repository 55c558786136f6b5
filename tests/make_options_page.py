"""Makes docs/options.md from the commands of run_llama.py: `python tests/make_options_page.py`."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minillama.cli.options import COMMON, Command, Flag  # noqa: E402
from minillama.commands import COMMANDS  # noqa: E402

PAGE = ROOT / "docs" / "options.md"
HEAD = """\
# All options

Made from the program by `make docs`; do not edit. `python run_llama.py --option COMMAND --help` shows the same in the
terminal. `-` and `_` are the same in the name of a flag. [examples/](../examples) has configuration files.

| command | what it does |
|---|---|
"""


def row(flag: Flag, command: Command) -> str:
    """A line of a table: the flag, its help, its default for the command."""
    values = flag.metavar or ", ".join(map(str, flag.settings.get("choices", ())))
    cells = [f"`{flag.name}`" + (f" {values}" if values else ""), flag.help, command.shown_default(flag)]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;").strip() for cell in cells) + " |\n"


def page() -> str:
    text = HEAD + "".join(f"| [{one.name}](#{one.name}) | {one.summary} |\n" for one in COMMANDS)
    for command in COMMANDS:
        text += f"\n## {command.name}\n\n{command.summary[0].upper()}{command.summary[1:]}.\n"
        for group in (*command.groups, COMMON):
            rows = "".join(row(flag, command) for flag in group.flags if flag.key != "option")
            note = " ".join(group.note.split())
            text += f"\n### {command.name}: {group.title}\n\n" + (f"{note}\n\n" if note else "")
            text += f"| flag | what it does | default |\n|---|---|---|\n{rows}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
