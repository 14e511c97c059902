"""What a run can say to its user besides a result."""


class UsageError(Exception):
    """What was asked cannot be done as asked: one line, exit code 2, nothing written."""


class Interrupted(Exception):
    """Stopped from outside before the end: exit code 75, the same command goes on."""


class ShardsFailed(Exception):
    """Some shards could not be written, one line each: exit code 1, the others are kept."""
