"""What is said of servers that are not there, are no rollout servers or do not fit, over a real connection."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from megatron_nsr.platform.distributed import free_port
from megatron_nsr.rollout.server_check import Needed, check_servers
from megatron_nsr.rollout.server_client import Server
from megatron_nsr.rollout.server_worker import FILE_TRANSPORT
from megatron_nsr.types import UserError

MODEL = {"hidden_size": 64, "num_hidden_layers": 2, "initializer_range": 0.02}
NEEDED = Needed(transport=FILE_TRANSPORT, dtype="float32", quantization=None, workers=2, max_model_len=64, model=MODEL)
DESCRIBED = {
    "transport": FILE_TRANSPORT, "dtype": "float32", "logits": "float32", "quantization": None, "max_model_len": 64,
    "logprobs_mode": "processed_logprobs", "model": MODEL, "names": ["a", "b"],
}  # fmt: skip
Serve = Callable[..., Server]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server that describes itself so, or answers everything with a status."""
    running: list[ThreadingHTTPServer] = []

    def start(workers: int = 2, status: int = 200, sees: bool = True, **description: Any) -> Server:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                own = {"identity": str(self.server.server_address)}
                result = {"nsr_describe": DESCRIBED | own | description, "nsr_sees": {"sees": sees}}[asked["method"]]
                body = json.dumps({"results": [result] * workers} if status == 200 else {"detail": "no such path"}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None: ...

        running.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return named(running[-1].server_port, len(running) - 1)

    yield start
    for server in running:
        server.shutdown()


def named(port: int, index: int = 0) -> Server:
    url = f"http://127.0.0.1:{port}"
    return Server(url, f"rollout.servers[{index}]={url}")


def refusal(*servers: Server, timeout_s: float = 0.0) -> str:
    with pytest.raises(UserError) as refused:
        check_servers(servers, NEEDED, timeout_s)
    return str(refused.value)


def test_servers_that_fit_tell_the_names_of_their_weights(serve: Serve) -> None:
    assert check_servers([serve(), serve(max_model_len=65)], NEEDED, 0.0) == {"a", "b"}


def test_what_sampling_does_not_depend_on_may_differ(serve: Serve) -> None:
    assert check_servers([serve(model=MODEL | {"initializer_range": 0.1})], NEEDED, 0.0)


def test_a_server_under_two_names_is_refused(serve: Serve) -> None:
    server = serve()
    again = Server(server.url.replace("127.0.0.1", "localhost"), "rollout.servers[1]")
    assert refusal(server, again) == f"{server.name} and rollout.servers[1] are the same server; name it once"


def test_a_server_that_is_not_there_is_waited_for_and_named(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    missing = named(free_port(), 1)
    message = refusal(serve(), missing, timeout_s=0.2)
    assert message.startswith(f"{missing.name}: ClientConnectorError")
    assert message.endswith("there is no server: start it with `megatron-nsr serve CONFIG --port PORT`, or correct the address")
    assert capsys.readouterr().out == f"{missing.name}: waiting for it, up to 0.2 s ...\n"


def test_another_kind_of_server_is_told_from_one_that_is_not_there(serve: Serve) -> None:
    message = refusal(serve(status=404), timeout_s=60)
    assert "POST /collective_rpc gave status 404" in message and "this is no rollout server: start it with" in message


@pytest.mark.parametrize(
    ("description", "said"),
    [
        ({"dtype": "bfloat16"}, "model.dtype bfloat16, not float32"),
        ({"logits": "bfloat16"}, "logits bfloat16, not float32"),
        ({"quantization": "fp8_per_channel"}, "rollout.quantization fp8_per_channel, not None"),
        ({"workers": 1}, "rollout.tensor_parallel 1, not 2"),
        ({"max_model_len": 63}, "room for 63 tokens, not 64"),
        ({"logprobs_mode": "raw_logprobs"}, "logprobs_mode raw_logprobs, not processed_logprobs"),
        ({"transport": "nccl"}, f"weight transfer backend nccl, not {FILE_TRANSPORT}"),
        ({"model": MODEL | {"hidden_size": 32}}, "the model's hidden_size 32, not 64"),
    ],
)
def test_a_server_of_another_config_is_refused(serve: Serve, description: dict[str, Any], said: str) -> None:
    server = serve(**description)
    assert refusal(server) == f"{server.name}: it was started with {said}; start it with this run's config"


def test_every_difference_is_named(serve: Serve) -> None:
    assert "model.dtype bfloat16, not float32, room for 1 tokens, not 64;" in refusal(serve(dtype="bfloat16", max_model_len=1))


def test_a_temporary_directory_that_takes_no_file_is_named(serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    assert refusal(serve()).startswith("TMPDIR, through which weights travel without CUDA, cannot be written: ")


def test_a_server_that_does_not_see_the_trainer_s_files_is_refused(serve: Serve) -> None:
    assert "set TMPDIR to a folder that both hosts share" in refusal(serve(sees=False))
