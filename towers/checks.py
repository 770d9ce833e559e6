"""Checks of configs. Every message opens with the name of the field, by which it finds its place in a YAML file."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

FusionOf = Literal["logit", "sigmoid", "exp"]  # what of a task's logit is weighed in a head's served score


def check_counts(**counts: int) -> None:
    """Raise ValueError for a count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def check_positive(**values: float) -> None:
    """Raise ValueError for a value that is not a finite number above 0."""
    for name, value in values.items():
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number above 0, got {value}")


def check_widths(*, least: int = 1, **layers: Sequence[int]) -> None:
    """Raise ValueError unless each is `least` or more positive widths of layers."""
    for name, widths in layers.items():
        if len(widths) < least or any(width < 1 for width in widths):
            raise ValueError(f"{name} must be {'one or more ' * least}positive widths, got {list(widths)}")


def check_dropout(dropout: float) -> None:
    """Raise ValueError unless `dropout` is in [0, 1)."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")


def check_choice(name: str, value: str, *choices: str) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(choices)}, got {value!r}")


def check_fusion(fusion: Mapping[str, float], by_group: Mapping[str, Mapping[str, float]]) -> None:
    """Raise ValueError for a task's weight that is not a finite number, where all are 0, and for what is no group."""
    for weights in (fusion, *by_group.values()):
        for task, weight in weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"fusion weight of {task} must be finite, got {weight}")
        if weights and not any(weights.values()):
            raise ValueError("fusion weighs every task 0; nothing would order the candidates")
    for group, weights in by_group.items():
        if not group.isdecimal() or str(int(group)) != group:
            raise ValueError(f"fusion_by_group: expected the number of a user group, found {group!r}")
        if not weights:
            raise ValueError(f"fusion_by_group: group {group} names no task; leave it out to have it use fusion")
