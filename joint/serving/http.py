"""A demo over HTTP: one process, no authentication, no limits but those of the recommender. Not hardened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from joint.errors import UserError
from joint.serving.errors import RequestError
from joint.serving.recommender import Recommender

try:
    import fastapi
    import uvicorn
except ImportError as error:
    raise UserError("not installed: fastapi, uvicorn; pip install 'joint-cascade-trainer[http]'") from error


def app_of(recommender: Recommender) -> fastapi.FastAPI:
    """`POST /recommend {"request": {…}, "k": 10}` and `GET /healthz`; a wrong request is a 422 that names the field."""
    app = fastapi.FastAPI(title="joint recommender demo", version=recommender.version)

    @app.get("/healthz")
    def healthz() -> dict[str, Any]:
        return {"version": recommender.version, "model_hash": recommender.manifest.model_hash}

    @app.post("/recommend")
    async def recommend(body: dict[str, Any]) -> dict[str, Any]:  # async: one request at a time
        try:
            return recommender.recommend(body.get("request", {}), body.get("k", 10)).to_json()
        except RequestError as error:
            raise fastapi.HTTPException(422, str(error)) from error

    return app


def serve(folder: Path, port: int) -> None:
    """Serve an export on 127.0.0.1 until interrupted."""
    uvicorn.run(app_of(Recommender(folder)), host="127.0.0.1", port=port, log_level="warning")
