"""`llava preferences judge` and `pairs`: a language model in both orders, limits, images, resuming, and reports."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava import openai_api
from llava.data.preference import read_preferences
from llava.errors import ConfigError, DataError, GenerationError
from llava.instruct.preferences import judge, pairs
from llava.instruct.preferences.judges import ImageGain
from llava.instruct.preferences.rows import read_answered
from tests.support.fake_endpoint import KEY, FakeEndpoint, Fault, Message, environment, serve
from tests.support.preference_files import answered, lines, write_answers

SECRET = "Zyxxword"


def text_of(messages: list[Message]) -> str:
    content = messages[1]["content"]
    return content if isinstance(content, str) else content[0]["text"]


def both(messages: list[Message]) -> tuple[str, str]:
    found = re.findall(r"\[Answer \d\]\n(.*?)\n\n\[End", text_of(messages), re.DOTALL)
    return found[0], found[1]


def longer_wins(messages: list[Message]) -> str:
    first, second = both(messages)
    return "8 4\nwhy" if len(first) > len(second) else "4 8\nwhy"


def first_wins(messages: list[Message]) -> str:
    return "9 2"


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEndpoint]:
    monkeypatch.setattr(openai_api, "FIRST_WAIT", 0.01)
    with serve(longer_wins) as state:
        for name, value in environment(state).items():
            monkeypatch.setenv(name, value)
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield state


def run(file: Path, *words: str, by: str = "endpoint", out: str = "judged.jsonl") -> Path:
    path = file.parent / out
    judge.main([str(file), "--by", by, "--out", str(path), "--image-folder", str(file.parent / "images"), *words])
    return path


def outcomes(path: Path) -> list[tuple[Any, Any, str]]:
    found = [row["judgment"] for row in lines(path)]
    return [(one["preferred"], one["rejected"], one["failure"]) for one in found]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_answers(tmp_path, [answered(n, reference="clear lung") for n in range(4)])


def test_a_configuration_file_names_the_judge_and_its_options(
    endpoint: FakeEndpoint, file: Path, tmp_path: Path
) -> None:
    config = tmp_path / "judge.yaml"
    config.write_text("by: endpoint\nboth_orders: false\nmin_margin: 2\nmax_tokens: 7\n")
    judge.main([str(config), str(file), "--out", str(tmp_path / "judged.jsonl"), "--min-margin", "1"])
    assert len(endpoint.calls) == 4 and {call.body["max_tokens"] for call in endpoint.calls} == {7}
    config.write_text("by: reference\nmin_margins: 2\n")
    with pytest.raises(ConfigError, match="unknown option min_margins; did you mean --min-margin"):
        judge.main([str(config), str(file), "--out", str(tmp_path / "other.jsonl")])


def test_both_orders_are_asked_and_everything_stays_in_the_row(endpoint: FakeEndpoint, file: Path) -> None:
    path = run(file)
    assert outcomes(path) == [(0, 1, "")] * 4 and len(endpoint.calls) == 8
    judgment = lines(path)[0]["judgment"]
    assert (
        judgment["scores"] == [8.0, 4.0] and judgment["judge"] == "fake-model" and len(judgment["prompt_sha256"]) == 64
    )
    orders = judgment["comparisons"][0]["orders"]
    assert orders["21"] == {"scores": [8.0, 4.0], "failure": "", "num_replies": 1, "reply": "4 8\nwhy"}
    assert [row["prompt"] for row in lines(path)] == [f"Question {n}?" for n in range(4)]
    assert not any("image_url" in json.dumps(call.body) for call in endpoint.calls)


def test_a_judge_that_prefers_whatever_stands_first_prefers_nothing(endpoint: FakeEndpoint, file: Path) -> None:
    endpoint.answer = first_wins
    assert outcomes(run(file)) == [(None, None, "the orders disagree")] * 4


def test_nonsense_refusals_and_time_outs_are_rows(endpoint: FakeEndpoint, file: Path) -> None:
    def reply(messages: list[Message]) -> str | Fault:
        number = re.search(r"Question (\d)", text_of(messages))
        assert number is not None
        choices = ["no idea", "I'm sorry, I cannot judge this.", Fault(stall=60.0, text="1 2"), longer_wins(messages)]
        return choices[int(number[1])]

    endpoint.answer = reply
    path = run(file, "--num-rounds", "2", "--timeout", "4", "--max-retries", "0")
    reasons = [failure for _, _, failure in outcomes(path)]
    assert reasons[:2] == ["no scores"] * 2 and reasons[2].startswith("no reply: ") and reasons[3] == ""
    endpoint.answer = longer_wins
    before = len(endpoint.calls)
    assert outcomes(run(file, "--num-rounds", "2"))[2][2].startswith("no reply") and len(endpoint.calls) == before
    again = run(file, "--num-rounds", "2", "--retry-failed")
    assert [failure for _, _, failure in outcomes(again)] == ["no scores", "no scores", "", ""]


def test_a_second_run_sends_nothing_and_a_replay_gives_the_same(endpoint: FakeEndpoint, file: Path) -> None:
    path = run(file)
    before, num_calls = path.read_bytes(), len(endpoint.calls)
    run(file)
    path.unlink()
    assert run(file).read_bytes() == before and len(endpoint.calls) == num_calls
    replayed = run(file, "--store", f"{path}.replies.jsonl", by="replay", out="again.jsonl")
    assert outcomes(replayed) == outcomes(path) and len(endpoint.calls) == num_calls
    lost = run(file, "--store", f"{path}.replies.jsonl", "--max-tokens", "5", by="replay", out="lost.jsonl")
    assert {failure for _, _, failure in outcomes(lost)} == {"no reply: not in the store"}


def test_a_killed_run_writes_the_same_files(endpoint: FakeEndpoint, file: Path) -> None:
    whole = run(file, out="whole.jsonl")
    with pytest.raises(GenerationError):
        endpoint.faults = [Fault(text="8 4")] * 3 + [Fault(401, code="invalid_api_key")] * 9
        run(file, "--max-concurrency", "1", "--batch-size", "2", out="broken.jsonl")
    endpoint.faults = []
    for name in ("broken.jsonl", "broken.jsonl.replies.jsonl"):
        if (path := file.parent / name).exists():
            with path.open("a") as stream:
                stream.write('{"key": "ha')
    (file.parent / "broken.jsonl.replies.jsonl").unlink()  # its first replies were those of the faults
    broken = run(file, out="broken.jsonl")
    assert broken.read_bytes() == whole.read_bytes()
    replies = [file.parent / f"{path.name}.replies.jsonl" for path in (whole, broken)]
    assert replies[0].read_bytes() == replies[1].read_bytes()


def test_other_settings_are_refused(endpoint: FakeEndpoint, file: Path) -> None:
    run(file)
    with pytest.raises(DataError, match="min margin"):
        run(file, "--min-margin", "2")
    assert (
        outcomes(run(file, "--min-margin", "5", "--resume", "False")) == [(None, None, "margin below the minimum")] * 4
    )
    assert len(endpoint.calls) == 8


def test_images_leave_only_with_the_flag_and_without_their_metadata(endpoint: FakeEndpoint, file: Path) -> None:
    image = Image.new("RGB", (40, 30), (10, 20, 30))
    note = image.getexif()
    note[0x010E] = SECRET
    for number in range(2):
        image.save(file.parent / "images" / f"{number}.png", exif=note)
    run(file, "--send-images", "True")
    content = endpoint.calls[0].body["messages"][1]["content"]
    kind, data = content[1]["image_url"]["url"].split(";base64,")
    assert kind == "data:image/png" and SECRET.encode() not in base64.b64decode(data)
    with Image.open(io.BytesIO(base64.b64decode(data))) as sent:
        assert sent.size == (40, 30)
    assert "attached" in content[0]["text"]


def test_a_missing_image_is_a_row(endpoint: FakeEndpoint, file: Path) -> None:
    (file.parent / "images" / "1.png").unlink()
    found = outcomes(run(file, "--send-images"))
    assert [one[0] for one in found] == [0, 0, None, None] and "1.png" in found[2][2]


def test_the_limit_counts_images_and_all_runs(endpoint: FakeEndpoint, file: Path, capsys: Any) -> None:
    endpoint.usage = False
    words = ("--send-images", "--max-tokens", "10", "--max-concurrency", "1", "--batch-size", "1")
    with pytest.raises(SystemExit) as stopped:
        run(file, *words, "--max-total-tokens", "1500")
    assert stopped.value.code == 1 and 0 < len(endpoint.calls) < 8
    assert "questions are pending" in capsys.readouterr().out
    asked = len(endpoint.calls)
    with pytest.raises(SystemExit):
        run(file, *words, "--max-total-tokens", "1500")
    assert len(endpoint.calls) == asked
    path = run(file, *words)
    assert outcomes(path) == [(0, 1, "")] * 4 and len(endpoint.calls) == 8
    with pytest.raises(ConfigError, match="--price-prompt"):
        run(file, "--max-cost", "1")


def test_money_is_a_limit(endpoint: FakeEndpoint, file: Path) -> None:
    with pytest.raises(SystemExit):
        run(file, "--max-cost", "0.000001", "--price-prompt", "1", "--price-answer", "1")
    assert not endpoint.calls


def test_three_answers_are_compared_in_pairs(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    file = write_answers(tmp_path, [answered(0, ["short", "a longer answer", "longest answer of all three", "short"])])
    path = run(file)
    judgment = lines(path)[0]["judgment"]
    assert [one["answers"] for one in judgment["comparisons"]] == [[0, 1], [0, 2], [1, 2]]
    assert judgment["left_out"] == {"3": "equal"} and judgment["scores"] == [4.0, 6.0, 8.0, None]
    assert judgment["preferred"] == 1 and judgment["rejected"] == 0


def test_answers_that_cannot_be_compared_cost_nothing(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    rows = [answered(0, ["same", "same "]), answered(1, ["a", "b"], finishes=["stop", "length"]),
            answered(2, [], error="image '1.png' is not in the image folder")]  # fmt: skip
    path = run(write_answers(tmp_path, rows))
    assert [one[2] for one in outcomes(path)] == [
        judge.TOO_FEW,
        judge.TOO_FEW,
        "image '1.png' is not in the image folder",
    ]
    assert not endpoint.calls


def test_published_ties_and_scores(endpoint: FakeEndpoint, file: Path) -> None:
    endpoint.answer = lambda messages: "8,8\nequal"
    words = ("--compat", "second_wins_ties,first_line_scores", "--both-orders", "False")
    assert outcomes(run(file, *words)) == [(1, 0, "")] * 4
    endpoint.answer = lambda messages: "8, 9"
    assert (
        outcomes(run(file, *words, "--num-rounds", "1", "--store", str(file.parent / "s"), out="b"))[0][2]
        == "no scores"
    )


def test_a_key_or_answers_are_never_shown(endpoint: FakeEndpoint, file: Path, capsys: Any) -> None:
    run(file)
    shown = capsys.readouterr()
    assert KEY not in shown.out + shown.err and "The lung is clear" not in shown.out + shown.err


def test_the_report_compares_with_references_and_length(endpoint: FakeEndpoint, tmp_path: Path, capsys: Any) -> None:
    rows = [answered(n, reference="no" if n == 3 else "clear lung") for n in range(4)]
    path = run(write_answers(tmp_path, rows), "--report", str(tmp_path / "report.json"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["num_preferences"] == 4 and report["longer_preferred"] == 1.0
    agreement = report["agreement"]
    assert agreement["num_pairs"] == 4 and agreement["coin"] == 0.5
    assert agreement["judge"]["share"] == agreement["longer_wins"]["share"] == 0.75
    low, high = agreement["judge"]["interval"]
    assert low <= 0.75 <= high
    text = capsys.readouterr().out
    assert "this judge: right in 75.0%" in text and "the longer answer wins: right in 75.0%" in text
    assert path.exists()


def test_judges_that_need_nobody(tmp_path: Path) -> None:
    rows = [answered(n, ["yes", "no", "yes, it is"], reference="no") for n in range(2)]
    file = write_answers(tmp_path, rows)
    assert outcomes(run(file, by="reference", out="r.jsonl")) == [(1, 0, "")] * 2
    assert outcomes(run(file, by="majority", out="m.jsonl")) == [(0, 1, "")] * 2
    assert lines(tmp_path / "m.jsonl")[0]["judgment"]["by"] == "majority"


def test_image_gain_is_the_difference_of_two_scores_per_token(tmp_path: Path) -> None:
    from llava.generation.engine import LocalEngine
    from llava.generation.protocol import Prompt
    from tests.support.tiny import tiny_llava

    loaded = tiny_llava()
    engine = LocalEngine(loaded.model, loaded.processor)
    rows = read_answered(write_answers(tmp_path, [answered(n, ["abc", "de"]) for n in range(3)]))
    text_only = read_answered(write_answers(tmp_path / "text", [{"prompt": "Q?", "answers": ["a", "b"]}]))
    gain = ImageGain(engine, tmp_path / "images")
    found = gain([*rows, *text_only])
    assert found[3] == "no image"
    conversation = rows[0].asked.conversation("abc")
    image = str(tmp_path / "images" / "0.png")
    scores = engine.score([Prompt(conversation, (shown,)) for shown in (image, gain.blank)])
    expected = (scores[0].logprob - scores[1].logprob) / scores[0].num_tokens
    assert not isinstance(found[0], str) and found[0][0] == pytest.approx(expected, abs=1e-5) and abs(expected) > 1e-6
    (tmp_path / "images" / "1.png").unlink()
    again = gain(rows)
    assert again[0] == pytest.approx(found[0], abs=1e-5) and "1.png" in str(again[2])


@pytest.mark.parametrize("layout", ["published", "judge", "trl", "llama-factory", "ms-swift"])
def test_pairs_of_every_layout_are_read_again(tmp_path: Path, layout: str) -> None:
    file = write_answers(tmp_path, [answered(n, reference="clear lung") for n in range(3)])
    judged = run(file, by="reference")
    pairs.main([str(judged), "--out", str(tmp_path / "pairs.json"), "--to", layout])
    found = read_preferences(tmp_path / "pairs.json")
    assert [pair.chosen.turns[1].text for pair in found] == ["The lung is clear."] * 3
    assert found[0].images == ("0.png",) and found[0].meta["judgment"]["by"] == "reference"
    question = found[0].chosen.turns[0].text
    assert question.replace("<image>\n", "") == "Question 0?" and ("<image>" in question) == (layout != "judge")


def test_other_thresholds_need_no_judge(endpoint: FakeEndpoint, file: Path) -> None:
    judged = run(file)
    out = file.parent / "pairs.jsonl"
    pairs.main([str(judged), "--out", str(out)])
    assert len(lines(out)) == 4 and "reply" not in out.read_text()
    with pytest.raises(DataError, match=r"no answer is preferred .*4 margin below the minimum"):
        pairs.main([str(judged), "--out", str(out), "--min-margin", "5"])
    with pytest.raises(DataError, match="4 score below"):
        pairs.main([str(judged), "--out", str(out), "--min-score", "9"])
    assert len(lines(out)) == 4


def test_pairs_need_judgments(file: Path) -> None:
    with pytest.raises(DataError, match="row 0: no judgment"):
        pairs.main([str(file), "--out", str(file.parent / "p.json")])
