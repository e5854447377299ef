"""The process of a rollout server: it says when it listens, and leaves nothing behind when it is killed."""

from __future__ import annotations

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType
from typing import Any, ClassVar

import pytest

from megatron_nsr.rollout import api_server
from megatron_nsr.rollout.vllm_options import check_head_size
from megatron_nsr.types import UserError


class Waking(BaseHTTPRequestHandler):
    """Is not ready when it is asked first."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(503 if len(self.asked) == 1 else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


def test_one_line_says_when_it_listens(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(api_server, "PAUSE_S", 0.0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Waking)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    api_server.tell_when_ready("0.0.0.0", server.server_port, "models/base")
    server.shutdown()
    assert Waking.asked == ["/health", "/health"]
    ready = "ready, models/base; its weights come from a trainer (rollout.mode=server)"
    assert capsys.readouterr().out == f"http://0.0.0.0:{server.server_port}: {ready}\n"


# A process that starts another as multiprocessing's `spawn` does: with the main module under the name __mp_main__. Each line is one
# write: unbuffered, as PYTHONUNBUFFERED has it, `print` makes two, and those of the two processes may mix.
PARENT = r"""
import subprocess, sys
code = "import os, runpy, time; runpy.run_module('megatron_nsr.rollout.api_server', run_name='__mp_main__'); "
code += "child = os.fork(); os.write(1, b'forked\\n' if child == 0 else b'spawned\\n'); time.sleep(600)"
subprocess.run([sys.executable, "-c", code])
"""


def test_what_it_starts_dies_with_it() -> None:
    """All three hold the pipe: its end is read when the last of them is gone."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert {parent.stdout.readline(), parent.stdout.readline()} == {"forked\n", "spawned\n"}
    parent.kill()
    assert parent.stdout.read() == ""
    parent.wait()


def test_a_head_size_that_vllm_has_no_kernel_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backends: Any = ModuleType("vllm.v1.attention.backends.cpu_attn")
    backends.CPUAttentionBackend = type("Backend", (), {"get_supported_head_sizes": staticmethod(lambda: [32, 64])})
    monkeypatch.setitem(sys.modules, backends.__name__, backends)
    check_head_size(64)
    with pytest.raises(UserError, match=r"^model.path: config.json: head_dim=16 .* with heads of 32, 64 only$"):
        check_head_size(16)
