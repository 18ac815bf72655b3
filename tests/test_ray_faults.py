"""The faults of threads and processes, over actors: `pytest -m slow tests/test_ray_faults.py`."""

import signal

import pytest

pytest.importorskip("ray")

from tests import test_faults, test_kinds
from tests.test_ray import consume, nothing_left_running, own, repeat, workers  # noqa: F401

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def default_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


test_exception = test_faults.test_exception
test_first = test_faults.test_exception_at_the_very_first_batch_of_all
test_last = test_faults.test_exception_at_the_last_batch
test_wrong_shape = test_faults.test_wrong_shape
test_ends_at_once = test_faults.test_an_iterator_that_ends_at_once
test_pauses = test_faults.test_a_consumer_that_pauses_makes_no_worker_late
test_continues = test_faults.test_continue_goes_on_with_the_others_and_says_so_once
test_leaves_early = test_faults.test_the_consumer_leaves_early
test_own_error = test_faults.test_the_consumers_own_error_passes_through
test_stop_while_awaited = test_faults.test_stop_while_the_first_batch_is_awaited
test_stop_at_once = test_faults.test_stop_at_once_after_start
test_stop_twice = test_faults.test_stop_twice_and_from_two_threads
test_interrupt = test_faults.test_an_interrupt_at_any_moment
test_interrupt_lost = test_faults.test_an_interrupt_that_gets_lost_while_data_flow
test_interrupt_handled = test_faults.test_a_handler_of_the_programs_own_decides_about_an_interrupt
test_passes = test_kinds.test_passes_begin_afresh_and_end
test_misfit = test_kinds.test_a_misfit_and_an_end_at_once_are_named
test_lost = test_kinds.test_continue_goes_on_without_the_lost_worker
test_skipped = test_kinds.test_a_bad_batch_is_left_out
test_full = test_kinds.test_a_runner_is_stopped_while_its_queue_is_full
test_each_once = test_kinds.test_each_sample_comes_once_in_its_structure
test_cause = test_kinds.test_an_exception_comes_with_its_cause_and_traceback
test_restarted = test_kinds.test_a_lost_worker_is_started_again_and_each_sample_comes_once
test_stalled = test_kinds.test_a_stalled_worker_is_started_again
test_auto = test_kinds.test_auto_starts_more_where_they_are_needed
