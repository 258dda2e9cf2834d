"""Application of a worker: one model behind both protocols.

engine --AnswerService--> /v1/chat/completions, /worker_generate_stream --Gate--> clients
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from llava.constants import IM_END_TOKEN, IM_START_TOKEN, IMAGE_TOKEN
from llava.model.int8 import precision_of
from llava.serve.answering import AnswerService, ServedModel
from llava.serve.application import Health, guarded, make_app
from llava.serve.gate import GateSettings
from llava.serve.metrics import ServerMetrics
from llava.serve.old_protocol import add_old_routes
from llava.serve.openai_server import add_openai_routes
from llava.serve.token_texts import TokenTexts
from llava.utils.provenance import weights_sha256

STUCK_SECONDS = 60.0
"""Time without a step, while sequences run, after which the worker is not alive."""


def make_worker_app(
    service: AnswerService, settings: GateSettings, tokenizer: Any, *, origins: tuple[str, ...] = ()
) -> ASGIApp:
    """Return the application of a worker, with its gate."""
    admission = service.admission
    driver = getattr(service.engine, "driver", None)
    metrics = ServerMetrics(
        {
            "llava_requests_running": lambda: admission.num_running_requests,
            "llava_requests_waiting": lambda: admission.num_waiting,
            "llava_slots_in_use": lambda: getattr(driver, "num_running", 0),
            "llava_kv_cache_bytes": lambda: getattr(driver, "kv_cache_bytes", 0),
            "llava_prefix_cache_bytes": lambda: getattr(service.engine, "prefix_cache_bytes", 0),
            "llava_workers": lambda: 1,
        }
    )
    if driver is not None:
        driver.on_step = lambda seconds: metrics.observe("llava_step_seconds", seconds)
    app = make_app("llava worker", metrics, Health(lambda: problem_of(service), lambda: ""))
    add_openai_routes(app, service, TokenTexts(tokenizer))
    add_old_routes(app, service)
    return guarded(app, settings, metrics, origins=origins)


def problem_of(service: AnswerService, clock: Callable[[], float] = time.monotonic) -> str:
    """Return why a worker is not alive; "" if it is."""
    if service.admission.is_draining:
        return "draining"
    driver = getattr(service.engine, "driver", None)
    if driver is not None and driver.num_running and clock() - driver.last_step > STUCK_SECONDS:
        return "stuck: no step ended for a long time"
    return ""


def served_model(engine: Any, path: str, name: str | None) -> ServedModel:
    """Return the facts of an engine's model.

    Args:
        engine: a `LocalEngine`.
        path: its checkpoint.
        name: name under which it is served; default: from the path.
    """
    processor = engine.processor
    special = {str(token) for token in processor.tokenizer.added_tokens_decoder.values() if token.special}
    special |= {IMAGE_TOKEN, IM_START_TOKEN, IM_END_TOKEN} | {
        str(one) for one in processor.tokenizer.all_special_tokens
    }
    weights = weights_sha256(path) if Path(path).is_dir() else None
    return ServedModel(
        name or model_name(path),
        engine.reader.max_tokens,
        processor.template.name,
        weights,
        frozenset(special),
        processor.placement,
        precision_of(engine.model),
    )


def model_name(path: str) -> str:
    """Return the name of the model in a folder: its last part, and that before it for `checkpoint-N`."""
    parts = [part for part in path.rstrip("/").split("/") if part not in ("", ".")] or ["model"]
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]
