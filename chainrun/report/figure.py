"""A figure: the same drawing functions make the page's SVG and the PNG."""

from __future__ import annotations

import io
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chainrun.errors import UsageError

INK, FAINT, PAPER = "#1f2731", "#8b95a1", "#fefefd"  # in the page they become its own colours, dark ones too
WIDTH = 11.0  # inches

Axes = Any
Canvas = Any  # a Figure or a SubFigure

_STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "hatch.linewidth": 0.6,
    "path.simplify": True,
}


def library() -> Any:
    """Return matplotlib.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise UsageError(
            f"chainrun report draws with matplotlib, which cannot be imported here ({error}); "
            "pip install 'chainrun[report]'"
        ) from None
    return matplotlib


def dates(axes: Axes) -> None:
    """Let an axis show local time."""
    from matplotlib import dates as calendar

    locator = calendar.AutoDateLocator(minticks=4, maxticks=9)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(calendar.ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]


def day(at: float) -> float:
    """Return a time as matplotlib counts it: local days since 1970."""
    return (at + (time.localtime(at).tm_gmtoff or 0)) / 86400


@contextmanager
def _style(**more: Any) -> Iterator[None]:
    """Draw as is said here, whatever a matplotlibrc says."""
    matplotlib = library()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, **more})
        yield


class Drawing:
    """A figure of the right size, and what is made of it."""

    def __init__(self, height: float) -> None:
        with _style():
            self.figure = library().figure.Figure(figsize=(WIDTH, height))

    def draw(self, draw: Any, *arguments: Any) -> Drawing:
        """Let a function draw on it."""
        with _style():
            draw(self.figure, *arguments)
        return self

    def stack(self, parts: Sequence[tuple[float, Any, Sequence[Any]]]) -> Drawing:
        """Draw several things one below the other: (height, function, its arguments) of each."""
        with _style():
            heights = [height for height, _, _ in parts]
            canvases = self.figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)
            for canvas, (_, draw, arguments) in zip(canvases[:, 0], parts, strict=True):
                draw(canvas, *arguments)
        return self

    def svg(self, name: str) -> str:
        """Return the figure for inside of an HTML page.

        Args:
            name: makes its inner ids differ from those of another figure in the page.
        """
        text = io.StringIO()
        with _style(**{"svg.hashsalt": name}), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a character that the font lacks: the browser has others
            self.figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        svg = text.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = re.sub(r'<g id="\w+">', "<g>", svg)  # nothing refers to them
        svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'role="img"', svg, count=1)
        for colour, variable in ((INK, "ink"), (FAINT, "faint"), (PAPER, "paper")):
            svg = svg.replace(colour, f"var(--{variable})")
        return svg

    def png(self, path: Path) -> None:
        """Write the figure as a PNG.

        Raises:
            OSError: it cannot be written.
        """
        with _style(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.figure.savefig(path, format="png", dpi=130, facecolor="white")
