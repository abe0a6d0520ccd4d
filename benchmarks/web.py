"""onnxruntime-web in headless Chromium: what a browser makes of a model, from Python.

The npm package is fetched once into the cache of onnxlathe; nothing of it is a dependency. A machine without npm or
Chromium says so (``problem``), and tests skip.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import importlib.util
import os
import shutil
import subprocess
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

VERSION = "1.30.0"
ROOT = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onnxlathe" / f"onnxruntime-web-{VERSION}"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def problem() -> str:
    """Why no browser can be asked here; empty if it can. Fetches the package if it is not there yet."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed"
    if _browser() is None:
        return "there is no Chromium"
    if (ROOT / "node_modules" / "onnxruntime-web").is_dir():
        return ""
    if shutil.which("npm") is None:
        return "there is no npm to fetch onnxruntime-web with"
    ROOT.mkdir(parents=True, exist_ok=True)
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", f"onnxruntime-web@{VERSION}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return f"npm cannot fetch onnxruntime-web: {done.stderr.strip()[-200:]}" if done.returncode else ""


@contextlib.contextmanager
def served(folder: Path) -> Generator[str]:
    """The address of a server for ``folder``, with the package's ``node_modules`` in each folder of it."""
    handler = functools.partial(_Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def browser_page() -> Generator[Any]:
    """A page of a headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_browser(), args=["--no-sandbox"])
        try:
            yield browser.new_page()
        finally:
            browser.close()


def _browser() -> str | None:
    return next((path for name in _BROWSERS if (path := shutil.which(name))), None)


class _Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map = {  # noqa: RUF012 (as the base class has it)
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def translate_path(self, path: str) -> str:
        _, found, name = path.partition("?")[0].partition("/node_modules/")
        return str(ROOT / "node_modules" / name) if found else super().translate_path(path)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""
