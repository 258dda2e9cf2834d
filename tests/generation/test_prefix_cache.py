"""Prefix cache: same answers as without it, and only new tokens are computed."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.data.encode import Encoded
from llava.errors import ConfigError
from llava.generation.chunked_prefill import ChunkedScheduler
from llava.generation.engine import LocalEngine
from llava.generation.pace import Pace
from llava.generation.prefix_cache import KeyValues, PrefixCache, identities_of, joined, parts_between
from llava.generation.protocol import UNLIMITED, Completion, Prompt, Sampling, Script
from llava.generation.slot_memory import MIN_ANSWER
from llava.model.builder import LoadedModel
from llava.samples import Conversation, Turn
from tests.support.generation_tools import ask, assert_same_answers, engine_of, mixed_prompts, one
from tests.support.tiny import tiny_image, tiny_llava

SAMPLING = Sampling(max_new_tokens=8, logprobs=True)
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny_llava(seed=3)


def caching(loaded: LoadedModel, **options: Any) -> LocalEngine:
    return engine_of(loaded, **{"prefill_chunk": 32, "prefix_cache_mb": 4, **options})


@pytest.fixture
def towers(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of images that passed the tower, one for each run."""
    found: list[int] = []
    original = loaded.model.model.get_image_features

    def counting(pixel_values: torch.Tensor, **options: Any) -> object:
        found.append(len(pixel_values))
        return original(pixel_values, **options)

    monkeypatch.setattr(loaded.model.model, "get_image_features", counting)
    return found


def length_of(engine: LocalEngine, prompt: Prompt) -> int:
    return len(engine.reader.read(prompt).encoded.input_ids)


def read_by(engine: LocalEngine, prompt: Prompt, sampling: Sampling = SAMPLING) -> tuple[Completion, int]:
    """Return the answer, and the number of tokens of the prompt that were computed."""
    runner = engine.scheduler.runner
    before = runner.num_read
    answer = one(engine, prompt, sampling)
    return answer, runner.num_read - before - (len(answer.token_ids) - 1)


def assert_close(engine: LocalEngine, prompts: list[Prompt], found: list[Completion], wanted: list[Completion]) -> None:
    assert_same_answers(engine, prompts, found, wanted, SAMPLING)
    for ours, theirs in zip(found, wanted, strict=True):
        if ours.token_ids == theirs.token_ids and ours.logprobs is not None:
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


@pytest.mark.parametrize("options", [{"prefill_chunk": 7}, {"prefill_chunk": 512}, {"prefix_cache_mb": 0}])
def test_a_batch_is_answered_as_without_a_cache(loaded: LoadedModel, options: dict[str, Any]) -> None:
    engine, prompts = caching(loaded, max_slots=4, **options), mixed_prompts()
    wanted = [answer for [answer] in engine_of(loaded).generate(prompts, SAMPLING)]
    for _ in range(2):
        assert_close(engine, prompts, [answer for [answer] in engine.generate(prompts, SAMPLING)], wanted)
    assert isinstance(engine.scheduler, ChunkedScheduler) and not engine.scheduler.has_work
    assert (engine.scheduler.prefix_cache_bytes > 0) == ("prefix_cache_mb" not in options)


def test_a_later_question_computes_its_own_tokens_and_no_image(loaded: LoadedModel, towers: list[int]) -> None:
    engine = caching(loaded)
    first, later = ask("What is shown?", 0), ask("And where?", 0)
    _, num = read_by(engine, first)
    assert num == length_of(engine, first) and towers == [1]
    answer, num = read_by(engine, later)
    encoded = engine.reader.read(later).encoded
    known = encoded.image_spans[0][1]
    assert num < len(encoded.input_ids) - known and towers == [1]  # the line break after the image is known too
    assert_close(engine, [later], [answer], [one(engine_of(loaded), later, SAMPLING)])
    again, num = read_by(engine, later)
    assert num == 1 and again.token_ids == answer.token_ids


def test_the_next_turn_continues_the_answer() -> None:
    # This template writes nothing between the answer header and an answer.
    loaded = tiny_llava(seed=3, template="chatml")
    turns: tuple[Turn, ...] = (Turn("human", "<image>\nWhat is shown?"),)
    prompt = Prompt(Conversation(turns), (tiny_image(0),))
    for seed in range(300):  # until an answer is encoded to the same tokens again
        sampling = Sampling(max_new_tokens=3, temperature=1.0, seed=seed, logprobs=True)
        first = one(engine_of(loaded), prompt, sampling)
        if first.text.isascii() and first.text.isprintable() and len(first.text) == len(first.token_ids):
            break
    engine = caching(loaded)
    read_by(engine, prompt, sampling)
    following = Prompt(Conversation((*turns, Turn("gpt", first.text), Turn("human", "And where?"))), prompt.images)
    towers: list[int] = []
    engine.model.model.get_image_features = lambda **options: towers.append(1)
    answer, num = read_by(engine, following)
    del engine.model.model.get_image_features
    # Of the answer, only its last token was never read.
    assert num == length_of(engine, following) - length_of(engine, prompt) - len(first.token_ids) + 1 and not towers
    assert_close(engine, [following], [answer], [one(engine_of(loaded), following, SAMPLING)])


def test_questions_that_arrive_together_compute_their_image_once(loaded: LoadedModel, towers: list[int]) -> None:
    engine = caching(loaded)
    prompts = [ask(f"Question {number}?", number % 2) for number in range(8)]
    handles = [engine.submit(prompt, SAMPLING) for prompt in prompts]
    found = [handle.completions()[0] for handle in handles]
    assert sum(towers) == 2
    wanted = [answer for [answer] in engine_of(loaded).generate(prompts, SAMPLING)]
    assert_close(engine, prompts, found, wanted)
    assert sum(handle.counts.cached > 0 for handle in handles) == 7  # the second image follows a known system text


def test_samples_share_one_prefill(loaded: LoadedModel) -> None:
    engine = caching(loaded, max_slots=3)
    sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=1, n=5)
    before = engine.scheduler.runner.num_read
    [found] = engine.generate([ask("Draw.", 0)], sampling)
    decoded = sum(len(answer.token_ids) - 1 for answer in found)
    assert engine.scheduler.runner.num_read - before == length_of(engine, ask("Draw.", 0)) + decoded
    [wanted] = engine_of(loaded).generate([ask("Draw.", 0)], sampling)
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in wanted]


@pytest.mark.parametrize("shares", [False, True])
def test_each_key_has_its_own_tree(loaded: LoadedModel, towers: list[int], shares: bool) -> None:
    engine = caching(loaded, share_prefix_cache=shares)
    cached = []
    for key in ("a", "b", "a"):
        handle = engine.submit(ask("What is shown?", 0), SAMPLING, key=key)
        handle.completions()
        cached.append(handle.counts.cached > 0)
    assert cached == [False, shares, True] and len(towers) == (1 if shares else 2)


def test_what_does_not_fit_is_forgotten_least_recently_used_first(loaded: LoadedModel, towers: list[int]) -> None:
    engine = caching(loaded)
    cache, sizes = engine.scheduler.cache, []
    for image in (0, 1):
        one(engine, ask("First?", image), SAMPLING)
        sizes.append(cache.num_bytes)
    cache.max_bytes = sizes[1] + (sizes[1] - sizes[0]) * 9 // 10
    for image in (0, 2):  # the second image makes room for the third
        one(engine, ask("Next?", image), SAMPLING)
        assert cache.num_bytes <= cache.max_bytes
    towers.clear()
    one(engine, ask("Again?", 0), SAMPLING)
    assert towers == []
    one(engine, ask("Again?", 1), SAMPLING)
    assert towers == [1]


def test_a_piece_of_a_long_prompt_is_read_between_two_steps(loaded: LoadedModel) -> None:
    engine = caching(loaded, prefill_chunk=16, prefix_cache_mb=0)
    runner, order = engine.scheduler.runner, []
    read, decode = runner.read, runner.decode
    runner.read = lambda extensions, *rest: order.append(sum(e.length for e in extensions)) or read(extensions, *rest)
    runner.decode = lambda ids: order.append(0) or decode(ids)
    running = engine.submit(ask("x"), Sampling(max_new_tokens=1500))
    list(zip(range(3), running, strict=False))  # it has been in a decoding step
    engine.submit(ask("y" * 150, 1), Sampling(max_new_tokens=4)).completions()
    running.cancel()
    pieces = [place for place, size in enumerate(order) if size]
    assert max(order) == 16 and len(pieces) > 8
    long = pieces[-(length_of(engine, ask("y" * 150, 1)) // 16) :]
    assert all(order[place + 1] == 0 for place in long)


@pytest.mark.parametrize(("seconds", "layers"), [(0.0, [1, 1, 1]), (float("inf"), [3])])
def test_layers_of_the_tower_alternate_with_steps_of_running_answers(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, seconds: float, layers: list[int]
) -> None:
    expected = one(caching(loaded), ask("What?", 5), SAMPLING)
    engine = caching(loaded, prefill_chunk=512)
    monkeypatch.setattr(Pace, "seconds", seconds)
    running = engine.submit(ask("x"), Sampling(max_new_tokens=1500))
    list(zip(range(3), running, strict=False))  # it has been in a decoding step
    decode, order = engine.scheduler.runner.decode, []
    engine.scheduler.runner.decode = lambda ids: order.append("step") or decode(ids)
    tower_layers = loaded.model.model.vision_tower.encoder.layers
    hooks = [layer.register_forward_hook(lambda *_: order.append("layer")) for layer in tower_layers]
    [found] = engine.submit(ask("What?", 5), SAMPLING).completions()
    running.cancel()
    for hook in hooks:
        hook.remove()
    assert found.token_ids == expected.token_ids
    assert [len(list(run)) for kind, run in groupby(order) if kind == "layer"] == layers


def test_images_of_one_prompt_a_step_pass_the_tower_while_others_are_answered(
    loaded: LoadedModel, towers: list[int]
) -> None:
    engine = caching(loaded, prefill_chunk=512)
    running = [engine.submit(ask("x"), Sampling(max_new_tokens=1500)) for _ in range(4)]
    for stream in running:
        list(zip(range(3), stream, strict=False))  # each has been in a decoding step
    decode, at_step = engine.scheduler.runner.decode, []
    engine.scheduler.runner.decode = lambda ids: at_step.append(len(towers)) or decode(ids)
    handles = [engine.submit(ask("What?", number), SAMPLING) for number in range(4)]
    for handle in handles:
        handle.completions()
    for stream in running:
        stream.cancel()
    assert towers == [1] * 4 and max(after - before for before, after in pairwise([0, *at_step])) == 1


def test_a_prompt_that_is_canceled_while_it_is_read_leaves_nothing(loaded: LoadedModel) -> None:
    engine = caching(loaded, prefill_chunk=1)
    handle = engine.submit(ask("y" * 300, 1), SAMPLING)
    while not engine.scheduler.jobs and not handle.is_over:
        threading.Event().wait(0.001)
    handle.cancel()
    one(engine, ask("Next?"), SAMPLING)
    assert not engine.scheduler.jobs and not engine.scheduler.has_work
    assert all(not node.num_users for node in engine.scheduler.cache._recent)


def test_a_prompt_on_which_the_model_fails_ends_alone(loaded: LoadedModel) -> None:
    engine = caching(loaded)
    runner = engine.scheduler.runner
    read, poison = runner.read, length_of(engine, ask("Poisoned prompt!", 1))

    def reading(extensions: Any, *rest: Any) -> torch.Tensor:
        if any(extension.start + extension.length == poison for extension in extensions):
            raise IndexError("index 7 is out of bounds")
        return read(extensions, *rest)

    runner.read = reading
    prompts = [ask(f"Good {number}?", number % 3) for number in range(10)]
    prompts.insert(4, ask("Poisoned prompt!", 1))
    answers = [answer for [answer] in engine.generate(prompts, SAMPLING)]
    assert [answer.error is None for answer in answers] == [index != 4 for index in range(11)]
    assert answers[4].error == "the model failed on this prompt: IndexError: index 7 is out of bounds"


@pytest.mark.parametrize(("chunk", "num_samples", "num_new"), [(None, 1, 20), (32, 1, 20), (32, 8, 120)])
def test_keys_and_values_stay_below_their_limit(
    loaded: LoadedModel, chunk: int | None, num_samples: int, num_new: int
) -> None:
    cache_mb = 1 if num_samples > 1 else 0  # samples that start later find their prompt there
    engine = engine_of(loaded, prefill_chunk=chunk, kv_cache_mb=1, prefix_cache_mb=cache_mb)
    limit = engine.scheduler.max_kv_bytes = MEGABYTE // 4
    engine.scheduler.runner.cache.limit(limit)
    highest, prompts = 0, [ask(f"Question {number} " + "x" * (number * 37 % 90), number % 3) for number in range(10)]
    decode = engine.scheduler.runner.decode

    def decoding(ids: Any) -> torch.Tensor:
        nonlocal highest
        highest = max(highest, engine.driver.kv_cache_bytes)
        return decode(ids)

    engine.scheduler.runner.decode = decoding
    sampling = Sampling(max_new_tokens=num_new, temperature=1.0, seed=3, n=num_samples)
    found = engine.generate(prompts, sampling)
    assert {answer.error for answers in found for answer in answers} == {None} and limit // 4 < highest <= limit
    wanted = engine_of(loaded).generate(prompts, sampling)
    for number in range(num_samples):
        columns = [[answers[number] for answers in each] for each in (found, wanted)]
        assert_same_answers(engine, prompts, *columns, sampling)
    [[open_ended]] = engine.generate([ask("x" * 300)], Sampling(max_new_tokens=UNLIMITED))
    assert open_ended.error is None and len(open_ended.token_ids) > MIN_ANSWER and highest <= limit
    [[cut]] = engine.generate([ask("x" * 300)], Sampling(max_new_tokens=4000))
    assert cut.finish == "length" and len(open_ended.token_ids) <= len(cut.token_ids) < 4000 and highest <= limit
    [[long]] = engine.generate([ask("x" * 900)], Sampling(max_new_tokens=400))
    assert "kv-cache-mb" in str(long.error) and "limit is 0.2 MB" in str(long.error)
    assert one(engine, prompts[0], SAMPLING).error is None


def test_idle_memory_is_returned(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.generation.driver.LINGER", 0.02)
    engine = caching(loaded)
    engine.submit(ask("Once."), SAMPLING).completions()
    while engine.driver._thread is not None:
        threading.Event().wait(0.005)
    assert engine.driver.kv_cache_bytes == 0 < engine.driver.prefix_cache_bytes
    assert engine.submit(ask("Twice."), SAMPLING).completions()[0].error is None


def test_settings_that_contradict_are_refused(loaded: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="needs prefill_chunk"):
        engine_of(loaded, prefix_cache_mb=4)
    with pytest.raises(ConfigError, match="kv_cache_mb=-1"):
        engine_of(loaded, kv_cache_mb=-1)
    padded = engine_of(loaded, layout="padded", prefill_chunk=32, prefix_cache_mb=4)
    assert one(padded, ask("Fine?", 0), SAMPLING).error is None


VARIANTS: dict[str, dict[str, Any]] = {
    "tiles": {
        "image_mode": "anyres",
        "patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": [(28, 56), (56, 28)],
    },
    "images of any shape": {"image_mode": "keep"},
    "images as written, with markers": {"placement": "as_written", "use_im_start_end": True},
    "windows": {"lm": "mistral", "lm_sizes": {"sliding_window": 8}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_checkpoints_are_answered_as_without_a_cache(name: str) -> None:
    loaded = tiny_llava(seed=3, **VARIANTS[name])
    engine = caching(loaded, prefill_chunk=9)
    wide, high = tiny_image(1).resize((50, 20)), tiny_image(2).resize((20, 50))
    images = [(wide,), (high,), (wide,), (wide, high), (wide, high)]
    prompts = [
        Prompt(Conversation((Turn("human", "Look: " + "<image>\nhere, " * len(shown) + f"number {number}?"),)), shown)
        for number, shown in enumerate(images)
    ]
    wanted = [answer for [answer] in engine_of(loaded).generate(prompts, SAMPLING)]
    for prompt, answer in zip(prompts, wanted, strict=True):
        handle = engine.submit(prompt, SAMPLING)
        assert_close(engine, [prompt], handle.completions(), [answer])
    assert handle.counts.cached >= engine.reader.read(prompts[-1]).encoded.image_spans[-1][1]


def test_dialogues_are_held_as_without_a_cache(loaded: LoadedModel) -> None:
    questions = ("And its size?", "Is it round?")
    scripts = [
        Script(ask(f"Case {number}?", number % 2).conversation, questions, (tiny_image(number % 2),), seed=number)
        for number in range(5)
    ]
    sampling = Sampling(max_new_tokens=6, temperature=1.0, n=2)
    found = caching(loaded, max_slots=4).converse(scripts, sampling)
    wanted = engine_of(loaded).converse(scripts, sampling)
    assert [[one.encoded for one in each] for each in found] == [[one.encoded for one in each] for each in wanted]


def trees() -> Iterator[Prompt]:
    """Return conversations that begin alike and part at random places."""
    draw = random.Random(5)
    for _ in range(24):
        images = draw.sample(range(3), draw.choice([0, 1, 1, 2]))
        turns = [Turn("human", "<image>\n" * len(images) + draw.choice(["What?", "What is it?", "Where?"]))]
        for _ in range(draw.randrange(3)):
            turns += [
                Turn("gpt", draw.choice(["yes", "yes, it is", "no"])),
                Turn("human", draw.choice(["Why?", "Who?"])),
            ]
        yield Prompt(Conversation(tuple(turns)), tuple(tiny_image(number) for number in images))


@pytest.mark.parametrize(("megabytes", "chunk"), [(8, 512), (1, 16)])
def test_random_trees_of_requests_are_answered_as_without_a_cache(
    loaded: LoadedModel, megabytes: int, chunk: int
) -> None:
    prompts = list(trees())
    engine = caching(loaded, prefill_chunk=chunk, prefix_cache_mb=megabytes, max_slots=5)
    if megabytes == 1:
        engine.scheduler.cache.max_bytes = 100_000  # evicts all the time
    draw = random.Random(1)
    handles: list[Any] = []
    for prompt in prompts:
        handles.append(engine.submit(prompt, SAMPLING, key=draw.choice("ab")))
        if draw.random() < 0.3:
            handles[-1].completions()
        assert engine.scheduler.prefix_cache_bytes <= engine.scheduler.cache.max_bytes
    found = [handle.completions()[0] for handle in handles]
    assert_close(engine, prompts, found, [answer for [answer] in engine_of(loaded).generate(prompts, SAMPLING)])
    assert sum(handle.counts.cached for handle in handles) > 0
    assert all(not node.num_users for node in engine.scheduler.cache._recent)


def states_of(tokens: tuple[Any, ...]) -> KeyValues:
    """Return keys whose numbers tell the whole beginning that they belong to."""
    values = [float(hash(tokens[: place + 1]) % 99991) for place in range(len(tokens))]
    states = torch.tensor(values, dtype=torch.float64)[None, None, :, None]
    return KeyValues([states], [-states])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 2), min_size=1, max_size=9)), max_size=14),
    st.integers(1, 30),
)
def test_a_match_is_the_longest_kept_beginning(rows: list[tuple[str, list[int]]], room: int) -> None:
    cache = PrefixCache(room * 16)
    for tree, ids in rows:
        # Token 2 stands for an image of two tokens.
        tokens, spans = [], []
        for token in ids:
            if token == 2:
                spans.append((len(tokens), len(tokens) + 2))
            tokens += [token] * (2 if token == 2 else 1)
        encoded = Encoded(tuple(tokens), (), (), tuple(spans), ("2",) * len(spans))
        identities = identities_of(encoded)
        match = cache.match(tree, encoded, identities)
        assert match.length < len(identities)
        assert not any(start < match.length < stop for start, stop in spans)
        if match.length:
            found, wanted = joined(match.parts), states_of((tree, *identities)).part(1, match.length + 1)
            assert torch.equal(found.keys[0], wanted.keys[0]) and torch.equal(found.values[0], wanted.values[0])
        whole = states_of((tree, *identities)).part(1, len(identities) + 1)
        cache.insert(tree, encoded, identities, lambda *ends, whole=whole: joined(parts_between([whole], *ends)))
        cache.release(match)
        assert cache.num_bytes == sum(node.states.num_bytes for node in cache._recent) <= cache.max_bytes
        if len(identities) <= room and not spans:
            again = cache.match(tree, encoded, identities)
            assert again.length >= match.length
            cache.release(again)
    cache.clear()
    assert cache.num_bytes == 0 and not cache._roots
