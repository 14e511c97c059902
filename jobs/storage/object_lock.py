"""A lock on an object store: an object that only one process can have put.

Taken by a put that fails if the object is there (If-None-Match), renewed while held, removed at
the end. A holder that died leaves it behind. One that was not renewed for `EXPIRY_S`, or that was a
process of this machine which has ended, may be taken over, by a put that fails if the object has
changed since (If-Match): of several that try, one succeeds.

Weaker than a local lock in one way: age is judged by this machine's clock against the store's. If
they differ by minutes, or a holder could not reach the store for as long, two runs can
overlap until the first one's next renewal, which tells it to stop. They then do the same work
twice; files stay whole, and their values are the same.
"""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

from rsr.jobs.storage.locks import HeldError, Holder

if TYPE_CHECKING:
    from obstore import ObjectMeta, PutResult, UpdateVersion
    from obstore.store import ObjectStore

logger = logging.getLogger(__name__)

RENEW_S = 30.0
EXPIRY_S = 300.0
"""Far above what a store's retries may take, so that a slow night loses nobody's lock."""
RELEASE_TRIES = 3


@contextmanager
def hold_object(store: "ObjectStore", key: str) -> Iterator[None]:
    """Hold the object for this process; if another takes it over, this process is told to stop."""
    content = Holder.this_process().to_json().encode()
    version = _take(store, key, content)
    done = threading.Event()
    renewal = threading.Thread(
        target=_renew, args=(store, key, content, version, done), daemon=True, name="rsr-lock"
    )
    renewal.start()
    try:
        yield
    finally:
        done.set()
        renewal.join()
        _release(store, key, content)


def find_object_holder(store: "ObjectStore", key: str) -> Holder | None:
    """Who holds the object, if somebody does, renewed it lately and is not known to be dead."""
    try:
        found = obstore.get(store, key)
    except FileNotFoundError:
        return None
    age_s = time.time() - found.meta["last_modified"].timestamp()
    holder = Holder.parse(bytes(found.bytes()).decode())
    return holder if age_s < EXPIRY_S and not holder.is_dead else None


def _take(store: "ObjectStore", key: str, content: bytes) -> "UpdateVersion":
    try:
        return _version(obstore.put(store, key, content, mode="create"))
    except AlreadyExistsError:
        try:
            found = obstore.get(store, key)
        except FileNotFoundError:
            # Let go of a moment ago.
            return _take(store, key, content)
        theirs = bytes(found.bytes())
        # The answer to our own put may have been lost, and the put tried again.
        if theirs == content:
            return _version(found.meta)
        age_s = time.time() - found.meta["last_modified"].timestamp()
        holder = Holder.parse(theirs.decode())
        if age_s < EXPIRY_S and not holder.is_dead:
            raise HeldError(holder) from None
        logger.warning("taking over from %s, silent for %.0f s", holder, age_s)
        try:
            return _version(obstore.put(store, key, content, mode=_version(found.meta)))
        except PreconditionError:
            raise HeldError(_current(store, key)) from None


def _renew(
    store: "ObjectStore",
    key: str,
    content: bytes,
    version: "UpdateVersion",
    done: threading.Event,
) -> None:
    while not done.wait(RENEW_S):
        try:
            version = _version(obstore.put(store, key, content, mode=version))
        except (PreconditionError, FileNotFoundError):
            if (holder := _current(store, key)).to_json().encode() == content:
                version = _version(obstore.head(store, key))
                continue
            logger.error("the lock on OUTPUT was taken over by %s: stopping", holder)
            signal.raise_signal(signal.SIGTERM)
            return
        except BaseError as error:
            logger.warning("the lock on OUTPUT could not be renewed: %s", error)


def _release(store: "ObjectStore", key: str, content: bytes) -> None:
    for _ in range(RELEASE_TRIES):
        try:
            if bytes(obstore.get(store, key).bytes()) == content:
                obstore.delete(store, key)
            return
        except FileNotFoundError:
            return
        except BaseError as error:
            logger.warning("the lock on OUTPUT could not be removed: %s", error)


def _current(store: "ObjectStore", key: str) -> Holder:
    try:
        return Holder.parse(bytes(obstore.get(store, key).bytes()).decode())
    except (BaseError, FileNotFoundError):
        return Holder.parse("")


def _version(meta: "PutResult | ObjectMeta") -> "UpdateVersion":
    version: UpdateVersion = {"e_tag": meta["e_tag"]}
    # Where a store has no versions, obstore reports None and will not take it back.
    if meta["version"] is not None:
        version["version"] = meta["version"]
    return version
