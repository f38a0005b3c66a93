"""crma.training.study_speed: how many processes are taken. What is measured: tests/e2e."""

from crma.training.study_speed import Speed, fastest


def test_the_fewest_processes_are_taken_that_are_nearly_as_fast_as_any() -> None:
    found = [
        Speed(1, False, 6.0),
        Speed(1, True, 30.0),
        Speed(2, True, 58.0),
        Speed(4, True, 60.0),
        Speed(8, True, 55.0),
    ]
    assert fastest(found) == Speed(2, True, 58.0)
