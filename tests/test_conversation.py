from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.chat_template import Segment
from llava.conversation import TEMPLATES, ConversationTemplate, get_template
from llava.errors import ConfigError, DataError
from llava.samples import Conversation, Turn
from llava.system_prompts import SYSTEM_PROMPTS
from tests.support.text_tools import talk

DIGESTS = {
    "human": (156, "ace78a978005"),
    "user": (154, "1fa69e2371b7"),
    "bair": (26, "4b37861d7d2f"),
    "mpt": (127, "c20002e5cc3a"),
    "chatml": (40, "9ce12280308e"),
    "llava_llama_2": (186, "790f4cfc0552"),
    "mmtag": (311, "563c2a621b11"),
    "med_multimodal": (379, "775b149575e4"),
    "med_v1": (388, "9784a3117e8f"),
    "med_simple": (296, "0771b9327750"),
    "llama_2": (508, "d52c188a3c96"),
}

ASKED = ("<image>\nQ1", "A1", "Q2")

GOLDEN = {
    "llava_v0": "{S}###Human: <image>\nQ1###Assistant: A1###Human: Q2###Assistant:",
    "v1": "{S} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:",
    "llava_med_v1.5:v1": "{S} USER: <image>\nQ1 ASSISTANT: A1</s> USER: Q2 ASSISTANT:",
    "llava_llama_2": "[INST] <<SYS>>\n{S}\n<</SYS>>\n\n<image>\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST]",
    "mistral_instruct": "[INST] <image>\nQ1 [/INST] A1 </s>[INST] Q2 [/INST]",
    "mpt": "{S}<|im_end|><|im_start|>user\n<image>\nQ1<|im_end|><|im_start|>assistant\nA1<|im_end|>"
    "<|im_start|>user\nQ2<|im_end|><|im_start|>assistant\n",
}

TRAINED = {
    "v0": "{S}\n\n[###] Human: Q1\n[### Assistant: A1\n###] Human: Q2\n[### Assistant: A2\n### ]",
    "v1": "{S} USER: Q1 ASSISTANT:[ A1</s>]USER: Q2 ASSISTANT:[ A2</s>]",
    "mistral_instruct": "[INST] Q1 [/INST][ A1 </s>][INST] Q2 [/INST][ A2 </s>]",
    "mpt": "{S}<|im_end|><|im_start|>user\nQ1<|im_end|><|im_start|>assistant\n[A1<|im_end|>]"
    "<|im_start|>user\nQ2<|im_end|><|im_start|>assistant\n[A2<|im_end|>]",
    "chatml_sq": "<|im_start|>system\n{S}<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n"
    "[A1<|im_end|>]\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n[A2<|im_end|>]\n",
    "chatml": "<|im_start|>system\n{S}<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n[A1<|im_end|>]"
    "\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n[A2<|im_end|>]\n",
}


def text_of(segments: tuple[Segment, ...]) -> str:
    return "".join(segment.text for segment in segments)


def bracketed(segments: tuple[Segment, ...]) -> str:
    """Return the text with [ ] around its trained parts."""
    text = "".join(f"\0{segment.text}\1" if segment.trained else segment.text for segment in segments)
    return text.replace("\1\0", "").replace("\0", "[").replace("\1", "]")


@pytest.mark.parametrize("name", DIGESTS)
def test_system_texts_are_the_published_ones(name: str) -> None:
    text = SYSTEM_PROMPTS[name]
    assert (len(text), hashlib.sha256(text.encode()).hexdigest()[:12]) == DIGESTS[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_prompts(name: str) -> None:
    template = get_template(name)
    assert template.published_prompt(talk(*ASKED)) == GOLDEN[name].replace("{S}", template.system)


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_trained(name: str) -> None:
    template = get_template(name)
    segments = template.render(talk("Q1", "A1", "Q2", "A2"))
    assert bracketed(segments) == TRAINED[name].replace("{S}", template.system)


def test_v0_prompt_continues_the_training_text() -> None:
    template = get_template("v0")
    assert template.prompt(talk("Q1")) == f"{template.system}\n\n### Human: Q1\n### Assistant:"


ORACLES = {
    "llava-1.2.2": "",
    "llava-med-1.0": "llava_med_v1.0:",
    "llava-med-1.5-mistral": "llava_med_v1.5:",
    "llava-rad": "",
    "stllava-med": "stllava_med:",
}
LONG_EXEMPLAR = "What are the key differences between renewable and non-renewable energy sources?"


@pytest.mark.parametrize("oracle", ORACLES)
def test_published_prompts_of_the_oracles(shared: Path, oracle: str) -> None:
    """Prompts of all templates equal the recorded ones, with exceptions:

    `default`, `v0` and `v1` of LLaVA-Med 1.0 start with a long example that this package omits, so the rest is
    compared; `plain` raises in the original code; `mpt` and `v1_sq` of STLLaVA-Med have broken roles, so ids are
    compared instead.
    """
    prompts = json.loads((shared / "oracles" / oracle / "prompts.json").read_text(encoding="utf-8"))
    second = "Why?" if oracle == "stllava-med" else "Which side?"
    conversation = talk("<image>\nWhat is shown?", "A lung.", second)
    num_compared = 0
    for name, expected in prompts.items():
        if "prompt" not in expected or (oracle == "stllava-med" and name in ("mpt", "v1_sq")):
            continue
        template = TEMPLATES.get(ORACLES[oracle] + name) or TEMPLATES[name]
        ours, theirs = template.published_prompt(conversation), expected["prompt"]
        theirs = theirs.replace("<image>", "<image>".join(template.image_wrap))  # wrapped before rendering there
        if LONG_EXEMPLAR in theirs:
            start = theirs.index("###Human: <image>")
            theirs = theirs[: len(template.system)] + theirs[start:]
        assert ours == theirs, name
        num_compared += 1
    assert num_compared >= 8


def test_v1_sq_prompt(shared: Path) -> None:
    prompts = json.loads((shared / "oracles" / "stllava-med" / "prompts.json").read_text(encoding="utf-8"))
    published = prompts["v1_sq"]["prompt"]
    template = get_template("v1_sq").with_system(published.split(" USER: ", maxsplit=1)[0])
    turns = talk("<image>\nWhat is shown?", "A lung.", "Which side?", "Left.", "Why?").turns
    asked = Conversation((*turns[:2], Turn("human", "Which side?", train=True), *turns[3:]))
    assert template.prompt(asked) == published


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=30).map(str.strip)


def clean(template: ConversationTemplate, text: str) -> bool:
    return bool(text) and not any(mark in text for mark in ("<image>", *template.stops, *template.echoes))


@given(data=st.data(), name=st.sampled_from(sorted(TEMPLATES)))
def test_prompt_is_a_prefix_of_the_training_text(data: st.DataObject, name: str) -> None:
    texts = data.draw(st.lists(WORDS, min_size=1, max_size=5).map(lambda texts: texts[: len(texts) - 1 | 1]))
    template = get_template(name)
    answered = talk(*texts, data.draw(WORDS))
    assert text_of(template.render(answered)).startswith(template.prompt(talk(*texts)))


@given(data=st.data(), name=st.sampled_from(sorted(TEMPLATES)))
def test_parse_gives_the_answer_back(data: st.DataObject, name: str) -> None:
    template = get_template(name)
    answer = data.draw(WORDS.filter(lambda text: clean(template, text)))
    question = talk("Q")
    rendered = text_of(template.render(talk("Q", answer)))
    assert template.parse(rendered[len(template.prompt(question)) :]) == answer


def test_parse_takes_echoed_headers_off() -> None:
    assert get_template("v0").parse("### Assistant: Human: ### A lung.\n### Human: And") == "A lung."
    assert get_template("v1").parse(" A lung.</s>USER: x") == "A lung."
    assert get_template("v1").parse("Assistant: stays") == "Assistant: stays"


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_turn_numbers_and_train_flags(name: str) -> None:
    template = get_template(name)
    turns = (Turn("human", "Q1"), Turn("gpt", "A1", train=False), Turn("human", "Q2"), Turn("gpt", "A2"))
    segments = template.render(Conversation(turns))
    assert [s.turn for s in segments] == sorted(s.turn for s in segments)
    assert not any(segment.trained for segment in segments if segment.turn == 1)
    assert any("A2" in segment.text and segment.trained for segment in segments)
    asked = template.render(Conversation((Turn("human", "<image>\nQ1", train=True), Turn("gpt", "A1"))))
    if not template.drops_questions:
        assert any(s.text.strip() == "Q1" and s.trained for s in asked), asked
        assert not any("<image>" in s.text and s.trained for s in asked)


def test_system_text_of_conversation_and_template() -> None:
    template = get_template("llava_llama_2").with_system("Be {brief}.")
    assert template.prompt(talk("Q {}")) == "[INST] <<SYS>>\nBe {brief}.\n<</SYS>>\n\nQ {} [/INST]"
    assert template.prompt(talk("Q", system="S")) == "[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST]"
    assert template.prompt(talk("Q", system="")) == "[INST] Q [/INST]"


def test_plain_keeps_only_the_image() -> None:
    assert bracketed(get_template("plain").render(talk("Describe.\n<image>", "A caption."))) == "<image>[A caption.\n]"


def test_errors() -> None:
    with pytest.raises(ConfigError, match="unknown template 'v9'; known: bair_v1"):
        get_template("v9")
    with pytest.raises(DataError, match="does not end with a question"):
        get_template("v1").prompt(talk("Q", "A"))


@pytest.mark.parametrize("name", ["chatml", "mpt"])
def test_an_answer_keeps_no_line_end_behind_a_header_that_ends_with_one(name: str) -> None:
    """Tokenizers merge newlines, so that the last token of a prompt would not be in the training sequence."""
    template = TEMPLATES[name]
    question = Turn("human", "q")
    rendered = ["".join(part.text for part in template.render(Conversation((question, Turn("gpt", answer)))))
                for answer in ("\n\nYes.\n", "Yes.\n")]  # fmt: skip
    assert rendered[0] == rendered[1] and rendered[0].startswith(template.prompt(Conversation((question,))))


ASKING = {
    "v1_sq": "{S} USER: Q1 ASSISTANT:[ A1</s>]VUSER:[ Q2</s>] ASSISTANT:[ A2</s>]",
    "chatml_sq": "<|im_start|>system\n{S}<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n"
    "[A1<|im_end|>]\n<|im_start|>vuser\n[Q2<|im_end|>]\n<|im_start|>assistant\n[A2<|im_end|>]\n",
}


@pytest.mark.parametrize("name", ASKING)
def test_an_asked_question_and_its_end_mark_are_trained(name: str) -> None:
    template = get_template(name)
    turns = talk("Q1", "A1", "Q2", "A2").turns
    asked = Conversation((*turns[:2], Turn("human", "\n" * (name == "chatml_sq") + "Q2", train=True), turns[3]))
    assert bracketed(template.render(asked)) == ASKING[name].replace("{S}", template.system)


@pytest.mark.parametrize("name", ASKING)
def test_after_an_answer_a_prompt_ends_where_an_asked_question_starts(name: str) -> None:
    template = get_template(name)
    expected = ASKING[name].replace("{S}", template.system)
    opened = template.open(talk("Q1", "A1"))
    before = expected[: expected.replace("[ Q2", "[Q2").index("[Q2")]
    assert text_of(opened) == before.replace("[", "").replace("]", "")
    assert opened[-1].text == template.asked_header() and opened[-1].turn == 2
    assert not any(segment.trained for segment in opened)


def test_a_template_that_cannot_ask_says_which_can() -> None:
    with pytest.raises(DataError, match=r"template v1 cannot ask one itself; v1_sq, chatml_sq can"):
        get_template("v1").open(talk("Q1", "A1"))
    with pytest.raises(DataError, match="does not end with a question"):
        get_template("v1_sq").open(Conversation(()))


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_continuation_is_the_text_from_an_answer_to_the_next_header(name: str, ended: bool) -> None:
    template = get_template(name)
    question = Turn("human", "{Q2}\n<image>")
    whole = template.open(Conversation((*talk("Q1", "A1").turns, question)))
    added = template.continuation(question, index=2, ended=ended)
    assert text_of(whole).endswith(text_of(added)) and not any(segment.trained for segment in added)
    before = text_of(whole)[: -len(text_of(added)) or None]
    answer = before.removeprefix(template.prompt(talk("Q1")))
    assert answer.strip() == ("A1" + template.end_mark() * ended).strip()
    assert [s.turn for s in added] == [s.turn for s in whole][-len(added) :]
    if template.header():
        assert added[-1].text == template.header()
