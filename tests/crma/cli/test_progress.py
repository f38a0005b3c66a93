"""crma.cli.progress: without a terminal, a line now and then instead of bars."""

from crma.cli.progress import ProgressLines


def test_a_line_is_written_at_the_start_at_the_end_and_every_so_many_seconds_between() -> None:
    now = 0.0
    written: list[str] = []
    lines = ProgressLines(written.append, clock=lambda: now, interval_s=10)
    for step in range(1, 26):
        now = float(step)
        lines.report("training", step, 25)
    lines.report("measuring", 0, 2)  # something else begins: at once
    lines.report("measuring", 1, 2)
    for _ in range(2):  # a server says twice that all is done
        lines.report("measuring", 2, 2)
    assert written == [
        "training: 1 of 25, after 1 s",
        "training: 11 of 25, after 11 s",
        "training: 21 of 25, after 21 s",
        "training: 25 of 25, after 25 s",
        "measuring: 0 of 2, after 25 s",
        "measuring: 2 of 2, after 25 s",
    ]
