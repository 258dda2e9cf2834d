"""Application of a controller: the old protocol's worker registry, and forwarding for both protocols."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from llava.errors import ConfigError
from llava.serve.addresses import is_loopback
from llava.serve.admission import Admission
from llava.serve.application import RESPONSES, Health, add_model_routes, body_schema, guarded, make_app
from llava.serve.failures import RequestError
from llava.serve.gate import AUDITED_HEADER, GateSettings, read_body, record_of
from llava.serve.keys import CLUSTER_HEADER
from llava.serve.messages import parse_json
from llava.serve.metrics import ServerMetrics
from llava.serve.options import checked_url, host_of
from llava.serve.proxy import Forwarder, no_worker
from llava.serve.registry import Registry, WorkerStatus, queue_length_of
from llava.serve.schemas import GENERATE_SCHEMA, NAME_SCHEMA, REGISTER_SCHEMA, chat_schema, is_unicode_text
from llava.utils.jsonl import JSON_ERRORS

logger = logging.getLogger(__name__)

STATUS_SECONDS = 5.0
"""Time in which a worker must report its status."""

EXPIRY_CHECK_SECONDS = 1.0
UNLIMITED = 1 << 30


@dataclass
class Controller:
    """State of a controller.

    Attributes:
        registry: the workers.
        settings: guard rails.
        origins: origins of pages that may ask.
        admission: counts the requests that are passed on, so that they can end before the controller does.
        transport: how workers are reached, for tests.
    """

    registry: Registry
    settings: GateSettings = field(default_factory=GateSettings)
    origins: tuple[str, ...] = ()
    admission: Admission = field(default_factory=lambda: Admission(max_running=UNLIMITED, max_waiting=0))
    transport: Any = None

    def __post_init__(self) -> None:
        self.http = httpx2.AsyncClient(
            trust_env=False,
            transport=self.transport,
            follow_redirects=False,
            timeout=STATUS_SECONDS,
            # A kept-alive connection that a worker is just closing would look like a lost worker.
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
        )
        self.forwarder = Forwarder(self.registry, self.http, self._headers, self.admission)
        self.seen: set[str] = set()
        self.cluster_members: set[str] = set()

    async def watch(self) -> None:
        """Drop silent workers and end their requests, until canceled."""
        while True:
            self.forwarder.expire()
            await asyncio.sleep(EXPIRY_CHECK_SECONDS)

    async def register(self, name: str, status: WorkerStatus | None, *, check_heart_beat: bool) -> None:
        """Add a worker; one without a status is asked for it, and dropped if it does not answer."""
        found = status if status is not None else await self.poll(name)
        if found is None:
            self.registry.remove(name)
            return
        self.registry.register(name, found, check_heart_beat=check_heart_beat)
        self.seen.update(found.model_names)
        logger.info("worker %s is registered for %s", name, ", ".join(found.model_names))

    async def refresh(self) -> None:
        """Ask all workers for their status again."""
        names = {name: self.registry.checks_heart_beat(name) for name in self.registry.names}
        found = await asyncio.gather(*(self.poll(name) for name in names))
        for (name, checks), status in zip(names.items(), found, strict=True):
            if status is None:
                self.forwarder.drop(name)
            else:
                await self.register(name, status, check_heart_beat=checks)

    async def poll(self, name: str) -> WorkerStatus | None:
        """Return the status that a worker reports; None if it cannot be obtained."""
        try:
            response = await self.http.post(f"{name}/worker_get_status", headers=self._headers(name))
            return WorkerStatus.of(response.json()) if response.status_code == 200 else None
        except (httpx2.HTTPError, httpx2.InvalidURL, *JSON_ERRORS) as error:
            logger.warning("worker %s does not report its status (%s)", name, type(error).__name__)
            return None

    async def describe(self, request: Request) -> list[dict[str, Any]]:
        """Return the entries of GET /v1/models, as the workers describe their models."""
        entries: dict[str, dict[str, Any]] = {}
        for model in self.registry.models():
            for name in self.registry.workers_of(model):
                if entry := await self._entry(name, model, request):
                    entries[model] = entry
                    break
        return list(entries.values())

    async def _entry(self, name: str, model: str, request: Request) -> dict[str, Any] | None:
        headers = self._headers(name)
        if "authorization" in request.headers:
            headers["authorization"] = request.headers["authorization"]
        try:
            response = await self.http.get(f"{name}/v1/models", headers=headers)
            found = response.json()["data"] if response.status_code == 200 else []
            entry = next((entry for entry in found if entry.get("id") == model), None)
            JSONResponse(entry)  # what cannot be written, such as NaN, is no entry
            return entry
        except httpx2.TransportError:
            self.forwarder.drop(name)
        except (httpx2.HTTPError, *JSON_ERRORS, KeyError, TypeError, AttributeError):
            return None
        return None

    def _headers(self, name: str) -> dict[str, str]:
        # The key of the cluster goes to workers that have shown it only.
        is_member = name in self.cluster_members and bool(self.settings.cluster_key)
        return {CLUSTER_HEADER: self.settings.cluster_key} if is_member else {}


def make_controller_app(controller: Controller) -> ASGIApp:
    """Return the application of a controller, with its gate."""
    registry, admission = controller.registry, controller.admission
    metrics = ServerMetrics(
        {
            "llava_requests_running": lambda: admission.num_running,
            "llava_workers": lambda: len(registry.names),
        },
        has_model=False,
    )
    health = Health(
        problem=lambda: "draining" if admission.is_draining else "",
        unready=lambda: "" if registry.models() else "no worker is registered",
    )
    app = make_app("llava controller", metrics, health)
    _add_registry_routes(app, controller)
    _add_answer_routes(app, controller)
    return guarded(app, controller.settings, metrics, origins=controller.origins)


Handler = Callable[[Request], Awaitable[Any]]


def _post(app: FastAPI, path: str, handler: Handler, summary: str, schema: Mapping[str, Any] | None = None) -> None:
    async def route(request: Request) -> Response:
        found = await handler(request)
        return found if isinstance(found, Response) else JSONResponse(found)

    app.add_api_route(
        path,
        route,
        methods=["POST"],
        summary=summary,
        name=path.strip("/"),
        response_class=JSONResponse,
        responses=RESPONSES,
        openapi_extra=None if schema is None else body_schema(schema),
    )


def _add_registry_routes(app: FastAPI, controller: Controller) -> None:
    registry = controller.registry

    async def register(request: Request) -> None:
        fields = await _fields(request, "worker_name")
        name = _worker_name(request, controller, fields["worker_name"])
        checks = fields.get("check_heart_beat", True)
        if not isinstance(checks, bool):
            raise RequestError("invalid_value", "check_heart_beat must be true or false", param="check_heart_beat")
        given = fields.get("worker_status")
        status = None if given is None else _checked(lambda: WorkerStatus.of(given), "worker_status")
        await controller.register(name, status, check_heart_beat=checks)
        controller.forwarder.auditing.discard(name)  # another program may have taken the address
        if AUDITED_HEADER in request.headers:
            controller.forwarder.auditing.add(name)

    async def unregister(request: Request) -> None:
        registry.remove((await _fields(request, "worker_name"))["worker_name"])

    async def refresh(request: Request) -> None:
        await controller.refresh()

    async def models(request: Request) -> dict[str, Any]:
        return {"models": registry.models()}

    async def address(request: Request) -> dict[str, Any]:
        return {"address": registry.choose((await _fields(request, "model"))["model"])}

    async def beat(request: Request) -> dict[str, Any]:
        fields = await _fields(request, "worker_name")
        length = _checked(lambda: queue_length_of(fields.get("queue_length"), "queue_length"), "queue_length")
        return {"exist": registry.beat(fields["worker_name"], length)}

    async def status(request: Request) -> dict[str, Any]:
        return registry.status().as_json()

    _post(app, "/register_worker", register, "add a worker", REGISTER_SCHEMA)
    _post(app, "/unregister_worker", unregister, "drop a worker", NAME_SCHEMA)
    _post(app, "/refresh_all_workers", refresh, "ask all workers for their status")
    _post(app, "/list_models", models, "names of the models")
    _post(app, "/get_worker_address", address, "URL of a worker of a model", {**NAME_SCHEMA, "required": ["model"]})
    _post(app, "/receive_heart_beat", beat, "heartbeat of a worker", NAME_SCHEMA)
    _post(app, "/worker_get_status", status, "sum of the workers, as a worker reports it")


def _add_answer_routes(app: FastAPI, controller: Controller) -> None:
    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": await controller.describe(request)})

    async def model(request: Request) -> Response:
        wanted = request.path_params["name"]
        found = next((one for one in await controller.describe(request) if one["id"] == wanted), None)
        if found is None:
            raise _unknown_model(controller, wanted)
        return JSONResponse(found)

    async def answer(request: Request) -> Response:
        with controller.admission.reading():
            async with controller.admission.limited():
                body = await read_body(request)
        fields = parse_json(body)
        name = fields.get("model")
        if not isinstance(name, str) or not is_unicode_text(name):
            raise RequestError("invalid_value", "model must be the name of a model", param="model")
        if not controller.registry.workers_of(name):
            is_old = record_of(request).protocol == "llava"
            raise no_worker() if is_old else _unknown_model(controller, name)
        record_of(request).model = name
        place = controller.admission.enter(record_of(request).key_id, 1)
        try:
            prompt = fields.get("prompt")
            response = await controller.forwarder.forward(
                request, body, name, affinity_of(fields), prompt=prompt if isinstance(prompt, str) else ""
            )
        except BaseException:
            controller.admission.leave(place)
            raise
        return _Counted(response, lambda: controller.admission.leave(place))

    add_model_routes(app, models, model)
    _post(app, "/v1/chat/completions", answer, "answer a chat", chat_schema())
    _post(app, "/worker_generate_stream", answer, "answer a prompt, as the original workers do", GENERATE_SCHEMA)


class _Counted(Response):
    """Response that is counted until it has been sent."""

    def __init__(self, response: Response, done: Callable[[], None]) -> None:
        self.response = response
        self.done = done
        self.background = None
        self.status_code = response.status_code
        self.raw_headers = response.raw_headers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self.response(scope, receive, send)
        finally:
            self.done()


def affinity_of(fields: Mapping[str, Any]) -> str | None:
    """Return a key of the first image of a request, which other requests about it share; None without one."""
    images = fields.get("images")
    if isinstance(images, list) and images and isinstance(images[0], str):
        return _digest(images[0])
    for message in fields.get("messages") or () if isinstance(fields.get("messages"), list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            image = part.get("image_url") if isinstance(part, dict) else None
            if isinstance(image, dict) and isinstance(image.get("url"), str):
                return _digest(image["url"])
    return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def _unknown_model(controller: Controller, name: str) -> RequestError:
    if name in controller.seen or not controller.registry.names:
        return no_worker()
    return RequestError("model_not_found", "no worker serves such a model; see GET /v1/models", param="model")


async def _fields(request: Request, required: str) -> dict[str, Any]:
    """Return the object in a body, whose field `required` is a text."""
    fields = parse_json(await read_body(request))
    if not is_unicode_text(fields.get(required)):
        raise RequestError("invalid_value", f"{required} must be a string", param=required)
    return fields


def _worker_name(request: Request, controller: Controller, name: str) -> str:
    """Return the URL of a worker that may be registered.

    Raises:
        RequestError: it is not a URL, or a caller without the cluster key names another machine.
    """
    url = _checked(lambda: checked_url(name, "worker_name"), "worker_name")
    if request.scope["state"]["in_cluster"]:
        controller.cluster_members.add(name)
    elif not is_loopback(host_of(url)):
        # A worker that is registered for a model receives the images of its requests.
        raise RequestError("invalid_api_key", "workers on other machines need the cluster key (--cluster-key)")
    return name


def _checked(value: Callable[[], Any], param: str) -> Any:
    try:
        return value()
    except ConfigError as error:
        raise RequestError("invalid_value", str(error), param=param) from None
