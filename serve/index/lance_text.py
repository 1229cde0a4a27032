"""Full text in a LanceDB table: its own inverted index over the column `text`.

lancedb is imported by who opened the database: see `serve.index.lancedb`.
"""

from typing import TYPE_CHECKING

from serve.index.full_text import WORD_BYTES_MAX, words
from serve.index.rows import COLUMNS, from_arrow
from serve.index.terms import to_sql
from serve.records import Filter, Hit


if TYPE_CHECKING:
    import lancedb

COLUMN = "text"
INDEX = "text_idx"


async def index_text(table: "lancedb.AsyncTable") -> None:
    """Make the index where it is missing. It cuts texts into words as `full_text` does."""
    from lancedb.index import FTS  # noqa: PLC0415

    if any(index.name == INDEX for index in await table.list_indices()):
        return
    rules = FTS(
        base_tokenizer="simple",
        max_token_length=WORD_BYTES_MAX,
        stem=False,
        remove_stop_words=False,
        ascii_folding=False,
    )
    await table.create_index(COLUMN, config=rules, name=INDEX)


async def match_text(
    table: "lancedb.AsyncTable", text: str, top_k: int, where: Filter | None
) -> list[Hit]:
    """Rows that hold a word of `text`, also those that the index does not know yet, by BM25."""
    from lancedb.query import MatchQuery  # noqa: PLC0415

    if not words(text):
        return []
    known = text.encode("utf-8", "ignore").decode()  # it takes no lone surrogates
    asked = MatchQuery(known, COLUMN)  # type: ignore[call-arg]  # the rest has defaults
    search = table.query().nearest_to_text(asked).limit(top_k)
    if where is not None:
        search = search.where(to_sql(where))
    found = await search.select([*COLUMNS, "_score"]).to_arrow()
    hits = map(Hit, from_arrow(found), found["_score"].to_pylist())
    return sorted(hits, key=lambda hit: (-hit.score, hit.record.id))
