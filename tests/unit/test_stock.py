"""What the buffer has room for, and how long until it has."""

import pytest

from serve.config import Buffer as BufferSettings
from serve.errors import Overloaded, TooLarge
from serve.index.stock import Stock
from serve.pressure import Sender


MB = 2**20
SETTINGS = BufferSettings(
    writes_max=100, bytes_max=4 * MB, tenant_writes_max=40, tenant_bytes_max=2 * MB
)
ANN, BOB = Sender("ann", 1.0), Sender("bob", 3.0)


@pytest.fixture
def stock() -> Stock:
    return Stock(SETTINGS)


def refusal(stock: Stock, sender: Sender, count: int, size_bytes: int, least_s: float = 0.0):
    with pytest.raises((Overloaded, TooLarge)) as caught:
        stock.check(sender, count, size_bytes, least_s)
    return caught.value


def test_each_bound_is_named(stock):
    stock.add("ann", 30, MB)
    stock.check(ANN, 10, MB, 0.0)
    assert "buffer.tenant_writes_max" in refusal(stock, ANN, 11, 0).message
    assert "buffer.tenant_bytes_max" in refusal(stock, ANN, 1, MB + 1).message
    for tenant in ("bob", "eve"):
        stock.add(tenant, 30, MB)
    assert "buffer.writes_max" in refusal(stock, Sender("dan", 1.0), 11, 0).message
    assert "buffer.bytes_max" in refusal(stock, Sender("dan", 1.0), 1, MB + 1).message
    stock.check(Sender("dan", 1.0), 10, MB, 0.0)


def test_what_could_never_fit_is_too_large(stock):
    for count, size in ((41, 1), (1, 2 * MB + 1), (101, 1), (1, 5 * MB)):
        assert isinstance(refusal(stock, ANN, count, size), TooLarge)


def test_what_is_gone_leaves_no_trace(stock):
    stock.add("ann", 30, MB)
    stock.add("ann", -30, -MB)
    assert (stock.tenants, stock.bytes, stock.crowded()) == (0, 0, {})
    stock.check(ANN, 40, 2 * MB, 0.0)


def test_a_wait_is_the_time_that_what_stands_in_the_way_takes(stock):
    stock.add("ann", 40, MB)
    stock.weigh(ANN)
    assert refusal(stock, ANN, 10, 0).retry_after_s == 1.0  # nothing landed yet
    stock.learn(20, 100, 2.0)
    assert refusal(stock, ANN, 10, 0).retry_after_s == pytest.approx(1.0)  # 10 a second
    assert refusal(stock, ANN, 10, 0, least_s=7.0).retry_after_s == 7.0
    stock.add("bob", 40, MB)
    stock.weigh(BOB)
    assert refusal(stock, ANN, 10, 0).retry_after_s == pytest.approx(4.0)  # a fourth of it
    assert refusal(stock, BOB, 10, 0).retry_after_s == pytest.approx(4 / 3)
    stock.add("eve", 20, MB)
    assert refusal(stock, Sender("dan", 1.0), 10, 0).retry_after_s == pytest.approx(1.0)


def test_rates_follow_slowly(stock):
    stock.learn(10, 10, 1.0)
    stock.learn(20, 10, 1.0)
    stock.add("ann", 40, 1)
    assert refusal(stock, ANN, 24, 0).retry_after_s == pytest.approx(24 / 12)


def test_the_soft_bounds_come_first(stock):
    stock.learn(10, MB, 1.0)
    stock.add("ann", 19, 1)
    assert (stock.crowded_s(), stock.crowded()) == (0.0, {})
    stock.add("ann", 11, 1)
    assert stock.crowded() == {"ann": pytest.approx(1.0)}
    assert stock.crowded_s() == 0.0
    stock.add("bob", 10, 2 * MB)
    stock.weigh(ANN)
    stock.weigh(BOB)
    assert stock.crowded() == {
        "ann": pytest.approx(4.0),
        "bob": pytest.approx(4 / 3),
    }
    assert stock.crowded_s() == pytest.approx(0.1)  # two bytes too many, at a megabyte a second
    stock.add("bob", 0, -3)
    assert stock.crowded_s() == 0.0
