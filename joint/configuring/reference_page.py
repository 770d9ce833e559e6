"""The page docs/config.md: every key of a config, from the dataclasses themselves. `make golden` writes it.

A class's docstring opens its section; a field's meaning is the comment on its line.
"""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from joint.configuring.settings import plain
from joint.experiment import Config

OPENING = """# Config reference

Made from the dataclasses that a config is decoded into; `make golden` makes it
anew. `python -m joint.config FILE` prints a config as resolved, or every mistake in it. NAME is a name of your choice.
Where a mapping is one of several kinds, a key of its own says which, and each kind has a section.

Beside these keys a file may have `base: FILE`, relative to it: mappings merge with the base's, lists and scalars
replace its own, and `null` removes. On the command line `a.b.c=value` does the same. An ablation has
[keys of its own](compare.md#the-file).
"""
WORDS = {int: "integer", float: "number", bool: "true or false", str: "text"}
TAGS = ("kind", "loss")


def reference() -> str:
    """The page, as Markdown."""
    found, lines = sections(), [OPENING]
    for cls, places in found.items():
        lines += _section(cls, places, tagged=[*found.values()].count(places) > 1)
    return "\n".join(lines)


def sections() -> dict[type, list[str]]:
    """Every dataclass that a config may hold, in the order of the fields that lead there, and the keys it is under."""
    found: dict[type, list[str]] = {}

    def visit(cls: type, place: str) -> None:
        if place in found.setdefault(cls, []):
            return
        found[cls].append(place)
        for name, hint in get_type_hints(cls).items():
            for inner, key in _classes(hint, f"{place}.{name}" if place else name):
                visit(inner, key)

    visit(Config, "")
    return found


def _classes(hint: Any, place: str) -> Iterator[tuple[type, str]]:
    """The dataclasses in a type, and the key of each."""
    if is_dataclass(hint):
        assert isinstance(hint, type)
        yield hint, place
    for inner in get_args(hint) if get_origin(hint) is not Literal else ():
        yield from _classes(inner, f"{place}.NAME" if get_origin(hint) is dict else place)


def _section(cls: type, places: list[str], tagged: bool) -> Iterator[str]:
    """The lines of a section; `tagged` where a key, such as `kind`, tells this class from others in its place."""
    hints = get_type_hints(cls)
    tag = next((name for name in TAGS if name in hints), "") if tagged else ""
    key = places[0] if len(places) == 1 else f"….{places[0].rpartition('.')[2]}"
    title = f"`{key}`" if key else "The whole file"
    yield f"## {title}" + (f" of {tag} {', '.join(get_args(hints[tag]))}" if tag else "") + "\n"
    if len(places) > 1:
        yield f"Under {', '.join(f'`{place}`' for place in places)}.\n"
    yield f"{inspect.getdoc(cls)}\n"
    rows = [item for item in fields(cls) if item.name != tag]
    if rows:
        yield "| key | type | default | meaning |\n|---|---|---|---|"
    for item in rows:
        cells = f"`{item.name}`", _type(hints[item.name]), _default(item), meaning(cls, item.name)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


def meaning(cls: type, name: str) -> str:
    """What a field is for: its comment, what its own class says of itself, or where to look; '' if nobody says it."""
    classes = [inner for inner, _ in _classes(get_type_hints(cls)[name], "")]
    if note := _notes(cls).get(name):
        return note
    if len(classes) == 1:
        return str(inspect.getdoc(classes[0])).splitlines()[0]
    return "one of several kinds" if classes else "see above" if f"`{name}`" in str(inspect.getdoc(cls)) else ""


def _notes(cls: type) -> dict[str, str]:
    """Field -> the comment on its line, in a class or the ones that it extends."""
    found: dict[str, str] = {}
    for base in [base for base in cls.__mro__[::-1] if is_dataclass(base)]:
        for line in inspect.getsource(base).splitlines():
            code, mark, comment = line.partition("  # ")
            name, colon, _ = code.strip().partition(":")
            if mark and colon and name.isidentifier():
                found[name] = comment.strip()
    return found


def _type(hint: Any) -> str:
    """What a value may be, in words."""
    inner, origin = get_args(hint), get_origin(hint)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        classes = [kind for kind in inner if is_dataclass(kind)]
        others = [_type(kind) for kind in inner if not is_dataclass(kind)]
        return " or ".join([*(["mapping"] if classes else []), *others])
    if origin is tuple:
        many = f"list of {len(inner)}" if inner[-1] is not Ellipsis else "list"
        return f"{many}: {_type(inner[0])}"
    if origin is dict:
        return f"NAME: {_type(inner[1])}"
    return "null" if hint is type(None) else WORDS.get(hint, "mapping")


def _default(item: Field[Any]) -> str:
    if item.default is MISSING and item.default_factory is MISSING:
        return "required"
    value = item.default if item.default_factory is MISSING else item.default_factory()
    if is_dataclass(value):
        return "its own"
    return f"`{value if isinstance(value, str) and value else json.dumps(plain(value))}`"
