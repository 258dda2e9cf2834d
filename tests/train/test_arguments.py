"""Options: published ones exist, old names keep their meaning, contradictions are errors."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser, TrainingArguments

from llava.errors import ConfigError
from llava.train import parsing
from llava.train.args import DataArguments, LlavaTrainingArguments, ModelArguments
from llava.train.callbacks import row_ids_file
from llava.train.command import checked_words
from llava.train.preference_args import PreferenceArguments
from llava.utils.cli import flag

OUR_OPTIONS = """
bits cache_dir calibrate_mm_projector compat data_path dicom_frame dicom_window double_quant dry_run
early_stopping_patience eval_answers fast_jpeg
eval_data_path eval_image_folder evaluation_strategy feature_cache_dir feature_cache_gb force_fsdp freeze_backbone
freeze_mm_mlp_adapter fsdp_transformer_layer_cls_to_wrap group_by_length group_by_modality_length image_aspect_ratio
image_counts_as_one image_folder image_grid_pinpoints image_grouping image_size is_multimodal lazy_preprocess
loader log_lines log_row_ids lora_target_modules use_rslora use_dora init_lora_weights modules_to_save lora_alpha
lora_bias lora_dropout lora_dropout_vit
lora_enable lora_r lora_weight_path loss_normalization max_tokens_per_row mm_cluster_iters
mm_cluster_num_centers mm_patch_merge_type mm_projector_lr mm_projector_type mm_use_im_patch_token mm_use_im_start_end
mm_vision_select_feature mm_vision_select_layer mm_vision_tower_lr model_max_length model_name_or_path mpt_attn_impl
overwrite_output_dir prefix_sharing pretrain_mm_mlp_adapter quant_type questions_per_image save_on_signal skip_bad
system_file
train_empty_answers trust_checkpoint tune_mm_mlp_adapter unfreeze_mm_vision_tower version vision_tower
vision_tower_checkpoint vision_tower_config vision_tower_lr warmup_ratio
anchor_delta attn_implementation beta data_aug disable_dropout eval_vqa_path
image_negative kto_weights label_smoothing lora_alpha_vit lora_r_vit loss_alpha num_latents objective
orpo_lambda pref_loss pref_loss_weights pretrain_lora qav_loss ref_logprobs ref_mode simpo_gamma sq_r vit_lora_enable
image_to_caption_file plugin reward_centering
"""
"""Every option of this package; removing a name from this list breaks existing command lines."""

PUBLISHED = """
--model_name_or_path --version --freeze_backbone --tune_mm_mlp_adapter --vision_tower --mm_vision_select_layer
--pretrain_mm_mlp_adapter --mm_use_im_start_end --mm_projector_type --mm_use_im_patch_token --mm_patch_merge_type
--mm_vision_select_feature --data_path --lazy_preprocess --is_multimodal --image_folder --image_aspect_ratio
--cache_dir --optim --remove_unused_columns --freeze_mm_mlp_adapter --force_fsdp --model_max_length --mpt_attn_impl
--double_quant --quant_type --bits --lora_enable --lora_r --lora_alpha --lora_dropout --lora_weight_path --lora_bias
--mm_projector_lr --group_by_modality_length --bf16 --fp16 --tf32 --output_dir --num_train_epochs
--per_device_train_batch_size --per_device_eval_batch_size --gradient_accumulation_steps --evaluation_strategy
--save_strategy --save_steps --save_total_limit --learning_rate --weight_decay --warmup_ratio --lr_scheduler_type
--logging_steps --fsdp --fsdp_transformer_layer_cls_to_wrap --gradient_checkpointing --dataloader_num_workers
--report_to --deepspeed --local_rank --overwrite_output_dir --seed --max_steps --run_name --vision_tower_lr --data_aug
--vit_lora_enable --lora_r_vit --lora_alpha_vit --num_latents --pretrain_lora --sq_r --qav_loss --loss_alpha
"""
"""Options of the training commands that the original trainers print or describe."""


def options() -> set[str]:
    parser = HfArgumentParser([ModelArguments, DataArguments, LlavaTrainingArguments])
    return {option for action in parser._actions for option in action.option_strings}


def parse(tmp_path: Path, *words: str) -> Any:
    needed = ["--model_name_or_path", "lm", "--vision_tower", "tower", "--data_path", "rows.json"]
    return parsing.parse_training_args([*needed, "--output_dir", str(tmp_path), *words])


def test_own_options() -> None:
    library = {field.name for field in fields(TrainingArguments)}
    parts = (ModelArguments, DataArguments, LlavaTrainingArguments, PreferenceArguments)
    ours = {f.name for part in parts for f in fields(part) if f.init}
    missing = set(OUR_OPTIONS.split()) - ours
    assert not missing
    assert not ours - library - set(OUR_OPTIONS.split())


def test_published_options() -> None:
    assert not set(PUBLISHED.split()) - options() - {"--local_rank", "--local-rank"}
    assert all(help_of(part) for part in (ModelArguments, DataArguments, PreferenceArguments))


def help_of(part: Any) -> bool:
    return all(field.metadata.get("help") for field in fields(part))


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--mm_use_im_start_end"], "mm_use_im_start_end", True),
        (["--mm_use_im_start_end", "False"], "mm_use_im_start_end", False),
        (["--mm-vision-select-layer", "-2"], "mm_vision_select_layer", -2),
        (["--lora-dropout=0.1"], "lora_dropout", 0.1),
        (["--version", "v1"], "version", "v1"),
    ],
)
def test_spellings(tmp_path: Path, words: list[str], name: str, value: object) -> None:
    assert getattr(parse(tmp_path, *words)[0], name) == value


def test_old_names(tmp_path: Path) -> None:
    words = ["--evaluation_strategy", "steps", "--eval_data_path", "x", "--warmup_ratio", "0.03"]
    training = parse(tmp_path, *words, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "8")[2]
    assert training.eval_strategy == "steps" and training.warmup_steps == 0.03
    assert training.sequences_per_step == training.global_batch == 16
    assert training.gradient_accumulation_steps == 1 and training.requested_accumulation == 8
    assert training.use_cpu and training.output_dir == str(tmp_path)


def test_flags_that_need_other_machines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ["--bf16", "True", "--tf32", "True", "--fsdp", "full_shard auto_wrap", "--lazy_preprocess", "True"]
    words += ["--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer", "--is_multimodal", "--report_to", "nosuch"]
    with caplog.at_level(logging.WARNING):
        training = parse(tmp_path, *words)[2]
    assert training.bf16 and not training.tf32 and not training.fsdp and training.report_to == []
    lines = [record.message for record in caplog.records]
    assert sum("DDP" in line for line in lines) == 1
    assert sum("--lazy-preprocess, --is-multimodal" in line for line in lines) == 1
    assert sum("metrics are in metrics.jsonl" in line for line in lines) == 1


def test_flags_of_the_library_that_do_nothing_are_named_in_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["--auto_find_batch_size", "True", "--dataloader_pin_memory", "False", "--lazy_preprocess", "True"]
    with caplog.at_level(logging.WARNING):
        parse(tmp_path, *words)
    (line,) = [record.message for record in caplog.records if "without effect" in record.message]
    for name in ("auto-find-batch-size", "pin-memory", "lazy-preprocess"):
        assert name in line
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        parse(tmp_path, "--include_num_input_tokens_seen", "no", "--dataloader_drop_last", "False")
    assert not [record for record in caplog.records if "without effect" in record.message]


def test_help_names_the_file_of_row_ids() -> None:
    (log_row_ids,) = [part for part in fields(LlavaTrainingArguments) if part.name == "log_row_ids"]
    assert row_ids_file(Path(), 0).name in log_row_ids.metadata["help"]


def test_wandb_without_login_is_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    training = parse(tmp_path, "--report_to", "wandb")[2]
    assert training.report_to == ["wandb"] and os.environ["WANDB_MODE"] == "offline"
    (line,) = [record.message for record in caplog.records if "wandb" in record.message]
    assert "WANDB_API_KEY is not set" in line and "wandb sync" in line and "\n" not in line
    caplog.clear()
    monkeypatch.setenv("WANDB_MODE", "online")
    parse(tmp_path, "--report_to", "wandb")
    assert os.environ["WANDB_MODE"] == "online" and not caplog.records


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--evaluation_strategy", "steps", "--eval_strategy", "epoch"], "differ"),
        (["--warmup_ratio", "0.1", "--warmup_steps", "10"], "set one of them"),
        (["--tune_mm_mlp_adapter", "--freeze_mm_mlp_adapter"], "contradict"),
        (["--tune_mm_mlp_adapter", "--lora_enable"], "stage 2"),
        (["--bits", "4"], "--lora-enable"),
        (["--prefix_sharing", "maybe"], "expected on or off"),
        (["--image_grouping", "maybe"], "expected on, off or auto"),
        (["--eval_strategy", "epoch"], "--eval-data-path"),
        (["--early_stopping_patience", "2"], "--eval-data-path"),
        (["--label_smoothing_factor", "0.3"], "label-smoothing-factor 0.3 is not supported"),
        (["--data_seed", "0"], "--data-seed 0 is not supported; .*--seed"),
        (["--dataloader_drop_last", "True"], "--dataloader-drop-last True is not supported"),
        (["--include_num_input_tokens_seen", "True"], "--include-num-input-tokens-seen True is not supported"),
        (["--max_tokens_per_row", "0"], "--max-tokens-per-row is 0; expected a number from 1 to 2147483647"),
        (["--system_file", "nope"], "--system-file nope: no such file"),
        (["--system_file", "."], "--system-file .: no such file"),
        (["--deepspeed", "nope.json"], "--deepspeed nope.json: no such file"),
        (["--deepspeed", "{bad"], r"--deepspeed {bad: not JSON \(.*; expected a JSON object"),
        (["--lr_scheduler_kwargs", "{bad"], "--lr-scheduler-kwargs {bad: not JSON"),
        (["--neftune_noise_alpha", "5"], "--neftune-noise-alpha 5.0 is not supported; omit it"),
        (["--use_liger_kernel", "True"], "--use-liger-kernel True is not supported; omit it"),
        (["--logging_steps", "0"], "--logging-steps is 0.0; expected a number above 0 to"),
        (["--bf16", "--fp16"], "At most one of fp16 and bf16"),
        (["--save_strategy", "best"], "--save-strategy best is not supported; expected no, steps or epoch"),
        (["--early_stopping_patience", "2", "--eval_data_path", "x", "--save_strategy", "no"], "both epoch"),
    ],
)
def test_contradictions(tmp_path: Path, words: list[str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse(tmp_path, *words)


@pytest.mark.parametrize(("content", "match"), [("{bad", "not JSON "), ("", "not JSON "), ("[]", "got list")])
@pytest.mark.parametrize("name", ["deepspeed", "fsdp_config"])
def test_broken_configuration_files_are_named(tmp_path: Path, name: str, content: str, match: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=rf"^{flag(name)} {file}: .*{match}") as caught:
        parse(tmp_path, f"--{name}", str(file))
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--model-name-or-path"):
        parsing.parse_training_args(["--data_path", "x", "--output_dir", str(tmp_path)])
    with pytest.raises(ConfigError, match="--data-path"):
        parsing.parse_training_args(["--model_name_or_path", "x", "--output_dir", str(tmp_path)])


def test_held_out_rows_are_used_every_epoch_by_default(tmp_path: Path) -> None:
    training = parse(tmp_path, "--eval_data_path", "held_out.json", "--save_strategy", "epoch")[2]
    assert training.eval_strategy == "epoch" and training.load_best_model_at_end
    assert training.metric_for_best_model == "eval_loss" and training.greater_is_better is False
    silent = parse(tmp_path, "--eval_data_path", "held_out.json", "--evaluation_strategy", "no")[2]
    assert silent.eval_strategy == "no"


def test_unknown_options_end_the_program(tmp_path: Path) -> None:
    with pytest.raises((SystemExit, ValueError)):
        parse(tmp_path, "--no_such_option", "1")


def test_compatibility_names_are_options(tmp_path: Path) -> None:
    _, data, training, *_ = parse(tmp_path)
    assert (training.loss_normalization, data.image_counts_as_one) == ("tokens", False)
    _, data, training, *_ = parse(tmp_path, "--compat", "micro_batch_loss")
    assert (training.loss_normalization, data.image_counts_as_one) == ("micro_batches", False)
    _, data, training, *_ = parse(tmp_path, "--compat", "all")
    assert (training.loss_normalization, data.image_counts_as_one) == ("micro_batches", True)
    for wrong in ("nonsense", "cut_prompt"):
        with pytest.raises(ConfigError, match=wrong):
            parse(tmp_path, "--compat", wrong)


def test_a_changed_copy_leaves_the_arguments_as_they_are(tmp_path: Path) -> None:
    parsed = parse(tmp_path, "--gradient_accumulation_steps", "4")
    copied = parsed.training.changed(max_steps=7)
    assert (copied.max_steps, parsed.training.max_steps) == (7, -1)
    assert copied.sequences_per_step == parsed.training.sequences_per_step


@pytest.mark.parametrize("group", ["model", "data"])
def test_model_and_data_arguments_are_frozen(tmp_path: Path, group: str) -> None:
    arguments = getattr(parse(tmp_path), group)
    with pytest.raises(FrozenInstanceError):
        setattr(arguments, fields(arguments)[0].name, "x")


def test_grouping_by_length_has_two_names(tmp_path: Path) -> None:
    specs = [
        parse(tmp_path, *words).training.order_spec("auto")
        for words in (["--train_sampling_strategy", "group_by_length"], ["--group_by_length", "True"], [])
    ]
    assert [spec.by_length for spec in specs] == [True, True, False]


def test_held_out_rows_use_the_training_folder_by_default(tmp_path: Path) -> None:
    words = ("--image_folder", "images", "--eval_data_path", "held_out.json", "--skip_bad", "True")
    rows = parse(tmp_path, *words).held_out_rows()
    assert rows is not None
    assert (rows.image_folder, rows.explicit_folder) == ("images", None)
    assert rows.quarantine == tmp_path / "quarantine-eval.jsonl"
    assert parse(tmp_path).held_out_rows() is None


@pytest.mark.parametrize(
    "words",
    [
        ["--report_to", "tensorboard", "wandb", "trackio"],
        ["--report-to", "tensorboard,wandb,trackio"],
        ["--report_to=tensorboard", "--report_to", "wandb", "--report_to=trackio"],
        ["--report_to", "['tensorboard', 'wandb', 'trackio']"],
        ["--report_to", "tensorboard", "none", "wandb", "wandb", "trackio"],
    ],
)
def test_several_reports_in_every_form(tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert parse(tmp_path, *words)[2].report_to == ["tensorboard", "wandb", "trackio"]


def test_several_reports_of_a_configuration_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    turns = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": turns}]))
    values = {"model_name_or_path": str(tmp_path / "lm"), "vision_tower": str(tmp_path / "lm"), "output_dir": "out",
              "data_path": str(tmp_path / "rows.json"), "report_to": ["tensorboard", "trackio"]}  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    words, _ = checked_words([str(tmp_path / "run.yaml")])
    assert parsing.parse_training_args(words)[2].report_to == ["tensorboard", "trackio"]


def test_deepspeed_without_a_launcher_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "zero2.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"--deepspeed needs a launcher; add --nproc N") as caught:
        parse(tmp_path, "--deepspeed", str(tmp_path / "zero2.json"))
    assert "\n" not in str(caught.value)
