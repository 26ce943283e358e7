"""How a YAML file plus ``key=value`` overrides become a configuration, and back."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from imgshared.config.terms import LENGTH
from imgshared.types import InputError

T = TypeVar("T")


def load(kind: type[T], path: Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file, apply ``dotted.key=value`` overrides and validate.

    What is to be text arrives as it was written: ``01``, ``yes`` and ``2024-01-01`` are names where names are wanted.

    Raises
    ------
    InputError
        Names the dotted key and what is wrong with it, and for an unknown key the nearest valid one; for a key that is
        written twice, both lines.
    """
    tree = _read_yaml(path) if path else {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"{override!r} is not key=value")
        names = key.strip().split(".")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            if str not in _kinds(kind, names):  # {channel}.tif and *.png are no YAML, but text
                raise InputError(f"{key}: cannot read {text!r} ({error})") from error
            value = text
        _assign(tree, names, value)
    return validate(kind, tree, str(path or "the command line"))


def validate(kind: type[T], tree: Mapping[str, Any], origin: str) -> T:
    """Turn plain data into a configuration; see `load`. Of text like 2e-4 or yes the schema makes what a key wants."""
    try:
        return TypeAdapter(kind).validate_python(tree)
    except ValidationError as error:
        raise InputError("\n".join(_explain(kind, e, origin) for e in error.errors())) from error


def dump(config: Any) -> str:
    """Return the resolved configuration as YAML that `load` reads back."""
    plain: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(), _Loader)
    except FileNotFoundError as error:
        raise InputError(f"no configuration at {path}") from error
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds no keys")
    return tree


class _Loader(yaml.SafeLoader):
    """YAML in which no key may be written twice, and only nothing (null) and plain numbers are more than text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse what would silently lose the first of two values."""
        lines = dict[str, int]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            name, line = key.value, key.start_mark.line + 1
            if name in lines:
                both = f"line {lines[name]} and again in line {line}"
                raise yaml.YAMLError(f"the key {name!r} stands in {both}: keep one")
            lines[name] = line
        return super().construct_mapping(node, deep)


def _number(_: _Loader, node: yaml.ScalarNode) -> float | str:
    """Return a number where its text is all that it tells; 01 and 1.50 stay text, for they may be names."""
    text = str(node.value)
    if text.lower().endswith((".inf", ".nan")):
        return float(text.replace(".", ""))
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            if str(kind(text)) == text:
                return kind(text)
    return text


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in rules if tag.rsplit(":", 1)[1] in ("null", "int", "float", "merge")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _number)


def _assign(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        below = tree.setdefault(key, {})
        if not isinstance(below, dict):
            raise InputError(f"{'.'.join(keys)}: {key} is a value, not a section")
        tree = below
    tree[keys[-1]] = value


_UNION_MEMBER = re.compile(r"float$|tuple\[|constrained-|function-")  # how pydantic marks which type of a union failed


def _explain(kind: type[Any], error: Any, origin: str) -> str:
    *above, last = _without_tags(kind, [str(part) for part in error["loc"]])
    names = [part for part in above if not _UNION_MEMBER.match(part)]
    unknown = error["type"] in ("unexpected_keyword_argument", "extra_forbidden")
    names += [last] if unknown or not _UNION_MEMBER.match(last) else []
    dotted = ".".join(names)
    if unknown:
        known = sorted(keys(kind, chosen=set(map(str, error["loc"]))))
        close = difflib.get_close_matches(dotted, known, n=1, cutoff=0.5) or [
            k for k in known if k.rsplit(".", 1)[-1] == names[-1]
        ]
        return f"{origin}: unknown key {dotted!r}." + (f" Did you mean {close[0]!r}?" if close else "")
    if error["type"] in ("missing", "missing_argument"):
        return f"{origin}: the key {dotted!r} is missing"
    if error["type"] == "union_tag_invalid":
        return f"{origin}: {dotted}.name {_wrong_tag(error)}"
    if error["type"] == "tuple_type" and isinstance(error["input"], str | int | float):
        return f"{origin}: {dotted} = {error['input']!r} is one value where a list belongs: write [{error['input']}]"
    if error["type"] == "string_pattern_mismatch" and error["ctx"]["pattern"] == LENGTH:
        return f"{origin}: {dotted} = {error['input']!r} is no length: write it with its unit, e.g. '6 um' or '12 px'"
    return f"{origin}: {dotted} = {error['input']!r}: {error['msg']}"


def _wrong_tag(error: Any) -> str:
    tags = re.findall(r"'(\w+)'", error["ctx"]["expected_tags"])
    given = str(error["ctx"]["tag"])
    close = difflib.get_close_matches(given, tags, n=1, cutoff=0.4)
    return f"= {given!r} is none of {', '.join(tags)}." + (f" Did you mean {close[0]!r}?" if close else "")


def _without_tags(kind: type[Any], loc: list[str]) -> list[str]:
    """Drop the names by which pydantic tells the members of a union apart: ``method.apollo.lr`` is ``method.lr``."""
    out: list[str] = []
    members: list[type[Any]] = [kind]
    for part in loc:
        tagged = [m for m in members if len(members) > 1 and _tag(m) == part]
        if tagged:
            members = tagged
            continue
        out.append(part)
        hints = [get_type_hints(m)[part] for m in members if part in get_type_hints(m)]
        members = _sections(hints[0]) if hints else []
    return out


def _kinds(kind: type[Any], names: Sequence[str]) -> list[Any]:
    """Return the types that a key may hold, of a union one after the other; none for an unknown key."""
    members, hints = [kind], list[Any]()
    for name in names:
        hints = [get_type_hints(m)[name] for m in members if name in get_type_hints(m)]
        members = _sections(hints[0]) if hints else []
    return [k for hint in hints[:1] for k in (hint, *get_args(hint))]


def _tag(kind: type[Any]) -> str | None:
    fields: dict[str, Any] = {f.name: f for f in dataclasses.fields(kind)}
    return str(fields["name"].default) if "name" in fields else None


def _sections(hint: Any) -> list[type[Any]]:
    """Return the configuration classes that a key may hold."""
    return [a for a in (hint, *get_args(hint)) if dataclasses.is_dataclass(a) and isinstance(a, type)]


def keys(kind: type[Any], prefix: str = "", chosen: Collection[str] = ()) -> Iterable[str]:
    """Yield every dotted key of a configuration class, of a union the members that `chosen` names."""
    for name, hint in get_type_hints(kind).items():
        yield prefix + name
        members = _sections(hint) if get_origin(hint) is not dict else []
        named = [m for m in members if _tag(m) in chosen]
        for inner in named or members:
            yield from keys(inner, f"{prefix}{name}.", chosen)
