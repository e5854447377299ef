"""Headless Chromium, driven over the DevTools protocol: what a page does when it opens, and what a script finds in it.

May import: aiohttp and the standard library.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-extensions",
        "--remote-debugging-port=0",
    ),
)
DEADLINE_S = 120  # of a start or an answer; a loaded machine takes seconds


@dataclass
class Visit:
    """What a page did. result: the script's value; complaints: console messages and exceptions; requests: URLs it asked for."""

    result: Any = None
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def find_chromium() -> str:
    """The browser that the variable CHROMIUM names, or else one on the PATH."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    assert found, "no Chromium: `make browser` says how to get one; the variable CHROMIUM may name one that is not on the PATH"
    return found


class Chromium:
    """One browser process with a profile of its own; a context manager."""

    def __init__(self) -> None:
        self.profile = Path(tempfile.mkdtemp(prefix="chromium-"))
        self.process = subprocess.Popen(
            [find_chromium(), *FLAGS, f"--user-data-dir={self.profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.address = self._await_address()

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.terminate()
        self.process.wait(DEADLINE_S)
        shutil.rmtree(self.profile, ignore_errors=True)

    def visit(
        self, page: Path, *, width: int, script: str = "null", dark: bool = False, media: str = "screen", picture: Path | None = None
    ) -> Visit:
        """Opens a file in a window of that many CSS pixels and evaluates a script in it. picture: where a PNG of the whole page goes."""
        return asyncio.run(asyncio.wait_for(self._visit(page, width, script, dark, media, picture), DEADLINE_S))

    def _await_address(self) -> str:
        """The browser's DevTools address, which it writes into its profile."""
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end and self.process.poll() is None:
            lines = _lines(self.profile / "DevToolsActivePort")
            if len(lines) == 2:
                return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
            time.sleep(0.05)
        raise RuntimeError(f"{self.process.args!r} did not start: exit status {self.process.poll()}")

    async def _visit(self, page: Path, width: int, script: str, dark: bool, media: str, picture: Path | None) -> Visit:
        visit = Visit()
        async with aiohttp.ClientSession() as session, session.ws_connect(self.address, max_msg_size=0) as socket:
            tab = _Tab(socket, visit)
            target = (await tab.call("Target.createTarget", url="about:blank"))["targetId"]
            tab.session = (await tab.call("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                await tab.call(f"{domain}.enable")
            await tab.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            await tab.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
            await tab.call("Page.navigate", url=page.absolute().as_uri())
            await tab.event("Page.loadEventFired")
            evaluated = await tab.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
            assert "exceptionDetails" not in evaluated, evaluated["exceptionDetails"]
            visit.result = evaluated["result"].get("value")
            if picture is not None:
                shot = await tab.call("Page.captureScreenshot", captureBeyondViewport=True)
                picture.write_bytes(base64.b64decode(shot["data"]))
            tab.session = None
            await tab.call("Target.closeTarget", targetId=target)
        return visit


class _Tab:
    """Calls and events of one tab; what it says and asks for goes into `visit`."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, visit: Visit) -> None:
        self.socket, self.visit = socket, visit
        self.ids = itertools.count(1)
        self.session: str | None = None
        self.seen: set[str] = set()

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command's answer; raises AssertionError with the browser's message where it fails."""
        message: dict[str, Any] = {"id": next(self.ids), "method": method, "params": parameters}
        await self.socket.send_json(message | ({"sessionId": self.session} if self.session else {}))
        while True:
            answer = await self._next()
            if answer.get("id") == message["id"]:
                assert "result" in answer, f"{method}: {answer}"
                return dict(answer["result"])

    async def event(self, method: str) -> None:
        """Waits for an event, also one that came already."""
        while method not in self.seen:
            await self._next()

    async def _next(self) -> dict[str, Any]:
        message: dict[str, Any] = await self.socket.receive_json()
        method, values = message.get("method", ""), message.get("params", {})
        self.seen.add(method)
        if method == "Network.requestWillBeSent":
            self.visit.requests.append(values["request"]["url"])
        elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.visit.complaints.append(f"{method}: {values}")
        return message


def _lines(path: Path) -> list[str]:
    return path.read_text().split() if path.is_file() else []
