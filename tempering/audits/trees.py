"""Concept trees of students that route their classes, such as KDExplainer's: findings, and a comparison of several.

A tree is the return value of ``net.tree()``: for each routed level, shallow to deep, "level", "parents", each child's
strongest "parent", and the "entropy" of its row; the last level's children are the classes.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tempering.audits.base import Finding
from tempering.audits.intervals import average

Tree = list[dict[str, Any]]


def tree_of(net: nn.Module) -> Tree | None:
    """Return the network's concept tree; None if it has none."""
    method = getattr(net, "tree", None)
    return None if method is None else method()


def branches(tree: Tree) -> dict[str, list[int]]:
    """Return stage -> the expert there that each class descends from, by strongest parents; deep to shallow."""
    names = ["stage1", *(level["level"] for level in tree[:-1])]
    experts, result = tree[-1]["parent"], {}
    for name, level in zip(reversed(names), reversed([{"parent": None}, *tree[:-1]]), strict=True):
        result[name] = experts
        experts = experts if level["parent"] is None else [level["parent"][expert] for expert in experts]
    return result


def compared(explainers: Mapping[str, nn.Module], *, class_names: Sequence[str] | None = None) -> dict[str, Any]:
    """Compare the trees of several trainings of one explainer, such as hard labels, label smoothing and KD.

    Args:
        explainers: label -> a trained network with a ``tree()``.
        class_names: one per class; default: class indices.

    Returns:
        JSON-serializable: "entropy" and "entropy_unannealed", label -> level -> mean in nats of its children's rows (at
        the final temperature, and at 1, which is comparable whether networks were annealed or not); "most", level ->
        the entropy of uniform weights over all parents; "tree" and "branches", label -> stage -> expert -> its
        classes; "alike", stage -> "a | b" -> adjusted Rand index of the two groupings.

    Raises:
        ValueError: if there are no networks, one has no tree, or the trees differ in size.
    """
    trees = {label: tree_of(net) for label, net in explainers.items()}
    if not trees or any(tree is None for tree in trees.values()):
        wrong = [f"{label} ({type(explainers[label]).__name__})" for label, tree in trees.items() if tree is None]
        raise ValueError(f"compared() needs nets with a tree(), such as models.explainer's; got {wrong or 'none'}.")
    valid = {label: tree for label, tree in trees.items() if tree is not None}
    if len({tuple((level["parents"], len(level["parent"])) for level in tree) for tree in valid.values()}) > 1:
        raise ValueError(f"compared() needs trees of the same sizes; those of {', '.join(valid)} differ.")
    first = next(iter(valid.values()))
    names = class_names or [str(k) for k in range(len(first[-1]["parent"]))]
    means = {
        key: {label: _means(tree, key) for label, tree in valid.items()} for key in ("entropy", "entropy_unannealed")
    }
    by_label = {label: branches(tree) for label, tree in valid.items()}
    pairs = list(itertools.combinations(by_label, 2))
    return {
        **means,
        "most": {level["level"]: math.log(level["parents"]) for level in first},
        "tree": valid,
        "branches": {
            label: {stage: _groups(experts, names) for stage, experts in stages.items()}
            for label, stages in by_label.items()
        },
        "alike": {
            stage: {f"{a} | {b}": adjusted_rand(by_label[a][stage], by_label[b][stage]) for a, b in pairs}
            for stage in branches(first)
        },
    }


def adjusted_rand(a: Sequence[int], b: Sequence[int]) -> float:
    """Return the adjusted Rand index of two groupings: 1 if equal, about 0 if unrelated, possibly negative.

    It is 1 for two trivial groupings (all items in one group, or each in its own, in both).

    Reference: Hubert and Arabie, "Comparing Partitions", Journal of Classification 1985.
    """

    def pairs(counts: Counter[Any]) -> int:
        return sum(math.comb(n, 2) for n in counts.values())

    both, left, right = pairs(Counter(zip(a, b, strict=True))), pairs(Counter(a)), pairs(Counter(b))
    chance = left * right / max(1, math.comb(len(a), 2))
    most = (left + right) / 2
    return 1.0 if most == chance else (both - chance) / (most - chance)


def findings(tree: Tree, teacher: Float[Tensor, "N C"], y: Int[Tensor, " N"]) -> list[Finding]:
    """Return metrics of the student's tree, and whether its branches group the classes that the teacher confuses."""
    results = []
    for level in tree:
        entropy, unannealed = (_means([level], key)[level["level"]] for key in ("entropy", "entropy_unannealed"))
        meaning = (
            f"Mean entropy in nats of the weights of {len(level['parent'])} children over {level['parents']} parents: "
            f"0 is a single parent, {math.log(level['parents']):.3f} uniform. At temperature 1, without the effect of "
            f"the schedule, it is {unannealed:.3f}."
        )
        results.append(
            Finding(f"routing_entropy_{level['level']}", "student", entropy, meaning, n=len(level["parent"]))
        )
    branch = torch.tensor(tree[-1]["parent"])
    used = len(branch.unique())
    meaning = f"Last experts that are the strongest parent of some class, of {tree[-1]['parents']}."
    results.append(Finding("experts_used", "student", float(used), meaning, n=len(branch)))
    others = torch.ones_like(teacher).scatter_(1, y.unsqueeze(1), 0.0)
    inside = (branch == branch[y].unsqueeze(1)).to(teacher.dtype) * others
    p = teacher.softmax(-1) * others
    share, chance = (p * inside).sum(-1) / p.sum(-1), inside.sum(-1) / others.sum(-1)
    finite = torch.isfinite(share)
    if used > 1 and finite.any():
        meaning = (
            "Of the probability that the teacher gives to wrong classes, the fraction on classes with the label's last "
            f"expert. By chance it would be {float(chance[finite].mean()):.3f}, the size of the branches."
        )
        results.append(average("branch_share", "both", share[finite], meaning, share=True))
    return results


def _means(tree: Tree, key: str) -> dict[str, float]:
    return {level["level"]: sum(level[key]) / len(level[key]) for level in tree}


def _groups(experts: Sequence[int], names: Sequence[str]) -> dict[str, list[str]]:
    return {str(e): [n for n, expert in zip(names, experts, strict=True) if expert == e] for e in sorted(set(experts))}
