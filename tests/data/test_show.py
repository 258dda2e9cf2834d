from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from llava.data import show, show_command
from llava.data.self_questioning import QuestionDraws
from llava.errors import CheckpointError, ConfigError, DataError
from llava.processing import LlavaMedProcessor
from llava.samples import Sample
from tests.support.text_tools import byte_level, make_processor, talk, write_processor


def write_rows(path: Path) -> Path:
    rows = [
        {"id": "broken"},
        {
            "id": "b<1>",
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "<image>\nIs <b> seen?"},
                {"from": "gpt", "value": "Yes & no."},
            ],
        },
    ]
    path.write_text(json.dumps(rows))
    return path


def test_plain_output_marks_what_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, file = write_processor(tmp_path / "model"), write_rows(tmp_path / "rows.json")
    show_command.main([str(file), "--row", "1", "--model", str(model)])
    printed = capsys.readouterr().out
    assert f"{file}, row 1, id 'b<1>'" in printed
    assert "USER: <image 1>\nIs <b> seen? ASSISTANT:[[ Yes & no.</s>]]" in printed
    assert "4 of images" in printed and "truncation cut 0" in printed
    assert "x 4" in printed and "</s>=2" in printed
    assert "\x1b" not in printed


def test_truncation_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, file = write_processor(tmp_path / "model"), write_rows(tmp_path / "rows.json")
    show_command.main([str(file), "--row=1", f"--model={model}"])
    total = int(next(line for line in capsys.readouterr().out.splitlines() if " trained, " in line).split()[0])
    show_command.main([str(file), "--row=1", f"--model={model}", "--max_length", str(total - 3)])
    printed = capsys.readouterr().out
    assert "truncation cut 3, 3 of them trained" in printed
    assert "[[ Yes & n]]{{[[o.</s>]]}}" in printed


def test_colors_replace_marks() -> None:
    processor = make_processor()
    view = show.make_view(Sample("x", talk("Q", "A")), processor, max_length=None)
    painted = show.to_terminal(view, processor, color=True)
    assert "\x1b[1;32m A</s>\x1b[0m" in painted
    assert "[[" not in painted


def test_stretches_hold_every_token_once() -> None:
    processor = make_processor()
    sample = Sample("x", talk("<image>\nQ", "A ≥ 2", "R", "B"), images=("k",))
    view = show.make_view(sample, processor, max_length=None)
    starts = [stretch.start for stretch in view.stretches]
    assert starts == [sum(len(s.ids) for s in view.stretches[:i]) for i in range(len(starts))]
    assert [s.kind for s in view.stretches] == ["text", "image", "text", "trained", "text", "trained"]
    assert [s.turn for s in view.stretches] == [-1, 0, 0, 1, 2, 3]


def test_page_is_escaped_and_shows_the_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, file = write_processor(tmp_path / "model"), write_rows(tmp_path / "rows.json")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (900, 30), "red").save(tmp_path / "images" / "a.png")
    page = tmp_path / "out" / "row.html"
    flags = ["--row", "1", "--model", str(model), "--html", str(page), "--image-folder", str(tmp_path / "images")]
    show_command.main([str(file), *flags])
    text = page.read_text(encoding="utf-8")
    assert "Is &lt;b&gt; seen?" in text and "<b> seen" not in text
    assert ' class="trained" ' in text and "Yes &amp; no." in text
    assert 'src="data:image/png;base64,' in text
    assert f"page: {page}" in capsys.readouterr().out


def test_plain_language_model_with_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    byte_level(added=()).save_pretrained(tmp_path / "lm")
    file = write_rows(tmp_path / "rows.json")
    flags = ["--version", "chatml", "--num_image_tokens", "5", "--mm_use_im_start_end"]
    show_command.main([str(file), "--row", "1", "--model", str(tmp_path / "lm"), *flags])
    printed = capsys.readouterr().out
    assert "[[Yes & no.<|im_end|>]]" in printed
    assert "x 5" in printed and "<im_start>" in printed


def test_errors_name_row_and_remedy(tmp_path: Path) -> None:
    model, file = write_processor(tmp_path / "model"), write_rows(tmp_path / "rows.json")
    with pytest.raises(DataError, match=r"rows.json, row 0: .*no conversation"):
        show_command.main([str(file), "--row", "0", "--model", str(model)])
    with pytest.raises(DataError, match="has 2 rows, so --row must be from 0 to 1, got 7"):
        show_command.main([str(file), "--row", "7", "--model", str(model)])
    with pytest.raises(DataError, match=r"row 1, id 'b<1>': 1 images take 4 tokens"):
        show_command.main([str(file), "--row", "1", "--model", str(model), "--max_length", "4"])
    with pytest.raises(CheckpointError, match="has neither a processor"):
        show_command.main([str(file), "--model", str(tmp_path)])


def test_a_mixture_is_no_file_of_rows(tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text("sources:\n  - {name: a, rows: a.json}\n")
    with pytest.raises(ConfigError, match="is a mixture, expected a data file; pass the file of one source"):
        show_command.main([str(tmp_path / "mix.yaml"), "--model", "nowhere"])


@pytest.mark.parametrize("escape", ["\x1b]0;title\x07", "\x1b[2J", "\x9b31m", "\u202eorder", "back\x08\r"])
def test_control_characters_of_a_row_are_visible_escapes(
    tmp_path: Path, escape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, file, page = write_processor(tmp_path / "model"), tmp_path / f"rows{escape}.json", tmp_path / "page.html"
    turns = [{"from": "human", "value": f"first\n{escape} q"}, {"from": "gpt", "value": f"{escape}\tanswer"}]
    file.write_text(json.dumps([{"id": f"a{escape}", "conversations": turns}]))
    show_command.main([str(file), "--model", str(model), "--html", str(page)])
    printed = capsys.readouterr().out
    for text in (printed, page.read_text()):
        assert not set(escape) & set(text) & set("\x1b\x07\x08\r\x9b\u202e")
    assert f"first\n{escape!r}"[:-1].replace("'", "") in printed and "\tanswer" in printed


def test_asked_questions_are_those_of_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"from": "human", "value": "<image>\nQ1"}, {"from": "gpt", "value": "A1"}]
    turns += [{"from": "human", "value": "Q2"}, {"from": "gpt", "value": "A2"}]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"id": str(row), "image": "a.png", "conversations": turns} for row in range(8)]))
    model = write_processor(tmp_path / "model", template="v1_sq")
    shown = []
    for row in range(8):
        show_command.main(
            [str(file), "--row", str(row), "--model", str(model), "--sq-r", "0.5", "--seed", "7", "--epoch", "1"]
        )
        shown.append("VUSER:[[ Q2</s>]]" in capsys.readouterr().out)
    draws = QuestionDraws(0.5, seed=7)
    expected = [
        draws.apply(talk("<image>\nQ1", "A1", "Q2", "A2"), has_image=True, place=f"1/{row}") for row in range(8)
    ]
    assert shown == [bool(conversation.turns[2].train) for conversation in expected]
    assert len(set(shown)) == 2
    with pytest.raises(ConfigError, match=r"--sq-r 0\.5: template v1 has no header"):
        show_command.main([str(file), "--model", str(write_processor(tmp_path / "other")), "--sq-r", "0.5"])


def test_a_model_of_a_type_of_ours_is_read_without_a_warning_of_transformers(tmp_path: Path) -> None:
    model, seen = write_processor(tmp_path / "model"), io.StringIO()
    (model / "config.json").write_text('{"model_type": "not_registered_here"}')
    handler = logging.StreamHandler(seen)
    logger = logging.getLogger("transformers.configuration_utils")
    logger.addHandler(handler)
    try:
        LlavaMedProcessor.from_pretrained(model)
    finally:
        logger.removeHandler(handler)
    assert seen.getvalue() == "" and logger.level == logging.NOTSET


def test_a_model_that_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: str) -> None:
        raise OSError("no connection\ncheck it")

    monkeypatch.setattr(show, "read_tokenizer", fail)
    with pytest.raises(CheckpointError, match=r"that can be loaded: no connection$"):
        show_command.main([str(write_rows(tmp_path / "rows.json")), "--row", "1", "--model", "none"])
