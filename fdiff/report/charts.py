"""The report's drawings: matplotlib figures as inline SVG, whose lines and letters take the page's text colour.

Black in a figure becomes `currentColor`, nothing has a background: one drawing serves the light and the dark page.
"""

from __future__ import annotations

import colorsys
import html
import io
import itertools
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fdiff.errors import printable

INK = "#010203"  # stands for the page's text colour until the SVG is written
COLOURS = ("#3b82c4", "#e0803a", "#3d9e6f", "#b65fbf", "#c9a227", "#d3546b", "#4aa8b8", "#8a7cc9")
LINE = 0.17  # inches, of text in a legend or beside a bar
MOST_POINTS = 400  # of a line
LINES_OF_CLIENTS, RUNS_WITH_CLIENTS = 12, 8  # more clients than that are a band, of more runs none are drawn
WIDEST, TALLEST = 12.0, 9.0  # inches, of a heat map
STYLE = {
    "text.parse_math": False,  # a run's name may have dollars
    "svg.fonttype": "none",
    "svg.hashsalt": "fdiff",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": mpl.cycler(color=COLOURS),
    "legend.frameon": False,
    "legend.fontsize": 10,
}
_counter = itertools.count()

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """What a run shows over its rounds: of the raw model, dashed of the moving average, thin of each client.

    Many clients are a band from the lowest to the highest.
    """

    raw: Points
    average: Points = ()
    clients: Sequence[Points] = ()

    def over(self, places: Mapping[int, float]) -> Curve:
        """The same over other places than rounds, of the models' mean; rounds that have none are left out."""
        raw, average = ([(places[int(x)], y) for x, y in p if int(x) in places] for p in (self.raw, self.average))
        return Curve(raw, average)

    def __bool__(self) -> bool:
        """Whether there is anything to show."""
        return bool(self.raw or self.average or self.clients)


@mpl.rc_context(STYLE)
def curves(runs: Mapping[str, Curve], ylabel: str, xlabel: str = "round", log: bool = False) -> str:
    """Lines over rounds, or over what `xlabel` says; with `log`, and no value that is not above 0, on such a scale.

    Each run has its `colour` in all drawings of these runs, empty curves among them, and its name where one points.
    """
    figure, axes = _figure(5.0, 3.0)
    shown = {name: (i, curve) for i, (name, curve) in enumerate(runs.items()) if curve}
    for i, curve in shown.values():
        if len(runs) <= RUNS_WITH_CLIENTS:
            _draw_clients(axes, curve.clients, colour(i))
        for kind, points, style in (("raw", curve.raw, "-"), ("average", curve.average, "--")):
            if points:
                marker = "o" if len(points) < 40 else ""
                line = axes.plot(*_columns(points), style, color=colour(i), linewidth=2, marker=marker, markersize=4)
                line[0].set_gid(f"run{i}-{kind}")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=xlabel == "round"))
    axes.ticklabel_format(useOffset=False)
    lines = [line for _, curve in shown.values() for line in (curve.raw, curve.average, *curve.clients)]
    values = [y for line in lines for _, y in line]
    if log and min(values, default=0) > 0:
        _scale_log(axes)
    names = {str(i): html.escape(printable(name)) for name, (i, _) in shown.items()}
    svg = _svg(figure, f"{ylabel} by {xlabel}")
    return re.sub(r'<g id="[^"]*-run([0-9]+)-[a-z]+">', lambda m: f"{m[0]}<title>{names[m[1]]}</title>", svg)


def _draw_clients(axes: Axes, clients: Sequence[Points], colour: str) -> None:
    if len(clients) <= LINES_OF_CLIENTS:
        for points in clients:
            axes.plot(*_columns(points), color=colour, linewidth=0.8, alpha=0.45)
        return
    values: dict[float, list[float]] = {}
    for x, y in itertools.chain.from_iterable(clients):
        values.setdefault(x, []).append(y)
    rounds = sorted(values)
    low, high = ([(x, end(values[x])) for x in rounds] for end in (min, max))
    (xs, lowest), (_, highest) = _columns(low), _columns(high)
    axes.fill_between(xs, lowest, highest, color=colour, alpha=0.2, linewidth=0)


def _scale_log(axes: Axes) -> None:
    """A logarithmic scale, its numbers written as plain ones, some even where it spans less than a power of ten."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def colour(i: int) -> str:
    """The colour of the i-th run, as #rrggbb: of few a chosen one, of more another hue each."""
    return COLOURS[i] if i < len(COLOURS) else to_hex(colorsys.hls_to_rgb(i * 0.618 % 1, 0.5, 0.5))


@mpl.rc_context(STYLE)
def heat_map(counts: Sequence[Mapping[str, int]], title: str) -> str:
    """Clients by labels, the number of images in each cell; empty cells stay empty."""
    labels = sorted(set().union(*counts), key=lambda text: (len(text), text))
    table = np.array([[of_client.get(label, 0) for label in labels] for of_client in counts])
    width, height = min(WIDEST, 0.48 * len(labels)), min(TALLEST, 0.34 * len(counts))
    figure, axes = _figure(max(3.2, 1.0 + width), 1.0 + height)
    axes.imshow(np.where(table > 0, table, np.nan), cmap="Blues", aspect="auto", vmin=0, vmax=max(1, table.max()))
    if table.size <= 400:
        for (client, column), n in np.ndenumerate(table):
            if n:
                colour = "#ffffff" if n > 0.55 * table.max() else "#10202f"
                axes.text(column, client, str(n), ha="center", va="center", fontsize=8.5, color=colour)
    shown = range(0, len(labels), max(1, -(-len(labels) // 25)))
    names = [printable(labels[i]) for i in shown]
    axes.set(xlabel="label", ylabel="client", xticks=shown, xticklabels=names)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=20))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return _svg(figure, title)


@mpl.rc_context(STYLE)
def bars(values: Mapping[str, float], xlabel: str, highlight: str, note: Mapping[str, str]) -> str:
    """Horizontal bars by name with a note behind each, one of them highlighted."""
    figure, axes = _figure(5.0, 0.9 + 0.42 * len(values))
    names = list(map(printable, values))
    colours = [COLOURS[0] if name == printable(highlight) else "#8fa3b5" for name in names]
    drawn = axes.barh(names, list(values.values()), color=colours, height=0.62)
    axes.bar_label(drawn, [note[name] for name in values], padding=4, fontsize=10, color=INK)
    axes.set(xlabel=xlabel)
    axes.margins(x=0.25)
    axes.invert_yaxis()
    return _svg(figure, xlabel)


@mpl.rc_context(STYLE)
def stacked(parts: Mapping[str, Mapping[str, float]], xlabel: str) -> str:
    """A horizontal bar for each name, cut into its parts; long names take several lines."""
    names = [_folded(name, 22) for name in parts]
    lines = max(name.count("\n") for name in names)
    figure, axes = _figure(5.0, 1.0 + ((0.42 if len(parts) <= 8 else 0.26) + LINE * lines) * len(parts))
    phases = list(dict.fromkeys(itertools.chain.from_iterable(parts.values())))
    left, drawn = np.zeros(len(parts)), {}
    for i, phase in enumerate(phases):
        widths = np.array([of_run.get(phase, 0.0) for of_run in parts.values()])
        drawn[phase] = axes.barh(range(len(parts)), widths, left=left, color=colour(i), height=0.62)
        left += widths
    axes.set(xlabel=xlabel, yticks=range(len(parts)), yticklabels=names)
    axes.invert_yaxis()
    _legend_above(axes, drawn)
    return _svg(figure, xlabel)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure, its size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _columns(points: Points) -> tuple[list[float], list[float]]:
    """The xs and ys of as many of the points as a drawing shows, the last one among them."""
    points = points[:: -(-len(points) // MOST_POINTS)] + points[-1:] if len(points) > MOST_POINTS else points
    return [x for x, _ in points], [float(f"{y:.6g}") for _, y in points]  # equal but for rounding is drawn as equal


def _folded(name: str, width: int) -> str:
    """A name in lines of so many letters, what would act on the text around it escaped."""
    return "\n".join(textwrap.wrap(printable(name), width)) or printable(name)


def _legend_above(axes: Axes, named: Mapping[str, Artist]) -> None:
    """A legend of what was drawn, by name; the figure grows by as much as it needs."""
    names = [_folded(name, 44) for name in named]
    columns = max(1, min(3, len(names), 45 // max(map(len, names))))
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "borderaxespad": 0.2, "handlelength": 1.4}
    legend = axes.legend(list(named.values()), [str(i) for i in range(len(names))], ncols=columns, **place)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)  # as a label, one that begins with an underscore would be left out
    figure, lines = axes.get_figure(), sum(1 + name.count("\n") for name in names)
    figure.set_figheight(figure.get_figheight() + LINE * -(-lines // columns) + 0.15)


def _svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element: as wide as its place on the page, with ids of its own, and a title that is read."""
    buffer = io.StringIO()
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of letters that matplotlib's font lacks
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = printable(buffer.getvalue(), keep="\n")
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    prefix = f"f{next(_counter)}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'((?:xlink:)?href="#|url\(#)', lambda m: m[1] + prefix, text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    width = re.search(r'<svg[^>]*? width="([\d.]+)pt"', text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    limit = f"{1.45 * float(width[1]):.0f}px" if width else "100%"
    label = html.escape(printable(title))
    return text.replace("<svg", f'<svg role="img" aria-label="{label}" style="max-width:{limit}"', 1)
