"""Tables that grow in parts: parquet files of one folder, each whole or absent, for jobs that survive a kill."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmemb_deploy.errors import OptionError
from mmemb_deploy.files import whole
from mmemb_deploy.jobs.readers import load_pyarrow

LOCK = ".lock"


def write_part(folder: Path, rows: Sequence[Mapping[str, Any]], process: int = 0) -> None:
    """Add rows as a new part, named by the process that adds it, so that several may. No rows, no part."""
    if not rows:
        return
    arrow, parquet = load_pyarrow("train")
    number = 1 + max((int(path.stem.split("-")[1]) for path in folder.glob("part-*.parquet")), default=-1)
    with whole(folder / f"part-{number:05d}{f'-{process}' if process else ''}.parquet") as new:
        parquet.write_table(arrow.Table.from_pylist([dict(row) for row in rows]), new)


def read_parts(folder: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of all parts in order. Raises OptionError for a file that is no part of such a table."""
    arrow, parquet = load_pyarrow("train")
    for path in sorted(folder.glob("part-*.parquet")):
        try:
            table = parquet.read_table(path, columns=list(columns))
        except (arrow.ArrowException, OSError) as error:
            raise OptionError(f"{path} cannot be read: {error}. Delete it, and the job writes it again") from error
        missing = set(columns) - set(table.column_names)
        if missing:
            raise OptionError(f"{path} has no column {', '.join(sorted(missing))}: it is not a part of this table")
        yield from table.to_pylist()


@contextmanager
def locked(folder: Path, process: int = 0, *, wait: bool = False) -> Generator[None]:
    """Hold a folder for one process, or for the process of a number. A process that dies lets go.

    Where another has it, raises OptionError, or waits for it.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{LOCK}{process or ''}").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise OptionError(
                f"{folder} is in use by another process: wait for it, or choose another folder"
            ) from error
        yield
