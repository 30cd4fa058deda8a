"""A W&B server as far as one run needs it: it takes what is sent, and falls silent when it is asked to."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Answers until ``silent`` is set; ``seen`` are the operations that it was asked for."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.silent, self.closed, self.seen = threading.Event(), threading.Event(), []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """Answer nothing more, and refuse connections."""
        self.closed.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def _reply(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.silent.is_set():
            self.server.closed.wait()
            return
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer = {}
        if self.path.endswith("/graphql"):
            asked = json.loads(body)
            query, variables = asked["query"], asked.get("variables") or {}
            name = query.split("(")[0].split("{")[0].split()[-1]
            self.server.seen.append(name)
            answer = {"data": self._data(query, variables)}
            if "createArtifact" in query:
                answer = {"errors": [{"message": "this server keeps no artifacts"}]}
        else:
            self.server.seen.append(self.path)
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = _reply  # noqa: N815 # the names that the class asks for

    def _data(self, query, variables):
        names = dict.fromkeys(("name", "entity", "username"), "somebody")
        entity = names | {"id": "1", "flags": "{}", "teams": {"edges": []}}
        if "upsertBucket" in query:
            project = {"id": "2", "name": "test", "entity": entity}
            named = {key: variables.get(key) for key in ("name", "displayName")}
            bucket = named | {
                "id": "3", "description": "", "config": "{}", "sweepName": None, "project": project,
                "historyLineCount": 0,
            }  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createRunFiles" in query:
            return {"createRunFiles": {"runID": "3", "uploadHeaders": [], "files": []}}
        versions = {"cliVersionInfo": {"max_cli_version": "99.0.0"}, "latestLocalVersionInfo": None}
        return {"viewer": entity, "serverInfo": versions, "model": None, "project": None, "organization": None}


def logged(file, name):
    """The values of a metric in W&B's own file: protocol buffers in blocks of 32 KiB, as LevelDB writes its log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, values = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last part
            record = Record.FromString(whole)
            values += [
                json.loads(item.value_json) for item in record.history.item if name in (item.key, *item.nested_key)
            ]
            whole = b""
    return values
