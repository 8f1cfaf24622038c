"""math-verify against answers judged by hand, in any thread, and what it cannot judge. About eight seconds.

reasoning-gym's verifier is tested with its tasks, in test_tasks.py.
"""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from actors.math_judge import MathJudge, as_latex
from actors.reward import Rewards, SourceError
from actors.reward_function import FunctionReward
from actors.reward_source import Fault
from actors.verifiers import load_function, math_verify
from conf.schema import RewardConfig, RewardSourceConfig
from tests.reward_rollouts import rollout


@pytest.fixture(scope="module")
def judge() -> Iterator[MathJudge]:
    judge = MathJudge()
    yield judge
    judge.close()


RIGHT = [
    ("42", "The answer is 42."),
    ("42", r"First 41, then \boxed{42}"),
    (42, r"\boxed{42.0}"),
    (0.5, r"so $x=\frac{1}{2}$"),
    (1e-07, r"\boxed{0.0000001}"),
    (r"\frac{1}{2}", r"\boxed{0.5}"),
    (r"$\frac12$", r"\boxed{\dfrac{2}{4}}"),
    (r"The product is \boxed{12}.", "12"),
    (r"2\sqrt{3}", r"\boxed{\sqrt{12}}"),
    ("1,234", r"\boxed{1234}"),
    ("x^2+2x+1", r"\boxed{(x+1)^2}"),
    (r"\{1,2\}", r"\boxed{\{2,1\}}"),
    (r"(-\infty, 3]", r"\boxed{(-\infty,3]}"),
]
WRONG = [
    ("42", "The answer is 41."),
    ("42", r"\boxed{42} or rather \boxed{43}, no: the final answer is $43$"),
    ("42", ""),
    ("42", "I do not know."),
    (r"2\sqrt{3}", r"\boxed{2}"),  # the start of the right answer, which a number alone would be taken from
    ("x^2+2x+1", r"\boxed{(x-1)^2}"),
    ("(1,2)", r"\boxed{[1,2]}"),
    ("3", r"\boxed{\begin{pmatrix}3\\4\end{pmatrix}}"),
]


@pytest.mark.parametrize(("answer", "response"), RIGHT)
def test_equal_answers_score_one(answer: str | float, response: str, judge: MathJudge) -> None:
    assert judge.verdict(answer, response) == 1.0


@pytest.mark.parametrize(("answer", "response"), WRONG)
def test_other_answers_score_zero(answer: str | float, response: str, judge: MathJudge) -> None:
    assert judge.verdict(answer, response) == 0.0


@pytest.mark.parametrize("answer", ["", "   ", "{{{", r"\frac{", "???"])
def test_a_right_answer_that_cannot_be_read_is_a_fault_and_no_score(answer: str, judge: MathJudge) -> None:
    """(PPO details 13)"""
    fault = judge.verdict(answer, r"\boxed{1}")
    assert isinstance(fault, Fault)
    assert fault.lasting
    assert fault.message == f"math-verify finds no mathematics in the right answer {answer!r}"


@pytest.mark.parametrize("row", [{}, {"answer": None}, {"answer": True}, {"answer": [1]}, {"answer": math.nan}])
def test_a_row_without_a_right_answer_is_a_fault_and_no_score(row: dict[str, Any]) -> None:
    """(PPO details 13)"""
    (fault,) = math_verify([""], [r"\boxed{1}"], [row])
    assert isinstance(fault, Fault)
    found = "has no columns" if not row else f"holds {row['answer']!r} there"
    assert fault.message == f"the row has no right answer under 'answer'; it {found}"


def test_mathematics_is_marked_where_it_is_not() -> None:
    assert as_latex(r"\frac{1}{2}") == r"\boxed{\frac{1}{2}}"
    for marked in ("$1$", r"it is \boxed{1}", r"\(1\)", r"\[1\]"):
        assert as_latex(marked) == marked


TOWER = r"\boxed{9^{9^{9^{9^{9}}}}}"  # more digits than there is room for


def in_thread(call: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


def test_it_judges_in_a_thread_that_is_not_the_main_one() -> None:
    """As in an actor that runs methods beside each other. math-verify alone raises ValueError there."""

    def call() -> list[float | Fault]:
        rows = [{"gold": "42"}, {"gold": "43"}]
        return math_verify(["", ""], [r"\boxed{42}"] * 2, rows, answer_key="gold")

    assert in_thread(call) == [1.0, 0.0]
    assert call() == [1.0, 0.0]


def test_an_expression_that_takes_for_ever_is_a_fault_and_the_next_one_is_judged() -> None:
    """In a thread as well. (PPO details 13)"""
    judge = MathJudge(limit_s=0.5)
    for within in (lambda call: call(), in_thread):
        fault = within(lambda: judge.verdict("42", TOWER))
        assert isinstance(fault, Fault)
        assert fault.lasting
        assert "took more than 0.5 s to compare with '42'" in fault.message
        assert within(lambda: judge.verdict("42", "42")) == 1.0
    judge.close()


def test_a_process_that_is_killed_is_an_error_and_the_next_answer_is_judged() -> None:
    judge = MathJudge()
    assert judge.verdict("1", "1") == 1.0
    assert judge._process is not None
    os.kill(judge._process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="ended with status -9"):
        judge.verdict("1", "1")
    assert judge.verdict("1", "2") == 0.0
    judge.close()


def test_it_is_a_source_of_scores_and_a_verifier_of_the_evaluation() -> None:
    rollouts = [rollout("q", r"\boxed{7}", number=3, row={"gold": "7"}), rollout("q", "8", number=4, row={"gold": "7"})]
    lost = rollout("q", "8", number=5, sample=2, row={"gold": "{{{"})
    sources = (RewardSourceConfig(type="verifier", verifier="math_verify", answer_key="gold", weight=2.0),)
    rewards = Rewards(RewardConfig(sources=sources), trained=None, device="cpu")
    assert [one.score for one in rewards.score(rollouts)] == [2.0, 0.0]
    message = (
        r"^reward.sources\[0\] \(verifier\) gave prompt 5, sample 2 no score: reward.sources\[0\].verifier "
        r"actors.verifiers:math_verify: math-verify finds no mathematics in the right answer '{{{' \(prompt 5, sample 2"
    )
    with pytest.raises(SourceError, match=message):
        rewards.score([*rollouts, lost])

    spec = "actors.verifiers:math_verify"
    assert load_function(spec, key="evaluation.verifier") is math_verify
    verifier = FunctionReward(spec, key="evaluation.verifier")
    judged = [rollout("q", "7", row={"answer": 7}), rollout("q", "7", row={"answer": 8})]
    assert verifier.verify(judged) == [1.0, 0.0]
    assert verifier.verify([*judged, rollouts[-1]]) == [1.0, 0.0, None]
    with pytest.raises(ValueError, match=rf"^evaluation.verifier {spec}: the row has no right answer .* has gold"):
        verifier.verify([rollouts[-1], rollouts[-1]])
