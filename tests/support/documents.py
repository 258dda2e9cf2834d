"""Code blocks of documents: reading them, and running them in a folder with tiny parts and made-up data."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava import cli
from llava.chat_families import FAMILIES
from llava.train import command as train_command
from tests.support.dicom_files import make
from tests.support.tiny import byte_tokenizer, tiny_image, write_tiny_lm, write_tiny_tower

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SAVED = re.compile(r"Save this as\s+`([\w./]+)`:\s*$")

ELSEWHERE = {
    "bash scripts/quickstart.sh": "tests/quickstart/test_stages.py",
    "bash scripts/test.sh": "scripts/test.sh",
    "source .venv/bin/activate": "scripts/setup.sh",
    "bash scripts/llava_med/instruct.sh": "tests/commands/test_llava_med_scripts.py",
}
"""Lines that other tests run, and where."""

LANGUAGE_MODELS = (
    ("smollm2-135m", "llama", "smollm2"),
    ("LM", "llama", "smollm2"),
    ("HuggingFaceTB/SmolLM2-135M-Instruct", "llama", "smollm2"),
    ("Qwen/Qwen2.5-0.5B-Instruct", "qwen2", "qwen2.5"),
)
"""Names of language models in documents, their architecture, and their chat template."""

MODALITIES = ("CT", "MR", "CR", "US")


@dataclass(frozen=True)
class Block:
    """Code block: its language, its text, and the file that the sentence before it names."""

    language: str
    text: str
    file: str | None


def blocks(path: Path) -> list[Block]:
    """Return the code blocks of a document in order."""
    text = path.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        named = SAVED.search(text[: match.start()].rstrip("\n"))
        found.append(Block(match[1], match[2], named[1] if named else None))
    return found


def lines(block: Block) -> list[str]:
    """Return the commands of a shell block, with continued lines joined."""
    joined = (line.strip() for line in block.text.replace("\\\n", " ").splitlines())
    return [line for line in joined if line and not line.startswith("#")]


def write_small_parts(folder: Path) -> None:
    """Write tiny parts under the names that documents use: a folder of a name wins over the name."""
    tokenizer = byte_tokenizer()
    for name, kind, family in LANGUAGE_MODELS:
        write_tiny_lm(folder / name, kind)
        tokenizer.chat_template = FAMILIES[family]
        tokenizer.save_pretrained(folder / name)
    for name in ("dinov2-small", "TOWER", "facebook/dinov2-small"):
        write_tiny_tower(folder / name, "dinov2")
    write_tiny_tower(folder / "openai" / "clip-vit-large-patch14-336")
    (folder / "examples").symlink_to(ROOT / "examples")


def write_rows(folder: Path) -> None:
    """Write `train.json`, `test.json` and `images/` about different images, and the rows of a task."""
    (folder / "images").mkdir()
    (folder / "data" / "ward").mkdir(parents=True)
    (folder / "data" / "ward" / "images").symlink_to(folder / "images")
    kinds = [("MODALITY", "Which modality is this?", "MRI"), ("PRES", "Which side?", "left lung"),
             ("ABN", "Is a platelet visible?", "yes")]  # fmt: skip
    for name, numbers in (("train", range(1, 5)), ("test", range(5, 7))):
        rows: list[dict[str, Any]] = []
        for number in numbers:
            tiny_image(number, 56).save(folder / "images" / f"{number}.png")
            for kind, question, answer in kinds:
                turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
                types = {"question_type": kind, "answer_type": "CLOSED" if answer == "yes" else "OPEN"}
                rows.append({"id": f"{number}-{kind}", "image": f"{number}.png", **types, "conversations": turns})
        (folder / f"{name}.json").write_text(json.dumps(rows))
    (folder / "data" / "ward" / "test.json").write_text((folder / "test.json").read_text())
    tiny_image(9, 56).save(folder / "image.png")
    (folder / "own.jinja").write_text(
        "{% for message in messages %}{{ message.role }}: {% if message.role == 'assistant' %}{% generation %}"
        "{{ message.content }}</s>{% endgeneration %}{% else %}{{ message.content }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )


def write_studies(folder: Path, num: int = 40) -> list[str]:
    """Write made-up films of 20 patients and their reports; return names and numbers that must not leave them."""
    (folder / "studies").mkdir()
    secrets = []
    with open(folder / "reports.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["accession", "findings"])
        for number in range(num):
            values = np.random.default_rng(number).integers(0, 4000, (32, 32), dtype=np.uint16)
            patient, record, accession = f"Quentin^Zz{number // 2}", f"MRN77{number // 2:03}", f"ACC88{number:03}"
            (folder / "studies" / f"{number}.dcm").write_bytes(
                make(values, Modality=MODALITIES[number % 4], BitsStored=12, PatientName=patient, PatientID=record,
                     AccessionNumber=accession, StudyInstanceUID=f"1.2.3.{number + 1}", BodyPartExamined="CHEST",
                     SeriesInstanceUID=f"1.2.4.{number + 1}", SOPInstanceUID=f"1.2.5.{number + 1}")
            )  # fmt: skip
            table.writerow([accession, ("Clear lungs.", "Small effusion on the left.")[number % 2]])
            secrets += [patient, record, accession]
    (folder / "study.dcm").write_bytes((folder / "studies" / "0.dcm").read_bytes())
    return secrets


def run_document(path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run every block of a document in the current folder; return their number."""
    names: dict[str, Any] = {}
    found = blocks(path)
    for block in found:
        if block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, str(path), "exec"), names)
        elif block.language == "json":
            json.loads(block.text)
        else:
            assert block.language == "bash", f"{path}: a block of {block.language}"
            for line in lines(block):
                run_line(line, monkeypatch)
    return len(found)


def run_line(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one line; a line that starts several processes ends with the command line of torchrun."""
    if line in ELSEWHERE:
        assert (ROOT / ELSEWHERE[line]).is_file()
        return
    program, *words = shlex.split(line)
    assert program == "llava", line
    monkeypatch.setattr("sys.stdin", io.StringIO("What is shown?\n"))
    if words[0] == "train":
        given, options = train_command.checked_words(words[1:])
        if "nproc" in options:
            started = train_command.torchrun_command(given, options)
            assert f"--nproc_per_node={options['nproc']}" in started
            return
        words += ["--report-to", "none", "--bf16", "False", "--dataloader-num-workers", "0"]
    try:
        cli.run_command(words)
    except SystemExit as end:
        assert not end.code, f"{line}: status {end.code}"
