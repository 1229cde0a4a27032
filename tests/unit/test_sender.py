"""The sender, from the Store over a socket to a receiver and back."""

import asyncio
import base64
import ssl
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
import standardwebhooks

from serve.config import Egress, Settings, Store, Webhooks
from serve.egress import EgressClient
from serve.errors import Internal, StoreUnavailable
from serve.flows import webhooks as flow
from serve.flows.webhooks import LEASE_MARGIN_S, MadeWebhook, Sender
from serve.jobs.owner import StoreOwner
from serve.jobs.vault import Vault
from serve.jobs.webhooks import ATTEMPTS_S, JITTER, new_secret
from serve.webhooks import Delivery, Tried, Webhook


NO_TRUST = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""The system's takes 30 ms to make, and nothing here is encrypted."""

_ops = count()


def op() -> str:
    return f"sender-op-{next(_ops)}"


@dataclass
class Got:
    """A request as it arrived."""

    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    def verified(self, secret: str) -> bool:
        try:
            standardwebhooks.Webhook(secret).verify(self.body, self.headers)
        except standardwebhooks.WebhookVerificationError:
            return False
        return True


@dataclass
class Receiver:
    """Answers each request with `status`, `headers` and `body`, once it is `released`."""

    status: int = 200
    headers: str = ""
    body: bytes = b""
    port: int = 0
    got: list[Got] = field(default_factory=list)
    arrived: asyncio.Queue[Got] = field(default_factory=asyncio.Queue)
    released: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(100))

    def hold(self) -> None:
        self.released = asyncio.Semaphore(0)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            pairs = [line.split(": ", 1) for line in head.split("\r\n")[1:-2]]
            headers = {name.lower(): value for name, value in pairs}
            got = Got(headers, await reader.readexactly(int(headers["content-length"])))
            self.got.append(got)
            self.arrived.put_nowait(got)
            await self.released.acquire()
            length = f"content-length: {len(self.body)}\r\n{self.headers}\r\n"
            writer.write(f"HTTP/1.1 {self.status} Said\r\n{length}".encode() + self.body)
            await writer.drain()
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


class WatchedStore(StoreOwner):
    """Tells of each settlement that was applied; `away` calls fail before that."""

    settled: asyncio.Queue[Tried]
    away = 0
    sending = busiest = 0

    async def claim_deliveries(self, *args: Any) -> Any:
        self._come_back()
        due = await super().claim_deliveries(*args)
        self.sending += len(due)
        self.busiest = max(self.busiest, self.sending)
        return due

    async def settle_delivery(self, tried: Tried) -> bool:
        self._come_back()
        applied = await super().settle_delivery(tried)
        self.sending -= 1
        if applied:
            self.settled.put_nowait(tried)
        return applied

    def _come_back(self) -> None:
        if self.away:
            self.away -= 1
            raise StoreUnavailable("away")


@dataclass
class Rig:
    store: WatchedStore
    receiver: Receiver
    clock: Any
    rng: Any
    stack: AsyncExitStack
    vault: Vault = field(default_factory=lambda: Vault(Vault.new_key()))
    secret: str = field(default_factory=new_secret)
    webhook: str = "wh_1"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.receiver.port}/hook?of=mine"

    async def register(self, url: str = "", sealed: str = "") -> None:
        made = Webhook(
            self.webhook, "ann", url or self.url, sealed or self.vault.seal(self.secret), 1
        )
        await self.store.create_webhook(op(), made, 10)

    async def hook(self) -> Webhook:
        found = await self.store.find_webhook("ann", self.webhook)
        assert found is not None
        return found

    async def event(self) -> Delivery:
        return await self.store.send_test(op(), "ann", self.webhook)

    async def start(self, **rules: Any) -> tuple[Sender, asyncio.Task[None]]:
        settings = Settings(
            egress=Egress(insecure_allowed=(f"127.0.0.1:{self.receiver.port}",)),
            webhooks=Webhooks(**rules),
        )
        client = EgressClient(settings.egress, tls=NO_TRUST)
        self.stack.push_async_callback(client.aclose)
        sender = Sender(self.store, client, self.vault, settings, wall=self.clock, rng=self.rng)
        running = asyncio.create_task(sender.run())
        self.stack.push_async_callback(ended, running)
        return sender, running

    async def settled(self) -> Tried:
        async with asyncio.timeout(20):
            return await self.store.settled.get()

    async def arrived(self) -> Got:
        async with asyncio.timeout(20):
            return await self.receiver.arrived.get()

    async def log(self) -> Delivery:
        (delivery,) = await self.store.list_deliveries("ann", self.webhook, (), "", 10)
        return delivery

    async def pass_(self, seconds: float) -> None:
        self.clock.advance(seconds)
        await self.store.tick()


async def ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@pytest.fixture
async def rig(tmp_path, clock, rng, monkeypatch):
    monkeypatch.setattr(flow, "AWAY_S", 0.0)
    clock.now = time.time()  # receivers' libraries refuse what is five minutes old
    async with AsyncExitStack() as stack:
        store = WatchedStore(tmp_path / "store.db", Store(), clock)
        store.settled = asyncio.Queue()
        stack.callback(store.close)
        receiver = Receiver()
        server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0)
        stack.callback(server.close)
        receiver.port = server.sockets[0].getsockname()[1]
        made = Rig(store, receiver, clock, rng, stack)
        await made.register()
        yield made


async def test_a_receivers_library_verifies_what_arrives(rig: Rig):
    await rig.start()
    made = await rig.event()
    got = await rig.arrived()
    assert got.verified(rig.secret)
    assert not got.verified(new_secret())
    assert (got.id, got.body) == (made.id, made.payload.encode())
    assert got.headers["content-type"] == "application/json"
    assert (await rig.settled()).word == "delivered"
    delivery = await rig.log()
    assert (delivery.state, delivery.last_status, delivery.last_error) == ("delivered", 200, "")


async def test_a_failing_receiver_is_tried_by_schedule_and_then_given_up(rig: Rig):
    rig.receiver.status, rig.receiver.body = 500, b"no \x00\x1b such\xff luck"
    await rig.start()
    made = await rig.event()
    for pause_s in ATTEMPTS_S[1:]:
        tried = await rig.settled()
        assert tried.word == "retry"
        assert tried.delay_s == pytest.approx(pause_s, rel=JITTER + 1e-9)
        await rig.pass_(tried.delay_s)
    assert (await rig.settled()).word == "given_up"
    assert [got.id for got in rig.receiver.got] == [made.id] * len(ATTEMPTS_S)
    stamps = [int(got.headers["webhook-timestamp"]) for got in rig.receiver.got]
    assert stamps == sorted(set(stamps))
    delivery = await rig.log()
    assert (delivery.state, delivery.attempts) == ("given_up", len(ATTEMPTS_S))
    assert (delivery.last_status, delivery.last_error) == (500, "no    such\ufffd luck")
    assert (await rig.hook()).active


async def test_a_receiver_that_comes_back_is_well_again(rig: Rig):
    rig.receiver.status = 500
    await rig.start()
    await rig.event()
    tried = await rig.settled()
    assert (await rig.hook()).failing_since is not None
    rig.receiver.status = 204
    await rig.pass_(tried.delay_s)
    assert (await rig.settled()).word == "delivered"
    assert (await rig.hook()).failing_since is None


async def test_a_receiver_that_is_gone_disables_its_webhook(rig: Rig):
    rig.receiver.status = 410
    await rig.start()
    await rig.event()
    assert (await rig.settled()).word == "disabled"
    hook = await rig.hook()
    assert (hook.active, hook.disabled_reason) == (False, "gone")
    assert (await rig.log()).state == "given_up"


async def test_a_webhook_that_fails_for_days_is_disabled(rig: Rig):
    rig.receiver.status = 500
    await rig.start()
    first = await rig.event()
    await rig.settled()
    await rig.pass_(5 * 86_400)
    assert (await rig.settled()).word == "disabled"
    hook = await rig.hook()
    assert (hook.active, hook.disabled_reason) == (False, "failing")
    assert [got.id for got in rig.receiver.got] == [first.id] * 2


async def test_a_receiver_that_asks_for_time_gets_it(rig: Rig):
    rig.receiver.status, rig.receiver.headers = 503, "Retry-After: 120\r\n"
    await rig.start()
    await rig.event()
    tried = await rig.settled()
    assert tried.hold_s == pytest.approx(120)
    assert tried.delay_s >= 120
    assert (await rig.hook()).hold_until == pytest.approx(rig.clock() + 120)


async def test_a_rotated_secret_signs_beside_its_successor_for_a_while(rig: Rig):
    fresh = new_secret()
    await rig.store.rotate_webhook(op(), "ann", rig.webhook, rig.vault.seal(fresh), 60)
    await rig.start()
    await rig.event()
    both = await rig.arrived()
    assert both.verified(fresh)
    assert both.verified(rig.secret)
    await rig.pass_(60)
    await rig.event()
    one = await rig.arrived()
    assert one.verified(fresh)
    assert not one.verified(rig.secret)


async def test_a_crash_before_the_settlement_repeats_under_the_same_id(rig: Rig):
    rig.receiver.hold()
    _, crashing = await rig.start()
    made = await rig.event()
    first = await rig.arrived()
    await ended(crashing)
    rig.receiver.released.release()
    rig.receiver.released.release()
    await rig.start()
    await rig.pass_(Egress().timeout_s + LEASE_MARGIN_S)
    again = await rig.arrived()
    assert (await rig.settled()).word == "delivered"
    assert {first.id, again.id} == {made.id}
    assert first.body == again.body
    assert (await rig.log()).attempts == 1


async def test_a_redelivery_is_sent_under_its_own_id(rig: Rig):
    await rig.start()
    made = await rig.event()
    await rig.settled()
    await rig.store.redeliver(op(), "ann", rig.webhook, made.id)
    await rig.settled()
    assert [got.id for got in rig.receiver.got] == [made.id] * 2
    assert len({got.body for got in rig.receiver.got}) == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/hook", "https://127.0.0.1/hook"])
async def test_a_forbidden_url_is_given_up_at_once(rig: Rig, url):
    rig.webhook = "wh_2"
    await rig.register(url)
    await rig.start()
    await rig.event()
    tried = await rig.settled()
    assert (tried.word, tried.status) == ("given_up", None)
    assert tried.error
    assert rig.receiver.got == []


async def test_a_receiver_that_hangs_up_is_tried_again(rig: Rig):
    rig.receiver.headers = "content-length: 9\r\n"  # two lengths: no answer that anybody reads
    await rig.start()
    await rig.event()
    tried = await rig.settled()
    assert (tried.word, tried.status) == ("retry", None)
    assert "RemoteProtocolError" in tried.error


async def test_a_secret_that_cannot_be_read_stops_only_its_own(rig: Rig, caplog):
    broken = Rig(rig.store, rig.receiver, rig.clock, rig.rng, rig.stack, webhook="wh_2")
    await broken.register(sealed=Vault(Vault.new_key()).seal(new_secret()))
    await rig.start()
    made = await broken.event()
    tried = await rig.settled()
    assert (tried.word, tried.delivery) == ("retry", made.id)
    assert "sender failed" in tried.error
    assert made.id in caplog.text
    await rig.event()
    assert (await rig.settled()).word == "delivered"


async def test_a_date_beyond_all_calendars_is_no_reason_to_wait(rig: Rig):
    rig.receiver.status = 503
    rig.receiver.headers = "Retry-After: Fri, 01 Jan 99999999999 00:00:00 GMT\r\n"
    await rig.start()
    await rig.event()
    tried = await rig.settled()
    assert (tried.word, tried.status, tried.hold_s) == ("retry", 503, 0)


async def test_an_answer_that_breaks_the_sender_stops_only_its_own(rig: Rig, monkeypatch, caplog):
    judge = flow.verdict

    def broken(*args: Any, retry_after: str | None, **more: Any) -> Any:
        if retry_after:
            raise RecursionError
        return judge(*args, retry_after=retry_after, **more)

    monkeypatch.setattr(flow, "verdict", broken)
    rig.receiver.headers = "Retry-After: 1\r\n"
    await rig.start()
    made = await rig.event()
    tried = await rig.settled()
    assert (tried.delivery, tried.word, tried.status) == (made.id, "retry", None)
    assert "sender failed" in tried.error
    assert made.id in caplog.text
    rig.receiver.headers = ""
    await rig.event()
    assert (await rig.settled()).word == "delivered"


async def test_a_settlement_that_breaks_stops_only_its_own(rig: Rig, monkeypatch, caplog):
    settle = rig.store.settle_delivery
    broken: list[str] = []

    async def once(tried: Tried) -> bool:
        if not broken:
            broken.append(tried.delivery)
            raise RuntimeError("no settlement")
        return await settle(tried)

    monkeypatch.setattr(rig.store, "settle_delivery", once)
    await rig.start()
    first = await rig.event()
    await rig.arrived()
    second = await rig.event()
    assert (await rig.settled()).delivery == second.id
    assert broken == [first.id]
    assert "no settlement" in caplog.text


async def test_a_sender_that_has_failed_is_not_waited_for(rig: Rig, monkeypatch):
    async def broken(*_args: Any) -> Any:
        raise RuntimeError

    monkeypatch.setattr(rig.store, "claim_deliveries", broken)
    sender = Sender(rig.store, None, rig.vault, Settings(), wall=rig.clock, rng=rig.rng)
    with pytest.raises(ExceptionGroup):
        await sender.run()
    async with asyncio.timeout(20):
        await sender.drain(1e9)


def test_a_made_webhook_does_not_say_its_secret_by_itself():
    secret = new_secret()
    assert secret not in repr(MadeWebhook(Webhook("wh_1", "ann", "url", "sealed", 1), secret))


async def test_it_waits_while_the_store_is_away(rig: Rig):
    rig.store.away = 3
    rig.receiver.hold()
    await rig.start()
    made = await rig.event()
    await rig.arrived()
    rig.store.away = 3
    rig.receiver.released.release()
    assert (await rig.settled()).word == "delivered"
    assert [got.id for got in rig.receiver.got] == [made.id]


async def test_only_so_many_are_sent_at_once(rig: Rig):
    rig.receiver.hold()
    made = {(await rig.event()).id for _ in range(5)}
    await rig.start(sends_max=2)
    await rig.arrived()
    await rig.arrived()
    tried = set()
    for _ in made:
        rig.receiver.released.release()
        tried.add((await rig.settled()).delivery)
    assert tried == made
    assert rig.store.busiest == 2


async def test_what_is_being_sent_is_finished_before_it_leaves(rig: Rig, monkeypatch):
    monkeypatch.setattr(flow, "CLAIM_WAIT_S", 0.01)
    rig.receiver.hold()
    sender, running = await rig.start()
    await rig.event()
    await rig.arrived()
    leaving = asyncio.create_task(sender.drain(20))
    await asyncio.sleep(0)
    rig.receiver.released.release()
    await leaving
    await running
    assert (await rig.settled()).word == "delivered"
    await rig.event()  # nobody takes it any more
    kept = await rig.store.list_deliveries("ann", rig.webhook, (), "", 10)
    assert sorted(one.state for one in kept) == ["delivered", "waiting"]


# The vault


def test_what_is_sealed_is_opened_by_the_same_key_and_by_no_other():
    key, other = Vault.new_key(), Vault.new_key()
    sealed = Vault(key).seal("whsec_")
    assert "whsec_" not in sealed
    assert sealed != Vault(key).seal("whsec_")
    assert Vault(f"{other}, {key}").open(sealed) == "whsec_"
    for one in (Vault(other).open, lambda text: Vault(key).open(text[:-9] + "A" * 9)):
        with pytest.raises(Internal):
            one(sealed)


def test_a_key_is_the_base64_of_32_bytes():
    assert Vault(base64.b64encode(b"\xff" * 32).decode())  # as `openssl rand -base64 32` has it
    for text in ("", "short", base64.b64encode(b"x" * 31).decode(), "nöt"):
        with pytest.raises(ValueError, match="32 bytes"):
            Vault(text)
