"""How many flushes may be in flight."""

from serve.index.window import Window


def land(window: Window, rounds: int) -> None:
    for _ in range(rounds):
        for _ in range(window.size):
            window.grow(window.size)


def test_it_begins_at_the_most_and_never_exceeds_it():
    window = Window(3)
    assert window.size == 3
    land(window, 5)
    assert window.size == 3


def test_it_is_halved_once_for_all_that_flew_together_and_never_below_one():
    window = Window(8)
    for number in range(1, 9):
        window.cut(number, newest=8)
    assert window.size == 4
    window.cut(9, newest=12)
    window.cut(10, newest=12)
    assert window.size == 2
    for number in range(13, 20):
        window.cut(number, newest=number)
    assert window.size == 1


def test_it_grows_by_one_a_round():
    window = Window(8)
    for number in range(1, 4):
        window.cut(number, newest=number)
    sizes = [window.size]
    for _ in range(5):
        land(window, 1)
        sizes.append(window.size)
    assert sizes == [1, 2, 2, 3, 4, 5]


def test_it_does_not_grow_while_places_are_empty():
    window = Window(8)
    window.cut(1, newest=1)
    for _ in range(100):
        window.grow(window.size - 1)
    assert window.size == 4
