"""Does an exported folder answer its golden requests as the training forward did? Tensor by tensor, and end to end.

Tensors alone do not show a shifted id column or vectors in another order: the ids and scores of whole answers do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from joint.serving.errors import CheckError
from joint.serving.inputs import request_inputs
from joint.serving.manifest import inside, reading
from joint.serving.recommender import Recommender
from joint.serving.requests import Request

Differences = dict[str, float]  # of what, the largest


def check(folder: str | Path, *, verify: bool = True) -> Differences:
    """The largest differences to the training forward, and `overlap`, the least share of ids that agree.

    Raises:
        ExportError: the folder is incomplete, changed or of mixed versions (of changed files only with `verify`).
        CheckError: an answer differs by more than the manifest allows.
    """
    recommender = Recommender(folder, verify=verify)
    said = recommender.manifest.json["selfcheck"]
    asked, answered = (inside(recommender.manifest.folder, said[name]) for name in ("requests", "file"))
    with reading(asked):
        requests = json.loads(asked.read_text())
    with reading(answered), np.load(answered, allow_pickle=False) as file:
        golden = dict(file)
    found = _vectors(recommender, requests, golden)
    overlaps = [1.0]
    for place, request in enumerate(requests):
        expected = {name: golden[f"{name}.{place}"] for name in said["answers"]}
        overlaps += _answers(recommender, request, expected, said, found)
    found["overlap"] = min(overlaps)
    wrong = [name for name, value in found.items() if name != "overlap" and not value <= said["tolerance"]]
    if wrong or found["overlap"] < said["overlap"]:
        told = ", ".join(f"{name} {value:.2e}" for name, value in found.items())
        raise CheckError(
            f"{recommender.manifest.folder}: does not answer as the training forward did: {told}; "
            f"expected differences up to {said['tolerance']:g} of the scale and overlap {said['overlap']:g}"
        )
    return found


def _vectors(recommender: Recommender, requests: list[Request], golden: Mapping[str, np.ndarray]) -> Differences:
    """User vectors of all requests at once, and item vectors as kept and as made anew."""
    if "u" not in golden:
        return {}
    reads = recommender.reads["user_tower"]
    inputs = request_inputs(reads, recommender.items.catalogue, recommender.read(requests))
    rows = golden["rows"]
    return {
        "u": _difference(recommender.run("user_tower", inputs)["u"], golden["u"]),
        "v": _difference(recommender.items.vectors["v"][rows], golden["v"]),
        "item_tower": _difference(recommender.item_vectors(rows)["v"], golden["v"]),
    }


def _answers(
    recommender: Recommender,
    request: Request,
    expected: Mapping[str, np.ndarray],
    said: Mapping[str, Any],
    found: Differences,
) -> list[float]:
    """The overlaps of one request's stages; the largest differences so far are kept in `found`."""
    requests = recommender.read([request])
    user = recommender.run(
        "user_tower", request_inputs(recommender.reads["user_tower"], recommender.items.catalogue, requests)
    )
    overlaps = []
    retrieved = expected["retrieval.rows"]
    if recommender.retrieves:
        rows, scores = recommender.retrieve(user, requests, len(retrieved))
        pairs = _agreement(rows, scores, retrieved, expected["retrieval.scores"], said["tolerance"])
        overlaps.append(_keep(found, "retrieval", *pairs))
    for stage, graph in (("pre_ranking", "prerank_head"), ("ranking", "ranking")):
        if graph in recommender.graphs:
            scores = recommender.score(stage, user, requests, expected[f"{stage}.rows"])
            difference = _difference(scores, expected[f"{stage}.scores"])
            found[stage] = max(difference, found.get(stage, 0.0))
    candidates = None if recommender.retrieves else recommender.items.names(retrieved)
    answer = recommender.recommend(request, said["k"], candidates=candidates)
    pairs = _agreement(
        np.array(answer.ids), np.array(answer.scores), expected["ids"], expected["scores"], said["tolerance"]
    )
    overlaps.append(_keep(found, "answer", *pairs))
    return overlaps


def _keep(found: Differences, name: str, overlap: float, difference: float) -> float:
    found[name] = max(difference, found.get(name, 0.0))
    return overlap


def _agreement(
    ids: np.ndarray, scores: np.ndarray, expected: np.ndarray, expected_scores: np.ndarray, tolerance: float
) -> tuple[float, float]:
    """The share of expected ids that are there, not counting those that tie with the last; and how scores differ."""
    if len(ids) != len(expected):
        return 0.0, np.inf
    if not len(expected):
        return 1.0, 0.0
    place = {word: at for at, word in enumerate(ids.tolist())}
    at = np.array([place.get(word, -1) for word in expected.tolist()])
    slack = tolerance * max(1.0, float(np.abs(expected_scores).max()))
    missing = (at < 0) & (expected_scores > expected_scores.min() + 2 * slack)
    common = at >= 0
    return 1.0 - float(missing.mean()), _difference(scores[at[common]], expected_scores[common])


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a part of the largest expected number where that is above 1; NaN is infinite."""
    if found.shape != expected.shape:
        return np.inf
    if not found.size:
        return 0.0
    largest = np.abs(found - expected).max() / max(1.0, float(np.abs(expected).max()))
    return float(largest) if np.isfinite(largest) else np.inf
