"""The process that runs vLLM: started, asked, watched, and ended with all that it started."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedsim.errors import FedSimError, ModelError, RunError
from fedsim.evaluate.vllm_worker import UNUSABLE

_LAST = 12  # lines of the worker's standard error in a message
_GRACE = 10.0  # seconds between the end of its output and its own end


class Worker:
    """One process in a session of its own, with a folder of its own for all that it writes."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], patience: float, install: str
    ) -> None:
        """Start it, without waiting. `install` is the remedy where vLLM cannot be imported."""
        self._patience, self._install = patience, install
        self._folder = tempfile.TemporaryDirectory(
            prefix="fedsim-vllm-", ignore_cleanup_errors=True
        )
        folder = Path(self._folder.name)
        self._log = folder / "stderr"
        self._pending = b""
        self._ready = False
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                    cwd=folder, env={**environment, "TMPDIR": str(folder)},
                    start_new_session=True,
                )  # fmt: skip
        except OSError as failure:
            self._folder.cleanup()
            raise ModelError(f"{command[0]} cannot be run ({failure})", remedy=install) from failure

    def answer(self, batch: Path, count: int) -> dict[int, dict[str, Any]]:
        """Hand over a batch of `count` requests: index -> what it answered.

        Raises:
            ModelError: vLLM cannot be imported.
            RunError: the process ended, wrote something else, or was silent for too long.
        """
        while not self._ready:
            self._ready = "ready" in self._receive()
        self._send(batch)
        got: dict[int, dict[str, Any]] = {}
        while "done" not in (message := self._receive()):
            if "tokens" in message:
                got[message["index"]] = message
        if len(got) != count:
            raise self._failure(f"answered {len(got)} of {count} requests")
        return got

    def end(self) -> None:
        """Kill the whole group and wait; again is allowed. Its memory is free when this returns."""
        if self._process.returncode is None:
            # Before the wait: until then the number is that of this group and no other.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            deadline = time.monotonic() + _GRACE
            with suppress(ProcessLookupError):  # what it had started is gone, too
                while time.monotonic() < deadline:
                    os.killpg(self._process.pid, 0)
                    time.sleep(0.01)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # a line that it never read
                pipe.close()
        self._folder.cleanup()

    def _send(self, batch: Path) -> None:
        # A path fits the pipe's buffer, so this never waits for a worker that has stopped reading.
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{batch}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def _receive(self) -> dict[str, Any]:
        """The next message. Raises as `answer` does."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + self._patience
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise self._failure(f"made no progress for {self._patience:g} s")
            chunk = os.read(self._process.stdout.fileno(), 1 << 16)
            if not chunk:
                raise self._ended()
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        try:
            message = json.loads(line)
            return dict(message)
        except (TypeError, ValueError):
            raise self._failure(f"wrote {line[:80]!r}, which is no message") from None

    def _ended(self) -> FedSimError:
        """The error for a process that stopped answering, once it is seen how it ended."""
        deadline = time.monotonic() + _GRACE
        status = os.WNOWAIT | os.WEXITED | os.WNOHANG  # leaves it to be reaped by `end`
        while (seen := os.waitid(os.P_PID, self._process.pid, status)) is None:
            if time.monotonic() > deadline:
                return self._failure("closed its output")
            time.sleep(0.05)
        if seen.si_code != os.CLD_EXITED:
            return self._failure(f"was ended by {signal.Signals(seen.si_status).name}")
        if seen.si_status == UNUSABLE:
            return ModelError(
                f"vLLM cannot be imported by {self._process.args[0]!r}",  # type: ignore[index]
                expected="a working environment",
                remedy=f"{self._install} {self._said()}",
            )
        return self._failure(f"ended with status {seen.si_status}")

    def _failure(self, how: str) -> RunError:
        return RunError(
            f"vLLM's process {how}", expected="an answer to every request",
            remedy=f"Use the engine backend, or mend what it says. {self._said()}",
        )  # fmt: skip

    def _said(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST:]
        return "Its last lines:\n" + "\n".join(lines) if lines else "It wrote nothing."
