"""`/v1/webhooks` over a real Store, and one delivery all the way to a receiver."""

import asyncio
import random
import ssl

import pytest
import standardwebhooks

from serve.config import Egress, Webhooks
from serve.egress import EgressClient
from serve.flows.webhooks import Sender
from serve.webhooks import Share, Tried


HOOKS = "/v1/webhooks"
URL = "https://hooks.example/jobs"
SHARE = Share(most=10, tenant_most=10, lease_s=45.0)


async def registered(client, url=URL):
    answer = await client.post(HOOKS, json={"url": url})
    assert answer.status_code == 201, answer.text
    return answer.json()


async def tried(whole, word="delivered", **fields):
    """A sender's turn."""
    (due,) = await whole.store.claim_deliveries(SHARE, 0)
    one = Tried(due.delivery.id, due.delivery.lease, word, **fields)
    assert await whole.store.settle_delivery(one)


async def test_a_webhook_is_made_shown_and_removed(client):
    answer = await client.post(HOOKS, json={"url": URL})
    assert answer.status_code == 201
    assert answer.headers["cache-control"] == "no-store"
    made = answer.json()
    assert answer.headers["location"] == f"{HOOKS}/{made['id']}"
    standardwebhooks.Webhook(made.pop("secret"))  # it takes it
    assert (made["url"], made["active"], made["disabled_reason"]) == (URL, True, None)
    assert (await client.get(f"{HOOKS}/{made['id']}")).json() == made
    assert (await client.get(HOOKS)).json()["data"] == [made]
    gone = await client.delete(f"{HOOKS}/{made['id']}")
    assert gone.json() == {"object": "webhook", "id": made["id"], "deleted": True}
    assert (await client.get(HOOKS)).json()["data"] == []


async def test_secrets_are_kept_sealed(client, whole):
    made = await registered(client)
    kept = await whole.store.find_webhook("acme", made["id"])
    assert made["secret"] not in kept.secret
    assert whole.vault.open(kept.secret) == made["secret"]


async def test_another_tenants_webhook_is_not_found(client, whole):
    made = await registered(client)
    stranger = await whole.client("other")
    place = f"{HOOKS}/{made['id']}"
    answers = [
        await stranger.get(place),
        await stranger.delete(place),
        await stranger.post(f"{place}/rotate", json={}),
        await stranger.post(f"{place}/enable"),
        await stranger.post(f"{place}/test"),
        await stranger.get(f"{place}/deliveries"),
        await stranger.post(f"{place}/deliveries/msg_1/redeliver"),
    ]
    assert {answer.status_code for answer in answers} == {404}
    assert {answer.json()["code"] for answer in answers} == {"webhook_not_found"}
    assert (await stranger.get(HOOKS)).json()["data"] == []


@pytest.mark.parametrize(
    "url",
    ["http://hooks.example/", "https://127.0.0.1/", "https://[2002:7f00:1::]/", "nothing"],
)
async def test_a_url_inside_our_network_is_refused(client, url):
    answer = await client.post(HOOKS, json={"url": url})
    problem = answer.json()
    assert (answer.status_code, problem["param"], problem["code"]) == (400, "url", "url_refused")


async def test_a_tenant_has_so_many_webhooks(start):
    client = await (await start(webhooks=Webhooks(tenant_webhooks_max=1))).client()
    await registered(client)
    answer = await client.post(HOOKS, json={"url": URL})
    assert (answer.status_code, answer.json()["code"]) == (429, "webhooks")


async def test_a_secret_is_rotated_with_an_overlap(client, whole):
    made = await registered(client)
    place = f"{HOOKS}/{made['id']}/rotate"
    rotated = (await client.post(place, json={"overlap_s": 60})).json()
    assert rotated["secret"] != made["secret"]
    now = whole.service.context.wall()
    assert rotated["previous_secret_until"] == pytest.approx(now + 60)
    again = (await client.post(place, json={})).json()
    assert again["previous_secret_until"] == pytest.approx(now + Webhooks().overlap_s)
    wrong = await client.post(place, json={"overlap_s": -1})
    assert (wrong.status_code, wrong.json()["param"]) == (400, "overlap_s")


async def test_a_delivery_is_logged_and_sent_again(client, whole):
    place = f"{HOOKS}/{(await registered(client))['id']}"
    answer = await client.post(f"{place}/test")
    assert answer.status_code == 202
    sent = answer.json()
    assert (sent["type"], sent["job"], sent["state"]) == ("webhook.test", None, "waiting")
    again = f"{place}/deliveries/{sent['id']}/redeliver"
    assert (await client.post(again)).status_code == 202
    await tried(whole, "given_up", status=500, error="no luck")
    log = (await client.get(f"{place}/deliveries?state=given_up&limit=1")).json()
    assert (log["has_more"], len(log["data"])) == (False, 1)
    assert (log["data"][0]["last_status"], log["data"][0]["last_error"]) == (500, "no luck")
    assert (await client.get(f"{place}/deliveries?state=delivered")).json()["data"] == []
    assert (await client.get(f"{place}/deliveries?state=lost")).json()["param"] == "state"
    answer = await client.post(again)
    assert (answer.json()["id"], answer.json()["state"]) == (sent["id"], "waiting")
    await tried(whole)
    whole.clock.advance(1)
    second = (await client.post(f"{place}/test")).json()["id"]
    page = (await client.get(f"{place}/deliveries?limit=1")).json()
    assert (page["data"][0]["id"], page["has_more"]) == (second, True)
    rest = (await client.get(f"{place}/deliveries?after={second}")).json()
    assert [one["id"] for one in rest["data"]] == [sent["id"]]


async def test_a_disabled_webhook_sends_nothing_until_it_is_enabled(client, whole):
    place = f"{HOOKS}/{(await registered(client))['id']}"
    await client.post(f"{place}/test")
    await tried(whole, "disabled", disabled="gone", status=410)
    shown = (await client.get(place)).json()
    assert (shown["active"], shown["disabled_reason"]) == (False, "gone")
    refused = await client.post(f"{place}/test")
    assert (refused.status_code, refused.json()["code"]) == (409, "webhook_disabled")
    assert (await client.post(f"{place}/enable")).json()["active"]
    assert (await client.post(f"{place}/test")).status_code == 202


async def test_looking_is_free_and_sending_is_not(whole):
    client = await whole.client("free")  # ten requests
    place = f"{HOOKS}/{(await registered(client))['id']}"
    for _ in range(9):
        assert (await client.post(f"{place}/test")).status_code == 202
    assert (await client.post(f"{place}/test")).status_code == 429
    assert (await client.get(f"{place}/deliveries")).status_code == 200
    assert (await client.delete(place)).status_code == 200


async def test_a_job_names_one_of_its_tenants_webhooks(client, whole):
    theirs = await registered(await whole.client("other"))
    await client.post("/v1/collections", json={"name": "docs"})
    body = {"collection": "docs", "items": [{"id": "a", "text": "b"}], "webhook": theirs["id"]}
    answer = await client.post("/v1/jobs", json=body)
    problem = answer.json()
    assert (answer.status_code, problem["param"]) == (404, "webhook")
    assert problem["code"] == "webhook_not_found"


async def test_the_end_of_a_job_reaches_its_receiver(start):
    arrived: asyncio.Queue[tuple[bytes, bytes]] = asyncio.Queue()

    async def receive(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        arrived.put_nowait((head, await reader.readexactly(length)))
        writer.write(b"HTTP/1.1 204 Fine\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(receive, "127.0.0.1", 0)
    place = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    whole = await start(egress=Egress(insecure_allowed=(place,)))
    context = whole.service.context
    egress = EgressClient(context.settings.egress, tls=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    whole.stack.callback(server.close)
    whole.stack.push_async_callback(egress.aclose)
    sender = Sender(
        whole.store,
        egress,
        whole.vault,
        context.settings,
        wall=context.wall,
        rng=random.Random(1),  # noqa: S311  jitter
    )
    running = asyncio.create_task(sender.run())
    whole.stack.callback(running.cancel)
    client = await whole.client("enterprise")
    made = await registered(client, f"http://{place}/")
    await client.post("/v1/collections", json={"name": "docs"})
    body = {"collection": "docs", "items": [{"id": "a", "text": "b"}], "webhook": made["id"]}
    job = (await client.post("/v1/jobs", json=body)).json()
    assert job["webhook"] == made["id"]
    async with asyncio.timeout(20):
        head, sent = await arrived.get()
    log = (await client.get(f"{HOOKS}/{made['id']}/deliveries")).json()["data"]
    assert [(one["job"], one["type"]) for one in log] == [(job["id"], "job.completed")]
    assert log[0]["id"].encode() in head
    assert job["id"].encode() in sent
