"""The official client against a tiny model: streams, images, DICOM, counts, and every class of error."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import httpx2
import numpy as np
import openai
import pytest
from openai.types import chat
from openai.types.chat import chat_completion_content_part_image_param, completion_create_params

from llava.constants import IMAGE_TOKEN
from llava.data.encode import place_images
from llava.generation.engine import LocalEngine
from llava.generation.loading import open_engine
from llava.generation.protocol import Sampling
from llava.samples import Conversation, Turn
from llava.serve import schemas
from llava.serve.admission import Admission
from llava.serve.answering import AnswerService
from llava.serve.cli import Chat
from llava.serve.gate import GateSettings
from llava.serve.image_inputs import ImageLimits
from llava.serve.keys import KeyRing
from llava.serve.worker import make_worker_app, served_model
from tests.serve.test_worker import frames_of
from tests.support.dicom_files import make
from tests.support.served import served

ROOT = Path(__file__).resolve().parents[2]


class Worker(NamedTuple):
    """Served model of the oracles."""

    engine: LocalEngine
    url: str
    folder: Path
    model: str


@pytest.fixture(scope="module")
def worker(shared: Path) -> Iterator[Worker]:
    """A worker of a tiny model."""
    folder = shared / "oracles" / "llava-med-1.5-mistral"
    path = str(folder / "llava-med-mistral-tiny")
    tower = str(folder / "vision_tower")
    engine = open_engine(path, vision_tower=tower, device="cpu", prefill_chunk=512, prefix_cache_mb=64)
    model = served_model(engine, path, None)
    service = AnswerService(engine, model, admission=Admission(), images=ImageLimits(dicom=engine.processor.dicom))
    with served(make_worker_app(service, GateSettings(), engine.processor.tokenizer)) as url:
        yield Worker(engine, url, folder, model.name)


def client_of(worker: Worker, **settings: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{worker.url}/v1", api_key="-", max_retries=0, **settings)


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def question(text: str, *images: bytes, **fields: Any) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": data_url(data), **fields}} for data in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def oracle_questions(folder: Path) -> list[tuple[bytes, str]]:
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    texts = [row["text"].replace(IMAGE_TOKEN, "").strip() for row in rows]
    files = [(folder / "images" / row["image"]).read_bytes() for row in rows]
    return [(data, text) for data, text in zip(files, texts, strict=True) if text]


def test_greedy_answers_of_both_protocols_are_those_of_llava_chat(worker: Worker) -> None:
    client, processor = client_of(worker), worker.engine.processor
    pairs = oracle_questions(worker.folder)
    assert pairs
    for image, text in pairs:
        chat = Chat(worker.engine, Sampling(max_new_tokens=12), image)
        expected = chat.ask(text, io.StringIO())
        made: Any = client.chat.completions.create(model=worker.model, messages=question(text, image), max_tokens=12)
        assert made.choices[0].message.content == expected
        turns = (Turn("human", f"{IMAGE_TOKEN}\n{text}"),)
        prompt = processor.template.prompt(place_images(Conversation(turns), processor))
        body = {"model": worker.model, "prompt": prompt, "images": [base64.b64encode(image).decode()]}
        answer = httpx2.post(
            f"{worker.url}/worker_generate_stream", json={**body, "temperature": 0, "max_new_tokens": 12}, timeout=60
        )
        assert frames_of(answer.content)[-1]["text"] == prompt + expected


def test_a_stream_has_the_text_the_counts_and_the_ids_of_a_whole_answer(worker: Worker) -> None:
    client = client_of(worker)
    settings: dict[str, Any] = {
        "model": worker.model,
        "messages": question("What is shown?", (worker.folder / "images" / "im0.png").read_bytes()),
        "max_tokens": 10,
        "logprobs": True,
        "extra_body": {"return_token_ids": True},
    }
    whole = client.chat.completions.create(**settings)
    choice = whole.choices[0]
    entries = choice.logprobs.content
    ids = choice.model_extra["token_ids"]
    assert len(entries) == len(ids) == whole.usage.completion_tokens <= 10
    assert whole.usage.prompt_tokens == len(whole.model_extra["prompt_token_ids"])
    assert all(entry.logprob <= 0 for entry in entries)
    text, streamed, usage = "", [], None
    for chunk in client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for part in chunk.choices:
            text += part.delta.content or ""
            streamed += part.model_extra.get("token_ids") or []
    assert text == choice.message.content and streamed == ids
    assert usage is not None and usage.completion_tokens == len(ids)


def test_a_later_question_about_an_image_computes_its_own_tokens_only(worker: Worker) -> None:
    client, image = client_of(worker), (worker.folder / "images" / "im1.png").read_bytes()
    settings: dict[str, Any] = {"model": worker.model, "max_tokens": 4}
    first = client.chat.completions.create(messages=question("What is this, and where?", image), **settings)
    second = client.chat.completions.create(messages=question("What else?", image), **settings)
    assert second.usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens_details.cached_tokens
    turns = [*question("What else?", image), {"role": "assistant", "content": second.choices[0].message.content}]
    third = client.chat.completions.create(messages=[*turns, {"role": "user", "content": "Why?"}], **settings)
    assert third.usage.prompt_tokens_details.cached_tokens > second.usage.prompt_tokens_details.cached_tokens


def test_alternatives_of_each_token(worker: Worker) -> None:
    settings: dict[str, Any] = {"model": worker.model, "messages": question("Why?"), "max_tokens": 5}
    made = client_of(worker).chat.completions.create(**settings, logprobs=True, top_logprobs=3)
    for entry in made.choices[0].logprobs.content:
        values = [other.logprob for other in entry.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert entry.top_logprobs[0].token == entry.token and values[0] == pytest.approx(entry.logprob, abs=1e-4)


def test_several_answers_seeds_and_stops(worker: Worker) -> None:
    client = client_of(worker)
    settings: dict[str, Any] = {"model": worker.model, "messages": question("Why?"), "max_tokens": 8}
    sampled = [client.chat.completions.create(**settings, n=3, temperature=1, seed=5) for _ in range(2)]
    texts = [[choice.message.content for choice in one.choices] for one in sampled]
    assert texts[0] == texts[1] and len(set(texts[0])) > 1
    greedy = client.chat.completions.create(**settings, n=2)
    assert greedy.choices[0].message.content == greedy.choices[1].message.content
    full = greedy.choices[0].message.content
    stop = full[3:6]
    cut = client.chat.completions.create(**settings, stop=stop).choices[0]
    assert cut.finish_reason == "stop" and cut.message.content == full[: full.index(stop)].rstrip()


def test_a_window_of_a_dicom_file_changes_the_answer_and_not_its_length_of_prompt(worker: Worker) -> None:
    values = np.linspace(0, 4000, 64 * 64).reshape(64, 64).astype(np.uint16)
    data = make(values, WindowCenter=2000, WindowWidth=4000)
    client = client_of(worker)
    settings: dict[str, Any] = {"model": worker.model, "max_tokens": 8, "logprobs": True}
    plain = client.chat.completions.create(messages=question("What?", data), **settings)
    same = client.chat.completions.create(messages=question("What?", data, window="2000,4000"), **settings)
    other = client.chat.completions.create(messages=question("What?", data, window="100,50"), **settings)
    logprobs = [[entry.logprob for entry in one.choices[0].logprobs.content] for one in (plain, same, other)]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4) and logprobs[0] != pytest.approx(logprobs[2], abs=1e-4)
    assert plain.usage.prompt_tokens == other.usage.prompt_tokens


def test_the_asynchronous_client_gets_many_answers_at_a_time(worker: Worker) -> None:
    async def answers() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{worker.url}/v1", api_key="-", max_retries=0) as client:
            asked = [
                client.chat.completions.create(model=worker.model, messages=question(text), max_tokens=6)  # type: ignore[arg-type]
                for text in ("Where?", "When?", "Who?", "How?")
            ]
            return [str(one.choices[0].message.content) for one in await asyncio.gather(*asked)]

    one_by_one = [
        client_of(worker).chat.completions.create(model=worker.model, messages=question(text), max_tokens=6)  # type: ignore[call-overload]
        for text in ("Where?", "When?", "Who?", "How?")
    ]
    assert asyncio.run(answers()) == [one.choices[0].message.content for one in one_by_one]


@pytest.mark.parametrize(
    ("fields", "kind", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model_not_found"),
        ({"temperature": 1e9}, openai.BadRequestError, "invalid_value"),
        ({"presence_penalty": 1}, openai.BadRequestError, "unsupported_parameter"),
        ({"extra_body": {"more": 1}}, openai.BadRequestError, "unknown_parameter"),
        ({"messages": question("a" * 9000)}, openai.BadRequestError, "context_length_exceeded"),
        ({"messages": question("a" * 20000)}, openai.BadRequestError, "context_length_exceeded"),
        ({"messages": question("[INST] <s>")}, openai.BadRequestError, "invalid_content"),
        ({"messages": question("a", b"\xff\xd8\xff\xe0 cut off")}, openai.BadRequestError, "bad_image"),
    ],
)
def test_classes_of_errors(
    worker: Worker, fields: dict[str, Any], kind: type[openai.APIStatusError], code: str
) -> None:
    settings: dict[str, Any] = {"model": worker.model, "messages": question("Hello"), "max_tokens": 2, **fields}
    with pytest.raises(kind) as caught:
        client_of(worker).chat.completions.create(**settings)
    assert caught.value.code == code and caught.value.request_id


@pytest.mark.parametrize(
    ("sent", "known"),
    [
        (completion_create_params.CompletionCreateParamsStreaming, schemas.ChatBody),
        (chat.ChatCompletionStreamOptionsParam, schemas.StreamOptions),
        (chat.ChatCompletionSystemMessageParam, schemas.ChatMessage),
        (chat.ChatCompletionUserMessageParam, schemas.ChatMessage),
        (chat.ChatCompletionAssistantMessageParam, schemas.ChatMessage),
        (chat.ChatCompletionContentPartTextParam, schemas.TextPart),
        (chat.ChatCompletionContentPartImageParam, schemas.ImagePart),
        (chat_completion_content_part_image_param.ImageURL, schemas.ImageUrl),
    ],
)
def test_every_field_of_the_client_is_known(sent: Any, known: type[schemas.ChatBody]) -> None:
    assert get_type_hints(sent).keys() - known.model_fields.keys() - known.neutral.keys() == set()


def test_a_wrong_key_is_an_authentication_error(worker: Worker, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("ward secret\n")
    path.chmod(0o600)
    model = served_model(worker.engine, worker.model, "m")
    service = AnswerService(worker.engine, model, admission=Admission(), images=ImageLimits())
    with served(make_worker_app(service, GateSettings(keys=KeyRing(path)), None)) as url:
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()
        assert [one.id for one in openai.OpenAI(base_url=f"{url}/v1", api_key="secret").models.list()] == ["m"]


def test_examples_of_the_document(worker: Worker, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    names = {
        "BASE_URL": f"{worker.url}/v1",
        "ROOT_URL": worker.url,
        "MODEL": worker.model,
        "IMAGE": str(worker.folder / "images" / "im0.png"),
    }
    for block in blocks:
        exec(compile(block, "serving.md", "exec"), dict(names))
    assert "CompletionUsage" in capsys.readouterr().out


def test_bad_requests_do_not_disturb_fifty_good_ones(worker: Worker) -> None:
    url, model = f"{worker.url}/v1/chat/completions", worker.model
    surrogate = b'{"role": "user", "content": "\\ud800"}'
    endless = json.dumps({"role": "user", "content": "a" * 10_000_000}).encode()

    async def ask() -> tuple[list[httpx2.Response], list[httpx2.Response]]:
        async with httpx2.AsyncClient(timeout=120, trust_env=False) as http:
            good = [{"role": "user", "content": f"Question {number}"} for number in range(50)]
            bodies = [{"model": model, "messages": [message], "max_tokens": 12} for message in good]
            wrong = [b'{"model": "%s", "messages": [%s]}' % (model.encode(), bad) for bad in (surrogate, endless)]
            asked = (*(http.post(url, json=body) for body in bodies), *(http.post(url, content=body) for body in wrong))
            found = await asyncio.gather(*asked)
            return found[:50], found[50:]

    answers, refusals = asyncio.run(ask())
    assert [answer.status_code for answer in answers] == [200] * 50
    assert {answer.json()["choices"][0]["finish_reason"] for answer in answers} <= {"stop", "length"}
    codes = [response.json()["error"]["code"] for response in refusals]
    assert codes == ["invalid_content", "context_length_exceeded"]


def test_steps_of_the_model_are_counted(worker: Worker) -> None:
    engine, num_before = worker.engine, worker.engine.driver.num_steps
    model = served_model(engine, str(worker.folder), worker.model)
    service = AnswerService(engine, model, admission=Admission(), images=ImageLimits(dicom=engine.processor.dicom))
    with served(make_worker_app(service, GateSettings(), engine.processor.tokenizer)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
        made: Any = client.chat.completions.create
        made(model=worker.model, messages=question("Where?"), max_tokens=3)
        lines = httpx2.get(f"{url}/metrics").text.splitlines()
    [count] = [float(line.split()[-1]) for line in lines if line.startswith("llava_step_seconds_count")]
    assert count == engine.driver.num_steps - num_before >= 2
