"""One workflow through a running ComfyUI: submitted, followed over its websocket, timed."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import websocket

from devtools.errors import DevError
from devtools.server import ComfyServer

from .workflow import Workflow

# Between two messages: one step of a large model on a slow machine.
SILENCE_SECONDS = 1800.0


@dataclass(frozen=True)
class RunResult:
    """What a workflow left.

    Attributes:
        seconds: the whole run.
        sampler_seconds: the sampler nodes alone.
        files: paths of what the output nodes wrote, by node id.
        log: what the server printed meanwhile.
    """

    seconds: float
    sampler_seconds: float
    files: dict[str, list[Path]]
    log: str


def _output_files(server: ComfyServer, outputs: dict[str, Any]) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for node, kinds in outputs.items():
        for entries in kinds.values():
            for entry in entries:
                if isinstance(entry, dict) and entry.get("type") == "output":
                    path = server.base / "output" / entry["subfolder"] / entry["filename"]
                    files.setdefault(node, []).append(path)
    return files


def run_workflow(
    server: ComfyServer,
    workflow: Workflow,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> RunResult:
    """Submit a workflow and wait for its end.

    Args:
        on_step: called with (finished, all) steps of a sampler.

    Raises:
        WorkflowRejected: an input is wrong or a node is missing.
        DevError: a node failed.
    """
    samplers = workflow.samplers
    client = uuid.uuid4().hex
    log_start = len(server.log_text())
    socket = websocket.create_connection(
        f"ws://{server.url.removeprefix('http://')}/ws?clientId={client}", timeout=SILENCE_SECONDS
    )
    try:
        started = time.perf_counter()
        prompt_id = server.submit(workflow.nodes, client)
        sampler_started, sampler_seconds = started, 0.0
        running: str | None = None
        while True:
            message = socket.recv()
            if isinstance(message, bytes):  # a preview picture
                continue
            event = json.loads(message)
            kind, data = event["type"], event.get("data", {})
            if data.get("prompt_id") not in (None, prompt_id):
                continue
            if kind == "executing":
                now = time.perf_counter()
                if running in samplers:
                    sampler_seconds += now - sampler_started
                running, sampler_started = data["node"], now
                if running is None:
                    break
            elif kind == "progress" and running in samplers:
                on_step(data["value"], data["max"])
            elif kind == "execution_error":
                node = f"{data.get('node_type')} (node {data.get('node_id')})"
                raise DevError(
                    f"{node} failed: {str(data.get('exception_message')).strip()}",
                    f"read {server.log_path}",
                )
            elif kind == "execution_interrupted":
                raise DevError("the run was interrupted", "run it again")
        seconds = time.perf_counter() - started
    finally:
        socket.close()
    outputs = server.get(f"/history/{prompt_id}")[prompt_id]["outputs"]
    log = server.log_text()[log_start:]
    return RunResult(seconds, sampler_seconds, _output_files(server, outputs), log)
