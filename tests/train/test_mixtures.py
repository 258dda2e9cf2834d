"""Training on mixtures: weights, loss of each source, and streams that resume after a kill."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from llava.data import loader
from llava.errors import ConfigError, DataError
from llava.model.checkpoint.load import load_checkpoint
from tests.support.ranks import run_ranks, start
from tests.support.runs import arguments, losses, metrics, steps, train, train_until_killed, write_parts
from tests.support.tiny import write_tiny_vqa

NUM_STEPS = 6


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts, a second source, its shards, and the two mixtures."""
    folder = write_parts(tmp_path_factory.mktemp("parts"))
    write_tiny_vqa(folder / "more")
    (folder / "mixture.yaml").write_text(
        "sources:\n"
        "  - {name: first, path: vqa/train.json, images: vqa/images, weight: 0.5}\n"
        "  - {name: second, path: more/train.json, images: more/images, weight: 2}\n"
    )
    write_shards(folder / "more", folder / "shards")
    rows = json.loads((folder / "vqa" / "train.json").read_text())
    (folder / "vqa" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "stream.yaml").write_text(
        "stream: true\n"
        "sources:\n"
        "  - {name: lines, path: vqa/train.jsonl, images: vqa/images}\n"
        "  - {name: shards, path: 'shards/*.tar', weight: 2}\n"
    )
    return folder


def write_shards(source: Path, folder: Path, size: int = 4) -> None:
    rows = json.loads((source / "train.json").read_text())
    folder.mkdir()
    for first in range(0, len(rows), size):
        with tarfile.open(folder / f"{first:03d}.tar", "w") as archive:
            for number, row in enumerate(rows[first : first + size], start=first):
                image = (source / "images" / row["image"]).read_bytes()
                for name, content in (("json", json.dumps(row).encode()), ("png", image)):
                    member = tarfile.TarInfo(f"{number:06d}.{name}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def options(parts: Path, **changed: object) -> dict[str, object]:
    return {"data_path": parts / "mixture.yaml", "image_folder": None, "log_row_ids": True, **changed}


def streaming(parts: Path, **changed: object) -> dict[str, object]:
    named = {"data_path": parts / "stream.yaml", "num_train_epochs": None, "max_steps": NUM_STEPS}
    named |= {"save_strategy": "steps", "save_steps": 2, "dataloader_num_workers": 0}
    return options(parts, **{**named, **changed})


def test_rows_come_by_weight_and_each_source_has_its_loss(parts: Path, tmp_path: Path) -> None:
    run_ranks(1, train, arguments(parts, tmp_path, **options(parts)))
    drawn = [
        row for line in (tmp_path / "row_ids-0.jsonl").read_text().splitlines() for row in json.loads(line)["rows"]
    ]
    assert len(drawn) == 6 + 24 and sum(row < 12 for row in drawn) == 6
    lines = [line for line in metrics(tmp_path) if "loss" in line]
    assert all({"loss/first", "loss/second"} & line.keys() for line in lines)
    assert json.loads((tmp_path / "provenance.json").read_text())["order"].endswith("drawn with weights 0.5, 2")


def test_losses_of_the_sources_add_up(parts: Path, tmp_path: Path) -> None:
    """With all rows in one step, the loss is the mean over both sources, weighted by their trained tokens."""
    (parts / "equal.yaml").write_text((parts / "mixture.yaml").read_text().replace("0.5", "1").replace("2}", "1}"))
    whole = options(parts, data_path=parts / "equal.yaml", per_device_train_batch_size=24)
    run_ranks(1, train, arguments(parts, tmp_path, **whole))
    [line] = [line for line in metrics(tmp_path) if "loss" in line]
    assert line["loss"] == pytest.approx((line["loss/first"] + line["loss/second"]) / 2, rel=1e-4)


def test_two_ranks_see_the_same_mixture(parts: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run_ranks(1, train, arguments(parts, one, **options(parts, image_grouping="off")))
    run_ranks(2, train, arguments(parts, two, **options(parts, image_grouping="off", per_device_train_batch_size=2)))
    assert losses(one) == pytest.approx(losses(two), rel=2e-5)
    first, second = (
        [{name: value for name, value in line.items() if name.startswith("loss/")} for line in metrics(folder)]
        for folder in (one, two)
    )
    assert all(left == pytest.approx(right, rel=2e-4) for left, right in zip(first, second, strict=True))


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.extended)])
def test_a_killed_stream_goes_on_exactly(parts: Path, tmp_path: Path, num_workers: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = streaming(parts, dataloader_num_workers=num_workers)
    run_ranks(1, train, arguments(parts, whole, **words))
    assert start(1, train_until_killed, arguments(parts, killed, **words), 5) == [("died", -9)]
    run_ranks(1, train, arguments(parts, killed, **words))
    assert steps(killed) == list(range(1, NUM_STEPS + 1)) and losses(whole) == losses(killed)
    first, second = load_checkpoint(whole).model.state_dict(), load_checkpoint(killed).model.state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert any("loss/lines" in line for line in metrics(whole)) and any(
        "loss/shards" in line for line in metrics(whole)
    )


def test_ranks_of_a_stream_share_its_rows(parts: Path, tmp_path: Path) -> None:
    run_ranks(2, train, arguments(parts, tmp_path, **streaming(parts, save_strategy="no", max_steps=2)))
    assert steps(tmp_path) == [1, 2]


def test_what_a_stream_cannot_do_is_refused(parts: Path, tmp_path: Path) -> None:
    def refused(words: str, **changed: object) -> None:
        with pytest.raises(ConfigError, match=words):
            train(arguments(parts, tmp_path / "run", **streaming(parts, **changed)))

    refused("--max-steps", max_steps=None)
    refused("is a stream; omit --feature-cache-dir", feature_cache_dir=tmp_path)
    refused("is a stream; omit --image-grouping on", image_grouping="on")
    refused("held-out rows that fit in memory", eval_data_path=parts / "stream.yaml", eval_strategy="epoch")
    run_ranks(1, train, arguments(parts, tmp_path / "run", **streaming(parts, max_steps=2)))
    (kind, text), *_ = start(1, train, arguments(parts, tmp_path / "run", **streaming(parts, dataloader_num_workers=2)))
    assert kind == "error" and "with the same numbers" in text


def test_a_folder_beside_a_mixture_is_refused(parts: Path, tmp_path: Path) -> None:
    """The folder would be ignored, since each source has its own."""
    beside = {"image_folder": parts / "vqa" / "images"}
    for words in (options(parts, **beside), streaming(parts, **beside)):
        with pytest.raises(ConfigError, match=r"--image-folder .* has no effect: .*set `images` in its sources"):
            train(arguments(parts, tmp_path, **words))
    held_out = {"eval_data_path": parts / "mixture.yaml", "eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(ConfigError, match=r"--eval-image-folder .* has no effect: "):
        train(arguments(parts, tmp_path, **held_out, eval_image_folder=parts / "more" / "images"))


def test_rows_of_a_stream_read_no_files_without_a_folder(parts: Path, tmp_path: Path) -> None:
    lines = (parts / "vqa" / "train.jsonl").read_text().splitlines()
    image = str((parts / "vqa" / "images" / "0.png").resolve())
    (parts / "vqa" / "anywhere.jsonl").write_text(
        "".join(json.dumps({**json.loads(line), "image": image}) + "\n" for line in lines)
    )
    (parts / "anywhere.yaml").write_text("stream: true\nsources: [{name: own, path: vqa/anywhere.jsonl}]\n")
    words = streaming(parts, data_path=parts / "anywhere.yaml", save_strategy="no", max_steps=1)
    with pytest.raises(DataError, match=r"row \d+: .*source own has no `images`"):
        train(arguments(parts, tmp_path / "refused", **words))
    (parts / "anywhere.yaml").write_text("stream: true\nsources: [{name: own, path: vqa/anywhere.jsonl, images: /}]\n")
    train(arguments(parts, tmp_path / "allowed", **words))
    assert steps(tmp_path / "allowed") == [1]


def test_losses_of_the_sources_survive_a_resume_between_two_logs(parts: Path, tmp_path: Path) -> None:
    words = options(parts, save_strategy="steps", save_steps=1, logging_steps=2, max_steps=4)
    train(arguments(parts, tmp_path / "whole", **words))
    broken = Path(shutil.copytree(tmp_path / "whole", tmp_path / "broken"))
    shutil.rmtree(broken / "checkpoint-4")
    train(arguments(parts, broken, **words))
    kept = [
        [{name: row[name] for name in row if name.startswith("loss")} for row in metrics(folder) if "loss" in row]
        for folder in (tmp_path / "whole", broken)
    ]
    assert len(kept[0]) == 2 and kept[0] == kept[1] and "loss/second" in kept[0][1]


def test_held_out_mixture_beside_an_image_folder(parts: Path, tmp_path: Path) -> None:
    held_out = {"eval_data_path": parts / "mixture.yaml", "eval_strategy": "steps", "eval_steps": 1, "eval_answers": 2}
    train(arguments(parts, tmp_path, **held_out, max_steps=1))
    assert any("eval_loss" in row for row in metrics(tmp_path))


def test_rows_that_never_can_be_used_end_the_run(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this error, a stream whose images are missing would search for a usable row forever."""
    monkeypatch.setattr(loader, "MAX_BAD_IN_A_ROW", 30)
    rows = [json.loads(line) for line in (parts / "vqa" / "train.jsonl").read_text().splitlines()]
    gone = [{**row, "image": "gone.png"} for row in rows]
    (parts / "vqa" / "gone-0.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (parts / "vqa" / "gone-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in gone * 3))
    (parts / "gone.yaml").write_text("stream: true\nsources: [{name: a, path: vqa/gone-*.jsonl, images: vqa/images}]\n")
    words = streaming(parts, data_path=parts / "gone.yaml", save_strategy="no", skip_bad=True)
    with pytest.raises(DataError, match="30 consecutive rows cannot be used"):
        train(arguments(parts, tmp_path, **words))


def bad_stream(parts: Path) -> list[dict[str, object]]:
    """Train on a stream of six rows with two unusable ones; return the lines of the quarantine file."""
    lines = (parts / "vqa" / "train.jsonl").read_text().splitlines()
    gone = json.dumps({**json.loads(lines[0]), "id": "7", "image": "gone.png"})
    (parts / "vqa" / "bad.jsonl").write_text(
        "\n".join([lines[0], lines[1], "{not JSON", lines[2], gone, lines[3]]) + "\n"
    )
    (parts / "bad.yaml").write_text("stream: true\nsources: [{name: lines, path: vqa/bad.jsonl, images: vqa/images}]\n")
    shard = str(parts / "vqa" / "bad.jsonl")
    return [{"file": shard, "row": 2, "id": ""}, {"file": shard, "row": 4, "id": "7"}]


def listed(*files: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return sorted(({name: row[name] for name in ("file", "row", "id")} for row in rows), key=lambda row: row["row"])


def test_bad_rows_of_a_stream_are_named_or_left_out(parts: Path, tmp_path: Path) -> None:
    bad = bad_stream(parts)
    words = streaming(parts, data_path=parts / "bad.yaml", save_strategy="no", max_steps=3)
    with pytest.raises(DataError, match=r"bad\.jsonl, row \d: (not JSON|image .*gone\.png)"):
        train(arguments(parts, tmp_path / "run", **words))
    train(arguments(parts, tmp_path / "left_out", **words, skip_bad=True))
    assert steps(tmp_path / "left_out") == [1, 2, 3]
    assert listed(tmp_path / "left_out" / "quarantine.jsonl") == bad
    (last,) = [
        line["skipped_rows"] for line in metrics(tmp_path / "left_out") if line.get("step") == 3 and "loss" in line
    ]
    assert last >= 4, "three passes meet both rows again, and each time they are left out"


def test_the_list_of_bad_rows_survives_a_kill(parts: Path, tmp_path: Path) -> None:
    bad = bad_stream(parts)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = streaming(parts, data_path=parts / "bad.yaml", skip_bad=True)
    train(arguments(parts, whole, **words))
    assert start(1, train_until_killed, arguments(parts, killed, **words), 5) == [("died", -9)]
    with (killed / "quarantine.jsonl").open("a") as stream:
        stream.write('{"file": "torn')
    train(arguments(parts, killed, **words))
    found = [[line.get("skipped_rows") for line in metrics(folder) if "loss" in line] for folder in (whole, killed)]
    assert found[0] == found[1] and listed(killed / "quarantine.jsonl") == bad
    train(arguments(parts, killed, **words, overwrite_output_dir=True))
    assert listed(killed / "quarantine.jsonl") == bad


def test_ranks_of_a_stream_count_and_list_bad_rows_together(parts: Path, tmp_path: Path) -> None:
    bad = bad_stream(parts)
    words = streaming(parts, data_path=parts / "bad.yaml", save_strategy="no", skip_bad=True, max_steps=2)
    run_ranks(2, train, arguments(parts, tmp_path, **words))
    assert listed(tmp_path / "quarantine.jsonl", tmp_path / "quarantine-1.jsonl") == bad
    assert [line["skipped_rows"] for line in metrics(tmp_path) if "loss" in line][-1] >= 2
