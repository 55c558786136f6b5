"""--option serve: answers requests over HTTP as OpenAI's API does, and has a page to write on."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from minillama.cli import flags
from minillama.cli.bundled import use_bundled_model
from minillama.cli.header import report
from minillama.cli.loading import load_for_inference
from minillama.cli.options import Command, Flag, Group, Options
from minillama.cli.parser import number

if TYPE_CHECKING:
    from minillama.serving import Engine

MOST_BYTES = 1_000_000  # of a request
MOST_CLIENTS = 32  # at once
PATIENCE = 30  # seconds that a client may keep a connection waiting
LOCAL = ("127.0.0.1", "localhost", "::1")
PORT = number(int, "from 0 (any free one) to 65535", lambda value: 0 <= value <= 65535)
SERVER = Group(
    "server",
    (
        Flag("--port N", "the port; 0: any free one", PORT, 8000),
        Flag(
            "--host ADDRESS",
            "the address to listen on; 0.0.0.0 lets other computers in, and there is no password",
            str,
            "127.0.0.1",
        ),
        flags.FINETUNED,
        flags.QUANTIZE,
    ),
    "Routes: /v1/models, /v1/completions, /v1/chat/completions, /tokenize, /detokenize, /tokenizer_info, /classify.\n"
    "At / there is a page.",
)


class Refused(Exception):
    """A request that gets an error. status: of HTTP."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    """Answers one connection. `server` is a `Server`."""

    server: Server
    server_version, sys_version = "mini-llama", ""
    timeout = PATIENCE

    def log_message(self, format: str, *arguments: Any) -> None:
        """Prints nothing for each request."""

    def do_GET(self) -> None:
        self.answer("GET")

    def do_POST(self) -> None:
        self.answer("POST")

    def answer(self, method: str) -> None:
        """Answers a request, an error included. A client that has left is forgotten."""
        from minillama.serving import BadRequest

        self.close_connection = True
        try:
            try:
                self.content = self.read_content() if method == "POST" else b""
                self.check_origin()
                if not self.server.room.acquire(blocking=False):
                    raise Refused(503, f"the server has {MOST_CLIENTS} clients at once already; try again")
                try:
                    self.route(method, urlsplit(self.path).path)
                finally:
                    self.server.room.release()
            except BadRequest as error:
                self.send(400, error_of(400, str(error)))
            except Refused as error:
                self.send(error.status, error_of(error.status, str(error)))
        except (ConnectionError, TimeoutError):
            pass

    def check_origin(self) -> None:
        """Raises Refused for requests that a page of another site may have made a browser send."""
        names = {self.headers.get("Host", "")}
        if origin := self.headers.get("Origin"):
            names.add(urlsplit(origin).netloc)
        for name in names:
            host = name.rpartition(":")[0] if not name.endswith("]") and ":" in name else name
            if self.server.is_local and host.strip("[]") not in LOCAL:
                raise Refused(403, f"the server answers at {', '.join(LOCAL)} only; --host changes that")

    def route(self, method: str, path: str) -> None:
        """Answers a request for a path."""
        engine = self.server.engine
        pages = {"/": self.server.page, "/xray": self.xray}
        facts = {"/v1/models": engine.models, "/tokenizer_info": engine.tokenizer_info}
        whole = {"/tokenize": engine.tokenize, "/detokenize": engine.detokenize, "/classify": engine.classify}
        streams = {"/v1/completions": engine.complete, "/v1/chat/completions": engine.chat}
        wanted = "GET" if path in {**pages, **facts} else "POST"
        if path not in {**pages, **facts, **whole, **streams}:
            raise Refused(404, f"there is no {path[:80]}; see the page at /")
        if method != wanted:
            raise Refused(405, f"{path} takes {wanted}")
        if path in pages:
            self.send(200, pages[path]().encode(), "text/html; charset=utf-8")
        elif path in facts:
            self.send(200, facts[path]())
        elif path in whole:
            self.send(200, whole[path](self.body()))
        else:
            request = self.body()
            found = streams[path](request)
            if request.get("stream"):
                self.send_stream(found)
            else:
                self.send(200, next(found))

    def read_content(self) -> bytes:
        """What a client sent, read before anything is answered: else it might not read the answer."""
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise Refused(411, "the request has no Content-Length")
        if int(length) > MOST_BYTES:
            raise Refused(413, f"the request is larger than {MOST_BYTES:,} bytes")
        return self.rfile.read(int(length))

    def body(self) -> dict[str, Any]:
        """The JSON object that a client sent."""
        try:
            found = json.loads(self.content)
        except (ValueError, RecursionError):
            raise Refused(400, "the request is not JSON") from None
        if not isinstance(found, dict):
            raise Refused(400, "the request must be a JSON object")
        return found

    def xray(self) -> str:
        """The X-ray page of /xray?tokens=1,2,3&prompt=2."""
        fields = {name: values[-1] for name, values in parse_qs(urlsplit(self.path).query).items()}
        try:
            tokens = [int(one) for one in fields.get("tokens", "").split(",")]
            given = int(fields.get("prompt", len(tokens)))
        except ValueError:
            raise Refused(400, "tokens must be numbers with commas between them") from None
        tokens = self.server.engine.encoded(tokens)
        return self.server.xray(tokens, min(max(given, 1), len(tokens)))

    def send(self, status: int, content: Any, kind: str = "application/json") -> None:
        """Sends an answer: bytes, or something as JSON."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(data)

    def send_stream(self, found: Iterator[dict[str, Any]]) -> None:
        """Sends pieces as server-sent events."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        for one in found:
            self.wfile.write(f"data: {json.dumps(one)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")


def error_of(status: int, message: str) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


class Server(ThreadingHTTPServer):
    """The server of an engine. xray: given tokens and how many of them are the prompt, the X-ray page."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], engine: Engine, xray: Any) -> None:
        self.engine, self.xray = engine, xray
        self.room = threading.Semaphore(MOST_CLIENTS)
        self.is_local = address[0] in LOCAL
        super().__init__(address, Handler)

    def page(self) -> str:
        """The page to write on."""
        from minillama.cli.pages import render

        tokenizer = self.engine.tokenizer
        data = {"context": self.engine.context, "classes": self.engine.classifier is not None}
        data["start"] = tokenizer.bos_id if tokenizer.adds_bos else None
        return render(
            "serve.html", script="serve.js", data=data, title=f"mini-llama: {self.engine.name}", connects=True
        )

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Forgets clients that have left, and reports other errors in one line."""
        import sys

        kind, error, _ = sys.exc_info()
        if not isinstance(error, ConnectionError | TimeoutError):
            report(f"error: {kind.__name__ if kind else ''}: {error}")


def check(options: Options) -> None:
    if options.finetuned is not None and not Path(options.finetuned).exists():
        raise FileNotFoundError(f"--finetuned {options.finetuned}: no such file")


def run(options: Options) -> None:
    """Loads the model and answers until Ctrl-C."""
    from functools import lru_cache

    from minillama.cli.loading import load_llama, open_checkpoint
    from minillama.cli.xray import page_of_tokens
    from minillama.decoding.fast_llama import fast_model
    from minillama.inference import TextClassifier
    from minillama.serving import BadRequest, Engine

    llama, tokenizer, device, dtype = load_for_inference(options)
    classifier = TextClassifier(options.finetuned, device=device) if options.finetuned else None
    model = fast_model(llama, dtype, options.quantize, 1, tell=report)
    engine = Engine(model, tokenizer, device, Path(options.pretrained_model_path).stem, classifier)
    drawing = threading.Lock()

    @lru_cache(maxsize=1)
    def plain() -> Any:  # `fast_model` takes the model apart
        return load_llama(options, open_checkpoint(options, tokenizer), dtype).to(device)

    def xray(tokens: list[int], given: int) -> str:
        try:
            with drawing:
                return page_of_tokens(options.pretrained_model_path, plain(), tokenizer, tokens, given)
        except ValueError as error:
            raise BadRequest(str(error)) from None

    try:
        server = Server((options.host, options.port), engine, xray)
    except OSError as error:
        raise ValueError(
            f"--host {options.host} --port {options.port}: {error.strerror or error}; choose another with --port"
        ) from error
    with server:
        host, port = server.server_address[:2]
        report(f"serving at http://{'localhost' if host in LOCAL else host}:{port}/ (Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            report("stopped")


COMMAND = Command(
    "serve",
    "answer requests over HTTP, as OpenAI's API does, with a page to write on",
    (SERVER, flags.MODEL, flags.DEVICE),
    run,
    """
python run_llama.py --option serve
python run_llama.py --option serve --port 8080 --pretrained-model-path stories42M.pt
""",
    defaults={"finetuned": None},
    default_texts={"finetuned": "none; with it, /classify answers"},
    resolve=use_bundled_model,
    check=check,
    only_prints=lambda options: True,
)
