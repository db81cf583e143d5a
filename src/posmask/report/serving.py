"""Serves the folder of a page with all latents on this machine only."""

import http.server
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


def page_server(folder: Path, port: int = 0) -> http.server.ThreadingHTTPServer:
    """Return a server of the folder's page, bound to 127.0.0.1; `serve_forever` starts it.

    Args:
        folder: a folder that `write_report_folder` wrote.
        port: 0 means any free port.

    Raises:
        DamagedFolder: the folder has no page.
    """
    if not (folder / "index.html").is_file():
        raise DamagedFolder(f"{folder} has no index.html: write it with `posmask report DIR --all`")
    return http.server.ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, directory=str(folder)))
