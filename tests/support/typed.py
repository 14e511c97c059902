"""Commands as they are typed, in the tests' own process: it has imported what they take long to."""

from click.testing import CliRunner, Result

from rsr.jobs.cli import main


def rsr(*words: object, exit_code: int = 0) -> Result:
    """What `rsr` says to these words; fails where it ends with another code."""
    result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == exit_code, result.stdout + result.stderr
    return result
