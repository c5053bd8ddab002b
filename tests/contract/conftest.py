"""Which tests of a contract are run with which start method of worker processes."""

from __future__ import annotations

import pytest

#: What a worker could do differently that was not forked from the process of the app. All other tests of a contract are
#: run with ``spawn`` and ``forkserver`` by the tox environment storms only.
WITH_EVERY_START_METHOD = {
    "test_a_decorated_function",
    "test_a_job_leaves_at_a_checkpoint_and_cleans_up",
    "test_a_job_that_never_looks_is_killed",
    "test_an_upload",
    "test_async_functions",
    "test_contexts",
    "test_log_records_arrive_with_the_job_and_stay_with_it",
    "test_results_and_errors",
    "test_shutdown",
    "test_the_contexts_of_another_call_are_never_seen",
    "test_they_arrive_in_order",
    "test_until_it_succeeds",
    "test_what_a_job_reports_can_be_read_while_it_runs",
}


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name, _, parameters = item.name.partition("[")
        if name not in WITH_EVERY_START_METHOD and ("spawn" in parameters or "forkserver" in parameters):
            item.add_marker(pytest.mark.storm)
