"""Training with sharded weights (fully_shard, DeepSpeed ZeRO-2 and ZeRO-3) equals unsharded training."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.data.collator import Collator, matched_rows
from llava.data.dataset import SFTDataset
from llava.data.records import load_samples
from llava.data.samplers import SequentialSampler
from llava.model.builder import build_model
from llava.model.checkpoint.load import load_checkpoint
from llava.model.checkpoint.save import save_model
from llava.model.lora import freeze_for
from llava.train.objectives.sft import SFT
from tests.support.fast_python import without_build
from tests.support.pairs import pair_arguments, write_pairs
from tests.support.ranks import run_ranks
from tests.support.runs import arguments, kept_trainer, losses, saved, train

ROOT = Path(__file__).resolve().parents[2]
COMPILE_SECONDS = 900.0
"""Seconds; DeepSpeed compiles its transport for about two minutes on an idle CPU."""


def options(parts: Path, **changed: object) -> dict[str, Any]:
    data = {"data_path": parts / "uneven.json", "image_folder": parts / "images"}
    return {**data, "per_device_train_batch_size": 2, "num_train_epochs": 2, **changed}


@pytest.fixture(scope="module")
def plain(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on two ranks without sharding."""
    folder = tmp_path_factory.mktemp("plain")
    run_ranks(2, train, arguments(parts, folder, **options(parts)))
    return folder


def extensions_folder() -> Path:
    """Return where DeepSpeed keeps what it compiles: in this checkout; another one's needs other files."""
    folder = ROOT / "build" / "torch_extensions"
    for lock in folder.rglob("lock"):  # left by a run that was killed; it would be waited for without end
        lock.unlink()
    return folder


def train_zero(argv: list[str], compiled: Path | None) -> tuple[str, int, str]:
    """Job: a training run; returns what wrapped the model, the stage, and the optimizer.

    DeepSpeed compiles its transport into the folder `compiled`; without one it uses gloo.
    """
    if compiled is None:
        without_build()
    else:
        os.environ["TORCH_EXTENSIONS_DIR"] = str(compiled)
    engine = kept_trainer(partial(train, argv)).model_wrapped
    return (
        f"{type(engine).__module__}.{type(engine).__name__}",
        engine.zero_optimization_stage(),
        str(type(engine.optimizer)),
    )


@pytest.mark.parametrize(
    ("stage", "builds"), [(2, False), (3, False), pytest.param(2, True, marks=pytest.mark.extended)]
)
def test_zero_equals_plain(parts: Path, plain: Path, tmp_path: Path, stage: int, builds: bool) -> None:
    config = ROOT / "scripts" / f"zero{stage}.json"
    argv = arguments(parts, tmp_path, **options(parts, deepspeed=config, max_tokens_per_row=60))
    found = run_ranks(2, train_zero, argv, extensions_folder() if builds else None, timeout=COMPILE_SECONDS)
    assert all(name == "deepspeed.runtime.engine.DeepSpeedEngine" and at == stage for name, at, _ in found), found
    assert losses(tmp_path) == pytest.approx(losses(plain), rel=1e-4)
    first, second = saved(plain), saved(tmp_path)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=3e-4, rtol=1e-3, msg=name)
    load_checkpoint(tmp_path)


def test_zero_3_ends_with_whole_weights_where_checkpoints_hold_shards_only(
    parts: Path, plain: Path, tmp_path: Path
) -> None:
    """`stage3_gather_16bit_weights_on_model_save`, which is off by default, decides about checkpoints only."""
    config = json.loads((ROOT / "scripts" / "zero3.json").read_text())
    del config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    given = {"deepspeed": tmp_path / "zero3.json", "save_strategy": "steps", "save_steps": 3}
    folder = tmp_path / "run"
    run_ranks(2, train_zero, arguments(parts, folder, **options(parts, **given)), None)
    first, second = saved(plain), saved(folder)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=3e-4, rtol=1e-3, msg=name)
    load_checkpoint(folder)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(("global_step", "latest", "zero_to"))]
    held = sorted(path.name for path in (folder / "checkpoint-3").iterdir())
    assert "global_step3" in held and "model.safetensors" not in held


@pytest.mark.parametrize(
    "mode",
    ["cached", pytest.param("copy", marks=pytest.mark.extended), pytest.param("none", marks=pytest.mark.extended)],
)
def test_pairs_under_zero_3_equal_one_process(parts: Path, tmp_path: Path, mode: str) -> None:
    """The reference is computed, or copied, before the weights are sharded; it is no shard of the policy."""
    write_pairs(parts / "pairs")
    adapters = {"lora_enable": True, "lora_r": 4, "vit_lora_enable": True, "lora_r_vit": 2, "lora_dropout_vit": 0}
    given = {**adapters, "ref_mode": mode, "max_steps": 3, "pref_loss": "simpo" if mode == "none" else "sigmoid"}
    train(pair_arguments(parts, tmp_path / "one", **given, per_device_train_batch_size=4))
    config = ROOT / "scripts" / "zero3.json"
    argv = pair_arguments(parts, tmp_path / "two", **given, per_device_train_batch_size=2, deepspeed=config)
    found = run_ranks(2, train_zero, argv, None)
    assert [stage for _, stage, _ in found] == [3, 3]
    names = ["loss", "rewards/margins", "logps/chosen"]
    for name in names:
        one, two = (losses(tmp_path / which, name) for which in ("one", "two"))
        assert len(one) == 3 and two == pytest.approx(one, rel=1e-3, abs=1e-4), name
    first, second = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert first.keys() == second.keys()
    for name, tensor in first.items():  # Adam divides even the smallest gradient by its size
        torch.testing.assert_close(tensor, second[name], atol=5e-4, rtol=1e-3, msg=name)


def train_by_hand(parts: Path, folder: Path, sharded: bool) -> list[float]:
    """Job: three steps with SFT over rows of both kinds, in DDP or with every layer under torch's `fully_shard`."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    loaded = build_model(str(parts / "lm"), str(parts / "tower"))
    freeze_for(loaded.model)
    model: Any = loaded.model
    network: Any = model
    if sharded:
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.language_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        network = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    samples = load_samples(parts / "uneven.json")
    dataset = SFTDataset(samples, loaded.processor, image_folder=parts / "images", max_length=2048)
    collator = Collator(dataset, loaded.processor.image_token_id, loaded.processor.pad_token_id)
    found = []
    for numbers in SequentialSampler(len(dataset), 2, rank=dist.get_rank(), world_size=2):
        step = collator([(number, dataset[number]) for number in numbers])
        (row,) = matched_rows(step.rows, collator, device=torch.device("cpu"), with_images=True)
        num_items = torch.tensor(step.num_supervised)
        dist.all_reduce(num_items)
        loss = SFT()(network, row, num_items=num_items).loss * 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach())
        found.append(float(loss) / 2)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        save_model(model, loaded.processor, folder, state=state)
    dist.barrier()
    return found


def test_fully_shard_equals_ddp(parts: Path, tmp_path: Path) -> None:
    plain, other = run_ranks(2, train_by_hand, parts, tmp_path / "ddp", False)
    assert plain == other and len(plain) == 3
    sharded, _ = run_ranks(2, train_by_hand, parts, tmp_path / "sharded", True)
    assert sharded == pytest.approx(plain, rel=1e-5)
    first, second = saved(tmp_path / "ddp"), saved(tmp_path / "sharded")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=1e-4, rtol=1e-3, msg=name)
    load_checkpoint(tmp_path / "sharded")
