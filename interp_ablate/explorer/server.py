"""The explorer's pages over HTTP: fixed routes, one request of the model at a time, answers as they are made.

No file is served but the page and its script and style. On the loopback the request's host must be the loopback;
elsewhere every request needs the token. Requests that do something are JSON of the page's own origin.

Knows: HTTP, the queue, who may ask. Does not know: models, or what a request computes.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from interp_ablate.errors import InterpAblateError
from interp_ablate.explorer.views import layer_view, page_of
from interp_ablate.storage.bundled_data import bundled
from interp_ablate.storage.incoming_files import parse_json
from interp_ablate.storage.strict_json import json_text

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request

    from interp_ablate.explorer.session import ExplorerSession

logger = logging.getLogger(__name__)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LONGEST_REQUEST = 1 << 20  # bytes
COOKIE = "interp_ablate_token"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'"
)
_FILES = {
    "page.js": "text/javascript",
    "explorer.js": "text/javascript",
    "page.css": "text/css",
    "explorer.css": "text/css",
}
_END = object()


class _Refused(Exception):
    """A request that is not answered, with its status."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def _warned(first: Callable[[], None]) -> None:
    """Do what is done at first; a fault of it is told, and meets whoever asks for the same."""
    try:
        first()
    except InterpAblateError as error:
        logger.warning("warming up: %s", error)
    except Exception:
        logger.exception("warming up failed")


class _Queue:
    """The one thread that may use the model; what is asked waits for its turn, behind what is done at first."""

    def __init__(self, first: Callable[[], None]) -> None:
        self._thread = ThreadPoolExecutor(1, "explorer")
        self._submitted: list[Future[None]] = [self._thread.submit(_warned, first)]

    async def events(
        self, work: Callable[[], Iterator[dict[str, Any]]]
    ) -> AsyncIterator[dict[str, Any]]:
        """What the work yields, as it does; it is stopped when nobody listens any more."""
        loop, stopped = asyncio.get_running_loop(), Event()
        results: asyncio.Queue[Any] = asyncio.Queue()

        def send(value: Any) -> None:
            loop.call_soon_threadsafe(results.put_nowait, value)

        def run() -> None:
            try:
                for event in work():
                    send(event)
                    if stopped.is_set():
                        break
            except InterpAblateError as error:
                send({"error": str(error)})
            except Exception as error:
                logger.exception("a request failed")
                send({"error": f"{type(error).__name__}: see the terminal"})
            send(_END)

        # what nobody listens to any more still holds the model until its step is done
        self._submitted = [each for each in self._submitted if not each.done()]
        ahead = len(self._submitted)
        mine = self._thread.submit(run)
        self._submitted.append(mine)
        try:
            if ahead:
                yield {"waiting": ahead}
            while (event := await results.get()) is not _END:
                yield event
        finally:
            stopped.set()
            mine.cancel()  # where it has not begun


def explorer_app(session: ExplorerSession, *, token: str | None = None) -> Starlette:
    """The application; `token` is needed where it is reached from elsewhere than the loopback."""
    from starlette.applications import Starlette
    from starlette.responses import (
        HTMLResponse,
        JSONResponse,
        RedirectResponse,
        Response,
        StreamingResponse,
    )
    from starlette.routing import Route

    queue, page = _Queue(session.warm_up), page_of(session)

    async def index(request: Request) -> Response:
        if token and request.query_params.get("token"):
            answer: Response = RedirectResponse(request.url.path, 303)
            answer.set_cookie(COOKIE, token, httponly=True, samesite="strict")
            return answer
        return HTMLResponse(page)

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        text = bundled("templates", name).read_text(encoding="utf-8") if name in _FILES else None
        return Response(text, media_type=_FILES[name]) if text else Response(status_code=404)

    def streamed(work: Callable[[Any], Iterator[dict[str, Any]]]) -> Any:
        async def route(request: Request) -> Response:
            asked = await _asked(request)
            events = queue.events(lambda: work(asked))
            lines = (json_text(event) + "\n" async for event in events)
            return StreamingResponse(lines, media_type="application/x-ndjson")

        return route

    def single(work: Callable[[Any], dict[str, Any]]) -> Any:
        return streamed(lambda asked: iter((work(asked),)))

    async def refused(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": str(error)}, getattr(error, "status", 400))

    posts = {
        "answer": streamed(session.answer),
        "chat": streamed(session.chat),
        "tokens": single(session.tokens),
        "attribution": single(session.attribution),
        "trial": single(session.trial),
        "keep": single(session.keep),
        "layer": single(lambda asked: layer_view(session, asked)),
    }
    routes = [Route("/", index), Route("/{name}", file, methods=["GET"])]
    routes[1:1] = [Route(f"/{name}", route, methods=["POST"]) for name, route in posts.items()]
    app = Starlette(routes=routes, exception_handlers={_Refused: refused})
    app.add_middleware(_Guard, token=token)
    return app


async def _asked(request: Request) -> Any:
    """The JSON object of a request.

    Raises:
        _Refused: it is too long, no JSON object, or of another page.
    """
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise _Refused(403, "the request comes from another page")
    if request.headers.get("content-type", "").split(";")[0] != "application/json":
        raise _Refused(415, "requests are application/json")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LONGEST_REQUEST:
            raise _Refused(413, "the request is too long")
    try:
        asked = parse_json(body.decode("utf-8"))
    except ValueError as error:
        raise _Refused(400, f"no JSON: {error}") from error
    if not isinstance(asked, dict):
        raise _Refused(400, "a request is a JSON object")
    return asked


class _Guard:
    """Lets through who may ask, and adds the headers that keep a page to itself."""

    def __init__(self, app: Any, token: str | None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.requests import Request
        from starlette.responses import PlainTextResponse

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = {
                    "content-security-policy": POLICY
                    + ("" if self.token else "; frame-ancestors 'none'"),
                    "x-content-type-options": "nosniff",
                    "referrer-policy": "no-referrer",
                    "cache-control": "no-store",
                }
                message["headers"] += [(k.encode(), v.encode()) for k, v in more.items()]
            await send(message)

        request = Request(scope)
        if not self._may_ask(request):
            why = (
                "open the address with its token" if self.token else "this host is not the loopback"
            )
            await PlainTextResponse(why, 403)(scope, receive, with_headers)
            return
        await self.app(scope, receive, with_headers)

    def _may_ask(self, request: Request) -> bool:
        if self.token is None:  # a page elsewhere whose name points here has another host
            return urlsplit(f"//{request.headers.get('host', '')}").hostname in LOOPBACK
        given = request.query_params.get("token") or request.cookies.get(COOKIE) or ""
        return hmac.compare_digest(given.encode(), self.token.encode())
