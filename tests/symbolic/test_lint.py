"""`llava rules lint`: the reward of the rule file, presets, and rewards of nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava.errors import DataError
from llava.symbolic import lint
from llava.symbolic.rules import load_rules
from llava.utils.jsonl import write_json

FILE = Path(lint.__file__).parent / "rulesets/bone-marrow-aspirate.yaml"
FOLDERS = ("adequate_normal", "adequate_AML", "adequate_AML_Mono", "adequate_MM", "blood", "clot")


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lint, "DRAWS", 10)


def words(folder: Path, reward: str) -> list[str]:
    """Return the arguments of a lint of the marrow rules with another reward."""
    (folder / "phrases").mkdir()
    phrases = FILE.parent / "phrases/bone-marrow-aspirate.en.yaml"
    (folder / "phrases" / phrases.name).write_bytes(phrases.read_bytes())
    path = folder / "rules.yaml"
    path.write_text(f"{FILE.read_text(encoding='utf-8')}\nreward: {reward}\n", encoding="utf-8")
    write_json(folder / "rows.json", [{"id": name, "folder": name} for name in FOLDERS])
    return [str(path), "--table", str(folder / "rows.json")]


def test_the_default_is_the_reward_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = words(tmp_path, "{preset: drllava-2024-11}")
    with pytest.raises(SystemExit):
        lint.main(args)
    of_file = capsys.readouterr().out
    with pytest.raises(SystemExit):
        lint.main([*args, "--preset", "drllava-2024-11"])
    assert of_file == capsys.readouterr().out
    lint.main([*args, "--preset", "default"])
    assert of_file != capsys.readouterr().out


def test_a_changed_credit_changes_the_shares(tmp_path: Path) -> None:
    path, _, table = words(tmp_path, "{no_match: -4, void: false}")
    rules = load_rules(path)
    truths = [rules.profiles[name] for name in ("NORMAL", "AML")]
    assert Path(table).exists()
    shares = {
        preset: {name: plain for name, plain, _ in lint.lint_rows(rules, truths, preset=preset)}["empty"]
        for preset in (None, "default")
    }
    assert shares[None] is not None and shares[None] < 2 * shares["default"] < 0


def test_the_path_of_the_most_frequent_values_is_tried_too() -> None:
    rules = load_rules("drawn-smears")
    assert rules.phrases is not None
    one = {(path["density"], path["white_type"]): path for path in rules.paths if path["white_cells"] == "one"}
    shown = [("sparse", "lymphocyte"), ("sparse", "eosinophil"), ("moderate", "neutrophil"), ("crowded", "neutrophil")]
    policies = lint.policies(rules, rules.phrases, [one[pair] for pair in shown])
    constants = {name for name in policies if name.startswith("constant ")}
    expected = [*(one[pair] for pair in shown), one["sparse", "neutrophil"]]
    assert constants == {f"constant {', '.join(path.values())}" for path in expected}


def test_a_perfect_policy_that_earns_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="perfect answers earn 0; expected more than 0"):
        lint.main(words(tmp_path, "{correct: 0, wrong: -1, abstain_wrong: -1}"))
