"""The page at `/`: a handful of files out of the package, with the headers that keep it to itself.

The policy lets the page load and reach its own server only, and run no script or style but its files: what a
model says can neither run nor call home.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).with_name("page")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def respond(name: str, if_none_match: str | None = None) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of `GET /` (name "index.html") and `GET /page/{name}`.

    if_none_match: that header of the request; 304 if the browser has the file as it is.
    """
    found = _files().get(name)
    if found is None:
        return 404, {"content-type": "text/plain; charset=utf-8"}, b"no such file\n"
    etag, body = found
    headers = {
        "content-type": TYPES[Path(name).suffix],
        "etag": etag,
        "cache-control": "no-cache",
        "content-security-policy": POLICY,
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cross-origin-opener-policy": "same-origin",
    }
    if if_none_match is not None and etag in (tag.strip() for tag in if_none_match.split(",")):
        return 304, headers, b""
    return 200, headers, body


@cache
def _files() -> dict[str, tuple[str, bytes]]:
    """Name to (etag, content) of every file of the page."""
    files = {}
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in TYPES:
            body = path.read_bytes()
            files[path.name] = (f'"{hashlib.sha256(body).hexdigest()[:20]}"', body)
    return files
