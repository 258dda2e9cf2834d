"""Paraphrases of answers through an endpoint: only those that keep the value."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava.errors import ConfigError, DataError, GenerationError
from llava.symbolic.dialogues import main
from llava.symbolic.extract import extract, normalize
from llava.symbolic.rules import load_rules
from tests.support.fake_endpoint import KEY, MODEL, FakeEndpoint, Fault, Message, serve

RULES = load_rules("drawn-smears")

ROWS = [
    {"id": n, "image": f"{n}.png", "density": "sparse", "white_type": "neutrophil", "num_white": 1} for n in range(30)
]


def rewrite(messages: list[Message]) -> str:
    """Return paraphrases: good, of another value, without one, a wording of the test, good, and one too many."""
    said = str(messages[-1]["content"]).rpartition("to say: ")[2].rstrip(".").lower()
    lines = [f"1. Seen here: {said}.", f"2. It is not the case that {said}.", "3. Something is seen."]
    return "\n".join(
        [*lines, "4. Only scattered red cells are drawn.", f'- "One finds: {said}."', f"Once more: {said}."]
    )


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEndpoint]:
    with serve(rewrite) as state:
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("OPENAI_BASE_URL", state.address)
        monkeypatch.setenv("OPENAI_MODEL", MODEL)
        yield state


def run(folder: Path, *more: str) -> list[dict]:
    (folder / "rows.json").write_text(json.dumps(ROWS))
    out = folder / "dialogues.json"
    main(["drawn-smears", "--table", str(folder / "rows.json"), "--out", str(out), "--style", "standard", *more])
    return json.loads(out.read_text())


def answers(rows: list[dict], node: str) -> set[str]:
    return {row["conversations"][2 * row["asked"].index(node) + 1]["value"] for row in rows}


def test_paraphrases_keep_the_value(tmp_path: Path, endpoint: FakeEndpoint, capsys: pytest.CaptureFixture[str]) -> None:
    plain = answers(run(tmp_path), "density")
    assert not endpoint.calls
    rows = run(tmp_path, "--paraphrase", "5")
    new = answers(rows, "density") - plain
    assert any("seen here: " in text.lower() for text in new) and any("One finds: " in text for text in new)
    assert not any("not the case" in text or "Something" in text or "Once more" in text for text in new)
    assert "Only scattered red cells are drawn." not in new  # a wording of the test split
    for row in rows:
        for node, text in zip(
            row["asked"], [t["value"] for t in row["conversations"] if t["from"] == "gpt"], strict=True
        ):
            assert extract(RULES.node(node), text).value == row["truth"][node]
    assert RULES.phrases is not None
    wordings = sum(len(s["train"]) for values in RULES.phrases.answers.values() for s in values.values())
    assert len(endpoint.calls) == wordings and f"{wordings} requests" in capsys.readouterr().out
    assert any("'density'; the answer is 'sparse'" in call.question for call in endpoint.calls)
    assert "0.png" not in str([call.body for call in endpoint.calls])


def test_stored_replies_give_the_same_bytes(tmp_path: Path, endpoint: FakeEndpoint) -> None:
    run(tmp_path, "--paraphrase", "2", "--seed", "4")
    first, asked = (tmp_path / "dialogues.json").read_bytes(), len(endpoint.calls)
    endpoint.answer = lambda messages: "Another reply."
    run(tmp_path, "--paraphrase", "2", "--seed", "4")
    assert (tmp_path / "dialogues.json").read_bytes() == first and len(endpoint.calls) == asked
    run(tmp_path, "--paraphrase", "3", "--seed", "4")
    assert len(endpoint.calls) == 2 * asked  # replies for another number are not used


def test_failed_requests_are_asked_again(tmp_path: Path, endpoint: FakeEndpoint) -> None:
    endpoint.faults += [Fault(status=400, code="content_filter")]
    with pytest.raises(DataError, match=r"1 of \d+ requests failed; rerun"):
        run(tmp_path, "--paraphrase", "1")
    assert not (tmp_path / "dialogues.json").exists()
    asked = len(endpoint.calls)
    run(tmp_path, "--paraphrase", "1")
    assert len(endpoint.calls) == asked + 1


def test_a_wrong_key_ends_the_command(tmp_path: Path, endpoint: FakeEndpoint) -> None:
    endpoint.key = "another"
    with pytest.raises(GenerationError, match="401"):
        run(tmp_path, "--paraphrase", "1")


def test_options(tmp_path: Path, endpoint: FakeEndpoint) -> None:
    with pytest.raises(ConfigError, match="--paraphrase must be from 1 to 20, got 0"):
        run(tmp_path, "--paraphrase", "0")
    store = tmp_path / "other.jsonl"
    store.write_text('{"node": 3}\n')
    with pytest.raises(DataError, match="row 0: not a stored paraphrase"):
        run(tmp_path, "--paraphrase", "1", "--paraphrases", str(store))


def test_normalized_wordings_stay_distinct(tmp_path: Path, endpoint: FakeEndpoint) -> None:
    texts = answers(run(tmp_path, "--paraphrase", "5"), "verdict")
    assert len({normalize(text) for text in texts}) == len(texts)
