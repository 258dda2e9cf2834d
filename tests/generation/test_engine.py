"""Engine against transformers' generate, against single prompts, and against plain forward passes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from llava.errors import ConfigError, DataError, GenerationError
from llava.generation.engine import LocalEngine
from llava.generation.protocol import Completion, Prompt, Sampling
from llava.model.builder import LoadedModel, build_model
from llava.samples import Conversation, Turn
from tests.support.generation_tools import (
    ask,
    assert_same_answers,
    assert_tie,
    engine_of,
    logits_without_cache,
    mixed_prompts,
    one,
    reference_ids,
    wait_for_readers,
)
from tests.support.tiny import tiny_image, tiny_llava, write_tiny_lm, write_tiny_tower

GREEDY = Sampling(max_new_tokens=24)


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2"])
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return tiny_llava(lm=request.param, seed=3)


@pytest.fixture(scope="module")
def llama() -> LoadedModel:
    return tiny_llava(seed=3)


def windowed(path: Path, lm: str, **options: object) -> LoadedModel:
    """Return a tiny model with a sliding window of eight tokens."""
    write_tiny_lm(path / "lm", lm, sliding_window=8, seed=5, **options)
    write_tiny_tower(path / "tower")
    loaded = build_model(str(path / "lm"), str(path / "tower"))
    loaded.model.eval()
    return loaded


@pytest.fixture(scope="module", params=["all layers", "some layers"])
def sliding(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path = tmp_path_factory.mktemp("sliding")
    if request.param == "all layers":
        return windowed(path, "mistral")
    return windowed(path, "qwen2", use_sliding_window=True, max_window_layers=1)


def assert_like_transformers(loaded: LoadedModel, engine: LocalEngine) -> None:
    prompts = mixed_prompts()
    answers = engine.generate(prompts, GREEDY)
    for prompt, [answer] in zip(prompts, answers, strict=True):
        wanted = reference_ids(loaded, engine, prompt, GREEDY.max_new_tokens)
        if list(answer.token_ids) != wanted:
            assert_tie(engine, prompt, answer.token_ids, wanted, GREEDY)


def first_of(answers: list[list[Completion]]) -> list[Completion]:
    """Return the only answer to each prompt."""
    return [answer for [answer] in answers]


def test_a_batch_gives_the_tokens_of_transformers_generate(loaded: LoadedModel) -> None:
    assert_like_transformers(loaded, engine_of(loaded, max_slots=4))


def test_sliding_windows_count_positions_not_places(sliding: LoadedModel) -> None:
    assert_like_transformers(sliding, LocalEngine(sliding.model, sliding.processor, max_slots=4))


def test_the_layout_without_sharing_gives_the_same(llama: LoadedModel) -> None:
    tree, flat = engine_of(llama), engine_of(llama, layout="flat")
    found, wanted = (first_of(engine.generate(mixed_prompts(), GREEDY)) for engine in (tree, flat))
    assert_same_answers(tree, mixed_prompts(), found, wanted, GREEDY)


def test_a_batch_answers_as_one_prompt_alone_does(loaded: LoadedModel) -> None:
    engine = engine_of(loaded, max_slots=3)
    prompts = mixed_prompts()
    alone = [one(engine, prompt, GREEDY) for prompt in prompts]
    assert_same_answers(engine, prompts, first_of(engine.generate(prompts, GREEDY)), alone, GREEDY)


def test_answers_that_part_where_nothing_is_tied_are_unequal(llama: LoadedModel) -> None:
    engine, prompt = engine_of(llama), ask("When?", 0)
    for sampling in (GREEDY, Sampling(max_new_tokens=24, temperature=1.0, seed=17)):
        answer = one(engine, prompt, sampling)
        other = (answer.token_ids[0] + 5) % 256
        with pytest.raises(AssertionError, match="not a tie"):
            assert_tie(engine, prompt, [other, *answer.token_ids[1:]], answer.token_ids, sampling)
        with pytest.raises(AssertionError, match="continues after"):
            assert_tie(engine, prompt, answer.token_ids[:-1], answer.token_ids, sampling)


def test_order_and_number_of_slots_do_not_matter(llama: LoadedModel) -> None:
    prompts = mixed_prompts()
    # Answers of many lengths, so that sequences often join and leave.
    sampling = Sampling(max_new_tokens=40, temperature=1.0, seed=11, stop=(*"aeiou", *"123"))
    expected = first_of(engine_of(llama, max_slots=16).generate(prompts, sampling))
    assert len({len(answer.token_ids) for answer in expected}) > 3
    for max_slots, max_prefill_tokens in ((1, 4096), (2, 1), (3, 60), (5, 4096)):
        order = random.Random(max_slots).sample(range(len(prompts)), len(prompts))
        engine = engine_of(llama, max_slots=max_slots, max_prefill_tokens=max_prefill_tokens)
        ordered = [prompts[index] for index in order]
        answers = first_of(engine.generate(ordered, sampling))
        assert_same_answers(engine, ordered, answers, [expected[index] for index in order], sampling)


def test_the_image_of_many_questions_is_encoded_once(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = llama.model.model.get_image_features

    def counting(pixel_values: torch.Tensor, **options: object) -> object:
        seen.append(len(pixel_values))
        return original(pixel_values, **options)

    monkeypatch.setattr(llama.model.model, "get_image_features", counting)
    prompts = [ask(f"Question {number}?", number % 2) for number in range(8)]
    engine_of(llama, max_slots=2).generate(prompts, Sampling(max_new_tokens=3))
    assert sum(seen) == 2


def test_a_seed_repeats_and_another_differs(llama: LoadedModel) -> None:
    engine = engine_of(llama)
    drawn = {
        seed: one(engine, ask("Draw.", 1), Sampling(max_new_tokens=12, temperature=1.0, seed=seed)) for seed in (1, 2)
    }
    sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=1)
    again = engine.generate([*mixed_prompts(), ask("Draw.", 1)], sampling)
    assert_same_answers(engine, [ask("Draw.", 1)], again[-1], [drawn[1]], sampling)
    assert drawn[1] != drawn[2]


def test_without_a_seed_answers_differ(llama: LoadedModel) -> None:
    engine = engine_of(llama)
    sampling = Sampling(max_new_tokens=16, temperature=1.0)
    assert one(engine, ask("Draw."), sampling) != one(engine, ask("Draw."), sampling)


def test_samples_share_the_prompt_and_differ(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(llama, max_slots=3)
    lengths: list[int] = []
    prefill = engine.scheduler.runner.prefill
    monkeypatch.setattr(engine.scheduler.runner, "prefill", lambda s, i: lengths.append(len(s)) or prefill(s, i))
    [answers] = engine.generate([ask("Draw.", 0)], Sampling(max_new_tokens=12, temperature=1.0, seed=1, n=5))
    assert lengths == [5] and len(set(answers)) == 5
    sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=1)
    alone = one(engine, ask("Draw.", 0), sampling)
    assert_same_answers(engine, [ask("Draw.", 0)], answers[:1], [alone], sampling)
    [same] = engine.generate([ask("Draw.", 0)], Sampling(max_new_tokens=5, n=3))
    assert len(same) == 3 and len(set(same)) == 1


def test_logprobs_are_those_of_a_forward_pass(loaded: LoadedModel) -> None:
    engine = engine_of(loaded)
    prompts = mixed_prompts()
    for sampling in (Sampling(max_new_tokens=10, logprobs=True), Sampling(10, 0.7, seed=4, top_k=20, logprobs=True)):
        for prompt, [answer] in zip(prompts, engine.generate(prompts, sampling), strict=True):
            logits = logits_without_cache(engine, prompt, list(answer.token_ids))
            expected = logits.log_softmax(-1).gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
            assert answer.logprobs is not None
            assert torch.allclose(torch.tensor(answer.logprobs), expected, atol=1e-4)
    assert one(engine, prompts[0], GREEDY).logprobs is None


def test_broken_prompts_fail_alone_and_say_why(llama: LoadedModel, tmp_path: Path) -> None:
    engine = engine_of(llama, max_tokens=250)
    good = ask("Fine?", 1)
    text = good.conversation
    torn = tmp_path / "torn.png"
    torn.write_bytes(b"not an image")
    prompts = [
        Prompt(text, (str(tmp_path / "absent.png"),)),
        good,
        Prompt(text, (torn,)),
        Prompt(text, (b"\x89PNG nothing",)),
        Prompt(text),
        ask("long " * 60),
        Prompt(Conversation((Turn("human", "a"), Turn("gpt", "b")))),
        good,
    ]
    answers = [completion for [completion] in engine.generate(prompts, Sampling(max_new_tokens=4))]
    errors = [answer.error for answer in answers]
    for index, words in {
        0: "absent.png",
        2: "decoded",
        3: "decoded",
        4: "placeholders",
        5: "tokens long",
        6: "question",
    }.items():
        assert answers[index].finish == "error" and answers[index].text == "" and words in str(errors[index])
    assert answers[1] == answers[7] == one(engine, good, Sampling(max_new_tokens=4))
    with pytest.raises(GenerationError, match="absent"):
        list(engine.stream(prompts[0], GREEDY))


def test_an_image_is_the_same_from_path_bytes_and_memory(llama: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    tiny_image(4).save(path)
    text = Conversation((Turn("human", "<image>\nSame?"),))
    refs = [path, str(path), path.read_bytes(), tiny_image(4)]
    engine = engine_of(llama)
    prompts = [Prompt(text, (ref,)) for ref in refs]
    answers = first_of(engine.generate(prompts, GREEDY))
    assert_same_answers(engine, prompts, answers, answers[:1] * len(refs), GREEDY)
    assert answers[:1] != engine_of(llama).generate([Prompt(text, (tiny_image(5),))], GREEDY)[0]


def test_the_context_ends_an_answer(llama: LoadedModel) -> None:
    engine = engine_of(llama)
    length = len(engine.reader.read(ask("Short?")).encoded.input_ids)
    answer = one(engine_of(llama, max_tokens=length + 5), ask("Short?"), Sampling(max_new_tokens=50))
    assert answer.finish == "length" and len(answer.token_ids) == 5


@pytest.mark.parametrize(
    "question", ["Short?", "A", "Is this a longer question about the left lung?", "?" * 60, "\u80ba?"]
)
def test_a_prompt_must_leave_room_for_one_token(llama: LoadedModel, question: str) -> None:
    length = len(engine_of(llama).reader.read(ask(question)).encoded.input_ids)
    [[refused]] = engine_of(llama, max_tokens=length).generate([ask(question)], GREEDY)
    assert refused.finish == "error" and f"at most {length - 1} fit" in str(refused.error)
    [[answer]] = engine_of(llama, max_tokens=length + 1).generate([ask(question)], GREEDY)
    assert answer.finish == "length" and len(answer.token_ids) == 1


def test_end_token_stops(llama: LoadedModel) -> None:
    engine = engine_of(llama)
    free = one(engine, ask("When?", 0), GREEDY)
    end = free.token_ids[4]
    llama.processor.tokenizer.eos_token_id, old = end, llama.processor.tokenizer.eos_token_id
    try:
        stopped = one(engine, ask("When?", 0), GREEDY)
    finally:
        llama.processor.tokenizer.eos_token_id = old
    assert stopped.finish == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(end) + 1]


def test_stop_strings_across_token_borders(llama: LoadedModel) -> None:
    engine = engine_of(llama)
    free = one(engine, ask("Write!", 2), Sampling(max_new_tokens=40, temperature=1.0, seed=5))
    raw = llama.processor.decode(free.token_ids)
    start = next(i for i in range(8, len(raw) - 3) if raw[i : i + 3].isascii() and raw[i : i + 3].isprintable())
    stop = raw[start : start + 3]
    cut = one(engine, ask("Write!", 2), Sampling(max_new_tokens=40, temperature=1.0, seed=5, stop=("never", stop)))
    assert cut.finish == "stop" and stop not in cut.text
    assert cut.text == raw[: raw.index(stop, 1)].strip().rstrip("\ufffd").rstrip()
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert stop in llama.processor.decode(cut.token_ids) and stop not in llama.processor.decode(cut.token_ids[:-1])


def test_a_stream_grows_to_the_answer(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(llama)
    for seed in range(6):
        sampling = Sampling(max_new_tokens=40, temperature=1.0, seed=seed, stop=("ab", "1"))
        with monkeypatch.context() as patch:
            wait_for_readers(engine, patch)  # which may get no time on a busy machine
            texts = list(engine.stream(ask("Go on.", 1), sampling))
        assert all(after.startswith(before) and after != before for before, after in pairwise(texts))
        assert "".join(texts[-1:]) == one(engine, ask("Go on.", 1), sampling).text
        assert not any(text.endswith("\ufffd") for text in texts)
    assert len(texts) > 3


def test_streams_and_batches_may_interleave(llama: LoadedModel) -> None:
    engine = engine_of(llama, max_slots=2)
    # With this seed no number is closer than 1e-4 to the border between two tokens: streams are compared as text.
    sampling = Sampling(max_new_tokens=24, temperature=1.0, seed=17)
    first: Iterator[str] = engine.stream(ask("First.", 0), sampling)
    second = engine.stream(ask("Second.", 1), sampling)
    heads = [next(first), next(second)]
    batch = engine.generate([ask("Third.", 0), ask("Fourth.")], sampling)
    ends = [[heads[0], *first][-1], [heads[1], *second][-1]]
    alone = [
        one(engine, prompt, sampling)
        for prompt in (ask("First.", 0), ask("Second.", 1), ask("Third.", 0), ask("Fourth."))
    ]
    assert ends == [answer.text for answer in alone[:2]]
    assert_same_answers(engine, [ask("Third.", 0), ask("Fourth.")], first_of(batch), alone[2:], sampling)


def test_closing_a_stream_frees_its_slot(llama: LoadedModel) -> None:
    engine = engine_of(llama, max_slots=1)
    stream = engine.stream(ask("Long.", 0), Sampling(max_new_tokens=1000, temperature=1.0, seed=3))
    next(stream)
    assert len(engine.scheduler.running) == 1
    stream.close()
    assert not engine.scheduler.running and not engine.scheduler.waiting
    assert one(engine, ask("Next?"), GREEDY).finish == "length"


def test_a_failed_batch_leaves_no_request(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(llama, max_slots=2)
    decode = engine.scheduler.runner.decode

    def broken(token_ids: list[int]) -> torch.Tensor:
        raise RuntimeError("kernel failure")

    monkeypatch.setattr(engine.scheduler.runner, "decode", broken)
    with pytest.raises(RuntimeError, match="kernel failure"):
        engine.generate(mixed_prompts(), GREEDY)
    monkeypatch.setattr(engine.scheduler.runner, "decode", decode)
    assert one(engine, ask("Well?", 0), GREEDY) == one(engine_of(llama), ask("Well?", 0), GREEDY)
    assert not engine.scheduler.waiting and not engine.scheduler.ready and not engine.scheduler.running


def test_scores_are_those_of_a_forward_pass(loaded: LoadedModel) -> None:
    turns = (Turn("human", "<image>\nOne?"), Turn("gpt", "yes"), Turn("human", "Two?"), Turn("gpt", "no, none"))
    prompts = [
        Prompt(Conversation(turns), (tiny_image(0),)),
        Prompt(Conversation((Turn("human", "Text?"), Turn("gpt", "")))),
        Prompt(Conversation(turns[:2]), (tiny_image(0),)),
        Prompt(Conversation(turns[:2]), (tiny_image(1),)),
    ]
    for options in ({}, {"layout": "padded"}, {"max_prefill_tokens": 1}):
        engine = engine_of(loaded, **options)
        scores = engine.score(prompts)
        for prompt, score in zip(prompts, scores, strict=True):
            reading = engine.reader.encode_answered(prompt)
            pixels = (
                {"pixel_values": torch.stack([engine.reader.pixels(image) for image in reading.images])}
                if reading.images
                else {}
            )
            with torch.no_grad():
                logits = loaded.model(
                    input_ids=torch.tensor([reading.encoded.input_ids]), use_cache=False, **pixels
                ).logits[0]
            labels = torch.tensor(reading.encoded.labels[1:])
            each = logits[:-1].log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
            each = each * (labels >= 0)
            assert score.logprob == pytest.approx(each.sum().item(), abs=1e-3)
            assert score.num_tokens == (labels >= 0).sum()
            for turn, logprob in score.turns.items():
                chosen = torch.tensor(reading.encoded.turns[1:]) == turn
                assert logprob == pytest.approx((each * chosen).sum().item(), abs=1e-3)
        assert list(scores[0].turns) == [1, 3]
    with pytest.raises(DataError, match="conversation 1"):
        engine.score([prompts[0], Prompt(prompts[0].conversation)])


def test_the_model_keeps_its_mode_and_its_dropout_is_off(llama: LoadedModel) -> None:
    engine = engine_of(llama)
    expected = one(engine, ask("Mode?", 0), GREEDY)
    llama.model.train()
    llama.model.model.vision_tower.eval()
    before = [module.training for module in llama.model.modules()]
    try:
        assert one(engine, ask("Mode?", 0), GREEDY) == expected
        for _ in engine.stream(ask("Mode?", 0), GREEDY):
            assert torch.is_grad_enabled()
        assert [module.training for module in llama.model.modules()] == before
        stream = engine.stream(ask("Mode?", 0), GREEDY)
        next(stream)
        stream.close()
        assert [module.training for module in llama.model.modules()] == before
    finally:
        llama.model.eval()


def test_impossible_settings_are_refused(llama: LoadedModel) -> None:
    engine = engine_of(llama)
    with pytest.raises(ConfigError, match="num_beams"):
        engine.stream(ask("Beams?"), Sampling(num_beams=4))
    with pytest.raises(ConfigError, match="n=2"):
        engine.stream(ask("Two?"), Sampling(n=2))
    with pytest.raises(ConfigError, match="max_slots"):
        engine_of(llama, max_slots=0)
    assert engine.generate([], GREEDY) == [] and engine.score([]) == []


def test_each_prompt_may_have_its_own_sampling(llama: LoadedModel) -> None:
    engine = engine_of(llama)
    prompts = [ask("One?", 0), ask("Two?", 1), ask("Three?", 0)]
    each = [Sampling(max_new_tokens=5), Sampling(9, temperature=1.0, seed=4, n=2), Sampling(4, num_beams=2)]
    found = engine.generate(prompts, each)
    assert [len(answers) for answers in found] == [1, 2, 1]
    for prompt, sampling, answers in zip(prompts, each, found, strict=True):
        [alone] = engine.generate([prompt], sampling)
        assert_same_answers(engine, [prompt] * len(answers), answers, alone, sampling)
    with pytest.raises(ConfigError, match="2 sampling settings for 3 prompts"):
        engine.generate(prompts, each[:2])


def test_the_placeholder_is_never_part_of_an_answer(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(llama)
    token = engine.processor.image_token_id
    original = llama.model.lm_head.forward

    def favoring(states: torch.Tensor) -> torch.Tensor:
        logits = original(states)
        logits[..., token] = 1e3
        return logits

    monkeypatch.setattr(llama.model.lm_head, "forward", favoring)
    for sampling in (Sampling(6), Sampling(6, temperature=1.0, seed=1, n=4), Sampling(4, num_beams=2)):
        for answer in engine.generate([ask("Draw.", 0)], sampling)[0]:
            assert token not in answer.token_ids
