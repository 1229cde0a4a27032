"""What `bench.engine` compares is what it says: hand-outs as the service's, arithmetic as counted."""

import json
import random

import numpy as np
import pytest

from bench.arithmetic import Shape
from bench.engine_loads import Load
from serve.config import Batch
from serve.embedding.packing import Pace
from serve.embedding.sharing import padded
from serve.records import Input


PACE = Pace(overhead_s=0.001, token_s=0.0001)
BATCH = Batch(target_ms=50, tokens_min=256, tokens_max=1024, items_max=64)


@pytest.fixture
def requests(rng: random.Random) -> Load:
    tokens = [rng.choice((8, 12, 120, 250)) for _ in range(40)]
    inputs = [Input(ids=np.ones(count, np.int32)) for count in tokens]
    calls = [list(range(at, at + 8)) for at in range(0, 40, 8)]
    return Load("requests", ["x" * count for count in tokens], inputs, tokens, calls)


def flat(batches):
    return [at for batch in batches for at in batch]


def test_every_text_is_in_one_batch_of_every_packing(requests):
    for batches in (requests.planned(PACE, BATCH), requests.arrival(), requests.by_length()):
        assert sorted(flat(batches)) == list(range(40))


def test_hand_outs_are_of_the_target_and_keep_the_order_of_calls(requests):
    hand_outs = requests.hand_outs(PACE, BATCH)
    assert len(hand_outs) > 5
    assert [at // 8 for at in flat(hand_outs)] == sorted(at // 8 for at in flat(hand_outs))
    room = PACE.load_in(0.05)
    for members in hand_outs:
        assert sum(requests.tokens[at] for at in members) < 1.5 * room
    planned = requests.planned(PACE, BATCH)
    assert requests.waste(planned) < 0.1 < requests.waste(requests.arrival())
    assert max(padded([requests.tokens[at] for at in one]) for one in planned) <= 1024


def test_one_call_is_one_hand_out(requests):
    whole = Load("mixed", requests.texts, requests.inputs, requests.tokens, [list(range(40))])
    assert len(whole.planned(PACE, BATCH)) < len(requests.planned(PACE, BATCH))
    assert [len(one) for one in whole.by_length()] == [32, 8]


def test_operations_are_those_of_the_layers(tmp_path):
    sizes = {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    shape = Shape.read(tmp_path)
    linear = 2 * 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert shape.operations([1]) == linear + 6 * 4 * 384
    assert shape.operations([100, 1]) - shape.operations([1]) == 100 * linear + 6 * 4 * 10_000 * 384
