"""Serve the report of runs in progress on this machine: every request reads the records again."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tempering.reports.page import REFRESH, fitting
from tempering.reports.records import load_runs

HOST = "127.0.0.1"
NAMES = (HOST, "localhost", "[::1]")


def server(render: Callable[[], str], port: int = 8000) -> ThreadingHTTPServer:
    """Return a server of one page at "/", which only this machine reaches; call ``serve_forever`` on it.

    There are no files behind it: every other address is unknown. A request for another host name, as of a page
    elsewhere whose name leads here, is refused.

    Args:
        render: returns the page; the message of a ValueError or OSError is shown in its place, until the next try.
        port: 0 takes a free one.

    Raises:
        OSError: if the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "tempering", ""

        def do_GET(self) -> None:
            host = self.headers.get("Host", "")
            if (host.rpartition(":")[0] or host) not in NAMES and host not in NAMES:
                self._send(403, "this page is for this machine only")
            elif self.path.partition("?")[0] != "/":
                self._send(404, "there is only one page: /")
            else:
                try:
                    self._send(200, render(), page=True)
                except (ValueError, OSError) as error:  # such as of a folder without records yet
                    self._send(503, f"{error}")

        do_HEAD = do_GET

        def _send(self, status: int, text: str, *, page: bool = False) -> None:
            content = text if page else _message(text, refresh=status == 503)
            data = content.encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            return

    return ThreadingHTTPServer((HOST, port), Handler)


def _message(text: str, *, refresh: bool) -> str:
    reload = f'<meta http-equiv="refresh" content="{REFRESH}">' if refresh else ""
    style = "<style>body { font: 16px/1.5 sans-serif; max-width: 40em; margin: 4em auto; padding: 0 1em }</style>"
    head = (
        f'<meta charset="utf-8"><meta name="color-scheme" content="light dark"><title>Tempering</title>{reload}{style}'
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body><p>{html.escape(text)}</p></body></html>'


def page_of(
    paths: Sequence[Path], *, title: str | None = None, control: str | None = None, public: bool = False
) -> str:
    """Return the present page of the runs at or below these paths."""
    return fitting(load_runs(paths, public=public), title=title, control=control, folder=Path())
