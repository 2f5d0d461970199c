"""Reading a recipe file, strictly: YAML with lines, overrides, and errors that name file, line and key.

A key that is unknown, duplicated or of the wrong type is a `RecipeError` before torch does anything:

    recipe = load_recipe("launch/recipes/quickstart.yaml", overrides=["training.learning_rate=1e-4"])
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from fvae_dist.training.recipe import Recipe, RecipeError
from fvae_dist.training.recipe_help import section_of, unknown_key

_Schema = TypeVar("_Schema", bound=BaseModel)
_MAX_NODES = 100_000  # a recipe has a hundred; aliases of aliases of aliases can expand to billions
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # neither can stand in a path

# Tokens of the Hugging Face and GitHub hubs, and a password in an address.
_SECRET = re.compile(r"\b(hf|api_org|gh[pousr])_[A-Za-z0-9]{20,}|://[^/\s:@]*:[^/\s@]+@")


class _Loader(yaml.SafeLoader):
    """SafeLoader (YAML 1.1) that reads 1e-4 as a number, and dates and 1:30 as the text they are, as YAML 1.2 does."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, IndexError, AttributeError, TypeError):
            problem = f"{_shortened(repr(node.value))} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


_OWN_RULES = {
    "tag:yaml.org,2002:timestamp": None,
    "tag:yaml.org,2002:int": r"^[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]+|0|[1-9][\d_]*)$",
    "tag:yaml.org,2002:float": r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|"
    r"^\.(nan|NaN|NAN)$",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OWN_RULES]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _OWN_RULES.items():
    if _pattern is not None:
        _Loader.add_implicit_resolver(_tag, re.compile(_pattern, re.ASCII), list("-+0123456789."))


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: YAML file.
        overrides: `section.key=value` strings; the value is YAML, list items are addressed by index.

    Raises:
        RecipeError: with file, line and key, and for an unknown key the nearest known one.
    """
    return load_strictly(path, Recipe, overrides)


def load_strictly(path: str | Path, schema: type[_Schema], overrides: list[str] | None = None) -> _Schema:
    """Read, override and check a YAML file that `schema` describes, as `load_recipe` does."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", None) or error
        raise RecipeError(f"{path}: cannot read the {schema.__name__.lower()}: {str(reason).lower()}") from None
    value, lines = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        kind = schema.__name__.lower()
        raise RecipeError(f"{path}: a {kind} is a mapping with the sections {', '.join(schema.model_fields)}")
    value = _without_aliases(value)
    overridden = {_apply_override(value, text) for text in overrides or []}
    return validate(schema, value, str(path), lines, overridden)


def parse_yaml(text: str, origin: str) -> tuple[Any, dict[tuple, int]]:
    """Parse `text`; return its value and the line (1-based) of every key path.

    Raises:
        RecipeError: not YAML, or a key stands twice in one mapping; names `origin` and the line.
    """
    lines: dict[tuple, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _walk(node, (), lines, origin)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{origin}:{mark.line + 1}" if mark else origin
        raise RecipeError(f"{where}: not valid YAML: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"{origin}:{line}: not valid YAML: character #x{error.character:04x} ({error.reason})"
        ) from None
    except RecursionError:
        raise RecipeError(f"{origin}: not a recipe: nested too deeply") from None


def _walk(node: yaml.Node, path: tuple, lines: dict[tuple, int], origin: str) -> None:
    """Note the line of every key and list item below `node`; refuse what no recipe can mean."""
    if len(lines) > _MAX_NODES:
        raise RecipeError(f"{origin}: not a recipe: more than {_MAX_NODES} values once its aliases are expanded")
    line = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
            dotted = ".".join(map(str, (*path, key)))
            if key_node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise RecipeError(f"{origin}:{line}: the key {dotted} is not text; put it in quotes")
            if key in seen:
                raise RecipeError(f"{origin}:{line}: duplicate key {dotted} (first on line {seen[key]})")
            seen[key] = line
            lines[(*path, key)] = line
            _walk(value_node, (*path, key), lines, origin)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            _walk(item, (*path, index), lines, origin)
    elif _NOT_TEXT.search(node.value):
        raise RecipeError(f"{origin}:{line}: {'.'.join(map(str, path))}: holds a NUL or half a surrogate pair")
    elif _SECRET.search(node.value):
        # The recipe goes into logs and model cards.
        raise RecipeError(
            f"{origin}:{line}: {'.'.join(map(str, path))}: holds an access token or password; give it by HF_TOKEN, or "
            "log in with `hf auth login`"
        )


def _without_aliases(value: Any) -> Any:
    """A copy in which nothing is shared, so that an override changes one place only."""
    if isinstance(value, dict):
        return {key: _without_aliases(item) for key, item in value.items()}
    return [_without_aliases(item) for item in value] if isinstance(value, list) else value


def _apply_override(value: dict[str, Any], text: str) -> tuple:
    """Set one `section.key=value` in `value`; return the key path."""
    key, separator, raw = text.partition("=")
    key = key.strip()
    if not separator or not key:
        raise RecipeError(f"--set {text}: write section.key=value")
    parsed, _ = parse_yaml(raw, f"--set {key}")
    parts = key.split(".")
    target: Any = value
    path: tuple = ()
    for part in parts:
        step: str | int = part
        if isinstance(target, list):
            if not re.fullmatch(r"[0-9]{1,9}", part) or int(part) >= len(target):
                raise RecipeError(f"--set {key}: {'.'.join(map(str, path))} is a list of {len(target)} (first: 0)")
            step = int(part)
        elif not isinstance(target, dict):
            raise RecipeError(f"--set {key}: {'.'.join(map(str, path))} is not a section")
        path = (*path, step)
        if len(path) == len(parts):
            target[step] = parsed
        elif isinstance(target, dict) and target.get(part) is None:
            target[part] = {}
        target = target[step]
    return path


def validate(
    schema: type[_Schema],
    value: dict[str, Any],
    origin: str,
    lines: dict[tuple, int] | None = None,
    overridden: set[tuple] | None = None,
) -> _Schema:
    """Check a parsed file; `lines` and `overridden` say where each key came from, for the message."""
    lines = lines or {}
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        errors = error.errors()
    # A misspelt key is also a missing one: what it should be called helps more.
    first = next((detail for detail in errors if detail["type"] == "extra_forbidden"), errors[0])
    loc, message = tuple(first["loc"]), _explain(first, schema)
    if not loc:  # a contradiction between sections: the message opens with the key
        dotted, _, message = message.partition(": ")
        loc = tuple(dotted.split("."))
    dotted = ".".join(map(str, loc))
    by_override = any(
        loc[: len(path)] == path or (loc == path[: len(loc)] and loc not in lines) for path in overridden or ()
    )
    line = next((lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in lines), None)
    where = f"--set {dotted}" if by_override else f"{origin}:{line}: {dotted}" if line else f"{origin}: {dotted}"
    raise RecipeError(f"{where}: {message}") from None


def _explain(error: Any, schema: type[BaseModel]) -> str:
    loc, given = error["loc"], error.get("input")
    if error["type"] == "extra_forbidden":
        return unknown_key(str(loc[-1]), _known_keys(schema, loc[:-1]))
    if error["type"] == "missing":
        return "missing (required)"
    message = "must be a mapping of keys" if error["type"] == "model_type" else error["msg"]
    if error["type"] == "value_error":
        return message.removeprefix("Value error, ")
    return message if isinstance(given, (dict, list)) else f"{message} (got {_shortened(repr(given))})"


def _known_keys(section: type[BaseModel], loc: tuple) -> list[str]:
    for part in loc:
        if isinstance(part, int):
            continue
        section = section_of(section.model_fields[part].annotation) or section
    return list(section.model_fields)


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:40]}...{text[-10:]}"
