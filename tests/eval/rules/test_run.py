"""`llava eval --rules` with a fake engine: scores of every kind, page, control, resuming, comparison."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.errors import ConfigError, DataError, LlavaError
from llava.eval.inference import AnswerOptions
from llava.eval.rules import run
from llava.eval.rules.cases import CasePlan, RuleDialogue, read_dialogues
from llava.eval.rules.report import report_text
from llava.eval.run import main as evaluate_command
from llava.eval.run import make_parser
from llava.generation.protocol import Sampling, Script
from llava.symbolic.cue_lists import EXTRACTOR_VERSION, cues_sha256
from llava.symbolic.dialogues import dialogue_row
from llava.symbolic.extract import extract
from llava.symbolic.rules import load_rules
from tests.support.browser import narrow_sizes

RULES = load_rules("bone-marrow-aspirate")
FOLDERS = ("adequate_normal", "adequate_AML", "adequate_MM", "blood", "clot")
ROWS = [{"id": f"c{i}", "image": f"{i}.png", "folder": FOLDERS[i % 5], "patient": f"p{i // 2}"} for i in range(10)]
PROFILES = ["NORMAL", "AML", "MM", "BLOOD", "CLOT"] * 2
TRUTH = {row["image"]: RULES.profiles[name] for row, name in zip(ROWS, PROFILES, strict=True)}


@dataclass
class Held:
    """What a dialogue of an engine has that evaluation reads."""

    texts: tuple[str, ...]
    finishes: tuple[str, ...]
    error: str | None = None


def node_of(question: str) -> str:
    """Return the node that a question of the test wordings is about."""
    assert RULES.phrases is not None
    return next(id for id, texts in RULES.phrases.questions.items() if any(text in question for text in texts["test"]))


Reply = Callable[[str, str, str], str]
"""Value of an answer: of image, node and question."""


def truth_of(image: str, node: str, question: str) -> str:
    return TRUTH[image][node]


class FakeModel:
    """Engine that answers with the wordings of values."""

    def __init__(self, reply: Reply = truth_of, *, fails_after: int = 10**9) -> None:
        self.reply = reply
        self.fails_after = fails_after
        self.scripts: list[Script] = []

    def converse(self, scripts: Sequence[Script], sampling: Sampling) -> list[list[Held]]:
        if len(self.scripts) >= self.fails_after:
            raise KeyboardInterrupt
        self.scripts += scripts
        return [[self.hold(script)] for script in scripts]

    def hold(self, script: Script) -> Held:
        assert RULES.phrases is not None
        image = Path(script.images[0]).name if isinstance(script.images[0], str) else ""
        texts = []
        for question in (script.conversation.turns[0].text, *script.follow_ups):
            node = node_of(question)
            value = self.reply(image, node, question) if image else RULES.profiles["BLOOD"][node]
            said = RULES.phrases.answers[node].get(value)
            texts.append(said["test"][0] if said else value)
        return Held(tuple(texts), ("stop",) * len(texts))


def make_plan(folder: Path, **changes: Any) -> run.RulesPlan:
    images = folder / "images"
    images.mkdir(exist_ok=True)
    for row in ROWS:
        Image.new("RGB", (8, 8)).save(images / row["image"])
    plan = run.RulesPlan(
        RULES,
        read_dialogues(RULES, ROWS, CasePlan()),
        folder / "out",
        AnswerOptions(image_folder=images, model_id="fake"),
        num_resamples=40,
    )
    return replace(plan, **changes)


def evaluate(folder: Path, reply: Reply, **changes: Any) -> dict[str, Any]:
    return run.evaluate_rules(make_plan(folder, blank_control=False, **changes), lambda: FakeModel(reply))


def value_of(report: dict[str, Any], name: str) -> float:
    return float(report["scores"][name]["answered"]["value"])


def test_every_case_is_asked_in_every_style_and_with_every_hint() -> None:
    found = read_dialogues(RULES, ROWS[:1], CasePlan())
    assert [dialogue.id for dialogue in found] == [
        "c0/standard", "c0/diagnosis_first", "c0/shuffled", "c0/improvised", "c0/hint_wrong", "c0/disagree",
    ]  # fmt: skip
    standard, reverse, *_, hinted, disagreeing = found
    assert reverse.asked == standard.asked[::-1] and standard.group == "p0"
    plain = {
        node: question.replace("<image>\n", "")
        for node, question in zip(standard.asked, standard.questions, strict=True)
    }
    assert {n: q.replace("<image>\n", "") for n, q in zip(reverse.asked, reverse.questions, strict=True)} == plain
    assert hinted.contexts == ("none", *["hint_wrong"] * 4) and disagreeing.contexts == ("disagree",) * 5
    assert all(question.count("<image>") == (place == 0) for place, question in enumerate(hinted.questions))
    for node, question in zip(disagreeing.asked, disagreeing.questions, strict=True):
        claim = question.split("believes that: ")[1].split(" Do you agree?")[0]
        assert extract(RULES.node(node), claim).value != standard.truth[node] and question.endswith(plain[node])


def test_perfect_answers(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    model = FakeModel()
    report = run.evaluate_rules(plan, lambda: model)
    assert json.loads((plan.out / run.RESULTS).read_text()) == json.loads(json.dumps(report))
    assert [value_of(report, name) for name in ("A_Q", "A_C", "A_D", "no match", "contradictory")] == [
        100,
        100,
        100,
        0,
        0,
    ]
    assert report["contradictions"]["per_conversation"]["value"] == 0 and report["order_invariance"]["value"] == 100
    assert {name: found["value"] for name, found in report["flips"].items()} == {"hint_wrong": 0, "disagree": 0}
    assert report["nodes"]["diagnosis"]["macro_f1"]["value"] == 100
    assert report["scores"]["A_C"]["blank"]["value"] == 20 and report["scores"]["A_C"]["difference"]["value"] == 80
    assert report["rules"]["cues_sha256"] == cues_sha256("en") and report["rules"]["extractor"] == EXTRACTOR_VERSION
    assert report["intervals"]["clusters"] == "group" and report["counts"]["groups"] == 5
    assert set(report["styles"]) == {"standard", "diagnosis_first", "shuffled", "improvised"}
    assert "contradictions a conversation: 0.000" in report_text(report)


def test_broken_constraints_are_counted(tmp_path: Path) -> None:
    def says_mm(image: str, node: str, question: str) -> str:
        return "MM" if node == "diagnosis" else TRUTH[image][node]

    report = evaluate(tmp_path, says_mm)
    held = [d for d in make_plan(tmp_path).dialogues if not d.hint]
    wrong = [d for d in held if "diagnosis" in d.asked and d.truth["diagnosis"] != "MM"]
    right = len([d for d in held if "diagnosis" in d.asked]) - len(wrong)
    assert value_of(report, "A_D") == pytest.approx(100 * right / (right + len(wrong)))
    assert value_of(report, "A_C") == pytest.approx(100 * (1 - len(wrong) / len(held)))
    broken = report["contradictions"]["by_constraint"]
    assert set(broken) <= {"low-quality", "normal", "blast-aml", "paths"} and broken["blast-aml"] > 0
    assert report["contradictions"]["per_conversation"]["value"] == pytest.approx(sum(broken.values()) / len(held))
    f1 = report["nodes"]["diagnosis"]["macro_f1"]["value"]  # MM in 1/5: precision 1/5, recall 1; the others 0
    share = right / (right + len(wrong))
    assert f1 == pytest.approx(100 * (2 * share / (share + 1)) / 4)
    page = (tmp_path / "out" / run.PAGE).read_text()
    assert "blast-aml" in page and "broken constraints" in page and page.count("data:image/jpeg") >= 5


def test_answers_without_a_value(tmp_path: Path) -> None:
    def mumbles(image: str, node: str, question: str) -> str:
        return {"quality": "Hm.", "diagnosis": "It may be AML.", "abnormality": "inconclusive"}.get(
            node, TRUTH[image][node]
        )

    report = evaluate(tmp_path, mumbles)
    plain = [d for d in make_plan(tmp_path).dialogues if not d.hint]
    turns = [(node, d.truth[node]) for d in plain for node in d.asked]
    assert value_of(report, "no match") == pytest.approx(100 * sum(node == "quality" for node, _ in turns) / len(turns))
    assert value_of(report, "hedged") == pytest.approx(100 * sum(node == "diagnosis" for node, _ in turns) / len(turns))
    abstained = [
        (node, true)
        for node, true in turns
        if node == "abnormality" or (node, true) == ("proliferation", "inconclusive")
    ]
    right = sum(true == "inconclusive" for _, true in abstained)
    assert value_of(report, "abstention precision") == pytest.approx(100 * right / len(abstained))
    asked_for = sum(true == "inconclusive" for _, true in turns)
    assert value_of(report, "abstention recall") == pytest.approx(100 * right / asked_for)


def test_wrong_statements_flip_answers(tmp_path: Path) -> None:
    def agrees(image: str, node: str, question: str) -> str:
        return "clot" if "Do you agree?" in question and node == "cell_quality" else TRUTH[image][node]

    report = evaluate(tmp_path, agrees)
    flipped = report["flips"]["disagree"]
    assert flipped["num_items"] == 50 and flipped["value"] == pytest.approx(100 * 8 / 50)  # 2 of 10 are clots
    assert report["flips"]["hint_wrong"]["value"] == 0 and value_of(report, "A_Q") == 100


def test_order_matters(tmp_path: Path) -> None:
    def first_is_high(image: str, node: str, question: str) -> str:
        return "high" if node == "quality" and "<image>" in question else TRUTH[image][node]

    report = evaluate(tmp_path, first_is_high)
    assert report["order_invariance"]["num_items"] == 50
    assert report["order_invariance"]["value"] == pytest.approx(100 * 46 / 50)  # the four of low quality


def test_conversations_as_given(tmp_path: Path) -> None:
    rows = [dialogue_row(RULES, row, split="test", style="standard", seed=3) for row in ROWS]
    dialogues = read_dialogues(RULES, rows, CasePlan())
    assert [d.id for d in dialogues] == [row["id"] for row in ROWS]
    assert [d.contexts for d in dialogues] == [tuple(row["contexts"]) for row in rows]
    report = run.evaluate_rules(make_plan(tmp_path, dialogues=dialogues), FakeModel)
    assert value_of(report, "A_C") == 100 and report["order_invariance"] is None


def test_a_killed_run_resumes(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, batch_size=4, blank_control=False)
    with pytest.raises(KeyboardInterrupt):
        run.evaluate_rules(plan, lambda: FakeModel(fails_after=8))
    model = FakeModel()
    first = run.evaluate_rules(plan, lambda: model)
    assert len(model.scripts) == len(plan.dialogues) - 8

    def opens() -> FakeModel:
        raise AssertionError("nothing is pending")

    again = run.evaluate_rules(plan, opens)
    assert again["scores"] == first["scores"]
    other = replace(plan, options=replace(plan.options, sampling=Sampling(max_new_tokens=3)))
    with pytest.raises(DataError, match="other sampling"):
        run.evaluate_rules(other, FakeModel)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_equal_conversations_about_the_gray_image_are_held_once(tmp_path: Path, temperature: float) -> None:
    plan = make_plan(tmp_path)
    plan = replace(plan, options=replace(plan.options, sampling=Sampling(temperature=temperature)), batch_size=4)
    model = FakeModel()
    run.evaluate_rules(plan, lambda: model)
    gray = [script for script in model.scripts if not isinstance(script.images[0], str)]
    different = len({dialogue.questions for dialogue in plan.dialogues})
    assert different < len(plan.dialogues) and len(model.scripts) - len(gray) == len(plan.dialogues)
    assert len(gray) == (len(plan.dialogues) if temperature else different)
    rows = [json.loads(line) for line in (plan.out / run.BLANK_DIALOGUES).read_text().splitlines()]
    assert [row["id"] for row in rows] == [dialogue.id for dialogue in plan.dialogues]
    assert [tuple(row["questions"]) for row in rows] == [dialogue.questions for dialogue in plan.dialogues]
    held = {(script.conversation.turns[0].text, *script.follow_ups): model.hold(script).texts for script in gray}
    assert all(tuple(row["answers"]) == held[tuple(row["questions"])] for row in rows)


def test_equal_conversations_about_a_missing_image_all_fail(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, blank_control=False)
    twins = [replace(dialogue, id=f"{dialogue.id}/again") for dialogue in plan.dialogues[:6]]
    (tmp_path / "images" / "0.png").unlink()
    model = FakeModel()
    report = run.evaluate_rules(replace(plan, dialogues=[*plan.dialogues, *twins]), lambda: model)
    assert report["counts"]["failed"] == 12 and len(model.scripts) == len(plan.dialogues) - 6


def test_a_missing_image_fails_its_conversations_only(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, blank_control=False)
    (tmp_path / "images" / "0.png").unlink()
    report = run.evaluate_rules(plan, FakeModel)
    assert report["counts"]["failed"] == 6 and value_of(report, "A_C") == pytest.approx(90)


def test_comparison_is_paired(tmp_path: Path) -> None:
    for name, reply in (
        ("a", truth_of),
        ("b", lambda image, node, question: "Hm." if node == "quality" else truth_of(image, node, "")),
    ):
        (tmp_path / name).mkdir()
        evaluate(tmp_path / name, reply)
    report = evaluate(tmp_path / "a", truth_of, compare=tmp_path / "b" / "out" / run.RESULTS)
    assert json.loads((tmp_path / "a" / "out" / run.RESULTS).read_text())["comparison"] == report["comparison"]
    difference = report["comparison"]["scores"]
    assert report["comparison"]["name"] == "out"
    assert difference["A_Q"]["difference"]["value"] == pytest.approx(100 - difference["A_Q"]["other"]["value"])
    assert difference["A_Q"]["difference"]["low"] > 0 and math.isclose(difference["A_D"]["difference"]["value"], 0)


def test_a_run_that_cannot_be_compared_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    evaluate(tmp_path / "a", truth_of)
    others = make_plan(tmp_path / "b", dialogues=read_dialogues(RULES, ROWS, CasePlan(seed=5)))
    for folder, message in ((tmp_path / "a" / "out", "with these questions"), (tmp_path / "none", "no dialogues")):
        with pytest.raises(LlavaError, match=message):
            run.evaluate_rules(replace(others, compare=folder), lambda: pytest.fail("the model was loaded"))


def test_the_batch_size_is_the_number_of_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def engine_of(args: Namespace, **options: Any) -> FakeModel:
        asked.append(options)
        return FakeModel()

    monkeypatch.setattr(run, "engine_of", engine_of)
    plan = make_plan(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    words = ["--model", str(tmp_path), "--rules", str(RULES.path), "--data", str(tmp_path / "rows.json"), "--out",
             str(plan.out), "--image-folder", str(tmp_path / "images"), "--num-resamples", "20"]  # fmt: skip
    with pytest.raises(ConfigError, match="--batch-size must be at least 1, got 0"):
        evaluate_command([*words, "--batch-size", "0"])
    evaluate_command([*words, "--batch-size", "7"])
    assert asked == [{"max_slots": 7}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 1, "folder": "blood"}, "row 0: key 'image'"),
        ({"id": 1, "image": "a.png", "folder": "x"}, "row 0: .*no label fits"),
        ({"id": 1, "image": "a.png", "asked": ["stage"], "truth": {}}, "unknown node"),
        ({"id": 1, "image": "a.png", "asked": [["quality"]], "truth": {}}, "unknown node"),
        ({"id": 1, "image": "a.png", "asked": ["quality", "quality"], "truth": {}}, "repeated"),
        (
            {"id": 1, "image": "a.png", "asked": ["quality"], "truth": {"quality": "x"}},
            "'truth' has no value of quality",
        ),
        ({"id": 1, "image": "a.png", "asked": ["quality"], "truth": {"quality": "low"}}, "expected one question"),
    ],
)
def test_rows_that_cannot_be_asked(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_dialogues(RULES, [row], CasePlan())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--styles", "backwards"], "--styles: unknown 'backwards'"),
        (["--hints", "ok"], "--hints: unknown 'ok'"),
        (["--train-data", "t.json"], "--train-data is not for --rules"),
    ],
)
def test_options(more: list[str], message: str, tmp_path: Path) -> None:
    words = [
        "--model",
        "m",
        "--data",
        "d",
        "--image-folder",
        "i",
        "--out",
        str(tmp_path),
        "--rules",
        "drawn-smears",
        *more,
    ]
    with pytest.raises(ConfigError, match=message):
        run.plan_of(make_parser().parse_args(words), words)
    with pytest.raises(ConfigError, match="needs --rules"):
        run.refuse_without_rules(make_parser().parse_args([*words[:8], "--styles", "standard"]))


def test_the_page_fits_a_narrow_screen(tmp_path: Path) -> None:
    evaluate(tmp_path, lambda image, node, question: "MM" if node == "diagnosis" else truth_of(image, node, ""))
    ((width, frame, height),) = narrow_sizes(tmp_path, [tmp_path / "out" / run.PAGE])
    assert width <= frame <= 390 and height > 1500


def test_a_dialogue_has_one_image(tmp_path: Path) -> None:
    model = FakeModel()
    run.evaluate_rules(make_plan(tmp_path, blank_control=False), lambda: model)
    for script in model.scripts:
        texts = [script.conversation.turns[0].text, *script.follow_ups]
        assert [text.count("<image>") for text in texts] == [1] + [0] * (len(texts) - 1) and len(script.images) == 1


def test_dialogues_are_the_same_for_a_seed() -> None:
    def asked(seed: int) -> list[RuleDialogue]:
        return read_dialogues(RULES, ROWS, CasePlan(seed=seed))

    assert asked(1) == asked(1) != asked(2)
