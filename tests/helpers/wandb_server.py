"""A W&B server in this process, which works, hangs or fails as a test asks."""

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pusht_act.runs import wandb_logger
from tests.helpers.wandb_runs import forget_settings

HOLD_S, NOT_HELD_S = 600.0, 200.0
"""Seconds for which a hanging server holds a request, and what is surely less, on a loaded machine, too."""

BUCKET = {
    "id": "b", "name": "RUN", "displayName": "d", "description": "", "config": "{}", "sweepName": None,
    "historyLineCount": 0, "project": {"id": "p", "name": "lerobot_pusht", "entity": {"id": "e", "name": "me"}},
}  # fmt: skip

ANSWER = {"data": {"serverInfo": {"features": []}, "upsertBucket": {"bucket": BUCKET, "inserted": True}}}
"""As much of W&B's as its client needs to begin a run."""


class Server(http.server.ThreadingHTTPServer):
    """A W&B server that takes runs in until it is `broken`: then it says nothing more, or only 500.

    It keeps each run's rows by their offset, as W&B does.
    """

    daemon_threads = True
    broken: str | None = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), self.RequestHandlerClass)
        self.closing = threading.Event()
        self.rows: dict[str, list[str]] = {}

    def answer(self, path: str, said: bytes) -> dict[str, Any]:
        """Take in what a client says, and return what it is told."""
        if path.endswith("/file_stream"):
            sent = json.loads(said).get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
            rows = self.rows.setdefault(path.split("/")[-2], [])
            rows[sent["offset"] : sent["offset"] + len(sent["content"])] = sent["content"]
        asked = json.loads(said) if path == "/graphql" else {}
        run_id = (asked.get("variables") or {}).get("name") or ""
        if "RunResumeStatus" in asked.get("query", ""):
            return {"data": {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"},
                                       "bucket": self._status(run_id)}}}  # fmt: skip
        answered: dict[str, Any] = json.loads(json.dumps(ANSWER).replace("RUN", run_id))
        return answered

    def _status(self, run_id: str) -> dict[str, Any] | None:
        if run_id not in self.rows:
            return None
        rows = self.rows[run_id]
        return {
            **BUCKET, "name": run_id, "summaryMetrics": "{}", "logLineCount": 0, "eventsLineCount": 0,
            "historyLineCount": len(rows), "historyTail": json.dumps(rows[-1:]), "eventsTail": "[]", "tags": [],
            "wandbConfig": '{"t": 1}',
        }  # fmt: skip

    class RequestHandlerClass(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            said = self.rfile.read(int(self.headers.get("content-length", 0)))
            broken = self.server.broken  # type: ignore[attr-defined]
            if broken == "hangs":
                self.server.closing.wait(HOLD_S)  # type: ignore[attr-defined]
                return
            body = json.dumps(self.server.answer(self.path, said)).encode()  # type: ignore[attr-defined]
            self.send_response(500 if broken else 200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST  # noqa: N815

        def log_message(self, *args: Any) -> None:
            pass


@pytest.fixture
def server(nobody: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Start one and log in to it."""
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(wandb_logger, "WANDB_FINISH_S", 3.0)
    forget_settings(monkeypatch)
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()
