"""Servers of another make: refused fields, waits that they ask for, faults, and dialogues with and without ids."""

from __future__ import annotations

import base64
import io
import logging
import socket
from collections.abc import Sequence
from typing import Any

import pytest
from PIL import Image

from llava.errors import ConfigError, GenerationError
from llava.generation.protocol import Prompt, Sampling, Script
from llava.generation.remote import RemoteEngine
from llava.generation.remote_facts import ServerFacts, base_url, served_names
from llava.samples import Conversation, Turn
from llava.serve.client import ServerClient
from tests.support.foreign_server import MODEL, ForeignServer, Step, serve
from tests.support.tiny import tiny_image

GREEDY = Sampling(max_new_tokens=5)
DRAWN = Sampling(max_new_tokens=5, temperature=0.7, top_k=9, n=3, seed=4)


def question(text: str, *images: Any) -> Prompt:
    return Prompt(Conversation((Turn("human", "<image>\n" * len(images) + text),)), images)


def engine_for(server: ForeignServer, **options: Any) -> RemoteEngine:
    engine = RemoteEngine(server.url, **options)
    engine.server.first_wait = 0.02
    return engine


def texts(engine: RemoteEngine, prompts: Sequence[Prompt], sampling: Sampling) -> list[str]:
    return [answers[0].text or f"error: {answers[0].error}" for answers in engine.generate(prompts, sampling)]


def test_answers_are_trimmed_and_images_are_png() -> None:
    with serve() as server:
        engine = engine_for(server)
        assert engine.facts.name == MODEL and not engine.facts.is_ours and engine.facts.context == 4096
        assert texts(engine, [question("A"), question("B", tiny_image(0))], GREEDY) == ["to A", "to B"]
        [content] = [body["messages"][0]["content"] for body in server.bodies if "B" in str(body["messages"])]
        assert [part["type"] for part in content] == ["image_url", "text"] and content[1]["text"] == "B"
        data = base64.b64decode(content[0]["image_url"]["url"].partition("base64,")[2])
        assert Image.open(io.BytesIO(data)).tobytes() == tiny_image(0).convert("RGB").tobytes()
        assert list(engine.stream(question("C"), GREEDY))[-1] == "to C"


def test_refused_fields_are_learned_once_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with serve(refuses=("n", "top_k", "return_token_ids")) as server, caplog.at_level(logging.WARNING):
        engine = engine_for(server, max_concurrency=1)
        answers = engine.generate([question("A"), question("B")], DRAWN)
        assert [[one.text for one in each] for each in answers] == [["to A"] * 3, ["to B"] * 3]
        assert len(server.bodies) == 3 + 6 and set(engine.habits.notes) == {"n", "top_k", "return_token_ids"}
        seeds = {text: {body["seed"] for body in server.bodies[-6:] if text in str(body["messages"])} for text in "AB"}
        assert len(seeds["A"]) == 3 and seeds["A"] == seeds["B"]
        assert [name in body for body in server.bodies[-6:] for name in ("n", "top_k")] == [False] * 12
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3 and any("does not serve n; each answer is asked for alone" in line for line in said)
    assert not any("to A" in line or "What" in line for line in said)


def test_a_server_that_ignores_n_is_asked_again() -> None:
    with serve(ignores=("n",)) as server:
        engine = engine_for(server)
        assert len(engine.generate([question("A")], DRAWN)[0]) == 3
        assert [body.get("n") for body in server.bodies] == [3, None, None]
        assert "n" in engine.habits.notes


def test_a_greedy_answer_is_asked_for_once() -> None:
    with serve() as server:
        [answers] = engine_for(server).generate([question("A")], Sampling(n=4))
        assert [one.text for one in answers] == ["to A"] * 4 and len(server.bodies) == 1


def test_waits_that_a_server_asks_for_hold_for_all_requests() -> None:
    steps = [Step(429, {"Retry-After": "0.6"})]
    with serve(script=steps) as server:
        engine = engine_for(server, max_concurrency=2, max_retries=0)
        assert texts(engine, [question("A"), question("B"), question("C")], GREEDY) == ["to A", "to B", "to C"]
        started = sorted(server.times)
        assert sum(time - started[0] > 0.5 for time in started) >= 2  # all but one that was on its way


@pytest.mark.parametrize("step", [Step(500), Step(503, {"Retry-After": "0"}), Step(None), Step(200, {}, ["no object"])])
def test_transient_faults_are_tried_again(step: Step) -> None:
    with serve(script=[step, step]) as server:
        assert texts(engine_for(server), [question("A")], GREEDY) == ["to A"]
        assert len(server.bodies) == 3
        server.script += [step]
        if step.status != 200:
            assert list(engine_for(server).stream(question("A"), GREEDY))[-1] == "to A"


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (Step(500), "unavailable after 3 attempts"),
        (Step(None), "unreachable after 3 attempts"),
        (Step(400, {}, {"error": {"message": "secret question"}}), "refused: "),
        (Step(429, {"Retry-After": "4000"}), "rate_limited"),
        (Step(302, {"Location": "http://localhost:1/"}), "refused"),
        (Step(200, {}, {"choices": []}), "no choices"),
        (Step(200, {}, {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}), "no text"),
        (
            Step(200, {}, {"choices": [{"message": {"content": "a"}, "finish_reason": "tool_calls"}]}),
            "tool_calls",
        ),
    ],
)
def test_failures_are_values_and_quote_nothing(step: Step, reason: str) -> None:
    with serve(script=[step] * 3) as server:
        engine = engine_for(server, max_concurrency=1, max_retries=2)
        [[bad]] = engine.generate([question("A")], GREEDY)
        assert bad.finish == "error" and reason in (bad.error or "") and "secret" not in (bad.error or "")
        server.script.clear()
        assert texts(engine, [question("B")], GREEDY) == ["to B"]


def test_a_failure_that_all_share_ends_all_at_once() -> None:
    with serve(script=[Step(401)]) as server:
        found = texts(engine_for(server, max_concurrency=1), [question("A"), question("B")], GREEDY)
        assert len(server.bodies) == 1 and all("credentials" in text for text in found)


def test_a_dead_server_is_tried_with_all_retries_once_only() -> None:
    with serve() as server:
        engine = engine_for(server, max_concurrency=1, max_retries=2)
        server.script += [Step(None)] * 5
        found = texts(engine, [question("A"), question("B"), question("C"), question("D")], GREEDY)
        assert ["unreachable" in text for text in found] == [True, True, True, False]
        assert len(server.bodies) == 3 + 1 + 1 + 1


def test_concurrency_is_bounded() -> None:
    with serve(pause=0.05) as server:
        engine = engine_for(server, max_concurrency=3)
        assert len(engine.generate([question(str(number)) for number in range(12)], GREEDY)) == 12
        assert 2 <= server.most_at_once <= 3


def test_the_key_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("LLAVA_API_KEY", "sk-secret")
    with serve(script=[Step(401, {}, {"error": {"code": "sk-secret", "message": "sk-secret"}})]) as server:
        [[failed]] = engine_for(server).generate([question("A")], GREEDY)
        assert server.keys == ["Bearer sk-secret"] and "sk-secret" not in (failed.error or "") + caplog.text
    monkeypatch.setenv("LLAVA_API_KEY", "two\nlines")
    with pytest.raises(ConfigError, match="the key itself is not shown"):
        RemoteEngine("http://localhost:1")


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("https://host/v1/", "https://host/v1"),
        ("http://host:1/other", "http://host:1/other"),
    ],
)
def test_base_urls(url: str, wanted: str) -> None:
    assert base_url(url) == wanted


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://h/", "http://", "http://u:hidden@h/v1", "http://h/?a=1", ""])
def test_other_urls_are_refused_without_being_quoted(url: str) -> None:
    with pytest.raises(ConfigError, match="must be the URL of a server") as caught:
        base_url(url)
    assert "hidden" not in str(caught.value)


def test_servers_that_do_not_answer_and_models_that_are_not_served() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(GenerationError, match="does not answer"):
        RemoteEngine(f"http://127.0.0.1:{port}", "m")
    with serve() as server, pytest.raises(ConfigError, match=f"--model absent is not served; .* serves: {MODEL}"):
        RemoteEngine(server.url, "absent")


def script(*questions: str) -> Script:
    first, *others = questions
    return Script(Conversation((Turn("human", first),)), tuple(others))


def with_ids(body: dict[str, Any], number: int) -> dict[str, Any]:
    """Answer with ids that are the characters of all messages, as a server that keeps histories does."""
    prompt = [ord(character) for message in body["messages"] for character in message["content"]]
    text = f"a{len(body['messages'])}{number}"
    return {"text": text, "prompt_ids": prompt, "token_ids": list(map(ord, text))}


def test_dialogues_keep_the_ids_of_a_server_that_gives_them() -> None:
    with serve(answer=with_ids) as server:
        [held] = engine_for(server).converse([script("Q", "R", "S")], Sampling(temperature=1.0, n=2, seed=1))
        assert [one.texts for one in held] == [("a10", "a30", "a50"), ("a11", "a30", "a50")]
        ids = held[1].encoded.input_ids
        assert "".join(map(chr, ids)) == "Qa11Ra30Sa50" and held[1].error is None
        written = "".join(chr(token) for token, label in zip(ids, held[1].encoded.labels, strict=True) if label >= 0)
        assert written == "a11a30a50"
        seeds = [body["seed"] for body in server.bodies]
        assert "dialogue" not in server.bodies[0] and len(set(seeds)) == len(seeds)


def test_a_server_that_reads_other_tokens_ends_the_dialogue() -> None:
    def forgetful(body: dict[str, Any], number: int) -> dict[str, Any]:
        return {**with_ids(body, number), "prompt_ids": [1, 2, 3, len(body["messages"])]}

    with serve(answer=forgetful) as server:
        [[held]] = engine_for(server).converse([script("Q", "R")], GREEDY)
        assert held.finishes == ("stop", "error") and "other tokens than it wrote" in (held.error or "")


def test_dialogues_are_refused_by_name_without_ids() -> None:
    with serve() as server:
        engine = engine_for(server)
        with pytest.raises(ConfigError, match="gives no token ids"):
            engine.converse([script("Q")], GREEDY)
        with pytest.raises(ConfigError, match=r"at temperature 0\.7"):
            engine.converse([script("Q")], Sampling(temperature=0.7, logprobs=True))


def test_logprobs_that_a_server_does_not_give_are_an_error() -> None:
    with serve() as server:
        [[failed]] = engine_for(server).generate([question("A")], Sampling(logprobs=True))
        assert "gives no log-probabilities" in (failed.error or "")


def test_stop_strings_are_cut_here_where_a_server_refuses_them() -> None:
    with serve(refuses=("stop",), answer=lambda body, number: {"text": "one two END three"}) as server:
        engine = engine_for(server)
        [[answer]] = engine.generate([question("A")], Sampling(stop=("END",)))
        assert (answer.text, answer.finish) == ("one two", "stop")
        shown = list(engine.stream(question("A"), Sampling(stop=("END",))))
        assert shown[-1] == "one two" and not any("E" in text for text in shown)


def test_a_stream_that_breaks_off_is_an_error() -> None:
    with serve(answer=lambda body, number: {"text": "abc", "finish_reason": None}) as server:
        engine = engine_for(server, max_retries=0)
        with pytest.raises(GenerationError, match="connection ended"):
            list(engine.stream(question("A"), GREEDY))


def test_only_line_feeds_end_the_lines_of_a_stream() -> None:
    text = "one\u2028two\x85three\x0bfour"
    with serve(answer=lambda body, number: {"text": text}) as server:
        assert list(engine_for(server).stream(question("A"), GREEDY))[-1] == text


@pytest.mark.parametrize(("limit", "sent"), [(5, 5), (4095, 4095), (4096, None), (10**6, None)])
def test_a_limit_beyond_the_context_is_left_out(limit: int, sent: int | None) -> None:
    with serve() as server:
        assert texts(engine_for(server), [question("A")], Sampling(max_new_tokens=limit)) == ["to A"]
        assert server.bodies[0].get("max_tokens") == sent


def test_a_server_that_lists_no_models_is_asked_for_the_named_one() -> None:
    with serve(lists_no_models=True) as server:
        engine = RemoteEngine(server.url, "named")
        assert texts(engine, [question("A")], GREEDY) == ["to A"] and server.bodies[0]["model"] == "named"
        with pytest.raises(GenerationError, match="does not list its models"):
            RemoteEngine(server.url)


def test_the_clients_of_controllers_find_the_models_of_another_server() -> None:
    with serve() as server:
        assert ServerClient(server.url.removesuffix("/v1")).models() == [MODEL]


def test_paths_of_a_server_are_not_kept() -> None:
    facts = ServerFacts.of(
        {"id": "/home/anna/models/x", "owned_by": "vllm", "root": "/home/anna/models/x", "dtype": "f16"}
    )
    assert facts.shown_name == "x" and facts.others == {"dtype": "f16"} and not facts.is_ours


@pytest.mark.parametrize(("folder", "names"), [("runs/first/", "first"), ("runs/a/checkpoint-5", "a_checkpoint-5")])
def test_folders_stand_for_the_names_that_they_are_served_under(folder: str, names: str) -> None:
    assert names in served_names(folder)
