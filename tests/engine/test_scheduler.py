"""Policy on random schedules: no page leaks or is held twice, nobody starves, every request ends as it would alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.engine.limits import SchedulerConfig
from jaxmoe.engine.scheduler import ScheduledSequence, StepPlan, StepScheduler
from jaxmoe.errors import RequestError


def next_token(tokens: list[int]) -> int:
    """What the make-believe model says after these tokens."""
    return (sum(tokens) * 31 + len(tokens)) % 97


class Device:
    """Pages as a real device has them: what is written where, so that a wrong page shows as a wrong token."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pages: dict[tuple[int, int], list[int | None]] = {}
        self.last: dict[tuple[int, int], int] = {}
        self.host: dict[tuple[int, int], list[int | None]] = {}

    def _write(self, sequence: ScheduledSequence, rank: int, pages: list[int], at: int, token: int) -> None:
        page, place = pages[at // self.config.page_size], at % self.config.page_size
        self.pages.setdefault((rank, page), [None] * self.config.page_size)[place] = token

    def _read(self, sequence: ScheduledSequence, count: int) -> list[int]:
        """The last of `count` tokens and what it sees before it; all of a sequence that gives nothing back."""
        size = self.config.page_size
        first = 0 if sequence.keeps_all else self.config.first_visible(count - 1)
        places = [(sequence.pages[at // size], at % size) for at in range(first, count)]
        found = [self.pages[(sequence.rank, page)][place] for page, place in places]
        assert None not in found
        return found

    def dispatch(self, plan: StepPlan):
        """The step's result, from pages alone: arguments are frozen at dispatch as real ones are."""
        for rank, page_copy in plan.page_copies:
            if page_copy.direction == "out":
                self.host[rank, page_copy.host_page] = list(self.pages[rank, page_copy.page])
            else:
                self.pages[rank, page_copy.page] = self.host.pop((rank, page_copy.host_page))
        assert len(self.host) <= self.config.num_host_pages * self.config.num_ranks
        sampled_tokens: dict[int, list[int]] = {id(sequence): [] for sequence, _ in plan.sampled()}
        for decode_step in range(plan.decode_steps):
            self._decode_step(plan, decode_step, sampled_tokens)
        return list(sampled_tokens.values())

    def _decode_step(self, plan: StepPlan, decode_step: int, sampled_tokens: dict[int, list[int]]) -> None:
        written = set()
        work = []
        for decode in plan.decodes:
            if decode_step < decode.count:
                last = self.last[(decode.sequence.rank, decode.sequence.slot)]
                work.append((decode.sequence, decode.start + decode_step, [last], True))
        for chunk in plan.chunks:
            part = chunk.sequence.tokens[chunk.start : chunk.start + chunk.count]
            work.append((chunk.sequence, chunk.start, part, chunk.last))
        for sequence, start, part, _ in work:
            for offset, token in enumerate(part):
                place = (sequence.rank, sequence.pages[(start + offset) // self.config.page_size], start + offset)
                assert place not in written, "two requests write one place"
                written.add(place)
                self._write(sequence, sequence.rank, sequence.pages, start + offset, token)
        for sequence, start, part, sampled in work:
            if sampled:
                token = next_token(self._read(sequence, start + len(part)))
                self.last[(sequence.rank, sequence.slot)] = token
                sampled_tokens[id(sequence)].append(token)


def alone(prompt: list[int], max_total: int, config: SchedulerConfig, *, keeps_all: bool) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < max_total:
        tokens.append(next_token(tokens[0 if keeps_all else config.first_visible(len(tokens) - 1) :]))
    return tokens


REQUEST = st.tuples(
    st.integers(0, 3),  # which beginning it shares
    st.integers(1, 30),  # prompt tokens
    st.integers(1, 12),  # new tokens
    st.integers(0, 2),  # priority
    st.integers(0, 6),  # steps until the next arrives
    st.integers(0, 9),  # cancelled after so many steps, if below 3
)


SCHEDULE = dict(
    requests=st.lists(REQUEST, min_size=1, max_size=25),
    ranks=st.integers(1, 3),
    rows=st.integers(1, 4),
    num_pages=st.integers(11, 30),
    blocks=st.integers(1, 3),
    ahead=st.integers(0, 2),
    decode_steps=st.integers(1, 3),
    host_pages=st.sampled_from([0, 1, 5, 40]),
    failing=st.sets(st.integers(0, 60), max_size=2),
    awaiting=st.sets(st.integers(0, 24), max_size=3),
)
MASKS = dict(
    window=st.sampled_from([0, 1, 2, 5, 7, 16]), attention_chunk=st.sampled_from([0, 0, 3, 8]),
    keeping=st.sets(st.integers(0, 24), max_size=3), num_pages=st.integers(3, 30),
)  # fmt: skip


def run_schedule(
    requests,
    ranks,
    rows,
    num_pages,
    blocks,
    ahead,
    decode_steps,
    host_pages,
    failing,
    awaiting,
    window=0,
    attention_chunk=0,
    keeping=(),
):
    """awaiting: which requests await their tokens. keeping: which give no pages back."""
    config = SchedulerConfig(
        num_ranks=ranks,
        max_num_seqs=rows,
        chunk_tokens=4 * blocks,
        block_tokens=4,
        num_pages=num_pages,
        page_size=4,
        context=44,
        decode_steps=decode_steps,
        num_host_pages=host_pages,
        aging_steps=8,
        window=window,
        attention_chunk=attention_chunk,
    )
    scheduler, device = StepScheduler(config), Device(config)
    sequences, failed, cancelled = [], set(), set()
    arrivals = []
    at = 0
    for index, (beginning, length, new, priority, gap, cancel) in enumerate(requests):
        prompt = ([beginning] * 13 + [index % 5] * 20)[:length]
        arrivals.append((at, prompt, length + new, priority, at + cancel if cancel < 3 else None))
        at += gap
    in_flight: list[tuple[StepPlan, list[list[int]]]] = []
    step, todo = 0, list(arrivals)
    while todo or any(not s.finished for s in sequences):
        while todo and todo[0][0] <= step:
            _, prompt, max_total, priority, _ = todo[0]
            sequence = ScheduledSequence(
                request_id=len(sequences), tokens=list(prompt), max_total=max_total, priority=priority,
                keeps_all=len(sequences) in keeping, awaits_tokens=len(sequences) in awaiting,
            )  # fmt: skip
            sequences.append(sequence)
            todo.pop(0)
            if config.max_pages(max_total, keeps_all=sequence.keeps_all) <= num_pages:
                scheduler.add(sequence)
                continue
            with pytest.raises(RequestError, match=f"{num_pages} pages"):
                scheduler.add(sequence)
            sequence.finished = True
            cancelled.add(sequence.request_id)
        for sequence in sequences:
            if arrivals[sequence.request_id][4] == step and not sequence.finished:
                scheduler.finish(sequence, discard=sequence.request_id % 2 == 0)
                cancelled.add(sequence.request_id)
        plan = scheduler.plan()
        assert len(plan.decodes) <= rows * ranks
        waited = [decode for decode in plan.decodes if decode.sequence.awaits_tokens]
        assert all(decode.count == 1 and len(decode.sequence.tokens) == decode.start + 1 for decode in waited)
        for rank in range(ranks):
            chunks = [chunk for chunk in plan.chunks if chunk.sequence.rank == rank]
            assert sum(-(-chunk.count // 4) for chunk in chunks) <= blocks
            slots = [s.slot for s in scheduler.running if s.rank == rank]
            assert len(set(slots)) == len(slots)
            assert all(0 <= slot < rows for slot in slots)
        if plan:
            in_flight.append((plan, device.dispatch(plan)))
        while in_flight and (len(in_flight) > ahead or not plan):
            done, tokens = in_flight.pop(0)
            if step in failing:
                failing = failing - {step}
                scheduler.fail(done, lambda s: failed.add(s.request_id))
                in_flight.clear()
                device = Device(config)
                break
            for sequence, _, _ in scheduler.complete(done, tokens):
                if len(sequence.tokens) >= sequence.max_total:
                    scheduler.finish(sequence)
        for pool in scheduler.pools:
            pool.check()
        for rank, pool in enumerate(scheduler.pools):
            assert pool.num_in_use == len({p for s in scheduler.running if s.rank == rank for p in s.pages} - {-1})
        for sequence in scheduler.running:
            most = config.max_pages(sequence.max_total, keeps_all=sequence.keeps_all)
            assert len(sequence.pages) - sequence.num_behind <= most + decode_steps
        step += 1
        assert step < 5000, "somebody starves"
    for pool in scheduler.pools:
        assert pool.num_in_use == 0
        assert pool.num_available == num_pages
    for sequence, (_, prompt, max_total, _, _) in zip(sequences, arrivals, strict=True):
        if sequence.request_id not in failed | cancelled:
            assert sequence.tokens == alone(prompt, max_total, config, keeps_all=sequence.keeps_all)


@settings(max_examples=300, deadline=None)
@given(**SCHEDULE)
def test_random_schedules(**schedule):
    run_schedule(**schedule)


@settings(max_examples=200, deadline=None)
@given(**(SCHEDULE | MASKS))
def test_random_schedules_behind_windows(**schedule):
    run_schedule(**schedule)


@pytest.mark.sweep
@settings(max_examples=10_000, deadline=None)
@given(**(SCHEDULE | MASKS))
def test_thousands_of_random_schedules_behind_windows(**schedule):
    run_schedule(**schedule)


@pytest.mark.sweep
@settings(max_examples=10_000, deadline=None)
@given(**SCHEDULE)
def test_thousands_of_random_schedules(**schedule):
    run_schedule(**schedule)


def test_what_lies_behind_every_window_is_given_back():
    config = config_of(window=9, num_pages=7, chunk_tokens=8, context=400)
    assert config.max_pages(400) == (8 + 8 + 2) // 4 + 1
    scheduler = StepScheduler(config)
    long = ScheduledSequence(request_id=0, tokens=list(range(60)), max_total=400)
    scheduler.add(long)
    while not long.finished:
        run(scheduler, 1)
        assert len(long.pages) - long.num_behind <= 5
    assert (len(long.tokens), scheduler.num_preemptions) == (400, 0)
    with pytest.raises(RequestError, match=r"is 400 tokens, the pool holds 28 \(7 pages of 4\)"):
        scheduler.add(ScheduledSequence(request_id=1, tokens=[1], max_total=400, keeps_all=True))


def config_of(**changes) -> SchedulerConfig:
    values = dict(num_ranks=1, max_num_seqs=4, chunk_tokens=16, block_tokens=8, num_pages=16, page_size=4, context=64)
    return SchedulerConfig(**(values | changes))


def run(scheduler: StepScheduler, steps: int) -> list[StepPlan]:
    plans = []
    for _ in range(steps):
        plan = scheduler.plan()
        for sequence, _, _ in scheduler.complete(plan, [[7] * count for _, count in plan.sampled()]):
            if len(sequence.tokens) >= sequence.max_total:
                scheduler.finish(sequence)
        plans.append(plan)
    return plans


def test_what_can_never_fit_is_refused_with_the_numbers():
    scheduler = StepScheduler(config_of(num_pages=4))
    with pytest.raises(RequestError, match=r"is 70 tokens, the context holds 64"):
        scheduler.add(ScheduledSequence(request_id=0, tokens=[1] * 60, max_total=70))
    with pytest.raises(RequestError, match=r"is 20 tokens, the pool holds 16 \(4 pages of 4\)"):
        scheduler.add(ScheduledSequence(request_id=0, tokens=[1] * 10, max_total=20))
    assert not scheduler.waiting


def test_a_long_prompt_does_not_hold_up_those_who_decode():
    scheduler = StepScheduler(config_of())
    scheduler.add(ScheduledSequence(request_id=0, tokens=[1, 2], max_total=10))
    run(scheduler, 1)
    scheduler.add(ScheduledSequence(request_id=1, tokens=list(range(40)), max_total=42))
    plans = run(scheduler, 3)
    assert [len(plan.decodes) for plan in plans] == [1, 1, 1]
    assert [[(c.start, c.count, c.last) for c in plan.chunks] for plan in plans] == [
        [(0, 16, False)], [(16, 16, False)], [(32, 8, True)],
    ]  # fmt: skip


def test_who_awaits_its_tokens_decodes_one_when_they_are_known_and_holds_up_nobody():
    scheduler = StepScheduler(config_of(decode_steps=3))
    awaiting, other = (
        ScheduledSequence(request_id=index, tokens=[1, 2], max_total=20, awaits_tokens=not index) for index in range(2)
    )
    scheduler.add(awaiting)
    scheduler.add(other)
    prompts, second = scheduler.plan(), scheduler.plan()
    assert [decode.sequence for decode in second.decodes] == [other]
    list(scheduler.complete(prompts, [[7], [7]]))
    third = scheduler.plan()
    counts = {decode.sequence.request_id: (decode.start, decode.count) for decode in third.decodes}
    assert counts == {0: (2, 1), 1: (5, 3)}
    assert third.decode_steps == 3


def test_a_shared_beginning_is_computed_once():
    scheduler = StepScheduler(config_of())
    for index in range(2):
        scheduler.add(ScheduledSequence(request_id=index, tokens=[*range(12), 50 + index], max_total=14))
        run(scheduler, 4)
    assert (scheduler.num_prompt_tokens, scheduler.num_cached_tokens) == (26, 12)


def test_the_urgent_go_first_and_the_patient_are_not_forgotten():
    scheduler = StepScheduler(config_of(max_num_seqs=1, aging_steps=4))
    patient = ScheduledSequence(request_id=0, tokens=[1], max_total=3, priority=3)
    scheduler.add(patient)
    order: list[int] = []
    for index in range(1, 80):  # one more urgent request every step, twice as many as can be served
        scheduler.add(ScheduledSequence(request_id=index, tokens=[2], max_total=3, priority=0))
        order += [chunk.sequence.request_id for plan in run(scheduler, 1) for chunk in plan.chunks]
    assert order[0] == 1
    assert 2 < order.index(0) < 12


def test_who_gives_way_keeps_its_age():
    """A long prompt of low priority, and urgent ones without end that want the same few pages."""
    scheduler = StepScheduler(
        config_of(max_num_seqs=3, num_pages=8, page_size=2, chunk_tokens=1, block_tokens=1, context=16, aging_steps=8)
    )
    patient = ScheduledSequence(request_id=0, tokens=list(range(9)), max_total=11, priority=3)
    scheduler.add(patient)
    for index in range(1, 400):
        if len(scheduler.waiting) < 4:
            scheduler.add(ScheduledSequence(request_id=index, tokens=[50, index], max_total=6, priority=0))
        run(scheduler, 1)
        if patient.finished:
            break
    assert patient.finished


def test_deadlines_are_named():
    scheduler = StepScheduler(config_of(max_num_seqs=1))
    early = ScheduledSequence(request_id=0, tokens=[1], max_total=3, deadline=5.0)
    scheduler.add(early)
    scheduler.add(ScheduledSequence(request_id=1, tokens=[1], max_total=3))
    assert scheduler.expired(4.9) == []
    assert scheduler.expired(5.0) == [early]


@pytest.mark.parametrize("changes", [{"max_num_seqs": 0}, {"page_size": 0}, {"chunk_tokens": 12}, {"num_pages": -1}])
def test_a_configuration_checks_itself(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        config_of(**changes)
