"""The one look of all figures: fonts, colours that colour-blind readers can tell apart, and files that repeat.

Colours: Okabe and Ito 2008. Figures are drawn without pyplot, so nothing depends on what was drawn before; SVG ids are
salted with the figure's name and no date is written, so the same numbers give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from services.trainer.results import LABELS, MODELS, ModelName, PartName

PHANTOM_MARK: Final = "PHANTOM DATA: computer-made images, no patients, no clinical meaning"
DPI: Final = 150
"""Of the PNG."""

INK: Final = "#16202a"
SOFT: Final = "#4d5b69"
LINE: Final = "#cfd6dd"
HCR_COLOUR: Final = "#0072b2"
DTL_COLOUR: Final = "#d98200"
KEPT_COLOUR: Final = "#0072b2"
DROPPED_COLOUR: Final = "#b0b8c0"
LIMIT_COLOUR: Final = "#c03a00"

MODEL_COLOURS: Final[dict[ModelName, str]] = {
    "radiomics": "#0072b2",
    "dlr": "#d98200",
    "fusion": "#009e73",
    "dlrn": "#b5307d",
}
MODEL_LINES: Final[dict[ModelName, str | tuple[int, tuple[float, ...]]]] = {
    "radiomics": (0, (5, 2)),
    "dlr": (0, (1.5, 1.5)),
    "fusion": (0, (7, 2, 1.5, 2)),
    "dlrn": "solid",
}
MODEL_OF_LABEL: Final[dict[str, ModelName]] = {LABELS[model]: model for model in MODELS}
PART_TITLES: Final[dict[PartName, str]] = {
    "train": "Training, in-sample",
    "out_of_fold": "Training, out-of-fold",
    "test": "Test, held out",
}

_STYLE: Final[dict[Any, Any]] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
    "text.parse_math": False,
    # measured as drawn elsewhere: a viewer of the SVG does not round the letters as hinting does
    "text.hinting": "none",
    "axes.unicode_minus": True,
}
_ID = re.compile(r'(\bid="|\bxlink:href="#|\bhref="#|url\(#)(?!data:)')


@contextmanager
def house_style(name: str) -> Iterator[None]:
    """Draw and save in the house's look; `name` is the figure's and salts the ids of its SVG."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({**_STYLE, "svg.hashsalt": name})
        yield


def new_figure(*, width: float = 7.2, height: float = 4.6, phantom: bool) -> Figure:
    """An empty figure in inches, marked where its data are phantoms."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.07, wspace=0.03))
    if phantom:
        figure.suptitle(
            PHANTOM_MARK,
            fontsize=8.5,
            fontweight="bold",
            color="black",
            bbox={"boxstyle": "square,pad=0.35", "facecolor": "#ffd400", "edgecolor": "none"},
        )
    return figure


def light_grid(axes: Axes, which: str = "both") -> None:
    """Thin lines behind the data, along the axis or axes named (x, y, both)."""
    axes.grid(visible=True, axis=which, color=LINE, linewidth=0.5)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def legend_below(figure: Figure, axes: Axes, *, columns: int) -> None:
    """One legend for the whole figure under its panels, with the entries of one of them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def lay_out(figure: Figure) -> None:
    """Settle where everything stands, once for all files of a figure.

    One pass does not yet know how large panels of fixed aspect become.
    """
    engine = figure.get_layout_engine()
    if engine is not None:
        for _ in range(3 if any(axes.get_aspect() != "auto" for axes in figure.axes) else 1):
            engine.execute(figure)
    figure.set_layout_engine("none")


def svg_text(figure: Figure, *, name: str) -> str:
    """The figure as SVG without metadata; all its ids begin with the figure's name, so that a page can hold many."""
    buffer = io.BytesIO()
    # the canvas itself: savefig would draw everything twice
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
    return _ID.sub(lambda found: f"{found.group(1)}{name}-", buffer.getvalue().decode("utf-8"))


def png_bytes(figure: Figure) -> bytes:
    """The figure as PNG at 150 dots an inch, without metadata."""
    buffer = io.BytesIO()
    figure.set_dpi(DPI)
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
