"""Parse a method or a temperature policy from text in Python syntax, without evaluating code."""

from __future__ import annotations

import ast
import inspect
import keyword as words
import math
import operator
import re
import sys
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tempering.methods import METHODS
from tempering.methods.base import Method
from tempering.temperature import POLICIES
from tempering.temperature.base import Policy
from tempering.utils.files import sha256_file
from tempering.utils.registry import Registry, import_file, lookup, suggest

EXAMPLE = "dtkd(soft=0.5, temperature=sharpness(4, solve=published))"
CONSTANTS = {"true": True, "false": False, "none": None}
# Python keywords are allowed as bare words: curriculum(form=global)
KEPT = re.compile(rf"=\s*({'|'.join(w for w in words.kwlist if w.lower() not in CONSTANTS)})\b")
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
DEEPEST = 100  # levels of nesting; a sum of n terms has n
OWN_FILE = re.compile(r"([^(),:]+\.py)(?::(.+))?", re.DOTALL)
# arguments whose value must be a policy, so that a typo raises an error
SLOTS = {"temperature": POLICIES, "policy": POLICIES}


def method_from(text: str, temperature: str | None = None) -> Method:
    """Build the method that ``text`` names or calls.

    Examples: "dtkd", "kd(soft=4, hard=1, warmup=20/240)", "sum(kd(hard=0), dkd)".

    Args:
        text: names are case-insensitive; a bare word as an argument is a string, or a method or policy of that name.
            "FILE.py:mine(soft=2)" is a class of your own file, and "FILE.py" the only one there.
        temperature: a policy that replaces the method's own.

    Raises:
        ValueError: for an unknown name or argument, or invalid syntax; suggests the closest name.
    """
    node = _parsed(from_file(text, METHODS))
    if temperature is None:
        return _build(node, METHODS, "method", text)
    kind, call = lookup(_name(node, text), METHODS, "method"), _as_call(node)
    if "temperature" not in inspect.signature(kind.__init__).parameters:
        raise ValueError(
            f"{kind.__name__} takes no temperature; got temperature={temperature!r}. Pass it to a part, as in "
            "sum(kd(hard=0, temperature=sharpness), dkd), or leave it out."
        )
    temperature_node = _parsed(from_file(temperature, POLICIES))
    keywords = [keyword for keyword in call.keywords if keyword.arg != "temperature"]
    replaced = ast.Call(call.func, call.args, [*keywords, ast.keyword("temperature", temperature_node)])
    return _build(replaced, METHODS, "method", text)


def policy_from(text: str) -> Policy:
    """Build the policy that ``text`` names or calls, such as "sharpness(4, solve=std)".

    Raises:
        ValueError: as in ``method_from``.
    """
    return _build(_parsed(from_file(text, POLICIES)), POLICIES, "temperature policy", text)


def from_file(text: str, parts: Registry[Any]) -> str:
    """Return the name or call in "FILE.py:call" after adding the classes of that file; other text is unchanged.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it defines no class of this kind, or several of which ``text`` names none.
    """
    if (own := own_file(text)) is None:
        return text
    path, call = own
    names = _classes(path)[parts.package]
    if call is None and len(names) != 1:
        kind, found = parts.kind.__name__, f"defines {', '.join(names) or 'none'}"
        raise ValueError(f"{path} needs one subclass of {kind}; it {found}. Name one: {path}:NAME(argument=value).")
    return call or names[0]


def is_policy(text: str) -> bool:
    """Return whether a text that ``method_from`` or ``policy_from`` takes is that of a temperature policy."""
    own = own_file(text)
    if own is not None and own[1] is None:
        return not (names := _classes(own[0]))[METHODS.package] and bool(names[POLICIES.package])
    return POLICIES.find(_name(_parsed(from_file(text, POLICIES)), text)) is not None


def own_file(text: str) -> tuple[Path, str | None] | None:
    """Return the file and the call of "FILE.py:call", the call None if there is none; None for other text."""
    match = OWN_FILE.fullmatch(text.strip())
    return None if match is None else (Path(match[1]), match[2])


def _classes(path: Path) -> dict[str, list[str]]:
    """Add the methods and policies of a file to their registries; return their names by package."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}. Write FILE.py, or FILE.py:NAME(argument=value).")
    name = f"own_{path.stem}_{sha256_file(path)[:8]}"
    module = sys.modules.get(name) or import_file(path, name)
    return {parts.package: parts.add_from(module) for parts in (METHODS, POLICIES)}


def _parsed(text: str) -> ast.expr:
    try:
        node = ast.parse(KEPT.sub(r"='\1'", text.strip()), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{_excerpt(text)!r} cannot be parsed ({error}). Write it as in {EXAMPLE!r}.") from error
    level: list[ast.AST] = [node]
    for _ in range(DEEPEST):
        level = [child for parent in level for child in ast.iter_child_nodes(parent)]
    if level:
        raise ValueError(f"{_excerpt(text)!r} is nested more than {DEEPEST} levels deep. Write it as in {EXAMPLE!r}.")
    return node


def _excerpt(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:100]}...{text[-100:]}"


def _build(node: ast.expr, parts: Mapping[str, type[Any]], category: str, text: str) -> Any:
    """Build the method or policy that ``node`` names or calls."""
    kind, call = lookup(_name(node, text), parts, category), _as_call(node)
    parameters = {name: p for name, p in inspect.signature(kind.__init__).parameters.items() if name != "self"}
    positional = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    variadic = next((p for p in parameters.values() if p.kind is p.VAR_POSITIONAL), None)
    if variadic is None and len(call.args) > len(positional):
        first = next(iter(parameters), None)
        hint = f"Name them, as in {first}=...; it" if first else "It"
        raise ValueError(
            f"{kind.__name__} takes {len(positional)} unnamed arguments; got {len(call.args)} in {text!r}. {hint} "
            f"takes: {_listed(parameters)}."
        )
    args = [_value(a, positional[i] if i < len(positional) else variadic, text) for i, a in enumerate(call.args)]
    kwargs: dict[str, Any] = {}
    for keyword in call.keywords:
        name = keyword.arg
        if name is None or name not in parameters or parameters[name] is variadic:
            raise ValueError(
                f"{kind.__name__} has no argument {name or '**'!r}.{suggest(name or '', parameters)} It takes: "
                f"{_listed(parameters)}."
            )
        if name in kwargs:
            raise ValueError(f"{text!r} gives {kind.__name__} the argument {name!r} twice. Keep one of them.")
        kwargs[name] = _value(keyword.value, parameters[name], text)
    try:
        return kind(*args, **kwargs)
    except TypeError as error:
        missing = [n for n, x in parameters.items() if x.default is x.empty and x is not variadic and n not in kwargs]
        example = f" Write {kind.__name__.lower()}({', '.join(f'{n}=...' for n in missing)})." if missing else ""
        raise ValueError(f"{text!r}: {error}.{example}") from error


def _value(node: ast.expr, parameter: inspect.Parameter | None, text: str) -> Any:
    """Return the value of an argument: a number, a string, a list of them, or a method or policy."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return _finite(node.value, node)
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, str)):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _number(node.operand, parameter, text)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        left, right = (_number(side, parameter, text) for side in (node.left, node.right))
        try:
            return _finite(ARITHMETIC[type(node.op)](left, right), node)
        except ZeroDivisionError:
            raise ValueError(f"{ast.unparse(node)} in {text!r} divides by zero.") from None
    if isinstance(node, (ast.Tuple, ast.List)):
        return [_value(item, parameter, text) for item in node.elts]
    if isinstance(node, ast.Name):
        return _word(node, parameter, text)
    if isinstance(node, ast.Call):
        slot = None if parameter is None else SLOTS.get(parameter.name)
        if slot:
            return _build(node, slot, "temperature policy", text)
        return _build(node, _registry_of(_name(node, text)), "method or temperature policy", text)
    raise ValueError(
        f"{ast.unparse(node)} in {text!r} is neither a number, a word, a list of them, nor a method or a policy. Write "
        f"it as in {EXAMPLE!r}."
    )


def _registry_of(name: str) -> Mapping[str, type[Any]]:
    """Return the registry with this name; both if none has it."""
    return next((r for r in (METHODS, POLICIES) if r.find(name) is not None), ChainMap(METHODS, POLICIES))  # pyright: ignore[reportArgumentType]


def _word(node: ast.Name, parameter: inspect.Parameter | None, text: str) -> Any:
    """Return the value of a bare word: true, false, none; a method or policy if allowed; else a string."""
    word = node.id
    if word.lower() in CONSTANTS:
        return CONSTANTS[word.lower()]
    if parameter is None or parameter.name in SLOTS or parameter.kind is parameter.VAR_POSITIONAL:
        return _value(ast.Call(node, [], []), parameter, text)
    is_part = METHODS.find(word) is not None or POLICIES.find(word) is not None
    if is_part and (parameter.default is None or parameter.default is parameter.empty):
        return _value(ast.Call(node, [], []), parameter, text)
    return word


def _number(node: ast.expr, parameter: inspect.Parameter | None, text: str) -> float:
    value = _value(node, parameter, text)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{ast.unparse(node)} in {text!r} is not a number. Write it as in {EXAMPLE!r}.")
    return value


def _finite(value: float, node: ast.expr) -> float:
    """Return a number unchanged; raise ValueError for one that no float can hold, such as 1e999."""
    try:
        if math.isfinite(value):
            return value
    except OverflowError:  # an integer of hundreds of digits
        pass
    raise ValueError(f"{_excerpt(ast.unparse(node))} is too large for a number.")


def _name(node: ast.expr, text: str) -> str:
    head = node.func if isinstance(node, ast.Call) else node
    if not isinstance(head, ast.Name):
        raise ValueError(f"{text!r} is neither a name nor a call of one. Write it as in {EXAMPLE!r}.")
    return head.id


def _as_call(node: ast.expr) -> ast.Call:
    """Return the node as a call; a bare name becomes a call without arguments."""
    return node if isinstance(node, ast.Call) else ast.Call(node, [], [])


def _listed(parameters: Mapping[str, inspect.Parameter]) -> str:
    return ", ".join(f"*{name}" if p.kind is p.VAR_POSITIONAL else name for name, p in parameters.items()) or "none"
