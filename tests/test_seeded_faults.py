"""The seeded faults follow the code: a fault whose text has changed tests nothing."""

from tests.faults import FAULTS
from tests.seeded_faults import does_not_apply


def test_every_fault_applies():
    assert [fault.name for fault in FAULTS if does_not_apply(fault)] == []
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
