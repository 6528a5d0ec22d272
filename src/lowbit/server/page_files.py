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
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
}
POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
Headers = tuple[tuple[bytes, bytes], ...]


def respond(name: str, if_none_match: str | None = None) -> tuple[int, bytes, Headers, bytes] | None:
    """(status, content type, headers, body) of `GET /` (name "index.html") and `GET /page/{name}`.

    if_none_match: that header of the request; 304 if the browser has the file as it is. None: no such file.
    """
    found = _files().get(name)
    if found is None:
        return None
    etag, body = found
    headers = (
        (b"etag", etag.encode()),
        (b"cache-control", b"no-cache"),
        (b"content-security-policy", POLICY),
        (b"referrer-policy", b"no-referrer"),
        (b"x-content-type-options", b"nosniff"),
        (b"cross-origin-opener-policy", b"same-origin"),
    )
    known = if_none_match is not None and etag in (tag.strip() for tag in if_none_match.split(","))
    return 304 if known else 200, TYPES[Path(name).suffix], headers, b"" if known else body


@cache
def _files() -> dict[str, tuple[str, bytes]]:
    """Name to (etag, content) of every file of the page."""
    files = {}
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in TYPES:
            body = path.read_bytes()
            files[path.name] = (f'"{hashlib.sha256(body).hexdigest()[:20]}"', body)
    return files
