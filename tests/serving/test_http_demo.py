"""The demo answers over HTTP, and names what is wrong with a request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from joint.serving import Recommender

pytest.importorskip("fastapi", reason="the extra [http] is not installed")
pytest.importorskip("uvicorn", reason="the extra [http] is not installed")


def test_the_demo_answers(exported: Path, asked: Callable[..., dict[str, Any]]) -> None:
    test_client = pytest.importorskip("starlette.testclient", reason="httpx is not installed").TestClient
    from joint.serving.http import app_of

    recommender = Recommender(exported)
    client = test_client(app_of(recommender))
    assert client.get("/healthz").json() == {"version": "shop/1", "model_hash": recommender.manifest.model_hash}
    answer = client.post("/recommend", json={"request": asked(), "k": 3})
    assert answer.status_code == 200
    assert answer.json()["ids"] == recommender.recommend(asked(), 3).ids
    wrong = client.post("/recommend", json={"request": asked(agee=1)})
    assert wrong.status_code == 422
    assert client.post("/recommend", json={"request": asked(), "k": "3"}).status_code == 422
    assert "agee: no such field" in wrong.json()["detail"]
