"""`automatch review`: the page on this machine alone, writing the mapping itself when it is told to."""

from __future__ import annotations

import hmac
import json
import secrets
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from automatch.errors import AutomatchError, MappingError
from automatch.mapping import KeyMapping
from automatch.report.decisions import apply_decisions
from automatch.report.html import render_html

MAX_BODY = 64 * 2**20
HOST = "127.0.0.1"
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class ReviewServer:
    """Serves one review on 127.0.0.1, at a random port, behind a random token; a context manager.

    Args:
        mapping: what to review.
        path: where the decided mapping is written.
        port: 0 for a free one.
    """

    def __init__(self, mapping: KeyMapping, path: str | Path, *, port: int = 0) -> None:
        self.original, self.mapping, self.path = mapping, mapping, Path(path)
        self.token = secrets.token_urlsafe(24)
        self._server = _Server(self, port)
        self.page = render_html(mapping, save=f"/{self.token}/save").encode("utf-8")

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """The only address that answers."""
        return f"http://{HOST}:{self.port}/{self.token}/"

    def serve_forever(self) -> None:
        """Answer until `close` or an interrupt."""
        self._server.serve_forever(poll_interval=0.1)

    def save(self, decisions: Any) -> Path:
        """Put the decisions into the mapping and write it.

        Raises:
            MappingError: the decisions do not fit the mapping, or the file cannot be written.
        """
        mapping = apply_decisions(self.original, decisions)
        try:
            mapping.save(self.path)
        except OSError as error:
            raise MappingError(f"cannot write {str(self.path)!r}: {error.strerror or error}") from error
        self.mapping = mapping
        return self.path

    def close(self) -> None:
        """Stop answering and free the port."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> ReviewServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.server_close()


def review(
    mapping: KeyMapping, path: str | Path, *, port: int = 0, open_browser: bool = True, announce: Callable[[str], None] = print
) -> KeyMapping:
    """Serve the review of ``mapping`` until it is interrupted, and return the mapping as it was last saved.

    Args:
        mapping: what to review.
        path: where the page's Save button writes the decided mapping.
        port: 0 for a free one.
        open_browser: open the page in the default browser.
        announce: told the address.
    """
    import webbrowser

    with ReviewServer(mapping, path, port=port) as server:
        announce(server.url)
        if open_browser:
            webbrowser.open(server.url)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
        return server.mapping


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, review: ReviewServer, port: int) -> None:
        self.review = review
        super().__init__((HOST, port), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server_version = "automatch"
    sys_version = ""
    timeout = 60

    @property
    def _review(self) -> ReviewServer:
        assert isinstance(self.server, _Server)
        return self.server.review

    def do_GET(self) -> None:
        if self._is_ours(f"/{self._review.token}/"):
            self._answer(HTTPStatus.OK, self._review.page, "text/html; charset=utf-8")

    def do_POST(self) -> None:
        if not self._is_ours(f"/{self._review.token}/save"):
            return
        if self.headers.get("Content-Type", "").partition(";")[0].strip() != "application/json":
            self._tell(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "decisions must be sent as application/json")
            return
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit() or int(length) > MAX_BODY:
            self._tell(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"decisions must have a length, of at most {MAX_BODY} bytes")
            return
        try:
            path = self._review.save(json.loads(self.rfile.read(int(length))))
        except (AutomatchError, ValueError, RecursionError) as error:
            self._tell(HTTPStatus.BAD_REQUEST, str(error))
            return
        self._tell(HTTPStatus.OK, f"Saved {path}")

    def _is_ours(self, path: str) -> bool:
        """Whether a request comes from our own page: exact path with the token, our host, no foreign origin."""
        hosts = {f"{HOST}:{self._review.port}", f"localhost:{self._review.port}"}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") not in hosts or (origin is not None and origin not in {f"http://{host}" for host in hosts}):
            self._tell(HTTPStatus.FORBIDDEN, "this address serves one page, to this machine alone")
            return False
        if not hmac.compare_digest(self.path.encode("utf-8", "replace"), path.encode()):
            self._tell(HTTPStatus.NOT_FOUND, "not found")
            return False
        return True

    def _tell(self, status: HTTPStatus, message: str) -> None:
        self._answer(status, json.dumps({"message": message}).encode(), "application/json")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """The token is part of every address: nothing is logged."""
