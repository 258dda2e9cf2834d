"""A wheel built from the checkout, installed elsewhere, has its data files and runs without the repository."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import Any

import httpx2
import pytest

from llava.model.checkpoint.save import save_model
from tests.support.ports import free_ports
from tests.support.runs import write_parts
from tests.support.tiny import tiny_llava

ROOT = Path(__file__).resolve().parents[1]

COMMANDS = """
import json, sys
from pathlib import Path

import llava
from llava.cli import main

place = Path(llava.__file__).resolve()
assert place.is_relative_to(Path(sys.prefix).resolve()), place
for words in json.loads(Path("commands.json").read_text()):
    print("$", *words, flush=True)
    try:
        main(words)
    except SystemExit as end:
        assert not end.code, (words, end.code)
"""
"""One process for all commands, since importing torch takes most of the time."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, since building writes into the folder."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "checkout"
    shutil.copytree(ROOT / "llava", copy / "llava", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=copy, check=True, capture_output=True, timeout=900)
    [file] = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel; it reads the packages of this one, but not its llava."""
    folder = tmp_path_factory.mktemp("environment") / "clean"
    venv.create(folder, with_pip=False)
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=900)
    # A path in a .pth file comes after the environment's own, and the .pth files in that folder are not read: an
    # editable install of the checkout stays invisible.
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LLAVA_"))}
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("llava/")}
        entry_points = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "llava = llava.cli:main" in archive.read(entry_points).decode()
    ours = {path for path in (ROOT / "llava").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert names == {path.relative_to(ROOT).as_posix() for path in ours}
    kinds = (
        "utils/templates/",
        "symbolic/rulesets/",
        "symbolic/rulesets/phrases/",
        "eval/tasks/",
        "train/option_table",
    )
    assert all(any(name.startswith(f"llava/{kind}") for name in names) for kind in kinds)


def test_commands_run_without_the_repository(installed: Path, tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts")
    rows = ["--data", str(parts / "vqa" / "train.json"), "--image-folder", str(parts / "vqa" / "images")]
    train = ["--model-name-or-path", str(parts / "lm"), "--vision-tower", str(parts / "tower")]
    train += ["--data-path", str(parts / "vqa" / "train.json"), "--image-folder", str(parts / "vqa" / "images")]
    shutil.copy(parts / "vqa" / "train.json", parts / "vqa" / "test.json")
    quickstart = ["--data", str(parts / "vqa"), "--lm", str(parts / "lm"), "--vision-tower", str(parts / "tower")]
    commands = [
        ["--help"],
        ["quickstart", *quickstart, "--out", "quickstart"],
        ["serve", "--help"],
        ["rules", "check", "bone-marrow-aspirate"],
        ["rules", "show", "chest-xray"],
        ["eval", "--tasks", "list"],
        ["train", *train, "--output-dir", "run", "--max-steps", "1", "--version", "v1", "--report-to", "none"],
        ["eval", "--model", "run", *rows, "--out", "run/eval", "--limit", "2", "--max-new-tokens", "2"],
        ["findings", str(parts / "vqa" / "images" / "0.png"), "--model", "run", "--max-new-tokens", "2", "--labels"],
    ]
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    script = installed / "bin" / "llava"
    settings: dict[str, Any] = {"cwd": tmp_path, "env": environment(), "capture_output": True, "text": True}
    shown = subprocess.run([script, "--help"], check=True, timeout=900, **settings)
    assert "llava train" in shown.stdout
    python = installed / "bin" / "python"
    done = subprocess.run([python, "-c", COMMANDS], check=False, timeout=900, **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert [line for line in done.stdout.splitlines() if line.startswith("$ ")] == [
        "$ " + " ".join(words) for words in commands
    ]
    assert (tmp_path / "run" / "eval" / "report.html").stat().st_size > 10_000
    assert str(ROOT) not in done.stdout + done.stderr
    assert (tmp_path / "quickstart" / "index.html").is_file()


@pytest.mark.extended
def test_an_installed_server_answers_without_the_repository(installed: Path, tmp_path: Path) -> None:
    loaded = tiny_llava()
    save_model(loaded.model, loaded.processor, tmp_path / "run")
    api, worker = free_ports(2)
    words = ["serve", "--model-path", "run", "--port", str(api), "--worker-port", str(worker), "--no-page"]
    process = subprocess.Popen(
        [installed / "bin" / "llava", *words], cwd=tmp_path, env=environment(), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"ready api=http://127.0.0.1:{api}/v1\n"
        with httpx2.Client(base_url=f"http://127.0.0.1:{api}", timeout=120, trust_env=False) as client:
            question = {"model": "run", "messages": [{"role": "user", "content": "What?"}], "max_tokens": 2}
            assert client.post("/v1/chat/completions", json=question).json()["usage"]["completion_tokens"] > 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
