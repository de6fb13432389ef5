"""Draw spectra of several kinds of images: radial profiles and maps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tempering.reports.charts import Series, Svg, join, lines, svg, tag
from tempering.reports.trees import standalone

SIDE, GAP, TOP, RIGHT = 144, 16, 44, 468  # integer pixels for each of 24 cells


def profile_figure(spectra: Mapping[str, Mapping[str, Any]], *, key: str = "spectrum") -> Svg:
    """Draw log-magnitude over frequency, one line per kind of images.

    Args:
        spectra: kind, such as "plain" -> output of ``data.spectrum.spectrum`` for its images.
        key: id of the chart, unique on the page.
    """
    series = [
        Series(
            f"a{i}",
            f"{name}: {100 * spectrum['high']:.2f} % of the power is high",
            spectrum["frequency"],
            spectrum["profile"],
        )
        for i, (name, spectrum) in enumerate(spectra.items())
    ]
    description = "; ".join(
        f"{name}: {100 * spectrum['high']:.2f} % of the power is high" for name, spectrum in spectra.items()
    )
    ticks = [(f, f"{f:g}") for f in (0.1, 0.2, 0.3, 0.4)]  # within the first and last ring
    x, y = "frequency, cycles per pixel", "log magnitude"
    drawn = lines(key, "Spectrum by frequency", description, series, x_label=x, y_label=y, x_ticks=ticks)
    # high frequencies have less power, so the upper right is free
    names = [tag("text", s.name, class_=f"end halo said {s.css}", x=RIGHT, y=36 + 17 * i) for i, s in enumerate(series)]
    return Svg(drawn.removesuffix("</svg>") + join(names) + "</svg>")


def map_figure(spectra: Mapping[str, Mapping[str, Any]], *, key: str = "spectra") -> Svg:
    """Draw mean log-magnitude of every frequency, low ones in the center, one square per kind, on a common scale."""
    values = [v for spectrum in spectra.values() for row in spectrum["map"] for v in row]
    low, high = min(values), max(values)
    parts = []
    for i, (name, spectrum) in enumerate(spectra.items()):
        left, cell = i * (SIDE + GAP), SIDE / len(spectrum["map"])
        parts.append(tag("text", name, class_="label", x=left, y=16))
        parts.append(tag("text", f"high {100 * spectrum['high']:.2f} %", class_="tick", x=left, y=33))
        cells = []
        for y, row in enumerate(spectrum["map"]):
            for x, value in enumerate(row):
                strength = (value - low) / (high - low) if high > low else 0.0
                box = {"x": left + x * cell, "y": TOP + y * cell, "width": cell, "height": cell}
                cells.append(tag("rect", fill_opacity=f"{strength:.2f}", **box))
        parts.append(tag("g", *cells, fill="var(--c1)"))
    description = "The mean logarithm of the magnitude; low frequencies are in the center."
    width = len(spectra) * (SIDE + GAP) - GAP
    return svg(key, "Spectra", description, parts, width, TOP + SIDE)


def write_spectra(spectra: Mapping[str, Mapping[str, Any]], folder: str | Path) -> list[Path]:
    """Write both figures as standalone files, spectrum.svg and spectra.svg, and return their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, picture in (("spectrum", profile_figure(spectra)), ("spectra", map_figure(spectra))):
        paths.append(folder / f"{name}.svg")
        paths[-1].write_text(standalone(picture), encoding="utf-8", newline="\n")
    return paths
