"""Kill commands at random moments, and fill their disk; rerun them, and compare with an undisturbed run.

    python -m tests.support.kills                      # 40 kills over all commands, then a full disk for each
    python -m tests.support.kills --kills 6 --only train --seed 3
    python -m tests.support.kills --kills 0            # full disks only

Not in the default run of the tests: it takes about ten minutes. A full disk is a tmpfs of 20 MB where this user may
mount one, else a file-size limit. Commands run in forks of a preloaded process, except under such a limit. Every line
says what was done and what differed; the exit status is the number of differences.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.check_files import row, smooth, write_rows
from tests.support.fake_endpoint import FakeEndpoint, environment
from tests.support.fake_endpoint import serve as serve_answers
from tests.support.fast_python import fast_python
from tests.support.file_server import Fault, FileServer
from tests.support.file_server import serve as serve_files
from tests.support.legacy_folders import write_legacy
from tests.support.rollouts import rl_arguments, write_toy
from tests.support.runs import arguments, write_parts

ROOT = Path(__file__).resolve().parents[2]
DISK_BYTES = 20_000_000
FREE_SHARES = (0.05, 0.5, 0.9)
"""Room on the full disk, as shares of what the command writes."""

LIMIT = 240.0
PYTHON = "KILLS_PYTHON"
"""Environment variable with the program that runs the commands, see `fast_python`."""


@dataclass
class Scenario:
    """A command, and what of its output must be equal.

    Attributes:
        words: arguments of `llava`, for an output path.
        result: what must be equal, from the output path.
        environment: variables of the process.
        seconds: time of an undisturbed run.
        expected: result of that run.
        num_bytes: what it writes.
    """

    words: Callable[[Path], Sequence[str]]
    result: Callable[[Path], Any]
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    expected: Any = None
    num_bytes: int = 0

    def start(self, out: Path, *, errors: Any, limit: int | None = None) -> subprocess.Popen[bytes]:
        """Start the command in its own group of processes."""
        # A fork of another process would not inherit the limit.
        python = [os.environ[PYTHON]] if limit is None else ["prlimit", f"--fsize={limit}", sys.executable]
        return subprocess.Popen(
            [*python, "-m", "llava.cli", *self.words(out)],
            cwd=ROOT,
            env={**os.environ, **self.environment},
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )

    def finish(self, out: Path, *, limit: int | None = None) -> tuple[int, str]:
        """Run the command to its end; return its exit status and its error stream."""
        with tempfile.TemporaryFile() as errors:
            process = self.start(out, errors=errors, limit=limit)
            try:
                status = process.wait(LIMIT)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                status = process.wait()
            errors.seek(0)
            return status, errors.read().decode("utf-8", "replace")


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(folder: Path) -> list[str]:
    """Return all files below a folder; leftovers are among them."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def train_result(out: Path) -> Any:
    losses = [(line["step"], line["loss"], line["grad_norm"]) for line in rows(out / "metrics.jsonl") if "loss" in line]
    return {"names": names(out), "losses": losses, "weights": digest(out / "model.safetensors")}


def eval_result(out: Path) -> Any:
    answers = [(line["question_id"], line["text"]) for line in rows(out / "answers.jsonl")]
    return {"names": names(out), "answers": answers, "scores": json.loads((out / "results.json").read_text())["scores"]}


def files_result(out: Path) -> Any:
    """Return every file with its content; model cards state the time of day."""
    return {
        name: digest(out / name) for name in names(out) if not name.endswith(("README.md", ".html", "summary.json"))
    }


def check_result(out: Path) -> Any:
    return {"names": names(out), "fixed": digest(out / "fixed.json")}


def generate_result(out: Path) -> Any:
    texts = [(line["pair_id"], line.get("result")) for line in rows(out / "dialogues.jsonl")]
    return {"names": names(out), "rows": texts}


def answer(messages: list[dict[str, Any]]) -> str:
    """Return a dialogue that depends on the question only."""
    word = hashlib.sha256(str(messages[-1]["content"]).encode()).hexdigest()[:8]
    time.sleep(0.05)
    return f"User: What is {word}?\n\nAssistant: A drawing.\n\nUser: More?\n\nAssistant: No."


def training(work: Path) -> Scenario:
    parts = write_parts(work / "parts")
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    return Scenario(lambda out: ["train", *arguments(parts, out, **options)], train_result)


def reinforcement(work: Path) -> Scenario:
    work.mkdir(parents=True, exist_ok=True)
    parts = write_toy(work)
    options = {"max_steps": 6, "noptepochs": 2, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    return Scenario(
        lambda out: ["train", *rl_arguments(parts, out, objective="ppo", **options)],
        lambda out: {"rollouts": digest(out / "rollouts.jsonl"), "weights": digest(out / "adapter_model.safetensors")},
        {"OMP_NUM_THREADS": "1"},
    )


def evaluation(work: Path) -> Scenario:
    parts = write_parts(work / "parts")
    model = work / "model"
    made = Scenario(lambda out: ["train", *arguments(parts, out)], train_result)
    status, errors = made.finish(model)
    assert status == 0, errors
    words = ["eval", "--model", str(model), "--data", str(parts / "vqa" / "train.json")]
    words += ["--image-folder", str(parts / "vqa" / "images"), "--batch-size", "2", "--max-new-tokens", "16"]
    return Scenario(lambda out: [*words, "--out", str(out)], eval_result)


def checking(work: Path) -> Scenario:
    (work / "images").mkdir(parents=True)
    for number in range(150):
        smooth(number, 256).save(work / "images" / f"{number}.png")
    many = [row(number, f"{number % 151}.png") for number in range(6000)]
    data = write_rows(work / "rows.json", many)
    words = ["data", "check", str(data), "--images", str(work / "images")]

    def to(out: Path) -> list[str]:
        targets = {"--fix": "fixed.json", "--html": "page.html", "--json": "found.json"}
        return [*words, *(word for flag, name in targets.items() for word in (flag, str(out / name)))]

    return Scenario(to, check_result)


def conversion(work: Path) -> Scenario:
    source = write_legacy(work)
    return Scenario(lambda out: ["checkpoint", "convert", str(source), str(out)], files_result)


def generation(work: Path, endpoint: FakeEndpoint) -> Scenario:
    captions = [
        {"pair_id": f"{9_000_000 + number}_F1", "fig_label": "Fig. 1", "fig_caption": f"Row {number}. " * 30}
        for number in range(60)
    ]
    (work / "captions.json").write_text(json.dumps({"mri": captions}))
    words = ["instruct", "generate", "--input-path", str(work / "captions.json"), "--output-path"]
    return Scenario(lambda out: [*words, str(out / "dialogues.jsonl")], generate_result, environment(endpoint))


def download(work: Path, server: FileServer) -> Scenario:
    content = {f"part/{number}.json": random.Random(number).randbytes(400_000) for number in range(8)}
    server.files |= {f"/{name}": data for name, data in content.items()}
    server.faults |= {f"/{name}": [Fault(pause=0.01, piece=20_000, always=True)] for name in content}
    files = [
        {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in content.items()
    ]
    (work / "table.json").write_text(json.dumps({"bases": [], "files": files}))
    words = ["data", "download", "--table", str(work / "table.json"), "--base", server.address, "--images", "False"]
    return Scenario(lambda out: [*words, "--data-dir", str(out)], files_result)


@contextlib.contextmanager
def scenarios(work: Path, only: Sequence[str]) -> Iterator[dict[str, Scenario]]:
    """Yield the scenarios by name, with their servers."""
    with serve_answers(answer) as endpoint, serve_files() as server:
        makers: dict[str, Callable[[Path], Scenario]] = {
            "train": training,
            "rl": reinforcement,
            "eval": evaluation,
            "check": checking,
            "convert": conversion,
            "generate": lambda folder: generation(folder, endpoint),
            "download": lambda folder: download(folder, server),
        }
        found = {}
        for name in only or makers:
            folder = work / name
            folder.mkdir()
            found[name] = makers[name](folder)
        yield found


def measure(name: str, scenario: Scenario, out: Path) -> None:
    """Run a command undisturbed; keep its time, result and size."""
    out.parent.mkdir(parents=True)
    began = time.monotonic()
    status, errors = scenario.finish(out)
    assert status in (0, 1), f"{name}: status {status}\n{errors}"
    scenario.seconds, scenario.expected = time.monotonic() - began, scenario.result(out)
    scenario.num_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    say(f"{name}: {scenario.seconds:.1f} s, {scenario.num_bytes} bytes in {len(names(out))} files")


def difference(scenario: Scenario, out: Path, status: int, errors: str) -> str:
    """Return what differs from the undisturbed run, or nothing."""
    if status not in (0, 1):
        return f"the rerun ended with status {status}: {errors.strip().splitlines()[-1:]}"
    found = scenario.result(out)
    if found == scenario.expected:
        return ""
    own, expected = (json.dumps(value, sort_keys=True, default=str) for value in (found, scenario.expected))
    place = next(
        (at for at, (a, b) in enumerate(zip(own, expected, strict=False)) if a != b), min(len(own), len(expected))
    )
    return (
        f"got ...{own[max(0, place - 60) : place + 60]}..., expected ...{expected[max(0, place - 60) : place + 60]}..."
    )


def kill_once(scenario: Scenario, out: Path, draw: random.Random) -> tuple[str, bool]:
    """Kill the command at a random moment, rerun it; return what differs, and whether it was still running."""
    out.parent.mkdir(parents=True)
    with tempfile.TemporaryFile() as errors:
        process = scenario.start(out, errors=errors)
        time.sleep(draw.uniform(0.02, 0.8) * scenario.seconds)
        was_running = process.poll() is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        ended = process.wait()
    time.sleep(0.5)  # the fork ends soon after its client
    if not was_running:  # nothing was killed; some commands refuse a folder that is complete
        return difference(scenario, out, ended, ""), False
    status, text = scenario.finish(out)
    if status == 2 and "is not empty" in text:  # killed between its last file and its end
        status, text = 0, ""
    return difference(scenario, out, status, text), True


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a disk of 20 MB at a new folder; yield whether that was possible."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], check=False, capture_output=True
    )
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_once(scenario: Scenario, folder: Path, share: float) -> tuple[str, bool]:
    """Run a command on a full disk, free the disk, rerun it; return what differs, and whether the disk was full."""
    with small_disk(folder) as is_disk:
        out, filler, limit = folder / "out", folder / "filler", None
        room = max(1, int(share * scenario.num_bytes))
        if is_disk:
            free = shutil.disk_usage(folder).free
            filler.write_bytes(b"\x00" * max(0, free - room))
        else:
            limit = room
        status, errors = scenario.finish(out, limit=limit)
        if status == 0:
            return difference(scenario, out, status, errors), False
        lines = [line for line in errors.splitlines() if re.search(r"error|full|limit|space|Traceback", line)]
        if "Traceback" in errors or not lines or not re.search(r"full|limit|[Ss]pace|large|room|free", errors):
            return f"status {status}, {len(errors.splitlines())} lines: {errors[-600:]!r}", True
        filler.unlink(missing_ok=True)
        again, text = scenario.finish(out)
        return difference(scenario, out, again, text), True


def main() -> int:
    """Run everything; return the number of differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="kills over all commands together")
    parser.add_argument("--only", nargs="+", default=[], help="commands; default: all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--disk", action=argparse.BooleanOptionalAction, default=True, help="also fill the disk")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    num_wrong, num_running = 0, 0
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        os.environ |= {"LLAVA_CACHE": str(work / "cache"), "LLAVA_KEY_FILE": str(work / "key")}
        os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
        with contextlib.ExitStack() as opened:
            os.environ[PYTHON] = str(opened.enter_context(fast_python(work / "bin")))
            found = opened.enter_context(scenarios(work, args.only))
            for key, scenario in found.items():
                measure(key, scenario, work / f"{key}-whole" / "out")
            for number in range(args.kills):
                key = list(found)[number % len(found)]
                folder = work / f"{key}-{number}"
                wrong, was_running = kill_once(found[key], folder / "out", draw)
                num_running += was_running
                num_wrong += bool(wrong)
                say(f"kill {number + 1}: {key}: {wrong or 'equal'}")
                shutil.rmtree(folder, ignore_errors=True)
            say(f"{args.kills} kills, {num_running} of a running command, {num_wrong} differences")
            for key, scenario in found.items() if args.disk else ():
                for share in FREE_SHARES:
                    wrong, was_full = fill_once(scenario, work / f"{key}-disk-{share}", share)
                    num_wrong += bool(wrong)
                    state = "full" if was_full else "not full"
                    say(f"disk, room for {share:.0%}: {key}: {state}, {wrong or 'equal'}")
    say(f"{num_wrong} differences")
    return num_wrong


if __name__ == "__main__":
    sys.exit(min(main(), 100))
