"""One process serves the store: what the ranks of a job that hangs ask of it grows with their number, no faster."""

from __future__ import annotations

from benchmarks.scale import count_board_requests


def test_one_rank_reads_and_all_hear() -> None:
    """Each asks for the claim, the conclusion and whether it is there, and posted before; each is looked for once."""
    for world_size in (64, 1024):
        requests, readers = count_board_requests(world_size)
        assert readers == 1, "each would print the summary"
        assert requests <= 5 * world_size + 2, "2 N^2 requests do not come to an end in time"
