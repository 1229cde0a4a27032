"""Reciprocal rank fusion (Cormack, Clarke and Büttcher 2009): rankings whose scores do not compare."""

from collections.abc import Sequence

from serve.records import Hit


def fuse(rankings: Sequence[Sequence[Hit]], *, k: int, top_k: int) -> list[Hit]:
    """The best of all rankings by the sum of 1/(k + rank), which becomes their score; ties by id.

    Ranks count from 1; a ranking that lacks a record gives it nothing.
    """
    scores: dict[str, float] = {}
    records = {hit.record.id: hit.record for ranking in reversed(rankings) for hit in ranking}
    for ranking in rankings:
        for rank, hit in enumerate(ranking, 1):
            scores[hit.record.id] = scores.get(hit.record.id, 0.0) + 1 / (k + rank)
    best = sorted(scores, key=lambda record_id: (-scores[record_id], record_id))
    return [Hit(records[record_id], scores[record_id]) for record_id in best[:top_k]]
