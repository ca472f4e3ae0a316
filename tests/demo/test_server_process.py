"""Starting and stopping a server process, also when it does not start."""

import socket
import sys
from pathlib import Path

import pytest

from devtools.errors import DevError
from devtools.server import (
    ComfyServer,
    describe_rejection,
    free_port,
    link_folder,
    make_base_directory,
)

ANSWERING = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{"ok": true}'
        self.send_response(200); self.end_headers(); self.wfile.write(body)
    def log_message(self, *args): pass
port = int(sys.argv[sys.argv.index("--port") + 1])
print("listening as", os.getpid(), "with", *sys.argv[1:], flush=True)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def server_of(tmp_path):
    """server_of(source, ...): a ComfyServer whose main.py is the given Python source."""
    servers = []

    def make(source, **options):
        comfyui = tmp_path / "ComfyUI"
        comfyui.mkdir(exist_ok=True)
        (comfyui / "main.py").write_text(source)
        server = ComfyServer(
            python=Path(sys.executable),
            comfyui=comfyui,
            base=tmp_path / "base",
            log_path=tmp_path / "logs" / "server.log",
            cpu=True,
            **options,
        )
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.stop()


def test_a_server_that_dies_at_the_start_shows_its_last_words(server_of):
    source = "import sys\nfor i in range(40): print('line', i)\nsys.exit('no module named spam')\n"
    server = server_of(source)
    with pytest.raises(DevError) as error:
        server.start()
    text = str(error.value)
    assert "ended while starting (exit code 1)" in text
    assert "no module named spam" in text and "line 39" in text
    assert "line 5\n" not in text
    assert str(server.log_path) in error.value.fix


def test_a_port_in_use_is_refused_before_anything_starts(server_of, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DevError, match=f"port {port} is in use") as error:
            server_of(ANSWERING, port=port)
    assert "--port" in error.value.fix


def test_start_waits_for_an_answer_and_stop_ends_the_process(server_of):
    with server_of(ANSWERING) as server:
        server.start()
        assert server.get("/anything") == {"ok": True}
        process = server._process
        assert process.poll() is None
    assert process.poll() is not None
    with pytest.raises(OSError):
        server.get("/anything")


def test_a_server_that_ignores_the_polite_signal_is_killed(server_of, monkeypatch):
    monkeypatch.setattr("devtools.server.STOP_SECONDS", 0.5)
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + ANSWERING
    server = server_of(stubborn)
    server.start()
    server.stop()
    assert server._process.poll() is not None


def test_the_server_listens_to_this_machine_only_and_keeps_its_files_in_the_base(server_of):
    with server_of(ANSWERING, arguments=["--extra"]) as server:
        server.start()
        said = server.log_text()
    assert "--listen 127.0.0.1" in said and "--cpu" in said and "--extra" in said
    assert f"--base-directory {server.base}" in said
    assert f"sqlite:///{server.base.as_posix()}/user/comfyui.db" in said


def test_free_ports_are_free():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))


def test_a_base_directory_links_the_packs_by_name(tmp_path):
    pack = tmp_path / "some-clone"
    pack.mkdir()
    (pack / "__init__.py").write_text("x = 1\n")
    make_base_directory(tmp_path / "base", {"sparse_video_attention": pack})
    linked = tmp_path / "base" / "custom_nodes" / "sparse_video_attention" / "__init__.py"
    assert linked.read_text() == "x = 1\n"
    assert {p.name for p in (tmp_path / "base").iterdir()} >= {"models", "output", "input"}


def test_a_link_shows_later_changes(tmp_path):
    (tmp_path / "real").mkdir()
    link_folder(tmp_path / "real", tmp_path / "link")
    (tmp_path / "real" / "new").touch()
    assert (tmp_path / "link" / "new").exists()


REJECTIONS = {
    "value": (
        {
            "node_errors": {
                "5": {
                    "class_type": "PatchRadialAttention",
                    "errors": [
                        {
                            "message": "Value 500 bigger than max of 100",
                            "details": "dense_timesteps",
                        }
                    ],
                }
            }
        },
        "node 5 (PatchRadialAttention): Value 500 bigger than max of 100: dense_timesteps",
    ),
    "missing-node": (
        {"error": {"message": "Node 'X' not found.", "details": ""}, "node_errors": {}},
        "Node 'X' not found.",
    ),
    "no-reason": ({}, "no reason was given"),
}


@pytest.mark.parametrize(("body", "said"), REJECTIONS.values(), ids=REJECTIONS)
def test_a_rejected_workflow_is_one_line(body, said):
    text = describe_rejection(body)
    assert text.startswith("the workflow was rejected: ") and said in text
    assert "\n" not in text
