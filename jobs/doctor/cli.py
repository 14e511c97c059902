"""`rsr doctor`: say what this machine has, what will be slow and what is missing."""

import sys
from dataclasses import asdict

import click

from rsr.jobs.command import EXIT_FAILURES, json_option
from rsr.jobs.doctor.checkup import Finding, Verdict, check_up
from rsr.jobs.terminal import Console, Table, print_json

STYLES = {Verdict.OK: "", Verdict.SLOW: "yellow", Verdict.ADVICE: "yellow", Verdict.MISSING: "red"}


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine has for a run, what will be slow and what is missing.

    Looks at the libraries, the GPUs and their driver, cores, memory and disks; starts and changes
    nothing. Ends with 1 if something is missing without which nothing can be scored here.
    """
    findings = check_up()
    if as_json:
        print_json({"findings": [asdict(finding) for finding in findings]})
    else:
        _print(findings)
    sys.exit(EXIT_FAILURES if any(f.verdict is Verdict.MISSING for f in findings) else 0)


def _print(findings: list[Finding]) -> None:
    table = Table(show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        verdict = finding.verdict
        told = "" if verdict is Verdict.OK else verdict.value
        table.add_row(finding.name, told, finding.found, style=STYLES[verdict] or None)
        if finding.advice:
            table.add_row("", "", f"→ {finding.advice}")
    Console().print(table)
