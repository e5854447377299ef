"""Grades responses in long-lived worker processes with a hard deadline, a memory limit and a cache.

May import: types and this package.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from multiprocessing.connection import Pipe, wait
from types import TracebackType

from megatron_nsr.rewards.extraction import last_boxed
from megatron_nsr.rewards.worker import Batch, Ready, Reply
from megatron_nsr.types import Outcome, Prompt, Reason, UserError, Verdict

logger = logging.getLogger(__name__)

_MATH_GRADER = "megatron_nsr.rewards.math_grader:MathGrader"
_PROGRAM = "import sys; from megatron_nsr.rewards.worker import main; main(sys.argv[1:])"  # not -m: messages are pickled by module name
_START_DEADLINE_S = 120.0  # importing and building a user's grader
_START_ATTEMPTS = 3  # in a row, without a sign of life
_BATCH = 32  # items handed over at once: the wait between batches is small against grading them, and few are left to the slowest worker

_TIMEOUT = Verdict(Outcome.NONE, Reason.TIMEOUT)
_CRASH = Verdict(Outcome.NONE, Reason.CRASH)


class _Worker:
    """One grader process and the items that it holds, oldest first. `since`: when it started, or took up its present item."""

    def __init__(self, grader: str, memory_limit_mib: int) -> None:
        self.ready = False
        self.items: deque[int] = deque()
        self.since = time.monotonic()
        self.connection, child = Pipe()
        tied = threading.current_thread() is threading.main_thread()
        arguments = [str(child.fileno()), str(os.getpid()), grader, str(memory_limit_mib), str(int(tied))]
        with child:
            # A new interpreter, not a fork: the trainer has threads, CUDA and a __main__ that must not run again.
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, *arguments],
                pass_fds=[child.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a user's grader prints must not mix with the output of `score`
                start_new_session=True,  # Ctrl-C is for the trainer
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            )

    @property
    def idle(self) -> bool:
        return self.ready and not self.items

    def stop(self, grace_s: float = 0.0) -> None:
        """Closes the socket, which ends an idle worker, and kills what is left after the grace."""
        self.connection.close()
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class GraderPool:
    """Worker processes that grade; a context manager.

    grader: `math_verify` or the import path of a Grader, module:Class. workers: processes. timeout_s: hard deadline of one verdict;
    past it the worker is killed and replaced, and the verdict is none/timeout. memory_limit_mib: address space of a worker above its
    size at start; an item that exceeds it, kills its worker or raises is none/crash. cache_size: verdicts remembered, the most
    recently used ones; 0 also grades identical items separately.

    Raises UserError where the grader cannot be imported or built.
    """

    def __init__(self, grader: str, *, workers: int, timeout_s: float, memory_limit_mib: int, cache_size: int) -> None:
        self._is_math = grader == "math_verify"
        self._grader = _MATH_GRADER if self._is_math else grader
        self._timeout_s = timeout_s
        self._memory_limit_mib = memory_limit_mib
        self._cache_size = cache_size
        self._cache: OrderedDict[Hashable, Verdict] = OrderedDict()
        self._lock = threading.Lock()
        self._failed_starts = 0
        self._traceback_logged = False
        self.last_exception = ""  # of the grader: the last line of its traceback
        self._closed = False
        self._workers = [_Worker(self._grader, memory_limit_mib) for _ in range(workers)]
        try:
            while not all(worker.ready for worker in self._workers):
                self._wait_for_workers(deque(), {})
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers. A second call does nothing."""
        self._closed = True
        for worker in self._workers:
            worker.stop(grace_s=1.0 if worker.idle else 0.0)
        self._workers = []

    def grade(self, items: Sequence[tuple[str, Prompt]]) -> list[Verdict]:
        """The verdicts of (response, prompt) pairs, in their order. Callers from several threads take turns."""
        if self._closed:
            raise RuntimeError("this grader pool is closed")
        with self._lock:
            keys = self._keys(items)
            first_of = {key: index for index, key in reversed(list(enumerate(keys)))}
            known = {key: self._cache[key] for key in first_of if key in self._cache}
            verdicts = self._run(items, deque(index for key, index in first_of.items() if key not in known))
            known.update({keys[index]: verdict for index, verdict in verdicts.items()})
            self._remember(known)
            return [known[key] for key in keys]

    # --- cache --------------------------------------------------------------------------------------------------------

    def _keys(self, items: Sequence[tuple[str, Prompt]]) -> list[Hashable]:
        """What each verdict depends on. The math grader reads nothing but the last box and the reference answer, others all they get."""
        if not self._cache_size:
            return list(range(len(items)))
        if self._is_math:
            return [(last_boxed(response), prompt.answer) for response, prompt in items]
        distinct = {id(prompt): prompt for _, prompt in items}  # a prompt has many responses
        digests = {identity: _digest(prompt) for identity, prompt in distinct.items()}
        return [(response, digests[id(prompt)]) for response, prompt in items]

    def _remember(self, verdicts: dict[Hashable, Verdict]) -> None:
        """Keeps real verdicts and unusable golds; a timeout or a crash may be the machine's fault and is tried again next time."""
        if not self._cache_size:
            return
        for key, verdict in verdicts.items():
            if verdict.reason not in (Reason.TIMEOUT, Reason.CRASH):
                self._cache[key] = verdict
                self._cache.move_to_end(key)
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def _run(self, items: Sequence[tuple[str, Prompt]], pending: deque[int]) -> dict[int, Verdict]:
        """Grades the pending items; returns their verdicts by index."""
        verdicts: dict[int, Verdict] = {}
        size = max(1, min(_BATCH, len(pending) // (4 * len(self._workers))))
        try:
            while pending or any(worker.items for worker in self._workers):
                for position, worker in enumerate(self._workers):
                    if pending and worker.idle:
                        self._hand_over(position, [pending.popleft() for _ in range(min(size, len(pending)))], items, pending)
                self._wait_for_workers(pending, verdicts)
        except BaseException:
            for position, worker in enumerate(self._workers):
                if worker.items:  # it would answer for items that nobody waits for any more
                    self._replace(position)
            raise
        return verdicts

    def _hand_over(self, position: int, indices: list[int], items: Sequence[tuple[str, Prompt]], pending: deque[int]) -> None:
        """Sends a batch to an idle worker, which is reading: the send cannot block for long."""
        worker = self._workers[position]
        batch: Batch = [items[index] for index in indices]
        try:
            if worker.process.poll() is not None:
                raise ConnectionError
            worker.connection.send(batch)
        except ConnectionError:  # it died while idle: nobody's fault
            pending.extendleft(reversed(indices))
            self._replace(position)
            return
        worker.items.extend(indices)
        worker.since = time.monotonic()

    def _wait_for_workers(self, pending: deque[int], verdicts: dict[int, Verdict]) -> None:
        """Sleeps until a worker says something or passes its deadline, and acts on it."""
        active = [worker for worker in self._workers if not worker.idle]
        now = time.monotonic()
        nearest = min((self._deadline(worker) for worker in active), default=now)
        spoken = set(wait([worker.connection for worker in active], max(0.0, nearest - now)))
        for position, worker in enumerate(self._workers):
            if worker.connection in spoken:
                self._listen(position, pending, verdicts)
            elif not worker.idle and time.monotonic() > self._deadline(worker) and not worker.connection.poll():
                self._give_up(position, _TIMEOUT, pending, verdicts)

    def _deadline(self, worker: _Worker) -> float:
        return worker.since + (self._timeout_s if worker.ready else _START_DEADLINE_S)

    def _listen(self, position: int, pending: deque[int], verdicts: dict[int, Verdict]) -> None:
        """Takes everything that a worker has said."""
        worker = self._workers[position]
        try:
            while True:
                message = worker.connection.recv()
                worker.since = time.monotonic()
                if isinstance(message, Ready):
                    self._started(worker, message)
                else:
                    self._record(worker, message, verdicts)
                if worker.idle or not worker.connection.poll():
                    return
        except (EOFError, ConnectionError):
            self._give_up(position, _CRASH, pending, verdicts)

    def _started(self, worker: _Worker, message: Ready) -> None:
        if message.error is not None:
            raise UserError(message.error)
        worker.ready = True
        self._failed_starts = 0

    def _record(self, worker: _Worker, reply: Reply, verdicts: dict[int, Verdict]) -> None:
        verdicts[worker.items.popleft()] = reply.verdict
        if reply.traceback:
            self.last_exception = reply.traceback.strip().splitlines()[-1]
        if reply.traceback and not self._traceback_logged:
            self._traceback_logged = True
            logger.error("grader %s raised (logged once; the verdict is none/crash):\n%s", self._grader, reply.traceback)

    def _give_up(self, position: int, verdict: Verdict, pending: deque[int], verdicts: dict[int, Verdict]) -> None:
        """Replaces a worker that died or passed its deadline: the item in progress gets the verdict, the rest of its batch goes back."""
        worker = self._workers[position]
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= _START_ATTEMPTS:
                worker.stop()
                raise RuntimeError(
                    f"the process of grader {self._grader} ended {_START_ATTEMPTS} times before it was ready, "
                    f"last with exit status {worker.process.returncode}"
                )
        elif worker.items:
            verdicts[worker.items.popleft()] = verdict
            pending.extendleft(reversed(worker.items))
        self._replace(position)

    def _replace(self, position: int) -> None:
        worker = self._workers[position]
        worker.process.kill()
        worker.stop()
        self._workers[position] = _Worker(self._grader, self._memory_limit_mib)


def _digest(prompt: Prompt) -> bytes:
    """A digest of every field: what tells two prompts apart for a grader may be any of them, and ids repeat among files."""
    return hashlib.blake2b(pickle.dumps(prompt), digest_size=16).digest()
