"""Serve a report page on this machine only."""

import http.server
import os
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from posmask.errors import BadSetting, DamagedFolder

__all__ = ["page_server"]

_LAST_PORT = 65_535


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the files of a folder to requests whose Host header names this machine.

    Another site's page cannot read them through a host name that resolves to 127.0.0.1.
    """

    timeout = 60  # seconds that a client may be silent

    def send_head(self) -> Any:
        name, _, port = (self.headers.get("Host") or "").rpartition(":")
        if name not in ("127.0.0.1", "localhost") or port != str(self.connection.getsockname()[1]):
            self.send_error(403, "This page is served to 127.0.0.1 and localhost only")
            return None
        if not self._is_served():
            self.send_error(404)
            return None
        return super().send_head()

    def _is_served(self) -> bool:
        """Whether the request is for a file in the folder, and not for one that a symbolic link leads to."""
        try:
            path = Path(self.translate_path(self.path))
            file = path / "index.html" if path.is_dir() else path
            return file.is_file() and file.resolve().is_relative_to(Path(self.directory).resolve())
        except (ValueError, OSError):  # NUL characters, or a name that is too long
            return False

    def list_directory(self, path: Any) -> Any:
        self.send_error(404)

    def copyfile(self, source: Any, outputfile: Any) -> None:
        with suppress(ConnectionError):  # The browser left the page.
            super().copyfile(source, outputfile)

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _PageHandler(_Handler):
    """Serves one self-contained page, and no file beside it."""

    def translate_path(self, path: str) -> str:
        return self.directory if path.partition("?")[0] == "/" else os.path.join(self.directory, "none")


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64  # A page requests its data at once.

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print errors, but not that a browser closed its connection."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def page_server(page: Path, port: int = 0) -> http.server.ThreadingHTTPServer:
    """Return a server of a report page, bound to 127.0.0.1; `serve_forever` starts it.

    Args:
        page: folder that `posmask report --all` wrote, or a self-contained HTML file, which is served alone.
        port: 0 takes any free port.

    Raises:
        DamagedFolder: `page` is neither.
        BadSetting: the port is taken or impossible.
    """
    if not 0 <= port <= _LAST_PORT:
        raise BadSetting(f"port = {port} does not exist: choose one from 1 to {_LAST_PORT}, or 0 for any free one")
    is_file = page.is_file() and page.suffix == ".html"
    if not is_file and not (page / "index.html").is_file():
        raise DamagedFolder(
            f"{page} is no page: `posmask report DIR` writes report.html, `posmask report DIR --all` a folder with all "
            "latents"
        )
    handler = _PageHandler if is_file else _Handler
    try:
        return _Server(("127.0.0.1", port), partial(handler, directory=str(page)))
    except OSError as error:
        raise BadSetting(
            f"port {port} cannot be used ({error.strerror}), perhaps because another program serves there: choose "
            "another with --port; 0 takes any free one"
        ) from None
