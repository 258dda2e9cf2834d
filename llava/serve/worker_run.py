"""Start of a worker: options to engine, service, application and server."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from llava.errors import ConfigError
from llava.generation.options import local_engine_of
from llava.imaging.geometry import MAX_PIXELS
from llava.serve.options import WITHOUT_EFFECT, checked_port, checked_url, url_of
from llava.utils.log import setup_logging
from llava.utils.lookup import require

if TYPE_CHECKING:
    from llava.generation.engine import LocalEngine
    from llava.serve.admission import Admission
    from llava.serve.answering import AnswerService
    from llava.serve.image_inputs import ImageLimits

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def warn_without_effect(args: argparse.Namespace) -> None:
    """Name the options without effect in one warning."""
    given = [f"--{name.replace('_', '-')}" for name in WITHOUT_EFFECT if getattr(args, name)]
    if given:
        logger.warning("without effect here: %s", ", ".join(given))


def run_worker(args: argparse.Namespace) -> int:
    """Serve the model that the options name until a signal; return the exit status.

    Raises:
        ConfigError: an option is wrong, or the port is taken.
        CheckpointError: the model cannot be loaded.
    """
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        require(package, "serve")
    from llava.serve.guards import gate_settings
    from llava.serve.heartbeat import Heart
    from llava.serve.listen import ServerRun, bind
    from llava.serve.worker import make_worker_app

    setup_logging()
    warn_without_effect(args)
    admission, images = _limits(args)
    # Bind the port first, so that a conflict is reported before a model is loaded for minutes.
    sockets = bind(args.host, checked_port(args.port))
    port = sockets[0].getsockname()[1]
    address = checked_url(args.worker_address or url_of(args.host, port), "--worker-address")
    controller = checked_url(args.controller_address, "--controller-address")
    settings = gate_settings(args, urls=[url_of(args.host, port), address], marks_audited=True)
    engine = in_ended_thread(lambda: _server_engine(args))
    service = _service(args, engine, admission, images)
    heart = None
    if not args.no_register:
        heart = Heart(controller, address, service.status, cluster_key=settings.cluster_key)
    run = ServerRun(
        make_worker_app(service, settings, engine.processor.tokenizer, origins=tuple(args.cors_origin)),
        admission,
        drain_seconds=args.drain_seconds,
        keys=settings.keys,
        fatal=lambda: "the model failed" if engine.driver.failure is not None else "",
        on_start=None if heart is None else heart.beat,
        on_drain=None if heart is None else heart.leave,
    )
    return run.run(sockets, url=url_of(args.host, port))


def in_ended_thread(function: Callable[[], Result]) -> Result:
    """Return the result of a function that runs in a thread of its own, which has ended."""
    # OpenMP keeps threads for each thread that has computed. With those of the thread that loads the model beside those
    # of the model's thread there are more than processors, and OpenMP then sleeps and wakes at every operator.
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(function).result()


def _limits(args: argparse.Namespace) -> tuple[Admission, ImageLimits]:
    """Return the limits of requests and images that the options set.

    Raises:
        ConfigError: one is out of range.
    """
    from llava.serve.admission import Admission
    from llava.serve.image_inputs import ImageLimits

    if not args.request_timeout > 0:
        raise ConfigError(f"--request-timeout is {args.request_timeout}; expected more than 0")
    images = ImageLimits(
        args.max_images,
        MAX_PIXELS if args.max_pixels is None else args.max_pixels,
        max_bytes=round(args.max_body_mb * (1 << 20)),
        url_prefixes=tuple(args.allow_image_url),
        folder=args.image_folder,
    )
    return Admission(max_running=args.max_running, max_waiting=args.max_waiting), images


def _server_engine(args: argparse.Namespace) -> LocalEngine:
    """Return the engine of the model, with its caches."""
    return local_engine_of(
        args,
        max_slots=args.max_running,
        num_gpus=args.num_gpus,
        prefill_chunk=args.prefill_chunk,
        prefix_cache_mb=args.prefix_cache_mb,
        share_prefix_cache=args.share_prefix_cache,
        kv_cache_mb=args.kv_cache_mb,
        is_fixed=True,
    )


def _service(args: argparse.Namespace, engine: LocalEngine, admission: Admission, images: ImageLimits) -> AnswerService:
    """Return the service of an engine."""
    from llava.serve.answering import AnswerService
    from llava.serve.worker import served_model

    return AnswerService(
        engine,
        served_model(engine, args.model, args.model_name),
        admission=admission,
        images=replace(images, dicom=engine.processor.dicom),
        request_seconds=args.request_timeout,
        logs_content=args.log_content,
    )
