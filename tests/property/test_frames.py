"""deployments.frames: what is packed comes out again, however the bytes arrive; nothing else does."""

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments import frames
from deployments.frames import Frame, Malformed, Splitter, Word
from serve import errors
from serve.errors import Internal, PoisonInput, QuotaExceeded, ServiceError
from serve.records import EmbedCall, EmbedReply, Input


IDS = st.lists(st.integers(0, 2**31 - 1), max_size=9)
TEXT = st.text(max_size=12)
SECONDS = st.floats(0, 1e6)


@st.composite
def calls(draw) -> EmbedCall:
    rows = draw(st.lists(IDS, max_size=5))
    return EmbedCall(
        request_id=draw(TEXT),
        tenant=draw(TEXT),
        weight=draw(st.floats(0.01, 100)),
        klass=draw(st.sampled_from(["interactive", "bulk"])),
        model=draw(TEXT),
        inputs=tuple(Input(ids=np.array(row, np.int32)) for row in rows),
        tokens=tuple(map(len, rows)),
        deadline_s=draw(SECONDS),
        limit_s=draw(st.none() | SECONDS),
        priority=draw(st.integers(0, 100)),
    )


def same(one: EmbedCall, other: EmbedCall) -> bool:
    fields = [name for name in EmbedCall.__dataclass_fields__ if name != "inputs"]
    rows = [[part.ids.tolist() for part in call.inputs] for call in (one, other)]
    return rows[0] == rows[1] and all(getattr(one, name) == getattr(other, name) for name in fields)


@given(calls())
def test_a_call_comes_out_as_it_went_in(call):
    assert frames.carries(call)
    found = frames.read_call(frames.pack_call(call))
    assert same(found, call)
    assert all(one.ids.flags.aligned for one in found.inputs)


@given(st.lists(IDS, min_size=1, max_size=4), SECONDS, SECONDS)
def test_a_reply_comes_out_as_it_went_in(rows, queue_ms, infer_ms):
    vectors = np.random.default_rng(7).normal(size=(len(rows), 3)).astype(np.float32)
    failed = PoisonInput("no", code="vector_not_finite", param="input[2]")
    reply = EmbedReply(vectors, ((0, failed),), queue_ms=queue_ms, infer_ms=infer_ms)
    found = frames.read_reply(frames.pack_reply(reply))
    assert np.array_equal(found.vectors, vectors)
    assert found.vectors.flags.aligned
    assert (found.queue_ms, found.infer_ms) == (queue_ms, infer_ms)
    [(index, error)] = found.failures
    assert (index, type(error), vars(error)) == (0, PoisonInput, vars(failed))


@pytest.mark.parametrize(
    "kind",
    [
        one
        for one in vars(errors).values()
        if isinstance(one, type) and issubclass(one, ServiceError)
    ],
)
def test_every_error_keeps_its_kind_and_what_it_says(kind):
    error = kind("why", param="input", code="word", retry_after_s=3)
    found = frames.read_refusal(frames.pack_refusal(error))
    assert (type(found), vars(found)) == (kind, vars(error))


def test_a_reply_to_a_call_without_inputs_comes_out_as_it_went_in():
    reply = EmbedReply(np.zeros((0, 3), np.float32))
    assert frames.read_reply(frames.pack_reply(reply)).vectors.shape == (0, 3)


def test_what_no_frame_holds_is_not_packed(monkeypatch):
    reply = EmbedReply(np.zeros((2, 3), np.float32))
    size = len(frames.pack_reply(reply))
    monkeypatch.setattr(frames, "BODY_BYTES_MAX", size)
    frames.pack_reply(reply)
    monkeypatch.setattr(frames, "BODY_BYTES_MAX", size - 1)
    with pytest.raises(ValueError, match=f"{size} bytes"):
        frames.pack_reply(reply)


def test_an_error_of_a_kind_that_is_not_known_here_arrives_as_its_parent():
    class Later(QuotaExceeded):
        pass

    assert type(frames.read_refusal(frames.pack_refusal(Later("x")))) is QuotaExceeded
    assert type(frames.read_refusal(orjson.dumps(["Nope", "x", None, "y", None]))) is Internal


@given(
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.sampled_from(list(Word)), st.binary())),
    st.data(),
)
def test_frames_are_whole_however_the_bytes_arrive(parts, data):
    sent = [Frame(*part) for part in parts]
    stream = b"".join(frame.packed() for frame in sent)
    splitter, found, at = Splitter(), [], 0
    while at < len(stream):
        step = data.draw(st.integers(1, len(stream) - at))
        found += splitter.feed(stream[at : at + step])
        at += step
    assert found == sent


def test_a_frame_beyond_the_bound_is_refused_before_its_body_has_come():
    frame = Frame(1, Word.CALL, bytes(11)).packed()
    assert len(list(Splitter(11).feed(frame))) == 1
    with pytest.raises(Malformed):
        list(Splitter(10).feed(frame[:13]))


def test_a_word_that_nobody_says_is_refused():
    with pytest.raises(Malformed):
        list(Splitter().feed(b"\0" * 12 + b"\x63"))


@given(st.binary(max_size=40))
def test_bytes_that_are_no_body_are_refused(body):
    for read in (frames.read_call, frames.read_reply, frames.read_refusal):
        with pytest.raises(Malformed):
            read(body)


@pytest.mark.parametrize("tokens", [(3,), (5,), (-1, 5), (2, 1), (2.5, 1.5)])
def test_counts_that_differ_from_the_ids_are_refused(tokens):
    call = EmbedCall(
        "r", "t", 1.0, "bulk", "m", (Input(ids=np.arange(4, dtype=np.int32)),), (4,), 1
    )
    body = frames.pack_call(call).replace(b"[4]", orjson.dumps(tokens))
    body = (body[4 : body.index(b"]", body.index(b"]") + 1) + 1]), body[-16:]
    packed = len(body[0]).to_bytes(4, "little") + b"".join(body)
    with pytest.raises(Malformed):
        frames.read_call(packed)


def test_only_token_ids_can_be_carried():
    call = EmbedCall("r", "t", 1.0, "bulk", "m", (Input(text="a"),), (4,), 1)
    assert not frames.carries(call)
