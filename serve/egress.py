"""The only outgoing HTTP client, with the guard against requests to our own network (SSRF).

A URL is written by a tenant, so it may name a host inside. `check` refuses what the text alone gives
away, when a URL is registered and again when it is used. The address is checked where it counts, at
connect time: a name is resolved once per connection, and the socket connects to one of the very
addresses that were found public. A second lookup with another answer (DNS rebinding) has no effect.
No redirects, and no proxies from the environment: `httpcore2` knows neither. ADR 9.
"""

import asyncio
import ipaddress
import math
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from urllib.parse import urlsplit

import httpcore2

from serve.config import Egress


Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Host and port to addresses, best first. Raises OSError when there are none."""

URL_CHARS_MAX = 2048
"""What browsers and proxies commonly take."""

ADDRESSES_MAX = 4
CONNECT_S_MAX = 3.0
"""Tries of one connection, and the longest of each: a lost SYN is sent again after 1 s. All four fit
into the default time limit."""

LOOKUP_S_MAX = 30.0
"""How long common resolvers try. A lookup cannot be cancelled: its thread hangs on after the exchange
has run into its time limit."""

REASON_CHARS_MAX = 200
"""Of a network error's text; it is kept with each delivery."""

_PRINTABLE = re.compile(r"[!-~]+")

_NAME = re.compile(
    r"(?=.{1,253}$)"
    r"(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)+"  # at least two labels: `localhost` is ours
    r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?"  # the last begins with a letter: not `0x7f.1` or `127.1`
)

_PORTS = {"http": 80, "https": 443}

_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
"""All else in IPv6 is special: loopback, NAT64 (64:ff9b::/96, 64:ff9b:1::/48), IPv4-mapped and
-compatible, unique local, link-local, multicast, segment routing, reserved."""

_SPECIAL = tuple(
    map(
        ipaddress.ip_network,
        (
            "168.63.129.16",  # a public address by which Azure's hosts serve their guests
            "192.0.0.0/24",  # protocol assignments; Python calls two of them global
            "192.88.99.0/24",  # 6to4 relays
            "2001::/23",  # protocol assignments: Teredo, ORCHID; later Pythons call some global
            "2002::/16",  # 6to4: holds any IPv4 address; Python calls it global
            "3fff::/20",  # documentation; unknown to Python 3.11
        ),
    )
)


_FAILURES = (
    httpcore2.NetworkError,
    httpcore2.RemoteProtocolError,
    httpcore2.TimeoutException,
    OSError,  # from a lookup; from TLS in mid-stream, which is not always wrapped
)


class Refused(Exception):
    """The policy forbids this URL or its addresses. It will not pass; its text is for the tenant."""


class Unreachable(Exception):
    """The network, or the other side, failed. It may pass; its text is for the tenant."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: header names are lower-case, the body is cut at `egress.body_bytes_max`."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def is_public(address: str) -> bool:
    """Whether anybody on the internet could reach this address; False for what is no address."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if ip.version == 6 and (ip not in _GLOBAL_UNICAST or "%" in address):  # noqa: PLR2004
        return False
    return ip.is_global and not ip.is_multicast and not any(ip in net for net in _SPECIAL)


def check(url: str, settings: Egress) -> httpcore2.URL:
    """The parts of a URL that may be called, as far as its text can tell.

    Raises Refused.
    """
    if len(url) > URL_CHARS_MAX or not _PRINTABLE.fullmatch(url):
        message = f"A URL has at most {URL_CHARS_MAX} characters, all of them printable ASCII."
        raise Refused(message)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise Refused("This is not a URL.") from None
    if parts.scheme not in _PORTS or not host:
        raise Refused("A URL begins with https:// and a host.")
    if "@" in parts.netloc:
        raise Refused("A URL must not hold a user name or a password.")
    port = _PORTS[parts.scheme] if port is None else port
    if _place(host, port) not in settings.insecure_allowed:
        if parts.scheme != "https":
            raise Refused("Only https is allowed.")
        if port not in settings.ports:
            raise Refused(f"Port {port} is not allowed, only {_listed(settings.ports)}.")
        if not (_NAME.fullmatch(host) or is_public(host)):
            raise Refused(f"The host {host!r} is neither a public name nor a public address.")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return httpcore2.URL(scheme=parts.scheme, host=host, port=port, target=target)


def _place(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _host_header(url: httpcore2.URL) -> str:
    """With brackets around IPv6, which the library's own would lack, and the port if unusual."""
    place = _place(url.host.decode(), url.port or 0)
    return place.removesuffix(f":{_PORTS[url.scheme.decode()]}")


def _listed(ports: Iterable[int]) -> str:
    return " and ".join(map(str, ports))


class EgressClient:
    """Sends requests to URLs that tenants wrote. One per process.

    At most `egress.connections_max` at once; what is beyond waits, within its own time limit.
    """

    def __init__(
        self,
        settings: Egress,
        *,
        resolve: Resolve | None = None,
        network: httpcore2.AsyncNetworkBackend | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`resolve`, `network` and `tls` default to the system's."""
        self._settings = settings
        # For each connection one that is asked, and those of earlier exchanges that still hang: with
        # the defaults 3, 192 in all. Were there fewer, a tenant whose name servers are silent could
        # keep others' names waiting. Threads are made only when needed, and they are not those that
        # the rest of the process waits for.
        lookups = 1 + math.ceil(LOOKUP_S_MAX / settings.timeout_s)
        self._threads = ThreadPoolExecutor(lookups * settings.connections_max, "egress-resolver")
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=tls or httpcore2.default_ssl_context(),
            max_connections=settings.connections_max,
            network_backend=_GuardedNetwork(
                frozenset(settings.insecure_allowed),
                resolve or self._resolve,
                network or httpcore2.AnyIOBackend(),
            ),
        )

    async def post(self, url: str, *, content: bytes, headers: Mapping[str, str]) -> Answer:
        """Send a body and return the beginning of the answer, whatever its status.

        Raises Refused, and Unreachable also when it took longer than `egress.timeout_s` in all.
        """
        target = check(url, self._settings)
        # A connection that is kept may be closed just as it is used again: a lost try.
        own = {"user-agent": "headrace", "connection": "close", "host": _host_header(target)}
        try:
            async with (
                asyncio.timeout(self._settings.timeout_s),
                self._pool.stream(
                    "POST", target, headers=list({**headers, **own}.items()), content=content
                ) as response,
            ):
                return Answer(
                    response.status,
                    {
                        name.decode("latin-1").lower(): value.decode("latin-1")
                        for name, value in response.headers
                    },
                    await self._beginning(response),
                )
        except TimeoutError as error:
            message = f"No answer within {self._settings.timeout_s:g} s."
            raise Unreachable(message) from error
        except _FAILURES as error:
            message = f"{type(error).__name__}: {error}"[:REASON_CHARS_MAX]
            raise Unreachable(message) from error

    async def aclose(self) -> None:
        """Close all connections. Lookups that hang end with their own time limit."""
        await self._pool.aclose()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _beginning(self, response: httpcore2.Response) -> bytes:
        """The first bytes of a body. As it came: nothing is decompressed."""
        body = b""
        async for piece in response.aiter_stream():
            body += piece
            if len(body) >= self._settings.body_bytes_max:
                break
        return body[: self._settings.body_bytes_max]

    async def _resolve(self, host: str, port: int) -> Sequence[str]:
        found = await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return [str(info[4][0]) for info in found]


class _GuardedNetwork(httpcore2.AsyncNetworkBackend):
    """Connects to public addresses only; TLS and HTTP above it go on with the host's name."""

    def __init__(
        self, exempt: frozenset[str], resolve: Resolve, network: httpcore2.AsyncNetworkBackend
    ) -> None:
        self._exempt = exempt
        self._resolve = resolve
        self._network = network

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore2's signature
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """A connection to the first of the host's public addresses that answers.

        Raises Refused when none is public, ConnectError, ConnectTimeout.
        """
        failure: Exception = httpcore2.ConnectError("The name has no address.")
        limit_s = CONNECT_S_MAX if timeout is None else min(timeout, CONNECT_S_MAX)
        for address in _alternating(await self._allowed(host, port))[:ADDRESSES_MAX]:
            try:
                return await self._network.connect_tcp(
                    address, port, limit_s, local_address, socket_options
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure

    async def _allowed(self, host: str, port: int) -> Sequence[str]:
        """Addresses of a host, as literals: nothing below looks a name up again."""
        try:
            addresses: Sequence[str] = [str(ipaddress.ip_address(host))]
        except ValueError:
            addresses = await self._resolve(host, port)
        if not addresses or _place(host, port) in self._exempt:
            return addresses
        public = [address for address in addresses if is_public(address)]
        if not public:  # the address stays unsaid: a tenant must not learn our network from it
            raise Refused(f"The host {host!r} has no public address.")
        return public


def _alternating(addresses: Sequence[str]) -> Sequence[str]:
    """The two families in turn, or a dead IPv6 with many addresses would use up all tries."""
    families = [":" in address for address in addresses]
    rank = [families[:place].count(family) for place, family in enumerate(families)]
    return [address for _, address in sorted(zip(rank, addresses, strict=True), key=itemgetter(0))]
