"""Tiny checkpoints in the published formats, with weight names written out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from tests.support.tiny import write_tiny_lm, write_tiny_tower

HIDDEN, VISION = 32, 32
OPTIONAL_KEYS: dict[str, Any] = {
    "freeze_mm_mlp_adapter": False,
    "tune_mm_mlp_adapter": False,
    "mm_projector_lr": None,
    "mm_vision_tower_lr": 2e-6,
    "unfreeze_mm_vision_tower": True,
    "mm_resampler_type": None,
    "tokenizer_padding_side": "right",
    "tokenizer_model_max_length": 512,
    "max_sequence_length": 1024,
    "image_grid_pinpoints": None,
    "a_key_of_tomorrow": [1, {"x": 2}],
}

PROJECTORS: dict[str, dict[str, tuple[int, ...]]] = {
    "linear": {"weight": (HIDDEN, VISION), "bias": (HIDDEN,)},
    "mlp2x_gelu": {
        "0.weight": (HIDDEN, VISION),
        "0.bias": (HIDDEN,),
        "2.weight": (HIDDEN, HIDDEN),
        "2.bias": (HIDDEN,),
    },
    "mlp3x_gelu": {
        **{"0.weight": (HIDDEN, VISION), "0.bias": (HIDDEN,), "2.weight": (HIDDEN, HIDDEN), "2.bias": (HIDDEN,)},
        **{"4.weight": (HIDDEN, HIDDEN), "4.bias": (HIDDEN,)},
    },
    "cluster": {
        **{"sim_alpha": (1, 1, 1), "sim_beta": (1, 1, 1)},
        **{f"{layer}.weight": (VISION, VISION) for layer in "cvf"},
        **{f"{layer}.bias": (VISION,) for layer in "cvf"},
        **{"ln_1.weight": (VISION,), "ln_1.bias": (VISION,)},
        **{"mlp.0.weight": (HIDDEN, VISION), "mlp.0.bias": (HIDDEN,)},
        **{"mlp.2.weight": (HIDDEN, HIDDEN), "mlp.2.bias": (HIDDEN,)},
    },
}


def random_tensor(shape: tuple[int, ...], seed: int) -> Tensor:
    return 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def projector_weights(kind: str, prefix: str = "model.mm_projector.") -> dict[str, Tensor]:
    return {prefix + name: random_tensor(shape, 7 + i) for i, (name, shape) in enumerate(PROJECTORS[kind].items())}


def tower_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of the tower by their names in a legacy checkpoint."""
    state = load_file(folder / "model.safetensors")
    plain = {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}
    return {f"model.vision_tower.vision_tower.vision_model.{name}": tensor for name, tensor in plain.items()}


def write_weights(folder: Path, state: dict[str, Tensor], *, safe: bool, num_shards: int) -> None:
    """Write weights to one file, or to shards with an index."""
    stem, suffix = ("model", ".safetensors") if safe else ("pytorch_model", ".bin")
    names = sorted(state)
    places = {}
    for shard in range(num_shards):
        total = f"-{shard + 1:05d}-of-{num_shards:05d}" if num_shards > 1 else ""
        part = {name: state[name].contiguous() for name in names[shard::num_shards]}
        file = folder / f"{stem}{total}{suffix}"
        save_file(part, file, metadata={"format": "pt"}) if safe else torch.save(part, file)
        places.update(dict.fromkeys(part, file.name))
    if num_shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


def buffers(rope_theta: float, *, tower_inside: bool) -> dict[str, torch.Tensor]:
    """Return the buffers that old files hold in addition to weights."""
    frequencies = 1.0 / (rope_theta ** (torch.arange(0, 8, 2).float() / 8))
    state = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": frequencies.clone() for layer in range(2)}
    if tower_inside:
        state["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    return state


def write_legacy(
    root: Path,
    *,
    lm: str = "llama",
    style: str = "placeholder",
    projector: str = "mlp2x_gelu",
    tower_inside: bool = True,
    old_buffers: bool = False,
    safe: bool = True,
    num_shards: int = 1,
    model_type: str | None = None,
    name: str = "checkpoint",
    **config_changes: Any,
) -> Path:
    """Write `root/lm`, `root/tower` and a legacy checkpoint `root/NAME` of both; return the last."""
    lm_folder = root / "lm" if (root / "lm").is_dir() else write_tiny_lm(root / "lm", lm)
    tower = root / "tower" if (root / "tower").is_dir() else write_tiny_tower(root / "tower")
    state = load_file(lm_folder / "model.safetensors")
    config = json.loads((lm_folder / "config.json").read_text())
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters["rope_theta"]
    tokenizer = AutoTokenizer.from_pretrained(lm_folder)
    if style == "patch_token":
        tokenizer.add_tokens(["<im_patch>", "<im_start>", "<im_end>"], special_tokens=True)
        for table in ("model.embed_tokens.weight", "lm_head.weight"):
            state[table] = torch.cat([state[table], random_tensor((3, HIDDEN), len(table))])
        config |= {"mm_use_im_start_end": True, "mm_vision_select_layer": -2}
    else:
        config |= {"mm_projector_type": projector, "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2}
        config |= {"mm_use_im_start_end": False, "mm_use_im_patch_token": False, "image_aspect_ratio": "pad"}
    state |= projector_weights(projector)
    if config_changes.get("mm_patch_merge_type") == "spatial_unpad":
        state["model.image_newline"] = random_tensor((HIDDEN,), 5)
    if tower_inside:
        state |= tower_weights(tower)
    if old_buffers:
        state |= buffers(parameters["rope_theta"], tower_inside=tower_inside)
    types = {"llama": "llava", "mistral": "llava_mistral"}
    config |= {"model_type": model_type or types[lm], "use_mm_proj": True, "mm_hidden_size": VISION}
    config |= {"architectures": [f"Llava{lm.title()}ForCausalLM"], "mm_vision_tower": str(tower)}
    config |= {"vocab_size": len(state["model.embed_tokens.weight"]), **config_changes}
    folder = root / name
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(folder, state, safe=safe, num_shards=num_shards)
    return folder


def write_projector_only(root: Path, *, prefix: str = "model.mm_projector.", **options: Any) -> Path:
    """Write a folder with `mm_projector.bin` and config.json only, as stage 1 does."""
    whole = write_legacy(root, tower_inside=False, name="whole", tune_mm_mlp_adapter=True, **options)
    folder = root / "stage1"
    folder.mkdir()
    (whole / "config.json").rename(folder / "config.json")
    torch.save(projector_weights(options.get("projector", "mlp2x_gelu"), prefix), folder / "mm_projector.bin")
    return folder


def write_lora(root: Path, *, tower_adapter: bool = False, safe: bool = True) -> Path:
    """Write a LoRA folder, on request with an adapter of the tower inside."""
    folder = write_projector_only(root).rename(root / "lora")
    (folder / "mm_projector.bin").unlink()
    torch.save(
        projector_weights("mlp2x_gelu", "base_model.model.model.mm_projector."), folder / "non_lora_trainables.bin"
    )
    state = {}
    for layer in range(2):
        for number, module in enumerate(("self_attn.q_proj", "mlp.down_proj")):
            place = f"base_model.model.model.layers.{layer}.{module}"
            width = 64 if module.startswith("mlp") else HIDDEN
            state[f"{place}.lora_A.weight"] = random_tensor((4, width), layer + number)
            state[f"{place}.lora_B.weight"] = random_tensor((HIDDEN, 4), 9 + layer + number)
    write_adapter(folder, state, ["q_proj", "down_proj"], r=4, alpha=8, safe=safe, task="CAUSAL_LM")
    if tower_adapter:
        place = "base_model.model.vision_tower.vision_model.encoder.layers.0.mlp.fc1"
        shapes = {"lora_A": (2, VISION), "lora_B": (64, 2)}
        tower = {f"{place}.{part}.weight": random_tensor(shape, 3) for part, shape in shapes.items()}
        write_adapter(folder / "any-name", tower, ["fc1"], r=2, alpha=6, safe=False, task=None)
    return folder


def write_adapter(
    folder: Path, state: dict[str, Tensor], targets: list[str], *, r: int, alpha: int, safe: bool, task: str | None
) -> None:
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "lora_dropout": 0.05, "bias": "none"}
    config |= {"target_modules": targets, "task_type": task, "base_model_name_or_path": None, "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if safe:
        save_file(state, folder / "adapter_model.safetensors")
    else:
        torch.save(state, folder / "adapter_model.bin")
