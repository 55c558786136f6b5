"""Takes the pictures of docs/pictures/ from pages in a folder: `make_pictures.py FOLDER INTO`. Needs Chromium."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from browser import browser

# Of the X-ray: the "She" and the map in which it reads "Anna" most, and no token more.
LOOKS_BACK = """
const s = tokens.indexOf("␣Anna"), readers = range(T).filter((t) => tokens[t] === "␣She");
const all = readers.flatMap((t) => range(L * H).map((i) => ({ t, s, layer: Math.floor(i / H), head: i % H })));
const value = ({ t, layer, head }, at = s) => weight(layer, head, t, at);
const most = all.filter((one) => range(one.t).every((other) => value(one, other) <= value(one)));
choose(most.sort((a, b) => value(b) - value(a))[0]);
"""
# The third part, without the bar of tokens, and without the room that the page keeps for the bar.
DECIDED = """
choose({ t: data.prompt - 1 });
document.querySelector("nav").remove();
document.querySelector("#part-3").style.scrollMarginTop = 0;
"""
# name: page, width, height, colours, script, part of the page
PICTURES = {
    "xray": ("xray.html", 1100, 760, "light", LOOKS_BACK, None),
    "xray-lens": ("xray.html", 1100, 860, "dark", DECIDED, "#part-3"),
    "report": ("report.html", 1100, 775, "light", "", None),
    "wise-ft": ("wise-ft.html", 640, 560, "light", "", None),
}


def main() -> None:
    folder, into = (Path(name).resolve() for name in sys.argv[1:])
    with tempfile.TemporaryDirectory() as profile, browser(profile) as tab:
        for name, (page, width, height, scheme, script, part) in PICTURES.items():
            tab.open((folder / page).as_uri(), width=width, height=height, scheme=scheme)
            tab.run(f"{{ {script} }}")
            if part is not None:
                tab.run(f"document.querySelector('{part}').scrollIntoView()")
            tab.screenshot(into / f"{name}.png", whole=False)
            assert tab.problems == [], tab.problems


if __name__ == "__main__":
    main()
