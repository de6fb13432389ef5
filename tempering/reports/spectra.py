"""The spectra of kinds of images, side by side: a line of each, and a map."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tempering.reports.charts import Series, Svg, join, lines, svg, tag
from tempering.reports.trees import alone

SIDE, GAP, TOP, RIGHT = 144, 16, 44, 468  # whole pixels for each of 24 cells


def profile_figure(found: Mapping[str, Mapping[str, Any]], *, key: str = "spectrum") -> Svg:
    """Log-magnitude over frequency, a line for each kind of images.

    Args:
        found: kind, such as "plain" -> what ``data.spectrum.spectrum`` says of its images.
        key: of the chart, in its page.
    """
    series = [
        Series(f"a{i}", f"{name}: {100 * said['high']:.2f} % of the power is high", said["frequency"], said["profile"])
        for i, (name, said) in enumerate(found.items())
    ]
    told = "; ".join(f"{name}: {100 * said['high']:.2f} % of the power is high" for name, said in found.items())
    ticks = [(f, f"{f:g}") for f in (0.1, 0.2, 0.3, 0.4)]  # within the first and last ring
    x, y = "frequency, cycles a pixel", "log magnitude"
    drawn = lines(key, "Spectrum by frequency", told, series, x_label=x, y_label=y, x_ticks=ticks)
    # detail is less than structure: the upper right is free
    names = [tag("text", s.name, class_=f"end halo said {s.css}", x=RIGHT, y=36 + 17 * i) for i, s in enumerate(series)]
    return Svg(drawn.removesuffix("</svg>") + join(names) + "</svg>")


def map_figure(found: Mapping[str, Mapping[str, Any]], *, key: str = "spectra") -> Svg:
    """Mean log-magnitude of every frequency, low ones in the middle, a square for each kind; all on one scale."""
    values = [v for said in found.values() for row in said["map"] for v in row]
    low, high = min(values), max(values)
    parts = []
    for i, (name, said) in enumerate(found.items()):
        left, cell = i * (SIDE + GAP), SIDE / len(said["map"])
        parts.append(tag("text", name, class_="label", x=left, y=16))
        parts.append(tag("text", f"high {100 * said['high']:.2f} %", class_="tick", x=left, y=33))
        cells = []
        for y, row in enumerate(said["map"]):
            for x, value in enumerate(row):
                strength = (value - low) / (high - low) if high > low else 0.0
                at = {"x": left + x * cell, "y": TOP + y * cell, "width": cell, "height": cell}
                cells.append(tag("rect", fill_opacity=f"{strength:.2f}", **at))
        parts.append(tag("g", *cells, fill="var(--c1)"))
    told = "The mean logarithm of the magnitude; low frequencies lie in the middle."
    width = len(found) * (SIDE + GAP) - GAP
    return svg(key, "Spectra", told, parts, width, TOP + SIDE)


def write_spectra(found: Mapping[str, Mapping[str, Any]], folder: str | Path) -> list[Path]:
    """Both figures as files that stand alone, spectrum.svg and spectra.svg; their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, picture in (("spectrum", profile_figure(found)), ("spectra", map_figure(found))):
        paths.append(folder / f"{name}.svg")
        paths[-1].write_text(alone(picture), encoding="utf-8", newline="\n")
    return paths
