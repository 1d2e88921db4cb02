"""The only door to the network for addresses that somebody else wrote down: webhooks, endpoints of Hubs.

Whoever names a URL must not reach with our feet what they cannot reach with theirs: this machine, its network, a
cloud's metadata. So a URL is held against rules first (`Guard.check`), and the address it leads to when the connection
is made (`Guard.addresses`), which goes to that very address: a name that resolves otherwise a moment later changes
nothing. The name still is what TLS verifies and what `Host` says.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import httpcore2
import httpx2

PORTS = frozenset({443, 8443})
MAX_URL = 2000
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Sequence[str]]


class ForbiddenAddress(ValueError):
    """A URL that is not called from here, and why."""


def resolve_by_system(host: str, port: int) -> list[str]:
    """Every address of a name. Raises `OSError`."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class Guard:
    """Which URLs may be called: https at the usual ports of public addresses, and besides what `allow` names.

    `allow`: host names, addresses and networks (`10.0.0.0/8`) that an administrator trusts. A host that a URL names in
    that form may have any port, and http; a name that leads into an allowed network still needs https.
    Raises ValueError for an entry that is none of these.
    """

    def __init__(self, allow: Iterable[str] = (), *, resolve: Resolve = resolve_by_system) -> None:
        self._resolve = resolve
        self._hosts: set[str] = set()
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        for entry in allow:
            try:
                self._networks.append(ipaddress.ip_network(entry))
            except ValueError:
                if "/" in entry or ":" in entry or not entry.strip("."):
                    wrong = f"{entry!r} is neither a host name, nor an address, nor a network such as 10.0.0.0/8"
                    raise ValueError(wrong) from None
                self._hosts.add(_plain(entry))

    @cached_property
    def verified(self) -> ssl.SSLContext:
        """Certificates are verified, with the system's authorities or those of `SSL_CERT_FILE`."""
        return httpx2.create_ssl_context()

    def check(self, written: str) -> httpx2.URL:
        """A URL whose form allows it to be called; nothing is looked up. Raises `ForbiddenAddress`."""
        if len(written) > MAX_URL:
            raise ForbiddenAddress(f"a URL has at most {MAX_URL:,} characters")
        if not written.isascii() or not written.isprintable() or " " in written or "\\" in written:
            raise ForbiddenAddress("a URL has plain characters only; write others as %XX, and names in punycode")
        try:
            url = httpx2.URL(written)
        except (httpx2.InvalidURL, ValueError) as error:
            raise ForbiddenAddress(f"this is not a URL: {error}") from None
        if url.scheme not in ("https", "http") or not url.host:
            raise ForbiddenAddress("only https URLs are called: https://host/path")
        if url.userinfo:
            raise ForbiddenAddress("a URL with a user's name or password in it is not called: it would be shown")
        if url.fragment:
            raise ForbiddenAddress("a URL that is called has no fragment (#…)")
        literal = _literal(url.host)
        if literal is not None:
            self._check_address(literal, url.host)
        trusted = self._is_named(url.host, literal)
        if url.scheme == "http" and not trusted:
            raise ForbiddenAddress("only https URLs are called; http needs the administrator's permission for the host")
        if not 0 < (url.port or 443) < 2**16 or ((url.port or 443) not in PORTS and not trusted):
            raise ForbiddenAddress(f"only the ports {_listed(PORTS)} are called, not {url.port}")
        return url

    def addresses(self, host: str, port: int) -> list[str]:
        """Where a name leads, each address allowed. Raises `ForbiddenAddress`; `OSError` where it leads nowhere."""
        found = self._resolve(host, port)
        if not found:
            raise OSError(f"{host} has no address")
        if _plain(host) not in self._hosts:
            for address in found:
                self._check_address(ipaddress.ip_address(address.partition("%")[0]), host)
        return list(found)

    def transport(self, *, seconds: float | None = None, most_bytes: int | None = None) -> httpx2.BaseTransport:
        """Sends requests, redirects too, only where the rules allow it; no proxy takes them elsewhere.

        `seconds` and `most_bytes` bound everything that is read over one connection.
        """
        return _GuardedTransport(self, seconds, most_bytes)

    def _is_named(self, host: str, literal: Address | None) -> bool:
        return _plain(host) in self._hosts or (literal is not None and self._is_in_network(literal))

    def _is_in_network(self, address: Address) -> bool:
        return any(address.version == network.version and address in network for network in self._networks)

    def _check_address(self, address: Address, host: str) -> None:
        if self._is_in_network(address):
            return
        for each in (address, *_inside(address)):
            if not (_is_public(each) or self._is_in_network(each)):
                # Not which: what names mean inside is not for those who are kept outside.
                raise ForbiddenAddress(f"{host} leads to no public address; an administrator may allow it")


def _plain(host: str) -> str:
    return host.rstrip(".").lower()


def _literal(host: str) -> Address | None:
    """The address that a host is in itself, in any spelling that the system takes for one (127.1, 0x7f000001, …)."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return None
    return ipaddress.ip_address(str(found[0][4][0]).partition("%")[0])


def _inside(address: Address) -> list[Address]:
    """The IPv4 addresses that an IPv6 address stands for, by whatever kind of translation."""
    if address.version == 4:
        return []
    found: list[Address | None] = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if address in _NAT64:
        found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    if int(address) < 2**32:
        found.append(ipaddress.IPv4Address(int(address)))
    return [each for each in found if each is not None]


def _is_public(address: Address) -> bool:
    if address.version == 6 and (address.ipv4_mapped or address.is_site_local):
        return address.ipv4_mapped is not None and _is_public(address.ipv4_mapped)
    odd = address.is_multicast or address.is_reserved or address.is_unspecified or address.is_link_local
    return address.is_global and not odd


def _listed(ports: Iterable[int]) -> str:
    return " and ".join(map(str, sorted(ports)))


class _GuardedTransport(httpx2.HTTPTransport):
    def __init__(self, guard: Guard, seconds: float | None, most_bytes: int | None) -> None:
        super().__init__(verify=guard.verified)
        self._guard = guard
        # Each request looks at where its name leads, so no connection is kept.
        backend = _Backend(guard, seconds, most_bytes)
        self._pool = httpcore2.ConnectionPool(guard.verified, network_backend=backend, max_keepalive_connections=0)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self._guard.check(str(request.url.copy_with(fragment=None)))
        return super().handle_request(request)


class _Backend(httpcore2.NetworkBackend):
    """Connects to an address that was looked at, not to a name."""

    def __init__(self, guard: Guard, seconds: float | None, most_bytes: int | None) -> None:
        self._guard, self._seconds, self._most_bytes = guard, seconds, most_bytes
        self._system = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        until = None if self._seconds is None else time.monotonic() + self._seconds
        try:
            addresses = self._guard.addresses(host, port)
        except (OSError, UnicodeError) as error:
            raise httpcore2.ConnectError(f"{host} cannot be found: {error}") from None
        for last, address in enumerate(addresses, 1 - len(addresses)):
            try:
                stream = self._system.connect_tcp(address, port, _rest(until, timeout), local_address, socket_options)
                return _Bounded(stream, until, self._most_bytes)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                if last == 0:
                    raise
        raise AssertionError("there is an address, or `addresses` says that there is none")


class _Bounded(httpcore2.NetworkStream):
    """A connection that ends at a moment, and after so many bytes, however slowly they trickle in."""

    def __init__(self, stream: httpcore2.NetworkStream, until: float | None, most_bytes: int | None) -> None:
        self._stream, self._until, self._left = stream, until, most_bytes

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._left == 0:
            raise httpcore2.ReadError("the answer is too long")
        most = max_bytes if self._left is None else min(max_bytes, self._left)
        found = self._stream.read(most, _rest(self._until, timeout))
        if self._left is not None:
            self._left -= len(found)
        return found

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _rest(self._until, timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        secured = self._stream.start_tls(ssl_context, server_hostname, _rest(self._until, timeout))
        return _Bounded(secured, self._until, self._left)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _rest(until: float | None, timeout: float | None) -> float | None:
    if until is None:
        return timeout
    left = until - time.monotonic()
    if left <= 0:
        raise httpcore2.ReadTimeout("the answer took too long")
    return left if timeout is None else min(left, timeout)
