"""What becomes of Ray's many words for a worker's end."""

from ray.exceptions import RayTaskError

from rsr.jobs.cluster import pool

TRACEBACK = """\x1b[36mray::Worker.introduce()\x1b[39m (pid=7, ip=192.0.2.2, actor_id=f1)
  At least one of the input arguments for this task could not be computed:
ray.exceptions.RaySystemError: System error: No module named 'rsr'
traceback: Traceback (most recent call last):
ModuleNotFoundError: No module named 'rsr'
"""


def test_machine_of_other_modules_is_named_by_what_it_lacks():
    error = RayTaskError("introduce", TRACEBACK, ValueError(), "worker", 7, "192.0.2.2")
    assert pool._reason(error) == "ModuleNotFoundError: No module named 'rsr'"
