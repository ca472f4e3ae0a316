"""A headless ComfyUI server: started on a free local port, spoken to over HTTP, then stopped."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import DevError

HOST = "127.0.0.1"
START_SECONDS = 300.0
STOP_SECONDS = 15.0
LAST_LINES = 12

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class WorkflowRejected(Exception):
    """The server did not accept a workflow; the message is one sentence per node."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def check_port(port: int) -> None:
    """Raise DevError if something listens on the port."""
    with socket.socket() as probe:
        if probe.connect_ex((HOST, port)) == 0:
            raise DevError(
                f"port {port} is in use", "give another one with --port, or none for a free one"
            )


def link_folder(target: Path, link: Path) -> None:
    """Make `link` show the folder `target`, also where symlinks need a privilege."""
    try:
        link.symlink_to(target, target_is_directory=True)
    except OSError:
        if os.name != "nt":
            raise
        junction = ["cmd", "/c", "mklink", "/J", str(link), str(target)]
        subprocess.run(junction, check=True, capture_output=True)


def make_base_directory(base: Path, packs: Mapping[str, Path]) -> None:
    """Lay out a ComfyUI base directory.

    Args:
        packs: name in custom_nodes -> folder to link there.
    """
    for part in ("models", "custom_nodes", "input", "output", "temp", "user"):
        (base / part).mkdir(parents=True, exist_ok=True)
    for name, folder in packs.items():
        link_folder(folder, base / "custom_nodes" / name)


def describe_rejection(body: dict[str, Any]) -> str:
    """What ComfyUI answers to a workflow it does not accept, as one sentence per node."""
    sentences = []
    for node_id, node in (body.get("node_errors") or {}).items():
        details = "; ".join(
            f"{error.get('message', '')}: {error.get('details', '')}".strip(": ")
            for error in node.get("errors", [])
        )
        sentences.append(f"node {node_id} ({node.get('class_type')}): {details}")
    if not sentences:
        error = body.get("error") or {}
        if isinstance(error, dict):
            error = f"{error.get('message', '')} {error.get('details', '')}"
        sentences.append(str(error).strip() or "no reason was given")
    return "the workflow was rejected: " + "; ".join(sentences)


class ComfyServer:
    """One server process; a context manager that stops what it started.

    Attributes:
        url: http address, without a slash at the end.
        base: the base directory, with models/, output/ and so on.
        log_path: where everything it prints goes.
    """

    def __init__(
        self,
        *,
        python: Path,
        comfyui: Path,
        base: Path,
        log_path: Path,
        cpu: bool,
        port: int | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        """
        Args:
            python: interpreter with ComfyUI's requirements.
            comfyui: folder with main.py.
            base: see make_base_directory.
            port: None for a free one.
            arguments: more of main.py's own.

        Raises:
            DevError: the port is in use.
        """
        if port is not None:
            check_port(port)
        self.port = port if port is not None else free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.base = base
        self.log_path = log_path
        self._comfyui = comfyui
        database = (base / "user" / "comfyui.db").as_posix()
        self._command = [
            *(str(python), "-u", str(comfyui / "main.py")),
            *("--listen", HOST, "--port", str(self.port), "--base-directory", str(base)),
            *("--database-url", f"sqlite:///{database}"),
            *("--disable-api-nodes", "--disable-auto-launch"),
            *(["--cpu"] if cpu else []),
            *arguments,
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, on_wait: Callable[[str], None] = lambda last_line: None) -> None:
        """Start the process and wait until it answers.

        Args:
            on_wait: called with the log's last line every now and then.

        Raises:
            DevError: it ended, or did not answer in START_SECONDS; with its last lines.
        """
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._comfyui,
                env=os.environ | {"PYTHONIOENCODING": "utf-8"},
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            code = self._process.poll()
            if code is not None:
                raise self._start_error(f"ComfyUI ended while starting (exit code {code})")
            if time.monotonic() > deadline:
                self.stop()
                raise self._start_error(f"ComfyUI did not answer in {START_SECONDS:.0f} s")
            on_wait(self.last_lines(1))
            time.sleep(0.3)

    def _answers(self) -> bool:
        try:
            self.get("/system_stats")
        except (OSError, ValueError):
            return False
        return True

    def _start_error(self, sentence: str) -> DevError:
        return DevError(
            f"{sentence}; its last lines were:\n{self.last_lines(LAST_LINES)}",
            f"read {self.log_path}, and run python dev.py setup if a module is missing",
        )

    def log_text(self) -> str:
        """Everything the server printed so far, without colours."""
        return _COLOURS.sub("", self.log_path.read_text(encoding="utf-8", errors="replace"))

    def last_lines(self, count: int) -> str:
        return "\n".join(self.log_text().strip().splitlines()[-count:])

    def get(self, path: str) -> Any:
        """GET a JSON document."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, body: Any) -> Any:
        """POST a JSON document; the JSON answer, None if it is empty."""
        request = urllib.request.Request(
            f"{self.url}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def submit(self, workflow: dict[str, Any], client_id: str) -> str:
        """Queue a workflow in API form.

        Returns:
            its prompt id.

        Raises:
            WorkflowRejected: an input is wrong or a node is missing.
        """
        try:
            answer = self.post("/prompt", {"prompt": workflow, "client_id": client_id})
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            raise WorkflowRejected(describe_rejection(json.loads(error.read()))) from None
        return str(answer["prompt_id"])

    def stop(self) -> None:
        """End the process that start() started."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> ComfyServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
