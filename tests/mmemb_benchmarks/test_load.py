"""Load is offered as it comes, whatever becomes of it, and told in full. No time is asserted."""

import asyncio
import json
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from mmemb_benchmarks import commands
from mmemb_benchmarks.measure import load as loads
from mmemb_benchmarks.measure import overload as overloads
from mmemb_benchmarks.measure.latency import mode_options
from mmemb_benchmarks.measure.load import LoadResult, Search, Traffic, Trial, measure_load, run_trial
from mmemb_benchmarks.measure.open_loop import Answer, Reply, arrivals, offer
from mmemb_benchmarks.measure.overload import OverloadResult, measure_levels, measure_overload, recovery_s
from mmemb_benchmarks.measure.targets import Server, StaticBatches, TwoRoutes, openai_body, opened
from mmemb_benchmarks.workload import Workload, assemble, load_uncached
from mmemb_deploy import BackendError, DeadlineError, Embedder, OptionError, OverloadError
from mmemb_deploy.evaluation.pairs import encode_queries
from mmemb_deploy.evaluation.routes import measure_routes
from mmemb_deploy.routing.router import Route
from mmemb_deploy.serve.ask import Ask

MODES = "never", "auto", "always"


def silent(_: str) -> None:
    """Report nothing."""


@pytest.fixture(scope="module")
def nano() -> Embedder:
    return assemble(*load_uncached(None, "auto", 1))


@pytest.fixture(scope="module")
def traffic(nano: Embedder) -> Traffic:
    return Traffic.of(nano, Workload.of(nano, queries=24, seed=0), burst=1.0, seed=0)


class Fake:
    """Answers at once with what it is told to, in turns; an exception is raised."""

    def __init__(self, *answers: Answer | Exception) -> None:
        self.answers = answers
        self.asked: list[Ask] = []

    async def ask(self, ask: Ask) -> Answer:
        said = self.answers[len(self.asked) % len(self.answers)]
        self.asked.append(ask)
        if isinstance(said, Exception):
            raise said
        return said


ANSWER = Answer(np.ones(1, np.float32), False, 0.8, None)
ASK = Ask(inputs=["one"], options={})


def offered(target: Fake, due: Sequence[float], **more: float) -> list[Reply]:
    return asyncio.run(offer(target, [ASK] * len(due), due, **more))


@pytest.mark.parametrize("burst", [1, 8])
def test_arrivals_have_their_rate_and_come_together_in_bursts(burst: int) -> None:
    due = arrivals(50, 20_000, burst, np.random.default_rng(0))
    assert due[-1] == pytest.approx(20_000 / 50, rel=0.1)
    gaps = np.diff(due)
    assert np.mean(gaps == 0) == pytest.approx(1 - 1 / burst, abs=0.02)
    assert gaps.std() == pytest.approx(np.sqrt(2 * burst - 1) / 50, rel=0.1)
    assert arrivals(100, 20_000, burst, np.random.default_rng(0)) == pytest.approx(due / 2)


def test_a_request_waits_from_when_it_was_due() -> None:
    (reply,) = offered(Fake(ANSWER), [-5.0])
    assert reply.seconds >= reply.lag >= 5


def test_every_request_has_a_reply_that_says_what_became_of_it() -> None:
    target = Fake(ANSWER, OverloadError("full", reason="rows", retry_after=1.0), DeadlineError("too late"))
    replies = sorted(offered(target, [0.0] * 6), key=lambda reply: reply.number)
    assert [(reply.answer is not None, reply.refused) for reply in replies] == [
        *[(True, False), (False, True), (False, False)] * 2
    ]


def test_an_error_of_the_target_ends_the_trial() -> None:
    with pytest.raises(ExceptionGroup, match="unhandled"):
        offered(Fake(BackendError("broken")), [0.0])


def test_a_hopeless_trial_ends_at_once() -> None:
    target = Fake(ANSWER)
    replies = offered(target, [-10.0, 3600.0], give_up=1.0)
    assert [reply.number for reply in replies] == [0]
    assert len(target.asked) == 1


def trial(rate: float, *, held: bool, half_held: bool = True) -> Trial:
    return Trial(rate_per_s=rate, p50_ms=1, p95_ms=1, p99_ms=1, completed_per_s=rate, held=held, half_held=half_held)


def test_a_search_rises_until_a_rate_breaks_twice_and_then_halves() -> None:
    search = Search(capacity=100)
    rates = []
    while not search.done:
        rates.append(search.next_rate())
        search.add(trial(rates[-1], held=rates[-1] < 80))
    assert rates[:5] == pytest.approx([50, 70, 98, 98, 84])
    assert search.held < 80 <= search.broke < 1.05 * search.held


def test_a_rate_that_breaks_once_may_still_hold() -> None:
    search = Search(capacity=100)
    search.add(trial(50, held=False))
    assert search.next_rate() == 50
    search.add(trial(50, held=True))
    assert (search.held, search.broke) == (50, float("inf"))
    assert search.next_rate() == pytest.approx(70)


def test_a_rate_at_which_half_the_requests_are_late_is_not_tried_again() -> None:
    search = Search(capacity=100)
    search.add(trial(50, held=False, half_held=False))
    assert search.next_rate() == 25


def test_a_trial_tells_what_became_of_its_requests(nano: Embedder, traffic: Traffic) -> None:
    pairs = traffic.workload.pairs
    embeddings_QD = encode_queries(nano, pairs, reasoning="always").embeddings_QD
    assert traffic.judge is not None
    hits = traffic.judge.hits(embeddings_QD)
    answers = [
        Answer(embeddings_QD[0], True, 0.8, None),
        Answer(embeddings_QD[1], False, 0.9, "load"),
        Answer(embeddings_QD[2], False, None, "deadline"),
    ]
    replies = [Reply(number, number, 0.01 * (number + 1), answer) for number, answer in enumerate(answers)]
    replies += [Reply(3, 3.0, 0.5, None, refused=True), Reply(4, 3.5, 0.5, None)]
    found = traffic.summary(1.0, [0, 1, 2, 3, 4], replies, count=5, target_ms=1000)
    assert not found.held  # two were not answered
    assert (found.p50_ms, found.completed_per_s) == pytest.approx((20, 3 / 4))
    assert found.reasoned == found.degraded_by_load == found.degraded_by_deadline == pytest.approx(1 / 3)
    assert (found.refused, found.late) == pytest.approx((0.2, 0.2))
    assert found.threshold == pytest.approx(0.85)
    assert found.hit_at_1 == pytest.approx(hits[:3].mean())
    assert traffic.summary(1.0, [0, 1, 2], replies[:3], count=3, target_ms=1000).held
    assert not traffic.summary(1.0, [0, 1, 2], replies[:3], count=3, target_ms=15).held


def test_trials_of_one_seed_draw_the_same_requests(traffic: Traffic) -> None:
    (slow, slow_due), (fast, fast_due) = (traffic.draw([(rate, 100 / rate)]) for rate in (10, 20))
    assert slow == fast
    assert slow_due == pytest.approx([2 * due for due in fast_due])
    _, due = traffic.draw([(10, 10), (100, 10)])
    assert sum(each < 10 for each in due) == pytest.approx(100, abs=20)
    assert due == sorted(due)


@pytest.mark.parametrize("kind", ["static", "two-route", "server"])
def test_a_target_answers_what_encode_gives(nano: Embedder, traffic: Traffic, kind: str, serve: Any) -> None:
    pairs = traffic.workload.pairs
    expected = encode_queries(nano, pairs, reasoning="auto")

    async def ask(target: StaticBatches | TwoRoutes | Server) -> list[Reply]:
        async with opened({"target": target}):
            asks = traffic.asks(mode_options(None, None)["auto"])
            return await offer(target, asks, [0.0] * len(asks))

    if kind == "server":
        with serve() as served:
            replies = asyncio.run(ask(Server(f"http://127.0.0.1:{served.port}/")))
    else:
        replies = asyncio.run(ask({"static": StaticBatches, "two-route": TwoRoutes}[kind](nano, 8)))
    assert sorted(reply.number for reply in replies) == list(range(len(pairs)))
    for reply in replies:
        assert reply.answer is not None
        assert float(reply.answer.embedding_D @ expected.embeddings_QD[reply.number]) > 0.999
        assert reply.answer.reasoned == (expected.details[reply.number].route is Route.REASON)
        assert reply.answer.threshold == pytest.approx(expected.details[reply.number].threshold)


def test_a_server_says_that_it_refuses_or_is_late(traffic: Traffic, serve: Any) -> None:
    del traffic

    async def ask(port: int, given: Ask) -> Answer:
        async with Server(f"http://127.0.0.1:{port}") as server:
            return await server.ask(given)

    with serve(max_waiting_rows=8) as served:
        with pytest.raises(BackendError, match="400"):
            asyncio.run(ask(served.port, Ask(inputs=["one"], options={"threshold": 7.0})))
        served.service._draining = True  # whoever asks now is refused
        with pytest.raises(OverloadError):
            asyncio.run(ask(served.port, ASK))
    with pytest.raises(OptionError, match="does not answer"):
        asyncio.run(ask(served.port, ASK))


class Plain(BaseHTTPRequestHandler):
    """Another's server, which knows neither base64 nor routes."""

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "plain"}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer({"data": [{"embedding": [0.6, 0.8]}]})

    def _answer(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Be quiet."""


def test_a_server_of_another_kind_only_embeds() -> None:
    async def ask(given: Ask) -> Answer:
        async with Server(f"http://127.0.0.1:{server.server_port}") as target:
            return await target.ask(given)

    with HTTPServer(("127.0.0.1", 0), Plain) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            answer = asyncio.run(ask(Ask(inputs=["one"], options={"reasoning": "never"})))
            assert answer.embedding_D == pytest.approx([0.6, 0.8])
            assert not answer.reasoned
            with pytest.raises(BackendError, match="measure it with --mode never"):
                asyncio.run(ask(Ask(inputs=["one"], options={})))
        finally:
            server.shutdown()


def test_a_body_has_the_wishes_that_were_made() -> None:
    picture = np.zeros((4, 4), np.uint8)
    given = Ask(
        inputs=[{"text": "what", "images": [picture, picture]}],
        options={"reasoning": "auto", "threshold": None, "instruction": "Find it."},
        deadline=0.25,
        on_overload="direct",
    )
    body = openai_body(given, "nano")
    parts = body.pop("messages")[0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "image_url", "text"]
    assert body == {
        "model": "nano",
        "encoding_format": "base64",
        "on_overload": "direct",
        "reasoning": "auto",
        "instruction": "Find it.",
        "deadline_ms": 250.0,
    }
    assert openai_body(ASK, "nano")["input"] == "one"
    with pytest.raises(OptionError, match="no videos"):
        openai_body(Ask(inputs=[{"video": [picture, picture]}], options={}), "nano")


def test_load_reports_each_mode_of_each_target(
    nano: Embedder, traffic: Traffic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loads, "PRECISION", 1e6)  # so that a trial has the fewest requests
    answers = [Answer(np.ones(nano.dim, np.float32), each, 0.8, None) for each in (True, False)]
    targets = {"one": Fake(*answers), "another": Fake(*answers)}
    found = asyncio.run(
        measure_load(
            targets,
            nano,
            traffic,
            mode_options(None, 1),
            target_ms=5000,
            seconds=1e-3,
            trials=1,
            batch_size=8,
            report=silent,
        )
    )
    assert found == LoadResult.model_validate_json(found.model_dump_json())
    assert (found.target, set(found.modes), list(found.beside)) == ("one", set(MODES), ["another"])
    for mode in found.modes.values():
        (first,) = mode.trials
        assert first.held
        assert first.reasoned == pytest.approx(0.5, abs=0.02)
        assert mode.sustainable_per_s == first.rate_per_s
    assert set(found.ratio) == {
        "never over always",
        "auto over always",
        *(f"{mode} over {mode} of another" for mode in MODES),
    }
    assert {ask.on_overload for ask in targets["one"].asked} == {"wait"}  # load takes no quality away


def test_a_trial_whose_requests_are_refused_does_not_hold(traffic: Traffic) -> None:
    target = Fake(OverloadError("full", reason="rows", retry_after=1.0))
    asks = traffic.asks({})
    found = asyncio.run(run_trial(target, traffic, asks, rate=1e5, seconds=1e-3, target_ms=1000))
    assert (found.held, found.refused, found.reasoned, found.hit_at_1) == (False, 1.0, None, None)


def test_recovery_is_when_the_first_second_within_the_target_begins() -> None:
    late = {21, 22, 38}  # in the seconds from 2.0 and from 3.0
    replies = [Reply(number, 0.1 * number, 0.5 if number in late else 0.01, ANSWER) for number in range(60)]
    assert recovery_s(replies, 2.0, 100) == 2.0
    assert recovery_s(replies, 4.0, 100) == 0.0
    assert recovery_s([*replies, Reply(60, 6.0, 0.5, ANSWER)], 6.0, 100) is None


def test_a_second_of_refusals_is_no_recovery() -> None:
    replies = [Reply(0, 0.1, 0.0, None), Reply(1, 1.1, 0.01, ANSWER)]
    assert recovery_s(replies, 0.0, 100) == 1.0


def test_a_level_stands_between_other_choices_for_the_same_requests(nano: Embedder, traffic: Traffic) -> None:
    routes = measure_routes(nano, traffic.workload.pairs, judge=traffic.judge)

    async def measure() -> Any:
        async with TwoRoutes(nano, 8) as target:
            return await measure_levels(
                target,
                traffic,
                routes,
                {"reasoning": "always"},
                threshold=0.8,
                sustained=100.0,
                levels=(0.5, 1.0),
                seconds=0.5,
                target_ms=1e6,
            )

    levels, recovery = asyncio.run(measure())
    assert recovery == 0.0
    assert [level.load for level in levels] == [0.5, 1.0]
    for level in levels:  # all reasoned, so that nobody could choose
        assert level.trial.reasoned == 1.0
        assert level.trial.hit_at_1 == level.always == level.random == level.oracle
        assert level.never <= level.auto


def test_overload_is_measured_whole(nano: Embedder, traffic: Traffic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loads, "PRECISION", 1e6)
    monkeypatch.setattr(overloads, "ROUNDS", 1)
    arguments: dict[str, Any] = {"trials": 1, "batch_size": 8, "patience_ms": None, "report": silent}
    options = mode_options(None, 2)
    found = asyncio.run(measure_overload(nano, traffic, options, target_ms=1e5, seconds=0.1, **arguments))
    assert found == OverloadResult.model_validate_json(found.model_dump_json())
    assert set(found.sustained_per_s) == {"auto", "always"}
    assert [level.load for level in found.levels] == list(overloads.LEVELS)
    for row in found.deadlines:
        assert row.reasoned + row.direct + row.refused + row.late + row.unsaid == pytest.approx(1)
    assert found.mixed.ratio == pytest.approx(found.mixed.p95_ms / found.mixed.alone_p95_ms)
    with pytest.raises(OptionError, match="p95 is never below"):
        asyncio.run(measure_overload(nano, traffic, options, target_ms=1e-6, seconds=0.1, **arguments))


def test_the_command_measures_what_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loads, "PRECISION", 1e6)
    app = typer.Typer()
    commands.register(app)
    shared = ["--queries", "6", "--threads", "1", "--trials", "1", "--p95-ms", "100000", "--seconds", "0.1"]
    words = ["bench", "load", *shared, "--mode", "never", "--loop", "static", "--burst", "4", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exception is None, done.output
    result = LoadResult.model_validate_json(done.output.splitlines()[-1].partition('"result":')[2][:-1])
    assert (result.target, result.burst, set(result.modes), result.ratio) == ("static", 4, {"never"}, {})
    assert "loop 'statc' is not known" in str(CliRunner().invoke(app, ["bench", "load", "--loop", "statc"]).exception)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--peer", "infinty"], "peer 'infinty' is not known"),
        (["--peer", "infinity"], "mode is ['never', 'auto', 'always']: peers embed and do not reason"),
        (["--peer", "all", "--mode", "never"], "pass --checkpoint"),
    ],
)
def test_peers_are_asked_for_what_they_can_do(words: list[str], reason: str) -> None:
    app = typer.Typer()
    commands.register(app)
    assert reason in str(CliRunner().invoke(app, ["bench", "load", *words]).exception)
