"""A tree of settings, decoded into frozen dataclasses and written back; it knows nothing of recommenders.

    tree = read("configs/sdcl.yaml", ["run.seed=1"])
    config = decode(tree, Config)

All that the user got wrong is raised as one `ConfigError`, a line each, in file order:

    configs/sdcl.yaml:34: heads.ranking.trunk.num_expertz: unknown key; did you mean num_experts?

`null` removes what lower sources gave. What is left depends on the type of the place:
- a field of type `X | None` is None; any other field is back at its default, or missing if it has none;
- an entry of a `dict[str, X]` is gone, and so is a key that its dataclass does not know: this is how an
  overlay that changes a `kind` drops the old kind's keys. Where there was nothing to remove it is an error,
  since an ablation would ablate nothing.
"""

import types
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import FloatNode, IntegerNode

from joint import sources
from joint.sources import Problems, Tree, at, find, merge, near_miss, place, raise_all, raise_at, read, suggest

__all__ = [
    "Tree",
    "at",
    "attempt",
    "decode",
    "differences",
    "dump",
    "merge",
    "near_miss",
    "place",
    "plain",
    "raise_all",
    "raise_at",
    "read",
]

T = TypeVar("T")
_NOTHING = object()  # what stands for a value that could not be built


def decode(tree: Tree, cls: type[T]) -> T:
    """Build the dataclass `cls` from `tree`.

    Fields may be int, float, bool, str, `Literal`, dataclasses, `dict[str, X]`, `tuple[X, ...]`,
    `tuple[X, Y]`, and unions of these and None; or `Tree`, kept as it is, for overlays that are merged later.
    In a union of dataclasses the `Literal` field that they share, such as `kind`, says which one is meant.

    A ValueError of `__post_init__` is an error at the mapping, one for each line of its message. A line that
    opens with the name of a field ('lr must be positive', or 'lr: must be positive') is placed at that field.

    Raises:
        ConfigError: with every mistake.
    """
    value, problems = attempt(tree, cls)
    raise_all(problems)
    assert value is not None
    return value


def attempt(tree: Tree, cls: type[T]) -> tuple[T | None, Problems]:
    """`decode` for who has more to check: every mistake, and the value without what is wrong, if that is one.

    An unknown key and a wrong value are left out where nothing else hangs on them: the key has no section below it, the
    field a default. Otherwise the value is None.
    """
    problems: Problems = []
    value = _decode(tree, cls, "", problems)
    return None if value is _NOTHING else value, problems


def _decode(tree: Tree, hint: Any, path: str, problems: Problems) -> Any:
    """The value, or `_NOTHING`; what is wrong is added to the problems."""
    try:
        return _value(tree, hint, path, problems)
    except ValueError as error:
        for line in (str(error) or "not valid").splitlines():
            word = line.split(" ")[0]
            message = line if not path else f"{path}.{line}" if word.endswith(":") else f"{path}: {line}"
            problems.append((find(tree, word.rstrip(":")).place, message))
        return _NOTHING


def _value(tree: Tree, hint: Any, path: str, problems: Problems) -> Any:
    if hint is Tree:
        return tree
    if tree.value is None and type(None) in _kinds(hint):
        return None
    kinds = [kind for kind in _kinds(hint) if kind is not type(None)]
    if isinstance(tree.value, dict):
        if classes := [kind for kind in kinds if is_dataclass(kind)]:
            return _fields(tree, classes[0] if len(classes) == 1 else _tagged(tree, classes), path, problems)
        if maps := [kind for kind in kinds if get_origin(kind) is dict]:
            return _entries(tree, get_args(maps[0])[1], path, problems)
    elif isinstance(tree.value, list):
        if tuples := [kind for kind in kinds if get_origin(kind) is tuple]:
            return _items(tree, get_args(tuples[0]), path, problems)
    elif tree.value is not None:
        return _scalar(tree, kinds)
    raise ValueError(f"expected {_expected(kinds)}, found {sources.found(tree)}")


def _kinds(hint: Any) -> list[Any]:
    """The members of a union, or the type itself."""
    return [*get_args(hint)] if get_origin(hint) in (Union, types.UnionType) else [hint]


def _scalar(tree: Tree, kinds: Sequence[Any]) -> Any:
    """The first that fits of: a literal, the type that YAML saw, another number, the text as written."""

    def rank(kind: Any) -> tuple[bool, ...]:
        return get_origin(kind) is not Literal, kind is not type(tree.value), kind is str

    for kind in sorted(kinds, key=rank):
        with suppress(ValueError):
            return _convert(tree, kind)
    choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    expected, found = _expected(kinds), sources.found(tree)
    only_choices = all(get_origin(kind) is Literal for kind in kinds)
    message = f"{found} is not {expected}" if only_choices else f"expected {expected}, found {found}"
    raise ValueError(message + suggest(tree.text, choices))


def _convert(tree: Tree, kind: Any) -> Any:
    """A scalar as `kind`; ValueError where it does not fit."""
    if kind is str:
        return tree.text
    if kind is int or kind is float:
        return (IntegerNode() if kind is int else FloatNode()).validate_and_convert(tree.value)
    for choice in (True, False) if kind is bool else get_args(kind):
        written = tree.text if isinstance(choice, str) else tree.value
        if type(written) is type(choice) and written == choice:
            return choice
    raise ValueError


def _items(tree: Tree, kinds: tuple[Any, ...], path: str, problems: Problems) -> Any:
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(tree.value)
    if len(kinds) != len(tree.value):
        raise ValueError(f"expected {len(kinds)} items, found {len(tree.value)}")
    pairs = enumerate(zip(tree.value, kinds, strict=True))
    items = tuple(_decode(item, kind, _join(path, index), problems) for index, (item, kind) in pairs)
    return _NOTHING if _NOTHING in items else items


def _entries(tree: Tree, hint: Any, path: str, problems: Problems) -> Any:
    entries = {}
    for key, child in tree.value.items():
        if child.value is not None or type(None) in _kinds(hint):
            entries[key] = _decode(child, hint, _join(path, key), problems)
        elif not child.removes:
            others = [other for other in tree.value if other != key]
            problems.append((child.place, f"{_join(path, key)}: nothing to remove{near_miss(key, others)}"))
    return _NOTHING if _NOTHING in entries.values() else entries


def _tagged(tree: Tree, classes: Sequence[Any]) -> Any:
    """The one of `classes` whose tag `tree` gives."""
    name, tags = _tags(classes)
    tag = tree.value.get(name, Tree(None, tree.place))
    if tag.text in tags:
        return tags[tag.text]
    found = "missing; expected" if tag.value is None else f"{sources.found(tag)} is not"
    raise ValueError(f"{name}: {found} {_one_of(tags)}{suggest(tag.text, tags)}")


def _tags(classes: Sequence[Any]) -> tuple[str, dict[str, Any]]:
    """The Literal field that tells the dataclasses apart, and the class of each of its values."""
    hints = [get_type_hints(cls) for cls in classes]
    for name in hints[0]:
        if all(get_origin(hint.get(name)) is Literal for hint in hints):
            pairs = [(tag, cls) for cls, hint in zip(classes, hints, strict=True) for tag in get_args(hint[name])]
            if len(pairs) == len(dict(pairs)):
                return name, dict(pairs)
    raise TypeError(f"no Literal field tells {', '.join(cls.__name__ for cls in classes)} apart")


def _fields(tree: Tree, cls: Any, path: str, problems: Problems) -> Any:
    known, hints = {item.name: item for item in fields(cls)}, get_type_hints(cls)
    values, whole = {}, True
    for key, child in tree.value.items():
        if key not in known and not child.removes:
            problems.append((child.place, f"{_join(path, key)}: unknown key{near_miss(key, known)}"))
            whole &= not isinstance(child.value, dict)
    for name, item in known.items():
        child, kinds = tree.value.get(name), _kinds(hints[name])
        needed = item.default is MISSING and item.default_factory is MISSING
        if child and (child.value is not None or type(None) in kinds):
            value = _decode(child, hints[name], _join(path, name), problems)
            if value is not _NOTHING:
                values[name] = value
            whole &= value is not _NOTHING or not (needed or isinstance(child.value, dict))
        elif needed:
            message = f"{_join(path, name)}: missing; expected {_expected(kinds)}"
            problems.append(((child or tree).place, message))
            whole = False
    return cls(**values) if whole else _NOTHING


def dump(value: Any) -> str:
    """YAML of a decoded dataclass, in field order, defaults written out; it decodes to an equal value."""
    return sources.write(plain(value))


def plain(value: Any) -> Any:
    """Dataclasses and trees as dicts, tuples as lists, scalars as they are."""
    if isinstance(value, Tree):
        return plain(value.value)
    if is_dataclass(value):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(child) for key, child in value.items()}
    return [plain(child) for child in value] if isinstance(value, list | tuple) else value


def differences(a: Any, b: Any) -> list[str]:
    """Lines such as 'run.seed: 0 != 1' for all that differs between dataclasses, trees or plain mappings."""
    return _differences(plain(a), plain(b), "")


def _differences(a: Any, b: Any, path: str) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        pairs = [(key, a.get(key, MISSING), b.get(key, MISSING)) for key in a | b]
        return [line for key, x, y in pairs for line in _differences(x, y, _join(path, key))]
    x, y = ("(absent)" if value is MISSING else repr(value) for value in (a, b))
    return [] if a == b else [f"{path}: {x} != {y}"]


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _expected(kinds: Sequence[Any]) -> str:
    """'an integer or all' for (int, Literal['all'])."""
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string", tuple: "a list"}
    plain_kinds = [kind for kind in kinds if get_origin(kind) is not Literal and kind is not type(None)]
    words = [names.get(get_origin(kind) or kind, "a mapping") for kind in plain_kinds]
    words += [_one_of(get_args(kind)) for kind in kinds if get_origin(kind) is Literal]
    return " or ".join(dict.fromkeys(words))


def _one_of(choices: Iterable[object]) -> str:
    words = [str(choice) for choice in choices]
    return ("one of " if len(words) > 1 else "") + ", ".join(words)
