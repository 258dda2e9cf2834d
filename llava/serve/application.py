"""FastAPI application of a server: error bodies, routes that every server has, and the gate around it.

Importing this module needs the extra `serve`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

import llava
from llava.serve.failures import CODES, RequestError, internal_error
from llava.serve.gate import LEFT, Gate, GateSettings, error_response, log_failure, record_of, refusal
from llava.serve.metrics import ServerMetrics

ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string", "enum": list(CODES)},
            },
        }
    },
}
"""JSON schema of the body of an error."""

JSON_ERROR: dict[str, Any] = {"description": "error", "content": {"application/json": {"schema": ERROR_SCHEMA}}}
RESPONSES: dict[int | str, dict[str, Any]] = {"4XX": JSON_ERROR, "5XX": JSON_ERROR}
"""Documented errors of every route."""


NAME_IN_PATH: dict[str, Any] = {
    "parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
}
"""Documentation of the parameter `name` of a path, which routes read themselves."""


def body_schema(schema: Mapping[str, Any], *, is_required: bool = True) -> dict[str, Any]:
    """Return the documentation of a JSON body; routes read and check their bodies themselves."""
    return {"requestBody": {"required": is_required, "content": {"application/json": {"schema": dict(schema)}}}}


def add_model_routes(app: FastAPI, models: Callable[..., Any], model: Callable[..., Any]) -> None:
    """Add the routes of the list of models and of one model, whose name may contain slashes."""
    plain: dict[str, Any] = {"methods": ["GET"], "response_class": JSONResponse, "responses": RESPONSES}
    app.add_api_route("/v1/models", models, summary="list the models", **plain)
    app.add_api_route("/v1/models/{name:path}", model, summary="describe a model", openapi_extra=NAME_IN_PATH, **plain)


@dataclass(frozen=True, slots=True)
class Health:
    """State of a server for load balancers.

    Attributes:
        problem: returns why the server is not alive; "" if it is.
        unready: returns why it cannot answer; "" if it can.
    """

    problem: Callable[[], str]
    unready: Callable[[], str]


def make_app(title: str, metrics: ServerMetrics, health: Health) -> FastAPI:
    """Return an application with the routes for health, readiness and metrics."""
    settings: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": "/openapi.json"}
    # A redirect of /v1/chat/completions/ would lead clients of a proxy with TLS to plain http.
    app = FastAPI(title=title, version=llava.__version__, redirect_slashes=False, **settings)
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(ClientDisconnect, _on_left)
    app.add_exception_handler(Exception, _on_failure)

    async def alive(request: Request) -> Response:
        return _state(health.problem())

    async def ready(request: Request) -> Response:
        return _state(health.problem() or health.unready())

    async def metrics_text(request: Request) -> Response:
        return Response(metrics.text(), media_type=metrics.content_type)

    plain: dict[str, Any] = {"response_class": Response, "responses": RESPONSES}
    app.add_api_route("/health", alive, methods=["GET"], summary="200 while the server is alive", **plain)
    app.add_api_route("/ready", ready, methods=["GET"], summary="200 once a model can answer", **plain)
    app.add_api_route("/metrics", metrics_text, methods=["GET"], summary="metrics in Prometheus' format", **plain)
    return app


def guarded(app: FastAPI, settings: GateSettings, metrics: ServerMetrics, *, origins: Sequence[str] = ()) -> ASGIApp:
    """Return the application with its gate; pages of `origins` may call it from browsers."""
    if not origins:
        return Gate(app, settings, metrics)
    # Also a page that lacks a key, or asks too often, may read why.
    cors = partial(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type", "x-request-id"],
        expose_headers=["x-request-id", "Retry-After"],
    )
    return Gate(app, settings, metrics, around=cors)


def _state(problem: str) -> Response:
    status = {"status": problem or "ok"}
    return JSONResponse(status, 503 if problem else 200)


async def _on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return await refusal(request, error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        found = RequestError("method_not_allowed", f"{request.method} is not allowed here")
        response = await refusal(request, found)
        response.headers.update(error.headers or {})
        return response
    return await refusal(request, RequestError("not_found", "the server has no such route"))


async def _on_invalid(request: Request, error: Exception) -> Response:
    # The body that FastAPI would send quotes the input.
    return await refusal(request, RequestError("invalid_value", "the request is not valid"))


async def _on_left(request: Request, error: Exception) -> Response:
    record_of(request).code = LEFT
    return Response(status_code=499)  # for server logs only; never sent to a client


async def _on_failure(request: Request, error: Exception) -> Response:
    record = record_of(request)
    record.code = "internal_error"
    log_failure(error, record.request_id)
    return error_response(internal_error(record.request_id), record)
