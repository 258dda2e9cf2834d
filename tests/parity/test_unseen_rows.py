"""Rows on which the originals are wrong, as they record them, are explained by name; changed ones are not.

The records are written here from the description of the originals: literal templates, sentencepiece on each piece
between images, and token counts of each turn alone.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from benchmarks.fidelity import __main__
from benchmarks.fidelity.folder import Line, Oracle
from benchmarks.fidelity.runs import lacking_files
from benchmarks.fidelity.trajectories import options_of
from llava.compat import COMPAT
from llava.conversation import TEMPLATES

IGNORED, LIMIT = -100, 256
MARKS = {"<|im_start|>": 640, "<|im_end|>": 641}
QUESTION, ANSWER = "What is shown?", "Lobe axial no radiograph."
Ids = Callable[[str], list[int]]


def ids_of(shared: Path, *, spells: bool = False, marks: bool = False, strips: bool = False) -> Ids:
    """Return the tokenizer of an original: the pieces around images, without (`spells`) or with known end marks."""
    model = sentencepiece.SentencePieceProcessor(
        model_file=str(shared / "oracles" / "llava-1.2.2" / "base_llm" / "tokenizer.model")
    )
    special = {**({} if spells else {"</s>": 2, "<s>": 1}), **(MARKS if marks else {})}

    def ids(text: str) -> list[int]:
        found = [1]
        for number, part in enumerate(text.split("<image>")):
            found += [-200] * bool(number)
            pieces = re.split("(" + "|".join(map(re.escape, special)) + ")", part) if special else [part]
            for at, piece in enumerate(pieces):
                if piece in special:
                    found.append(special[piece])
                    continue
                before_mark = strips and at + 1 < len(pieces)
                found += model.encode(piece.rstrip() if before_mark else piece) if piece else []
        return found

    return ids


def recorded(ids: list[int], labels: list[int] | None) -> dict[str, Any]:
    """Return a record; without labels the row is ignored with a warning."""
    return {
        "input_ids": ids,
        "labels": [IGNORED] * len(ids) if labels is None else labels,
        "mismatch_warning": labels is None,
    }


def masked(ids: list[int], spans: list[tuple[int, int]]) -> list[int]:
    """Return labels that are ignored in some spans."""
    labels = list(ids)
    for start, stop in spans:
        labels[start:stop] = [IGNORED] * len(labels[start:stop])
    return labels


def two(ids: Ids, *turns: str, system: str = TEMPLATES["v1"].system) -> dict[str, Any]:
    """Return the record of the Vicuna v1 template: a turn without text is an open role."""
    text = f"{system} "
    for number, turn in enumerate(turns):
        role, end = ("USER", " ") if number % 2 == 0 else ("ASSISTANT", "</s>")
        text += f"{role}: {turn}{end}" if turn else f"{role}:"
    labels, cursor = ids(text), 1
    labels[0] = IGNORED
    for part in text.split("</s>"):
        pieces = part.split(" ASSISTANT: ")
        if not part or len(pieces) != 2:
            break
        asked = len(ids(pieces[0] + " ASSISTANT: ")) - 2
        labels = masked(labels, [(cursor, cursor + asked)])
        cursor += len(ids(part))
    labels = masked(labels, [(cursor, len(labels))])
    return recorded(ids(text), labels if cursor in (len(labels), *range(LIMIT, 4096)) else None)


def one(ids: Ids, *turns: tuple[str, str]) -> dict[str, Any]:
    """Return the record of the `###` template, which ends with `### ` whatever the last turn is."""
    system = f"{TEMPLATES['v0'].system}\n\n"
    parts = [f"### {'Human' if role == 'human' else 'Assistant'}: {text}\n" for role, text in turns]
    found = ids(system + "".join(parts) + "### ")
    cursor, labels = len(ids(system)), list(found)
    labels[:cursor] = [IGNORED] * cursor
    for (role, _), part in zip(turns, parts, strict=True):
        if role == "human":
            labels = masked(labels, [(cursor + 2, cursor + len(ids(part)))])
        cursor += len(ids(part))
    return recorded(found, labels)


def chatml(ids: Ids, question: str, answer: str) -> dict[str, Any]:
    """Return the record of the ChatML template of LLaVA-Rad for one question."""
    end, header = "<|im_end|>", "<|im_start|>assistant\n"
    system = TEMPLATES["mpt"].system
    text = f"{system}{end}<|im_start|>user\n{question}{end}{header}{answer}{end}"
    found, asked = ids(text), ids(text[: text.rindex(header)] + header)
    cursor = len(ids(text.removesuffix(end))) + len(ids(end))
    labels = masked(found, [(0, len(asked)), (cursor, len(found))])
    return recorded(found, labels if cursor == len(found) else None)


def turns(*texts: str, first: int = 0) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[(first + n) % 2], "value": text} for n, text in enumerate(texts)]


def check(shared: Path, folder: Path, rows: list[Any], tree: dict[str, Any], compat: frozenset[str]) -> list[Line]:
    """Return the lines of a folder of rows with their records."""
    if not folder.exists():
        folder.mkdir()
        shutil.copytree(shared / "oracles" / "llava-1.2.2" / "base_llm", folder / "base_llm")
    (folder / "data.json").write_text(json.dumps(rows))
    (folder / "preprocess.json").write_text(json.dumps(tree))
    return list(__main__.checked(folder, compat))


def cases(shared: Path) -> dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """Return, by the name that explains it: tokenizer variant, template, row, and its record."""
    plain, chat = ids_of(shared), ids_of(shared, marks=True, spells=True, strips=True)
    spelled = ids_of(shared, spells=True)
    pair = {"image": ["im0.png", "im1.png"], "conversations": turns(f"<image>\n<image>\n{QUESTION}", ANSWER)}
    once = {"image": "im0.png", "conversations": turns(f"{QUESTION} <image> and <image>", ANSWER)}
    silent = {"conversations": turns(QUESTION, "", "Why?", ANSWER)}
    last = {"image": "im0.png", "conversations": turns(f"<image>\n{QUESTION}", "")}
    spaced = {"conversations": turns(QUESTION, f"{ANSWER} ")}
    told = {"conversations": turns(ANSWER, QUESTION, ANSWER, first=1)}
    return {
        "collapsed_images": ("sp_legacy", "v1", pair, two(plain, f"<image>\n{QUESTION}", ANSWER)),
        "collapsed_images ": ("sp_legacy", "v1", once, two(plain, f"<image>\n{QUESTION}  and", ANSWER)),
        "open_answers": ("sp_legacy", "v1", silent, two(plain, QUESTION, "", "Why?", ANSWER)),
        "open_answers ": ("sp_legacy", "v1", last, two(plain, f"<image>\n{QUESTION}", "")),
        "trained_headers": ("sp_legacy", "v0", {"conversations": turns(QUESTION)}, one(plain, ("human", QUESTION))),
        "first_answer": (
            "sp_legacy", "v0", told, one(plain, ("gpt", ANSWER), ("human", QUESTION), ("gpt", ANSWER)),
        ),
        "stripped_marks": ("sp_legacy_chatml", "mpt", spaced, chatml(chat, QUESTION, f"{ANSWER} ")),
        "spelled_end_marks": (
            "sp_legacy", "v1", {"conversations": turns(QUESTION, ANSWER)}, two(spelled, QUESTION, ANSWER),
        ),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "collapsed_images", "collapsed_images ", "open_answers", "open_answers ", "trained_headers", "first_answer",
        "stripped_marks", "spelled_end_marks",
    ],
)  # fmt: skip
def test_a_defect_explains_its_rows_and_no_change_of_them(shared: Path, tmp_path: Path, name: str) -> None:
    variant, template, row, record = cases(shared)[name]
    rows = [{"id": "odd", **row}]
    tree = {variant: {template: {"odd": record}}}
    lines = check(shared, tmp_path / "x", rows, tree, frozenset(COMPAT))
    assert [line.status for line in lines] == ["ok", "ok"], lines
    assert f"1 {name.strip()}" in lines[0].note
    assert lines[1].note in (lines[0].note, "1 ignored_rows", "1 counted_labels")
    lines = check(shared, tmp_path / "x", rows, tree, frozenset(COMPAT) - {name.strip()})
    assert any(line.status == "FAIL" for line in lines), "the name is needed"
    for field, place in (("input_ids", -2), ("labels", -2), ("labels", 0), ("mismatch_warning", None)):
        value = record[field]
        wrong = not value if place is None else [*value[:place], 7, *value[place:][1:]]
        changed = {variant: {template: {"odd": {**record, field: wrong}}}}
        lines = check(shared, tmp_path / "x", rows, changed, frozenset(COMPAT))
        assert any(line.status == "FAIL" for line in lines), field


@pytest.mark.parametrize(("first", "second"), [(120, 100), (100, 120), (90, 64), (119, 118), (130, 60)])
def test_each_way_may_cut_rows_at_its_own_limit(shared: Path, tmp_path: Path, first: int, second: int) -> None:
    """Rows are cut at the maximum length of their tokenizer, and labels with them."""
    ids = ids_of(shared)
    rows = [{"id": f"long {n}", "conversations": turns(QUESTION, "no " * (90 + n))} for n in range(2)]
    tree: dict[str, Any] = {}
    for variant, limit in (("sp_legacy", first), ("other", second)):
        whole = [two(ids, QUESTION, row["conversations"][1]["value"]) for row in rows]
        tree[variant] = {
            "v1": {
                row["id"]: {**record, "input_ids": record["input_ids"][:limit], "labels": record["labels"][:limit]}
                for row, record in zip(rows, whole, strict=True)
            }
        }
    lines = check(shared, tmp_path / "x", rows, tree, frozenset())
    assert [line.status for line in lines] == ["ok", "ok"], lines
    assert f"2 equal, cut there at {first}" in lines[0].note and f"2 equal, cut there at {second}" in lines[0].note
    shorter = tree["other"]["v1"]["long 0"]
    tree["other"]["v1"]["long 0"] = {**shorter, **{k: shorter[k][:-3] for k in ("input_ids", "labels")}}
    assert check(shared, tmp_path / "x", rows, tree, frozenset(COMPAT))[0].status == "FAIL"


@pytest.mark.parametrize(
    ("template", "row", "is_refused"),
    [
        ("plain", turns("<image>\nWhat?", "A lung."), False),
        ("plain", turns("What?", "A lung."), True),
        ("plain", turns("<image>\nWhat?", "A lung.", "Why?", "So."), True),
        ("v1", turns("What?", "A lung."), False),
        ("v1", [*turns("What?"), *turns("Really?")], True),
        ("v0", [*turns("What?"), *turns("Really?")], False),
    ],
)
def test_an_error_is_right_only_where_that_original_refuses(
    shared: Path, tmp_path: Path, template: str, row: list[Any], is_refused: bool
) -> None:
    rows = [{"id": "odd", "conversations": row}, {"id": "usual", "conversations": turns(QUESTION, ANSWER)}]
    for error in ("AssertionError", "KeyError"):
        tree = {"sp_legacy": {template: {"odd": {"error": error}}}}
        [ids, _] = check(shared, tmp_path / "x", rows, tree, frozenset(COMPAT))
        assert (ids.status == "ok") is (is_refused and error == "AssertionError"), ids


def test_a_missing_weight_file_is_a_reason_to_skip(shared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unseen"
    shutil.copytree(shared / "oracles" / "llava-1.2.2", folder, ignore=shutil.ignore_patterns("README.md"))
    (folder / "out" / "stage2" / "model.safetensors").unlink()
    (folder / "init" / "stage2_full.bin").unlink()
    for name in ("forward.npz", "grads.json", "generate.json", "image_preprocess.npz", "lora_forward.npz"):
        lines = list(__main__.safely(__main__.CHECKS[name], Oracle(folder), name))
        needed = name != "lora_forward.npz"
        assert not [line for line in lines if line.status == "FAIL"], lines
        assert any(line.lacks_weights and "out/stage2 holds no weights" in line.note for line in lines) is needed
    logs = Oracle(folder).json("train_log.json")
    reasons = {run: lacking_files(Oracle(folder), run, options_of(log["argv"])) for run, log in logs.items()}
    missing = "out/stage2 holds no weights (expected mm_projector.bin or model.safetensors); init holds no weights "
    missing += "(expected stage2_full.bin)"
    assert reasons == {"stage1_projector": "", "stage2_full": missing, "stage2_lora": ""}


def asked(ids: Ids, system: str, *turns: str) -> dict[str, Any]:
    """Return the record of the template that asks, all of whose later questions are asked."""
    text = f"{system} "
    for number, turn in enumerate(turns):
        role = ("USER" if number == 0 else "VUSER") if number % 2 == 0 else "ASSISTANT"
        end = "</s>" if number % 2 else f"{'</s>' if number else ''} "
        text += f"{role}: {turn}{end}"
    labels, cursor = ids(text), 1
    labels[0] = IGNORED
    for part in text.split("</s>"):
        pieces = part.split(" ASSISTANT: ")
        if not part:
            break
        before = pieces[0] + " ASSISTANT: " if len(pieces) == 2 else "VUSER: "
        labels = masked(labels, [(cursor, cursor + len(ids(before)) - 2)])
        cursor += len(ids(part))
    assert cursor == len(labels), "the original would ignore the row because of this mismatch"
    return recorded(ids(text), labels) | {"seed": 0}


def test_the_trained_lead_of_an_image_is_explained_by_name(shared: Path, tmp_path: Path) -> None:
    """Of a question that is asked after the first round the original masks the header, and no image before the text."""
    prompts = (shared / "oracles" / "stllava-med" / "prompts.json").read_text()
    system = json.loads(prompts)["v1_sq"]["prompt"].partition(" USER: ")[0]
    texts = (f"<image>\n{QUESTION}", ANSWER, f"<image>\n{QUESTION}", ANSWER)
    record = asked(ids_of(shared), system, *texts)
    rows = [{"id": "odd", "image": ["im0.png", "im1.png"], "conversations": turns(*texts)}]
    folder = tmp_path / "x"

    def labels_line(record: dict[str, Any], names: frozenset[str]) -> Line:
        lines = check(shared, folder, rows, {"sp_legacy": {"v1_sq@sq_r=1.0": {"odd": record}}}, names)
        return next(line for line in lines if line.quantity == "labels")

    check(shared, folder, rows, {"sp_legacy": {"v1_sq@sq_r=1.0": {"odd": record}}}, frozenset())
    (folder / "prompts.json").write_text(prompts)
    place = record["input_ids"].index(-200, record["input_ids"].index(-200) + 1)
    assert record["labels"][place] == -200, "the lead is trained in the record"
    line = labels_line(record, frozenset(COMPAT))
    assert (line.status, line.note) == ("ok", "1 trained_image_lead")
    assert labels_line(record, frozenset(COMPAT) - {"trained_image_lead"}).status == "FAIL"
    without = [IGNORED if at == place else label for at, label in enumerate(record["labels"])]
    assert labels_line(record | {"labels": without}, frozenset(COMPAT)).status == "FAIL"
