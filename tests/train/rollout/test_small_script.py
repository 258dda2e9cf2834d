"""`scripts/dr_llava_small.sh` with tiny parts: every arm trains, is evaluated and has a line in the table."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from llava.data.encode import follow_up
from llava.errors import LlavaError
from tests.support.runs import metrics
from tests.support.scripts import load_script
from tests.support.text_tools import make_processor
from tests.support.tiny import write_tiny_lm, write_tiny_tower


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("dr_llava_small")


def test_dialogues_of_the_packaged_model_can_be_continued(script: ModuleType) -> None:
    """An answer ends with one token in the template of the script; the tokenizer has the marks of SmolLM2."""
    processor = make_processor("byte level", template=script.TEMPLATE, num_image_tokens=1)
    ids = [token for token, _ in follow_up("Where?", processor)]
    text = processor.tokenizer.decode(ids)
    assert text == "<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    assert ids[0] in processor.stop_token_ids


def test_two_arms(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, tower = write_tiny_lm(tmp_path / "lm"), write_tiny_tower(tmp_path / "tower")
    monkeypatch.setattr(script, "ANSWER_TOKENS", 2)
    monkeypatch.setattr(script, "TEMPLATE", "vicuna_v1")  # the tiny tokenizer has its end mark
    monkeypatch.setattr(script, "PROBED", 1)
    words = ["--lm", lm, "--vision-tower", tower, "--out", tmp_path / "out", "--num-train", 9, "--num-test", 1,
             "--arms", "sft,shuffled", "--minutes", 0.001]  # fmt: skip
    script.main(list(map(str, words)))
    table = (tmp_path / "out" / "drawn-0" / "results.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| sft", "| shuffled", "| shuffled - sft, paired"]
    assert table[0].startswith("| arm | A_Q | A_C | A_D | contradictory |")
    parts = {part: json.loads((tmp_path / "out" / "drawn-0" / f"dialogues-{part}.json").read_text())
             for part in ("all", "tuned", "held-out")}  # fmt: skip
    images = {part: {row["image"] for row in rows} for part, rows in parts.items()}
    assert len(images["all"]) == 9 and len(images["held-out"]) == 1
    assert not images["tuned"] & images["held-out"] and images["tuned"] | images["held-out"] == images["all"]
    assert any("eval_loss" in line for line in metrics(tmp_path / "out" / "drawn-0" / "tune"))
    results = tmp_path / "out" / "drawn-0" / "eval-shuffled" / "results.json"
    found = json.loads(results.read_text())
    results.write_text(json.dumps({name: value for name, value in found.items() if name != "comparison"}))
    script.main(list(map(str, words)))  # as if the arm had been evaluated before the start
    assert (tmp_path / "out" / "drawn-0" / "results.md").read_text().splitlines() == table


def test_rollouts_of_the_arms_are_plotted(script: ModuleType, tmp_path: Path) -> None:
    for arm in ("grpo", "shuffled"):
        (tmp_path / f"{arm}-adapter").mkdir()
        lines = [json.dumps({"step": step, "reward": 0.1 * step, "A_C": 0.2}) + "\n" for step in (1, 2)]
        (tmp_path / f"{arm}-adapter" / "metrics.jsonl").write_text("".join(lines))
    script.draw_arms(tmp_path, ["sft", "more_sft"])
    assert not (tmp_path / "curves.png").exists()
    script.draw_arms(tmp_path, ["sft", "grpo", "shuffled"])
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 3 * image.height


def test_a_real_set_is_shortened_the_same_way_each_time(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "blood-bccd"
    folder.mkdir()
    types = [["neutrophil"], ["eosinophil"], ["lymphocyte"], ["monocyte"]] * 3
    rows = [{"id": str(n), "image": f"{n}.png", "wbc_types": found, "n_wbc": 1} for n, found in enumerate(types)]
    for name in ("train", "test"):
        (folder / f"{name}.json").write_text(json.dumps(rows))
    words = ["--data", "bccd", "--data-root", str(tmp_path), "--num-train", "5", "--minutes", "2"]
    args = script.make_parser().parse_args(words)
    found = []
    for out in (tmp_path / "a", tmp_path / "b"):
        tables = script.data_of(args, out)
        found.append(json.loads(tables["train"].read_text()))
    assert len(found[0]) == 5 and found[0] == found[1] and all(row in rows for row in found[0])
    assert script.data_of(script.make_parser().parse_args(words[:4]), tmp_path / "c")["train"] == folder / "train.json"
    forecast = script.forecast(args, tmp_path / "b", tables, ["sft", "grpo"])
    assert "training of 1 arms" in forecast and "evaluation of 2 arms" in forecast and "GFLOP/s" in forecast


def test_unknown_arms_and_missing_data_are_refused(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(LlavaError, match="--arms: unknown dpo"):
        script.main(["--arms", "sft,dpo", "--out", str(tmp_path)])
    with pytest.raises(LlavaError, match="--data bccd needs --data-root"):
        script.main(["--data", "bccd", "--out", str(tmp_path)])
