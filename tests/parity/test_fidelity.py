"""Comparison with recorded numbers: results for the oracles, and failures after changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.fidelity import __main__, floors, prompts
from benchmarks.fidelity.folder import Differences, Line, Oracle, within
from llava.compat import COMPAT, compat_table, parse_compat
from llava.conversation import TEMPLATES
from llava.errors import ConfigError
from llava.samples import Conversation, Turn
from tests.support.recorded_folder import write_recorded

SLOW = ("train_log.json", "generate.json", "forward.npz", "expected_metrics.json", "lora_forward.npz", "grads.json")
"""Slow checks that are covered by other tests, `generate.json` below."""

FOLDERS = ("llava-1.2.2", "llava-med-1.0", "llava-med-1.5-mistral", "llava-rad", "stllava-med")


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {name: check for name, check in __main__.CHECKS.items() if name not in SLOW}
    monkeypatch.setattr(__main__, "CHECKS", {**quick, **{name: lambda _: iter(()) for name in SLOW}})


@pytest.mark.usefixtures("calm")
@pytest.mark.parametrize("folder", FOLDERS)
def test_recorded_texts_and_images(shared: Path, folder: str) -> None:
    lines = list(__main__.checked(shared / "oracles" / folder, frozenset(COMPAT)))
    left_out = [f"recorded numbers of {name}" for name in floors.RECORDINGS[folder].floors if name in SLOW]
    assert [line.quantity for line in lines if line.status == "FAIL"] == left_out
    assert all(line.note for line in lines if line.status == "skipped")
    assert sum(line.status == "ok" for line in lines) >= 2


@pytest.mark.parametrize("folder", FOLDERS[:4])
def test_recorded_generations(shared: Path, folder: str) -> None:
    lines = list(__main__.CHECKS["generate.json"](Oracle(shared / "oracles" / folder)))
    assert lines and all(line.status == "ok" for line in lines), lines


def copy_of(shared: Path, target: Path, *names: str) -> Path:
    target.mkdir()
    for name in names:
        source = shared / "oracles" / "llava-1.2.2" / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target / name)
    return target


@pytest.mark.parametrize("name", ["counted_labels", "ignored_rows", "shifted_labels", "refused_rows"])
def test_without_its_name_nothing_is_explained(shared: Path, name: str) -> None:
    oracle = Oracle(shared / "oracles" / "llava-1.2.2", frozenset(COMPAT) - {name})
    lines = {line.quantity: line for line in __main__.CHECKS["preprocess.json"](oracle)}
    wrong = lines["token ids" if name == "refused_rows" else "labels"]
    assert wrong.status == "FAIL" and name in wrong.note


def test_a_changed_label_and_a_changed_prompt_are_seen(shared: Path, tmp_path: Path) -> None:
    folder = copy_of(shared, tmp_path / "x", "base_llm", "data.json", "preprocess.json", "prompts.json")
    rows = {"sp_legacy": {"v1": json.loads((folder / "preprocess.json").read_text())["sp_legacy"]["v1"]}}
    rows["sp_legacy"]["v1"]["img_mid"]["labels"][-1] = -100
    (folder / "preprocess.json").write_text(json.dumps(rows))
    prompts = json.loads((folder / "prompts.json").read_text())
    prompts["v1"]["prompt"] += " "
    (folder / "prompts.json").write_text(json.dumps(prompts))
    lines = {line.quantity: line for line in __main__.checked(folder, frozenset(COMPAT))}
    assert lines["labels"].status == "FAIL" and "img_mid" in lines["labels"].note
    assert lines["token ids"].status == "ok"
    assert lines["prompts"].status == "FAIL" and "v1" in lines["prompts"].note


def test_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = [Line("numbers", None, "skipped", "for a reason")]
    monkeypatch.setattr(__main__, "CHECKS", {**__main__.CHECKS, "dpo.npz": lambda _: iter(skipped)})
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "dpo.npz").write_bytes(b"")
    assert __main__.report(tmp_path) == 0
    (folder / "unheard.npz").write_bytes(b"")
    assert __main__.report(tmp_path) == 1
    (folder / "unheard.npz").unlink()
    (folder / "tower.npz").write_bytes(b"")
    assert __main__.report(tmp_path) == 1
    printed = capsys.readouterr().out
    assert "FAIL" in printed and "1 skipped (1 without a reason)" not in printed
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no folder of recorded numbers"):
        __main__.report(tmp_path / "empty")


def test_differences() -> None:
    found = Differences()
    found.add([1.0, 2.0], np.array([1.0, 2.5]))
    found.add([], [])
    assert (found.largest, found.num_compared) == (0.5, 2)
    assert within("q", found.largest, 0.5, count=2) == Line("q", 0.5, "ok", count=2)
    assert found.line("q", 0.4) == Line("q", 0.5, "FAIL", "2 values", count=2)
    with pytest.raises(ValueError, match="shape"):
        found.add([1.0], [1.0, 2.0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_values_that_are_not_finite_fail_on_either_side(bad: float, side: int) -> None:
    """A later difference does not hide them, and infinity on both sides is no agreement."""
    for pair in ([[bad, 1.0], [1.0, 1.0]][:: 1 - 2 * side], [[bad, 1.0], [bad, 1.0]]):
        found = Differences()
        found.add(*pair)
        found.add([1.0], [1.0])
        assert found.line("q", 9.0).status == "FAIL"


def test_a_comparison_of_nothing_fails() -> None:
    assert Differences().line("q", 1.0).status == "FAIL"
    assert within("q", 0.0, 1.0, count=0).status == "FAIL"


def test_names() -> None:
    assert parse_compat("all") == frozenset(COMPAT) and parse_compat("none") == frozenset()
    assert parse_compat("cut_prompt, ignored_rows") == {"cut_prompt", "ignored_rows"}
    with pytest.raises(ConfigError, match="nonsense"):
        parse_compat("cut_prompt,nonsense")
    assert len(compat_table().splitlines()) == len(COMPAT)
    assert all(case.original and case.spec for case in COMPAT.values())


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that no original wrote, to be copied before changes."""
    return write_recorded(tmp_path_factory.mktemp("made") / "unseen")


def run(folder: Path, *argv: str) -> int:
    """Return the exit status of the program on a folder."""
    with pytest.raises(SystemExit) as ended:
        __main__.main(["--oracles", str(folder), *argv])
    return int(ended.value.code or 0)


def test_the_program_on_an_unseen_folder(recorded: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(recorded) == 0
    first, *lines = capfd.readouterr().out.splitlines()
    assert first.startswith("machine: ")
    assert all(line.startswith("unseen ") and "ok" in line.split() for line in lines[:-1]), lines
    expected = ("spliced layout some", "logits others", "loss some", "generated ids greedy", "preprocessing square")
    assert all(any(quantity in line for line in lines) for quantity in expected)
    assert "4 of 4 equal" in "".join(lines) and lines[-1].endswith("0 FAIL, 0 skipped (0 without a reason)")
    assert run(recorded, "--compat", "none") == 0


def change_array(file: Path, name: str, place: tuple[int, ...], amount: float) -> None:
    arrays = dict(np.load(file))
    arrays[name] = arrays[name].copy()
    arrays[name][place] += amount
    np.savez(file, **arrays)


def change_json(file: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


TAMPERED: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a logit": ("logits some", lambda f: change_array(f / "forward.npz", "some/logits_stride3", (1, 2, 5), 1e-3)),
    "a label": ("spliced layout", lambda f: change_array(f / "forward.npz", "others/spliced_labels", (0, 160), 1)),
    "a loss": ("loss others", lambda f: change_json(f / "forward_meta.json", lambda m: m["others"].update(loss=9.0))),
    "an id": ("generated ids", lambda f: change_json(f / "generate.json", lambda c: c[0]["new_ids"].reverse())),
    "a margin": ("margins", lambda f: change_json(f / "generate.json", lambda c: c[1].update(min_top2_margin=1.0))),
    "a prompt": ("generated ids", lambda f: change_json(f / "generate.json", lambda c: c[2]["input_ids"].pop())),
    "a pixel": ("preprocessing", lambda f: change_array(f / "image_preprocess.npz", "square/b.png", (0, 3, 4), 1e-4)),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_one_changed_number_fails(recorded: Path, tmp_path: Path, what: str, capfd: pytest.CaptureFixture[str]) -> None:
    quantity, change = TAMPERED[what]
    folder = tmp_path / "changed"
    shutil.copytree(recorded, folder)
    change(folder)
    assert run(folder) == 1
    failed = [line for line in capfd.readouterr().out.splitlines() if "FAIL" in line.split()]
    assert failed and quantity in failed[0], failed


@pytest.mark.usefixtures("calm")
@pytest.mark.parametrize(
    ("name", "folder", "quantity"),
    [
        ("random_padding", "llava-med-1.5-mistral", "image preprocessing pad_hi"),
        ("half_characters", "llava-med-1.5-mistral", "answers"),
        ("counted_patches", "llava-med-1.0", "tokens in mode keep"),
        ("bare_roles", "stllava-med", "prompts"),
        ("spelled_end_marks", "llava-rad", "token ids"),
        ("first_answer", "llava-rad", "token ids"),
        ("dropped_markers", "llava-rad", "token ids"),
    ],
)
def test_every_other_name_is_needed(shared: Path, name: str, folder: str, quantity: str) -> None:
    lines = __main__.checked(shared / "oracles" / folder, frozenset(COMPAT) - {name})
    assert any(line.quantity == quantity and line.status == "FAIL" for line in lines)


@pytest.mark.parametrize("name", ["cut_prompt", "beams_count_prompt"])
def test_names_that_generations_need(shared: Path, name: str) -> None:
    folder = {"cut_prompt": "llava-1.2.2", "beams_count_prompt": "llava-rad"}[name]
    lines = __main__.CHECKS["generate.json"](Oracle(shared / "oracles" / folder, frozenset(COMPAT) - {name}))
    assert any(line.status == "FAIL" for line in lines)


def test_a_row_that_ends_early_is_seen(shared: Path, tmp_path: Path) -> None:
    folder = copy_of(shared, tmp_path / "x", "base_llm", "data.json", "preprocess.json")
    rows = {"sp_legacy": {"v1": json.loads((folder / "preprocess.json").read_text())["sp_legacy"]["v1"]}}
    for part in ("input_ids", "labels"):
        rows["sp_legacy"]["v1"]["img_mid"][part] = rows["sp_legacy"]["v1"]["img_mid"][part][:-3]
    (folder / "preprocess.json").write_text(json.dumps(rows))
    lines = {line.quantity: line for line in __main__.checked(folder, frozenset(COMPAT))}
    assert lines["token ids"].status == "FAIL" and "img_mid" in lines["token ids"].note


def test_a_conversation_is_read_out_of_its_prompts(shared: Path, tmp_path: Path) -> None:
    """Prompts of another exchange, in our templates, are read correctly."""
    spoken = Conversation((Turn("human", "<image>\nQ one?"), Turn("gpt", "One."), Turn("human", "Q two?")))
    names = {"v1": (["USER", "ASSISTANT"], " ", "</s>"), "mpt": (["user", "assistant"], "<|im_end|>", None)}
    records = {
        name: {"prompt": TEMPLATES[name].published_prompt(spoken), "roles": roles, "sep": sep, "sep2": sep2}
        for name, (roles, sep, sep2) in names.items()
    }
    folder = copy_of(shared, tmp_path / "x", "base_llm", "data.json")
    (folder / "prompts.json").write_text(json.dumps(records))
    texts, settings = __main__.checked(folder, frozenset())
    assert (texts.status, texts.note) == ("ok", "2 equal")
    assert (settings.status, settings.count) == ("ok", 6)
    with pytest.raises(LookupError, match="two separators"):
        prompts.exchange([records["mpt"]])
