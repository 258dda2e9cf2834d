"""Registration of a worker with its controller, in a task that a dead controller cannot block."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import httpx2

from llava.serve.client import client_headers
from llava.serve.gate import AUDITED_HEADER

logger = logging.getLogger(__name__)

BEAT_SECONDS = 15.0
RETRY_SECONDS = 3.0
"""Delay before a controller that did not answer is retried."""

ANSWER_SECONDS = 5.0


class Heart:
    """Registration and heartbeats of one worker."""

    def __init__(
        self, controller: str, worker: str, status: Callable[[], dict[str, Any]], *, cluster_key: str = ""
    ) -> None:
        """Register the worker at URL `worker` with the controller at URL `controller`; nothing is sent yet."""
        self.controller = controller
        self.worker = worker
        self.status = status
        self.cluster_key = cluster_key
        self.is_registered = False
        self._has_left = False
        self._beating = asyncio.Lock()
        self._has_complained = False

    async def beat(self) -> None:
        """Register and report every `BEAT_SECONDS`, until canceled or until the worker leaves."""
        async with self._client() as http:
            while not self._has_left:
                try:
                    async with self._beating:
                        await self._beat_once(http)
                    wait = BEAT_SECONDS
                except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
                    self._complain(f"{type(error).__name__}")
                    self.is_registered = False
                    wait = RETRY_SECONDS
                await asyncio.sleep(wait)

    async def leave(self) -> None:
        """Tell the controller that the worker takes no more requests; no later beat registers it again."""
        self._has_left = True
        try:
            # A registration that is on its way must not arrive after the farewell.
            async with self._beating, self._client() as http:
                await self._post(http, "/unregister_worker", {"worker_name": self.worker})
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError):
            return  # it drops workers that cannot be reached

    async def _beat_once(self, http: httpx2.AsyncClient) -> None:
        if self.is_registered:
            body = {"worker_name": self.worker, "queue_length": self.status()["queue_length"]}
            found = await self._post(http, "/receive_heart_beat", body)
            self.is_registered = isinstance(found, dict) and found.get("exist") is True
        if not self.is_registered and not self._has_left:
            body = {"worker_name": self.worker, "check_heart_beat": True, "worker_status": self.status()}
            await self._post(http, "/register_worker", body)
            self.is_registered = True
            self._has_complained = False
            logger.info("registered with the controller at %s", self.controller)

    async def _post(self, http: httpx2.AsyncClient, path: str, body: dict[str, Any]) -> Any:
        response = await http.post(self.controller + path, json=body)
        if response.status_code != 200:
            raise ValueError(f"status {response.status_code}")
        return response.json()

    def _client(self) -> httpx2.AsyncClient:
        headers = {**client_headers(self.cluster_key), AUDITED_HEADER: "1"}
        return httpx2.AsyncClient(headers=headers, timeout=ANSWER_SECONDS, trust_env=False)

    def _complain(self, reason: str) -> None:
        if not self._has_complained:
            logger.warning("the controller at %s does not accept this worker (%s); retrying", self.controller, reason)
            self._has_complained = True
