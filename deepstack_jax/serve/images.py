"""Pictures that a request brings along or names. Nothing here opens a file, and no address but those that were allowed."""

from __future__ import annotations

import base64
import binascii
import http.client
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Collection
from urllib.parse import SplitResult, urlsplit

from deepstack_jax.data.formats.image_files import ImageError
from deepstack_jax.errors import UserError
from deepstack_jax.printing import label, quote

SECONDS = 10.0  # that fetching one picture may take
_PORTS = {"http": 80, "https": 443}
_BLOCK = 1 << 16


class UrlError(UserError):
    """A picture that this server does not read."""


def image_bytes(url: object, allowed: Collection[str], most: int) -> bytes:
    """The encoded picture of a `data:` URL, or one fetched from an allowed host.

    Args:
      allowed: HOST or HOST:PORT each, as `--allow_urls` names them.
      most: bytes of a picture that is fetched.

    Raises:
      UrlError, ImageError: it is neither, or cannot be had.
    """
    if not isinstance(url, str):
        raise UrlError(f"an image's url is {quote(url)}, expected a string; send the picture as data:image/png;base64,...")
    if url.startswith("data:"):
        head, comma, data = url.partition(",")
        if not comma or not re.fullmatch(r"data:image/[\w.+-]+;base64", head):
            raise UrlError(f"an image begins with {label(head)}, expected data:image/TYPE;base64,")
        try:
            return base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise UrlError(f"an image is no base64: {error}; send all of it, without line ends") from error
    try:
        parts, port = urlsplit(url), urlsplit(url).port
    except ValueError as error:
        raise UrlError(f"the image's url {label(url)} cannot be read: {error}") from error
    usual = _PORTS.get(parts.scheme, 0)
    names = {f"{parts.hostname}:{port or usual}"} | ({str(parts.hostname)} if port in (None, usual) else set())
    if not usual or parts.username is not None or not names & set(allowed):
        hosts = f"; it fetches from: {', '.join(sorted(allowed))}" if allowed else " (--allow_urls names hosts to fetch from)"
        raise UrlError(f"this server does not open {label(url)}; send the picture itself as data:image/png;base64,...{hosts}")
    try:
        return _fetch(parts, port or usual, most)
    except (OSError, http.client.HTTPException) as error:
        raise ImageError(f"cannot fetch image {label(url)}: {error or type(error).__name__}") from error


def _fetch(parts: SplitResult, port: int, most: int) -> bytes:
    """The body of one answer; no redirect is followed, for it would lead past the list."""
    host, deadline = str(parts.hostname), time.monotonic() + SECONDS
    plain = socket.create_connection((_address(host, port), port), timeout=SECONDS)
    secure = ssl.create_default_context().wrap_socket(plain, server_hostname=host) if parts.scheme == "https" else plain
    connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
    connection.sock = secure  # to the address that was looked at: asked again, a name may lead elsewhere
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"Host": parts.netloc, "Accept": "image/*", "User-Agent": "deepstack_jax"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise OSError(f"it answers {answer.status}, expected 200; redirects are not followed")
        read = bytearray()
        while block := answer.read1(_BLOCK):
            read += block
            if len(read) > most:
                raise OSError(f"it is larger than {most:,} bytes")
            if time.monotonic() > deadline:
                raise OSError(f"it takes longer than {SECONDS:.0f} s")
        return bytes(read)
    finally:
        connection.close()


def _address(host: str, port: int) -> str:
    """Where a name leads to: the open internet, or else exactly the address that was allowed."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not all(ipaddress.ip_address(address.partition("%")[0]).is_global for address in found):
        raise OSError("its name leads to a private address; allow the address itself, if that is meant")
    return found[0]
