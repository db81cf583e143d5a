"""Serve a report page on this machine only."""

import http.server
import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from posmask.errors import DamagedFolder

__all__ = ["page_server"]


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the files of a folder to requests whose Host header names this machine.

    Another site's page cannot read them through a host name that resolves to 127.0.0.1.
    """

    def send_head(self) -> Any:
        name, _, port = (self.headers.get("Host") or "").rpartition(":")
        if name not in ("127.0.0.1", "localhost") or port != str(self.connection.getsockname()[1]):
            self.send_error(403, "This page is served to 127.0.0.1 and localhost only")
            return None
        path = Path(self.translate_path(self.path)).resolve()
        if not path.is_relative_to(Path(self.directory).resolve()):  # through a symbolic link
            self.send_error(404)
            return None
        return super().send_head()

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


def page_server(page: Path, port: int = 0) -> http.server.ThreadingHTTPServer:
    """Return a server of a report page, bound to 127.0.0.1; `serve_forever` starts it.

    Args:
        page: folder that `posmask report --all` wrote, or a self-contained HTML file, which is served alone.
        port: 0 takes any free port.

    Raises:
        DamagedFolder: `page` is neither.
    """
    is_file = page.is_file() and page.suffix == ".html"
    if not is_file and not (page / "index.html").is_file():
        raise DamagedFolder(
            f"{page} is no page: `posmask report DIR` writes report.html, `posmask report DIR --all` a folder with all "
            "latents"
        )
    handler = _PageHandler if is_file else _Handler
    return http.server.ThreadingHTTPServer(("127.0.0.1", port), partial(handler, directory=str(page)))
