"""Headless Chromium through chromedriver's own protocol (W3C WebDriver, plain HTTP): open a page, run scripts in it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forked_jobs import free_port

OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]


class Browser:
    """A session; `script` returns what the JavaScript returns, `console` what the page has complained of."""

    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}"
        wanted = {"goog:chromeOptions": {"args": OPTIONS}, "goog:loggingPrefs": {"browser": "ALL"}}
        answer = self._post("/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{answer['sessionId']}"

    def open(self, page: Path) -> None:
        """Load the file and wait for it."""
        self._post(f"{self._session}/url", {"url": page.resolve().as_uri()})

    def script(self, body: str) -> Any:
        """Run the body of a function in the page."""
        return self._post(f"{self._session}/execute/sync", {"script": body, "args": []})

    def console(self) -> list[str]:
        """The messages of the console since the last call."""
        return [entry["message"] for entry in self._post(f"{self._session}/se/log", {"type": "browser"})]

    def emulate(self, width: int, height: int, scheme: str) -> None:
        """A screen of that size in CSS pixels, `light` or `dark`."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._command("Emulation.setDeviceMetricsOverride", screen)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._command("Emulation.setEmulatedMedia", {"features": features})

    def close(self) -> None:
        """End the session, and with it the browser."""
        request = urllib.request.Request(self._base + self._session, method="DELETE")
        urllib.request.urlopen(request, timeout=60).close()

    def _command(self, name: str, parameters: dict[str, Any]) -> Any:
        return self._post(f"{self._session}/goog/cdp/execute", {"cmd": name, "params": parameters})

    def _post(self, path: str, value: dict[str, Any]) -> Any:
        request = urllib.request.Request(self._base + path, json.dumps(value).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())["value"]


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser for the length of the block."""
    port = free_port()
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _await(port)
        session = Browser(port)
        try:
            yield session
        finally:
            session.close()
    finally:
        driver.terminate()
        driver.wait(30)


def _await(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5).close()
            return
        time.sleep(0.1)
    raise AssertionError("chromedriver did not start")
