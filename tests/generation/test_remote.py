"""Answers and dialogues of a server of ours: those of the engine behind it, over real sockets."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava.errors import ConfigError, GenerationError
from llava.generation.engine import LocalEngine
from llava.generation.protocol import History, Prompt, Sampling, Script
from llava.generation.remote import RemoteEngine
from llava.generation.remote_facts import ServerFacts
from llava.generation.remote_request import ImageForm, messages_of
from llava.samples import Conversation, Turn
from llava.serve.admission import Admission
from llava.serve.answering import AnswerService
from llava.serve.gate import GateSettings
from llava.serve.image_inputs import ImageLimits
from llava.serve.worker import make_worker_app, served_model
from tests.generation.test_converse import scripts
from tests.support.dicom_files import make
from tests.support.generation_tools import ask, engine_of, mixed_prompts
from tests.support.served import served
from tests.support.tiny import tiny_image, tiny_llava

Pair = tuple[LocalEngine, RemoteEngine]


@contextlib.contextmanager
def pair(template: str = "vicuna_v1", **settings: Any) -> Iterator[Pair]:
    """Yield an engine, and a client of a server of the same weights."""
    local, behind = (tiny_llava(seed=3, template=template) for _ in range(2))
    for loaded in (local, behind):
        loaded.processor = loaded.processor.changed(**settings) if settings else loaded.processor
    engine = engine_of(behind, prefill_chunk=64, prefix_cache_mb=8)
    service = AnswerService(
        engine,
        served_model(engine, "tiny", None),
        admission=Admission(),
        images=ImageLimits(dicom=engine.processor.dicom),
    )
    with served(make_worker_app(service, GateSettings(), engine.processor.tokenizer)) as url:
        yield engine_of(local), RemoteEngine(url)


@pytest.fixture(scope="module")
def both() -> Iterator[Pair]:
    with pair() as found:
        yield found


PROMPTS = [
    *mixed_prompts(),
    Prompt(Conversation((Turn("human", "Hello"), Turn("gpt", "Yes."), Turn("human", "Why?")), "Be short.")),
    Prompt(Conversation((Turn("human", "Look: <image> there"),), ""), (tiny_image(4),)),
]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=7, logprobs=True, top_logprobs=3),
        Sampling(max_new_tokens=7, n=2, repetition_penalty=1.3, stop=("e", "\u00e9")),
        Sampling(max_new_tokens=7, temperature=0.8, n=3, seed=5, top_p=0.9, top_k=40, logprobs=True),
        Sampling(max_new_tokens=4, temperature=1.0, n=19, seed=6),
        Sampling(max_new_tokens=100_000),
    ],
)
def test_answers_are_those_of_the_engine(both: Pair, sampling: Sampling) -> None:
    local, remote = both
    prompts = PROMPTS if sampling.max_new_tokens < 1000 else PROMPTS[-1:]  # to the end of the context takes long
    for wanted, found in zip(local.generate(prompts, sampling), remote.generate(prompts, sampling), strict=True):
        for ours, theirs in zip(wanted, found, strict=True):
            rounded = {"logprobs": None, "top_logprobs": None}
            assert replace(theirs, **rounded) == replace(ours, **rounded)
            assert theirs.logprobs == (None if ours.logprobs is None else pytest.approx(ours.logprobs, abs=1e-4))
            for our_top, their_top in zip(ours.top_logprobs or (), theirs.top_logprobs or (), strict=True):
                assert [token for token, _ in our_top] == [token for token, _ in their_top]


def test_a_stream_grows_to_the_answer(both: Pair) -> None:
    local, remote = both
    sampling = Sampling(max_new_tokens=12)
    for prompt in PROMPTS[:3]:
        shown = list(remote.stream(prompt, sampling))
        assert shown[-1] == local.generate([prompt], sampling)[0][0].text
        assert all(later.startswith(before) for before, later in pairwise(shown))


def test_closing_a_stream_frees_the_slot(both: Pair) -> None:
    stream = both[1].stream(PROMPTS[0], Sampling(max_new_tokens=400))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert both[1].generate([PROMPTS[0]], Sampling(max_new_tokens=1))[0][0].error is None


@pytest.mark.parametrize(
    ("template", "sampling"),
    [
        ("vicuna_v1", Sampling(max_new_tokens=9, temperature=0.7, n=2, logprobs=True)),
        ("chatml", Sampling(max_new_tokens=9, temperature=0.7, n=2, logprobs=True)),
        ("vicuna_v1", Sampling(max_new_tokens=6, logprobs=True, n=2)),
        ("vicuna_v1", Sampling(max_new_tokens=6, repetition_penalty=1.5)),
        ("chatml", Sampling(max_new_tokens=6, logprobs=True, n=2)),
        ("vicuna_v1", Sampling(max_new_tokens=3, temperature=1.0, n=17, seed=2)),  # more than one request
    ],
)
def test_dialogues_are_those_of_the_engine(both: Pair, template: str, sampling: Sampling) -> None:
    with contextlib.nullcontext(both) if template == "vicuna_v1" else pair(template) as (local, remote):
        given = scripts() if sampling.n < 9 else scripts()[:1]
        wanted = local.converse(given, sampling)
        with_images = RemoteEngine(remote.server.url, processor=local.processor)
        for engine in (remote, with_images):
            for ours, theirs in zip(wanted, engine.converse(given, sampling), strict=True):
                for own, found in zip(ours, theirs, strict=True):
                    assert (found.texts, found.finishes, found.error) == (own.texts, own.finishes, own.error)
                    assert found.encoded.input_ids == own.encoded.input_ids
                    assert found.encoded.labels == own.encoded.labels
                    assert engine is remote or found.encoded == own.encoded
                    for mine, their in zip(own.logprobs, found.logprobs, strict=True):
                        assert their == pytest.approx(mine, abs=1e-4)


def test_a_dialogue_that_fills_the_context_ends_with_its_reason(both: Pair) -> None:
    local, remote = both
    long = Script(Conversation((Turn("human", "Begin."),)), ("x" * 900, "y" * 900, "z" * 900))
    sampling = Sampling(max_new_tokens=3)
    [[ours]], [[theirs]] = local.converse([long], sampling), remote.converse([long], sampling)
    assert theirs.finishes == ours.finishes and "error" in theirs.finishes
    assert theirs.texts == ours.texts and theirs.encoded.input_ids == ours.encoded.input_ids
    assert "tokens" in (theirs.error or "")


def test_a_template_without_end_token_is_refused_as_here() -> None:
    with pair("v0") as (local, remote):
        for engine in (local, remote):
            with pytest.raises(ConfigError, match="not with a token of its own"):
                engine.converse(scripts()[:1], Sampling(max_new_tokens=3))


def test_a_processor_of_another_model_is_an_error(both: Pair) -> None:
    other = tiny_llava(template="chatml").processor
    [[dialogue]] = RemoteEngine(both[1].server.url, processor=other).converse(
        scripts()[1:2], Sampling(max_new_tokens=2)
    )
    assert "other tokens than the processor" in (dialogue.error or "") and dialogue.finishes == ("error",)


def test_images_stay_where_they_are_written_where_the_model_reads_them_there() -> None:
    prompts = [
        ask("Compare", 0, 1),
        Prompt(Conversation((Turn("human", "A\n\n<image>\nB \n<image>"),)), (tiny_image(0),) * 2),
    ]
    with pair(placement="as_written") as (local, remote):
        assert remote.facts.placement == "as_written"
        sampling = Sampling(max_new_tokens=5, logprobs=True)
        for [ours], [theirs] in zip(local.generate(prompts, sampling), remote.generate(prompts, sampling), strict=True):
            assert theirs.token_ids == ours.token_ids and theirs.text == ours.text
        [[failed]] = remote.generate([PROMPTS[-1]], sampling)
        assert failed.finish == "error" and "within a line" in (failed.error or "")


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (Prompt(Conversation((Turn("human", "\ud800"),))), "not Unicode"),
        (Prompt(Conversation((Turn("human", "x" * 3000),))), "tokens long, but at most"),
        (Prompt(Conversation((Turn("human", "<image>\nWhat?"),))), "1 <image> placeholders but 0 images"),
        (Prompt(Conversation((Turn("human", "<image>\nWhat?"),)), ("missing.png",)), "cannot be read"),
        (Prompt(Conversation((Turn("human", "<image>\nWhat?"),)), (b"no image",)), "not PNG"),
        (Prompt(Conversation((Turn("human", "A"), Turn("gpt", "B")))), "end with a question"),
        (Prompt(Conversation((Turn("human", "A"),)), rendered="A"), "rendered already"),
    ],
)
def test_failures_are_values_and_the_others_are_answered(both: Pair, prompt: Prompt, reason: str) -> None:
    [bad], [good] = both[1].generate([prompt, PROMPTS[0]], Sampling(max_new_tokens=3))
    assert bad.finish == "error" and reason in (bad.error or "") and bad.text == ""
    assert good.error is None
    with pytest.raises(GenerationError, match=re.escape(reason)):
        list(both[1].stream(prompt, Sampling(max_new_tokens=3)))


def test_a_window_of_dicom_files_goes_with_them(both: Pair, tmp_path: Path) -> None:
    values = np.linspace(0, 4000, 28 * 28).reshape(28, 28).astype(np.uint16)
    path = tmp_path / "a.dcm"
    path.write_bytes(make(values, WindowCenter=2000, WindowWidth=4000))
    prompt, sampling = replace(PROMPTS[0], images=(path,)), Sampling(max_new_tokens=4, logprobs=True)
    [[plain]] = both[1].generate([prompt], sampling)
    [[ours]] = both[0].generate([prompt], sampling)
    assert plain.logprobs == pytest.approx(ours.logprobs, abs=1e-4)
    narrow = RemoteEngine(both[1].server.url, dicom_window="100,50")
    assert narrow.generate([prompt], sampling)[0][0].logprobs != pytest.approx(ours.logprobs, abs=1e-4)


def test_files_go_to_our_servers_as_they_are_and_rendered_to_others(tmp_path: Path) -> None:
    import base64

    values = np.linspace(0, 4000, 8 * 8).reshape(8, 8).astype(np.uint16)
    data = make(values, WindowCenter=2000, WindowWidth=4000)
    path = tmp_path / "a.dcm"
    path.write_bytes(data)
    prompt = Prompt(Conversation((Turn("human", "<image>\nWhat?"),)), (str(path),))
    for is_ours in (True, False):
        facts = ServerFacts("m", is_ours=is_ours)
        [message] = messages_of(prompt, facts, ImageForm(is_ours, window="2000,4000"))
        image = message["content"][0]["image_url"]
        sent = base64.b64decode(image["url"].partition(",")[2])
        if is_ours:
            assert sent == data and image["window"] == "2000,4000"
        else:
            shown = Image.open(io.BytesIO(sent))
            assert (shown.format, shown.mode, shown.getextrema()[0]) == ("PNG", "RGB", (0, 255))
            assert set(image) == {"url"}


def test_scores_are_local(both: Pair) -> None:
    with pytest.raises(ConfigError, match="in this process only"):
        both[1].score(PROMPTS[:1])
    with pytest.raises(ConfigError, match="no beam search"):
        both[1].generate(PROMPTS[:1], Sampling(num_beams=2))


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (((300_000,),), "cannot generate"),
        (((7,) * 5000,), "answers so far have"),
        (((),), "no tokens"),
        (((7,), (7,)), "does not end with them"),
    ],
)
def test_ids_that_the_model_cannot_have_written_are_refused(
    both: Pair, answers: tuple[tuple[int, ...], ...], reason: str
) -> None:
    turns = (Turn("human", "A"), Turn("gpt", ""), Turn("human", "B"))
    prompt = Prompt(Conversation(turns), history=History(answers))
    completion = both[0].submit(prompt, Sampling(max_new_tokens=2)).completions()[0]
    assert completion.finish == "error" and reason in (completion.error or "")


def test_an_image_placeholder_among_the_ids_is_refused(both: Pair) -> None:
    turns = (Turn("human", "A"), Turn("gpt", ""), Turn("human", "B"))
    ids = (both[0].processor.image_token_id,)
    completion = both[0].submit(Prompt(Conversation(turns), history=History((ids,))), Sampling()).completions()[0]
    assert "cannot generate" in (completion.error or "")
