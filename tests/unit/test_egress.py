"""What may be called, and what the socket really connects to."""

import asyncio
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpcore2
import pytest
import trustme

from serve.config import Egress
from serve.egress import (
    ADDRESSES_MAX,
    URL_CHARS_MAX,
    Answer,
    EgressClient,
    Refused,
    Unreachable,
    check,
    is_public,
)


PUBLIC = "93.184.215.14"
PUBLIC_TOO = "198.51.99.7"
PUBLIC_V6 = "2606:2800:21f:cb07:6820:80da:af6b:8b2c"
NO_TRUST = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Trusts nobody. The system's takes 30 ms to make."""
CUT = b"\0"
"""A reply that ends so is the last: the server hangs up."""
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"

NOT_PUBLIC = {
    "loopback": "127.0.0.1",
    "all of 127/8": "127.8.9.10",
    "loopback, IPv6": "::1",
    "unspecified": "0.0.0.0",  # noqa: S104 - an address to refuse
    "this network": "0.1.2.3",
    "unspecified, IPv6": "::",
    "private 10/8": "10.1.2.3",
    "private 172.16/12": "172.31.255.254",
    "private 192.168/16": "192.168.0.1",
    "link-local, cloud metadata": "169.254.169.254",
    "cloud metadata, in a public range": "168.63.129.16",
    "cloud metadata, in protocol assignments": "192.0.0.192",
    "protocol assignment that Python calls global": "192.0.0.9",
    "cloud metadata, in 100.64/10": "100.100.100.200",
    "carrier-grade NAT": "100.64.0.1",
    "benchmarking": "198.18.0.1",
    "documentation": "192.0.2.1",
    "multicast": "239.1.2.3",
    "multicast, global scope": "224.0.1.1",
    "reserved": "240.0.0.1",
    "broadcast": "255.255.255.255",
    "6to4 relay": "192.88.99.1",
    "link-local, IPv6": "fe80::1",
    "link-local with a zone": "fe80::1%1",
    "public with a zone": "2606:2800::1%1",
    "unique local": "fd00:ec2::254",
    "site-local": "fec0::1",
    "multicast, IPv6": "ff02::1",
    "multicast, IPv6, global scope": "ff0e::1",
    "IPv4-mapped loopback": "::ffff:127.0.0.1",
    "IPv4-mapped public": f"::ffff:{PUBLIC}",
    "IPv4-compatible": "::7f00:1",
    "NAT64 of loopback": "64:ff9b::7f00:1",
    "NAT64 of a public address": "64:ff9b::5db8:d70e",
    "NAT64, local use": "64:ff9b:1::7f00:1",
    "Teredo": "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "ORCHID": "2001:20::1",
    "6to4 of loopback": "2002:7f00:1::",
    "6to4 of a public address": "2002:5db8:d70e::1",
    "discard": "100::1",
    "documentation, IPv6": "2001:db8::1",
    "documentation, IPv6, the newer": "3fff::1",
    "segment routing": "5f00::1",
    "reserved, IPv6": "4000::1",
    "no address": "hooks.example",
}


@pytest.mark.parametrize("address", NOT_PUBLIC.values(), ids=NOT_PUBLIC.keys())
def test_an_address_that_is_not_the_internets_is_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", [PUBLIC, PUBLIC_TOO, PUBLIC_V6, "8.8.8.8", "2a00:1450::1"])
def test_a_public_address_is_public(address):
    assert is_public(address)


NUMBERS = [
    "2130706433",
    "0x7f000001",
    "017700000001",
    "0x7f.1",
    "127.1",
    "0177.0.0.1",
    "127.0.0.0x1",
]
NUMBERS += [
    "134744072",
    "0x08080808",
    "010.8.8.8",
    "8.8.2056",
    "8.8.8.8.",
    "1.2.3.4.5",
    "127.0.0.1.",
]
URLS = {
    "userinfo": "https://user@hooks.example/",
    "user and password": "https://user:pass@hooks.example/",
    "empty userinfo": "https://@hooks.example/",
    "a host in the userinfo": "https://hooks.example@169.254.169.254/",
    "a backslash before the host": "https://hooks.example\\@127.0.0.1/",
    "http": "http://hooks.example/",
    "http on an allowed port": "http://hooks.example:443/",
    "another scheme": "ftp://hooks.example/",
    "a file": "file:///etc/passwd",
    "gopher": "gopher://hooks.example:443/_x",
    "no scheme": "hooks.example/in",
    "no host": "https:///in",
    "only a port": "https://:443/",
    "nothing": "",
    "a port that is not allowed": "https://hooks.example:22/",
    "port 80": "https://hooks.example:80/",
    "port 0": "https://hooks.example:0/",
    "a port beyond all": "https://hooks.example:99999/",
    "a port that is no number": "https://hooks.example:https/",
    "localhost": "https://localhost/",
    "localhost, another spelling": "https://LOCALHOST:8443/",
    "one label": "https://metadata/",
    "a final dot": "https://hooks.example./",
    "an empty label": "https://hooks..example/",
    "a label of 64": f"https://{'a' * 64}.example/",
    "a long name": f"https://{'a.' * 130}example/",
    "a percent sign": "https://127%2e0%2e0%2e1/",
    "digits that only look so": "https://①②⑦.0.0.1/",
    "a full stop that only looks so": "https://127。0。0。1/",
    "not ASCII": "https://hooks.example/é",
    "a line break": "https://hooks.example/\r\nx: y",
    "a tab in the host": "https://127.0.\t0.1/",
    "a space": "https://hooks.example/a b",
    "a lone bracket": "https://[::1/",
    "a name in brackets": "https://[hooks.example]/",
    "too long": f"https://hooks.example/{'a' * URL_CHARS_MAX}",
}


@pytest.mark.parametrize("url", URLS.values(), ids=URLS.keys())
def test_a_url_is_refused_for_its_text(url):
    with pytest.raises(Refused):
        check(url, Egress())


@pytest.mark.parametrize("host", [*NUMBERS, *list(NOT_PUBLIC.values())[:-1]])
def test_a_literal_host_is_refused(host):
    with pytest.raises(Refused):
        check(f"https://[{host}]/" if ":" in host else f"https://{host}/", Egress())


@pytest.mark.parametrize(
    ("url", "place", "target"),
    [
        ("https://hooks.example", (b"hooks.example", 443), b"/"),
        ("HTTPS://Hooks.Example:8443/In?a=1&b=%2F#top", (b"hooks.example", 8443), b"/In?a=1&b=%2F"),
        ("https://xn--mller-kva.example/", (b"xn--mller-kva.example", 443), b"/"),
        ("https://_dmarc.a-b.example?x", (b"_dmarc.a-b.example", 443), b"/?x"),
        (f"https://{PUBLIC}/in", (PUBLIC.encode(), 443), b"/in"),
        (f"https://[{PUBLIC_V6}]:443/", (PUBLIC_V6.encode(), 443), b"/"),
    ],
)
def test_a_url_that_may_be_called(url, place, target):
    parts = check(url, Egress())
    assert (parts.host, parts.port) == place
    assert (parts.scheme, parts.target) == (b"https", target)


def test_only_the_listed_place_is_exempt():
    settings = Egress(insecure_allowed=("127.0.0.1:9000", "[::1]:9000", "hooks:9000"))
    assert check("http://127.0.0.1:9000/in", settings).port == 9000
    assert check("http://[::1]:9000/in", settings).host == b"::1"
    assert check("http://hooks:9000/in", settings).host == b"hooks"
    for url in ("http://127.0.0.1:9001/", "http://127.0.0.2:9000/", "http://u@127.0.0.1:9000/"):
        with pytest.raises(Refused):
            check(url, settings)


@dataclass
class Network(httpcore2.AsyncNetworkBackend):
    """Sends every connection to one loopback server and remembers where it was meant to go."""

    port: int
    dead: set[str] = field(default_factory=set)
    tried: list[str] = field(default_factory=list)

    async def connect_tcp(self, host, port, *more):
        self.tried.append(host)
        if host in self.dead:
            raise httpcore2.ConnectError("dead")
        return await httpcore2.AnyIOBackend().connect_tcp("127.0.0.1", self.port, *more)


class Names:
    """A resolver that gives its answers one after the other, the last one for ever."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, int]] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append((host, port))
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@dataclass
class Receiver:
    """A raw server that answers each request with `reply`, and then waits for the client to go."""

    port: int = 0
    reply: bytes = OK
    heard: list[bytes] = field(default_factory=list)
    open: int = 0
    open_max: int = 0
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.open_max = max(self.open, self.open_max)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            self.heard.append(head + await reader.readexactly(size))
            writer.write(self.reply)
            if self.reply.endswith(CUT):
                writer.close()
            await reader.read()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # a client that takes no more than it wants
        finally:
            self.open -= 1
            self.gone.set()
            writer.close()

    @property
    def settings(self) -> Egress:
        return Egress(insecure_allowed=(f"127.0.0.1:{self.port}",), timeout_s=5)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/in?x=1"


@asynccontextmanager
async def receiving(tls: ssl.SSLContext | None = None, **more) -> AsyncIterator[Receiver]:
    receiver = Receiver(**more)
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    async with server:
        yield receiver


@asynccontextmanager
async def client(settings: Egress | None = None, **more) -> AsyncIterator[EgressClient]:
    one = EgressClient(settings or Egress(), **{"tls": NO_TRUST, **more})
    try:
        yield one
    finally:
        await one.aclose()


async def post(one: EgressClient, url: str, body: bytes = b"{}") -> Answer:
    return await one.post(url, content=body, headers={"webhook-id": "msg_1"})


async def test_a_post_and_its_answer():
    reply = OK.replace(b"\r\n\r", b"\r\nRetry-After: 7\r\n\r")
    async with receiving(reply=reply) as receiver, client(receiver.settings) as one:
        answer = await post(one, receiver.url, b'{"a":1}')
    assert (answer.status, answer.body) == (200, b"ok")
    assert answer.headers["retry-after"] == "7"
    (request,) = receiver.heard
    assert request.startswith(b"POST /in?x=1 HTTP/1.1\r\n")
    assert request.endswith(b'\r\n\r\n{"a":1}')
    assert f"host: 127.0.0.1:{receiver.port}\r\n".encode() in request
    assert b"webhook-id: msg_1\r\n" in request


async def test_a_redirect_is_an_answer_like_others():
    target = b"HTTP/1.1 307 X\r\nlocation: http://127.0.0.1/x\r\ncontent-length: 0\r\n\r\n"
    async with receiving(reply=target) as receiver, client(receiver.settings) as one:
        assert (await post(one, receiver.url)).status == 307
    assert len(receiver.heard) == 1


async def test_proxies_of_the_environment_are_not_asked(monkeypatch):
    for name in ("http_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with receiving() as receiver, client(receiver.settings) as one:
        assert (await post(one, receiver.url)).status == 200


async def test_a_body_is_read_up_to_its_bound():
    endless = b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n" + b"x" * 9000
    async with receiving(reply=endless) as receiver, client(receiver.settings) as one:
        assert (await post(one, receiver.url)).body == b"x" * 4096
        await receiver.gone.wait()  # the rest is not waited for: the connection is dropped


async def test_a_compressed_body_stays_as_it_came():
    reply = (
        b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\n\x1f\x8b\x08\x00"
    )
    async with receiving(reply=reply) as receiver, client(receiver.settings) as one:
        assert (await post(one, receiver.url)).body == b"\x1f\x8b\x08\x00"


async def test_the_time_limit_covers_the_whole_exchange():
    async with receiving(reply=OK[:-2]) as receiver:
        settings = receiver.settings.model_copy(update={"timeout_s": 0.05})
        async with client(settings) as one:
            with pytest.raises(Unreachable, match=r"No answer within 0\.05 s"):
                await post(one, receiver.url)
            await receiver.gone.wait()


async def test_the_time_limit_covers_the_lookup():
    async def hang(_host: str, _port: int) -> Sequence[str]:
        await asyncio.Event().wait()
        return ()

    async with client(Egress(timeout_s=0.05), resolve=hang) as one:
        with pytest.raises(Unreachable, match="No answer"):
            await post(one, "https://hooks.example/")


@pytest.mark.parametrize(
    "reply", [CUT, b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\nx: " + b"x" * 200_000]
)
async def test_what_is_no_http_answer_is_unreachable(reply):
    async with receiving(reply=reply) as receiver, client(receiver.settings) as one:
        with pytest.raises(Unreachable):
            await post(one, receiver.url)


async def test_a_closed_port_is_unreachable():
    async with receiving() as receiver:
        pass
    async with client(receiver.settings) as one:
        with pytest.raises(Unreachable, match="ConnectError"):
            await post(one, receiver.url)


async def test_a_name_without_an_address_is_unreachable():
    async with client(resolve=Names([])) as one:
        with pytest.raises(Unreachable, match="no address"):
            await post(one, "https://hooks.example/")


async def test_a_failed_lookup_is_unreachable(monkeypatch):
    def fail(*_args, **_more):
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", fail)
    async with client() as one:
        with pytest.raises(Unreachable, match="not known"):
            await post(one, "https://hooks.example/")


async def test_lookups_that_hang_keep_no_other_name_waiting(monkeypatch):
    """For two rounds, because a thread is not free when its exchange has run into the time limit."""
    silent = asyncio.Semaphore(0)
    loop, over = asyncio.get_running_loop(), threading.Event()

    def look(host: str, *_args, **_more) -> list[tuple]:
        if host == "silent.example":
            loop.call_soon_threadsafe(silent.release)
            over.wait()
        return [(2, 1, 6, "", ("10.0.0.5", 443))]

    monkeypatch.setattr("socket.getaddrinfo", look)
    try:
        async with asyncio.timeout(20), client(Egress(connections_max=16)) as one:
            for _ in range(2):
                hanging = [
                    asyncio.create_task(post(one, "https://silent.example/")) for _ in range(16)
                ]
                for _ in hanging:
                    await silent.acquire()
                for task in hanging:
                    task.cancel()
                await asyncio.wait(hanging)
            with pytest.raises(Refused, match="no public address"):  # it was looked up
                await post(one, "https://hooks.example/")
    finally:
        over.set()


async def test_the_systems_lookup_is_checked_too(monkeypatch):
    found = [(2, 1, 6, "", ("10.0.0.5", 443)), (10, 1, 6, "", ("fe80::1%eth0", 443, 0, 2))]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_args, **_more: found)
    async with client(network=(network := Network(0))) as one:
        with pytest.raises(Refused, match="no public address"):
            await post(one, "https://hooks.example/")
    assert network.tried == []


@pytest.mark.parametrize("address", NOT_PUBLIC.values(), ids=NOT_PUBLIC.keys())
async def test_a_name_of_such_an_address_is_refused_before_any_connection(address):
    async with client(resolve=Names([address]), network=(network := Network(0))) as one:
        with pytest.raises(Refused) as caught:
            await post(one, "https://hooks.public.example/")
    assert network.tried == []
    assert address not in str(caught.value), "a tenant must not learn our network from it"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def trusting(authority) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture(scope="module")
def certified(authority) -> Callable[[str], ssl.SSLContext]:
    def make(host: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(host).configure_cert(context)
        return context

    return make


@pytest.fixture(scope="module")
def hooks_tls(certified) -> ssl.SSLContext:
    return certified("hooks.example")


async def test_host_and_server_name_are_the_urls(hooks_tls, trusting):
    said: list[str | None] = []
    hooks_tls.sni_callback = lambda _socket, name, _context: said.append(name)
    async with receiving(hooks_tls) as receiver:
        network = Network(receiver.port)
        async with client(resolve=Names([PUBLIC]), network=network, tls=trusting) as one:
            assert (await post(one, "https://hooks.example:8443/in")).status == 200
            assert (await post(one, "https://hooks.example/in")).status == 200
    assert said == ["hooks.example"] * 2
    assert network.tried == [PUBLIC] * 2
    assert b"host: hooks.example:8443\r\n" in receiver.heard[0]
    assert b"host: hooks.example\r\n" in receiver.heard[1]


async def test_a_certificate_of_another_name_is_unreachable(certified, trusting):
    async with receiving(certified("other.example")) as receiver:
        network = Network(receiver.port)
        async with client(resolve=Names([PUBLIC]), network=network, tls=trusting) as one:
            with pytest.raises(Unreachable, match=r"hooks\.example"):
                await post(one, "https://hooks.example/")
    assert receiver.heard == []


async def test_an_unknown_authority_is_unreachable(hooks_tls):
    async with receiving(hooks_tls) as receiver:
        network = Network(receiver.port)
        async with client(resolve=Names([PUBLIC]), network=network, tls=None) as one:
            with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
                await post(one, "https://hooks.example/")


async def test_of_several_addresses_only_public_ones_are_tried(hooks_tls, trusting):
    names = Names(["10.0.0.1", PUBLIC, "::1", PUBLIC_TOO, "169.254.169.254"])
    async with receiving(hooks_tls) as receiver:
        network = Network(receiver.port, dead={PUBLIC})
        async with client(resolve=names, network=network, tls=trusting) as one:
            assert (await post(one, "https://hooks.example/")).status == 200
    assert network.tried == [PUBLIC, PUBLIC_TOO]


async def test_a_second_lookup_with_another_answer_has_no_effect(hooks_tls, trusting):
    """DNS rebinding: the address that was checked is the one that is connected to."""
    names = Names([PUBLIC], ["127.0.0.1"])
    async with receiving(hooks_tls) as receiver:
        network = Network(receiver.port)
        async with client(resolve=names, network=network, tls=trusting) as one:
            assert (await post(one, "https://hooks.example/")).status == 200
            assert (names.asked, network.tried) == ([("hooks.example", 443)], [PUBLIC])
            with pytest.raises(Refused):
                await post(one, "https://hooks.example/")
    assert network.tried == [PUBLIC]


async def test_the_two_families_are_tried_in_turn():
    many = [f"2606:2800::{number}" for number in range(1, 9)]
    network = Network(0, dead={*many, PUBLIC, PUBLIC_TOO})
    async with client(resolve=Names([*many, PUBLIC, PUBLIC_TOO]), network=network) as one:
        with pytest.raises(Unreachable, match="dead"):
            await post(one, "https://hooks.example/")
    assert network.tried == [many[0], PUBLIC, many[1], PUBLIC_TOO]
    assert len(network.tried) == ADDRESSES_MAX


async def test_the_host_header_of_an_ipv6_literal_has_brackets():
    async with receiving() as receiver:
        network = Network(receiver.port)
        settings = Egress(insecure_allowed=("[::1]:9000",))
        async with client(settings, network=network) as one:
            await post(one, "http://[::1]:9000/")
    assert b"host: [::1]:9000\r\n" in receiver.heard[0]
    assert network.tried == ["::1"]


async def test_no_more_connections_than_allowed():
    async with receiving() as receiver:
        settings = receiver.settings.model_copy(update={"connections_max": 2})
        async with client(settings) as one, asyncio.TaskGroup() as group:
            tasks = [group.create_task(post(one, receiver.url)) for _ in range(8)]
    assert [task.result().status for task in tasks] == [200] * 8
    assert receiver.open_max == 2


async def test_no_connection_is_kept():
    async with receiving() as receiver, client(receiver.settings) as one:
        await post(one, receiver.url)
        await receiver.gone.wait()
    assert b"connection: close\r\n" in receiver.heard[0]
