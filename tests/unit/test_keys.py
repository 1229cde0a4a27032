import asyncio
import itertools
import logging
import traceback
from dataclasses import replace

import pytest

from serve.admission.keys import (
    UNKNOWN_IDS_MAX,
    Door,
    hash_secret,
    new_key,
    parse,
    require_admin,
    successor,
)
from serve.allowance import Tier
from serve.config import Admission
from serve.errors import Forbidden, Overloaded, StoreUnavailable, Unauthorized
from serve.records import Caller, Key


class Keys:
    """The Store's keys: may be away, and counts what it is asked."""

    def __init__(self, *keys: Key) -> None:
        self.known = {key.id: key for key in keys}
        self.away = False
        self.full = False
        self.asked: list[str] = []
        self.gate: asyncio.Event | None = None

    async def find_key(self, key_id: str) -> Key | None:
        self.asked.append(key_id)
        if self.gate is not None:
            await self.gate.wait()
        if self.away:
            raise StoreUnavailable("The Store is away.", retry_after_s=2)
        if self.full:
            raise Overloaded("The Store is full.", retry_after_s=1)
        return self.known.get(key_id)


KEY, TEXT = new_key("acme", "premium", 1.0)
SECRET = TEXT.split("_", 2)[2]
HEADER = f"Bearer {TEXT}"
ACME = Caller("acme", "premium", 4, KEY.id)


@pytest.fixture
def keys() -> Keys:
    return Keys(KEY)


WALL_S = 1_700_000_000.0


def door(keys: Keys, clock, **settings) -> Door:
    """The wall stands `WALL_S` ahead of the clock."""
    values = {"key_cache_s": 1, "key_stale_s": 60} | settings
    return Door(keys, Admission(**values), clock=clock, wall=lambda: WALL_S + clock())


# --- the header -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        TEXT,
        f"Basic {TEXT}",
        f"Bearer {TEXT}x",
        f"Bearer x{TEXT}",
        f"Bearer {TEXT[:-1]}",
        f"Bearer {TEXT} {TEXT}",
        f"Bearer {TEXT.upper()}",
        "Bearer hr__",
        f"Bearer hr_{KEY.id}_",
        f"Bearer sk_{KEY.id}_{SECRET}",
        f"Bearer hr_{KEY.id[:-1]}ü_{SECRET}",
        f"Bearer hr_{KEY.id}_{SECRET[:-1]}\n",
        "Bearer " + "a" * 100_000,
    ],
    ids=itertools.count(),  # the keys are random
)
def test_what_is_not_a_key_is_refused(header):
    with pytest.raises(Unauthorized) as caught:
        parse(header)
    assert caught.value.status == 401
    assert "Bearer hr_" in caught.value.message


@pytest.mark.parametrize(
    "header", [HEADER, f"bearer {TEXT}", f"BEARER   {TEXT} "], ids=itertools.count()
)
def test_a_key_is_taken_apart(header):
    assert parse(header) == (KEY.id, SECRET)


def test_new_keys_differ_parse_and_keep_no_secret():
    made = [new_key("acme", "free", 2.0) for _ in range(100)]
    assert len({key.id for key, _ in made}) == 100
    for key, text in made:
        key_id, secret = parse(f"Bearer {text}")
        assert (key_id, hash_secret(secret)) == (key.id, key.secret_sha256)
        assert secret not in repr(key)
        assert key.family == key.id


def test_a_successor_is_all_but_id_secret_and_times_the_key():
    limits = {"tokens_per_month": 5}
    old, _ = new_key("acme", "free", 1.0, role="admin", name="Ann's", limits=limits)
    old = replace(old, tenant_limits={"bulk": {}}, expires_at=9.0)
    key, text = successor(old, 2.0)
    assert parse(f"Bearer {text}")[0] == key.id
    assert hash_secret(parse(f"Bearer {text}")[1]) == key.secret_sha256
    assert key.id != old.id
    assert key.secret_sha256 != old.secret_sha256
    again = replace(key, id=old.id, secret_sha256=old.secret_sha256, expires_at=9.0)
    assert again == replace(old, created_at=2.0)
    assert (key.family, key.expires_at) == (old.id, None)
    assert successor(key, 3.0)[0].family == old.id


def test_only_an_admins_key_is_an_admins():
    require_admin(replace(ACME, role="admin"))
    with pytest.raises(Forbidden) as caught:
        require_admin(ACME)
    assert caught.value.code == "admin_required"


# --- who it is --------------------------------------------------------------------------------


async def test_a_key_tells_tenant_tier_and_weight(keys, clock):
    assert await door(keys, clock).caller(HEADER) == ACME


async def test_a_wrong_secret_is_refused_like_an_unknown_id(keys, clock):
    _, other = new_key("acme", "premium", 1.0)
    wrong_secret = f"Bearer hr_{KEY.id}_{other[-43:]}"
    messages = set()
    for header in (wrong_secret, f"Bearer {other}"):
        with pytest.raises(Unauthorized) as caught:
            await door(keys, clock).caller(header)
        messages.add(caught.value.message)
    assert len(messages) == 1
    assert await door(keys, clock).caller(HEADER) == ACME


async def test_a_tier_that_is_not_configured_is_forbidden(clock):
    key, text = new_key("acme", "platinum", 1.0)
    with pytest.raises(Forbidden, match="'platinum'"):
        await door(Keys(key), clock).caller(f"Bearer {text}")


async def test_a_rotated_key_is_the_same_payer(clock):
    key, text = successor(KEY, 2.0)
    assert await door(Keys(key), clock).caller(f"Bearer {text}") == ACME


@pytest.mark.parametrize(
    "limits",
    [
        {"tenant_limits": {"interactive": {"requests_burst": 5, "requests_per_minute": None}}},
        {"tenant_limits": {"gone": 1}},
        {"limits": {"tokens_per_month": -1}},
    ],
    ids=["tenant", "field", "key"],
)
async def test_limits_that_are_not_valid_any_more_are_forbidden(clock, limits):
    front = door(Keys(replace(KEY, **limits)), clock)
    for _ in range(2):
        with pytest.raises(Forbidden, match="'acme'") as caught:
            await front.caller(HEADER)
        assert caught.value.code == "limits_not_valid"
    with pytest.raises(Unauthorized):  # told to nobody without the secret
        await front.caller(f"Bearer hr_{KEY.id}_{'a' * 43}")


async def test_an_expired_key_is_refused_also_from_the_cache(clock):
    expires_at = WALL_S + clock() + 0.5
    front = door(Keys(replace(KEY, expires_at=expires_at)), clock)
    assert await front.caller(HEADER) == ACME
    clock.advance(0.499)
    assert await front.caller(HEADER) == ACME
    clock.advance(0.001)
    with pytest.raises(Unauthorized):
        await front.caller(HEADER)


async def test_an_expired_key_is_refused_also_while_the_store_is_away(clock):
    keys = Keys(replace(KEY, expires_at=WALL_S + clock() + 5))
    front = door(keys, clock)
    await front.caller(HEADER)
    keys.away = True
    clock.advance(4)
    assert await front.caller(HEADER) == ACME
    clock.advance(1)
    with pytest.raises(Unauthorized):
        await front.caller(HEADER)


async def test_no_error_and_no_log_contains_the_secret(keys, clock, caplog):
    caplog.set_level(logging.DEBUG)
    _, other = new_key("acme", "premium", 1.0)
    wrong = other[-43:]
    refused = [HEADER[:-1] + "!", f"Bearer hr_{KEY.id}_{wrong}", f"Bearer {other}"]
    for header in refused:
        with pytest.raises(Unauthorized) as caught:
            await door(keys, clock).caller(header)
        error = caught.value
        told = "".join(traceback.format_exception(error)) + error.message + repr(error.__reduce__())
        assert wrong not in told
        assert SECRET[:-1] not in told
    keys.away = True
    with pytest.raises(StoreUnavailable) as away:
        await door(keys, clock).caller(HEADER)
    assert SECRET not in "".join(traceback.format_exception(away.value))
    assert SECRET not in caplog.text
    assert wrong not in caplog.text


# --- the cache --------------------------------------------------------------------------------


async def test_a_key_is_trusted_for_its_time_and_then_asked_for_again(keys, clock):
    front = door(keys, clock)
    for _ in range(3):
        await front.caller(HEADER)
    clock.advance(0.999)
    await front.caller(HEADER)
    assert len(keys.asked) == 1
    clock.advance(0.001)
    await front.caller(HEADER)
    assert len(keys.asked) == 2


async def test_a_revoked_key_ends_with_its_time(keys, clock):
    front = door(keys, clock)
    await front.caller(HEADER)
    del keys.known[KEY.id]
    assert await front.caller(HEADER) == ACME
    clock.advance(1)
    with pytest.raises(Unauthorized):
        await front.caller(HEADER)


async def test_the_default_lets_a_change_through_within_a_second():
    assert Admission().key_cache_s < 1


async def test_an_unchanged_key_keeps_its_caller_and_a_changed_one_does_not(keys, clock):
    front = door(keys, clock)
    first = await front.caller(HEADER)
    clock.advance(1)
    assert await front.caller(HEADER) is first
    keys.known[KEY.id] = replace(KEY, tenant_limits={"tokens_per_month": 5})
    clock.advance(1)
    assert await front.caller(HEADER) is not first


async def test_a_new_tier_counts_after_the_cached_time(keys, clock):
    front = door(keys, clock)
    await front.caller(HEADER)
    keys.known[KEY.id] = replace(KEY, tier="enterprise")
    clock.advance(1)
    assert await front.caller(HEADER) == Caller("acme", "enterprise", 16, KEY.id)


async def test_new_limits_and_weights_of_tiers_hold_at_once_and_nobody_is_asked(keys, clock):
    front = door(keys, clock)
    await front.caller(HEADER)
    asked = list(keys.asked)
    front.retier({KEY.tier: Tier(weight=7, interactive={"requests_per_minute": 3})})
    found = await front.caller(HEADER)
    assert found.weight == 7
    assert [limit.burst for limit in found.limits["interactive"]] == [3]
    assert keys.asked == asked
    front.retier({})
    with pytest.raises(Forbidden):
        await front.caller(HEADER)


async def test_an_unknown_id_is_asked_for_once_in_that_time(clock):
    keys = Keys()
    front = door(keys, clock)
    for _ in range(5):
        with pytest.raises(Unauthorized):
            await front.caller(HEADER)
    assert len(keys.asked) == 1
    keys.known[KEY.id] = KEY
    clock.advance(1)
    assert await front.caller(HEADER) == ACME


async def test_a_cached_key_still_needs_its_secret(keys, clock):
    front = door(keys, clock)
    await front.caller(HEADER)
    with pytest.raises(Unauthorized):
        await front.caller(f"Bearer hr_{KEY.id}_{'a' * 43}")


async def test_the_cache_is_bounded_and_the_oldest_go(clock):
    made = [new_key(f"t{number}", "free", 1.0) for number in range(10)]
    keys = Keys(*(key for key, _ in made))
    front = door(keys, clock, keys_cached_max=3)
    for _, text in made:
        await front.caller(f"Bearer {text}")
    assert list(front._cache) == [key.id for key, _ in made[-3:]]


async def test_a_flood_of_unknown_ids_is_bounded_and_evicts_no_key(keys, clock):
    front = door(keys, clock, keys_cached_max=1)
    await front.caller(HEADER)
    flood = [f"Bearer hr_{number:016x}_{SECRET}" for number in range(UNKNOWN_IDS_MAX + 1)]
    for header in flood:
        with pytest.raises(Unauthorized):
            await front.caller(header)
    assert list(front._unknown) == [parse(header)[0] for header in flood[1:]]
    keys.away = True
    clock.advance(1)
    assert await front.caller(HEADER) == ACME


async def test_an_id_is_kept_as_known_or_unknown_but_not_both(keys, clock):
    front = door(keys, clock)
    for known in (True, False, True):
        keys.known = {KEY.id: KEY} if known else {}
        await asyncio.gather(front.caller(HEADER), return_exceptions=True)
        assert (KEY.id in front._cache, KEY.id in front._unknown) == (known, not known)
        clock.advance(1)


async def test_a_key_that_is_in_use_outlasts_one_that_is_not(clock):
    made = [new_key(f"t{number}", "free", 1.0)[::-1] for number in range(4)]
    front = door(Keys(*(key for _, key in made)), clock, keys_cached_max=3)
    for number in (0, 1, 2, 0, 3):
        await front.caller(f"Bearer {made[number][0]}")
        clock.advance(1)
    assert list(front._cache) == [made[number][1].id for number in (2, 0, 3)]


async def test_trust_counts_from_the_question_not_from_a_slow_answer(keys, clock):
    front = door(keys, clock)
    keys.gate = asyncio.Event()
    task = asyncio.create_task(front.caller(HEADER))
    await asyncio.sleep(0)
    clock.advance(5)
    keys.gate.set()
    await task
    await front.caller(HEADER)
    assert len(keys.asked) == 2


# --- the Store is away ------------------------------------------------------------------------


async def test_a_known_key_outlives_an_absence_of_the_store_up_to_its_bound(keys, clock):
    front = door(keys, clock)
    await front.caller(HEADER)
    keys.away = True
    for _ in range(60):
        clock.advance(1)
        assert await front.caller(HEADER) == ACME
    clock.advance(1)
    with pytest.raises(StoreUnavailable) as caught:
        await front.caller(HEADER)
    assert caught.value.retry_after_s == 2


async def test_a_known_key_outlives_also_a_store_that_is_full(keys, clock):
    front = door(keys, clock)
    await front.caller(HEADER)
    keys.full = True
    clock.advance(60.9)
    assert await front.caller(HEADER) == ACME
    clock.advance(0.1)
    with pytest.raises(Overloaded):
        await front.caller(HEADER)


async def test_others_are_refused_at_once_while_the_store_is_known_to_be_away(keys, clock):
    """Not after the timeout of a call of their own, and only until it is asked again."""
    front = door(keys, clock)
    keys.away = True
    for _ in range(5):
        with pytest.raises(StoreUnavailable) as caught:
            await front.caller(HEADER)
        assert caught.value.retry_after_s
    assert len(keys.asked) == 1
    keys.away = False
    clock.advance(1)
    assert await front.caller(HEADER) == ACME


async def test_its_return_ends_the_stale_time(keys, clock):
    front = door(keys, clock)
    await front.caller(HEADER)
    keys.away = True
    clock.advance(30)
    await front.caller(HEADER)
    keys.away = False
    del keys.known[KEY.id]
    clock.advance(1)
    with pytest.raises(Unauthorized):
        await front.caller(HEADER)


async def test_keys_never_seen_and_unknown_ones_are_not_let_in_meanwhile(keys, clock):
    front = door(keys, clock)
    _, stranger = new_key("acme", "premium", 1.0)
    with pytest.raises(Unauthorized):
        await front.caller(f"Bearer {stranger}")
    keys.away = True
    clock.advance(1)
    for header in (f"Bearer {stranger}", HEADER):
        with pytest.raises(StoreUnavailable):
            await front.caller(header)


async def test_one_request_waits_for_an_absent_store_and_the_others_pass(keys, clock):
    """A call to an absent Store lasts until its timeout: nobody else is to wait for that."""
    front = door(keys, clock)
    await front.caller(HEADER)
    keys.away = True
    clock.advance(1)
    await front.caller(HEADER)  # from now on it is known to be away
    asked = len(keys.asked)
    clock.advance(1)
    keys.gate = asyncio.Event()
    waits = asyncio.create_task(front.caller(HEADER))
    await asyncio.sleep(0)
    for _ in range(10):
        assert await front.caller(HEADER) == ACME
    assert not waits.done()
    keys.gate.set()
    assert await waits == ACME
    assert len(keys.asked) == asked + 1


@pytest.mark.parametrize("was_away", [False, True])
async def test_a_stale_key_is_not_trusted_while_the_store_answers(keys, clock, was_away):
    """Also not by those who come while another request asks for it."""
    front = door(keys, clock)
    for keys.away in (False, was_away, False):
        await front.caller(HEADER)
        clock.advance(1)
    del keys.known[KEY.id]
    clock.advance(30)
    keys.gate = asyncio.Event()
    tasks = [asyncio.create_task(front.caller(HEADER)) for _ in range(3)]
    await asyncio.sleep(0)
    keys.gate.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Unauthorized] * 3


# --- look-ups under way -----------------------------------------------------------------------


async def begun(front: Door, *headers: str) -> list[asyncio.Task[Caller]]:
    tasks = [asyncio.create_task(front.caller(header)) for header in headers]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


async def test_requests_share_the_look_up_of_a_key(keys, clock):
    other, text = new_key("else", "free", 1.0)
    keys.known[other.id] = other
    keys.gate = asyncio.Event()
    tasks = await begun(door(keys, clock), *[HEADER] * 5, *[f"Bearer {text}"] * 5)
    assert keys.asked == [KEY.id, other.id]
    keys.gate.set()
    callers = await asyncio.gather(*tasks)
    assert [caller.tenant for caller in callers] == ["acme"] * 5 + ["else"] * 5


async def test_a_caller_who_leaves_does_not_take_the_answer_along(keys, clock):
    keys.gate = asyncio.Event()
    first, second = await begun(door(keys, clock), HEADER, HEADER)
    first.cancel()
    await asyncio.sleep(0)
    keys.gate.set()
    assert await second == ACME
    assert first.cancelled()
    assert len(keys.asked) == 1


@pytest.mark.parametrize("away", [True, False])
async def test_when_all_have_left_the_answer_is_still_kept(keys, clock, away):
    front = door(keys, clock)
    keys.gate, keys.away = asyncio.Event(), away
    (task,) = await begun(front, HEADER)
    task.cancel()
    keys.gate.set()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0)
    keys.away = False
    clock.advance(1 if away else 0)
    assert await front.caller(HEADER) == ACME
    assert len(keys.asked) == 1 + away
    assert front._questions == {}


async def test_a_failed_look_up_fails_all_who_share_it_and_is_forgotten(keys, clock):
    front = door(keys, clock)
    keys.gate, keys.away = asyncio.Event(), True
    tasks = await begun(front, HEADER, HEADER)
    keys.gate.set()
    failed = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(one) for one in failed] == [StoreUnavailable] * 2
    keys.away = False
    clock.advance(1)
    assert await front.caller(HEADER) == ACME


async def test_an_answer_to_an_old_question_is_not_good_enough(keys, clock):
    """Who comes later than the trusted time after a slow question asks again: a change counts."""
    front = door(keys, clock)
    gates = keys.gate, later = asyncio.Event(), asyncio.Event()
    (early,) = await begun(front, HEADER)
    clock.advance(5)
    (late,) = await begun(front, HEADER)
    assert len(keys.asked) == 1  # one at a time
    gates[0].set()
    keys.gate = later
    assert await early == ACME
    await asyncio.sleep(0)
    del keys.known[KEY.id]
    later.set()
    with pytest.raises(Unauthorized):
        await late
    assert len(keys.asked) == 2
