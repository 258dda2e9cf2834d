"""Routes of the OpenAI protocol on a worker: models and chat completions, whole or streamed."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llava.generation.protocol import Prompt
from llava.serve.answering import Answering, AnswerJob, AnswerService, ServedModel
from llava.serve.application import RESPONSES, add_model_routes, body_schema
from llava.serve.failures import RequestError
from llava.serve.gate import read_body, record_of, unless_left
from llava.serve.messages import ChatRequest, parse_chat, parse_json
from llava.serve.schemas import chat_schema
from llava.serve.streams import with_first
from llava.serve.token_texts import TokenTexts

WAIT_SECONDS = 5.0
"""Silence before the first token after which a comment is sent, so that no proxy closes the connection."""

DONE = b"data: [DONE]\n\n"
WAIT = b": wait\n\n"


def add_openai_routes(app: FastAPI, service: AnswerService, tokens: TokenTexts) -> None:
    """Add GET /v1/models, GET /v1/models/{id} and POST /v1/chat/completions."""

    async def models(request: Request) -> Response:
        return models_response([service.model])

    async def model(request: Request) -> Response:
        service.check_model(request.path_params["name"])
        return JSONResponse(service.model.as_json())

    async def chat(request: Request) -> Response:
        record = record_of(request)
        with service.admission.reading():
            async with service.admission.limited():
                content = await read_body(request)
            body = parse_chat(parse_json(content))
        service.check_model(body.model)
        record.model = service.model.name
        events = service.events(job_of(body), record, beat=WAIT_SECONDS)
        # The texts of its images may be large; only the job has them from here on, until they are decoded.
        body, content = replace(body, images=()), b""
        made = ChatAnswer(body, service.model, tokens, record.request_id)
        if body.stream:
            pieces = made.chunks(events)
            return await with_first(request, pieces, media_type="text/event-stream", on_error=error_chunk)
        return JSONResponse(await unless_left(request, made.whole(events)))

    add_model_routes(app, models, model)
    app.add_api_route(
        "/v1/chat/completions",
        chat,
        methods=["POST"],
        summary="answer a chat",
        openapi_extra=body_schema(chat_schema()),
        response_class=JSONResponse,
        responses=RESPONSES,
    )


def models_response(models: list[ServedModel]) -> Response:
    """Return the response of GET /v1/models."""
    return JSONResponse({"object": "list", "data": [model.as_json() for model in models]})


def job_of(body: ChatRequest) -> AnswerJob:
    """Return the work that a chat request asks for."""
    conversation, history = body.conversation, body.history
    return AnswerJob(
        lambda images: Prompt(conversation, images, history=history),
        body.images,
        body.sampling,
        body.texts,
        top_logprobs=body.top_logprobs,
    )


def error_chunk(error: RequestError) -> bytes:
    """Return the last piece of a stream that failed."""
    return b"data: " + json.dumps(error.body()).encode() + b"\n\n"


class ChatAnswer:
    """Body or chunks of the answer to one chat request."""

    def __init__(self, body: ChatRequest, model: ServedModel, tokens: TokenTexts, request_id: str) -> None:
        """Answer `body`."""
        self.body = body
        self.model = model
        self.tokens = tokens
        self.id = f"chatcmpl-{request_id}"
        self.created = int(time.time())

    async def whole(self, events: AsyncGenerator[Answering | None, None]) -> dict[str, Any]:
        """Return the body of a completion."""
        choices = [_Choice() for _ in range(self.body.sampling.others.get("n", 1))]
        last: Answering | None = None
        async with aclosing(events):
            async for news in events:
                if news is not None:
                    choices[news.event.index].add(news.event)
                    last = news
        assert last is not None
        made = {**self._head("chat.completion"), "choices": [self._choice(i, one) for i, one in enumerate(choices)]}
        if self.body.return_token_ids:
            made["prompt_token_ids"] = list(last.prompt_token_ids)
        return {**made, "usage": usage(last.event.counts)}

    async def chunks(self, events: AsyncGenerator[Answering | None, None]) -> AsyncGenerator[bytes, None]:
        """Yield the chunks of a stream."""
        begun: set[int] = set()
        last: Answering | None = None
        async with aclosing(events):
            async for news in events:
                if news is None:
                    if last is None:
                        yield WAIT
                    continue
                if news.event.index not in begun:
                    yield self._first_chunk(news, is_first=last is None)
                    begun.add(news.event.index)
                last = news
                if chunk := self._chunk(news.event):
                    yield chunk
        assert last is not None
        if self.body.include_usage:
            yield self._data({"choices": [], "usage": usage(last.event.counts)})
        yield DONE

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model.name}

    def _data(self, fields: dict[str, Any]) -> bytes:
        more = {"usage": None} if self.body.include_usage else {}
        body = {**self._head("chat.completion.chunk"), **more, **fields}
        return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"

    def _first_chunk(self, news: Answering, *, is_first: bool) -> bytes:
        choice = {"index": news.event.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        fields: dict[str, Any] = {"choices": [{**choice, "logprobs": None}]}
        if is_first and self.body.return_token_ids:
            fields["prompt_token_ids"] = list(news.prompt_token_ids)
        return self._data(fields)

    def _chunk(self, event: Any) -> bytes:
        """Return the chunk of an event; empty if the event has nothing that the client asked for."""
        choice: dict[str, Any] = {
            "index": event.index,
            "delta": {"content": event.text} if event.text else {},
            "logprobs": self._logprobs(event),
            "finish_reason": event.finish,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = list(event.token_ids)
        has_tokens = bool(event.token_ids) and (choice["logprobs"] is not None or self.body.return_token_ids)
        return self._data({"choices": [choice]}) if event.text or event.finish or has_tokens else b""

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        made: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice),
            "finish_reason": choice.finish,
        }
        return {**made, "token_ids": choice.token_ids} if self.body.return_token_ids else made

    def _logprobs(self, part: Any) -> dict[str, Any] | None:
        if not self.body.sampling.others.get("logprobs"):
            return None
        entries = self.tokens.entries(
            part.token_ids, part.logprobs, part.top_logprobs, with_ids=self.body.return_token_ids
        )
        return {"content": entries, "refusal": None}


class _Choice:
    """Answer that is collected from its events."""

    def __init__(self) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[Any] = []
        self.finish: str | None = None

    def add(self, event: Any) -> None:
        """Append an event."""
        self.text = event.answer
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs
        self.top_logprobs += event.top_logprobs
        self.finish = event.finish


def usage(counts: Any) -> dict[str, Any]:
    """Return the token counts of a request."""
    return {
        "prompt_tokens": counts.prompt,
        "completion_tokens": counts.generated,
        "total_tokens": counts.prompt + counts.generated,
        "prompt_tokens_details": {"cached_tokens": counts.cached},
    }
