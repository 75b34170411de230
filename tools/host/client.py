"""Talk to a running ComfyUI: queue a prompt, follow it on the WebSocket, fetch what it made.

Plain requests use the standard library; only following a prompt needs aiohttp, which every ComfyUI has.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Prompt = dict[str, dict[str, Any]]
ENDS = ("execution_success", "execution_error", "execution_interrupted")


def read_prompt(file: Path) -> Prompt:
    """A workflow in API form. ValueError for anything else, the form that the page saves above all."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        told = None
    nodes = told.values() if isinstance(told, dict) and told else [None]
    if not all(isinstance(node, dict) and "class_type" in node for node in nodes):
        got = (
            "a workflow as the page saves it"
            if isinstance(told, dict) and "nodes" in told
            else "something else"
        )
        raise ValueError(
            f"{file}: expected a workflow in API form, got {got}. Export it with File > Export (API), or take one of "
            "workflows/api."
        )
    return told


class PromptRefused(RuntimeError):
    """The host did not queue the prompt; `details` is its answer, with the errors of each node."""

    def __init__(self, details: dict[str, Any]) -> None:
        super().__init__(f"ComfyUI refused the prompt: {_refusal(details)}")
        self.details = details


class PromptFailed(RuntimeError):
    """A node raised; `details` holds node_type, exception_type, exception_message and traceback."""

    def __init__(self, details: dict[str, Any]) -> None:
        where, what = details.get("node_type"), details.get("exception_type")
        super().__init__(f"{where}: {what}: {str(details.get('exception_message')).strip()}")
        self.details = details


class PromptInterrupted(RuntimeError):
    """The prompt was stopped before its end."""


@dataclass(frozen=True)
class Event:
    """One message about a prompt: the host's name for it, its data, seconds since the prompt was sent.

    A preview picture has kind `preview`, and data with its length in `bytes`.
    """

    kind: str
    data: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class Result:
    """A prompt that ran: the outputs of its nodes by node id, every event on the way, its seconds."""

    prompt_id: str
    outputs: dict[str, Any]
    events: list[Event] = field(repr=False)
    seconds: float

    def images(self) -> list[dict[str, str]]:
        """The saved and previewed images of all nodes, as (filename, subfolder, type)."""
        return [image for output in self.outputs.values() for image in output.get("images", [])]


class ComfyClient:
    """The API of the host at `url`. One prompt at a time; `interrupt` and plain requests at any time."""

    def __init__(self, url: str, timeout: float = 300) -> None:
        self.url = url.rstrip("/")
        self.timeout = timeout  # seconds without a word from the host
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def get(self, path: str) -> Any:
        """GET a JSON answer."""
        return json.loads(self.fetch(path))

    def fetch(self, path: str) -> bytes:
        """GET any file that the host serves."""
        return self._request(path)

    def post(self, path: str, body: object) -> Any:
        """POST JSON; the JSON answer, or None where the host answers with nothing."""
        answer = self._request(path, json.dumps(body).encode())
        return json.loads(answer) if answer else None

    def view(self, image: dict[str, str]) -> bytes:
        """The bytes of one of `Result.images()`."""
        return self.fetch(f"/view?{urllib.parse.urlencode(image)}")

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """What the host remembers of a prompt that ended, or None."""
        return self.get(f"/history/{prompt_id}").get(prompt_id)

    def interrupt(self) -> None:
        """Stop the prompt that is running."""
        self.post("/interrupt", {})

    def queue(self, prompt: Prompt, client_id: str | None = None) -> str:
        """Queue a prompt in API form without waiting; returns its id.

        Raises PromptRefused, also when the host would run a part of it.
        """
        body = {"prompt": prompt, "client_id": client_id or uuid.uuid4().hex}
        try:
            answer = self.post("/prompt", body)
        except urllib.error.HTTPError as refusal:
            raise PromptRefused(json.loads(refusal.read())) from None
        if answer.get("node_errors"):
            self.post("/queue", {"delete": [answer["prompt_id"]]})
            raise PromptRefused(answer)
        return answer["prompt_id"]

    def events(self, prompt: Prompt) -> Iterator[Event]:
        """Queue a prompt and yield what the host says about it, to its end, however it ends."""
        loop, stream = asyncio.new_event_loop(), self._events(prompt)
        try:
            while (event := loop.run_until_complete(self._next(stream))) is not None:
                yield event
        finally:
            loop.run_until_complete(stream.aclose())
            loop.close()

    def run(self, prompt: Prompt, on_event: Callable[[Event], None] | None = None) -> Result:
        """Queue a prompt and wait for its end; raises PromptRefused, PromptFailed or PromptInterrupted."""
        events = []
        for event in self.events(prompt):
            events.append(event)
            if on_event:
                on_event(event)
        last = events[-1]
        if last.kind == "execution_error":
            raise PromptFailed(last.data)
        if last.kind == "execution_interrupted":
            raise PromptInterrupted(f"the prompt was interrupted in {last.data.get('node_type')}")
        prompt_id = last.data["prompt_id"]
        return Result(prompt_id, self._outputs(prompt_id), events, last.seconds)

    async def _events(self, prompt: Prompt) -> AsyncGenerator[Event, None]:
        import aiohttp

        client_id = uuid.uuid4().hex
        address = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={client_id}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            start = time.perf_counter()
            prompt_id = self.queue(prompt, client_id)
            kind = ""
            while kind not in ENDS:
                kind, data = _read(await socket.receive())
                if data.get("prompt_id", prompt_id) == prompt_id:
                    yield Event(kind, data, time.perf_counter() - start)

    async def _next(self, stream: AsyncGenerator[Event, None]) -> Event | None:
        try:
            return await asyncio.wait_for(anext(stream, None), self.timeout)
        except (asyncio.TimeoutError, TimeoutError):  # one class from Python 3.11 on
            raise TimeoutError(
                f"{self.url}: said nothing for {self.timeout} s while the prompt ran"
            ) from None

    def _outputs(self, prompt_id: str) -> dict[str, Any]:
        """The end is announced a moment before the history has it."""
        deadline = time.perf_counter() + 10
        while (entry := self.history(prompt_id)) is None and time.perf_counter() < deadline:
            time.sleep(0.02)
        if entry is None:
            raise RuntimeError(
                f"prompt {prompt_id}: ended, but the history of {self.url} has no entry for it"
            )
        return entry["outputs"]

    def _request(self, path: str, body: bytes | None = None) -> bytes:
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with self._open(request, timeout=self.timeout) as answer:
            return answer.read()


def _read(message: Any) -> tuple[str, dict[str, Any]]:
    """Kind and data of one WebSocket message."""
    if isinstance(message.data, bytes):
        return "preview", {"bytes": len(message.data)}
    if not isinstance(message.data, str):
        raise ConnectionError("ComfyUI closed the WebSocket before the prompt ended: did the server die?")
    parsed = json.loads(message.data)
    return parsed["type"], parsed.get("data") or {}


def _refusal(details: dict[str, Any]) -> str:
    """The host's reasons in one line: those of the nodes when it names any, else its own."""
    nodes = details.get("node_errors") or {}
    reasons = [
        f"{node.get('class_type')}: {error.get('message')} ({error.get('details')})"
        for node in nodes.values()
        for error in node.get("errors", [])
    ]
    error = details.get("error")
    return "; ".join(reasons) or (error.get("message") if isinstance(error, dict) else str(error))
