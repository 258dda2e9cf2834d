"""Check of recorded prompts: text, ids and settings of every template for a fixed exchange.

If several projects use a template name, the template of ours whose text fits the record best is compared.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.fidelity.folder import Line, Oracle, mismatches
from benchmarks.fidelity.published import CHATML_END
from benchmarks.fidelity.texts import CHATML, REPEATED, prompt_ids, templates_of, text_processor
from llava.constants import IMAGE_TOKEN
from llava.conversation import SLOT, TEMPLATES, ConversationTemplate
from llava.samples import Conversation, Turn

EXEMPLAR = "What are the key differences between renewable and non-renewable energy sources?"
"""First sentence of the long exemplar in some original prompts, which this package leaves out."""

EXEMPLAR_DIGEST = "58137e47b1d5fcd4"
"""Start of the SHA-256 of the exemplar, question and answer with their separators, in all originals."""

EXEMPLAR_TURNS = 2

ASKING_DIGEST = "d6856b8f1a91aa2ef01877d2"
"""Start of the SHA-256 of the published system prompt of `v1_sq`."""

REFUSAL = "TypeError"
"""Error of the originals for a prompt of a template of captions."""


def prompts(oracle: Oracle) -> Iterator[Line]:
    """Compare `prompts.json`: text of a fixed exchange in every template, its settings, and recorded ids."""
    compared: Counter[str] = Counter()
    wrong, odd, num_settings = [], [], 0
    recorded_ids: dict[str, bool] = {}
    spoken = exchange(oracle.json("prompts.json").values())
    for name, recorded in oracle.json("prompts.json").items():
        key, what = _compared(oracle, name, recorded, spoken)
        compared[what] += 1
        if key is None:
            wrong.append(name)
            continue
        settings = _settings(TEMPLATES[key], name, recorded)
        num_settings += len(settings)
        odd += [f"{name} {field}" for field, is_right in settings.items() if not is_right]
        if "input_ids" in recorded:
            recorded_ids[name] = _ids_equal(oracle, recorded)
    note = ", ".join(f"{count} {what}" for what, count in compared.items())
    yield mismatches("prompts", wrong, note, count=compared.total())
    yield mismatches("prompt settings", odd, f"{num_settings} settings", count=num_settings)
    if recorded_ids:
        bad = [name for name, equal in recorded_ids.items() if not equal]
        yield mismatches("prompt ids", bad, f"{len(recorded_ids)} prompts", count=len(recorded_ids))


def _compared(oracle: Oracle, name: str, recorded: dict[str, Any], spoken: Conversation) -> tuple[str | None, str]:
    """Return the template of ours that gives the recorded prompt (None without one), and the result."""
    if "prompt" not in recorded:
        captions = [key for key in templates_of(REPEATED.get(name, name)) if TEMPLATES[key].drops_questions]
        is_refused = bool(captions) and recorded.get("error") == REFUSAL
        return ("plain" if is_refused else None), "refused by the original" if is_refused else "different"
    for key in templates_of(name):
        if TEMPLATES[key].form.asked:
            return (key, "equal") if _is_asked_prompt(key, recorded, spoken) else (None, "different")
        if TEMPLATES[key].published_prompt(spoken) == _without_exemplar(key, recorded, spoken):
            return key, "equal"
    for key in templates_of(name) if "bare_roles" in oracle.compat else ():
        if _with_bare_roles(key, recorded, spoken) == recorded["prompt"]:
            return key, "bare_roles"
    return None, "different"


def _is_asked_prompt(template: str, recorded: dict[str, Any], spoken: Conversation) -> bool:
    """Return whether a prompt of a template that asks is ours, with an asked question and its answer in the middle.

    The system prompt, which is a file of the user here, is recognized by its hash.
    """
    asking, (human, gpt, asked) = TEMPLATES[template], recorded["roles"]
    system = recorded["prompt"].partition(f" {human}: ")[0]
    question, _, rest = recorded["prompt"].partition(f"{asked}: ")[2].partition(asking.end_mark())
    answer = rest.partition(f"{gpt}: ")[2].partition(asking.end_mark())[0]
    turns = (*spoken.turns[:-1], Turn("human", question, train=True), Turn("gpt", answer), spoken.turns[-1])
    is_known = hashlib.sha256(system.encode()).hexdigest().startswith(ASKING_DIGEST)
    return is_known and asking.with_system(system).prompt(Conversation(turns)) == recorded["prompt"]


def _with_bare_roles(template: str, recorded: dict[str, Any], spoken: Conversation) -> str:
    """Return our text without the mark before and the line end after each of the recorded roles."""
    text = TEMPLATES[template].published_prompt(spoken)
    for role in recorded["roles"]:
        text = text.replace(f"{CHATML[0]}{role}\n", role)
    return text


def exchange(records: Iterable[dict[str, Any]]) -> Conversation:
    """Return the conversation of all prompts, from a prompt with two separators.

    Raises:
        LookupError: no recorded prompt has two separators.
    """
    for recorded in records:
        if recorded.get("sep") != " " or not recorded.get("sep2"):
            continue
        human, gpt = recorded["roles"][:2]
        _, _, text = recorded["prompt"].partition(f" {human}: ")
        turns: list[Turn] = []
        for part in text.split(recorded["sep2"]):
            question, _, answer = part.strip().removeprefix(f"{human}: ").partition(f" {gpt}:")
            turns.append(Turn("human", question))
            turns += [Turn("gpt", answer.removeprefix(" "))] if answer else []
        return Conversation(tuple(turns))
    raise LookupError("no recorded prompt has two separators, which are needed to find its turns")


def _without_exemplar(template: str, recorded: dict[str, Any], spoken: Conversation) -> str:
    """Return the recorded prompt without an unchanged exemplar, with images wrapped as in our template."""
    wrap = TEMPLATES[template].image_wrap
    wrapped = str(recorded["prompt"].replace(IMAGE_TOKEN, IMAGE_TOKEN.join(wrap)))
    first = spoken.turns[0].text.replace(IMAGE_TOKEN, IMAGE_TOKEN.join(wrap))
    system, mark, rest = wrapped.partition(f"###{recorded['roles'][0]}: {EXEMPLAR}")
    start = rest.rfind(f"###{recorded['roles'][0]}: {first}###")
    if not mark or start < 0:
        return wrapped
    digest = hashlib.sha256(f"{mark}{rest[:start]}".encode()).hexdigest()
    return system + rest[start:] if digest.startswith(EXEMPLAR_DIGEST) else wrapped


def _settings(template: ConversationTemplate, name: str, recorded: dict[str, Any]) -> dict[str, bool]:
    """Return whether each recorded setting of a prompt is that of our template, by name of the setting."""
    if "prompt" not in recorded:
        return {}
    form = template.published or template.form
    roles = ["".join(part for part, _ in form.human).partition(f": {SLOT}")[0], form.gpt[0][0].removesuffix(":")]
    roles += [form.asked[0][0].removesuffix(":")] if form.asked else []
    end = "".join(part for part, _ in form.gpt).partition(SLOT)[2].rstrip(" ")
    expected: dict[str, list[Any]]
    if CHATML_END in template.stops:
        marked = [f"{CHATML[0]}user\n", f"{CHATML[0]}assistant\n"]
        expected = {"roles": [marked, ["user", "assistant"]], "sep": [CHATML_END], "sep2": [None], "version": ["mpt"]}
        style = "MPT"
    elif form.first:
        start = form.human[0][0].partition("[INST]")[0]
        expected = {"roles": [["USER", "ASSISTANT"]], "sep": [start], "sep2": ["</s>"], "version": ["llama_v2"]}
        style = "LLAMA_2"
    elif end == "###":
        expected = {"roles": [roles], "sep": [end], "sep2": [None], "version": ["Unknown", name]}
        style = "SINGLE"
    else:
        expected = {"roles": [roles], "sep": [" "], "sep2": [end], "version": ["v1", "Unknown", name]}
        style = "TWO"
    preset = EXEMPLAR_TURNS if EXEMPLAR in recorded["prompt"] else len(template.preset)
    expected |= {"sep_style": [style], "preset_messages": [preset]}
    return {field: recorded[field] in values for field, values in expected.items() if field in recorded}


def _ids_equal(oracle: Oracle, recorded: dict[str, Any]) -> bool:
    processor = text_processor((oracle.language_models or oracle.models)[0], "v1")
    return prompt_ids(recorded["prompt"], processor) == recorded["input_ids"]
