"""The scheduler by itself: what is batched, in which order, and what never runs."""

import asyncio
import gc
import math
import queue as queue_module
import threading
import time
import weakref
from contextlib import contextmanager

import numpy as np
import pytest

from serving.errors import DeadlineExceeded, QueueFull, Unavailable
from serving.request_queue import Limits, Queue, Request, Withdrawn
from serving.scheduler import Scheduler
from serving.statistics import Statistics
from serving.tensors import Layout


class Model:
    """Doubles its input; runs only while it is let go, and remembers its batches."""

    def __init__(self, held: bool = False):
        self.released = threading.Event()
        self.started = threading.Event()
        self.batches = []
        if not held:
            self.released.set()

    def run(self, inputs):
        self.started.set()
        assert self.released.wait(30)
        self.batches.append(inputs["x"].copy())
        if (inputs["x"] < 0).any():
            raise ArithmeticError("negative")
        return {"y": inputs["x"] * 2}


def on_loop():
    """Has callers told on the loop that runs."""
    return asyncio.get_running_loop().call_soon_threadsafe


def scheduled(scenario, model, *, max_batch_size=8, max_queue=100):
    """Run a scenario against a scheduler of the model; gives its statistics."""
    statistics = Statistics()

    async def run():
        scheduler = Scheduler("m", model.run, statistics, Limits(max_batch_size, max_queue), tell=on_loop())
        try:
            await scenario(scheduler)
        finally:
            model.released.set()
            await asyncio.to_thread(scheduler.close)

    asyncio.run(run())
    return statistics


def rows(*values):
    return {"x": np.array(values, np.float32).reshape(-1, 1)}


def apart(arrays):
    """As a request has them: what they look like, and what they hold."""
    return Layout.of(arrays), tuple(arrays.values())


async def enqueued(scheduler, model, first, *others):
    """Tasks for requests of which the first runs, held, and the others wait behind it."""
    tasks = [asyncio.create_task(scheduler.infer(*first))]
    await asyncio.to_thread(model.started.wait, 10)
    for other in others:
        tasks.append(asyncio.create_task(scheduler.infer(*other)))
        await asyncio.sleep(0)
    return tasks


def test_an_idle_model_runs_a_request_at_once():
    model = Model()

    async def scenario(scheduler):
        answer = await scheduler.infer(rows(1, 2))
        assert answer.outputs["y"].tolist() == [[2], [4]]
        assert answer.queued_ns <= answer.taken_ns <= answer.assembled_ns <= answer.computed_ns

    statistics = scheduled(scenario, model)
    assert (statistics.execution_count, dict(statistics.batches).keys()) == (1, {2})


def test_what_queued_up_meanwhile_runs_together_and_each_gets_its_rows():
    model = Model(held=True)

    async def scenario(scheduler):
        tasks = await enqueued(scheduler, model, [rows(1)], [rows(2, 3)], [rows(4)], [rows(5, 6, 7)])
        model.released.set()
        answers = [answer.outputs["y"].ravel().tolist() for answer in await asyncio.gather(*tasks)]
        assert answers == [[2], [4, 6], [8], [10, 12, 14]]

    statistics = scheduled(scenario, model)
    assert [batch.ravel().tolist() for batch in model.batches] == [[1], [2, 3, 4, 5, 6, 7]]
    assert set(statistics.batches) == {1, 6}


def test_a_request_is_never_split_and_none_overtakes():
    model = Model(held=True)

    async def scenario(scheduler):
        tasks = await enqueued(scheduler, model, [rows(0)], [rows(1, 2, 3)], [rows(4, 5)], [rows(6)])
        model.released.set()
        await asyncio.gather(*tasks)

    scheduled(scenario, model, max_batch_size=4)
    assert [batch.ravel().tolist() for batch in model.batches] == [[0], [1, 2, 3], [4, 5, 6]]


def test_other_shapes_are_not_mixed():
    model = Model(held=True)
    wide = {"x": np.ones((1, 2), np.float32)}

    async def scenario(scheduler):
        tasks = await enqueued(scheduler, model, [rows(0)], [rows(1)], [wide], [rows(2)])
        model.released.set()
        await asyncio.gather(*tasks)

    scheduled(scenario, model)
    assert [batch.shape for batch in model.batches] == [(1, 1), (1, 1), (1, 2), (1, 1)]


def test_a_model_without_a_batch_axis_runs_one_request_at_a_time():
    model = Model(held=True)

    async def scenario(scheduler):
        tasks = await enqueued(scheduler, model, [rows(0)], [rows(1)], [rows(2)])
        model.released.set()
        await asyncio.gather(*tasks)

    statistics = scheduled(scenario, model, max_batch_size=0)
    assert len(model.batches) == statistics.execution_count == 3


def test_one_bad_request_does_not_fail_the_others_of_its_batch():
    model = Model(held=True)

    async def scenario(scheduler):
        tasks = await enqueued(scheduler, model, [rows(0)], [rows(1)], [rows(-1)], [rows(3)])
        model.released.set()
        first, second, bad, third = await asyncio.gather(*tasks, return_exceptions=True)
        assert [answer.outputs["y"].item() for answer in (first, second, third)] == [0, 2, 6]
        assert isinstance(bad, ArithmeticError)

    scheduled(scenario, model)


def test_expired_and_cancelled_requests_never_run():
    model = Model(held=True)

    async def scenario(scheduler):
        soon = time.monotonic_ns() + 50_000_000
        tasks = await enqueued(scheduler, model, [rows(0)], [rows(1), soon], [rows(2)], [rows(3)])
        tasks[2].cancel()
        await asyncio.sleep(0.06)
        model.released.set()
        first, late, cancelled, last = await asyncio.gather(*tasks, return_exceptions=True)
        assert first.outputs["y"].item() == 0
        assert str(late) == "model m: the deadline passed before the model ran"
        assert isinstance(late, DeadlineExceeded)
        assert isinstance(cancelled, asyncio.CancelledError)
        assert last.outputs["y"].item() == 6

    scheduled(scenario, model)
    assert [batch.ravel().tolist() for batch in model.batches] == [[0], [3]]


def test_the_others_of_a_batch_keep_their_rows_when_one_leaves():
    model = Model(held=True)

    async def scenario(scheduler):
        tasks = await enqueued(scheduler, model, [rows(0)], [rows(1)], [rows(2, 3)], [rows(4, 5)])
        tasks[2].cancel()
        await asyncio.sleep(0)
        model.released.set()
        _, before, _, behind = await asyncio.gather(*tasks, return_exceptions=True)
        assert before.outputs["y"].ravel().tolist() == [2]
        assert behind.outputs["y"].ravel().tolist() == [8, 10]

    scheduled(scenario, model)
    assert [batch.ravel().tolist() for batch in model.batches] == [[0], [1, 4, 5]]


def test_arrays_may_lie_in_memory_as_they_like():
    model = Model(held=True)
    turned = np.arange(6, dtype=np.float32).reshape(2, 3).T

    async def scenario(scheduler):
        tasks = await enqueued(scheduler, model, [rows(0)], [{"x": turned}], [{"x": turned[::-1]}])
        model.released.set()
        _, first, second = await asyncio.gather(*tasks)
        assert np.array_equal(first.outputs["y"], 2 * turned)
        assert np.array_equal(second.outputs["y"], 2 * turned[::-1])

    scheduled(scenario, model)
    assert len(model.batches) == 2


def test_a_full_queue_refuses_and_recovers():
    model = Model(held=True)

    async def scenario(scheduler):
        tasks = await enqueued(scheduler, model, [rows(0)], [rows(1)])
        with pytest.raises(QueueFull, match="model m: 2 requests wait already"):
            await scheduler.infer(rows(2))
        model.released.set()
        await asyncio.gather(*tasks)
        assert (await scheduler.infer(rows(3))).outputs["y"].item() == 6

    scheduled(scenario, model, max_queue=2)


def test_who_goes_away_leaves_no_request_behind():
    model = Model(held=True)

    async def scenario(scheduler):
        (first,) = await enqueued(scheduler, model, [rows(0)])
        for _ in range(50):
            task = asyncio.create_task(scheduler.infer(rows(1)))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert len(scheduler.queue) <= 1  # who left makes room when it is needed
        model.released.set()
        await first

    scheduled(scenario, model, max_queue=2)
    assert len(model.batches) == 1


def test_closing_answers_those_who_wait_and_refuses_the_rest():
    model = Model(held=True)

    async def scenario(scheduler):
        tasks = await enqueued(scheduler, model, [rows(0)], [rows(1)], [rows(2)])
        closing = asyncio.create_task(asyncio.to_thread(scheduler.close))
        await asyncio.sleep(0.02)
        with pytest.raises(Unavailable, match="model m is being unloaded"):
            await scheduler.infer(rows(3))
        model.released.set()
        assert [answer.outputs["y"].item() for answer in await asyncio.gather(*tasks)] == [0, 2, 4]
        await closing

    scheduled(scenario, model)


def test_one_that_is_closed_before_its_first_request_refuses_it():
    async def scenario(scheduler):
        await asyncio.to_thread(scheduler.close)
        with pytest.raises(Unavailable, match="model m is being unloaded"):
            await asyncio.wait_for(scheduler.infer(rows(3)), 10)

    scheduled(scenario, Model())


def test_any_interleaving_gives_each_caller_its_own_rows():
    rng = np.random.default_rng(0)
    model = Model()

    async def scenario(scheduler):
        async def caller(number):
            for _ in range(20):
                await asyncio.sleep(rng.random() * 0.002)
                x = np.full((rng.integers(1, 9), 1), number, np.float32) + rng.random()
                answer = await scheduler.infer({"x": x})
                assert np.array_equal(answer.outputs["y"], x * 2)

        await asyncio.gather(*(caller(number) for number in range(50)))

    statistics = scheduled(scenario, model)
    assert statistics.execution_count < 1000  # some were batched
    assert sum(size * batch.compute_infer.count for size, batch in statistics.batches.items()) == sum(
        map(len, model.batches)
    )


class Clock:
    """Shows the time that it is set to, nanoseconds."""

    now = 0

    def __call__(self):
        return self.now


class Asker:
    """Asked something, may leave, and is told of one answer."""

    left = False
    told = None

    def gone(self):
        return self.left

    def answered(self, request):
        assert self.told is None
        self.told = request


def waiting(queue, clock, *values, deadline_ns=float("inf")):
    """Who waits for an answer, and the request that waits in the queue."""
    asker = Asker()
    request = Request(*apart(rows(*values)), len(values), deadline_ns, clock(), asker)
    queue.add(request)
    return asker, request


def queue_with(clock, **limits):
    statistics = Statistics()
    return Queue("m", Limits(**{"batch_rows": 8, **limits}), statistics, clock), statistics


def test_a_batch_waits_for_more_as_long_as_it_may_and_never_when_full():
    clock = Clock()
    queue, _ = queue_with(clock, batch_rows=4, max_delay_us=100)
    assert queue.wait_ns() == 0  # there is nothing to run
    waiting(queue, clock, 1)
    clock.now = 30_000
    waiting(queue, clock, 2)
    assert queue.wait_ns() == 70_000  # from when the first came
    clock.now = 100_000
    assert queue.wait_ns() == 0
    clock.now = 30_000
    waiting(queue, clock, 3, 4)
    assert queue.wait_ns() == 0  # four rows are all it takes
    assert queue.take().rows == 4


def test_without_a_delay_nothing_waits():
    clock = Clock()
    queue, _ = queue_with(clock)
    waiting(queue, clock, 1)
    assert queue.wait_ns() == 0


def test_deadlines_are_kept_to_the_nanosecond_and_counted():
    clock = Clock()
    queue, statistics = queue_with(clock)
    clock.now = 1000
    with pytest.raises(DeadlineExceeded, match="the deadline passed before the model ran"):
        waiting(queue, clock, 1, deadline_ns=1000)
    late, request = waiting(queue, clock, 2, deadline_ns=2000)
    good, other = waiting(queue, clock, 3, deadline_ns=2001)
    clock.now = 2000
    assert queue.take().requests == [other]
    assert late.told is request
    assert isinstance(request.error, DeadlineExceeded)
    assert good.told is None
    assert statistics.drops == {"expired": 2}


def test_the_queue_is_bounded_by_bytes_too_and_says_when_to_try_again():
    clock = Clock()
    queue, statistics = queue_with(clock, max_queue_bytes=16)  # four rows of one float32
    waiting(queue, clock, 1, 2, 3)
    clock.now = 500_000_000
    with pytest.raises(QueueFull, match=r"12 bytes wait already, 8 more are over the 16 .*--max-queue-bytes") as full:
        waiting(queue, clock, 4, 5)
    assert full.value.retry_s == 0.5  # as long as the first has waited
    waiting(queue, clock, 4)
    queue.finished(queue.take())
    waiting(queue, clock, 1, 2, 3, 4, 5)  # more than fits, and nothing else is there: it may run
    assert statistics.drops == {"queue_bytes": 1}


def test_who_left_and_who_is_late_make_room_when_it_is_needed():
    clock = Clock()
    queue, statistics = queue_with(clock, max_queue=2)
    leaver, left = waiting(queue, clock, 1)
    leaver.left = True
    waiting(queue, clock, 2, deadline_ns=10)
    clock.now = 10
    (_, first), (_, second) = waiting(queue, clock, 3), waiting(queue, clock, 4)
    assert leaver.told is left
    assert isinstance(left.error, Withdrawn)
    assert statistics.drops == {"cancelled": 1, "expired": 1}
    batch = queue.take()
    assert batch.requests == [first, second]
    with pytest.raises(QueueFull):  # those that run count too
        waiting(queue, clock, 5)
    queue.finished(batch)
    assert (queue.nbytes, queue.running, len(queue)) == (0, 0, 0)
    assert statistics.drops["queue_full"] == 1


def test_the_callers_of_a_batch_are_told_together_and_where_they_wait():
    model, told = Model(held=True), queue_module.SimpleQueue()
    scheduler = Scheduler("m", model.run, Statistics(), Limits(8), tell=lambda *call: told.put(call))
    askers = [Asker() for _ in range(4)]
    try:
        scheduler.submit(*apart(rows(1)), math.inf, askers[0])
        assert model.started.wait(10)
        for value, asker in enumerate(askers[1:], 2):
            scheduler.submit(*apart(rows(value)), math.inf, asker)
        askers[3].left = True
        model.released.set()
        calls = [told.get(timeout=10) for _ in range(3)]
        assert [asker.told for asker in askers] == [None] * 4
        for callback, argument in calls:
            callback(argument)
        assert told.empty()
        assert isinstance(askers[3].told.error, Withdrawn)
        assert [asker.told.outputs["y"].item() for asker in askers[:3]] == [2, 4, 6]
    finally:
        scheduler.close()


class Loop:
    """Where callers are told, as on an event loop: one thing after the other, by the thread of the test."""

    def __init__(self):
        self._calls = queue_module.SimpleQueue()

    def tell(self, callback, argument):
        self._calls.put((callback, argument))

    def turn(self):
        callback, argument = self._calls.get(timeout=10)
        callback(argument)


@contextmanager
def quick_model(run_ns=1000):
    """A scheduler whose model has a thread of its own and may be run on a loop, and the threads that have run it."""
    loop, clock, threads = Loop(), Clock(), []

    def run(inputs):
        threads.append(threading.current_thread())
        clock.now += run_ns
        return {"y": inputs["x"] * 2}

    scheduler = Scheduler("m", run, Statistics(), Limits(8), 1, loop.tell, True, clock)

    def ask(*values):
        asker = Asker()
        scheduler.submit(*apart(rows(*values)), math.inf, asker)
        return asker

    def answered(*values):
        asker = ask(*values)
        while asker.told is None:
            loop.turn()
        assert asker.told.outputs["y"].ravel().tolist() == [value * 2 for value in values]
        return threads[-1] is threading.current_thread()

    try:
        yield ask, answered, loop, threads
    finally:
        scheduler.close()


def test_requests_that_keep_coming_alone_are_run_where_their_callers_are_told():
    with quick_model() as (_, answered, *_):
        assert [answered(number) for number in range(12)] == [False] * 8 + [True] * 4


def test_a_model_that_is_not_quick_is_left_to_its_thread():
    with quick_model(run_ns=600_000) as (_, answered, *_):
        assert not any(answered(number) for number in range(12))


def test_a_request_that_has_more_than_those_before_it_is_left_to_the_thread():
    with quick_model() as (_, answered, *_):
        assert [answered(number) for number in range(10)][-2:] == [True] * 2
        assert not answered(1, 2)
        assert answered(3)
        assert answered(4)


def test_what_comes_together_is_left_to_the_thread_until_requests_come_alone_again():
    with quick_model() as (ask, answered, loop, threads):
        assert [answered(number) for number in range(9)][-1]
        askers = [ask(1), ask(2)]
        while not all(asker.told for asker in askers):
            loop.turn()
        assert threading.current_thread() not in threads[9:]
        assert [asker.told.outputs["y"].item() for asker in askers] == [2, 4]
        assert not answered(3)


def test_one_that_leaves_before_it_is_run_there_is_dropped():
    with quick_model() as (ask, answered, loop, threads):
        assert [answered(number) for number in range(9)][-1]
        asker = ask(1)
        asker.left = True
        while asker.told is None:
            loop.turn()
        assert isinstance(asker.told.error, Withdrawn)
        assert len(threads) == 9
        assert not answered(2)


def test_several_instances_run_at_once():
    model = Model(held=True)
    running = threading.Semaphore(0)

    def run(inputs):
        running.release()
        return model.run(inputs)

    async def scenario():
        scheduler = Scheduler("m", run, Statistics(), Limits(batch_rows=1), instances=2, tell=on_loop())
        tasks = [asyncio.create_task(scheduler.infer(rows(value))) for value in (1, 2, 3)]
        for _ in range(2):
            assert await asyncio.to_thread(running.acquire, timeout=10)
        assert not running.acquire(blocking=False)  # the third waits for one of the two
        model.released.set()
        assert [answer.outputs["y"].item() for answer in await asyncio.gather(*tasks)] == [2, 4, 6]
        await asyncio.to_thread(scheduler.close)

    asyncio.run(scenario())


def test_batches_are_padded_to_warmed_sizes_and_the_padding_is_nobodys():
    model = Model(held=True)
    answered = []

    async def scenario():
        scheduler = Scheduler("m", model.run, Statistics(), Limits(batch_rows=8, buckets=(2, 4)), tell=on_loop())
        tasks = await enqueued(scheduler, model, [rows(1)], [rows(2, 3)], [rows(4)])
        model.released.set()
        answered.extend(answer.outputs["y"].ravel().tolist() for answer in await asyncio.gather(*tasks))
        whole = await scheduler.infer(rows(1, 2, 3, 4, 5))  # larger than any bucket: as it is
        answered.append(whole.outputs["y"].ravel().tolist())
        assert np.frombuffer(whole.raw("y"), np.float32).tolist() == [2, 4, 6, 8, 10]
        await asyncio.to_thread(scheduler.close)

    asyncio.run(scenario())
    assert [batch.ravel().tolist() for batch in model.batches] == [[1, 0], [2, 3, 4, 0], [1, 2, 3, 4, 5]]
    assert answered == [[2], [4, 6], [8], [2, 4, 6, 8, 10]]


def test_a_batch_that_may_wait_runs_when_its_time_is_over():
    model = Model()

    async def scenario():
        scheduler = Scheduler("m", model.run, Statistics(), Limits(batch_rows=8, max_delay_us=20_000), tell=on_loop())
        first = asyncio.create_task(scheduler.infer(rows(1)))
        await asyncio.sleep(0.002)
        second = asyncio.create_task(scheduler.infer(rows(2)))
        await asyncio.gather(first, second)
        await asyncio.to_thread(scheduler.close)

    asyncio.run(scenario())
    assert [batch.ravel().tolist() for batch in model.batches] == [[1, 2]]


def test_nothing_is_left_for_the_garbage_collector():
    model = Model()

    async def scenario(scheduler):
        await scheduler.infer(rows(1))
        gc.collect()
        gc.disable()
        try:
            outputs = [weakref.ref((await scheduler.infer(rows(1))).outputs["y"]) for _ in range(20)]
            assert [output() for output in outputs[:-1]] == [None] * 19  # the thread may still hold the last
        finally:
            gc.enable()

    scheduled(scenario, model)
