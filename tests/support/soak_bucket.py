"""Nights of a command whose SCORED and OUTPUT are in a bucket that has bad nights of its own."""

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import polars as pl
from faulty_proxy import FAULTS, FaultyProxy
from soak_night import Fault
from soak_passes import PassesNight

from rsr.jobs.run.folder import RunFolder
from rsr.jobs.storage import open_storage

BAD_SHARE = 0.1
"""Of the requests, while the bucket answers badly."""
OUTAGES = {"hangs": ("timeout", 4.0), "down": ("500", 30.0)}
"""How all requests fail for how many seconds; the second is longer than a command waits."""
BAD_S = 5.0
ASK_NO_BUCKET = ("rank", "admit", "choose")
"""Passes over what lies in the memory of the cluster."""


class BucketPassesNight(PassesNight):
    """SCORED and OUTPUT on an object store behind a proxy that fails on demand."""

    def __init__(self, *more: Any, proxy: FaultyProxy, url: str) -> None:
        super().__init__(*more)
        self.proxy = proxy
        self._scored, self.output = f"{url}/scored", f"{url}/out"
        scored = open_storage(self._scored)
        for path in sorted(self.source.glob("*.parquet")):
            scored.write(path.name, path.read_bytes())

    @property
    def name(self) -> str:
        return f"{super().name}, in a bucket"

    @property
    def scored(self) -> str:
        return self._scored

    @property
    def events_path(self) -> Path:
        return RunFolder(self.output).events_path

    def faults(self) -> list[Fault]:
        of_bucket = [
            Fault(f"bucket {kind}", lambda kind=kind: self.disturb_bucket(kind), weight)
            for kind, weight in (*((fault, 5) for fault in FAULTS), ("hangs", 5), ("down", 1))
        ]
        torn = [
            Fault("torn output", lambda: self.tear_object(""), 2),
            Fault("torn receipt", lambda: self.tear_object(".rsr/receipts"), 2),
        ]
        own = self.own_faults()
        return [own[0], of_bucket[0], *own[1:3], *of_bucket[1:], *own[3:], *torn]

    def disturb_bucket(self, kind: str) -> bool:
        """Let it answer badly for a while, or not at all."""
        if self.is_lasting("bucket"):
            return False
        fault = f"bucket {kind}"
        share, seconds = (1.0 if kind in OUTAGES else BAD_SHARE), BAD_S
        if kind in OUTAGES:
            kind, seconds = OUTAGES[kind]

        def inject() -> bool:
            name = self.current_pass() if self.is_driver_running() else None
            if name is None:
                return False
            held = ExitStack()
            injected = held.enter_context(self.proxy.faults(share, kind))

            def lift() -> None:
                held.close()
                self.report.bucket_requests.update(injected)

            self.last("bucket", seconds, lift)
            self.count_in_pass(name, fault)
            return True

        return self.in_pass(fault, inject, [p for p in self.passes if p not in ASK_NO_BUCKET])

    def tear_object(self, folder: str) -> bool:
        """Cut an object of OUTPUT at a random byte."""
        if self.is_lasting("bucket") or not self._objects(folder):
            return False
        self.be_without_driver()
        name = self.dice.choice(self._objects(folder))
        content = self._storage.read(name)
        self._storage.write(name, content[: self.dice.randrange(len(content))])
        return True

    @property
    def _storage(self) -> Any:
        return open_storage(self.output)

    def _objects(self, folder: str) -> list[str]:
        """Names of the objects of a folder of OUTPUT; of the outermost, those that are output."""
        names = [file.name for file in self._storage.list(folder)]
        return [name for name in names if folder or not name.startswith(".rsr/")]

    # The night

    def check_round(self) -> None:
        super().check_round()
        # A log of what went wrong may lie there: it is told to the user.
        folders = Path(tempfile.gettempdir()).glob("rsr-*/")
        left = set(folders) - {self.events_path.parent}
        assert not left, f"killed processes have left temporary files: {left}"

    def discard(self) -> None:
        self.lift_faults()
        self._storage.remove_folder("")
        shutil.rmtree(self.events_path.parent, ignore_errors=True)
        self.num_finished_before = 0

    def close(self) -> None:
        super().close()
        self.discard()

    def output_files(self) -> dict[str, bytes]:
        return {name: self._storage.read(name) for name in self._objects("")}

    def read_output(self) -> pl.DataFrame:
        return pl.concat([pl.read_parquet(content) for content in self.output_files().values()])
