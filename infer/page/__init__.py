"""The web page that talks to the model: static files, served as they are."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

_FOLDER = Path(__file__).parent
_FILES = {"/": "index.html"} | {
    f"/page/{file.name}": file.name for file in _FOLDER.iterdir() if file.suffix in (".css", ".js")
}
# Nothing from elsewhere, nothing inline, in nobody's frame.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes() -> list[Route]:
    """The page at `/` and its parts."""

    def route(path: str, name: str) -> Route:
        async def serve(_: Request) -> Response:
            return FileResponse(_FOLDER / name, headers=_HEADERS)

        return Route(path, serve)

    return [route(path, name) for path, name in _FILES.items()]
