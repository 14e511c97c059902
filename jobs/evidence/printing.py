"""What `rsr teachers`, `correlate` and `simulate` print on a terminal.

Results in, tables out; knows neither options nor how a number was made.
"""

from rsr.jobs.evidence.confounds import Confound
from rsr.jobs.evidence.correlate import Coefficient, Correlations
from rsr.jobs.evidence.simulate import PUBLISHED, Simulation
from rsr.jobs.evidence.teachers import AGREEMENT, Comparison, TeacherEvidence
from rsr.jobs.terminal import Console, Table, styled


def print_comparisons(comparisons: list[Comparison], console: Console) -> None:
    """Each student's table, and with several students one of their RSRs side by side."""
    for comparison in comparisons:
        _print_comparison(comparison, console)
    if len(comparisons) > 1:
        console.print()
        console.say(
            styled(("Side by side", "bold"), ": data-set RSR, each student's best marked *")
        )
        console.print(_side_by_side(comparisons))


def _print_comparison(comparison: Comparison, console: Console) -> None:
    over = (
        f"{comparison.num_problems:,} problems"
        if comparison.sample is None
        else f"a sample of {comparison.sample:,} of {comparison.num_shared_problems:,} problems"
    )
    clip = f", ranks {comparison.rank_clip}" if comparison.rank_clip else ""
    heading = f": teachers by data-set RSR (Eq. 9; lower is better) over {over}{clip}"
    console.print()
    console.say(styled((comparison.student, "bold"), heading))
    console.print(_teacher_table(comparison.teachers))
    console.say(_samples_sentence(comparison))
    console.print()
    console.say("Spearman of RSR with")
    console.print(_confound_table(comparison.confounds))
    for warning in comparison.warnings:
        console.say(styled(("warning:", "yellow"), f" {warning}"))
    for note in comparison.notes:
        console.say(f"note: {note}")


def _teacher_table(teachers: list[TeacherEvidence]) -> Table:
    table = Table()
    table.add_column("teacher")
    for heading in (
        "RSR",
        "95 % interval",
        "P(best)",
        "mean rank",
        "surprisal (nats)",
        "tokens each",
        "correct",
        "scored",
    ):
        table.add_column(heading, justify="right")
    for t in teachers:
        scored = f"{t.num_trajectories:,} of {t.num_rows:,}"
        if t.rsr is None:
            table.add_row(t.teacher, "nothing scored", *[""] * 6, scored)
            continue
        bounds = "" if t.low is None else f"{t.low:.3f} – {t.high:.3f}"
        table.add_row(
            t.teacher,
            f"{t.rsr:.3f}",
            bounds,
            f"{t.probability_best:.3f}",
            f"{t.mean_rank:.2f}",
            f"{t.mean_surprisal_nats:.3f}",
            f"{t.mean_num_tokens:,.0f}",
            "" if t.share_correct is None else f"{t.share_correct:.0%}",
            scored,
        )
    return table


def _samples_sentence(comparison: Comparison) -> str:
    shared = f"{comparison.num_shared_problems:,} problems that all teachers solved"
    if comparison.samples_needed is None:
        return f"samples needed: more than the {shared} can tell"
    return (
        f"samples needed: {comparison.samples_needed:,} of the {shared}; from there on "
        f"{AGREEMENT:.0%} of random samples name the same best teacher"
    )


def _confound_table(confounds: list[Confound]) -> Table:
    table = Table()
    table.add_column("")
    for heading in ("overall", "within problem", "rows"):
        table.add_column(heading, justify="right")
    for c in confounds:
        cells = ("–" if rho is None else f"{rho:+.3f}" for rho in (c.overall, c.within_problem))
        table.add_row(c.name, *cells, f"{c.num_rows:,}")
    return table


def _side_by_side(comparisons: list[Comparison]) -> Table:
    table = Table()
    table.add_column("teacher")
    for comparison in comparisons:
        table.add_column(comparison.student, justify="right")
    by_student = [{t.teacher: t for t in c.teachers} for c in comparisons]
    for name in sorted({name for teachers in by_student for name in teachers}):
        cells = []
        for comparison, by_name in zip(comparisons, by_student, strict=True):
            teacher = by_name.get(name)
            rsr = teacher.rsr if teacher else None
            best = "*" if teacher == comparison.best else " "
            cells.append("–  " if rsr is None else f"{rsr:.3f} {best}")
        table.add_row(name, *cells)
    return table


def print_correlations(result: Correlations, console: Console) -> None:
    """Metrics by |Spearman|, highest first, and what was left out."""
    students = max(len(m.spearman.by_group) for m in result.metrics)
    over = f", averaged over {students} students" if result.by and students > 1 else ""
    console.say(styled((f"Correlation with {result.target}", "bold"), over))
    table = Table()
    table.add_column("metric")
    for kind in ("Spearman", "Pearson"):
        table.add_column(f"|{kind}|", justify="right")
        table.add_column("signed, 95 % interval", justify="right")
        table.add_column("p", justify="right")
    table.add_column("rows", justify="right")
    for m in result.metrics:
        cells = [cell for c in (m.spearman, m.pearson) for cell in _coefficient_cells(c)]
        table.add_row(m.metric, *cells, f"{m.num_rows:,}")
    console.print(table)
    for note in result.notes:
        console.say(f"note: {note}")


def _coefficient_cells(c: Coefficient) -> tuple[str, str, str]:
    bounds = "" if c.low is None else f" [{c.low:+.2f}, {c.high:+.2f}]"
    return f"{c.absolute:.3f}", f"{c.mean:+.3f}{bounds}", f"{c.p_value:.4f}"


def print_simulation(simulation: Simulation, console: Console) -> None:
    """Our values, each beside the published one in parentheses."""
    title = styled(("Four texts under one student", "bold"), ", each beside (the paper's Table 3)")
    console.say(title)
    table = Table()
    table.add_column("text sampled from")
    for name in ("mean surprisal (nats)", "mean rank", "mean token ratio", "RSR"):
        table.add_column(name, justify="right")
    for ours, paper in zip(simulation.texts, PUBLISHED, strict=True):
        table.add_row(
            f"the {ours.text} mode" if ours.text != "mixed" else "the mixture",
            f"{ours.mean_surprisal_nats:.2f}  ({paper.mean_surprisal_nats:.2f})",
            f"{ours.mean_rank:.2f}  ({paper.mean_rank:.2f})",
            f"{ours.mean_token_ratio:.2f}  ({paper.mean_token_ratio:.2f})",
            f"{ours.rsr:.2f}",
        )
    console.print(table)
