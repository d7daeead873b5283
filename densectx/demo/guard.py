"""Who may ask, and what every answer forbids the browser."""

from __future__ import annotations

from typing import Final

from densectx.demo.wire import Refusal, Request

HOSTS: Final = ("127.0.0.1", "localhost", "::1")
"""The names of this machine, where alone the page is."""

HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Of every answer: nothing from elsewhere is loaded, nothing is framed, kept, guessed at or readable by other pages."""


def check(request: Request, port: int) -> None:
    """Refuse what another web page may have sent.

    The Host must be one of this machine's: a foreign name that has been made to point here (DNS rebinding) is not. A
    POST must come from this page, where its browser says where it comes from; files are not readable from other sites.

    Raises:
        Refusal: with status 400, 403, 405 or 415.
    """
    if request.method not in ("GET", "HEAD", "POST"):
        raise Refusal(405, "Only GET and POST are answered here.", {"Allow": "GET, HEAD, POST"})
    host = request.headers.get("host")
    if host is None:
        raise Refusal(400, "The request does not say which host it is for.")
    if host.lower() not in _hosts(port):
        raise Refusal(403, "This page answers under the address that it printed, and no other.")
    origin = request.headers.get("origin")
    if origin is not None and origin.lower() != f"http://{host.lower()}":
        raise Refusal(403, "Requests from other pages are not answered.")
    site = request.headers.get("sec-fetch-site", "none")
    if site not in ("none", "same-origin") and request.path != "/":
        raise Refusal(403, "Requests from other pages are not answered.")
    if request.method == "POST" and request.headers.get("content-type") != "application/octet-stream":
        # no form can send this type, and a script elsewhere must ask first, which is not answered
        raise Refusal(415, "Send the picture as application/octet-stream.")


def _hosts(port: int) -> set[str]:
    names = {f"[{host}]" if ":" in host else host for host in HOSTS}
    return {f"{name}:{port}" for name in names} | (names if port == 80 else set())
