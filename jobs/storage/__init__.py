"""Where files are kept: a folder on a disk, or a prefix of an object store's bucket.

base.py          what every storage offers
local.py         a folder            bucket.py       s3://, gs://, az://
hub.py           hf://datasets/…     ranged.py       a remote file, read by ranges
open.py          from a path or URL to its storage
one_file.py      one file, and a hidden folder beside it
walk.py          the files below a folder, by way of links too
atomic.py        files that appear whole or not at all
nameless.py      temporary files that are gone with their process
locks.py         one process at a time; object_lock.py: the same on an object store
hashing.py       the hash by which a file is known again
concurrency.py   many files at once
"""

from rsr.jobs.storage.base import Storage, StorageError, StoredFile
from rsr.jobs.storage.open import is_in_bucket, is_remote, locate, open_storage

__all__ = [
    "Storage",
    "StorageError",
    "StoredFile",
    "is_in_bucket",
    "is_remote",
    "locate",
    "open_storage",
]
