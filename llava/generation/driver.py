"""Driver: sole owner of a model; accepts work from any thread and reports progress.

    submit --limits, reading in a small pool--> inbox --owner: between two steps--> Scheduler --> handles
    run, call (a batch, a row of scores)  ----> inbox

Only the owner touches the scheduler and the model, one step at a time. The owner is a thread that lives while there is
work (and `LINGER` seconds longer), or, while no thread runs, the caller of a batch: then a batch needs no other thread.
Clients never compute, so one that stops reading costs the others nothing.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch

from llava.errors import ConfigError, GenerationError
from llava.generation.answering_mode import AnsweringMode
from llava.generation.failures import named, refusal
from llava.generation.handle import Handle
from llava.generation.protocol import Prompt, Sampling
from llava.generation.request import Request
from llava.generation.scheduler import Scheduler

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

LINGER = 1.0
"""Seconds that the thread waits for more work before it ends and idle memory is released."""

NUM_READERS = 2
"""Threads that read prompts: they tokenize, decode images and compute hashes."""


class Driver:
    """Owner of a model; all methods may be called from any thread.

    Attributes:
        failure: the last error of the model itself, which ended all requests; None while there was none.
        last_step: when the last step ended, or work began after a pause, by `time.monotonic`.
        num_steps: steps so far.
        on_step: called in the owner's thread with the seconds of each step; it must return at once.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        model: Any,
        make_requests: Callable[[Prompt, Sampling, str], list[Request]],
        *,
        is_fixed: bool = False,
    ) -> None:
        """Create a driver that owns a scheduler.

        Args:
            scheduler: used by nothing else.
            model: its model.
            make_requests: reads a prompt and returns its requests: `Sampling.n` of them, or one for equal answers; the
                last argument is the caller's key.
            is_fixed: the modules of the model never change.
        """
        self.scheduler = scheduler
        self.model = model
        self.make_requests = make_requests
        self.is_fixed = is_fixed
        self.failure: Exception | None = None
        self.last_step = time.monotonic()
        self.num_steps = 0
        self.on_step: Callable[[float], None] = lambda seconds: None
        self._mode: AnsweringMode | None = None
        self._is_idle = True
        self._owner = threading.Lock()
        self._inbox: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._readers: ThreadPoolExecutor | None = None
        self._refusal: str | None = None
        self._handles: set[Handle] = set()
        _drivers.add(self)

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return len(self.scheduler.running)

    @property
    def num_unfinished(self) -> int:
        """Submitted prompts that wait, are read or are answered."""
        return len(self._handles)

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the keys and values of running sequences."""
        return self.scheduler.kv_cache_bytes

    @property
    def prefix_cache_bytes(self) -> int:
        """Bytes of the cached keys and values of earlier prompts and answers."""
        return self.scheduler.prefix_cache_bytes

    def submit(
        self, prompt: Prompt, sampling: Sampling, *, key: str = "", notify: Callable[[], None] | None = None
    ) -> Handle:
        """Queue a prompt and return its handle at once.

        Whatever is wrong with the prompt ends its own answers with finish `error`, in an event, and no others.

        Args:
            prompt: the prompt.
            sampling: how it is answered; `n` answers share the prompt.
            key: who asks; what is kept of a prompt serves prompts with the same key only, unless the engine shares it.
            notify: called in the model's thread when there is news after a time without any (not once per token, if
                the client is slower); it must return at once. For asyncio:
                `lambda: loop.call_soon_threadsafe(event.set)`.

        Raises:
            ConfigError: `sampling` asks for a beam search.
            GenerationError: the driver takes no more prompts, see `close`.
        """
        if sampling.num_beams != 1:
            raise ConfigError(f"a submitted prompt needs num_beams=1, got {sampling.num_beams}; use generate")
        handle = Handle(sampling.n, self._cancel_handle, notify)
        with self._changed:
            if self._refusal is not None:
                raise GenerationError(self._refusal)
            if self._readers is None:
                self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="read-prompt")
            self._handles.add(handle)
            self._readers.submit(self._read, handle, prompt, sampling, key)
        return handle

    def run(self, requests: Sequence[Request]) -> None:
        """Answer requests and return when they are over; cancel them if the caller is interrupted.

        Raises:
            GenerationError: the model failed; states the reason.
        """
        if not requests:
            return
        batch = _Batch(requests)
        self._put(lambda: self.scheduler.add(requests))
        try:
            self._drive(batch.is_over, batch.done)
        finally:
            left = [request for request in requests if not request.is_over]
            if left:
                self.cancel(left)
        failed = next((request for request in requests if request.cause is self.failure is not None), None)
        if failed is not None and failed.completion is not None:
            raise GenerationError(str(failed.completion.error)) from self.failure

    def call(self, function: Callable[[], Result]) -> Result:
        """Run a function that uses the model between two steps, and return its result."""

        def answering() -> Result:
            with AnsweringMode(self.model).entered():
                return function()

        return self._between_steps(answering)

    def cancel(self, requests: Sequence[Request]) -> None:
        """Drop requests; return when their slots are free."""
        self._between_steps(lambda: self._drop(requests))

    def _between_steps(self, function: Callable[[], Result]) -> Result:
        done = threading.Event()
        results: list[Result] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                results.append(function())
            except BaseException as error:
                errors.append(error)
            finally:
                done.set()

        self._put(work)
        self._drive(done.is_set, done)
        if errors:
            raise errors[0]
        return results[0]

    def close(self, reason: str = "the engine takes no more prompts", timeout: float | None = None) -> bool:
        """Refuse new prompts and wait for running ones; return False if some still run after `timeout`.

        Those that still run end with the reason.
        """
        limit = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._refusal = reason
            self._changed.wait_for(lambda: not self._handles, None if limit is None else limit - time.monotonic())
            left = list(self._handles)
        for handle in left:
            handle.failed(reason)
            self._cancel_handle(handle)
        return not left

    def _read(self, handle: Handle, prompt: Prompt, sampling: Sampling, key: str) -> None:
        """Read a prompt in the pool, then queue its requests."""
        if handle.is_over:
            self._forget(handle)
            return
        try:
            requests = self.make_requests(prompt, sampling, key)
            for request in requests:
                request.listener = partial(self._heard, handle)
            handle.started(requests)
        except Exception as error:
            self._forget(handle)
            handle.failed(refusal(error), error)
            return
        self._put(lambda: self.scheduler.add([] if handle.is_over else requests))
        self._start()

    def _cancel_handle(self, handle: Handle) -> None:
        self._forget(handle)
        self._put(lambda: self._drop(handle.requests))
        self._start()

    def _drop(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if not request.is_over:
                self.scheduler.cancel(request)

    def _heard(self, handle: Handle, request: Request) -> None:
        if handle.is_over:
            self._forget(handle)
        handle.heard(request)

    def _forget(self, handle: Handle) -> None:
        with self._changed:
            self._handles.discard(handle)
            self._changed.notify_all()

    def _put(self, work: Callable[[], None]) -> None:
        with self._changed:
            self._inbox.append(work)
            self._changed.notify_all()

    def _drive(self, is_over: Callable[[], bool], done: threading.Event) -> None:
        """Step as owner until a request ends, or wait for the current owner."""
        if not self._owner.acquire(blocking=False):
            self._start()
            done.wait()
            return
        try:
            while not is_over():
                self._turn()
        finally:
            self._owner.release()

    def _start(self) -> None:
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="model", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        device = getattr(self.model, "device", None)
        if device is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has its own current device
        try:
            while self._serve_until_idle():
                pass
        except BaseException as error:  # a bug in this module: no client may wait for a thread that has ended
            logger.critical("the model's thread ended", exc_info=error)
            self.failure = error if isinstance(error, Exception) else RuntimeError(named(error))
            for handle in list(self._handles):
                handle.failed(f"the model's thread ended: {named(error)}", self.failure)
            raise
        finally:
            with self._changed:
                if self._thread is threading.current_thread():
                    self._thread = None

    def _serve_until_idle(self) -> bool:
        """Work until idle for some time; return whether new work arrived at the last moment."""
        with self._owner:
            while self._turn():
                pass
        with self._changed:
            has_news = self._changed.wait_for(lambda: bool(self._inbox) or _is_exiting(), LINGER)
        if not has_news:
            with self._owner:
                self.scheduler.release_idle()
        with self._changed:
            if self._inbox and not _is_exiting():
                return True
            self._thread = None
            return False

    def _turn(self) -> bool:
        """Take the inbox, run one step and tell the listeners; return whether there may be more to do."""
        with self._changed:
            work, self._inbox = self._inbox, deque()
        for one in work:
            self._guarded(one)
        has_work = self.scheduler.has_work
        if has_work:
            self._guarded(self._step)
        if not self.scheduler.has_work:
            self._is_idle = True
            if not self.is_fixed:
                self._mode = None  # the modules of the model may change while nothing runs
        self._publish()
        return has_work and not _is_exiting()

    def _guarded(self, action: Callable[[], None]) -> None:
        """Run an action; an error that the scheduler does not attribute to one request ends all of them."""
        try:
            action()
        except Exception as error:
            logger.error("the model failed; all requests end", exc_info=error)
            self.failure = error
            self.scheduler.fail_all(f"the model failed: {named(error)}", error)

    def _step(self) -> None:
        if self._mode is None:
            self._mode = AnsweringMode(self.model)
        if self._is_idle:
            self._is_idle, self.last_step = False, time.monotonic()
        start = time.perf_counter()
        with self._mode.entered():
            self.scheduler.read()
            self._publish(also_ended=False)  # a first token need not wait for the others' next ones
            self.scheduler.decode()
        self.last_step = time.monotonic()
        self.num_steps += 1
        self.on_step(time.perf_counter() - start)

    def _publish(self, *, also_ended: bool = True) -> None:
        """Tell the listeners of all requests that were changed, once each."""
        # Completions are reported after the step, when the model is in its own mode again.
        changed = dict.fromkeys(self.scheduler.changed)
        now = [request for request in changed if also_ended or not request.is_over]
        self.scheduler.changed = [] if also_ended else [request for request in changed if request.is_over]
        for request in now:
            if request.listener is None or request.is_cancelled:
                continue
            try:
                request.listener(request)
            except Exception:
                logger.exception("a listener failed")


class _Batch:
    """Requests with a waiting caller."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.num_left = len(requests)
        self.done = threading.Event()
        for request in requests:
            request.listener = self.heard

    def is_over(self) -> bool:
        return self.num_left == 0

    def heard(self, request: Request) -> None:
        if request.is_over:
            self.num_left -= 1
            if self.num_left == 0:
                self.done.set()


_drivers: weakref.WeakSet[Driver] = weakref.WeakSet()
_exiting = threading.Event()


def _is_exiting() -> bool:
    return _exiting.is_set()


def _stop_threads() -> None:
    """Stop the threads before the interpreter exits: one inside the model would crash it."""
    _exiting.set()
    for driver in list(_drivers):
        thread = driver._thread
        with driver._changed:
            driver._changed.notify_all()
        if thread is not None:
            thread.join(timeout=30)


atexit.register(_stop_threads)
