"""--option serve: answers requests over HTTP as OpenAI's API does, and has a page to write on."""

from __future__ import annotations

import ipaddress
import json
import re
import socket
import sys
import threading
from collections.abc import Callable
from functools import lru_cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from minillama.cli import flags
from minillama.cli.bundled import use_bundled_model
from minillama.cli.header import report
from minillama.cli.loading import load_for_inference, load_llama, open_checkpoint
from minillama.cli.options import Command, Flag, Group, Options
from minillama.cli.pages import render
from minillama.cli.parser import number
from minillama.cli.xray import page_of_tokens

if TYPE_CHECKING:
    from minillama.serving import Engine

MOST_BYTES = 1_000_000  # of a request
MOST_CLIENTS = 32  # at once
PATIENCE = 30  # seconds that a client may keep a connection waiting
LOCAL = ("127.0.0.1", "localhost", "::1")
SERVER = Group(
    "server",
    (
        Flag("--port N", "the port; 0: any free one", number(int, "from 0 to 65535", lambda n: 0 <= n <= 65535), 8000),
        Flag("--host ADDRESS", "0.0.0.0 lets other computers in, and there is no password", str, "127.0.0.1"),
        flags.FINETUNED,
        flags.QUANTIZE,
    ),
    "At / there is a page. Routes: /v1/models, /v1/completions, /v1/chat/completions, /tokenize, /detokenize,\n"
    "/tokenizer_info, /classify (docs/serve.md).",
)


class Server(ThreadingHTTPServer):
    """The server of an engine. xray: given tokens and how many of them are the prompt, the X-ray page."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], engine: Engine, xray: Callable[[list[int], int], str]) -> None:
        self.engine, self.xray = engine, xray
        self.room = threading.Semaphore(MOST_CLIENTS)
        self.is_local = address[0] == "localhost" or is_loopback(address[0])
        self.names = tuple(dict.fromkeys((*LOCAL, address[0])))
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Reports an error in one line. A client that has left is none."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError):
            report(f"error: {type(error).__name__}: {error}")


def is_loopback(host: str) -> bool:
    """Whether an address reaches this computer alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Server
    has_begun = False  # whether the headers are sent
    server_version, sys_version = "mini-llama", ""
    timeout = PATIENCE

    def log_message(self, format: str, *arguments: Any) -> None:
        """Prints nothing for a request."""

    def do_GET(self) -> None:
        self.do("GET")

    def do_POST(self) -> None:
        self.do("POST")

    def do(self, method: str) -> None:
        """Answers a request, or says in one sentence why not."""
        from minillama.serving import Refused

        self.close_connection = True
        try:
            content = self.read() if method == "POST" else b""  # whole, before anything is answered
            self.check_origin()
            room = self.server.room
            if not room.acquire(blocking=False):
                raise Refused(f"the server has {MOST_CLIENTS} clients at once already; try again", 503)
            try:
                self.route(method, self.path.partition("?")[0], content)
            finally:
                room.release()
        except Refused as error:
            self.send_error(error.status, str(error))
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            self.send_error(500, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            raise

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Sends an error as JSON; in a stream that has begun, as its last event."""
        self.close_connection = True
        kind = "invalid_request_error" if code < 500 else "server_error"
        error = {"error": {"message": message or explain, "type": kind, "param": None, "code": int(code)}}
        if self.has_begun:
            self.wfile.write(f"data: {json.dumps(error)}\n\n".encode())
        else:
            self.send(error, code)

    def read(self) -> bytes:
        """The content that a client sent."""
        from minillama.serving import Refused

        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]+", length):
            raise Refused("the request has no Content-Length", 411)
        if len(length) > 9 or int(length) > MOST_BYTES:
            raise Refused(f"the request is larger than {MOST_BYTES:,} bytes", 413)
        return self.rfile.read(int(length))

    def check_origin(self) -> None:
        """Refuses requests that a page of another site may have made a browser send."""
        from minillama.serving import Refused

        origins = [origin.partition("//")[2] for origin in self.headers.get_all("Origin", [])]
        for name in (*self.headers.get_all("Host", [""]), *origins):
            host = name if name.endswith("]") or ":" not in name else name.rpartition(":")[0]
            if self.server.is_local and host.strip("[]").rstrip(".").lower() not in self.server.names:
                raise Refused(f"the server answers at {', '.join(self.server.names)} only; --host changes that", 403)

    def route(self, method: str, path: str, content: bytes) -> None:
        """Answers a request for a path."""
        from minillama.serving import Refused

        engine = self.server.engine
        gets = {
            "/": self.page,
            "/xray": self.xray,
            "/v1/models": engine.models,
            "/tokenizer_info": engine.tokenizer_info,
        }
        posts: dict[str, Callable[[dict[str, Any]], Any]] = {
            "/tokenize": engine.tokenize,
            "/detokenize": engine.detokenize,
            "/classify": engine.classify,
            "/v1/completions": engine.complete,
            "/v1/chat/completions": partial(engine.complete, chat=True),
        }
        if path not in {**gets, **posts}:
            raise Refused(f"there is no {path[:80]}", 404)
        if method != ("GET" if path in gets else "POST"):
            raise Refused(f"{path} takes {'GET' if path in gets else 'POST'}", 405)
        if path in gets:
            return self.send(gets[path]())
        try:
            request = json.loads(content)
        except (ValueError, RecursionError):
            raise Refused("the request is not JSON") from None
        if not isinstance(request, dict):
            raise Refused("the request must be a JSON object")
        found = posts[path](request)
        if not path.startswith("/v1/"):
            self.send(found)
        elif not request.get("stream"):
            self.send(next(found))
        else:
            self.head("text/event-stream", 200)
            for one in found:
                self.wfile.write(f"data: {json.dumps(one)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

    def page(self) -> str:
        """The page to write on."""
        engine = self.server.engine
        data = {"start": engine.tokenizer.bos_id if engine.tokenizer.adds_bos else None}
        return render("serve.html", script="serve.js", data=data, title=f"Write with {engine.name}", connects=True)

    def xray(self) -> str:
        """The X-ray page of /xray?tokens=1,2,3&prompt=2."""
        from minillama.serving import Refused

        fields = parse_qs(urlsplit(self.path).query)
        listed = fields.get("tokens", [""])[0]
        if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", listed):
            raise Refused("tokens must be token ids with commas between them, such as /xray?tokens=1,300,400&prompt=2")
        tokens = self.server.engine.encoded([int(one) for one in listed.split(",")])
        given = fields.get("prompt", [str(len(tokens))])[0]
        if not re.fullmatch("[0-9]{1,9}", given) or not 1 <= int(given) <= len(tokens):
            raise Refused(f"prompt must be the number of given tokens, from 1 to {len(tokens)}")
        try:
            return self.server.xray(tokens, int(given))
        except ValueError as error:
            raise Refused(error) from None

    def send(self, content: Any, status: int = 200) -> None:
        """Sends an answer: a page, or something as JSON."""
        data = content.encode() if isinstance(content, str) else json.dumps(content, allow_nan=False).encode()
        self.head("text/html; charset=utf-8" if isinstance(content, str) else "application/json", status, len(data))
        self.wfile.write(data)

    def head(self, kind: str, status: int, length: int | None = None) -> None:
        """Sends the status and the headers."""
        self.has_begun = True
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": length, "Cache-Control": "no-store"}.items():
            if value is not None:
                self.send_header(name, str(value))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()


def run(options: Options) -> None:
    """Loads the model and answers until Ctrl-C."""
    from minillama.decoding.fast_llama import fast_model
    from minillama.inference import TextClassifier
    from minillama.serving import Engine

    llama, tokenizer, device, dtype = load_for_inference(options)
    classifier = TextClassifier(options.finetuned, device=device) if options.finetuned else None
    model = fast_model(llama, dtype, options.quantize, 1, tell=report)
    engine = Engine(model, tokenizer, device, Path(options.pretrained_model_path).stem, classifier)
    drawing = threading.Lock()

    @lru_cache(maxsize=1)
    def plain() -> Any:
        return load_llama(options, open_checkpoint(options, tokenizer), dtype).to(device)

    def xray(tokens: list[int], given: int) -> str:
        with drawing:  # of the plain model, which `fast_model` takes apart
            return page_of_tokens(options.pretrained_model_path, plain(), tokenizer, tokens, given)

    try:
        server = Server((options.host, options.port), engine, xray)
    except OSError as error:
        where = f"--host {options.host} --port {options.port}"
        raise ValueError(f"{where}: {error.strerror or error}; choose another one") from error
    with server:
        shown = f"[{options.host}]" if ":" in options.host else options.host
        host = "localhost" if options.host in LOCAL[:2] else shown
        report(f"serving at http://{host}:{server.server_address[1]}/ (Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            report("stopped")
            engine.lock.acquire(timeout=PATIENCE)  # so that no thread computes while the program ends


COMMAND = Command(
    "serve",
    "answer requests over HTTP as OpenAI's API does, with a page to write on",
    (SERVER, flags.MODEL, flags.DEVICE),
    run,
    """
python run_llama.py --option serve
python run_llama.py --option serve --port 8080 --pretrained-model-path stories42M.pt
""",
    default_texts={"finetuned": "none; with it, /classify answers"},
    resolve=use_bundled_model,
    inputs=lambda options: [options.pretrained_model_path, options.finetuned],
    only_prints=lambda options: True,
)
