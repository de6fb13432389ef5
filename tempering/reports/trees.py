"""An explainer's concept tree, and what several of them attend to, drawn. The numbers are ``audits.trees``'."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tempering.reports.charts import Mark, Strip, Svg, join, strips, svg, tag

HERE = Path(__file__).parent
PITCH, TOP, LEFT, RIGHT = 13, 26, 20, 120  # of a drawn tree: a class's height, the heading, room at both sides
Node = tuple[int, int]  # depth and number there; the image is (0, 0)
Tree = Sequence[Mapping[str, Any]]


def whole(tree: Tree) -> bool:
    """Whether every child's parents are there, so that the tree can be drawn."""
    counts = [len(level["parent"]) for level in tree]
    above = [level["parents"] for level in tree]
    joined = all(a == b for a, b in zip(counts[:-1], above[1:], strict=True))
    shared = all([len(row) for row in v["attention"]] == [v["parents"]] * len(v["parent"]) for v in tree)
    return bool(tree) and joined and shared and all(0 <= p < v["parents"] for v in tree for p in v["parent"])


def tree_figure(key: str, tree: Tree, names: Sequence[str] = (), *, css: str = "", width: int = 560) -> Svg:
    """Classes at the right, each joined to the expert that it hears first, and so on back to the image.

    A line is as strong as the share that the child takes of that parent. Experts on no class's way are not drawn.
    """
    ways = [_way(tree, k) for k in range(len(tree[-1]["parent"]))]
    ways.sort()
    rows: dict[Node, list[float]] = {}
    for row, way in enumerate(ways):
        for node in enumerate(way):
            rows.setdefault(node, []).append(TOP + PITCH * (row + 0.5))
    last = len(tree) + 1  # the depth of the classes
    x = [LEFT + (width - RIGHT - LEFT) * depth / last for depth in range(last + 1)]
    at = {node: (x[node[0]], sum(ys) / len(ys)) for node, ys in rows.items()}
    stages = ["image", "stage1", *(str(level["level"]) for level in tree)]
    said = {(d, k): f"{stages[d]} {k}" if d else "image" for d, k in at}
    said |= {(last, k): names[k] if k < len(names) else f"class {k}" for k in range(len(ways))}
    lines = []
    for child, parent in sorted({pair for way in ways for pair in _steps(way)}):
        share = 1.0 if child[0] == 1 else tree[child[0] - 2]["attention"][child[1]][parent[1]]
        title = tag("title", f"{said[child]}: {100 * share:.0f} % of {said[parent]}")
        strength = f"{max(share, 0.15):.2f}"
        lines.append(tag("path", title, class_="line", d=_bend(at[parent], at[child]), stroke_opacity=strength))
    dots = [
        tag("circle", tag("title", said[node]), class_="dot", cx=a, cy=b, r=2 if node[0] == last else 4)
        for node, (a, b) in at.items()
    ]
    texts = [tag("text", name, class_="tick mid", x=a, y=12) for name, a in zip(stages, x, strict=True)]
    texts += [
        tag("text", said[node][:18], class_="tick start", x=a + 7, y=b + 3.5)
        for node, (a, b) in at.items()
        if node[0] == last
    ]
    used = len({way[-2] for way in ways})
    told = f"{len(ways)} classes on {used} of {tree[-1]['parents']} last experts."
    inside = [*texts, tag("g", *lines, *dots, class_=css)]
    return svg(key, "Concept tree", told, inside, width, TOP + PITCH * len(ways) + 8)


def entropy_figure(key: str, found: Mapping[str, Any], *, unannealed: bool = False, width: int = 560) -> Svg:
    """How sparsely each net of ``audits.trees.compared`` routes: a row for each level and net, a dot for each child.

    ``unannealed`` shows the entropies at temperature 1, in place of those at the one that the net ended with.
    """
    per_child = "entropy_unannealed" if unannealed else "entropy"
    rows = []
    for number, level in enumerate(found["most"]):
        for i, (label, tree) in enumerate(found["tree"].items()):
            values, mean = tree[number][per_child], found[per_child][label][level]
            marks = [Mark(v, "", f"{level} {k}: {v:.3f} nats") for k, v in enumerate(values)]
            marks.append(Mark(mean, "", f"mean {mean:.3f} of at most {found['most'][level]:.3f} nats", "mean"))
            rows.append(Strip(f"{level}: {label}", f"a{i}", marks, figure=f"{mean:.3f}"))
    said = "Entropy of what each expert and class takes of the level before; 0 is one parent alone."
    return strips(key, "Routing entropy", said, rows, x_label="entropy, nats", width=width, reference=0.0)


def write_figures(found: Mapping[str, Any], folder: str | Path, *, names: Sequence[str] = ()) -> list[Path]:
    """The figures of ``audits.trees.compared`` as SVG files that stand alone; their paths.

    routing.svg, routing-unannealed.svg, and a tree-LABEL.svg for each net.
    """
    drawn = {"routing": entropy_figure("routing", found)}
    drawn["routing-unannealed"] = entropy_figure("routing-unannealed", found, unannealed=True)
    for i, (label, tree) in enumerate(found["tree"].items()):
        name = "tree-" + (re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-") or str(i))
        drawn[name] = tree_figure(name, tree, names, css=f"a{i}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, picture in drawn.items():
        paths.append(folder / f"{name}.svg")
        paths[-1].write_text(alone(picture), encoding="utf-8", newline="\n")
    return paths


def alone(picture: Svg) -> Svg:
    """A chart with the page's styles in it, as a file of its own."""
    arms = "".join(f".a{i} {{ --c: var(--c{i}) }} " for i in range(7))
    arms += ":root { font-size: 11.5px }"  # which the page's own size would hide
    style = tag("style", Svg((HERE / "page.css").read_text(encoding="utf-8").replace("&", "&amp;") + arms))
    opening, rest = picture.split(">", 1)
    return join([f'{opening} xmlns="http://www.w3.org/2000/svg">', style, rest, "\n"])


def _way(tree: Tree, k: int) -> tuple[int, ...]:
    """The numbers from the image down to class ``k``, one a depth."""
    way = [k]
    for level in reversed(tree):
        way.append(level["parent"][way[-1]])
    return (0, *reversed(way))


def _steps(way: Sequence[int]) -> list[tuple[Node, Node]]:
    """(child, parent) along a way."""
    return [((depth, way[depth]), (depth - 1, way[depth - 1])) for depth in range(1, len(way))]


def _bend(a: tuple[float, float], b: tuple[float, float]) -> str:
    """A curve that leaves and arrives level."""
    middle = (a[0] + b[0]) / 2
    return f"M{a[0]:.1f},{a[1]:.1f}C{middle:.1f},{a[1]:.1f} {middle:.1f},{b[1]:.1f} {b[0]:.1f},{b[1]:.1f}"
