"""A chat completions server whose faults follow a script, and which counts what it was asked and what it gave."""
import hashlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("429", "500", "503", "timeout", "drop", "torn body", "not json", "cut json", "no choices", "empty")


def token_of(body) -> str:
    """What tells one request from another, by the server's own reckoning: a hash of all that was sent."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def completion(text, finish="stop", usage=(100, 10)):
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m",
            "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}]} | (
        {"usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}} if usage else {})


class ScriptedServer(ThreadingHTTPServer):
    """`fault(token, attempt, body)` names a fault, or is None; `answer(body)` is the text, or (status, JSON object).

    `asked[token]` counts requests and `given[token]` good replies that were sent in full.
    """
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, answer, fault=lambda token, attempt, body: None, sleep=1.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.fault, self.sleep = answer, fault, sleep
        self.asked, self.given, self.faults, self.lock = Counter(), Counter(), Counter(), threading.Lock()
        self.requests, self.on_request = [], lambda: None
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # a client that was killed


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        token = token_of(body)
        with server.lock:
            server.asked[token] += 1
            attempt = server.asked[token]
            server.requests.append({"path": self.path, "headers": {k.lower(): v for k, v in self.headers.items()}, "body": body})
        server.on_request()
        fault = server.fault(token, attempt, body)
        if fault:
            with server.lock:
                server.faults[fault] += 1
            self.fail(fault)
            return
        value = server.answer(body)
        self.reply(*(value if isinstance(value, tuple) else (200, completion(value))))
        with server.lock:
            server.given[token] += 1

    def fail(self, fault):
        whole = json.dumps(completion("lost")).encode()
        if fault in ("429", "500", "503"):
            self.reply(int(fault), {"error": {"message": "later", "code": None}}, {"Retry-After": "0", "retry-after-ms": "20"})
        elif fault == "timeout":
            time.sleep(self.server.sleep)
            self.close_connection = True
        elif fault == "drop":
            self.close_connection = True
        elif fault == "torn body":
            self.send(200, whole[:40], length=len(whole))
            self.close_connection = True
        elif fault == "not json":
            self.send(200, b"<html>busy</html>", kind="text/html")
        elif fault == "cut json":
            self.send(200, whole[:len(whole) // 2])
        elif fault == "no choices":
            self.reply(200, {"id": "x", "choices": None})
        else:
            self.reply(200, completion(""))

    def reply(self, status, value, headers=()):
        self.send(status, json.dumps(value).encode(), headers=headers)

    def send(self, status, payload, length=None, kind="application/json", headers=()):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length or len(payload)))
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload)
        self.wfile.flush()

    def log_message(self, *_):
        pass
