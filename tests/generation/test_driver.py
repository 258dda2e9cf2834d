"""Driver: many clients of one model, none of which can slow, stop or break another."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch

from llava.errors import ConfigError, GenerationError, NotUnicodeError, PromptTooLongError
from llava.generation.answering_mode import AnsweringMode
from llava.generation.decode_step import can_decode
from llava.generation.engine import LocalEngine
from llava.generation.handle import Event
from llava.generation.protocol import Prompt, Sampling
from llava.model.builder import LoadedModel
from llava.samples import Conversation, Turn
from tests.support.generation_tools import (
    ask,
    assert_same_answers,
    engine_of,
    logits_without_cache,
    mixed_prompts,
    one,
    wait_for_readers,
)
from tests.support.tiny import tiny_llava
from tests.support.waiting import until

SAMPLING = Sampling(max_new_tokens=24, temperature=1.0, seed=17, logprobs=True)
ENDLESS = Sampling(max_new_tokens=1500)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny_llava(seed=3)


@pytest.fixture
def engine(loaded: LoadedModel) -> LocalEngine:
    return engine_of(loaded)


def last(events: list[Event]) -> Event:
    assert [event.finish is None for event in events] == [True] * (len(events) - 1) + [False]
    return events[-1]


def test_events_add_up_to_the_answer(engine: LocalEngine) -> None:
    handles = [engine.submit(prompt, SAMPLING) for prompt in mixed_prompts()]
    wanted = engine_of(LoadedModel(engine.model, engine.processor, 0)).generate(mixed_prompts(), SAMPLING)
    for prompt, handle, [answer] in zip(mixed_prompts(), handles, wanted, strict=True):
        events = list(handle)
        done = last(events).completion
        assert done is not None and handle.is_over and handle.completions() == [done]
        assert_same_answers(engine, [prompt], [done], [answer], SAMPLING)
        assert "".join(event.text for event in events) == events[-1].answer == done.text
        assert sum((event.token_ids for event in events), ()) == done.token_ids
        assert sum((event.logprobs for event in events), ()) == done.logprobs
        counts = events[-1].counts
        assert counts.prompt == len(engine.reader.read(prompt).encoded.input_ids)
        assert (counts.cached, counts.generated) == (0, len(done.token_ids))
    assert until(lambda: engine.driver.num_unfinished == 0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_several_answers_have_events_of_their_own(engine: LocalEngine, temperature: float) -> None:
    sampling = Sampling(max_new_tokens=10, temperature=temperature, seed=1, n=3)
    handle = engine.submit(ask("Draw.", 0), sampling)
    texts, ended = ["", "", ""], 0
    for event in handle:
        texts[event.index] += event.text
        ended += event.finish is not None
    assert ended == 3 and texts == [answer.text for answer in handle.completions()]
    assert len(set(texts)) == (1 if temperature == 0.0 else 3)
    [wanted] = engine.generate([ask("Draw.", 0)], sampling)
    assert_same_answers(engine, [ask("Draw.", 0)] * 3, handle.completions(), wanted, Sampling(10, temperature))


def test_clients_that_read_see_almost_every_token(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    wait_for_readers(engine, monkeypatch)  # which may get no time on a busy machine
    num_pieces: list[int] = []

    def read(number: int) -> None:
        handle = engine.submit(ask(f"Number {number}?", number % 3), Sampling(max_new_tokens=24, stop=()))
        num_pieces.append(sum(1 for _ in handle))

    threads = [threading.Thread(target=read, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(num_pieces) == 16 and min(num_pieces) >= 12


def test_a_client_that_does_not_read_gets_one_merged_piece(engine: LocalEngine) -> None:
    slow = engine.submit(ask("Slow.", 0), SAMPLING)
    quick = engine.submit(ask("Quick.", 1), SAMPLING)
    list(quick)
    assert until(lambda: slow.is_over)
    [event] = slow.take()
    assert event.completion is not None and event.token_ids == event.completion.token_ids
    assert event.text == event.completion.text and slow.take() == []


def test_news_are_announced_once_until_they_are_taken(engine: LocalEngine) -> None:
    announced = threading.Semaphore(0)
    handle = engine.submit(ask("News?", 0), SAMPLING, notify=announced.release)
    assert until(lambda: handle.is_over)
    assert announced.acquire(timeout=120) and not announced.acquire(blocking=False)
    assert last(handle.take()).finish is not None


def test_a_listener_that_fails_hurts_nobody(engine: LocalEngine) -> None:
    def broken() -> None:
        raise RuntimeError("event loop is closed")

    handle = engine.submit(ask("News?", 0), SAMPLING, notify=broken)
    assert last(list(engine.submit(ask("Other?", 1), SAMPLING))).error is None
    assert handle.completions()[0].error is None


@pytest.mark.parametrize("when", ["waiting", "running"])
def test_canceling_frees_the_slot(loaded: LoadedModel, when: str) -> None:
    engine = engine_of(loaded, max_slots=1)
    first = engine.submit(ask("Long.", 0), ENDLESS)
    next(iter(first))
    second = engine.submit(ask("Behind.", 1), SAMPLING)
    for handle in (second, first) if when == "waiting" else (first, second):
        handle.cancel()
        assert handle.is_over and list(handle) == [] and handle.take() == []
        assert handle.completions()[0].error == "the request was canceled"
    assert until(lambda: engine.driver.num_running == 0 and not engine.scheduler.has_work)
    assert until(lambda: engine.driver.num_unfinished == 0)
    assert one(engine, ask("Next?"), SAMPLING).error is None


def test_the_model_runs_on_while_a_consumer_of_a_stream_pauses(engine: LocalEngine) -> None:
    stream = engine.stream(ask("Pause.", 0), SAMPLING)
    next(stream)
    assert until(lambda: engine.driver.num_running == 0)
    assert [*stream][-1] == one(engine, ask("Pause.", 0), SAMPLING).text


def test_a_batch_and_submitted_prompts_share_the_model(engine: LocalEngine) -> None:
    handles = [engine.submit(ask(f"Served {number}?", number), SAMPLING) for number in range(4)]
    scores: list[Any] = []
    answered = Prompt(Conversation((Turn("human", "Text?"), Turn("gpt", "yes"))))
    scoring = threading.Thread(target=lambda: scores.extend(engine.score([answered])))
    scoring.start()
    found = [answer for [answer] in engine.generate(mixed_prompts(), SAMPLING)]
    scoring.join()
    alone = engine_of(LoadedModel(engine.model, engine.processor, 0))
    wanted = [answer for [answer] in alone.generate(mixed_prompts(), SAMPLING)]
    assert_same_answers(engine, mixed_prompts(), found, wanted, SAMPLING)
    assert all(handle.completions()[0].error is None for handle in handles)
    assert scores[0].logprob == pytest.approx(alone.score([answered])[0].logprob, abs=1e-4)


def ended(engine: LocalEngine, prompt: Prompt, sampling: Sampling = SAMPLING) -> Event:
    return last(list(engine.submit(prompt, sampling)))


def test_a_bad_request_ends_alone_and_says_why(engine: LocalEngine) -> None:
    surrogate = Prompt(Conversation((Turn("human", "a\ud800b"),)))
    good = [engine.submit(ask(f"Good {number}?", number), SAMPLING) for number in range(8)]
    bad = ended(engine, surrogate)
    assert bad.finish == "error" and isinstance(bad.cause, NotUnicodeError)
    assert "turn 0" in str(bad.error) and "character 1" in str(bad.error)
    long = ended(engine, ask("word " * 2_000_000))
    assert isinstance(long.cause, PromptTooLongError) and "characters" in str(long.error)  # not a count of tokens
    assert isinstance(ended(engine, ask("x" * 3000)).cause, PromptTooLongError)
    torn = Prompt(Conversation((Turn("human", "<image>\nTorn?"),)), (b"\x89PNG nothing",))
    assert "decoded" in str(ended(engine, torn).error)
    assert all(handle.completions()[0].error is None for handle in good)
    [[answer], [refused]] = engine.generate([ask("Good?"), surrogate], SAMPLING)
    assert answer.error is None and refused.finish == "error"


def test_a_prompt_on_which_the_model_fails_ends_alone(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    poison = len(engine.reader.read(ask("Poisoned prompt!", 1)).encoded.input_ids)
    original = engine.scheduler.runner.prefill

    def prefill(sequences: Any, images: Any) -> Any:
        if any(len(sequence.input_ids) == poison for sequence in sequences):
            raise IndexError("index 7 is out of bounds")
        return original(sequences, images)

    monkeypatch.setattr(engine.scheduler.runner, "prefill", prefill)
    prompts = [ask(f"Good {number}?", number % 3) for number in range(10, 20)]
    prompts.insert(4, ask("Poisoned prompt!", 1))
    answers = [answer for [answer] in engine.generate(prompts, SAMPLING)]
    assert [answer.error is None for answer in answers] == [index != 4 for index in range(11)]
    assert answers[4].error == "the model failed on this prompt: IndexError: index 7 is out of bounds"
    assert engine.driver.failure is None


def test_a_failure_of_the_model_ends_all_with_its_reason(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, failures = engine.scheduler.runner.decode, ["kernel failure"]

    def broken(token_ids: list[int]) -> torch.Tensor:
        if len(token_ids) == 3 and failures:  # all of them run, whenever they were read
            raise RuntimeError(failures.pop())
        return decode(token_ids)

    monkeypatch.setattr(engine.scheduler.runner, "decode", broken)
    handles = [engine.submit(ask(f"Number {number}?", number), ENDLESS) for number in range(3)]
    for handle in handles:
        event = last(list(handle))
        assert event.error == "the model failed: RuntimeError: kernel failure"
        assert event.cause is engine.driver.failure is not None
    assert until(lambda: not engine.scheduler.has_work and engine.driver.num_unfinished == 0)
    assert one(engine, ask("Well?", 0), SAMPLING).error is None


def test_a_closed_driver_finishes_what_runs_and_takes_no_more(loaded: LoadedModel) -> None:
    engine = engine_of(loaded)
    running = engine.submit(ask("Running.", 0), SAMPLING)
    assert engine.driver.close("draining", timeout=120)
    assert running.completions()[0].error is None
    with pytest.raises(GenerationError, match="draining"):
        engine.submit(ask("Late."), SAMPLING)


def test_closing_with_a_limit_ends_what_still_runs(loaded: LoadedModel) -> None:
    engine = engine_of(loaded)
    endless = engine.submit(ask("Running.", 0), ENDLESS)
    next(iter(endless))
    assert not engine.driver.close("draining", timeout=0)
    assert endless.completions()[0].error == "draining"
    assert until(lambda: engine.driver.num_running == 0)


def test_the_thread_ends_when_there_is_nothing_to_do(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.generation.driver.LINGER", 0.02)
    engine = engine_of(loaded)
    engine.submit(ask("Once."), SAMPLING).completions()
    assert until(lambda: engine.driver._thread is None)
    assert engine.submit(ask("Twice."), SAMPLING).completions()[0].error is None


def test_beams_cannot_be_submitted(engine: LocalEngine) -> None:
    with pytest.raises(ConfigError, match="num_beams"):
        engine.submit(ask("Beams?"), Sampling(num_beams=2))


def test_alternatives_are_reported_with_their_tokens(engine: LocalEngine) -> None:
    prompts = [ask("Which?", 0), ask("None?", 1)]
    each = [Sampling(6, temperature=1.0, seed=2, logprobs=True, top_logprobs=num) for num in (3, 5)]
    plain = Sampling(6, temperature=1.0, seed=2, logprobs=True)
    handles = [engine.submit(prompt, sampling) for prompt, sampling in zip(prompts, each, strict=True)]
    assert [event.top_logprobs for event in engine.submit(prompts[0], plain)].count(()) > 0
    for prompt, sampling, handle in zip(prompts, each, handles, strict=True):
        found = sum((event.top_logprobs for event in handle), ())
        [answer] = handle.completions()
        assert found == answer.top_logprobs and len(found) == len(answer.token_ids)
        logprobs = logits_without_cache(engine, prompt, list(answer.token_ids)).log_softmax(-1)
        for wanted, alternatives, token, logprob in zip(
            logprobs, found, answer.token_ids, answer.logprobs or (), strict=True
        ):
            best = wanted.topk(sampling.top_logprobs)
            assert [token for token, _ in alternatives] == best.indices.tolist()
            assert [value for _, value in alternatives] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert dict(alternatives).get(token, logprob) == pytest.approx(logprob, abs=1e-6)
    with pytest.raises(ConfigError, match="top_logprobs"):
        Sampling(top_logprobs=2)


def test_an_engine_that_is_dropped_is_free_at_once(loaded: LoadedModel) -> None:
    engine = engine_of(loaded)
    one(engine, ask("Once?", 0), SAMPLING)
    engine.score([Prompt(Conversation((Turn("human", "Text?"), Turn("gpt", "yes"))))])
    dropped = weakref.ref(engine.scheduler)
    gc.disable()  # no cycle keeps it
    try:
        del engine
        assert dropped() is None
    finally:
        gc.enable()


def test_a_first_token_is_told_before_the_next_decoding_step() -> None:
    engine = engine_of(tiny_llava())
    runner, told, at_step = engine.scheduler.runner, [], []
    decode = runner.decode
    runner.decode = lambda ids: at_step.append(len(told)) or decode(ids)
    engine.submit(ask("x"), Sampling(max_new_tokens=4), notify=lambda: told.append(1)).completions()
    assert at_step[0] == 1


@pytest.mark.parametrize("is_fixed", [True, False])
def test_what_a_fixed_model_needs_is_prepared_once(is_fixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    class Counted(AnsweringMode):
        def __init__(self, model: Any) -> None:
            made.append("mode")
            super().__init__(model)

    def counting(model: Any) -> bool:
        made.append("step")
        return can_decode(model)

    monkeypatch.setattr("llava.generation.driver.AnsweringMode", Counted)
    monkeypatch.setattr("llava.generation.runners.can_decode", counting)
    engine = engine_of(tiny_llava(seed=3), prefill_chunk=32, is_fixed=is_fixed)
    answers = [one(engine, ask("What is shown?", 0), Sampling(max_new_tokens=4)).token_ids for _ in range(3)]
    assert answers[0] == answers[1] == answers[2] and engine.scheduler.runner.step is not None
    num = 1 if is_fixed else 3
    assert made.count("mode") == num and (made.count("step") == 1) == is_fixed


def test_a_failed_preparation_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    fails = [True]

    def failing(model: Any) -> bool:
        if fails.pop() if fails else False:
            raise RuntimeError("no luck")
        return can_decode(model)

    monkeypatch.setattr("llava.generation.runners.can_decode", failing)
    engine = engine_of(tiny_llava(seed=3), prefill_chunk=32, is_fixed=True)
    assert one(engine, ask("What is shown?", 0), Sampling(max_new_tokens=4)).finish == "error"
    assert one(engine, ask("What is shown?", 0), Sampling(max_new_tokens=4)).token_ids
    assert engine.scheduler.runner.step is not None


@pytest.mark.parametrize("is_fixed", [True, False])
def test_steps_are_timed_and_a_pause_is_no_step(is_fixed: bool) -> None:
    engine, seconds, ends = engine_of(tiny_llava(seed=3), is_fixed=is_fixed), [], []
    engine.driver.on_step = seconds.append
    original = engine.scheduler.read

    def reading() -> None:
        ends.append(engine.driver.last_step)
        original()

    engine.scheduler.read = reading  # type: ignore[method-assign]
    for _ in range(2):
        engine.driver.last_step = 0.0  # as after a long pause
        one(engine, ask("What is shown?", 0), Sampling(max_new_tokens=3))
    assert len(seconds) == engine.driver.num_steps == len(ends) > 2 and min(seconds) > 0.0
    assert min(ends) > 0.0
