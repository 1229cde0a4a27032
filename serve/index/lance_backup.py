"""A copy of a LanceDB folder becomes what it was at one moment, and whole or refused.

Tables are made of versions, each a manifest over files that never change: a copy of the files of a table that
is being written has several, of which one is the latest at that moment.
"""

from pathlib import Path

from serve.config.index import Lance
from serve.index.lance_place import Place


SUFFIX = ".lance"
VERSIONS = "_versions"
FIRST = 1
"""The version that a table begins with: while a copy has it, it has all."""
HINT = "latest_version_hint.json"
"""The only file of a table that is written again. Nothing needs it."""


class Torn(Exception):
    """The copy lacks what the table was made of at that moment."""


async def rewind(folder: Path, at: float) -> int:
    """Bring each table of a copy to its latest version at `at`, in epoch seconds of the machine that wrote it; drop
    those that are younger. Every record is read once. Returns how many there are. Raises Torn.
    """
    place = Place(str(folder), {}, Lance())
    database = await place.database()
    records = 0
    try:
        for name in _names(folder):
            try:
                table = await database.open_table(name)
                found = await table.list_versions()  # type: ignore[no-untyped-call]
                then = [one["version"] for one in found if one["timestamp"].timestamp() <= at]
                if not then and min(one["version"] for one in found) > FIRST:
                    raise Torn(
                        f"{name}: its version of that moment was removed before it was copied"
                    )
                if not then:
                    await database.drop_table(name)
                    continue
                if len(then) < len(found):
                    await table.checkout(max(then))
                    await table.restore()
                async for batch in await table.query().to_batches():
                    records += batch.num_rows
            except (OSError, RuntimeError, ValueError) as error:
                raise Torn(f"{name}: {error}") from error
    finally:
        place.close()
    return records


def _names(folder: Path) -> list[str]:
    return sorted(path.name.removesuffix(SUFFIX) for path in folder.glob(f"*{SUFFIX}"))
