"""The `llava` command: subcommands for training, evaluation, chat, data and checkpoints.

    llava COMMAND [flags]  --lookup-->  COMMANDS[COMMAND]  --lazy import-->  function(flags)

A subcommand is imported when it runs, so `llava --help` imports neither torch nor transformers.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava import __version__
from llava.errors import ConfigError
from llava.utils.cli import run_program, run_target
from llava.utils.plugins import FLAG, given_plugins, load_plugins, without_plugins


@dataclass(frozen=True, slots=True)
class Command:
    """Subcommand.

    Attributes:
        target: its function, `module:function`, called with the remaining arguments.
        summary: a line of the help.
        example: a command line.
        passes_name: whether the last word of its name is the first of these arguments.
    """

    target: str
    summary: str
    example: str
    passes_name: bool = False


COMMANDS: dict[str, Command] = {
    "quickstart": Command(
        "llava.quickstart.command:main",
        "create a small model from scratch: draw data, align, tune, evaluate, write a report",
        "llava quickstart --out runs/quickstart",
    ),
    "train": Command(
        "llava.train.command:main",
        "train a model: alignment, instruction tuning, downstream fine-tuning; full, LoRA or QLoRA",
        "llava train --model-name-or-path LM --vision-tower TOWER --data-path train.json --image-folder images "
        "--output-dir runs/first",
    ),
    "eval": Command(
        "llava.eval.run:main",
        "answer and score questions about images, with confidence intervals and the blank-image control",
        "llava eval --model runs/first --data test.json --image-folder images --out runs/first/eval",
    ),
    "compare": Command(
        "llava.train.compare:main",
        "compare training runs: curves, settings that differ, scores; as text, page or JSON",
        "llava compare runs/first runs/second --html compare.html",
    ),
    "chat": Command(
        "llava.serve.cli:main",
        "chat with a trained model about an image in the terminal",
        "llava chat --model runs/first --image xray.png",
    ),
    "findings": Command(
        "llava.serve.findings:main",
        "write the findings of chest X-rays, with rule labels on request; research use, not for diagnosis",
        "llava findings xray.dcm other.png --model runs/rad --labels",
    ),
    "ask": Command(
        "llava.instruct.ask:main",
        "let a model ask questions about images, in a template in which it learned to (v1_sq, chatml_sq)",
        "llava ask --model runs/stage1 --images images --out questions.jsonl",
    ),
    "serve": Command(
        "llava.serve.run:main",
        "serve a model: OpenAI-compatible API, protocol of the original workers, web page",
        "llava serve --model-path runs/first --port 8000",
    ),
    "data show": Command(
        "llava.data.show_command:main",
        "show one row as the model receives it: text, trained tokens, image positions, ids, truncation",
        "llava data show train.json --row 3 --model runs/first",
    ),
    "data dialogues": Command(
        "llava.data.dialogues:main",
        "join rows with one question about an image to dialogues of several turns, for --sq-r",
        "llava data dialogues train.json --turns 5 --seed 0 --out dialogues.json",
    ),
    "data align": Command(
        "llava.data.converters.alignment:main",
        "write alignment captions from the question-answer rows of each image",
        "llava data align train.json --image-folder images --out align.json",
    ),
    "data dicom": Command(
        "llava.data.dicom.rows:main",
        "convert a folder of DICOM studies to rows: modality, part, view, texts from a table, hashed patient ids",
        "llava data dicom studies --out rows.json --salt-file salt.txt",
    ),
    "data deid": Command(
        "llava.data.dicom.deid:main",
        "find identifying data in DICOM files, also text in images; write clean copies with new identifiers",
        "llava data deid studies --out clean --salt-file salt.txt --report found.json",
    ),
    "data download": Command(
        "llava.data.download.published:main",
        "download and check the published data files, then their images (alias: `sh download_data.sh`)",
        "llava data download --only instruct --images False",
    ),
    "data images": Command(
        "llava.data.download.pmc:main",
        "download the listed figures of PMC articles; resumes, and lists missing figures with reasons",
        "llava data images --input-path data/llava_med_image_urls.jsonl --only train.json --filter-json train.json",
    ),
    "data vqa-rad": Command(
        "llava.data.converters.vqa_rad:main",
        "convert downloaded VQA-RAD to train.json, test.json and images/",
        "llava data vqa-rad downloads/vqa-rad --out data/vqa-rad",
    ),
    "data slake": Command(
        "llava.data.converters.slake:main",
        "convert downloaded SLAKE to train.json, val.json, test.json and images/; English, Chinese or both",
        "llava data slake downloads/slake imgs.zip --out data/slake --lang en",
    ),
    "data pathvqa": Command(
        "llava.data.converters.pathvqa:main",
        "convert PathVQA (Parquet or JSON, never pickles) to train.json, val.json, test.json and images/",
        "llava data pathvqa downloads/path-vqa --out data/pathvqa",
    ),
    "data pmc-vqa": Command(
        "llava.data.converters.pmc_vqa:main",
        "convert either release of PMC-VQA to train.json, test.json and images/; open answers or choices",
        "llava data pmc-vqa downloads images_2.zip --out data/pmc-vqa --release 2",
    ),
    "data iu-xray": Command(
        "llava.data.converters.iu_xray:main",
        "convert IU X-ray (Open-i) reports and images to train.json, val.json, test.json and images/",
        "llava data iu-xray NLMCXR_reports.tgz NLMCXR_png.tgz --views all --out data/iu-xray",
    ),
    "data mimic-cxr": Command(
        "llava.data.converters.mimic_cxr:main",
        "convert MIMIC-CXR (credentialed) findings or impressions to train.json, val.json, test.json and images/",
        "llava data mimic-cxr mimic-cxr-jpg mimic-cxr-reports.zip --out data/mimic-cxr --target findings",
    ),
    "data csv": Command(
        "llava.data.converters.csv_table:main",
        "convert a table (CSV, TSV, JSON, JSON lines, Parquet) to rows, by column names",
        "llava data csv cases.csv --image-column file --answer-column report --patient-column patient --out data/cases",
    ),
    "data cells": Command(
        "llava.data.cells:main",
        "cut a window around every labeled cell of smears: one cell per row, split by smear",
        "llava data cells train.json --image-folder images --out cells --fractions train=0.8,test=0.2",
    ),
    "data split": Command(
        "llava.data.converters.split:main",
        "split rows into train, val and test by patient or by image",
        "llava data split all.json --by patient --fractions train=0.8,val=0.1,test=0.1 --out data/split",
    ),
    "instruct generate": Command(
        "llava.instruct.generate:main",
        "write dialogues about figures from their captions with a language model; resumes after a stop",
        "llava instruct generate --input-path captions.json --output-path gen.jsonl --use-inline-mentions --dry-run",
    ),
    "instruct postprocess": Command(
        "llava.instruct.postprocess:main",
        "convert generated dialogues to training rows, with counts for every rule",
        "llava instruct postprocess --input-path gen.jsonl --output-path train.json",
    ),
    "data mix": Command(
        "llava.data.mixture:main",
        "write the rows of a mixture into one data file, each with its source and license",
        "llava data mix mixture.yaml --out rows.json",
    ),
    "data check": Command(
        "llava.data.check.cli:main",
        "check a data file and its images, and its overlap with a test file; exit 1 on errors",
        "llava data check train.json --images images --against test.json --html check.html --fix clean.json",
    ),
    "reports label": Command(
        "llava.eval.reports.label:main",
        "label chest X-ray reports with 14 findings by rules, with the evidence of each label",
        "llava reports label predictions.jsonl --out labels.jsonl",
    ),
    "reports score": Command(
        "llava.eval.reports.cli:score_main",
        "score predicted reports against their references: labels, RadGraph, BLEU, ROUGE, with intervals and a page",
        "llava reports score predictions.jsonl --output-dir scores",
    ),
    "reports compare": Command(
        "llava.eval.reports.compare_cli:compare_main",
        "compare predicted reports of several systems: paired intervals and p-values by patient",
        "llava reports compare ours.jsonl theirs.jsonl --out comparison",
    ),
    "reports judge": Command(
        "llava.eval.chexprompt:judge_main",
        "count errors of predicted reports with a language model, in six categories and two severities",
        "llava reports judge predictions.jsonl --output-dir ratings --engine NAME",
    ),
    "rules check": Command(
        "llava.symbolic.commands:check_main",
        "check a rule file: valid paths, phrases, and the assignments of a table; exit 1 on errors",
        "llava rules check rules.yaml --table rows.json",
    ),
    "rules lint": Command(
        "llava.symbolic.lint:main",
        "compare what policies that ignore the image earn with a half-right one; exit 1 if one earns more",
        "llava rules lint bone-marrow-aspirate --table rows.json",
    ),
    "rules new": Command(
        "llava.symbolic.new_rules:main",
        "write a rule file by answering questions in the terminal",
        "llava rules new lesions.yaml",
    ),
    "rules show": Command(
        "llava.symbolic.show:main",
        "show a rule file, as text or as a page: hierarchy, valid paths, phrases, an example dialogue, rewards",
        "llava rules show bone-marrow-aspirate --html rules.html",
    ),
    "rules priors": Command(
        "llava.symbolic.commands:priors_main",
        "count the true values of a training table, for the balance of the reward",
        "llava rules priors bone-marrow-aspirate --table rows.json --out priors.json",
    ),
    "rules dialogues": Command(
        "llava.symbolic.dialogues:main",
        "write dialogues for the rows of a table, in several orders of questions, with hints and confirmations",
        "llava rules dialogues bone-marrow-aspirate --table rows.json --out dialogues.json --seed 1",
    ),
    "rules rollouts": Command(
        "llava.train.rollout.page:main",
        "show what a run of reinforcement learning sampled: best, worst and contradictory dialogues of its steps",
        "llava rules rollouts runs/grpo --html",
    ),
    "rules score": Command(
        "llava.symbolic.commands:score_main",
        "score conversations with a rule file: values, reward by turn, broken constraints",
        "llava rules score rules.yaml --conversations answers.jsonl --out scores.jsonl",
    ),
    "checkpoint inspect": Command(
        "llava.model.checkpoint.tools.inspection:main",
        "list the contents of a checkpoint of any format, tensor by tensor; reads no weights",
        "llava checkpoint inspect checkpoints/llava-med",
    ),
    "checkpoint doctor": Command(
        "llava.model.checkpoint.tools.doctor:main",
        "find problems of a checkpoint, with a fix for each",
        "llava checkpoint doctor checkpoints/llava-med --weights",
    ),
    "checkpoint convert": Command(
        "llava.model.checkpoint.tools.convert_command:convert_main",
        "convert a checkpoint between the formats of llava, the original code and transformers",
        "llava checkpoint convert checkpoints/llava-med runs/llava-med",
    ),
    "checkpoint export": Command(
        "llava.model.checkpoint.tools.convert_command:export_main",
        "export a checkpoint for transformers and vLLM (hf, peft) or for the original code (legacy)",
        "llava checkpoint export runs/first runs/first-hf --to hf",
    ),
    "checkpoint diff": Command(
        "llava.model.checkpoint.tools.diff:main",
        "compare two checkpoints of any formats, tensor by tensor",
        "llava checkpoint diff runs/first runs/second",
    ),
    "preferences answer": Command(
        "llava.instruct.preferences.answer:main",
        "sample answers of a model to questions about images, several to each; resumes after a stop",
        "llava preferences answer questions.jsonl --model runs/stage1 --image-folder images --out answers.jsonl",
    ),
    "preferences judge": Command(
        "llava.instruct.preferences.judge:main",
        "judge which answer is preferred: by references, by the use of the image, by majority, or by a language model",
        "llava preferences judge answers.jsonl --by reference --out judgments.jsonl",
    ),
    "preferences pairs": Command(
        "llava.instruct.preferences.pairs:main",
        "turn judgments into preference pairs of any layout, with lengths and the agreement with references",
        "llava preferences pairs judgments.jsonl --out pairs.json",
    ),
    "preferences convert": Command(
        "llava.data.convert_preferences:main",
        "convert preference pairs between the layouts of STLLaVA-Med, its judge, TRL, LLaMA-Factory and ms-swift",
        "llava preferences convert pairs.json trl.jsonl --to trl",
    ),
    "preferences score": Command(
        "llava.train.score_command:main",
        "write the log-probabilities of pairs under a model, for `llava train --objective dpo --ref-logprobs`",
        "llava preferences score --out reference.jsonl --model-name-or-path MODEL --data-path pairs.json",
    ),
    "env": Command(
        "llava.utils.environment:main",
        "print versions, devices and memory of this machine, for bug reports",
        "llava env --json",
    ),
}

USAGE = """usage: llava COMMAND [--OPTION ...]      (options: llava COMMAND --help; version: llava --version)
completion in the shell: eval "$(register-python-argcomplete llava)\""""


TOPICS = {
    "": "Models",
    "data": "Rows and images",
    "checkpoint": "Checkpoints",
    "instruct": "Dialogues written by a language model",
    "preferences": "Preferences",
    "reports": "Reports of chest X-rays",
    "rules": "Clinical rules",
}
"""First word of a group of commands (empty for one-word commands) and its heading in the help."""


def overview(commands: Mapping[str, Command] = COMMANDS) -> str:
    """Return the text of `llava --help`: each command by topic, with its summary and an example."""
    lines = [USAGE, ""]
    by_topic: dict[str, list[str]] = {topic: [] for topic in TOPICS}
    for name, command in commands.items():
        topic = name.partition(" ")[0] if " " in name else ""
        by_topic.setdefault(topic, []).extend([f"  {name:<22}{command.summary}", f"{'':24}{command.example}", ""])
    for topic, members in by_topic.items():
        lines += [f"{TOPICS.get(topic, topic)}:", *members] if members else []
    return "\n".join(lines).rstrip()


def split_command(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Return the name of the command, of one or two words (`data show`), and the remaining arguments."""
    two_words = " ".join(argv[:2])
    return (two_words, list(argv[2:])) if two_words in COMMANDS else (argv[0], list(argv[1:]))


def commands_of_group(name: str) -> dict[str, Command]:
    """Return the commands of a group (`data`), empty if `name` is not a group."""
    return {key: command for key, command in COMMANDS.items() if key.split()[0] == name != key}


def unknown_command(name: str, members: Mapping[str, Command]) -> ConfigError:
    """Return the error for an unknown command, with the most similar name or the commands of its group."""
    group, _, word = name.rpartition(" ")
    known_words = [key.rpartition(" ")[2] for key in members] or [key.partition(" ")[0] for key in COMMANDS]
    if near := difflib.get_close_matches(word, known_words, n=1):
        return ConfigError(f"unknown command {name!r}; did you mean {f'{group} {near[0]}'.strip()!r}?")
    known = f"expected {', '.join(members)}" if members else "`llava --help` lists all commands"
    return ConfigError(f"unknown command {name!r}; {known}")


def with_plugin_commands(argv: Sequence[str]) -> list[str]:
    """Return a command line with plug-in options last, after loading those that may add commands.

    Raises:
        ConfigError: a plug-in cannot be loaded.
    """
    plugins = given_plugins(argv)
    if not plugins or split_command(argv)[0] in COMMANDS:
        return list(argv)
    words = without_plugins(argv)
    if not words or split_command(words)[0] not in COMMANDS:
        load_plugins(plugins)
    return [*words, *(f"{FLAG}={plugin}" for plugin in plugins)]


def run_command(argv: Sequence[str]) -> None:
    """Run one command.

    Raises:
        ConfigError: the command is unknown.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(overview() + "\n")
        return
    if argv[0] == "--version":
        sys.stdout.write(f"llava {__version__}\n")
        return
    argv = with_plugin_commands(argv)
    name, rest = split_command(argv)
    members = commands_of_group(name)
    if members and (not rest or rest[0] in ("-h", "--help")):
        sys.stdout.write(overview(members) + "\n")
        return
    if name not in COMMANDS:
        raise unknown_command(" ".join([name, *rest[:1]]) if members else name, members)
    command = COMMANDS[name]
    if any(word.partition("=")[0] in ("-h", "--help", "--help-all") for word in rest):
        sys.stdout.write(f"llava {name}: {command.summary}\nexample: {command.example}\n\n")
        sys.stdout.flush()
    run_target(command.target, [name.split()[-1], *rest] if command.passes_name else rest)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the console script; expected errors print their message and exit with status 2."""
    if "_ARGCOMPLETE" in os.environ:
        from llava.completion import complete

        complete({name: command.target for name, command in COMMANDS.items()})
    arguments = sys.argv[1:] if argv is None else list(argv)
    run_program(lambda: run_command(arguments))


if __name__ == "__main__":
    run_target("llava.cli:main", None)  # of the module of this name, to which plug-ins add commands
