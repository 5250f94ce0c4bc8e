"""One figure of a run: its numbers, its drawing, and the words under it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol
from xml.sax.saxutils import quoteattr

from matplotlib.figure import Figure

from services.trainer.figures.figure_data import FigureData
from services.trainer.figures.style import house_style, lay_out, png_bytes, svg_text

Section = Literal["network", "selection", "hcr", "dtl", "fusion", "performance"]
"""Where in the report a figure stands."""


class Draw(Protocol):
    """Draws the columns of a figure, and nothing that does not stand in them."""

    def __call__(self, data: FigureData, *, phantom: bool) -> Figure:
        """The drawing; `phantom` writes the mark on it."""


@dataclass(frozen=True, kw_only=True)
class RunFigure:
    """`name` is the file's stem and the anchor in the report; `caption` says what is shown and how it was computed."""

    name: str
    title: str
    caption: str
    section: Section
    data: FigureData
    draw: Draw
    phantom: bool
    wide: bool = False

    def rendered(self, *, png: bool = True) -> RenderedFigure:
        """The figure's files; the same numbers give the same bytes. ValueError where there is nothing to draw."""
        if self.data.absent:
            raise ValueError(f"{self.name} cannot be drawn: {self.data.absent}")
        with house_style(self.name):
            figure = self.draw(self.data, phantom=self.phantom)
            lay_out(figure)
            return RenderedFigure(
                figure=self,
                svg=svg_text(figure, name=self.name),
                png=png_bytes(figure) if png else b"",
                csv=self.data.csv(),
            )


@dataclass(frozen=True, kw_only=True)
class RenderedFigure:
    """The files of one figure."""

    figure: RunFigure
    svg: str
    png: bytes
    csv: str

    @property
    def inline_svg(self) -> str:
        """The svg element alone, named by the figure's title, to stand in a page."""
        label = quoteattr(self.figure.title)
        return self.svg[self.svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label={label} ', 1)
