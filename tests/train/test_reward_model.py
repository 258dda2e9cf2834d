"""Reward models on pairs: what a run learns and saves, the rating question with captions, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from llava.errors import LlavaError
from llava.model.value_head import VALUE_FILE
from llava.train.reward_model import LEAD, rating_question, read_captions
from tests.support.pairs import pair_arguments, write_pairs
from tests.support.runs import losses, metrics, saved, train, write_parts

PROMPT = "Rate the answer.\n{factual_prompt}\nRating:"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_parts(tmp_path_factory.mktemp("parts"))
    write_pairs(folder / "pairs")
    (folder / "prompt.txt").write_text(PROMPT)
    (folder / "captions.json").write_text(json.dumps({f"{i}.png": [f"fact {i}", "a cell"] for i in range(3)}))
    return folder


def rating(parts: Path, output: Path, **changed: object) -> list[str]:
    options: dict[str, object] = {"objective": "reward", "version": "vicuna_v1", "max_steps": 8, "learning_rate": 3e-3,
                                  "per_device_train_batch_size": 12, "lr_scheduler_type": "constant"}  # fmt: skip
    return pair_arguments(parts, output, **options | changed)


def test_a_run_learns_which_side_is_preferred_and_saves_its_head(parts: Path, tmp_path: Path) -> None:
    train(rating(parts, tmp_path, lora_enable=True, lora_r=4))
    assert losses(tmp_path)[0] == pytest.approx(math.log(2), abs=1e-6)
    accuracies = losses(tmp_path, "accuracy")
    assert accuracies[0] == 0 and accuracies[-1] > 0.7
    last = metrics(tmp_path)[7]
    assert last["margin"] == pytest.approx(last["reward/chosen"] - last["reward/rejected"], abs=1e-5)
    assert (tmp_path / VALUE_FILE).is_file() and saved(tmp_path)["head.linear.weight"].abs().max() > 0


def test_the_layout_of_a_batch_changes_no_loss(parts: Path, tmp_path: Path) -> None:
    for name in ("on", "off"):
        train(rating(parts, tmp_path / name, prefix_sharing=name, max_steps=3))
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), abs=1e-5)


def test_captions_are_facts_of_the_rating_question(parts: Path, tmp_path: Path) -> None:
    assert rating_question(PROMPT, ["a", "b"]) == f"Rate the answer.\n{LEAD}\n  - a\n  - b\nRating:"
    pairs = [row for row in json.loads((parts / "pairs" / "pairs.json").read_text()) if "image" in row]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    options = {"data_path": tmp_path / "pairs.json", "reward_prompt_file": parts / "prompt.txt", "max_steps": 2,
               "image_to_caption_file": parts / "captions.json"}  # fmt: skip
    train(rating(parts, tmp_path / "run", **options))
    assert losses(tmp_path / "run")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(tmp_path / "run")[1] != pytest.approx(math.log(2), abs=1e-4)
    with pytest.raises(LlavaError, match=r"row 4: image .* has no captions"):
        train(rating(parts, tmp_path / "other", **options | {"data_path": parts / "pairs" / "pairs.json"}))


@pytest.mark.parametrize(("names", "message"), [
    (("image_to_caption_file",), "has an effect only with --reward-prompt-file"),
    (("reward_prompt_file",), "need each other"),
])  # fmt: skip
def test_a_question_and_its_captions_need_each_other(
    parts: Path, tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    files = {"image_to_caption_file": parts / "captions.json", "reward_prompt_file": parts / "prompt.txt"}
    with pytest.raises(LlavaError, match=message):
        train(rating(parts, tmp_path, **{name: files[name] for name in names}))


def test_captions_that_are_no_lists_are_refused(tmp_path: Path) -> None:
    (tmp_path / "captions.json").write_text('{"a.png": "text"}')
    with pytest.raises(LlavaError, match=r"'a.png': expected a list of captions"):
        read_captions(tmp_path / "captions.json")


def test_the_loss_of_a_pair() -> None:
    from llava.data.encode import Encoded
    from llava.data.flat_batch import flatten
    from llava.train.objectives.reward import PairwiseReward

    sequences = [Encoded((1, 5, 6 + i), (-100, -100, 6 + i), (0, 0, 1), weight=2.0 if i < 2 else 1.0) for i in range(4)]
    batch = flatten(sequences, {}, image_token_id=4, unit_sizes=[2, 2])
    rewards = torch.tensor([[0.5, -1.0, 2.0, 3.0]])
    output = PairwiseReward(centering=0.1)(lambda **_: rewards, batch, num_items=torch.tensor([2.0]))
    terms = [-math.log(1 / (1 + math.exp(-(a - b)))) + 0.1 * (a + b) ** 2 for a, b in ((0.5, -1.0), (2.0, 3.0))]
    assert output.loss.item() == pytest.approx((2 * terms[0] + terms[1]) / 2, abs=1e-6)
    assert output.metrics["accuracy"].tolist() == [1.0, 2.0]
