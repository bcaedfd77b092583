"""The router is pure: scores and a policy in, routes out."""

import pytest

from mmemb_deploy import OptionError
from mmemb_deploy.routing.router import Policy, highest


def test_auto_reasons_at_and_above_the_threshold() -> None:
    policy = Policy("auto", threshold=0.3)
    assert [policy.wants(score) for score in (0.29, 0.3, 0.31)] == [False, True, True]


def test_never_and_always_ignore_the_score() -> None:
    assert not Policy("never", threshold=0.0).wants(1.0)
    assert Policy("always", threshold=1.0).wants(0.0)


@pytest.mark.parametrize(("rate", "inputs", "quota"), [(0.0, 9, 0), (0.5, 9, 4), (0.1, 30, 3), (1.0, 9, 9)])
def test_a_rate_is_a_quota_of_whole_inputs(rate: float, inputs: int, quota: int) -> None:
    assert Policy(rate=rate).quota(inputs) == quota


def test_without_a_rate_there_is_no_quota() -> None:
    assert Policy().quota(9) is None


def test_the_highest_scores_win_and_ties_go_to_the_earlier_row() -> None:
    assert highest([(0, 0.2), (1, 0.9), (2, 0.2), (3, 0.5)], 3) == [1, 3, 0]


def test_values_that_cannot_be_are_refused() -> None:
    with pytest.raises(OptionError, match="threshold is 2"):
        Policy(threshold=2)
    with pytest.raises(OptionError, match="did you mean 'always'"):
        Policy("alway")
