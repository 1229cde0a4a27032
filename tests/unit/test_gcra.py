from serve.admission.gcra import Gcra


NOW = 1000.0


def new_gcra(interval_s: float = 1.0) -> Gcra:
    return Gcra(interval_s, NOW, NOW)


def test_the_wait_is_exact():
    gcra = new_gcra(0.01)
    gcra.charge(900, NOW)
    assert gcra.wait(1000, 100, NOW) == 0
    assert abs(gcra.wait(1000, 250, NOW) - 1.5) < 1e-9
    assert gcra.wait(1000, 250, NOW + 1.5) == 0


def test_a_late_return_is_no_credit():
    """What was refilled meanwhile cannot be given back as well."""
    gcra = new_gcra()
    mark = gcra.charge(10, NOW)
    gcra.charge(10, NOW + 60)
    gcra.give_back(10, mark)
    assert gcra.free(10, NOW + 60) == 0


def test_a_return_in_the_midst_of_the_refill_gives_back_the_rest():
    gcra = new_gcra()
    mark = gcra.charge(10, NOW)
    gcra.charge(3, NOW + 4)  # four were refilled
    gcra.give_back(10, mark)  # six were not: as if the first had never been, seven are left
    assert gcra.free(10, NOW + 4) == 7


def test_two_late_returns_give_no_more_back_than_one_each():
    gcra = new_gcra()
    marks = [gcra.charge(10, NOW) for _ in range(2)]
    gcra.give_back(10, marks[0])
    gcra.charge(1, NOW + 9)  # one second of the second's ten is not refilled
    gcra.give_back(10, marks[1])
    assert gcra.free(30, NOW + 9) == 29
    gcra.give_back(10, gcra.charge(10, NOW + 9))
    assert gcra.free(30, NOW + 9) == 29


def test_parts_of_one_charge_are_given_back_apart():
    gcra = new_gcra()
    mark = gcra.charge(10, NOW)
    gcra.charge(10, NOW + 2)
    for _ in range(4):
        gcra.give_back(3, mark)  # eight of ten are not refilled
    assert gcra.free(30, NOW + 2) == 20


def test_a_charge_found_later_does_not_make_an_old_return_larger():
    gcra = new_gcra()
    old = gcra.charge(10, NOW)
    gcra.charge(1, NOW + 9)
    gcra.charge(100, NOW + 9)
    gcra.give_back(10, old)  # nine of its ten were refilled
    assert gcra.free(30, NOW + 9) == 30 - 101


def test_it_is_lowered_and_never_raised():
    gcra = new_gcra()
    gcra.lower(10, 4, NOW)
    gcra.lower(10, 7, NOW)
    assert gcra.free(10, NOW) == 4
    gcra.lower(10, -2, NOW)
    assert gcra.wait(10, 1, NOW) == 3
