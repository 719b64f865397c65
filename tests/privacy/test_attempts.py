"""What fine-tuning does after a restart: repeats exactly, or begins an attempt of its own and pays for what was lost."""

from privimage.privacy.attempts import resume_attempt

SAME, OTHER = {"ranks": 2, "torch": "x"}, {"ranks": 3, "torch": "x"}


def test_the_first_attempt_makes_all_steps(tmp_path) -> None:
    attempt = resume_attempt(tmp_path / "attempts.json", SAME, 0, 100, lambda number: 0)
    assert (attempt.number, attempt.first, attempt.last) == (0, 0, 100)


def test_the_same_arrangement_repeats_itself(tmp_path) -> None:
    """40 charged, the checkpoint is at 30: steps 30 to 39 are replayed with the same noise and cost nothing again."""
    path = tmp_path / "attempts.json"
    first = resume_attempt(path, SAME, 0, 100, lambda number: 0)
    again = resume_attempt(path, SAME, 30, 100, lambda number: 0 if number == 0 else 40)
    assert again == first


def test_another_arrangement_pays_for_lost_steps_with_steps(tmp_path) -> None:
    path = tmp_path / "attempts.json"
    resume_attempt(path, SAME, 0, 100, lambda number: 0)
    second = resume_attempt(path, OTHER, 30, 100, lambda number: 0 if number == 0 else 40)
    assert (second.number, second.first, second.last) == (1, 30, 90)
    third = resume_attempt(path, SAME, 50, 100, lambda number: {1: 40, 2: 65}[number])
    assert (third.number, third.first, third.last) == (2, 50, 85)


def test_after_a_clean_stop_nothing_is_lost(tmp_path) -> None:
    path = tmp_path / "attempts.json"
    resume_attempt(path, SAME, 0, 100, lambda number: 0)
    assert resume_attempt(path, OTHER, 40, 100, lambda number: 40).last == 100


def test_a_lost_checkpoint_never_lets_more_than_t_steps_be_charged(tmp_path) -> None:
    path = tmp_path / "attempts.json"
    resume_attempt(path, SAME, 0, 100, lambda number: 0)
    resume_attempt(path, OTHER, 90, 100, lambda number: 90)
    lost = resume_attempt(path, OTHER, 0, 100, lambda number: 100)
    assert (lost.first, lost.last) == (0, 0)


def test_a_torn_charge_costs_a_step(tmp_path) -> None:
    path = tmp_path / "attempts.json"
    resume_attempt(path, SAME, 0, 100, lambda number: 0)
    assert resume_attempt(path, SAME, 10, 100, lambda number: 1).last == 99
