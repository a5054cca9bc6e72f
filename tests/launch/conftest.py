"""Stand-in programs for every test of a launch script."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.scripts import Programs


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    return Programs(tmp_path)
