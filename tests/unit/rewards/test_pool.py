from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_nsr.rewards.pool import GraderPool
from megatron_nsr.types import Outcome, Prompt, Reason, UserError, Verdict

OBEDIENT = "user_graders:Obedient"
CORRECT = Verdict(Outcome.CORRECT, Reason.MATCH)
CRASH = Verdict(Outcome.NONE, Reason.CRASH)
TIMEOUT = Verdict(Outcome.NONE, Reason.TIMEOUT)


@pytest.fixture(autouse=True)
def beside_the_graders(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's module lies in the working directory, as it would beside a config; this process never imports it."""
    monkeypatch.chdir(Path(__file__).parent)


def make(
    workers: int = 1, *, grader: str = OBEDIENT, timeout_s: float = 20.0, memory_limit_mib: int = 512, cache_size: int = 0
) -> GraderPool:
    return GraderPool(grader, workers=workers, timeout_s=timeout_s, memory_limit_mib=memory_limit_mib, cache_size=cache_size)


@pytest.fixture
def pool() -> Iterator[GraderPool]:
    with make() as made:
        yield made


def prompt(identity: str = "p", answer: str = "", **fields: Any) -> Prompt:
    return Prompt(identity, "", (), answer, **fields)


def items(*responses: str) -> list[tuple[str, Prompt]]:
    return [(response, prompt()) for response in responses]


def workers_left() -> list[list[str]]:
    """Command lines of grader processes that are children of this one; other tests' libraries leave children too (wandb's service)."""
    lines = [child.cmdline() for child in psutil.Process().children()]
    return [line for line in lines if "megatron_nsr.rewards.worker" in " ".join(line)]


def test_verdicts_keep_the_order_over_several_workers() -> None:
    with make(2) as pool:
        responses = [f"correct {index}" for index in range(200)]
        assert [verdict.answer for verdict in pool.grade(items(*responses))] == [str(index) for index in range(200)]
        assert pool.grade([]) == []


def test_math_verify_is_built_in() -> None:
    with make(grader="math_verify", cache_size=10) as pool:
        verdicts = pool.grade(
            [(r"\boxed{0.5}", prompt(answer=r"\frac{1}{2}")), (r"\boxed{3}", prompt(answer="4")), ("3", prompt(answer="3"))]
        )
    assert [verdict.reason for verdict in verdicts] == [Reason.MATCH, Reason.MISMATCH, Reason.NO_BOX]


def test_a_users_grader_sees_the_whole_prompt_and_prints_to_stderr(pool: GraderPool, capfd: pytest.CaptureFixture[str]) -> None:
    asked = prompt(source="MATH", extra={"level": 5})
    assert pool.grade([("source", asked), ("print", asked)]) == [Verdict(Outcome.WRONG, Reason.MISMATCH, "MATH 5"), CORRECT]
    assert "a user's print" not in capfd.readouterr().out


def test_workers_are_other_processes_without_torch(pool: GraderPool) -> None:
    pid, torch_loaded = pool.grade(items("pid", "torch_loaded"))
    assert pid.answer != str(os.getpid())
    assert torch_loaded.answer == "False"


@pytest.mark.parametrize("item", ["sleep 60", "compute"])
def test_a_hang_costs_only_itself(item: str) -> None:
    with make(timeout_s=1.0) as pool:
        responses = [*["correct"] * 20, item, *["correct"] * 20]
        verdicts = pool.grade(items(*responses))
        assert verdicts == [TIMEOUT if response == item else CORRECT for response in responses]
        assert pool.grade(items("correct")) == [CORRECT]


@pytest.mark.parametrize("item", ["segfault", "fill 4096", "no_such_method"])
def test_a_crash_costs_only_itself(pool: GraderPool, item: str) -> None:
    responses = [*["correct"] * 20, item, *["correct"] * 20]
    assert pool.grade(items(*responses)) == [CRASH if response == item else CORRECT for response in responses]


def test_memory_below_the_limit_is_granted(pool: GraderPool) -> None:
    assert pool.grade(items("fill 100"))[0].answer == str(100 * 2**20)


def test_the_first_traceback_is_logged_once(pool: GraderPool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        pool.grade(items("bool", "no_such_method", "bool"))
        pool.grade(items("no_such_method"))
    assert pool.last_exception == "AttributeError: 'Obedient' object has no attribute 'no_such_method'"
    assert len(caplog.records) == 1
    assert "grade() returned bool, not a megatron_nsr.types.Verdict" in caplog.text


def test_identical_items_are_graded_once_and_remembered(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    with make(2, cache_size=2) as pool:
        assert pool.grade(items(*[f"note {notes}"] * 50)) == [CORRECT] * 50
        pool.grade(items(f"note {notes}"))
        assert len(notes.read_text().splitlines()) == 1
        pool.grade([(f"note {notes}", prompt("another")), (f"note {notes}", prompt("a third"))])
        assert len(notes.read_text().splitlines()) == 3
        pool.grade(items(f"note {notes}"))  # pushed out of a cache of two
        assert len(notes.read_text().splitlines()) == 4


def test_prompts_that_differ_anywhere_have_verdicts_of_their_own() -> None:
    """Two files may number their problems alike, and their rows may differ in nothing but a column that the grader reads."""
    level_1, level_2 = (prompt(source="MATH", extra={"level": level}) for level in (1, 2))
    a, b = Prompt("p", "What is 1 + 1?", (), ""), Prompt("p", "What is 1 + 2?", (), "")
    with make(cache_size=10) as pool:
        asked = [("source", level_1), ("source", level_2), ("text", a), ("text", b)]
        answers = ["MATH 1", "MATH 2", "What is 1 + 1?", "What is 1 + 2?"]
        assert [verdict.answer for verdict in pool.grade(asked)] == answers
        assert [pool.grade([item])[0].answer for item in reversed(asked)] == answers[::-1]


def test_without_a_cache_every_item_is_graded(pool: GraderPool, tmp_path: Path) -> None:
    pool.grade(items(*[f"note {tmp_path / 'notes'}"] * 5))
    assert len((tmp_path / "notes").read_text().splitlines()) == 5


def test_a_timeout_is_not_remembered() -> None:
    with make(timeout_s=0.5, cache_size=10) as pool:
        assert pool.grade(items("sleep 60", "sleep 60")) == [TIMEOUT, TIMEOUT]
        assert not pool._cache


@pytest.mark.parametrize(
    ("grader", "message"),
    [
        ("no_such_module:Grader", "reward.grader='no_such_module:Grader': cannot import no_such_module; it must lie in .*"),
        ("user_graders:Absent", "reward.grader='user_graders:Absent': module user_graders has no Absent"),
        ("user_graders", "reward.grader='user_graders': write an import path as module:Class"),
        ("user_graders:Unbuildable", "reward.grader='user_graders:Unbuildable': building it raised ValueError: no licence file"),
        ("user_graders:Ungrading", r"reward.grader='user_graders:Ungrading': it has no method grade\(response, prompt\)"),
    ],
)
def test_a_grader_that_cannot_be_built_is_the_users_error(grader: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        make(2, grader=grader)
    assert not workers_left()


def test_workers_ignore_the_signals_meant_for_the_trainer(pool: GraderPool) -> None:
    before = int(pool.grade(items("pid"))[0].answer or 0)
    os.kill(before, signal.SIGTERM)
    os.kill(before, signal.SIGINT)
    assert os.getpgid(before) != os.getpgid(0)
    assert pool.grade(items("pid"))[0].answer == str(before)


def test_a_worker_killed_between_steps_is_replaced_without_loss(pool: GraderPool) -> None:
    pid = int(pool.grade(items("pid"))[0].answer or 0)
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=0.2)
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert pool.grade(items("correct", "correct")) == [CORRECT, CORRECT]


def test_close_leaves_no_process_behind() -> None:
    pool = make(2)
    assert len(workers_left()) == 2
    pool.close()
    pool.close()
    assert not workers_left()
    with pytest.raises(RuntimeError, match="this grader pool is closed"):
        pool.grade(items("correct"))


@pytest.mark.parametrize("in_thread", [False, True], ids=["main thread", "thread that ends"])
def test_a_busy_worker_dies_with_its_killed_parent_and_never_reruns_main(tmp_path: Path, in_thread: bool) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(f"""
        import threading
        from megatron_nsr.rewards.pool import GraderPool
        from megatron_nsr.types import Prompt
        print("main runs", flush=True)
        made = []
        def make():
            made.append(GraderPool("{OBEDIENT}", workers=1, timeout_s=100.0, memory_limit_mib=512, cache_size=0))
        if {in_thread}:
            thread = threading.Thread(target=make); thread.start(); thread.join()
        else:
            make()
        made[0].grade([("spin {tmp_path / "notes"}", Prompt("", "", (), ""))])
        """)
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    notes = tmp_path / "notes"
    while not notes.exists() or not notes.read_text().endswith("\n"):
        assert parent.poll() is None
        time.sleep(0.02)
    parent.kill()
    assert parent.communicate()[0] == "main runs\n"
    worker = int(notes.read_text())
    deadline = time.monotonic() + 30
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
