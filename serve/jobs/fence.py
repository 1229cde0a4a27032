"""Statements of `ports.Fence`: which process is the one writer, and what it must not write."""

from collections.abc import Mapping

import sqlalchemy as sa

from serve.errors import Fenced
from serve.jobs.generations import is_live, newer
from serve.jobs.tables import epochs


def take_epoch(conn: sa.Connection, name: str, deploy_seq: int) -> int:
    """The next epoch of `name`, from 1. Raises Fenced when a later deployment took one."""
    row = conn.execute(
        sa.select(epochs.c.deploy_seq, epochs.c.epoch)
        .where(epochs.c.name == name)
        .with_for_update()
    ).one_or_none()
    if row is None:
        conn.execute(sa.insert(epochs).values(name=name, deploy_seq=deploy_seq, epoch=1))
        return 1
    if row.deploy_seq > deploy_seq:
        raise Fenced(f"{name}: deployment {row.deploy_seq} is later than {deploy_seq}")
    epoch = int(row.epoch) + 1
    conn.execute(
        sa.update(epochs).where(epochs.c.name == name).values(deploy_seq=deploy_seq, epoch=epoch)
    )
    return epoch


def superseded(
    conn: sa.Connection, name: str, epoch: int, ns: str, versions: Mapping[str, int]
) -> frozenset[str]:
    """Documents with a newer generation; all of them when the collection is gone.

    Raises Fenced when `epoch` is not the latest of `name`.
    """
    latest = conn.scalar(sa.select(epochs.c.epoch).where(epochs.c.name == name))
    if latest != epoch:
        raise Fenced(f"{name}: epoch {epoch} is over, the latest is {latest}")
    if not is_live(conn, ns):
        return frozenset(versions)
    return newer(conn, ns, versions)
