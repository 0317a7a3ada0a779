"""The page at /: a chat playground with a live view of the engine. Plain files, read once, nothing from elsewhere."""

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from fastapi import FastAPI, Request, Response

from atom.entrypoints.openai.errors import ApiError

_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
_HEADERS = {
    # Answers of a model are hostile input. Trusted types make the browser refuse innerHTML and its like altogether.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Kept, but asked for again each time (mostly 304): page and scripts of two versions never mix.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class _StaticFile:
    content: bytes
    media_type: str
    etag: str

    def answer(self, request: Request) -> Response:
        headers = {**_HEADERS, "ETag": self.etag}
        known = request.headers.get("if-none-match", "")
        if known.strip() == "*" or self.etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)


def mount_ui(app: FastAPI) -> None:
    """Serve the page at / and what it loads under /ui/, which needs no API key."""
    pages = _load()

    async def page(request: Request) -> Response:
        return pages["index.html"].answer(request)

    async def static_file(name: str, request: Request) -> Response:
        found = pages.get(name)
        if found is None:
            raise ApiError(404, "Not Found")
        return found.answer(request)

    async def icon(request: Request) -> Response:
        return pages["icon.svg"].answer(request)

    for path, handler in (("/", page), ("/ui/{name}", static_file), ("/favicon.ico", icon)):
        app.add_api_route(path, handler, methods=["GET", "HEAD"], include_in_schema=False)


def _load() -> dict[str, _StaticFile]:
    loaded = {}
    for entry in files("atom.entrypoints.openai").joinpath("static").iterdir():
        kind = _TYPES.get(entry.name.rpartition(".")[2])
        if kind is not None:
            content = entry.read_bytes()
            loaded[entry.name] = _StaticFile(content, kind, f'"{hashlib.sha256(content).hexdigest()[:20]}"')
    return loaded
