"""Two workers behind a controller: questions about an image meet where it was computed, asked by `RemoteEngine`."""

from __future__ import annotations

import time
from contextlib import ExitStack

import httpx2

from llava.generation.protocol import Prompt, Sampling
from llava.generation.remote import RemoteEngine
from llava.serve.admission import Admission
from llava.serve.answering import AnswerService
from llava.serve.controller_app import Controller, make_controller_app
from llava.serve.gate import GateSettings
from llava.serve.image_inputs import ImageLimits
from llava.serve.registry import Registry
from llava.serve.worker import make_worker_app, served_model
from tests.support.generation_tools import ask, engine_of
from tests.support.served import served
from tests.support.tiny import tiny_llava


def test_each_image_is_computed_by_one_of_two_workers() -> None:
    sampling = Sampling(max_new_tokens=3)
    prompts = [ask(f"question {number}", image) for number in range(4) for image in range(4)]
    with ExitStack() as stack:
        made = Controller(Registry(time.monotonic, affinity_slack=8))
        url = stack.enter_context(served(make_controller_app(made), made.watch))
        seen: list[list[bytes]] = []
        for _ in range(2):
            engine = engine_of(tiny_llava(seed=3), prefill_chunk=64, prefix_cache_mb=8)
            submit, images = engine.submit, list[bytes]()
            seen.append(images)

            def noting(prompt: Prompt, *rest: object, submit=submit, images=images, **options: object) -> object:
                images.extend(image for image in prompt.images if isinstance(image, bytes))
                return submit(prompt, *rest, **options)

            engine.submit = noting  # type: ignore[method-assign,assignment]
            model = served_model(engine, "tiny", None)
            service = AnswerService(engine, model, admission=Admission(), images=ImageLimits())
            worker = stack.enter_context(served(make_worker_app(service, GateSettings(), engine.processor.tokenizer)))
            body = {"worker_name": worker, "check_heart_beat": False}
            assert httpx2.post(f"{url}/register_worker", json=body).status_code == 200
        remote = RemoteEngine(url, max_concurrency=8)
        wanted = engine_of(tiny_llava(seed=3)).generate(prompts, sampling)
        assert [one.text for [one] in remote.generate(prompts, sampling)] == [one.text for [one] in wanted]
    assert len(seen[0]) + len(seen[1]) == 16 and min(map(len, seen)) > 0
    assert not set(seen[0]) & set(seen[1])
