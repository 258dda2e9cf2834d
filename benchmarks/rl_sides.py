"""Steps of reinforcement learning of the sides of the benchmark: ours, and TRL's GRPOTrainer."""

from __future__ import annotations

import io
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from benchmarks.common import IMAGE_SIZE, library_model, our_model
from benchmarks.eval_throughput import make_processor
from llava.constants import IGNORE_INDEX
from llava.data.collator import Collator
from llava.data.encode import Encoded
from llava.data.flat_batch import Layout
from llava.generation.engine import LocalEngine
from llava.generation.protocol import Sampling, Script
from llava.imaging.decode import image_key
from llava.samples import Conversation, Turn
from llava.train.losses import group_advantages
from llava.train.objectives.policy import PolicyLoss, PolicyLossSpec

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
"""Chat template of the peer: the image, then the question."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of a step: prompts, dialogues of each, longest answer, and length of a question in tokens."""

    prompts: int
    group: int
    answer_tokens: int
    question_tokens: int

    def questions(self, turns: int) -> list[list[str]]:
        """Return the questions of each prompt; a letter is a token."""
        draw = random.Random(0)
        letters = "abcdefghij"
        return [
            ["".join(draw.choice(letters) for _ in range(self.question_tokens)) for _ in range(turns)]
            for _ in range(self.prompts)
        ]

    def images(self) -> list[Image.Image]:
        """Return a random image for each prompt."""
        found = []
        for seed in range(self.prompts):
            noise = torch.randint(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), generator=torch.Generator().manual_seed(seed))
            found.append(Image.fromarray(noise.to(torch.uint8).numpy()))
        return found


ROW_TOKENS = 4096
"""Longest row of our updates, in tokens; a row is a forward and a backward pass."""

FULL = Shape(prompts=4, group=8, answer_tokens=24, question_tokens=20)
QUICK = Shape(prompts=2, group=2, answer_tokens=3, question_tokens=4)


class RLSide(Protocol):
    """Side of the benchmark, with the seconds of the parts of its last step."""

    rollout_seconds: float
    update_seconds: float

    def step(self, num_prompts: int | None = None) -> None:
        """Sample, reward and update once, with all prompts or the first ones."""
        ...


def reward_of(token_ids: Sequence[int]) -> float:
    """Return the reward of an answer, which all sides share: the share of its even tokens."""
    return sum(token % 2 == 0 for token in token_ids) / max(1, len(token_ids))


def ours(shape: Shape, turns: int, *, layout: Layout = "tree") -> RLSide:
    """Return our side; the layout `flat` shares nothing."""
    return Ours(shape, turns, layout)


def trl(shape: Shape, turns: int, *, parts: int = 1) -> RLSide:
    """Return the side of TRL, which updates in `parts` forward passes."""
    return TRLSide(shape, turns, parts)


def _optimizer(model: Any) -> torch.optim.AdamW:
    model.model.vision_tower.requires_grad_(False)
    return torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=0.0, fused=True)


class Ours:
    """Engine and flat batch."""

    def __init__(self, shape: Shape, turns: int, layout: Layout) -> None:
        self.shape = shape
        self.model = our_model().train()
        self.optimizer = _optimizer(self.model)
        # One token a letter, as the peer; answers end by a token.
        self.processor = make_processor().changed(template="vicuna_v1")
        slots = shape.prompts * shape.group
        self.engine = LocalEngine(self.model, self.processor, max_slots=slots, layout=layout)
        self.objective = PolicyLoss(PolicyLossSpec(clip_high=0.28), without=self.processor.image_token_id)
        self.pixels: dict[str, Tensor] = {}
        self.scripts = []
        for image, questions in zip(shape.images(), shape.questions(turns), strict=True):
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            content = buffer.getvalue()
            key = image_key(content, self.processor.image_fingerprint)
            self.pixels[key] = self.processor.preprocess(self.processor.open(content))
            opening = Conversation((Turn("human", f"<image>\n{questions[0]}"),), system="")
            self.scripts.append(Script(opening, tuple(questions[1:]), (content,), seed=len(self.scripts)))
        dataset: Any = SimpleNamespace(images_for=lambda _: self.pixels)
        self.collator = Collator(dataset, self.processor.image_token_id, self.processor.pad_token_id, layout)
        self.rollout_seconds, self.update_seconds = 0.0, 0.0

    def step(self, num_prompts: int | None = None) -> None:
        """Sample, reward and update once, with all prompts or the first ones."""
        shape, start = self.shape, time.perf_counter()
        sampling = Sampling(max_new_tokens=shape.answer_tokens, temperature=1.0, n=shape.group, logprobs=True)
        groups = [
            [found.encoded for found in samples]
            for samples in self.engine.converse(self.scripts[:num_prompts], sampling)
        ]
        rewards = torch.tensor([[reward_of(_actions(encoded)) for encoded in group] for group in groups])
        advantages = group_advantages(rewards).tolist()
        units = [
            tuple(_with_advantage(encoded, value) for encoded, value in zip(group, row, strict=True))
            for group, row in zip(groups, advantages, strict=True)
        ]
        middle = time.perf_counter()
        rows = self.collator.rows(units, self.pixels, ROW_TOKENS)
        num_items = torch.stack([self.objective.count(row) for row in rows]).sum(0).float()
        for row in rows:
            self.objective(self.model, row, num_items=num_items).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.rollout_seconds, self.update_seconds = middle - start, time.perf_counter() - middle


def _actions(encoded: Encoded) -> list[int]:
    return [label for label in encoded.labels if label != IGNORE_INDEX]


def _with_advantage(encoded: Encoded, value: float) -> Encoded:
    return replace(encoded, columns={"advantage": (value,) * len(encoded.input_ids)})


class TRLSide:
    """`GRPOTrainer`: its own generation for one turn; for more, generation that reads the history again."""

    def __init__(self, shape: Shape, turns: int, parts: int) -> None:
        from datasets import Dataset
        from transformers import CLIPImageProcessorPil, LlavaProcessor
        from trl import GRPOConfig, GRPOTrainer

        self.shape, self.turns, self.parts = shape, turns, parts
        size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        processor = LlavaProcessor(
            image_processor=CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size),
            tokenizer=make_processor().tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=TEMPLATE,
        )
        self.questions = shape.questions(turns)
        content = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": own[0]}]}]
            for own in self.questions
        ]
        rows = [{"prompt": prompt, "image": image} for prompt, image in zip(content, shape.images(), strict=True)]
        samples = shape.prompts * shape.group
        args = GRPOConfig(
            output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            num_generations=shape.group, per_device_train_batch_size=samples, generation_batch_size=samples,
            max_completion_length=shape.answer_tokens, beta=0.0, loss_type="dapo", scale_rewards="group",
            learning_rate=0.0, epsilon_high=0.28, disable_dropout=True,
        )  # fmt: skip
        self.model = library_model(our_model())
        self.trainer: Any = GRPOTrainer(
            model=self.model,
            reward_funcs=lambda completion_ids, **_: [reward_of(ids) for ids in completion_ids],
            args=args,
            train_dataset=Dataset.from_list([{"prompt": "x"}] * samples),
            processing_class=processor,
        )
        self.trainer.current_gradient_accumulation_steps = 1
        self.processor = processor
        self.optimizer = _optimizer(self.model)
        self.batch = [row for row in rows for _ in range(shape.group)]
        self.rollout_seconds, self.update_seconds = 0.0, 0.0

    def step(self, num_prompts: int | None = None) -> None:
        """Sample, reward and update once, with all prompts or the first ones."""
        start = time.perf_counter()
        self.model.eval()
        inputs = self._one_turn(num_prompts) if self.turns == 1 else self._history_read_again(num_prompts)
        middle = time.perf_counter()
        self.model.train()
        for part in self._split(inputs):
            self.trainer._compute_loss(self.model, part).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.rollout_seconds, self.update_seconds = middle - start, time.perf_counter() - middle

    def _one_turn(self, num_prompts: int | None) -> dict[str, Any]:
        rows = self.batch if num_prompts is None else self.batch[: num_prompts * self.shape.group]
        found: dict[str, Any] = self.trainer._generate_and_score_completions(rows)
        return found

    def _history_read_again(self, num_prompts: int | None) -> dict[str, Any]:
        """Return inputs whose completions hold answers and later questions; `tool_mask` is 1 on answers."""
        shape, tokenizer = self.shape, self.processor.tokenizer
        texts = [f"<image>\n{questions[0]}" for questions in self.questions[:num_prompts] for _ in range(shape.group)]
        images = [image for image in shape.images()[:num_prompts] for _ in range(shape.group)]
        read = self.processor(images=images, text=texts, return_tensors="pt", padding=True, padding_side="left")
        prompts = [
            row[mask.bool()].tolist() for row, mask in zip(read["input_ids"], read["attention_mask"], strict=True)
        ]
        histories = [list(ids) for ids in prompts]
        masks: list[list[int]] = [[] for _ in histories]
        for turn in range(self.turns):
            ids, mask = _left_padded(histories, tokenizer.pad_token_id)
            with torch.no_grad():
                output = self.model.generate(
                    input_ids=ids, attention_mask=mask, pixel_values=read["pixel_values"], do_sample=True,
                    max_new_tokens=shape.answer_tokens, pad_token_id=tokenizer.pad_token_id, top_k=0,
                    suppress_tokens=[self.model.config.image_token_id],
                )  # fmt: skip
            for index, row in enumerate(output[:, ids.shape[1] :].tolist()):
                answer = row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row
                own = self.questions[index // shape.group]
                after = tokenizer(own[turn + 1], add_special_tokens=False).input_ids if turn + 1 < len(own) else []
                histories[index] += answer + after
                masks[index] += [1] * len(answer) + [0] * len(after)
        return self._inputs(prompts, histories, masks, read["pixel_values"])

    def _inputs(
        self, prompts: list[list[int]], histories: list[list[int]], masks: list[list[int]], pixels: Tensor
    ) -> dict[str, Any]:
        completions = [history[len(prompt) :] for prompt, history in zip(prompts, histories, strict=True)]
        prompt_ids, prompt_mask = _left_padded(prompts, 0)
        longest = max(map(len, completions))

        def padded(rows: list[list[int]]) -> Tensor:
            return torch.tensor([row + [0] * (longest - len(row)) for row in rows])

        answers = [
            [t for t, m in zip(ids, mask, strict=True) if m] for ids, mask in zip(completions, masks, strict=True)
        ]
        rewards = torch.tensor([reward_of(ids) for ids in answers]).view(-1, self.shape.group)
        return {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": padded(completions),
            "completion_mask": padded([[1] * len(ids) for ids in completions]),
            "tool_mask": padded(masks),
            "advantages": group_advantages(rewards).flatten(),
            "num_items_in_batch": torch.tensor(float(sum(map(sum, masks)))),
            "pixel_values": pixels,
            "num_images": [1] * len(completions),
        }

    def _split(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the inputs in parts of the samples."""
        samples = len(inputs["completion_ids"])
        size = -(-samples // self.parts)
        return [
            {name: _slice(value, first, size, samples) for name, value in inputs.items()}
            for first in range(0, samples, size)
        ]


def _slice(value: Any, first: int, size: int, samples: int) -> Any:
    """Return the part of a value that has an entry for each sample; others are returned as they are."""
    has_entries = isinstance(value, list) or (torch.is_tensor(value) and value.dim() > 0)
    return value[first : first + size] if has_entries and len(value) == samples else value


def _left_padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


SIDES: dict[str, Callable[[Shape, int], RLSide]] = {
    "ours": ours,
    "sharing off": partial(ours, layout="flat"),
    "trl": trl,
    "trl, a quarter at a time": partial(trl, parts=4),
}
