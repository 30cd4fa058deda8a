"""An object store as far as reading needs it: files of a folder, by the calls of S3 that read objects."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse


class Server(ThreadingHTTPServer):
    """Serves the folders in a folder as buckets; ``seen`` are the objects that were read, ``signed`` who read them."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.seen, self.signed = folder, [], set()
        self.address = f"127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self):
        name = unquote(urlparse(self.path).path).lstrip("/")
        file = self.server.folder / name
        # AWS4-HMAC-SHA256 Credential=KEY/...
        self.server.signed.add(self.headers.get("Authorization", "").partition("Credential=")[2].partition("/")[0])
        if not file.is_file():
            self.send_response(404)
            body = b"<Error><Code>NoSuchKey</Code><Message>The specified key does not exist.</Message></Error>"
        else:
            body, asked = file.read_bytes(), self.headers.get("Range")
            whole = len(body)
            if asked:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                body = body[int(first) : int(last) + 1]
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{int(first) + len(body) - 1}/{whole}")
            self.send_header("ETag", f'"{whole}"')
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            if self.command == "GET":
                self.server.seen.append(name)
        self.send_header("Content-Type", "application/xml" if not file.is_file() else "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD = _answer  # noqa: N815 # the names that the class asks for
