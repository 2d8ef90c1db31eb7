"""Serves a built site on the loopback interface, for looking at it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from attnbench.errors import UsageError


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the terminal belongs to the user."""


def serve(folder: Path, port: int, say: Callable[[str], None]) -> None:
    """Serve ``folder`` at http://127.0.0.1:port/ until interrupted.

    Raises UsageError when the folder holds no site or the port is taken.
    """
    if not (folder / "index.html").is_file():
        raise UsageError(f"{folder} holds no site: observed no index.html; run `attnbench site build` first")
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), partial(_Quiet, directory=str(folder)))
    except OSError as error:
        raise UsageError(f"port {port} cannot be used: {error.strerror}; choose another --port") from None
    with server:
        say(f"http://127.0.0.1:{server.server_address[1]}/ serves {folder}; Ctrl-C ends it")
        server.serve_forever()
