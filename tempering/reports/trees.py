"""Draw an explainer's concept tree, and compare the routing of several. The numbers come from ``audits.trees``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tempering.reports.charts import Mark, Strip, Svg, join, strips, svg, tag
from tempering.utils.text import counted

HERE = Path(__file__).parent
PITCH, TOP, LEFT, RIGHT = 13, 26, 20, 120  # of a drawn tree: height per class, heading, margins
Node = tuple[int, int]  # depth and number there; the image is (0, 0)
Tree = Sequence[Mapping[str, Any]]


def is_complete(tree: Tree) -> bool:
    """Return whether all parents exist, so that the tree can be drawn."""
    counts = [len(level["parent"]) for level in tree]
    above = [level["parents"] for level in tree]
    joined = all(a == b for a, b in zip(counts[:-1], above[1:], strict=True))
    shared = all([len(row) for row in v["attention"]] == [v["parents"]] * len(v["parent"]) for v in tree)
    return bool(tree) and joined and shared and all(0 <= p < v["parents"] for v in tree for p in v["parent"])


def tree_figure(key: str, tree: Tree, names: Sequence[str] = (), *, css: str = "", width: int = 560) -> Svg:
    """Draw classes on the right, each connected to its strongest expert, and so on back to the image.

    The opacity of a line is the child's attention weight of that parent. Experts on no class's path are not drawn.
    """
    paths = [_path_to(tree, k) for k in range(len(tree[-1]["parent"]))]
    paths.sort()
    rows: dict[Node, list[float]] = {}
    for row, path in enumerate(paths):
        for node in enumerate(path):
            rows.setdefault(node, []).append(TOP + PITCH * (row + 0.5))
    last = len(tree) + 1  # the depth of the classes
    x = [LEFT + (width - RIGHT - LEFT) * depth / last for depth in range(last + 1)]
    positions = {node: (x[node[0]], sum(ys) / len(ys)) for node, ys in rows.items()}
    stages = ["image", "stage1", *(str(level["level"]) for level in tree)]
    names_by_node = {(d, k): f"{stages[d]} {k}" if d else "image" for d, k in positions}
    names_by_node |= {(last, k): names[k] if k < len(names) else f"class {k}" for k in range(len(paths))}
    lines = []
    for child, parent in sorted({pair for path in paths for pair in _edges(path)}):
        share = 1.0 if child[0] == 1 else tree[child[0] - 2]["attention"][child[1]][parent[1]]
        title = tag("title", f"{names_by_node[child]}: {100 * share:.0f} % of {names_by_node[parent]}")
        strength = f"{max(share, 0.15):.2f}"
        lines.append(
            tag("path", title, class_="line", d=_curve(positions[parent], positions[child]), stroke_opacity=strength)
        )
    dots = [
        tag("circle", tag("title", names_by_node[node]), class_="dot", cx=a, cy=b, r=2 if node[0] == last else 4)
        for node, (a, b) in positions.items()
    ]
    texts = [tag("text", name, class_="tick mid", x=a, y=12) for name, a in zip(stages, x, strict=True)]
    texts += [
        tag("text", names_by_node[node][:18], class_="tick start", x=a + 7, y=b + 3.5)
        for node, (a, b) in positions.items()
        if node[0] == last
    ]
    used = len({path[-2] for path in paths})
    description = f"{counted(len(paths), 'class')} on {used} of {tree[-1]['parents']} last experts."
    inside = [*texts, tag("g", *lines, *dots, class_=css)]
    return svg(key, "Concept tree", description, inside, width, TOP + PITCH * len(paths) + 8)


def entropy_figure(key: str, comparison: Mapping[str, Any], *, unannealed: bool = False, width: int = 560) -> Svg:
    """Draw the routing entropies of ``audits.trees.compared``: a strip per level and network, a dot per child.

    ``unannealed`` shows the entropies at temperature 1 instead of the final temperature.
    """
    per_child = "entropy_unannealed" if unannealed else "entropy"
    rows = []
    for number, level in enumerate(comparison["most"]):
        for i, (label, tree) in enumerate(comparison["tree"].items()):
            values, mean = tree[number][per_child], comparison[per_child][label][level]
            marks = [Mark(v, "", f"{level} {k}: {v:.3f} nats") for k, v in enumerate(values)]
            marks.append(Mark(mean, "", f"mean {mean:.3f} of at most {comparison['most'][level]:.3f} nats", "mean"))
            rows.append(Strip(f"{level}: {label}", f"a{i}", marks, figure=f"{mean:.3f}"))
    description = "Entropy of each expert's and class's weights over the previous level; 0 is a single parent."
    return strips(key, "Routing entropy", description, rows, x_label="entropy, nats", width=width, reference=0.0)


def write_figures(comparison: Mapping[str, Any], folder: str | Path, *, names: Sequence[str] = ()) -> list[Path]:
    """Write the figures of ``audits.trees.compared`` as standalone SVG files, and return their paths.

    routing.svg, routing-unannealed.svg, and a tree-LABEL.svg per network.
    """
    drawn = {"routing": entropy_figure("routing", comparison)}
    drawn["routing-unannealed"] = entropy_figure("routing-unannealed", comparison, unannealed=True)
    for i, (label, tree) in enumerate(comparison["tree"].items()):
        name = "tree-" + (re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-") or str(i))
        drawn[name] = tree_figure(name, tree, names, css=f"a{i}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, picture in drawn.items():
        paths.append(folder / f"{name}.svg")
        paths[-1].write_text(standalone(picture), encoding="utf-8", newline="\n")
    return paths


def standalone(picture: Svg) -> Svg:
    """Embed the page's styles in a chart, for a standalone file."""
    groups = "".join(f".a{i} {{ --c: var(--c{i}) }} " for i in range(7))
    groups += ":root { font-size: 11.5px }"  # overrides the page's font size
    style = tag("style", Svg((HERE / "page.css").read_text(encoding="utf-8").replace("&", "&amp;") + groups))
    opening, remainder = picture.split(">", 1)
    return join([f'{opening} xmlns="http://www.w3.org/2000/svg">', style, remainder, "\n"])


def _path_to(tree: Tree, k: int) -> tuple[int, ...]:
    """Return the node numbers from the image to class ``k``, one per depth."""
    path = [k]
    for level in reversed(tree):
        path.append(level["parent"][path[-1]])
    return (0, *reversed(path))


def _edges(path: Sequence[int]) -> list[tuple[Node, Node]]:
    """Return (child, parent) pairs along a path."""
    return [((depth, path[depth]), (depth - 1, path[depth - 1])) for depth in range(1, len(path))]


def _curve(a: tuple[float, float], b: tuple[float, float]) -> str:
    """Return a Bezier curve with horizontal ends."""
    middle = (a[0] + b[0]) / 2
    return f"M{a[0]:.1f},{a[1]:.1f}C{middle:.1f},{a[1]:.1f} {middle:.1f},{b[1]:.1f} {b[0]:.1f},{b[1]:.1f}"
