"""Worker in the manner of the originals: transformers' `generate`, one request at a time, streamed as SSE.

python -m benchmarks.serving_peer FOLDER PORT      FOLDER is an export with `--to hf`
"""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, TextIteratorStreamer


class OneAtATime:
    """Model that answers one request after another."""

    def __init__(self, folder: str) -> None:
        self.model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.lock = threading.Lock()

    def inputs(self, body: dict[str, Any]) -> Any:
        """Return the model's inputs for the messages of a chat completion."""
        messages = []
        for message in body["messages"]:
            parts = message["content"]
            if isinstance(parts, str):
                parts = [{"type": "text", "text": parts}]
            found = []
            for part in parts:
                if part["type"] == "image_url":
                    data = base64.b64decode(part["image_url"]["url"].split(",", 1)[1])
                    found.append({"type": "image", "image": Image.open(io.BytesIO(data)).convert("RGB")})
                else:
                    found.append(part)
            messages.append({"role": message["role"], "content": found})
        # One call for text and images, which alone knows whether the template writes the start token.
        return self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )

    def pieces(self, body: dict[str, Any]) -> Any:
        """Yield the text of the answer."""
        inputs = self.inputs(body)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        options = {"max_new_tokens": body["max_tokens"], "do_sample": False, "streamer": streamer}
        with self.lock, torch.no_grad():
            thread = threading.Thread(target=self.model.generate, kwargs={**inputs, **options})
            thread.start()
            yield from streamer
            thread.join()


def handler_of(model: OneAtATime) -> type[BaseHTTPRequestHandler]:
    """Return the handler of requests."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Write no log."""

        def do_GET(self) -> None:
            """Answer that the server is there."""
            self._start("application/json")
            self.wfile.write(b'{"data": []}')

        def do_POST(self) -> None:
            """Stream an answer."""
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._start("text/event-stream")
            for piece in model.pieces(body):
                chunk = {"choices": [{"index": 0, "delta": {"content": piece}}]}
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                self.wfile.flush()
            self.wfile.write(b"data: [DONE]\n\n")

        def _start(self, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()

    return Handler


def main() -> None:
    """Serve an exported model."""
    folder, port = sys.argv[1:]
    ThreadingHTTPServer.request_queue_size = 128
    ThreadingHTTPServer(("127.0.0.1", int(port)), handler_of(OneAtATime(folder))).serve_forever()


if __name__ == "__main__":
    main()
