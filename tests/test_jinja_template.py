"""Chat templates of tokenizers: ids and labels equal TRL's, spans without marks, refusals, saving."""

from __future__ import annotations

import random
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from llava.chat_families import FAMILIES
from llava.conversation import Segment
from llava.data.encode import encode, encode_prompt
from llava.errors import ConfigError, DataError
from llava.jinja_template import PLAIN_TEMPLATE, JinjaTemplate, choose_template
from llava.processing import LlavaMedProcessor
from llava.samples import Conversation, Turn
from tests.support.tiny import byte_tokenizer

BY_PARTS = {"idefics3_training", "llava_next_training", "smolvlm_training"}
"""Templates of TRL for vision-language models, which take a message as a list of parts, not as text."""

MARKED = sorted(
    path.name.removesuffix(".jinja")
    for path in (files("trl") / "chat_templates").iterdir()
    if path.name.endswith("_training.jinja") and path.name.removesuffix(".jinja") not in BY_PARTS
)
"""All other templates of TRL with generation marks."""

UNMARKED = ["qwen2_5", "qwen3", "llama3", "llama3_1", "llama3_2", "gemma3", "phi3", "phi3_5"]

MARKS = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>",
    "<|end|>",
]  # fmt: skip


def tokenizer_with(source: str) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with the special tokens of all families and a chat template."""
    made = byte_tokenizer()
    made.add_special_tokens({"additional_special_tokens": [*MARKS, "<image>"]})
    made.bos_token, made.eos_token = "<|begin_of_text|>", "<|endoftext|>"
    made.chat_template = source
    return made


def trl_template(name: str) -> str:
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def processor_of(source: str) -> LlavaMedProcessor:
    return LlavaMedProcessor(tokenizer_with(source), None, template="auto", num_image_tokens=1)


def conversations(count: int, *, system: bool) -> list[Conversation]:
    """Return random conversations of one to four questions; some texts hold line ends and several bytes a letter."""
    draw = random.Random(3)
    words = ["liver", "é", "x-ray", "2 cm", "no", "\n", "<b>", "Ja.", "  two", "質"]
    made = []
    for number in range(count):
        turns = [
            Turn(role, " ".join(draw.choices(words, k=draw.randrange(1, 6))) + f" {number}")
            for _ in range(draw.randrange(1, 5))
            for role in ("human", "gpt")
        ]
        made.append(Conversation(tuple(turns), system="Be brief." if system and number % 2 else None))
    return made


def expected(tokenizer: Any, conversation: Conversation) -> tuple[list[int], list[int]]:
    """Return the ids and labels of the assistant mask, as TRL computes them."""
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": "system", "content": conversation.system}] if conversation.system else []
    messages += [{"role": roles[turn.role], "content": turn.text} for turn in conversation.turns]
    found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = found["input_ids"], found["assistant_masks"]
    return ids, [token if is_trained else -100 for token, is_trained in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("name", MARKED)
def test_ids_and_labels_equal_those_of_trl(name: str) -> None:
    processor = processor_of(trl_template(name))
    for conversation in conversations(50, system=name != "gemma_training"):
        ids, labels = expected(processor.tokenizer, conversation)
        encoded = encode(conversation, processor, max_length=None)
        assert list(encoded.input_ids) == ids
        assert list(encoded.labels) == labels


def test_the_families_of_trl_are_compared() -> None:
    assert {
        "qwen2_5_training", "qwen3_training", "llama3_training", "gemma3_training", "phi3_training", "phi3_5_training"
    } <= set(MARKED)  # fmt: skip
    assert len(MARKED) > 25


@pytest.mark.parametrize("name", sorted(BY_PARTS))
def test_a_template_that_takes_parts_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"the chat template cannot be used: .*; use --version NAME"):
        processor_of(trl_template(name))


@pytest.mark.parametrize(
    ("family", "published"),
    [("qwen2.5", "qwen2_5"), ("qwen3", "qwen3_instruct_2507"), ("llama3", "llama3"), ("gemma3", "gemma3")],
)
def test_a_family_writes_the_text_of_its_published_template(family: str, published: str) -> None:
    tokenizer = tokenizer_with(trl_template(published))
    for conversation in conversations(50, system=True):
        texts = [
            "".join(segment.text for segment in template.render(conversation))
            for template in (JinjaTemplate.of(tokenizer, family), JinjaTemplate.of(tokenizer))
        ]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_what_the_differences_of_its_renderings_say(family: str) -> None:
    marked = JinjaTemplate.of(tokenizer_with("-"), family)
    source = re.sub(r"\{% (end)?generation %\}", "", FAMILIES[family])
    unmarked = JinjaTemplate.of(tokenizer_with(source))
    for conversation in conversations(10, system=True):
        texts = [
            [segment.text for segment in template.render(conversation) if segment.trained]
            for template in (marked, unmarked)
        ]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("name", UNMARKED)
def test_without_marks_answers_and_their_end_marks_are_trained(name: str) -> None:
    processor = processor_of(trl_template(name))
    for conversation in conversations(50, system=True):
        segments = processor.template.render(conversation)
        trained = [segment.text for segment in segments if segment.trained]
        answers = [turn.text.strip() for turn in conversation.turns if turn.role == "gpt"]
        assert len(trained) == len(answers)
        for text, answer in zip(trained, answers, strict=True):
            assert text.removeprefix("<think>\n\n</think>\n\n").strip().startswith(answer)
            assert any(mark in text for mark in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"))
            assert "user" not in text and "assistant" not in text


@pytest.mark.parametrize("name", [*MARKED, *UNMARKED])
def test_the_text_is_that_of_transformers_and_prompts_continue(name: str) -> None:
    tokenizer = tokenizer_with(trl_template(name))
    template = JinjaTemplate.of(tokenizer)
    turns = (Turn("human", "<image>\nWhat?"), Turn("gpt", "A lung."), Turn("human", "Why?"), Turn("gpt", "It is."))
    text = "".join(segment.text for segment in template.render(Conversation(turns)))
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn.role], "content": turn.text} for turn in turns]
    assert text == tokenizer.apply_chat_template(messages, tokenize=False)
    for count in (1, 3):
        prompt = template.prompt(Conversation(turns[:count]))
        assert prompt == tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("name", "stop"),
    [("qwen2_5", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("gemma3", "<end_of_turn>"), ("phi3", "<|end|>")],
)
def test_the_end_mark_stops_an_answer(name: str, stop: str) -> None:
    processor = processor_of(trl_template(name))
    assert processor.template.stops == (stop, "<|endoftext|>")
    assert processor.tokenizer.convert_tokens_to_ids(stop) in processor.stop_token_ids
    assert processor.template.parse(f"A lung.{stop}\n<|im_start|>user") == "A lung."


def test_the_image_stands_in_the_question_and_turns_are_numbered() -> None:
    processor = processor_of(trl_template("llama3"))
    turns = (Turn("human", "<image>\nWhat?"), Turn("gpt", "A lung."), Turn("human", "Why?"), Turn("gpt", "It is."))
    encoded = encode(Conversation(turns), processor, images=["a"], max_length=None)
    [(start, stop)] = encoded.image_spans
    assert stop - start == 1 and encoded.turns[start] == 0
    for index, turn in enumerate(turns):
        ids = [token for token, number in zip(encoded.input_ids, encoded.turns, strict=True) if number == index]
        assert turn.text.removeprefix("<image>\n") in processor.tokenizer.decode(ids)


def test_a_trained_question_is_trained_after_its_images_with_its_end_mark() -> None:
    template = JinjaTemplate.of(tokenizer_with(trl_template("qwen2_5")))
    turns = (Turn("human", "<image>\nWhat?", train=True), Turn("gpt", "A lung."))
    trained = [segment.text for segment in template.render(Conversation(turns)) if segment.trained]
    assert trained == ["What?<|im_end|>", "A lung.<|im_end|>\n"]


def test_a_prompt_is_the_start_of_the_training_sequence() -> None:
    processor = processor_of(trl_template("qwen3"))
    turns = (Turn("human", "<image>\nWhat?"), Turn("gpt", "A lung."))
    prompt = encode_prompt(Conversation(turns[:1]), processor, images=["a"])
    row = encode(Conversation(turns), processor, images=["a"], max_length=None)
    assert row.input_ids[: len(prompt.input_ids)] == prompt.input_ids


def test_empty_answers_and_answers_marked_as_untrained_are_not_trained() -> None:
    template = JinjaTemplate.of(tokenizer_with(trl_template("llama3")))
    turns = (Turn("human", "a?"), Turn("gpt", ""), Turn("human", "b?"), Turn("gpt", "no", train=False))
    assert not any(segment.trained for segment in template.render(Conversation(turns)))


ROWS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for m in messages %}{{ m.content }}", "refuses the conversation"),
        ("{{ raise_exception('no chat') }}", "no chat"),
        ("{{ messages[-1]['content'] + eos_token }}", "ambiguous|leaves out"),
        (ROWS + "{{ messages | length }}", "ambiguous"),
        (ROWS.replace("m['content']", "'-'"), "leaves out|ambiguous"),
        ("{% generation %}{% for m in messages %}{{ m['content'] }}{% endfor %}{% endgeneration %}", "ambiguous"),
    ],
)
def test_a_template_that_does_not_tell_answers_apart_is_refused(source: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        JinjaTemplate.of(tokenizer_with(source))


def test_roles_that_a_template_refuses_are_a_data_error() -> None:
    template = JinjaTemplate.of(tokenizer_with(trl_template("gemma3")))
    with pytest.raises(DataError, match="must alternate"):
        template.render(Conversation((Turn("human", "a"), Turn("human", "b"), Turn("gpt", "c"))))


def test_a_tokenizer_without_template() -> None:
    plain = byte_tokenizer()
    with pytest.raises(ConfigError, match="has no chat template; use --version NAME"):
        JinjaTemplate.of(plain)
    assert choose_template(plain) == ("vicuna_v1", None)
    assert choose_template(tokenizer_with("x")) == ("auto", None)
    template = JinjaTemplate.of(tokenizer_with(PLAIN_TEMPLATE))
    trained = [
        part.text for part in template.render(Conversation((Turn("human", "a?"), Turn("gpt", "b")))) if part.trained
    ]
    assert trained == [" b<|endoftext|>"]


def test_the_template_is_saved_with_the_processor(tmp_path: Path) -> None:
    processor = processor_of(trl_template("qwen2_5")).changed(system="Be brief.")
    processor.save_pretrained(tmp_path)
    loaded = LlavaMedProcessor.from_pretrained(tmp_path)
    conversation = Conversation((Turn("human", "a?"), Turn("gpt", "b")))
    assert loaded.template.name == "auto" and loaded.template.system == "Be brief."
    assert encode(conversation, loaded, max_length=None) == encode(conversation, processor, max_length=None)


def test_another_template_restores_the_begin_of_text_token() -> None:
    tokenizer = tokenizer_with(trl_template("llama3"))
    processor = LlavaMedProcessor(tokenizer, None, template="auto", num_image_tokens=1, add_bos=True)
    assert processor.text.bos_ids == ()
    assert processor.changed(template="v1").text.bos_ids == (processor.tokenizer.bos_token_id,)
    assert isinstance(processor.template.render(Conversation((Turn("human", "a"), Turn("gpt", "b"))))[0], Segment)


@pytest.mark.parametrize("name", ["auto_sq", "qwen3_sq"])
def test_a_template_asks_after_the_header_of_a_user(name: str) -> None:
    template = JinjaTemplate.of(tokenizer_with(trl_template("qwen2_5")), name)
    assert template.asked_header() == "<|im_start|>user\n"
    turns = (Turn("human", "What?"), Turn("gpt", "A lung."), Turn("human", "Why?"))
    text = template.prompt(Conversation(turns[:2]))
    assert text.endswith("A lung.<|im_end|>\n<|im_start|>user\n")
    assert template.prompt(Conversation(turns)).startswith(f"{text}Why?")


def test_other_templates_do_not_ask() -> None:
    template = JinjaTemplate.of(tokenizer_with(trl_template("qwen2_5")))
    assert template.asked_header() is None
    with pytest.raises(DataError, match="does not end with a question"):
        template.prompt(Conversation((Turn("human", "What?"), Turn("gpt", "A lung."))))


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_training", "gemma3", "phi3_training"])
def test_a_continuation_leads_from_an_answer_to_the_next(name: str) -> None:
    template = JinjaTemplate.of(tokenizer_with(trl_template(name)))
    turns = (Turn("human", "What?"), Turn("gpt", "A lung."), Turn("human", "Why?"))
    whole = template.prompt(Conversation(turns))
    start = template.prompt(Conversation(turns[:1]))
    for ended, answer in ((True, "A lung." + template.end_mark()), (False, "A lung.")):
        parts = template.continuation(turns[2], index=2, ended=ended)
        assert start + answer + "".join(part.text for part in parts) == whole
        assert not any(part.trained for part in parts)
    assert start.endswith(template.header())
