"""The two commands: what they refuse, with which status, and that nothing is left half-made."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from megatron_nsr.config import ParallelConfig
from megatron_nsr.conversion.importing import import_hf
from megatron_nsr.conversion.logits import relative_error
from megatron_nsr.training.checkpoint_files import RUN_FILE
from tests.tiny_models import tiny_config, tiny_model
from tools import convert_checkpoint, verify_checkpoint

REPOSITORY = Path(__file__).resolve().parents[3]
LAYER = "model.layers.3.mlp.up_proj.weight"


def run(tool: str, *arguments: object, file_limit: int | None = None, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """The tool in a process of its own, or in several under torchrun. file_limit: bytes beyond which the system lets no file grow."""

    def limit() -> None:
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, str(REPOSITORY / "tools" / f"{tool}.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, preexec_fn=limit, timeout=300)


def convert(*arguments: object) -> Result:
    """tools/convert_checkpoint.py in this process, which is faster."""
    return CliRunner().invoke(convert_checkpoint.app, [str(argument) for argument in arguments])


def verify(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(verify_checkpoint.verify)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "model"
    tiny_model(tiny_config("qwen2", tied=False)).save_pretrained(path)
    return path


@pytest.fixture
def source(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    import_hf(original, tmp_path / "checkpoint", ParallelConfig(tensor=2))
    return tmp_path / "checkpoint"


def change(source: Path, name: str, value: torch.Tensor | None) -> None:
    """Puts another tensor in a model's file, or takes one out."""
    tensors = load_file(source / "model.safetensors")
    tensors.pop(name, None)
    save_file(tensors if value is None else {**tensors, name: value}, source / "model.safetensors", metadata={"format": "pt"})


def configure(source: Path, **values: object) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | values))


BROKEN = {
    "missing": (lambda source: change(source, LAYER, None), f"no tensor {LAYER}"),
    "unknown": (lambda source: change(source, "visual.weight", torch.zeros(2)), "tensor visual.weight is no part of a qwen2 model"),
    "dtype": (lambda source: change(source, LAYER, torch.zeros(96, 64, dtype=torch.int8)), f"tensor {LAYER} has dtype I8"),
    "mixed": (lambda source: change(source, LAYER, torch.zeros(96, 64).bfloat16()), f"tensor {LAYER} has dtype BF16, but"),
    "config": (lambda source: configure(source, intermediate_size=128), "has shape (96, 64), config.json asks for (128, 64)"),
    "layers": (
        lambda source: configure(source, num_hidden_layers=2),
        "source: tensors model.layers.2.input_layernorm.weight and 23 more are no",
    ),
    "tied": (
        lambda source: configure(source, tie_word_embeddings=True),
        "source: config.json says tie_word_embeddings=true, but tensor lm_head.weight is not model.embed_tokens.weight: set tie",
    ),
    "family": (lambda source: configure(source, model_type="mamba"), "model_type='mamba' is not supported"),
    "truncated": (lambda source: os.truncate(source / "model.safetensors", 100_000), "model.safetensors is damaged or cut short"),
    "no_file": (lambda source: (source / "model.safetensors").unlink(), "no file model.safetensors"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_source_is_named_and_leaves_nothing(source: Path, tmp_path: Path, case: str) -> None:
    damage, message = BROKEN[case]
    damage(source)
    found = convert("import", source, tmp_path / "out")
    assert found.exit_code == 2, found.stderr
    assert message in found.stderr and len(found.stderr.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_layout_that_does_not_fit(source: Path, tmp_path: Path) -> None:
    found = convert("import", source, tmp_path / "out", "--pipeline", 3)
    assert found.exit_code == 2 and found.stderr == "--pipeline=3 does not divide num_hidden_layers=4\n"
    found = convert("import", source, tmp_path / "out", "--virtual", 2)
    assert found.exit_code == 2 and found.stderr == "--virtual=2 needs --pipeline of 2 or more, not 1\n"


def test_a_tied_model_s_equal_head_is_a_copy_and_another_one_is_refused_by_verify_too(source: Path, tmp_path: Path) -> None:
    configure(source, tie_word_embeddings=True)
    embedding = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    embedding[0, 0] = torch.nan  # equal to itself
    change(source, "model.embed_tokens.weight", embedding)
    change(source, "lm_head.weight", embedding.clone())
    assert convert("import", source, tmp_path / "out").exit_code == 0 and verify(tmp_path / "out", source).exit_code == 0
    change(source, "lm_head.weight", embedding + 1)
    found = verify(tmp_path / "out", source)
    assert found.exit_code == 2 and "tensor lm_head.weight is not model.embed_tokens.weight" in found.stderr


def test_a_checkpoint_is_not_imported_again(checkpoint: Path, tmp_path: Path) -> None:
    found = convert("import", checkpoint, tmp_path / "out")
    assert found.exit_code == 2 and "checkpoint: already a checkpoint" in found.stderr and not (tmp_path / "out").exists()


def test_weights_without_a_tokenizer_are_said_to_be_no_model_path(source: Path, tmp_path: Path) -> None:
    assert "weights without a tokenizer" in convert("import", source, tmp_path / "out").stdout
    (source / "tokenizer.json").write_text("{}")
    assert convert("import", source, tmp_path / "with").stdout == ""


def test_a_checkpoint_of_other_sizes_than_its_config_names_both(checkpoint: Path, tmp_path: Path) -> None:
    text = (checkpoint / "config.json").read_text()
    (checkpoint / "config.json").write_text(text.replace('"num_hidden_layers": 4', '"num_hidden_layers": 8'))
    description = json.loads((checkpoint / RUN_FILE).read_text())
    description["files"]["config.json"] = len((checkpoint / "config.json").read_text())
    (checkpoint / RUN_FILE).write_text(json.dumps(description))
    found = convert("export", checkpoint, tmp_path / "out")
    assert found.exit_code == 2 and "has shape (4, 64), but config.json asks for (8, 64)" in found.stderr


def test_help_is_for_users() -> None:
    assert "May import" not in convert("--help").stdout


def test_an_existing_target_is_not_touched(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    for arguments in (("import", source), ("export", checkpoint)):
        found = convert(*arguments, tmp_path / "out")
        assert found.exit_code == 2 and "out: already there" in found.stderr
    assert (tmp_path / "out" / "mine").read_text() == "keep" and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_full_disk_is_called_so_and_the_next_call_goes_on(source: Path, checkpoint: Path, tmp_path: Path, command: str) -> None:
    """The system refuses to let files grow; unlike a small disk, that needs no rights."""
    arguments = (command, source if command == "import" else checkpoint, tmp_path / "out")
    found = run("convert_checkpoint", *arguments, file_limit=60_000)
    assert found.returncode == 1, found.stderr
    (line,) = [line for line in found.stderr.splitlines() if "not written" in line]
    assert "File too large" in line and "give the same command again" in line and "Traceback" not in found.stderr
    assert not (tmp_path / "out").exists()
    assert convert(*arguments).exit_code == 0
    whole = checkpoint if command == "export" else tmp_path / "out"
    assert verify(whole, source).exit_code == 0
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("damage", ["cut", "gone", "index", "none"])
def test_a_broken_checkpoint_is_named(checkpoint: Path, tmp_path: Path, damage: str) -> None:
    file = checkpoint / "state" / "__1_2.distcp"
    messages = {
        "cut": (lambda: os.truncate(file, 1000), "state/__1_2.distcp has 1000 bytes"),
        "gone": (lambda: file.unlink(), "state/__1_2.distcp is missing"),
        "index": (lambda: (checkpoint / "state" / ".metadata").write_bytes(b""), "state/.metadata has 0 bytes"),
        "none": (lambda: (checkpoint / RUN_FILE).unlink(), "not a checkpoint"),
    }
    harm, message = messages[damage]
    harm()
    found = convert("export", checkpoint, tmp_path / "out")
    assert found.exit_code == 2 and message in found.stderr and "latest" not in found.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_verify_says_equal_different_and_wrong_input(checkpoint: Path, source: Path, tmp_path: Path) -> None:
    equal = verify(checkpoint, source, "--logits")
    assert equal.exit_code == 0 and equal.stdout.rstrip().endswith("equal") and "logits differ by" in equal.stdout
    change(source, LAYER, torch.ones(96, 64))
    different = verify(checkpoint, source)
    assert different.exit_code == 1 and f"{LAYER}: " in different.stdout
    configure(source, rope_theta=5e5, rope_parameters=None)
    other = verify(checkpoint, source)
    assert other.exit_code == 2 and "config.json: rope_theta is" in other.stderr


def test_a_size_that_is_none(checkpoint: Path, tmp_path: Path) -> None:
    found = convert("export", checkpoint, tmp_path / "out", "--shard-size", "1 GiBs")
    assert found.exit_code == 2 and "--shard-size=1 GiBs: give a number with one of KB" in found.stderr


def test_ranks_share_the_work(source: Path, tmp_path: Path) -> None:
    found = run("convert_checkpoint", "import", source, tmp_path / "out", "--tensor", 2, processes=2)
    assert found.returncode == 0, found.stderr
    found = run("convert_checkpoint", "export", tmp_path / "out", tmp_path / "hf", "--shard-size", "100KB", processes=2)
    assert found.returncode == 0, found.stderr
    assert verify(tmp_path / "out", tmp_path / "hf").exit_code == 0


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_killed_conversion_goes_on_where_it_was(tmp_path: Path, command: str) -> None:
    """Killed when the third part is on the disk: the next call writes the others only, and the result is whole."""
    tiny_model(tiny_config("llama", tied=True, layers=24)).save_pretrained(tmp_path / "source")
    if command == "export":
        import_hf(tmp_path / "source", tmp_path / "checkpoint", ParallelConfig())
    arguments = [command, str(tmp_path / ("source" if command == "import" else "checkpoint")), str(tmp_path / "out")]
    arguments += ["--shard-size", "50KB"] if command == "export" else []
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_FSYNC, *arguments], env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stderr=subprocess.DEVNULL
    )
    parts, files = tmp_path / "out.partial" / "parts", tmp_path / "out.partial" / "content"
    deadline = time.monotonic() + 120
    while len(list(parts.glob("*.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    done = {part.stem: next(files.rglob(part.stem)).stat().st_mtime_ns for part in parts.glob("*.json")}
    assert convert(*arguments).exit_code == 0
    assert {name: next((tmp_path / "out").rglob(name)).stat().st_mtime_ns for name in done} == done
    pair = (tmp_path / "out", tmp_path / "source") if command == "import" else (tmp_path / "checkpoint", tmp_path / "out")
    assert verify(*pair).exit_code == 0


# The tool on a disk that takes its time, so that it can be killed in the middle.
SLOW_FSYNC = """
import os, runpy, sys, time
fsync = os.fsync
os.fsync = lambda handle: (time.sleep(0.1), fsync(handle))[1]
runpy.run_path("tools/convert_checkpoint.py", run_name="__main__")
"""


def test_another_source_starts_afresh(source: Path, tmp_path: Path) -> None:
    """A partial folder of an older state of the source is not gone on with."""
    assert run("convert_checkpoint", "import", source, tmp_path / "out", file_limit=60_000).returncode == 1
    change(source, LAYER, torch.full((96, 64), 3.0))
    assert convert("import", source, tmp_path / "out").exit_code == 0
    assert verify(tmp_path / "out", source).exit_code == 0


def test_a_partial_folder_of_someone_else_is_not_removed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes").write_text("mine")
    found = convert("import", source, tmp_path / "out")
    assert found.exit_code == 2 and "no conversion wrote" in found.stderr
    assert (tmp_path / "out.partial" / "notes").read_text() == "mine"


def test_a_nan_is_a_difference_where_one_side_has_it() -> None:
    one, nan = torch.tensor([1.0, -4.0, 2.0]), torch.tensor([1.0, torch.nan, 2.0])
    assert relative_error(nan, nan) == relative_error(one, one) == 0
    assert relative_error(torch.tensor([1.0, torch.nan, 1.5]), nan) == 0.25
    assert not relative_error(one, nan) <= 1 and not relative_error(nan, one) <= 1
