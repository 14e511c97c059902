"""The events of a run as Ray metrics, which its dashboard shows and Prometheus collects.

Names begin with `ray_rsr_` where Ray exports them. The driver counts; workers do not.
"""

from ray.util.metrics import Counter, Gauge

from rsr.jobs.run.events import Event, ShardFailed, UnitFailed, UnitFinished, WorkerLost


class RunMetrics:
    """Counts from the start of this process; needs a Ray session."""

    def __init__(self) -> None:
        node = ("node",)
        self._tokens = Counter("rsr_scored_tokens", "Scored tokens.", tag_keys=node)
        self._rows = Counter("rsr_rows", "Rows kept, by status.", tag_keys=("status",))
        self._failures = Counter(
            "rsr_failures", "Units and shards that did not work, by cause.", tag_keys=("cause",)
        )
        self._losses = Counter("rsr_workers_lost", "Workers lost, by cause.", tag_keys=("cause",))
        self._waiting = Gauge("rsr_units_waiting", "Units that no worker has in hand.")

    def tell(self, event: Event) -> None:
        match event:
            case UnitFinished(summary=summary):
                if summary.num_tokens:
                    self._tokens.inc(summary.num_tokens, {"node": event.node})
                for status, count in summary.rows_by_status.items():
                    self._rows.inc(count, {"status": status})
            case UnitFailed() | ShardFailed():
                self._failures.inc(1, {"cause": event.cause})
            case WorkerLost():
                self._losses.inc(1, {"cause": event.cause})

    def set_waiting(self, num_units: int) -> None:
        self._waiting.set(num_units)
