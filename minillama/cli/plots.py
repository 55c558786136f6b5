"""Charts and confusion matrices as files: standalone SVG with a white background, and PNG through matplotlib."""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path

from minillama.cli.charts import HEIGHT, WIDTH, Chart, Matrix, curves, text
from minillama.cli.pages import STYLE
from minillama.environment import PackageError, optional_package

Plot = Chart | Matrix
CELL = 26  # the height of a cell of a matrix
LINE = 16  # the height of a line of text
LETTER = 6.4  # the usual width of a letter of 11 pixels
LONGEST_NAME = 24  # letters of a class's name


def palette() -> dict[str, str]:
    """The colours of the page in the light, by CSS class. Programs for pictures know no CSS variables."""
    light, _, _ = STYLE.read_text(encoding="utf-8").partition("@media")
    return dict(re.findall(r"--(c\d): (#[0-9a-f]+)", light))


def style() -> str:
    """The style sheet of a standalone drawing."""
    rules = "".join(
        f".{name} polyline,.{name} .key{{stroke:{colour}}}.{name} circle{{fill:{colour}}}"
        for name, colour in palette().items()
    )
    return (
        "text{font:11px system-ui,sans-serif;fill:#1b1b1f}.head{font-size:12px;font-weight:600}.quiet{fill:#5c5f66}"
        ".grid{stroke:#d8dae0}polyline,.key{fill:none;stroke-width:1.6}.dashed polyline,.dashed .key"
        f"{{stroke-dasharray:5 3}}{rules}"
    )


def drawing(width: float, height: float, caption: str, parts: str) -> str:
    """A complete SVG file."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}"><title>{text(caption)}</title><style>{style()}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{parts}</svg>\n'
    )


def heading(title: str, caption: str, width: float) -> tuple[str, int]:
    """The lines of text at the top of a drawing, and the height that they take. title: what the picture is about."""
    letters = max(10, int((width - 16) / LETTER))
    lines = [("head", line) for line in textwrap.wrap(caption, letters - 6)]
    lines += [("quiet", line) for line in textwrap.wrap(title, letters)]
    places = enumerate(lines, start=1)
    drawn = (f'<text class="{kind}" x="8" y="{LINE * i}">{text(line)}</text>' for i, (kind, line) in places)
    return "".join(drawn), LINE * len(lines) + 6


def chart_svg(title: str, chart: Chart) -> str:
    """The file of a chart: heading, curves and legend. The chart has something to draw."""
    lines = chart.drawn()
    parts, top = heading(title, chart.caption, WIDTH)
    parts += f'<g transform="translate(0 {top})">{curves(chart)}</g>'
    y = top + HEIGHT + 10
    for name, _, kind in lines:
        for i, line in enumerate(textwrap.wrap(name, int((WIDTH - 56) / LETTER)) or [""]):
            key = f'<path class="key" d="M12 {y - 4}h22"/>' if i == 0 else ""
            parts += f'<g class="{kind}">{key}<text x="42" y="{y}">{text(line)}</text></g>'
            y += LINE
    return drawing(WIDTH, y, f"{chart.caption}: {title}", parts)


def matrix_svg(title: str, matrix: Matrix) -> str:
    """The file of a confusion matrix. Each cell is shaded by its share of the row."""
    names, blue = [short(name) for name in matrix.names], palette()["c0"]
    longest = max(len(name) for name in names)
    most = max((len(str(n)) for row in matrix.rows for n in row), default=1)
    cell = max(44.0, LETTER * (max(longest, most) + 2))
    left = LETTER * longest + 20
    width = max(left + cell * len(names) + 12, 260)
    parts, top = heading(title, f"{matrix.caption}; rows are true classes, columns predicted ones", width)
    top += 8
    for j, name in enumerate(names):
        x = left + cell * (j + 0.5)
        parts += f'<text class="quiet" x="{x:g}" y="{top + LINE}" text-anchor="middle">{text(name)}</text>'
    for i, (name, row) in enumerate(zip(names, matrix.rows, strict=True)):
        y = top + LINE + 8 + CELL * i
        parts += f'<text x="{left - 8:g}" y="{y + CELL / 2 + 4:g}" text-anchor="end">{text(name)}</text>'
        for j, n in enumerate(row):
            x, share = left + cell * j, n / max(1, sum(row))
            shade = f'fill="{blue}" fill-opacity="{0.65 * share:.3f}"'
            parts += f'<rect x="{x:g}" y="{y:g}" width="{cell:g}" height="{CELL}" {shade}/>'
            parts += f'<text x="{x + cell / 2:g}" y="{y + CELL / 2 + 4:g}" text-anchor="middle">{n}</text>'
    height = top + LINE + 8 + CELL * len(names) + 10
    return drawing(width, height, f"{matrix.caption}: {title}", parts)


def short(name: str) -> str:
    """A class's name, cut if it is long."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."


def write_png(path: Path, title: str, plot: Plot) -> None:
    """Draws the same picture with matplotlib. Needs that package."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from minillama.formats.files import atomic_file

    figure = Figure(figsize=(5, 4), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    if isinstance(plot, Chart):
        for name, points, kind in plot.drawn():
            few = len(points) == 1 or (plot.dots and len(points) <= 40)
            axes.plot(*zip(*points, strict=True), **line_style(kind), marker="o" if few else "", markersize=3)
            axes.lines[-1].set_label(plain(name))
        if plot.across == "step":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(plain(plot.across))
        axes.grid(color="#d8dae0")
        axes.legend(fontsize="small")
    else:
        shares = [[n / max(1, sum(row)) for n in row] for row in plot.rows]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.4)
        for i, row in enumerate(plot.rows):
            for j, n in enumerate(row):
                axes.text(j, i, str(n), ha="center", va="center")
        names = [plain(short(name)) for name in plot.names]
        axes.set_xticks(range(len(names)), names, rotation=30 if len(names) > 4 else 0)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
    axes.set_title("\n".join(line for words in (plot.caption, title) for line in textwrap.wrap(plain(words), 60)))
    with atomic_file(path, "wb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about letters that matplotlib's font lacks
        FigureCanvasAgg(figure).print_png(file)


def plain(words: str) -> str:
    """Text that matplotlib does not read as a formula."""
    return words.replace("$", r"\$")


def line_style(kind: str) -> dict[str, str]:
    """The colour and the stroke of a line's CSS class, in matplotlib's words."""
    return {"color": palette()[kind.split()[0]], "linestyle": "--" if "dashed" in kind else "-"}


def file_name(words: str) -> str:
    """A name for a file on any system, from any text."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", words).strip("-._")[:100] or "plot"


def write_plots(folder: Path, plots: Mapping[tuple[str, str], Plot]) -> str:
    """Writes each plot into the folder, which is created; returns a line about it.

    plots: by (title, a word for the kind). Plots without anything to draw are left out. PNG is left out, and the line
    says why, if matplotlib is missing or broken.
    """
    from minillama.formats.files import atomic_file

    folder.mkdir(parents=True, exist_ok=True)
    drawn = {key: plot for key, plot in plots.items() if isinstance(plot, Matrix) or plot.drawn()}
    used: set[str] = set()
    problem = ""
    try:
        with optional_package("matplotlib", "PNG needs matplotlib"):
            import matplotlib.figure  # noqa: F401
    except PackageError as error:
        problem = f" ({error if error.missing else error.short})"
    for (title, kind), plot in drawn.items():
        name = stem = file_name(f"{title} {kind}")
        while name.lower() in used:
            name = f"{stem}-{len(used)}"
        used.add(name.lower())
        with atomic_file(folder / f"{name}.svg") as file:
            file.write(chart_svg(title, plot) if isinstance(plot, Chart) else matrix_svg(title, plot))
        if not problem:
            write_png(folder / f"{name}.png", title, plot)
    kinds = "SVG" if problem or not drawn else "SVG and PNG"
    return f"wrote {folder}: {len(drawn)} plot{'s' * (len(drawn) != 1)} as {kinds}{problem}"
