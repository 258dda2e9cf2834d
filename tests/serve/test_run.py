"""`llava serve`: command lines of its processes, restarts, and one run on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from llava.errors import ConfigError
from llava.serve.gradio_web_server import make_parser as page_parser
from llava.serve.model_worker import make_parser as worker_parser
from llava.serve.options import public_hosts
from llava.serve.page_run import run_page
from llava.serve.run import make_parser, services_of
from llava.serve.supervisor import Service, Supervisor
from tests.serve.test_worker import frames_of
from tests.support.ports import free_ports
from tests.support.waiting import until


def serve_words(model: Path, *words: str) -> list[str]:
    api, worker = free_ports(2)
    return ["--model-path", str(model), "--port", str(api), "--worker-port", str(worker), "--no-page", *words]


def test_the_children_get_the_options(tmp_path: Path) -> None:
    more = [
        "--load-8bit",
        "--conv-mode",
        "v1",
        "--max_images",
        "3",
        "--prefix_cache_mb",
        "7",
        "--public-host",
        "a",
        "--public-host",
        "b",
    ]
    args = make_parser().parse_args(serve_words(tmp_path, *more, "--cors-origin", "https://c", "--log-content"))
    controller, worker = services_of(args)
    assert "--public-host=a" in controller.words and "--cors-origin=https://c" in controller.words
    found = worker_parser().parse_args(list(worker.words))
    assert (found.model, found.bits, found.conv_mode, found.max_images) == (str(tmp_path), 8, "v1", 3)
    assert (found.prefix_cache_mb, found.prefill_chunk, found.share_prefix_cache) == (7, 512, False)
    assert (found.public_host, found.log_content, found.max_running) == (["a", "b"], True, 32)
    assert found.controller_address == controller.url and found.worker_address == worker.url


def test_the_page_gets_the_options(tmp_path: Path) -> None:
    api, worker, page_port = free_ports(3)
    words = ["--model-path", str(tmp_path), "--port", str(api), "--worker-port", str(worker)]
    words += ["--page-port", str(page_port), "--drain-seconds", "7", "--log-conversations", "--log-folder", "/logs"]
    *_, page = services_of(make_parser().parse_args([*words, "--public-host", "a"]))
    found = page_parser().parse_args(list(page.words))
    assert (found.drain_seconds, found.log_conversations, found.log_folder) == (7, True, Path("/logs"))
    assert (found.controller_url, found.port, found.public_host) == (f"http://127.0.0.1:{api}", page_port, ["a"])


def test_wrong_starts_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        services_of(make_parser().parse_args(serve_words(tmp_path / "none")))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(ConfigError, match="in use"):
            services_of(make_parser().parse_args(["--model-path", str(tmp_path), "--port", port, "--no-page"]))
    with pytest.raises(ConfigError, match="must differ"):
        services_of(make_parser().parse_args(serve_words(tmp_path, "--worker-port", "9", "--port", "9")))


@pytest.mark.parametrize(
    "host",
    ["a.example:8443", "https://a.example", "a.example/", "[::1]", "::1:80:x", "", "*.example", "müller.example"],
)
def test_a_public_host_that_no_request_can_have_is_refused(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--public-host .*expected it without scheme, port"):
        services_of(make_parser().parse_args(serve_words(tmp_path, "--public-host", host)))
    with pytest.raises(ConfigError, match=r"--public-host .*expected it without scheme, port"):
        run_page(page_parser().parse_args(["--port", "0", "--public-host", host]))


def test_public_hosts_are_compared_in_lower_case() -> None:
    words = [word for host in ("Ward-7.example", "10.0.0.1", "2001:DB8::1") for word in ("--public-host", host)]
    assert public_hosts(page_parser().parse_args(words)) == {"ward-7.example", "10.0.0.1", "2001:db8::1"}


@pytest.mark.parametrize(
    "words",
    [
        "--host 0.0.0.0 --controller http://localhost:10000 --port 40000 --worker http://localhost:40000 "
        "--model-path ./checkpoints/LLaVA-Med-7B --multi-modal --num-gpus 2",
        "--controller_address http://a:1 --worker_address http://b:2 --model_path m --limit_model_concurrency 5 "
        "--stream_interval 2 --no_register --model_base base --device cpu --load_4bit --use_flash_attn --model_name n",
    ],
)
def test_published_options_of_the_worker(words: str) -> None:
    args = worker_parser().parse_args(words.split())
    assert args.worker_address in ("http://localhost:40000", "http://b:2") and args.max_running in (32, 5)


def test_a_process_that_dies_is_started_again_and_later_each_time(tmp_path: Path) -> None:
    service = Service("a", "nothing", [], "http://127.0.0.1:9", "/ready")
    for wait, uptime in [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (30, 0), (30, 0), (1, 100)]:
        before = time.monotonic()
        service.started = before - uptime
        service.note_death(1)
        assert service.restart_at is not None
        assert before - 1e-6 <= service.restart_at - wait <= time.monotonic() + 1e-6  # rounding


def test_a_child_ignores_hangups_from_its_start() -> None:
    service = Service("a", "http.server", ["0", "--bind", "127.0.0.1"], "http://127.0.0.1:9", "/ready")
    service.start()
    assert service.process is not None
    try:
        lines = Path(f"/proc/{service.process.pid}/status").read_text().splitlines()
        [ignored] = [int(line.split()[1], 16) for line in lines if line.startswith("SigIgn:")]
        assert ignored & 1 << signal.SIGHUP - 1
    finally:
        service.process.kill()
        service.process.wait()


def test_a_usage_error_of_a_child_ends_all_with_2() -> None:
    failing = Service("a", "llava.serve.audit", ["--none"], "http://127.0.0.1:9", "/ready")
    assert Supervisor([failing], "ready").run() == 2
    assert failing.process is not None and failing.process.poll() == 2


def test_llava_serve_answers_in_both_protocols_and_leaves_nothing(tiny_options: list[str]) -> None:
    api, worker = free_ports(2)
    words = ["serve", *tiny_options, "--port", str(api), "--worker-port", str(worker), "--no-page"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "llava.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"ready api=http://127.0.0.1:{api}/v1\n"
        with httpx2.Client(base_url=f"http://127.0.0.1:{api}", timeout=120, trust_env=False) as client:
            [model] = client.get("/v1/models").json()["data"]
            assert model["id"] == "llava-med-mistral-tiny" and model["max_model_len"] == 1024
            question = {"role": "user", "content": "What is shown?"}
            body: dict[str, Any] = {"model": model["id"], "messages": [question], "max_tokens": 6}
            answer = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
            again = client.post("/v1/chat/completions", json={**body, "logprobs": True, "top_logprobs": 2}).json()
            assert again["choices"][0]["message"]["content"] == answer
            assert [len(token["top_logprobs"]) for token in again["choices"][0]["logprobs"]["content"]] == [2] * 6
            usage = again["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1
            prompt = "[INST] What is shown? [/INST]"
            old = {"model": model["id"], "prompt": prompt, "temperature": 0, "max_new_tokens": 6}
            frames = frames_of(client.post("/worker_generate_stream", json=old).content)
            assert frames[-1]["text"] == prompt + answer and frames[-1]["error_code"] == 0
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, ""), err
        assert '"What is shown' not in err and json.dumps(answer) not in err
        assert until(lambda: not _group_lives(process.pid))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
