"""What every store promises that several processes share, as its port says."""

from __future__ import annotations

from flask_executor.testing.contract.shared_messages import MessageTests
from flask_executor.testing.contract.shared_ownership import OwnershipTests
from flask_executor.testing.contract.shared_records import RecordTests


class SharedStoreContract(RecordTests, OwnershipTests, MessageTests):
    """What :class:`~flask_executor.abc.JobStore` promises: claims, leases, requests, watches, forks and expiry.

    The fixture ``store_url`` says which store: what ``EXECUTOR_STORE`` would be, of a store with nothing in it.
    """
