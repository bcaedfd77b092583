"""Embedding a source on a Ray cluster: the chunks of the ordinary job, each on whichever device is free.

Ray Data hands chunks to a pool of workers, starts a worker anew when it dies, and hands its chunk out again. A chunk is
done when its part lies in the job's folder, whole; so none can be lost or doubled, a job that was stopped goes on after
what was done, and `mmemb embed` can go on with or without Ray where the other stopped.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from mmemb_deploy.backends.choose import BACKENDS
from mmemb_deploy.bundle.folder import NANO, Bundle
from mmemb_deploy.embedder import Embedder
from mmemb_deploy.errors import BackendError, MmembError, OptionError, check_known
from mmemb_deploy.jobs.job import Job, Summary
from mmemb_deploy.jobs.parts import write_part
from mmemb_deploy.jobs.run import prepare
from mmemb_deploy.ray_cluster import connect, takes_gpus

if TYPE_CHECKING:
    from mmemb_deploy.reasoners.remote import RemoteReasoner

AHEAD = 2  # chunks that a worker has at once: one runs, one is prepared
QUEUED = 4  # and those handed to it, from which on Ray Data takes another worker where there is room
TRIES = 4  # at a chunk, each of which ended with its worker

Chunk = dict[str, Any]  # "start", its first row


def embed_on_ray(
    job: Job,
    done: Callable[[int], None],
    *,
    bundle: Bundle | None = None,
    backend: str = "auto",
    threads: int | None = None,
    reasoner: RemoteReasoner | None = None,
    digest: str | None = None,
    workers: int | None = None,
) -> Summary:
    """Do a job on the cluster that RAY_ADDRESS names, else on one of this machine; `done` hears of finished rows.

    All nodes must reach the bundle, the source and its files, and the output's folder by the same paths. A worker takes
    a GPU, or without one `threads` cores (1 by default); there are as many as the cluster has room for, or `workers`.
    `bundle` is the embedded one by default; workers hold theirs to `digest`. Raises what `embed_source` raises,
    BackendError where the cluster has no device for a worker, MissingExtraError without Ray.
    """
    check_known("backend", backend, BACKENDS)
    manifest = (bundle or Bundle.open(NANO)).manifest
    connect()
    from ray.data import ActorPoolStrategy, from_items
    from ray.exceptions import RayError

    gpus = takes_gpus(backend, manifest)
    missing = job.begin(manifest, reasoner)
    for start in missing:
        _tried(job, start).unlink(missing_ok=True)
    done(job.source.rows - sum(map(job.source.size, missing)))
    if not missing:
        return job.end(manifest)
    load = partial(
        Embedder.load,
        None if bundle is None else bundle.folder.absolute(),
        backend=backend,
        threads=threads if gpus else threads or 1,
        reasoner=reasoner,
        digest=digest,
    )
    pool = ActorPoolStrategy(
        **({"min_size": 1} if workers is None else {"size": workers}),
        max_concurrent_calls_per_actor=AHEAD,
        max_tasks_in_flight_per_actor=QUEUED,
        enable_true_multi_threading=True,
    )
    starts = [{"start": start} for start in missing]
    chunks = from_items(starts, override_num_blocks=len(starts)).map_batches(
        Worker,
        fn_constructor_args=(load, replace(job, source=job.source.absolute())),
        compute=pool,
        batch_size=1,
        batch_format="numpy",
        num_cpus=None if gpus else threads or 1,
        num_gpus=1 if gpus else None,
    )
    chunks.context.max_errored_blocks = 0
    chunks.context.enable_progress_bars = False
    try:
        for chunk in chunks.iter_rows():
            _check(job, chunk)
            done(job.source.size(chunk["start"]))
    except RayError as error:
        raise BackendError(f"Ray gave up; the same command goes on after what is done: {error}") from error
    return job.end(manifest)


def _tried(job: Job, start: int) -> Path:
    """Return the file that has a byte for every time a chunk was begun."""
    return job.part(start).with_suffix(".tried")


def _check(job: Job, chunk: Chunk) -> None:
    """Raise what a worker met, and OptionError where its part is not to be seen here."""
    if chunk["failure"]:
        raise pickle.loads(chunk["failure"])
    part = job.part(chunk["start"])
    if not part.exists():
        raise OptionError(
            f"a worker on {chunk['node']} wrote {part}, which is not there on this machine: the output must lie in a "
            "folder that all nodes share"
        )


class Worker:
    """An embedder in a process of Ray's, which prepares a chunk in one thread while another runs the engine."""

    def __init__(self, load: Callable[[], Embedder], job: Job) -> None:
        self._load, self._job = load, job
        self._embedder: Embedder | None = None
        self._one = Lock()  # thread at a time that loads or runs the engine

    def __call__(self, batch: Chunk) -> Chunk:
        """Embed one chunk and write its part; what goes wrong is returned, to be raised where the job was begun."""
        (start,) = batch["start"]
        failure = b""
        try:
            self._embed(int(start))
        except MmembError as error:
            failure = pickle.dumps(error)
        return {"start": batch["start"], "failure": [failure], "node": [os.uname().nodename]}

    def _embed(self, start: int) -> None:
        part = self._job.part(start)
        if part.exists():  # finished by a worker that died before it could say so
            return
        with _tried(self._job, start).open("ab") as file:
            if file.tell() >= TRIES:
                raise BackendError(
                    f"{TRIES} workers died while they had the inputs from {start} on (memory is the usual reason: "
                    "lower the batch size); Ray's logs say how. The same command goes on after what is done"
                )
            file.write(b".")
        with self._one:
            self._embedder = embedder = self._embedder or self._load()
        records = [record for _, _, record in self._job.source.chunks([start])]
        prepared = prepare(embedder, self._job, records, start)
        with self._one:
            result = embedder.run(prepared)
        write_part(part, records, [result])
