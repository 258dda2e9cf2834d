"""Building models from parts: vocabulary, seeds, ties, heads, and options rejected before weights are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PhiConfig, PhiForCausalLM

from llava.constants import IM_END_TOKEN, IM_PATCH_TOKEN, IM_START_TOKEN, IMAGE_TOKEN, TREE_ATTENTION
from llava.errors import CheckpointError, ConfigError
from llava.model.builder import LoadedModel, build_model
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.save import save_model
from tests.support.tiny import LANGUAGE_MODELS, SPECIAL, byte_tokenizer, write_tiny_lm, write_tiny_tower

NUM_WORDS = 256 + len(SPECIAL)
"""Vocabulary of the tiny language model before anything is added."""


def parts(folder: Path, lm: str = "llama", **overrides: object) -> tuple[str, str]:
    return str(write_tiny_lm(folder / "lm", lm, **overrides)), str(write_tiny_tower(folder / "tower"))


def text_logits(loaded: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(input_ids=ids).logits


@pytest.mark.parametrize("lm", LANGUAGE_MODELS)
@pytest.mark.parametrize("tie", [False, True])
def test_text_logits_are_the_language_models_own(tmp_path: Path, lm: str, tie: bool) -> None:
    lm_path, tower_path = parts(tmp_path, lm, tie=tie)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(lm_path)(ids).logits
    loaded = build_model(lm_path, tower_path)
    torch.testing.assert_close(text_logits(loaded, ids)[..., :NUM_WORDS], expected, rtol=0, atol=1e-6)
    tables = (loaded.model.get_input_embeddings().weight, loaded.model.get_output_embeddings().weight)
    assert (tables[0] is tables[1]) == tie == loaded.model.config.tie_word_embeddings


def test_placeholder_is_one_row_the_mean_of_the_others(tmp_path: Path) -> None:
    lm_path, tower_path = parts(tmp_path)
    old = AutoModelForCausalLM.from_pretrained(lm_path)
    loaded = build_model(lm_path, tower_path)
    config = loaded.model.config
    assert loaded.processor.image_token_id == config.image_token_id == NUM_WORDS
    assert loaded.processor.tokenizer.convert_ids_to_tokens(NUM_WORDS) == IMAGE_TOKEN
    for new, before in (
        (loaded.model.get_input_embeddings(), old.get_input_embeddings()),
        (loaded.model.get_output_embeddings(), old.get_output_embeddings()),
    ):
        assert new.weight.shape[0] == NUM_WORDS + 1 == config.text_config.vocab_size
        assert torch.equal(new.weight[:NUM_WORDS], before.weight)
        torch.testing.assert_close(new.weight[NUM_WORDS], before.weight.mean(dim=0))


def test_tokens_are_added_in_the_original_order(tmp_path: Path) -> None:
    loaded = build_model(*parts(tmp_path), use_im_patch_token=True, use_im_start_end=True)
    vocabulary = loaded.processor.tokenizer.get_vocab()
    order = [vocabulary[token] for token in (IM_PATCH_TOKEN, IM_START_TOKEN, IM_END_TOKEN, IMAGE_TOKEN)]
    assert order == [NUM_WORDS, NUM_WORDS + 1, NUM_WORDS + 2, NUM_WORDS + 3]
    assert tuple(loaded.model.config.marker_token_ids) == loaded.processor.marker_ids == (order[1], order[2])


def test_a_larger_table_is_never_shrunk(tmp_path: Path) -> None:
    lm_path, tower_path = parts(tmp_path)
    old = AutoModelForCausalLM.from_pretrained(lm_path)
    old.resize_token_embeddings(NUM_WORDS + 27, mean_resizing=False)
    old.save_pretrained(lm_path)
    loaded = build_model(lm_path, tower_path)
    table = loaded.model.get_input_embeddings().weight
    assert table.shape[0] == NUM_WORDS + 27 == loaded.model.config.text_config.vocab_size
    torch.testing.assert_close(table[NUM_WORDS], table[:NUM_WORDS].mean(dim=0))
    assert torch.equal(table[NUM_WORDS + 1 :], old.get_input_embeddings().weight[NUM_WORDS + 1 :])


def test_a_known_placeholder_keeps_its_row(tmp_path: Path) -> None:
    lm_path, tower_path = parts(tmp_path)
    first = build_model(lm_path, tower_path)
    lm = AutoModelForCausalLM.from_pretrained(lm_path)
    lm.resize_token_embeddings(NUM_WORDS + 1, mean_resizing=False)
    lm.save_pretrained(lm_path)
    first.processor.tokenizer.save_pretrained(lm_path)
    again = build_model(lm_path, tower_path)
    assert torch.equal(again.model.get_input_embeddings().weight, lm.get_input_embeddings().weight)


def test_equal_seeds_build_equal_weights(tmp_path: Path) -> None:
    lm_path, _ = parts(tmp_path)
    tower_path = str(write_tiny_tower(tmp_path / "vit", "vit"))
    # A pooler that the checkpoint lacks is initialized randomly; it must not change the hash of the tower either.
    state = torch.get_rng_state()
    first, second, other = (build_model(lm_path, tower_path, seed=seed).model.state_dict() for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {name for name in first if not torch.equal(first[name], other[name])} == {
        "model.multi_modal_projector.weight"
    } | {name for name in first if "multi_modal_projector.bias" in name}


def test_what_every_loaded_model_has(tiny: LoadedModel) -> None:
    config = tiny.model.config
    assert config.image_seq_length == 4
    assert config.text_config._attn_implementation == TREE_ATTENTION
    assert tiny.model.model.vision_tower.config._attn_implementation == "sdpa"
    assert tiny.context_len == 2048
    assert tiny.model.generation_config.eos_token_id == tiny.processor.eos_token_id
    assert not any(tensor.is_meta for tensor in (*tiny.model.parameters(), *tiny.model.buffers()))
    config.text_config.use_cache = False
    assert tiny.model.model.language_model.config.use_cache is False


def test_dtype_auto_is_the_saved_one(tmp_path: Path) -> None:
    lm_path, tower_path = parts(tmp_path)
    AutoModelForCausalLM.from_pretrained(lm_path, dtype=torch.bfloat16).save_pretrained(lm_path)
    loaded = build_model(lm_path, tower_path, dtype="auto")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}


def test_a_head_with_bias_and_other_names(tmp_path: Path) -> None:
    """Phi has a bias in its head; GPT-2 has another name for its (tied) input table."""
    sizes = {"vocab_size": NUM_WORDS, "bos_token_id": 1, "eos_token_id": 2}
    phi = PhiForCausalLM(
        PhiConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **sizes)
    )
    torch.nn.init.normal_(phi.lm_head.bias)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, **sizes))
    tower = str(write_tiny_tower(tmp_path / "tower"))
    ids = torch.arange(5, 15)[None]
    for name, lm in (("phi", phi.eval()), ("gpt2", gpt2.eval())):
        lm.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
        loaded = build_model(str(tmp_path / name), tower)
        with torch.no_grad():
            expected = lm(ids).logits
        torch.testing.assert_close(text_logits(loaded, ids)[..., :NUM_WORDS], expected, rtol=0, atol=1e-6)
        save_model(loaded.model, loaded.processor, tmp_path / f"{name}-saved")
        again = load_checkpoint(tmp_path / f"{name}-saved")
        assert torch.equal(text_logits(again, ids), text_logits(loaded, ids))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projector_type": "resampler"}, "unknown projector type 'resampler'"),
        ({"select_feature": "cls"}, "unknown select_feature 'cls'; known: patch, cls_patch"),
        ({"template": "nonsense"}, "nonsense"),
        ({"vision_tower": ""}, "--vision-tower"),
    ],
)
def test_wrong_options_are_rejected_before_anything_is_read(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(**{"lm": "nowhere", "vision_tower": "nowhere", **options})


def test_parts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    lm_path, tower_path = parts(tmp_path)
    loaded = build_model(lm_path, tower_path)
    save_model(loaded.model, loaded.processor, tmp_path / "model")
    with pytest.raises(CheckpointError, match="already a vision-language model"):
        build_model(str(tmp_path / "model"), tower_path)
    with pytest.raises(CheckpointError, match="no such folder; expected a model folder or a hub name"):
        build_model(str(tmp_path / "nowhere"), tower_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"language model .*empty cannot be loaded"):
        build_model(str(tmp_path / "empty"), tower_path)
    wide = str(write_tiny_lm(tmp_path / "wide", hidden_size=64))
    with pytest.raises(ConfigError, match="needs equal widths, got tower 32 and language model 64"):
        build_model(wide, tower_path, projector_type="identity")


def test_a_head_that_changes_logits_is_rejected(tmp_path: Path) -> None:
    lm_path, tower_path = parts(tmp_path)
    config = AutoConfig.from_pretrained(lm_path)
    config.final_logit_softcapping = 30.0
    config.save_pretrained(lm_path)
    with pytest.raises(CheckpointError, match="final_logit_softcapping"):
        build_model(lm_path, tower_path)
