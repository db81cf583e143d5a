"""Serve a report page on this machine only, and answer the texts that readers type into it."""

import http.server
import io
import json
import os
import sys
import threading
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from posmask.errors import BadSetting, DamagedFolder
from posmask.report.prompts import MOST_BYTES, Codes, answer, takes_prompts, with_prompts

__all__ = ["page_server"]

_LAST_PORT = 65_535


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the files of a folder to requests whose Host header names this machine.

    Another site's page cannot read them through a host name that resolves to 127.0.0.1.
    """

    timeout = 60  # seconds that a client may be silent

    server: "PageServer"

    def send_head(self) -> Any:
        if not self._is_for_this_machine():
            return None
        file = self._served_file()
        if file is None:
            self.send_error(404)
            return None
        if self.server.codes is None or file != self.server.page:
            return super().send_head()
        page = with_prompts(file.read_text(encoding="utf8")).encode()
        self._send_headers("text/html; charset=utf-8", len(page))
        return io.BytesIO(page)

    def do_POST(self) -> None:
        """Answer a text that a reader typed. Only the page itself may ask.

        A page of another site cannot: browsers name its origin, and ask before they send JSON to another origin, which
        this server does not allow.
        """
        if not self._is_for_this_machine():
            return
        length = self.headers.get("Content-Length") or ""
        if self.server.codes is None or self.path != "/prompts":
            self.send_error(404)
        elif self.headers.get("Origin") != f"http://{self.headers['Host']}":
            self.send_error(403, "Only the page that is served here may ask")
        elif self.headers.get_content_type() != "application/json":
            self.send_error(415, "The body must be application/json")
        elif not (length.isascii() and length.isdecimal() and len(length) < 20):
            self.send_error(411)
        elif int(length) > MOST_BYTES:
            self.send_error(413)
        else:
            self._answer(self.rfile.read(int(length)))

    def _answer(self, body: bytes) -> None:
        assert self.server.codes is not None
        try:
            with self.server.one_at_a_time:
                values = answer(self.server.codes, body)
        except Exception:
            traceback.print_exc()
            self.send_error(500, "An error of posmask: its terminal shows more")
            return
        if values is None:
            self.send_error(400)
            return
        content = json.dumps(values, allow_nan=False).encode()
        with suppress(ConnectionError):  # The browser left the page.
            self._send_headers("application/json", len(content))
            self.wfile.write(content)

    def _send_headers(self, kind: str, length: int) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _is_for_this_machine(self) -> bool:
        """Whether the Host header names this machine; if not, the request is refused."""
        name, _, port = (self.headers.get("Host") or "").rpartition(":")
        if name in ("127.0.0.1", "localhost") and port == str(self.connection.getsockname()[1]):
            return True
        self.send_error(403, "This page is served to 127.0.0.1 and localhost only")
        return False

    def _served_file(self) -> Path | None:
        """The file in the folder that is requested; None for others, and for those that a symbolic link leads to."""
        try:
            path = Path(self.translate_path(self.path))
            file = path / "index.html" if path.is_dir() else path
            is_served = file.is_file() and file.resolve().is_relative_to(Path(self.directory).resolve())
        except (ValueError, OSError):  # NUL characters, or a name that is too long
            return None
        return file if is_served else None

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


class PageServer(http.server.ThreadingHTTPServer):
    """Serves one page.

    Attributes:
        page: its file.
        codes: encodes texts; None: the page has no box for texts.
        one_at_a_time: held while a text is encoded, because models and SAEs are large.
    """

    request_queue_size = 64  # A page requests its data at once.
    page: Path
    codes: Codes | None
    one_at_a_time: threading.Lock

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print errors, but not that a browser closed its connection."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def page_server(page: Path, port: int = 0, codes: Codes | None = None) -> "PageServer":
    """Return a server of a report page, bound to 127.0.0.1; `serve_forever` starts it.

    Args:
        page: folder that `posmask report --all` wrote, or a self-contained HTML file, which is served alone.
        port: 0 takes any free port.
        codes: encodes a text that a reader types; one call at a time. With None, or a page of another version of
            posmask, the page has no box for texts.

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
        server = PageServer(("127.0.0.1", port), partial(handler, directory=str(page)))
    except OSError as error:
        raise BadSetting(
            f"port {port} cannot be used ({error.strerror}), perhaps because another program serves there: choose "
            "another with --port; 0 takes any free one"
        ) from None
    server.page = page if is_file else page / "index.html"
    server.codes = codes if takes_prompts(server.page) else None
    server.one_at_a_time = threading.Lock()
    return server
