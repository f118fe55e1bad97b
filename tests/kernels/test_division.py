"""The division of the trunk's work: every row and share once, evenly, with few copies of the gradients."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.kernels._division import ANY, CHUNKS, ROWS, SEQUENCES, Stage, divide
from flashlm_numba.kernels._gradient_copies import allocate, clear_copies, sum_copies
from flashlm_numba.model.recipes import RECIPES
from tools.bench.scaling import trunk_share, trunk_work

STAGES = [Stage(ROWS), Stage(SEQUENCES), Stage(SEQUENCES, 16), Stage(SEQUENCES, ANY)]
batches, times = st.integers(0, 40), st.sampled_from([0, 1, 3, 64, 255, 256, 700, 1_025, 6_178])
many_threads = st.integers(1, 64)


@given(batches, times, many_threads)
def test_every_row_and_share_is_one_threads(batch, time, threads):
    division = divide(batch, time, threads)
    if not division.wide:
        parts = [part for thread in range(division.threads) for part in division.tiles(thread)]
        rows = [row for part in parts for row in range(part.low, part.high)]
        assert rows == list(range(batch * time))
        assert all((part.high - part.low) % time == 0 and part.high - part.low <= division.tile for part in parts)
        assert all(part.low == part.origin and part.place == part.copy for part in parts)
        return
    for stage in STAGES:
        shares = 1 if stage.kind == ROWS else division.shares(stage)
        done = np.zeros((batch, time, shares), int)
        flat = done.reshape(-1, shares)
        for thread in range(threads):
            for part in division.parts(stage, thread):
                flat[part.low : part.high, part.share : part.share_end] += 1
                assert part.shares == shares
                assert part.origin == part.place == 0
                if stage.kind == ROWS:
                    assert part.copy == thread
                    assert part.high - part.low <= division.block
                else:
                    assert part.low % time == part.high % time == 0
                    assert part.copy < division.copies.sequences
        assert (done == 1).all()


@given(batches, times, many_threads)
def test_parts_that_share_a_copy_share_no_gradient(batch, time, threads):
    """By rows, each thread has its copy; by sequences, two threads with the same copy have different shares."""
    division = divide(batch, time, threads)
    for stage in STAGES[1:] if division.wide else ():
        taken = np.zeros((division.copies.sequences, division.shares(stage)), int)
        for thread in range(threads):
            mine = np.zeros_like(taken)
            for part in division.parts(stage, thread):
                mine[part.copy, part.share : part.share_end] = 1
            taken += mine
        assert taken.max() <= 1


@given(batches, times, many_threads)
def test_copies_of_the_large_gradients_are_few(batch, time, threads):
    division = divide(batch, time, threads)
    assert division.copies.sequences <= min(threads, max(batch, 1))
    if division.wide:
        assert division.copies.sequences <= CHUNKS
    assert division.copies.rows == division.threads <= threads


@given(batches, times, many_threads)
def test_a_plan_holds_the_parts_in_order(batch, time, threads):
    division = divide(batch, time, threads)
    stages = [STAGES[0], STAGES[0], STAGES[2], STAGES[3], STAGES[0]]
    regions, starts, parts = division.plan(stages)
    covered = [step for first, last, _ in regions for step in range(first, last)]
    assert covered == list(range(5))
    assert len(regions) == (4 if division.wide else 1)
    for first, _, table in regions:
        for thread in range(division.threads):
            want = division.parts(stages[first], thread) if division.wide else division.tiles(thread)
            found = parts[starts[table, thread] : starts[table, thread + 1]].tolist()
            assert found == [list(part) for part in want]


def batch_of(recipe):
    phase = RECIPES[recipe].training.phases[-1]
    return RECIPES[recipe].model, phase.batch_size, phase.seq_len


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_threads_are_busy_up_to_64(recipe):
    """The work in all regions, counted in multiply-adds: the busiest thread of each region keeps the others waiting."""
    for threads in range(1, 65):
        assert threads * trunk_share(*batch_of(recipe), threads) <= (1.15 if threads <= 16 else 1.25), threads


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_no_thread_has_more_work_than_others(recipe):
    for threads in range(1, 65):
        work = trunk_work(*batch_of(recipe), threads).sum(0)
        assert work.max() <= (1.15 if threads <= 16 else 1.25) * work.mean(), threads


def test_the_deep_order_is_kept_where_sequences_divide_evenly():
    assert [threads for threads in range(1, 17) if not divide(8, 256, threads).wide] == [1, 2, 3, 4, 8, 9]
    assert not divide(16, 128, 16).wide
    assert divide(1, 6_178, 1).wide  # its data would not stay in cache
    assert divide(1, 6_178, 1).block == 256
    assert not divide(1, 255, 8).wide  # a short prompt


shapes = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), min_size=1, max_size=4)


@given(st.integers(0, 2**32 - 1), shapes, st.integers(1, 9))
def test_copies_are_cleared_and_added_up_by_any_number_of_threads(seed, sizes, threads):
    rng = np.random.default_rng(seed)
    pool, segments, arrays = allocate(sizes)
    values = [rng.standard_normal(array.shape).astype(np.float32) for array in arrays]
    for array, value in zip(arrays, values, strict=True):
        array[...] = value
    for thread in range(threads):
        sum_copies(pool, segments, thread, threads)
    for array, value in zip(arrays, values, strict=True):
        if len(value):
            np.testing.assert_array_equal(array[0], value.sum(0))
        np.testing.assert_array_equal(array[1:], value[1:])
    pool[...] = np.nan
    for thread in range(threads):
        clear_copies(pool, segments, thread, threads)
    assert all((array == 0).all() for array in arrays)


def test_a_thread_clears_its_own_copy_only():
    pool, segments, (array,) = allocate([(3, 7)])
    pool[...] = 1
    clear_copies(pool, segments, 1, 3)
    assert array.any(1).tolist() == [True, False, True]
