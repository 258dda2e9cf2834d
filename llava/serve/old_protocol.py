"""Protocol of the original workers: frames of JSON and a zero byte, each with the text so far.

POST /worker_generate_stream --> {"text": prompt + answer so far, "error_code": 0} \\0 ...
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llava.constants import IMAGE_TOKEN
from llava.generation.protocol import Prompt
from llava.samples import Conversation
from llava.serve.answering import Answering, AnswerJob, AnswerService
from llava.serve.application import RESPONSES, body_schema
from llava.serve.failures import RequestError, frame
from llava.serve.gate import read_body, record_of
from llava.serve.messages import RawRequest, parse_generate, parse_json
from llava.serve.openai_server import usage
from llava.serve.schemas import GENERATE_SCHEMA
from llava.serve.streams import with_first

REPEAT_SECONDS = 2.0
"""Silence before the first token after which the bare prompt is repeated; old proxies give up after 5 s."""

FRAMES = "application/octet-stream"


def add_old_routes(app: FastAPI, service: AnswerService) -> None:
    """Add POST /worker_get_status and POST /worker_generate_stream."""

    async def status(request: Request) -> Response:
        return JSONResponse(service.status())

    async def generate(request: Request) -> Response:
        record = record_of(request)
        with service.admission.reading():
            async with service.admission.limited():
                content = await read_body(request)
            body = parse_generate(parse_json(content))
        if body.model is not None:
            service.check_model(body.model)
        record.model = service.model.name
        check_marks(body)
        pieces = frames(body.prompt, service.events(job_of(body), record, beat=REPEAT_SECONDS))
        del body, content  # the texts of its images may be large
        return await with_first(request, pieces, media_type=FRAMES, on_error=RequestError.frame)

    plain: dict[str, Any] = {"response_class": JSONResponse, "responses": RESPONSES}
    app.add_api_route("/worker_get_status", status, methods=["POST"], summary="models and queue length", **plain)
    app.add_api_route(
        "/worker_generate_stream",
        generate,
        methods=["POST"],
        summary="answer a prompt, as the original workers do",
        openapi_extra=body_schema(GENERATE_SCHEMA),
        response_class=Response,
        responses=RESPONSES,
    )


def check_marks(body: RawRequest) -> None:
    """Raise `RequestError` unless a prompt has one `<image>` per image."""
    num_marks = body.prompt.count(IMAGE_TOKEN)
    if num_marks != len(body.images):
        raise RequestError(
            "invalid_value",
            f"the prompt has {num_marks} {IMAGE_TOKEN} for {len(body.images)} images; write one for each image",
            param="images",
        )


def job_of(body: RawRequest) -> AnswerJob:
    """Return the work that a request asks for."""
    prompt = body.prompt
    return AnswerJob(
        lambda images: Prompt(Conversation(()), images, rendered=prompt),
        body.images,
        body.sampling,
        (("prompt", prompt),),
        is_raw=True,
    )


async def frames(prompt: str, events: AsyncGenerator[Answering | None, None]) -> AsyncGenerator[bytes, None]:
    """Yield the frames of an answer; each text begins with the one before."""
    has_begun = False
    async with aclosing(events):
        async for news in events:
            if news is None:
                if not has_begun:
                    yield frame({"text": prompt, "error_code": 0})
                continue
            event, has_begun = news.event, True
            message: dict[str, Any] = {"text": prompt + event.answer, "error_code": 0}
            if event.finish is not None:
                message |= {"finish_reason": event.finish, "usage": usage(event.counts)}
            if event.finish is not None or event.text:
                yield frame(message)
