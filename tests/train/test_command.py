"""`llava train` before torch: help, the table of options, beginners' mistakes, prefixes, processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava import cli
from llava.errors import ConfigError, DataError
from llava.train import command
from llava.train.command import checked_words
from llava.train.help import BRIEF, WIDTH, help_text
from llava.train.option_table import GROUPS, TABLE_FILE, read_table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `lm`, `tower`, `train.json` and `images`, as the working folder."""
    for name in ("lm", "tower"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "images").mkdir()
    rows = json.dumps(
        [{"conversations": [{"from": "human", "value": "Größe?"}, {"from": "gpt", "value": "yes"}]}] * 2,
        ensure_ascii=False,
    )
    (tmp_path / "train.json").write_text(rows, encoding="utf-8")
    (tmp_path / "windows.jsonl").write_bytes(b"\xef\xbb\xbf" + rows[1:-1].replace('}, {"c', '}\r\n{"c').encode())
    (tmp_path / "utf16.json").write_text(rows, encoding="utf-16")
    (tmp_path / "latin.json").write_text(rows, encoding="latin-1")
    (tmp_path / "quote.json").write_text(rows.replace('"gpt"', 'gpt"'), encoding="utf-8")
    (tmp_path / "python.json").write_text(str(json.loads(rows)), encoding="utf-8")
    (tmp_path / "object.json").write_text(f'{{"data": {rows}}}', encoding="utf-8")
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "cases.csv").write_text("file,report\na.png,normal\n")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "zero2.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


GOOD = {
    "--model-name-or-path": "./lm",
    "--vision-tower": "./tower",
    "--data-path": "train.json",
    "--image-folder": "images",
    "--output-dir": "out",
}


def line(**changed: str | None) -> list[str]:
    """Return a good command line with changed options; None leaves one out."""
    values: dict[str, str | None] = {
        **GOOD,
        **{f"--{name.replace('_', '-')}": value for name, value in changed.items()},
    }
    return [word for name, value in values.items() if value is not None for word in (name, value)]


MISTAKES: list[tuple[list[str], str]] = [
    (line(model_name_or_path=None), "--model-name-or-path is missing"),
    (line(data_path=None, model_name_or_path=None), "--model-name-or-path, --data-path are missing"),
    (line(data_path="trian.json"), "--data-path trian.json: no such file; expected rows in LLaVA format, or a mixture"),
    (line(data_path="images"), "--data-path images is a folder"),
    (
        line(image_folder="imges"),
        "--image-folder imges: no such folder; expected the folder of the images",
    ),
    (line(image_folder="train.json"), "--image-folder train.json: is a file"),
    (line(eval_data_path="test.json"), "--eval-data-path test.json: no such file"),
    (line(model_name_or_path="./ml"), "--model-name-or-path ./ml: no such folder"),
    (
        line(vision_tower="./towr"),
        "--vision-tower ./towr: no such folder; expected a model folder or a hub name",
    ),
    (line(vision_tower=None), "is not a llava checkpoint, so it is treated as a language model. Pass --vision-tower."),
    (line(learning_rate="fast"), "--learning-rate: got 'fast', expected a number"),
    (line(num_train_epoch="1", seed="x"), "--seed: got 'x', expected a whole number"),
    (line(lr_scheduler_type="cosin"), "--lr-scheduler-type: got 'cosin', expected one of linear, cosine"),
    ([*line(), "--lerning-rate", "1e-5"], "unknown option: --lerning-rate 1e-5; did you mean --learning-rate?"),
    (line(bf16="maybe"), "--bf16: got 'maybe', expected true or false"),
    (line(version="vicuna_v2"), "--version vicuna_v2: unknown template; did you mean vicuna_v1?"),
    (line(version="my.jinja"), "--version my.jinja: no such file"),
    (line(image_aspect_ratio="padd"), "--image-aspect-ratio padd: expected one of square, pad"),
    (line(mm_projector_type="mlp"), "--mm-projector-type mlp: expected linear, mlpKx_gelu"),
    (line(deepspeed="zero2.json"), "--deepspeed needs a launcher; add --nproc N"),
    (["run.yaml"], "run.yaml: no such file; expected a YAML file with options"),
    ([*line(), "--config", "a.yaml", "--config", "b.yaml"], "2 configuration files are given"),
    (line(nproc="0"), "--nproc is 0; expected at least 1"),
    (line(nproc="2", nnodes="2"), "--nnodes 2 also needs --node-rank, --master-addr"),
    (
        line(data_path="utf16.json"),
        "utf16.json, row 0: the file is UTF-16 text; expected UTF-8; save it so, or run: iconv",
    ),
    (line(data_path="latin.json"), "latin.json, row 0: field conversations[0].value is not Unicode text"),
    (line(data_path="quote.json"), "quote.json, row 0: not JSON: Expecting value"),
    (line(data_path="python.json"), "python.json, row 0: not JSON: Expecting property name enclosed in double quotes"),
    (line(data_path="object.json"), "object.json, row 0: the row has no conversation: expected field 'conversations'"),
    (line(data_path="empty.json"), "empty.json: no row can be used; the file is empty"),
    (line(data_path="cases.csv"), "cases.csv, row 0: the file is a table; convert it with `llava data csv`"),
    (line(eval_data_path="a.png"), "a.png, row 0: the file is an image (PNG); expected a JSON array"),
    (line(output_dir="train.json"), "--output-dir train.json is a file; expected a folder"),
    (line(fsdp_config="{bad"), "--fsdp-config {bad: not JSON"),
    (line(learning_rate="2,5e-5"), "--learning-rate: got '2,5e-5', expected a number"),
    (line(max_steps="1,000"), "--max-steps: got '1,000', expected a whole number"),
    ([*line(image_folder="my"), "images"], "unexpected word images; quote a value with spaces"),
    (["train.json"], "unexpected word train.json; name the rows with --data-path train.json"),
    (
        line(eval_strategy="stpes"),
        "--eval-strategy: got 'stpes', expected one of no, steps, epoch; did you mean steps?",
    ),
]


@pytest.mark.parametrize(("words", "expected"), MISTAKES, ids=[expected[:40] for _, expected in MISTAKES])
def test_a_mistake_is_one_line(
    words: list[str], expected: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *words])
    printed = capsys.readouterr().err
    assert stop.value.code == 2
    assert expected in printed
    lines = [text for text in printed.splitlines() if " taken as " not in text]
    assert len(lines) == 1 and "Traceback" not in printed


@pytest.mark.parametrize("name", ["train.json", "windows.jsonl"])
def test_rows_of_other_systems_pass_the_early_checks(name: str, files: Path) -> None:
    assert checked_words(line(data_path=name))[1]["data_path"] == name


def test_a_bad_first_row_is_left_to_skip_bad(files: Path) -> None:
    checked_words([*line(data_path="latin.json"), "--skip-bad"])
    with pytest.raises(DataError, match="row 0"):
        checked_words([*line(data_path="quote.json"), "--skip-bad"])


def test_help_and_mistakes_need_little_time_and_no_torch(files: Path) -> None:
    code = (
        "import sys, time, json\nfrom llava.cli import main\n"
        "started = time.process_time()\nmain(['train', '--help'])\n"
        "print('seconds', time.process_time() - started, file=sys.stderr)\n"
        "for words in json.load(open('mistakes.json')):\n"
        "    try:\n        main(['train', *words])\n    except SystemExit as stop:\n        assert stop.code == 2\n"
        "    else:\n        raise AssertionError(words)\n"
        "heavy = {'torch', 'transformers'} & sys.modules.keys()\nassert not heavy, heavy\n"
    )
    (files / "mistakes.json").write_text(json.dumps([words for words, _ in MISTAKES]))
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=files, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) <= 120 and max(map(len, done.stdout.splitlines())) <= 150
    seconds = float(next(text for text in done.stderr.splitlines() if text.startswith("seconds")).split()[1])
    assert seconds < 10  # a tenth of a second


def test_the_table_equals_the_parser() -> None:
    from llava.train.write_option_table import option_rows, table_text

    written = (ROOT / "llava" / "train" / TABLE_FILE).read_text(encoding="utf-8")
    assert written == table_text(option_rows()), "run `python -m llava.train.write_option_table`"


def test_help_all_names_every_option_once() -> None:
    lines = help_text(full=True).splitlines()
    shown = [text.split()[0] for text in lines if text.startswith("  --")]
    assert sorted(shown) == sorted(row.name for row in read_table())
    assert not any("_" in name for name in shown)


def test_no_line_of_the_short_form_is_cut() -> None:
    lines = [line for line in help_text().splitlines() if line.startswith("  --")]
    assert max(map(len, lines)) <= WIDTH
    assert not any(line.endswith("...") or " ... (" in line for line in lines)
    assert set(BRIEF) <= {row.name for row in read_table() if row.is_listed}


def test_a_published_script_shows_its_own_defaults() -> None:
    shown = help_text("train_mem.py", example="--data-path train.json")
    assert "usage: train_mem.py [--OPTION VALUE ...]" in shown
    assert "example: python llava/train/train_mem.py --data-path train.json" in shown
    assert "(new model: v0)" in shown and "(new model: linear)" in shown
    assert "--nproc " not in shown and "--nproc " in help_text()


def test_the_short_form_has_every_group_but_the_published_names() -> None:
    lines = help_text().splitlines()
    assert [text[:-1] for text in lines if text.endswith(":") and not text.startswith(" ")] == [
        group for group in GROUPS if group != "published names"
    ]
    assert "--evaluation-strategy" not in help_text() and "--evaluation-strategy" in help_text(full=True)


@pytest.mark.parametrize("words", [["--help", "all"], ["--help=all"], ["-h", "all"]])
def test_help_all_is_printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", *words])
    assert "--vision-tower-lr" in capsys.readouterr().out


def test_a_prefix_is_taken_as_its_option(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, options = command.checked_words([*line(), "--learning", "1e-3", "--num_train=2"])
    assert "--learning taken as --learning-rate" in capsys.readouterr().err
    assert words[-3:] == ["--learning-rate", "1e-3", "--num-train-epochs=2"]
    assert options["learning_rate"] == 1e-3 and options["num_train_epochs"] == 2


@pytest.fixture
def second_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RANK", "1")
    yield


def test_only_the_first_rank_reports_a_mistake(
    files: Path, second_rank: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", *line(data_path="none.json")])
    assert capsys.readouterr().err == ""


def test_processes_are_started_with_torchrun(files: Path) -> None:
    words, options = command.checked_words([*line(), "--nproc", "2", "--master-port=29511"])
    started = command.torchrun_command(words, options)
    assert started[1:8] == [
        "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29511", "-m", "llava.cli", "train",
    ]  # fmt: skip
    assert started[8:] == line()


def test_several_machines(files: Path) -> None:
    given = ["--nproc", "8", "--nnodes", "2", "--node-rank", "1", "--master-addr", "10.0.0.1"]
    words, options = command.checked_words([*line(), *given])
    started = command.torchrun_command(words, options)
    assert started[3:7] == ["--nproc_per_node=8", "--nnodes=2", "--node_rank=1", "--master_addr=10.0.0.1"]
    with pytest.raises(ConfigError, match="--node-rank is 2; expected 0 to 1"):
        command.torchrun_command(words, {**options, "node_rank": 2})


def test_small_parts_are_found_by_name(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava.model.packaged import pretrained

    monkeypatch.setattr(pretrained, "language_model", lambda: Path("cache/smollm2"))
    monkeypatch.setattr(pretrained, "vision_tower", lambda size: Path(f"cache/dinov2-{size}"))
    given = line(model_name_or_path="SmolLM2-135M", vision_tower="dinov2-small", image_size="168")
    words, options = command.checked_words(given)
    assert command.with_packaged_parts(words, options)[-4:] == [
        "--model-name-or-path", "cache/smollm2", "--vision-tower", "cache/dinov2-168",
    ]  # fmt: skip
    (files / "dinov2-small").mkdir()
    assert "--vision-tower" not in command.with_packaged_parts(words, options)[len(words) :]
