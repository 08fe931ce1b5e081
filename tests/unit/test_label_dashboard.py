"""What the lead sees, against stores that are small enough to count by hand."""

import json

import pytest
import sqlalchemy as sa

from labeling_ui import attention, lead_charts, lead_figures, lead_tables
from labeling_ui.agreement import Agreement, PositionBias
from labeling_ui.counting import Counts, Person, Queue
from labeling_ui.counting import count as count_store
from labeling_ui.dashboard import Dashboard, Overview, Statistics
from labeling_ui.forms import Refused
from labeling_ui.inspection import audit, event_kinds, prompt, prompts
from labeling_ui.judgements import Estimate
from labeling_ui.pace import Pace, Times
from labeling_ui.progress import progress
from labeling_ui.quality import AnnotatorQuality
from labeling_ui.schema import assignments, queues, rankings, tasks, users
from labeling_ui.store import Store, insert_new, log_event, task_row
from pipeline.records import canonical_json

NOW = 1_000_000_000.0
HOSTILE = "<script>alert(1)</script>${alert(2)}{{alert(3)}}\\x`\u202e"
LENGTHS = ["a", "bbb", "cc"]
"""Responses; stored in another order, by their ids."""


class Book:
    """A store that is written by hand."""

    def __init__(self, folder):
        self.store = Store(folder / "labels.db")
        self.tasks, self.users, self.revisions = {}, {}, {}

    def queue(self, step="rank", overlap=2, **more):
        row = {"step": step, "by": "people", "overlap": overlap, "lease_minutes": 30, "open": True}
        with self.store.write() as tx:
            insert_new(tx, queues, [{**row, **more}])

    def set_queue(self, **values):
        with self.store.write() as tx:
            tx.execute(sa.update(queues).values(**values))

    def task(self, name, step="rank", **more):
        row = task_row([{"role": "user", "content": name}], LENGTHS, round=1, origin="t",
                       step=step, **more)  # fmt: skip
        if more.get("kind") in ("gold", "repeat"):
            row["id"] = f"{more['kind']} {name}"
        with self.store.write() as tx:
            insert_new(tx, tasks, [row])
        self.tasks[name] = row["id"]
        return row["id"]

    def user(self, name, kind="person", **more):
        with self.store.write() as tx:
            insert_new(tx, users, [{"kind": kind, "name": name, "created": NOW, **more}])
            query = sa.select(users.c.id).where(users.c.name == name)
            self.users[name] = tx.execute(query).scalar_one()

    def lease(self, user, task, since, expires):
        self._assignment(user, self.tasks[task], "leased", since, expires, [0, 1, 2])

    def say(
        self, user, task, ranks=None, at=NOW, shown=(0, 1, 2), seconds=10.0, fills=True, **more
    ):
        """An answer; ranks by stored place. The second of one user to one task supersedes."""
        if user not in self.users:
            self.user(user)
        task_id = self.tasks[task]
        own = self._assignment(user, task_id, "ranked", at - 60, at, shown)
        row = {
            "id": f"{own} {len(self.revisions)}", "assignment_id": own, "task_id": task_id,
            "user_id": self.users[user], "status": "ranked" if ranks else "skipped",
            "ranks": canonical_json(list(ranks)) if ranks else None, "source": "app",
            "created": at, "active_seconds": seconds, "revision": 1,
        }  # fmt: skip
        with self.store.write() as tx:
            if own in self.revisions:
                before, number = self.revisions[own]
                row["revision"] = number + 1
                old = sa.update(rankings).where(rankings.c.id == before)
                tx.execute(old.values(superseded_by=row["id"]))
            elif fills:
                place = sa.update(tasks).where(tasks.c.id == task_id)
                tx.execute(place.values(filled=tasks.c.filled + 1))
            tx.execute(sa.insert(rankings).values(**{**row, **more}))
        self.revisions[own] = row["id"], row["revision"]

    def _assignment(self, user, task_id, state, leased, expires, shown):
        own = f"{user} {task_id}"
        row = {
            "id": own, "task_id": task_id, "user_id": self.users[user], "token": own,
            "display_order": canonical_json(list(shown)), "state": state, "leased": leased,
            "expires": expires,
        }  # fmt: skip
        with self.store.write() as tx:
            insert_new(tx, assignments, [row])
        return own

    def counts(self, now=NOW):
        with self.store.read() as tx:
            return count_store(tx, now)


@pytest.fixture
def book(tmp_path):
    return Book(tmp_path)


# ---- counted by the database ---------------------------------------------------------------


def test_coverage_counts_places_up_to_the_overlap(book):
    book.queue(overlap=2)
    book.queue("extra", overlap=1, frozen=True)
    for name in "abcd":
        book.task(name)
    book.task("old", active=False)
    book.task("gold", step=None, kind="gold", gold="[1,2,3]")
    for user in ("ann", "bob", "cid"):
        book.say(user, "a", [1, 2, 3])  # three answers on two places
    book.say("ann", "b", [1, 2, 3])
    book.lease("ann", "c", NOW - 60, NOW + 60)
    book.lease("bob", "d", NOW - 60, NOW)  # ended now
    book.say("bob", "old", [1, 2, 3])
    extra, rank = book.counts().queues
    assert (extra.step, extra.tasks, extra.wanted, extra.frozen) == ("extra", 0, 0, True)
    assert (rank.tasks, rank.finished, rank.filled, rank.wanted, rank.begun) == (4, 1, 3, 8, 2)
    (lease,) = book.counts().leases
    assert (lease.name, lease.task, lease.since) == ("ann", book.tasks["c"], NOW - 60)


def test_simulated_answers_are_counted_though_they_fill_no_places(book):
    book.queue(overlap=2, by="simulated")
    for name in "abc":
        book.task(name)
    for user in ("sim-1", "sim-2", "sim-3"):
        book.user(user, kind="simulated")
        book.say(user, "a", [1, 2, 3], fills=False)
    book.say("sim-1", "b", [1, 2, 3], fills=False)
    (rank,) = book.counts().queues
    assert (rank.filled, rank.finished, rank.begun, rank.wanted) == (3, 1, 1, 6)


def test_every_answer_stands_under_one_use(book):
    book.queue()
    for name in "abcdefg":
        book.task(name)
    book.task("gold", step=None, kind="gold", gold="[1,2,3]")
    book.task("again", step=None, kind="repeat", repeat_of=book.tasks["a"])
    book.task("old", active=False)
    book.say("ann", "a", [1, 2, 3])
    book.say("ann", "a", [3, 2, 1])
    book.say("ann", "b", reason="unclear")
    book.say("ann", "c", status="all_bad")
    book.say("ann", "d", [1, 2, 3], late=True)
    book.say("ann", "e", status="written")
    book.say("ann", "gold", [1, 2, 3])
    book.say("ann", "again", [1, 2, 3])
    book.say("ann", "old", [1, 2, 3])
    book.say("ann", "f", [1, 1, 1])
    counts = book.counts()
    assert (counts.prompts, counts.gold_items) == (8, 1)
    assert (counts.rankings, counts.written) == (2, 1)
    reasons = ("superseded", "gold", "repeat", "skipped: unclear", "all_bad", "late", "out of use")
    assert counts.left_out == dict.fromkeys(reasons, 1)
    (ann,) = counts.people
    assert (ann.rankings, ann.written, ann.skipped, ann.all_bad) == (2, 1, 1, 1)
    assert ann.skip_rate == pytest.approx(1 / 3)
    told = lead_tables.left_out(Dashboard(book.store).overview(NOW))
    assert ["skipped: The prompt makes no sense", "1"] in told
    assert told[-1] == ["all that is stored", "10"]


def test_what_the_line_waits_for_is_what_the_page_shows(book):
    book.queue(overlap=2)
    for name in "abc":
        book.task(name)
    book.task("of another queue", step="extra")
    for user in ("ann", "bob", "cid"):
        book.say(user, "a", [1, 2, 3])  # one more than is wanted
    book.say("ann", "b", status="all_bad")
    book.say("bob", "b", reason="unclear")
    book.say("ann", "c", [1, 2, 3])
    with book.store.write() as tx:
        on_b = assignments.c.task_id == book.tasks["b"]
        tx.execute(sa.update(assignments).where(on_b).values(state="unrankable"))
    # a gives two, b can give none, c one of two
    (queue,) = book.counts().queues
    assert (queue.filled, queue.wanted, queue.unrankable) == (5, 6, 2)
    assert progress(book.store, "rank") == (queue.rankings, queue.needed) == (3, 4)
    book.set_queue(minimum=3)
    assert progress(book.store, "rank") == (3, 3)
    # with a smaller overlap one more answer is beyond it: never more than all
    book.set_queue(minimum=None, overlap=1)
    (queue,) = book.counts().queues
    assert (queue.filled, queue.wanted, queue.unrankable) == (3, 3, 1)
    assert progress(book.store, "rank") == (2, 2)
    assert progress(book.store, "no such step") == (0, 0)


def test_pace_counts_first_answers_by_the_hour_without_gaps(book):
    book.queue()
    for name in "abcd":
        book.task(name)
    hour = NOW - NOW % 3600
    book.say("ann", "a", [1, 2, 3], at=hour - 7200)
    book.say("ann", "a", [3, 2, 1], at=hour - 3000)  # a change of mind is no new label
    book.say("ann", "b", [1, 2, 3], at=hour - 3601)
    book.say("ann", "c", reason="unclear", at=hour + 1)
    book.say("ann", "d", [1, 2, 3], at=hour + 2, source="import:groups")
    pace = book.counts(hour + 10).pace
    assert pace == Pace(3600, (hour - 7200, hour - 3600, hour), (2, 0, 1))
    # three days later it is by the day; the first answer was given before midnight
    late = book.counts(hour + 3 * 86400).pace
    assert (late.bucket_seconds, sum(late.labels), len(late.labels)) == (86400, 3, 5)
    assert Book.counts(book, hour + 100 * 86400).pace.labels == (0,)


def test_time_is_what_people_took_for_their_first_answer(book):
    book.queue()
    for i in range(10):
        book.task(str(i))
        book.say("ann", str(i), [1, 2, 3], seconds=10.0 * (i + 1))
    book.say("ann", "0", [3, 2, 1], seconds=1000.0)
    book.say("bob", "1", reason="unclear", seconds=1.0)
    times = book.counts().times
    # 10, 20, .. 100: percentiles between neighbours
    assert times.active == pytest.approx((19.0, 32.5, 55.0, 77.5, 91.0))
    assert times.wall == (60.0,) * 5
    assert (times.active_count, sum(times.histogram)) == (10, 10)


def test_an_empty_store_has_numbers_too(book):
    found = Dashboard(book.store).overview().to_json()
    assert found["counts"]["left_out"] == {}
    assert found["statistics"]["agreement"]["pairwise"] is None
    json.dumps(found, allow_nan=False)
    shown = Dashboard(book.store).overview()
    assert "No queue" in lead_charts.coverage(shown.counts.queues)
    assert attention.hints(shown) == []
    assert lead_figures.tiles(shown)[0] == ("Rankings in", "0", "no open queue")
    for picture in (lead_figures.agreement, lead_figures.biases):
        assert "nothing to measure" in picture(shown.statistics)


# ---- statistics ----------------------------------------------------------------------------


def two_who_differ(book):
    """ann and bob on two prompts: alike on the first, one of three pairs on the second."""
    book.queue()
    for name in "ab":
        book.task(name)
    book.say("ann", "a", [1, 2, 3], shown=(0, 1, 2))
    book.say("bob", "a", [1, 2, 3], shown=(2, 1, 0))
    book.say("ann", "b", [1, 2, 3], shown=(0, 1, 2))
    book.say("bob", "b", [3, 1, 2], shown=(0, 1, 2))


def test_agreement_is_over_pairs_of_people_and_counts_the_last_word(book):
    two_who_differ(book)
    found = Dashboard(book.store).overview().statistics
    assert found.agreement.pairwise.value == pytest.approx(4 / 6)
    # shown order: earlier wins 3, 0, 3 and 1 of 3 pairs
    assert found.position.earlier_wins.value == pytest.approx(7 / 12)
    book.say("bob", "b", [1, 2, 3])
    again = Dashboard(book.store).overview().statistics
    assert again.agreement.pairwise.value == 1.0


def test_what_does_not_count_is_not_judged_by(book):
    two_who_differ(book)
    before = Dashboard(book.store).overview().statistics
    book.task("late")
    book.task("old", active=False)
    book.task("write", kind="write")
    for user, ranks in (("ann", [1, 2, 3]), ("bob", [3, 2, 1])):
        book.say(user, "late", ranks, late=True)
        book.say(user, "old", ranks)
        book.say(user, "write", status="written")
    after = Dashboard(book.store).overview().statistics
    assert (after.agreement, after.position) == (before.agreement, before.position)
    assert {own.skips for own in after.people.values()} == {0}


def test_gold_tells_accuracy_and_repeats_consistency_and_neither_agreement(book):
    two_who_differ(book)
    book.task("gold", step=None, kind="gold", gold="[1,2,3]")
    book.task("again", step=None, kind="repeat", repeat_of=book.tasks["a"], for_user=1)
    before = Dashboard(book.store).overview().statistics.agreement
    book.say("ann", "gold", [1, 3, 2])
    book.say("bob", "gold", [3, 2, 1])
    book.say("ann", "again", [2, 1, 3])
    found = Dashboard(book.store).overview().statistics
    ann, bob = (found.people[book.users[name]] for name in ("ann", "bob"))
    assert ann.gold_accuracy.value == pytest.approx(2 / 3)
    assert bob.gold_accuracy.value == 0.0
    assert ann.self_consistency.value == pytest.approx(2 / 3)
    assert (found.agreement, ann.rankings) == (before, 3)
    # a mistake in the known answer, corrected, corrects what was measured by it
    with book.store.write() as tx:
        tx.execute(sa.update(tasks).where(tasks.c.kind == "gold").values(gold="[1,3,2]"))
    again = Dashboard(book.store).overview().statistics
    assert again.people[book.users["ann"]].gold_accuracy.value == 1.0


def test_the_longer_response_is_told_by_its_stored_text(book):
    book.queue(overlap=1)
    task = book.task("a")
    with book.store.read() as tx:
        query = sa.select(tasks.c.responses).where(tasks.c.id == task)
        texts = json.loads(tx.execute(query).scalar_one())
    # the longest is best, the shortest second: two of three pairs go to the longer one
    rank = {"bbb": 1, "a": 2, "cc": 3}
    book.say("ann", "a", [rank[text] for text in texts])
    found = Dashboard(book.store).overview().statistics
    assert found.longer_wins.value == pytest.approx(2 / 3)


def test_an_imported_order_was_shown_to_nobody_we_know(book):
    book.queue()
    book.task("a")
    book.user("voice", kind="imported")
    book.say("voice", "a", [1, 2, 3])
    found = Dashboard(book.store).overview().statistics
    assert found.position.earlier_wins is None
    assert found.people[book.users["voice"]].rankings == 1


def test_statistics_are_kept_for_a_while_and_counts_are_not(book):
    two_who_differ(book)
    board = Dashboard(book.store)
    first = board.overview(NOW)
    book.say("cid", "a", [3, 2, 1])
    second = board.overview(NOW + 1)
    assert second.counts.rankings == first.counts.rankings + 1
    assert second.statistics is first.statistics
    assert second.statistics.at == NOW
    board._until = 0.0
    assert len(board.overview(NOW + 2).statistics.people) == 3


# ---- hints ---------------------------------------------------------------------------------


def est(value, low, high, prompts=50):
    return Estimate(value, low, high, 100, prompts)


def own(name, **more):
    usual = {
        "rankings": 100, "skips": 0, "gold_accuracy": est(0.9, 0.8, 0.95),
        "agreement": est(0.7, 0.65, 0.75), "self_consistency": est(0.9, 0.8, 0.95),
        "tie_rate": 0.1, "median_seconds": 60.0, "first_place_wins": est(0.3, 0.25, 0.35),
        "first_place_chance": 0.3,
    }  # fmt: skip
    return AnnotatorQuality(annotator=name, **{**usual, **more})


def seen(people, pairwise=None, earlier=None, longer=None, queue=None):
    pairwise = pairwise or est(0.7, 0.66, 0.74)
    counts = Counts(
        queues=(queue,) if queue else (),
        pace=Pace(3600, (NOW,), (0,)),
        times=Times((), (), 0, (0,) * 20, 1.0),
        people=tuple(Person(i, f"p{i}", "person", "annotator", True, NOW) for i in people),
        leases=(), prompts=0, gold_items=0, warned=0, rankings=0, written=0, left_out={},
    )  # fmt: skip
    agreement = Agreement(pairwise, None, None, 10, 2, 0)
    position = PositionBias(earlier, ())
    return Overview(NOW, counts, Statistics(NOW, agreement, position, longer, people))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"gold_accuracy": est(0.5, 0.4, 0.6)}, "known pairs"),
        ({"agreement": est(0.5, 0.45, 0.55)}, "agrees with the others"),
        ({"self_consistency": est(0.5, 0.4, 0.6)}, "repeats only"),
        ({"first_place_wins": est(0.6, 0.5, 0.7)}, "prefers what is shown first"),
        ({"first_place_wins": est(0.1, 0.05, 0.2)}, "avoids what is shown first"),
        ({"median_seconds": 15.0}, "takes 15 s"),
        ({"tie_rate": 0.8}, "80% of all pairs equal"),
        ({"skips": 60}, "skips 38%"),
    ],
)
def test_who_stands_out_is_told_with_the_reason(more, words):
    found = attention.hints(seen({1: own("1"), 2: own("2"), 3: own("3", **more)}))
    assert [hint.about for hint in found] == ["p3"]
    assert words in found[0].text


def test_little_or_wide_evidence_says_nothing_of_anybody():
    few = own("3", rankings=19, agreement=est(0.2, 0.1, 0.3), median_seconds=1.0, tie_rate=0.9,
              gold_accuracy=est(0.2, 0.1, 0.3, prompts=4), self_consistency=None)  # fmt: skip
    wide = own("2", gold_accuracy=est(0.5, 0.2, 0.9), agreement=est(0.5, 0.3, 0.7),
               first_place_wins=est(0.4, 0.2, 0.6))  # fmt: skip
    assert attention.hints(seen({1: own("1"), 2: wide, 3: few})) == []


def test_what_concerns_everybody_comes_first():
    queue = Queue("rank", "people", True, True, 2, None, 30, 0.1, 0.0, 10, 1, 2, 20, 5, 0)
    found = seen(
        {1: own("1", tie_rate=0.9)}, est(0.55, 0.5, 0.6), est(0.6, 0.55, 0.65), est(0.7, 0.67, 0.73), queue
    )  # fmt: skip
    told = [hint.text for hint in attention.hints(found)]
    for words, text in zip(
        ("agree on 55%", "place decides", "longer response wins", "no known answer", "15 rankings"),
        told, strict=False,
    ):  # fmt: skip
        assert words in text
    assert len(told) == 6
    calm = seen({1: own("1")}, earlier=est(0.51, 0.505, 0.515), longer=est(0.6, 0.55, 0.64))
    assert attention.hints(calm) == []


# ---- looking up ----------------------------------------------------------------------------


def test_prompts_are_found_by_what_was_said_of_them(book):
    book.queue()
    for name in ("alike", "apart", 'with "quotes" é', "bad"):
        book.task(name)
    book.task("gold", step=None, kind="gold", gold="[1,2,3]")
    book.say("ann", "alike", [1, 2, 3], comment="hm")
    book.say("bob", "alike", [1, 2, 3])
    marks = '[{"flags":["unsafe"],"score":null},{"flags":[],"score":3},{"flags":[],"score":null}]'
    book.say("ann", "apart", [1, 2, 2], marks=marks)
    book.say("bob", "apart", [3, 2, 1], marks=marks)
    plain = '[{"flags":[],"score":2},{"flags":[],"score":3},{"flags":[],"score":null}]'
    book.say("ann", 'with "quotes" é', [1, 2, 3], marks=plain)
    book.say("ann", "bad", reason="harmful")

    def titles(view, search=""):
        return [line.title for line in prompts(book.store, view, search)]

    assert titles("disagreement") == ["apart"]
    assert titles("flagged") == ["apart"]
    assert titles("commented") == ["alike"]
    assert titles("unrankable") == ["bad"]
    assert titles("gold") == ["gold"]
    assert titles("warned") == []
    assert len(titles("all")) == 5
    assert titles("all", '"quotes" é') == ['with "quotes" é']
    assert titles("all", book.tasks["bad"][:12]) == ["bad"]
    assert titles("all", "%") == []
    with pytest.raises(Refused):
        prompts(book.store, "nonsense")
    (line,) = prompts(book.store, "disagreement")
    # bob contradicts both pairs on which ann has an opinion
    assert (line.disagreement, line.flags, line.rankings) == (1.0, (("unsafe", 2),), 2)


def test_one_prompt_shows_the_last_word_of_everybody(book):
    book.queue()
    book.task("a")
    book.say("ann", "a", [1, 2, 3])
    book.say("ann", "a", [2, 1, 1], comment=HOSTILE, at=NOW + 5)
    book.say("bob", "a", reason="unclear", at=NOW + 9)
    found = prompt(book.store, book.tasks["a"])
    assert [(one.name, one.ranks, one.revision) for one in found.said] == [
        ("ann", (2, 1, 1), 2), ("bob", (), 1),
    ]  # fmt: skip
    ann, bob = lead_tables.said(found)
    assert ann[1:3] == ["ranked, changed 1×", "2 1 1"]
    assert "⟨U+202E⟩" in ann[5]
    assert bob[1:3] == ["skipped (unclear)", lead_tables.NOTHING]
    with pytest.raises(Refused):
        prompt(book.store, "x")


def test_the_log_is_read_backwards_and_by_kind_and_person(book):
    book.user("ann")
    with book.store.write() as tx:
        log_event(tx, "claim", book.users["ann"], "t1")
        log_event(tx, "queue", None, None, step="rank")
        log_event(tx, "claim", 99, "t2")
    assert [row[1:4] for row in audit(book.store)] == [
        ("user 99 (forgotten)", "claim", "t2"), ("the line", "queue", ""), ("ann", "claim", "t1"),
    ]  # fmt: skip
    assert [row[3] for row in audit(book.store, "claim", book.users["ann"])] == ["t1"]
    assert len(audit(book.store, most=2)) == 2
    assert event_kinds(book.store) == ["claim", "queue"]


# ---- drawing -------------------------------------------------------------------------------


def test_no_name_can_be_anything_but_text_in_a_picture():
    rows = [lead_charts.Row(HOSTILE, est(0.5, 0.4, 0.6), HOSTILE)]
    drawn = lead_charts.intervals(HOSTILE, rows, note=HOSTILE)
    queue = Queue(HOSTILE, "people", True, False, 2, None, 30, 0.1, 0.0, 10, 1, 2, 20, 5, 0)
    drawn += lead_charts.coverage([queue]) + lead_charts.tiles([(HOSTILE, HOSTILE, HOSTILE)])
    for mark in ("<script", "${", "{{", "`", "\\", "\u202e"):
        assert mark not in drawn
    assert "&#60;script&#62;" in drawn


def test_a_dot_stands_where_its_value_is_and_a_bar_is_as_high_as_its_count():
    drawn = lead_charts.intervals("t", [lead_charts.Row("r", est(0.5, 0.25, 0.75), "pairs")])
    # 2 % are left free on each side
    assert 'cx="50.00%"' in drawn
    assert 'x1="26.00%" x2="74.00%"' in drawn
    assert "0.50 (0.25 to 0.75), 100 pairs" in drawn.replace("&#40;", "(").replace("&#41;", ")")
    bars = lead_charts.pace_chart(Pace(3600, (0.0, 3600.0), (4, 2)))
    assert 'height="118.0"' in bars
    assert 'height="59.0"' in bars
    # ten empty hours before: two bars as wide as the page would say nothing of the pace
    assert bars.count("<rect") == 12
    assert "31 Dec 14" in bars


def test_every_row_of_a_table_fits_its_headings(book):
    two_who_differ(book)
    book.lease("ann", "a", NOW, NOW + 60)
    book.user("lea", role="lead")
    found = Dashboard(book.store).overview(NOW)
    one = prompt(book.store, book.tasks["a"])
    for headings, rows in (
        (lead_tables.HINTS, lead_tables.hints([attention.Hint("all", "x")])),
        (lead_tables.LEFT_OUT, lead_tables.left_out(found)),
        (lead_tables.QUEUES, lead_tables.queues(found.counts.queues)),
        (lead_tables.ANNOTATORS, lead_tables.annotators(found)),
        (lead_tables.PROMPTS, lead_tables.prompts(prompts(book.store, "all"))),
        (lead_tables.SAID, lead_tables.said(one)),
        (lead_tables.ANNOTATORS, [lead_tables.ANNOTATOR_WIDTHS]),
        (lead_tables.SAID, [lead_tables.SAID_WIDTHS]),
    ):
        assert rows
        assert {len(row) for row in rows} == {len(headings)}
