"""Names of `--compat`: the table, the commands that accept a name, and the effect of each on answers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava import compat
from llava.compat import COMPAT, PLACES, parse_compat
from llava.errors import ConfigError, DataError
from llava.eval.options import add_model_options
from llava.generation.fingerprint import differing_settings, model_settings
from llava.generation.loading import imitating_reader, open_engine
from llava.generation.prompt_encoder import PromptReader
from llava.generation.protocol import Prompt, Sampling
from llava.model.builder import LoadedModel
from llava.model.checkpoint.save import save_model
from llava.samples import Conversation, Turn
from llava.serve.cli import main as chat
from llava.serve.cli import make_parser as chat_parser
from llava.utils.cli import Parser
from tests.conftest import ROOT
from tests.support.legacy_folders import write_legacy
from tests.support.tiny import tiny_image, tiny_llava

LENGTH = 220
"""Length after the system text and the image of a prompt, before its end."""

PAGE = ROOT / "docs" / "compatibility.md"


def test_the_page_holds_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.+?) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    words = {
        "": "comparison only",
        "training": "`llava train`",
        "answers": "`llava chat`, `llava eval`",
        "scores": "`run_eval`, `run_eval_batch`, `llava eval`",
        "judge": "`eval_multimodal_chat_gpt_score`, `summarize_gpt_review`",
        "preferences": "`llava preferences judge`",
    }
    assert rows == [(name, case.original, case.spec, words[case.where]) for name, case in COMPAT.items()]


def test_names_are_refused_where_they_have_no_effect() -> None:
    assert parse_compat("cut_prompt", "answers") == {"cut_prompt"}
    training = {"micro_batch_loss", "cut_before_images", "empty_answers", "frozen_vit_lora", "shared_sq_draws"}
    training |= {"policy_reference_inputs", "policy_dropout", "drllava"}
    assert parse_compat("all", "training") == training
    assert parse_compat("all") == set(COMPAT) and not parse_compat("none", "answers")
    with pytest.raises(ConfigError, match="cut_prompt has no effect in the training commands; accepted there: micro"):
        parse_compat("micro_batch_loss,cut_prompt", "training")
    with pytest.raises(ConfigError, match="unknown name beams; known: beams_count_prompt"):
        parse_compat("beams", "answers")
    for place in PLACES:
        assert parse_compat("all", place) and all(
            name in compat.compat_help(place) for name in parse_compat("all", place)
        )


PUBLISHED = parse_compat("published", "scores")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", PUBLISHED),
        ("none", frozenset()),
        ("cut_prompt", PUBLISHED | {"cut_prompt"}),
        ("cut_prompt, none", {"cut_prompt"}),
        ("-yes_no_only", PUBLISHED - {"yes_no_only"}),
        (
            "-yes_no_only,published,cut_prompt,dropped_closed_misses",
            parse_compat("all", "scores") - {"yes_no_only"} | {"cut_prompt"},
        ),
        ("swapped_counts", {"swapped_counts"}),
        ("all,-published", parse_compat("all", "answers") | {"dropped_closed_misses"}),
    ],
)
def test_places_without_a_name_keep_their_default(text: str, names: frozenset[str]) -> None:
    assert parse_compat(text, "answers", "scores") == names


def saved(tmp_path: Path, **options: Any) -> str:
    loaded = tiny_llava(**options)
    save_model(loaded.model, loaded.processor, tmp_path / "model", origin=loaded.origin)
    return str(tmp_path / "model")


def test_commands_refuse_unknown_names_before_they_load_anything(tmp_path: Path) -> None:
    words = ["--model", str(tmp_path / "nowhere"), "--question", "What?", "--compat", "nonsense"]
    with pytest.raises(ConfigError, match="nonsense"):
        chat(words)
    with pytest.raises(ConfigError, match="nonsense"):
        open_engine(str(tmp_path / "nowhere"), compat="nonsense")
    assert chat_parser().parse_args(words).compat == "nonsense"


def test_names_are_part_of_the_settings_of_answers(tmp_path: Path) -> None:
    parser = Parser()
    add_model_options(parser)
    words = ["--model", saved(tmp_path)]
    plain = model_settings(parser.parse_args(words))
    with_name = model_settings(parser.parse_args([*words, "--compat", "random_padding"]))
    assert differing_settings(plain, with_name) == ["compat"]


def question(num_words: int, *images: Image.Image) -> Prompt:
    text = "<image>\n" * len(images) + "word " * num_words
    return Prompt(Conversation((Turn("human", text),)), images)


def test_prompt_is_truncated_to_the_training_length(tmp_path: Path) -> None:
    folder = write_legacy(tmp_path, tokenizer_model_max_length=LENGTH)
    engine = open_engine(str(folder), compat="cut_prompt", device="cpu")
    assert engine.reader.longest == LENGTH
    whole = PromptReader(engine.processor, max_tokens=2000).read(question(40, tiny_image(0))).encoded
    found = engine.reader.read(question(40, tiny_image(0)))
    assert found.encoded.input_ids == whole.input_ids[:LENGTH]
    assert found.encoded.num_cut == len(whole.input_ids) - LENGTH
    assert len(found.images) == 1 and found.encoded.image_spans == whole.image_spans
    assert len(engine.reader.read(question(40)).encoded.input_ids) > LENGTH, "text alone stays whole"
    assert engine.generate([question(40, tiny_image(0))], Sampling(max_new_tokens=2))[0][0].finish != "error"
    inside = PromptReader(engine.processor, max_tokens=2000, longest=whole.image_spans[0][1] - 1)
    with pytest.raises(DataError, match="ends inside an image"):
        inside.read(question(40, tiny_image(0)))
    assert open_engine(str(folder), device="cpu").reader.longest is None


def test_what_the_checkpoint_does_not_say(tiny: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="tokenizer_model_max_length"):
        imitating_reader(tiny.model, tiny.processor, {"cut_prompt"})


def test_padding_is_drawn(tmp_path: Path) -> None:
    folder = saved(tmp_path, image_mode="pad")
    processor = open_engine(folder, device="cpu").processor
    image = tiny_image(0).resize((28, 20))
    plain = {processor.preprocess(image).numpy().tobytes() for _ in range(12)}
    assert len(plain) == 1
    processor = open_engine(folder, device="cpu", compat="random_padding").processor
    drawn = {processor.preprocess(image).numpy().tobytes() for _ in range(40)}
    assert len(drawn) == 2 and plain < drawn
    assert len({processor.preprocess(tiny_image(0)).numpy().tobytes() for _ in range(9)}) == 1, "no draw"


def test_beams_count_the_prompt_where_that_is_asked_for(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    assert open_engine(folder, compat="beams_count_prompt", device="cpu").beams_count_prompt
    assert not open_engine(folder, device="cpu").beams_count_prompt
