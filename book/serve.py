"""Show the built book on this machine as a web host would: compressed, and with the book's own page for addresses that lead nowhere.

    python book/serve.py [FOLDER] [--port 8000]
"""

import argparse
import gzip
import http.server
import io
import sys
from pathlib import Path

import page_shell

ROOT = Path(__file__).resolve().parent.parent
COMPRESSED = (".html", ".css", ".js", ".svg", ".xml", ".json", ".ipynb", "/")


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, for this machine alone."""

    def send_head(self):
        """The file, compressed where that helps."""
        path = Path(self.translate_path(self.path))
        path = path / "index.html" if path.is_dir() and self.path.endswith("/") else path
        welcome = "gzip" in self.headers.get("Accept-Encoding", "")
        if not (welcome and path.is_file() and path.suffix in COMPRESSED):
            return super().send_head()
        body = gzip.compress(path.read_bytes(), 6)
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(str(path)))
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return io.BytesIO(body)

    def send_error(self, code, message=None, explain=None):
        """The book's own page where nothing is; its links begin at this server."""
        missing = Path(self.directory) / "404.html"
        if code != 404 or not missing.is_file():
            return super().send_error(code, message, explain)
        body = missing.read_text(encoding="utf8").replace(f'<base href="{page_shell.settings()["site"]}/">', '<base href="/">').encode()
        self.send_response(404)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        """Nothing: a reader of the book needs no list of requests."""


def server(folder: Path, port: int) -> http.server.ThreadingHTTPServer:
    """A server of `folder` on this machine; port 0 takes any that is free."""
    return http.server.ThreadingHTTPServer(("127.0.0.1", port), lambda *args: Handler(*args, directory=str(folder)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "_build" / "html")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    if not (arguments.folder / "index.html").exists():
        print(f"There is no book in {arguments.folder}: `make book` builds it.", file=sys.stderr)
        return 1
    try:
        book = server(arguments.folder, arguments.port)
    except OSError as error:
        print(f"Port {arguments.port} cannot be used ({error.strerror}): name another, `make serve PORT=8001`.", file=sys.stderr)
        return 1
    print(f"The book is at http://localhost:{arguments.port} (stop with Ctrl-C).", flush=True)
    try:
        book.serve_forever()
    except KeyboardInterrupt:
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
