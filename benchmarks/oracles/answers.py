"""Recorded generations: greedy, beams, repetition penalty."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from benchmarks.oracles.folder import IMAGE_MARK, Line, Oracle, loaded_from
from benchmarks.oracles.numbers import expanded
from benchmarks.oracles.texts import fitting
from llava.generation.local import LocalEngine
from llava.generation.protocol import Completion, Prompt, Sampling
from llava.samples import Conversation, Turn

MARGIN = 1e-3
"""Where the two best logits come closer than this, rounding may decide: such a case cannot fail."""

PENALTIES = {"rep": 1.3}
"""Of the recorded ways that do not say it."""


def generation(oracle: Oracle) -> Iterator[Line]:
    """`generate.json`: the new token ids of every case, by way of choosing and by checkpoint."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in oracle.json("generate.json"):
        groups.setdefault((case.get("checkpoint", ""), case.get("mode", "greedy")), []).append(case)
    for (checkpoint, mode), cases in groups.items():
        folder = oracle.model(checkpoint or None)
        loaded = loaded_from(oracle.path, str(folder.relative_to(oracle.path)))
        engine = LocalEngine(loaded.model, loaded.processor)
        usual = loaded.processor.template.name, loaded.processor.system
        wrong, close, read = [], 0, 0
        for case in cases:
            found = _answer(oracle, engine, case)
            read += found is None
            if found is None or list(found.token_ids) != _new_ids(case):
                close += found is not None and case["min_top2_margin"] < MARGIN
                if found is None or case["min_top2_margin"] >= MARGIN:
                    wrong.append(f"{case['id']}{'/' + case['template'] if 'template' in case else ''}")
        loaded.processor.use_template(usual[0], system=usual[1])
        note = f"{len(cases) - len(wrong) - close} of {len(cases)} equal"
        note += f", {close} where rounding decides" if close else ""
        note += f", {read} prompts read otherwise" if read else ""
        note += f"; differ {', '.join(wrong)}" if wrong else ""
        name = f"generated ids {mode} {checkpoint.rpartition('/')[2]}".rstrip()
        yield Line(name, float(len(wrong)), "FAIL" if wrong else "ok", note)


def _answer(oracle: Oracle, engine: LocalEngine, case: dict[str, Any]) -> Completion | None:
    """Our answer to the first question of the case's row; None if our prompt is not the recorded one."""
    row = oracle.rows[case["id"]]
    text = next(turn["value"] for turn in row["conversations"] if turn["from"] == "human")
    prompt = Prompt(Conversation((Turn("human", text),)), tuple(oracle.pictures(case["id"])[: text.count("<image>")]))
    processor = engine.processor
    recorded = expanded(processor, case["input_ids"])
    names = fitting(case["template"]) if "template" in case else [processor.template.name]
    for name in names:
        processor.use_template(name)
        if list(engine.reader.read(prompt).encoded.input_ids) == recorded:
            return engine.generate([prompt], _sampling(case))[0][0]
    return None


def _sampling(case: dict[str, Any]) -> Sampling:
    mode, options = case.get("mode", "greedy"), case.get("gen_kwargs") or {}
    beams = re.search(r"beam(\d+)", mode)
    return Sampling(
        max_new_tokens=20 if "output_ids" in case else 16,
        num_beams=options.get("num_beams", int(beams[1]) if beams else 1),
        repetition_penalty=options.get("repetition_penalty", PENALTIES.get(mode, 1.0)),
    )


def _new_ids(case: dict[str, Any]) -> list[int]:
    """Recorded ids without the prompt."""
    if "new_ids" in case:
        return list(case["new_ids"])
    ids, prompt = case["output_ids"], case["input_ids"]
    if ids[: len(prompt)] == prompt:
        return list(ids[len(prompt) :])
    return list(ids[1:] if ids[0] == prompt[0] and IMAGE_MARK not in ids else ids)
