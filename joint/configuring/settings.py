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

import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from itertools import takewhile
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import FloatNode, IntegerNode

from joint.configuring import sources
from joint.configuring.sources import (
    Place,
    Problems,
    Tree,
    at,
    find,
    merge,
    near_miss,
    nearest,
    place,
    raise_all,
    raise_at,
    read,
    suggest,
)
from joint.configuring.unread import UNREAD, UnreadError

__all__ = [
    "Tree",
    "at",
    "attempt",
    "decode",
    "differences",
    "dump",
    "merge",
    "near_miss",
    "nearest",
    "place",
    "plain",
    "raise_all",
    "raise_at",
    "read",
]

T = TypeVar("T")
MOST_PLACES = 3  # of a key that a message names


@dataclass
class _Reading:
    """What is gathered while a tree is decoded into a dataclass."""

    keys: list[str]  # all that there are, as dotted paths; NAME for a name of the user's choice
    also_called: Mapping[str, str]  # other word for a key -> its last words
    meant: set[str] = field(default_factory=set)  # keys that unknown ones were likely meant to be
    problems: Problems = field(default_factory=list)

    def unknown(self, where: Place, path: str, key: str, known: Iterable[str]) -> None:
        """Note a key that its section does not have, and what was likely meant: a key of it, or one elsewhere."""
        close = nearest(key, known)
        if close and key not in self.also_called:
            places, said = [_join(path, close)], f"; did you mean {close}?"
        else:
            places = self._elsewhere(path, self.also_called.get(key, key))
            places = [] if _join(path, key) in places else places  # another kind of this very section has it
            said = f"; did you mean {' or '.join(places[:MOST_PLACES])}?" if places else near_miss(key, known)
        self.meant |= {*places} if len(places) == 1 else set()
        self.problems.append((where, f"{_join(path, key)}: unknown key{said}"))

    def _elsewhere(self, path: str, words: str) -> list[str]:
        """The keys that end in these words, of those the ones that have most of their path in common with `path`."""
        here = path.split(".") if path else []
        found: dict[int, list[str]] = {}
        for key in self.keys:
            if f".{key}".endswith(f".{words}"):
                parts = key.split(".")
                pairs = zip(parts, here, strict=False)
                common = len([*takewhile(lambda pair: pair[0] in ("NAME", pair[1]), pairs)])
                found.setdefault(common, []).append(".".join([*here[:common], *parts[common:]]))
        return found[max(found)] if found else []


def _keys(hint: Any, path: str) -> Iterator[str]:
    """The dotted paths of all keys below a type; what is kept as a tree has any."""
    if is_dataclass(hint) and hint is not Tree:
        for name, inner in get_type_hints(hint).items():
            yield _join(path, name)
            yield from _keys(inner, _join(path, name))
    elif get_origin(hint) is dict:
        yield from _keys(get_args(hint)[1], _join(path, "NAME"))
    elif get_origin(hint) is not Literal:
        for inner in get_args(hint):
            yield from _keys(inner, path)


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
    return value


def attempt(tree: Tree, cls: type[T], *, also_called: Mapping[str, str] | None = None) -> tuple[T, Problems]:
    """`decode` for who has more to check: every mistake, and the value, with `UNREAD` in place of what is wrong.

    A key that an unknown one was likely meant to be is `UNREAD` too, rather than missing or at its default.

    Args:
        also_called: other words for keys, for the near miss of an unknown key; to a key's name or the end of its path.
    """
    keys = list(dict.fromkeys(_keys(cls, "")))
    first = _Reading(keys, also_called or {})
    value = _decode(tree, cls, "", first)
    if not first.meant:
        return value, first.problems
    again = _Reading(keys, also_called or {}, first.meant)
    return _decode(tree, cls, "", again), again.problems


def _decode(tree: Tree, hint: Any, path: str, reading: _Reading) -> Any:
    """The value, or `UNREAD`; what is wrong is added to the problems."""
    try:
        return _value(tree, hint, path, reading)
    except ValueError as error:
        reading.problems += _placed(_lines(error), tree, path)
        return UNREAD


def _lines(error: ValueError) -> list[str]:
    return (str(error) or "not valid").splitlines()


def _placed(lines: Iterable[str], tree: Tree, path: str) -> Iterator[tuple[Place, str]]:
    """Lines at their places: that of the field which a line opens with, or of the mapping."""
    for line in lines:
        word = line.split(" ")[0]
        if path and isinstance(tree.value, dict) and word in tree.value and re.match(r"\w+ (must|is) ", line):
            line, word = line.replace(word, f"{word}:", 1), f"{word}:"
        message = line if not path else f"{path}.{line}" if word.endswith(":") else f"{path}: {line}"
        yield find(tree, word.rstrip(":")).place, message


def _value(tree: Tree, hint: Any, path: str, reading: _Reading) -> Any:
    if hint is Tree:
        return tree
    if tree.value is None and type(None) in _kinds(hint):
        return None
    kinds = [kind for kind in _kinds(hint) if kind is not type(None)]
    if isinstance(tree.value, dict):
        if classes := [kind for kind in kinds if is_dataclass(kind)]:
            return _fields(tree, classes[0] if len(classes) == 1 else _tagged(tree, classes), path, reading)
        if maps := [kind for kind in kinds if get_origin(kind) is dict]:
            return _entries(tree, get_args(maps[0])[1], path, reading)
    elif isinstance(tree.value, list):
        if tuples := [kind for kind in kinds if get_origin(kind) is tuple]:
            return _items(tree, get_args(tuples[0]), path, reading)
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


def _items(tree: Tree, kinds: tuple[Any, ...], path: str, reading: _Reading) -> Any:
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(tree.value)
    if len(kinds) != len(tree.value):
        raise ValueError(f"expected {len(kinds)} items, found {len(tree.value)}")
    pairs = enumerate(zip(tree.value, kinds, strict=True))
    items = tuple(_decode(item, kind, _join(path, index), reading) for index, (item, kind) in pairs)
    return UNREAD if any(item is UNREAD for item in items) else items


def _entries(tree: Tree, hint: Any, path: str, reading: _Reading) -> Any:
    entries = {}
    for key, child in tree.value.items():
        if child.value is not None or type(None) in _kinds(hint):
            entries[key] = _decode(child, hint, _join(path, key), reading)
        elif not child.removes:
            others = [other for other in tree.value if other != key]
            message = f"{_join(path, key)}: nothing to remove{near_miss(key, others)}"
            reading.problems.append((child.place, message))
    return entries


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


def _fields(tree: Tree, cls: Any, path: str, reading: _Reading) -> Any:
    known, hints = {item.name: item for item in fields(cls)}, get_type_hints(cls)
    values = {}
    for key, child in tree.value.items():
        if key not in known and not child.removes:
            reading.unknown(child.place, path, key, known)
    for name, item in known.items():
        child, kinds, own = tree.value.get(name), _kinds(hints[name]), _join(path, name)
        if child and (child.value is not None or type(None) in kinds):
            values[name] = _decode(child, hints[name], own, reading)
        elif own in reading.meant:
            values[name] = UNREAD
        elif _needed(item):
            values[name] = UNREAD
            message = f"{own}: missing; expected {_expected(kinds)}"
            reading.problems.append(((child or tree).place, message))
    return _built(tree, cls, values, path, reading)


def _needed(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _built(tree: Tree, cls: Any, values: dict[str, Any], path: str, reading: _Reading) -> Any:
    """The dataclass of these values; where one is unread, what its checks say of the others is still a mistake."""
    known = {item.name: item for item in fields(cls)}
    unread = {name for name, value in values.items() if value is UNREAD}
    try:
        made = cls(**{name: value for name, value in values.items() if name not in unread or _needed(known[name])})
        if not unread:
            return made
    except UnreadError:
        pass
    except ValueError as error:
        # A line that names what could not be read is about the default in its place.
        lines = [line for line in _lines(error) if not unread & {*re.findall(r"\w+", line)}]
        reading.problems += _placed(lines, tree, path)
        values |= {name: UNREAD for line in lines for name in re.findall(r"^\w+", line) if name in known}
    made = object.__new__(cls)  # without its checks
    for name, item in known.items():
        default = item.default if item.default_factory is MISSING else item.default_factory()
        object.__setattr__(made, name, values.get(name, default))
    return made


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
