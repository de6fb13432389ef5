"""Read a recipe's flags from a file: a run's facts.json, or a YAML or JSON object of flags. Nothing is executed."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from reprlib import repr  # of bounded length, also of nested aliases
from typing import Any

from tempering.experiments.former_names import present_flags
from tempering.experiments.recipe import annotated_flags, check_flags, find
from tempering.utils.files import verify_object
from tempering.utils.text import REDACTED


def flags_from(path: Path, recipe: str | None, argv: Sequence[str]) -> tuple[Path, tuple[str, ...]]:
    """Return the recipe and the flags of a file; the command line has precedence.

    Args:
        path: a run's folder or facts.json, or a YAML or JSON file: flag -> value, and "recipe".
        recipe: of the command line; None: that of the file.
        argv: flags of the command line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file that cannot be read, or a flag that the recipe does not take, by name.
    """
    path = path / "facts.json" if path.is_dir() else path
    content = _read(path)
    recorded: list[str] | None = None
    if "command" in content and "versions" in content:  # facts of a run
        verify_object(path, content)
        named, recorded = recorded_command(content, path)
    else:
        named = content.pop("recipe", None)
    if recipe is None and named is None:
        raise ValueError(f'{path} names no recipe. Add "recipe": "digits", or type tempering run digits --from {path}')
    file = find(str(recipe or named))
    known = annotated_flags(file)
    words = _to_argv(path, content, known) if recorded is None else present_flags(recorded, known)
    try:
        check_flags(file, words)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    given = {_name(word, known) for word in argv if word.startswith("--")}
    kept = [part for name, part in _by_flag(words, known) if name not in given]
    if hidden := next((part for part in kept if any(REDACTED in word for word in part)), None):
        raise ValueError(f"{path} does not hold the value of {hidden[0].partition('=')[0]}, a secret. Give it again.")
    return file, (*(word for part in kept for word in part), *argv)


def recorded_command(facts: Mapping[str, Any], where: Path) -> tuple[str, list[str]]:
    """Return the recipe and the flags that a run was started with.

    Raises:
        ValueError: if it was not started by ``tempering run``.
    """
    command = facts.get("command") or []
    if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
        raise ValueError(f"the command in {where} is no list of words; got {repr(command)}. The file was edited.")
    if len(command) > 2 and command[1] == "run":
        return command[2], [word for word in command[3:] if word != "--"]
    raise ValueError(
        f"the recipe of {where} is not recorded: it was started by {' '.join(command[:3]) or 'an unknown command'}, "
        "not by tempering run RECIPE."
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}. --from takes a run's facts.json, or YAML or JSON with flags.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = _read_yaml(text) if path.suffix in (".yaml", ".yml") else json.loads(text, object_pairs_hook=_once)
    except ImportError as error:
        raise ImportError(f'{path} needs pyyaml: pip install "tempering[yaml]". A .json file needs nothing.') from error
    except Exception as error:  # yaml's, of many types
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f'{path} must hold flags and their values, such as {{"epochs": 3}}; got {repr(content)}.')
    return content


def _read_yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            _once([(key.value, None) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"])
            return super().construct_mapping(node, deep)

    return yaml.load(text, Loader)  # a SafeLoader: plain values alone


def _once(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    """Make a dict of pairs whose keys differ, also when spelled with other dashes."""
    names = Counter(str(key).replace("-", "_") for key, _ in pairs)
    if twice := next((name for name, count in names.items() if count > 1), None):
        raise ValueError(f"{twice} is given twice.")
    return dict(pairs)


def _to_argv(path: Path, content: Mapping[str, Any], known: Mapping[str, str]) -> list[str]:
    words: list[str] = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        flag, annotation = f"--{name.replace('_', '-')}", known.get(name, "")
        values = value if isinstance(value, list) else [value]
        if any(isinstance(part, (dict, list, set, tuple)) for part in values) or isinstance(value, (dict, set)):
            raise ValueError(f"{path}: {key} needs a value or a list of values; got {repr(value)}.")
        if part := next((part for part in values if str(part).startswith("--")), None):
            raise ValueError(f"{path}: {key} is {repr(part)}, which looks like a flag. Write flags as keys.")
        if isinstance(value, bool) and annotation and not re.search("bool|CompileFlag", annotation):
            raise ValueError(f'{path}: {key} takes no true or false. Write text in quotes, such as {key}: "no".')
        if isinstance(value, bool) and annotation == "bool":
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, bool) and "CompileFlag" in annotation:
            words += [flag] if value else []
        else:
            words += [flag, *map(str, values)]
    return words


def _by_flag(words: Sequence[str], known: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each flag's name, and its words on a command line."""
    starts = [i for i, word in enumerate(words) if word.startswith("--")]
    for start, end in zip(starts, [*starts[1:], len(words)], strict=True):
        yield _name(words[start], known), list(words[start:end])


def _name(word: str, known: Mapping[str, str]) -> str:
    name = word[2:].partition("=")[0].replace("-", "_")
    return name if name in known else name.removeprefix("no_")
