"""Batched linear assignment, exact, one problem per program: the cheapest way to give every target its own query.

Shortest augmenting paths. Rows (the shorter side of the problem) are added one at a time. From the new row, Dijkstra's
search over the reduced costs cost[i, j] - u[i] - v[j] >= 0 runs until it reaches a free column. Then the duals are
raised so that the path's edges become tight (reduced cost 0), and the rows on the path change columns. The dual u[i] of
an assigned row need not be kept: its own edge is tight, so that u[i] = cost[i, j] - v[j].

Duals and path lengths are float64, as in SciPy, so that the total cost is SciPy's; only ties may be broken differently.
One step of the search is one row of costs and two reductions over the columns, which stay in registers. What is read at
a computed index (v, the row of a column, the path) goes through a few hundred bytes of scratch in the L1 cache.

It replaces, per image and decoder layer, a copy of the costs to the host, SciPy there, and a copy of indices back.

Source: Crouse 2016, "On implementing 2D rectangular assignment algorithms", IEEE Transactions on Aerospace and
Electronic Systems 52(4), the algorithm of `scipy.optimize.linear_sum_assignment`.
"""

import torch
import triton
import triton.language as tl

SOLVED = tl.constexpr(0)
INVALID = tl.constexpr(1)  # a cost is NaN or -infinity
INFEASIBLE = tl.constexpr(2)  # infinite costs leave no complete assignment
TOO_LARGE = tl.constexpr(3)  # more targets than the launch was made for


@triton.jit(do_not_specialize=["problems", "num_images", "num_targets", "num_queries"])
def _assignment_kernel(
    cost_ptr,  # [layers, num_targets, num_queries] float32 or float64, contiguous
    offsets_ptr,  # [num_images + 1] int64: where each image's targets start
    query_ptr,  # [layers, num_targets] int64, filled with -1
    status_ptr,  # [layers, num_images] int32
    dual_ptr,  # [problems, BLOCK] float64, scratch: v
    row_of_ptr,  # [problems, BLOCK] int32, scratch: the row of a column, -1 if free
    path_ptr,  # [problems, BLOCK] int32, scratch: the column before a column, -1 for the new row
    problems,  # layers * num_images
    num_images,
    num_targets,
    num_queries,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program: GROUP problems (an image of a layer each) in lockstep. Vectors are [GROUP] unless marked otherwise."""
    problem = (tl.program_id(0) * GROUP + tl.arange(0, GROUP)).to(tl.int64)
    exists = problem < problems
    layer = problem // num_images
    image = problem % num_images
    start = tl.load(offsets_ptr + image, mask=exists, other=0)
    targets = (tl.load(offsets_ptr + image + 1, mask=exists, other=0) - start).to(tl.int32)
    status = tl.where(tl.maximum(targets, num_queries) > BLOCK, TOO_LARGE, SOLVED)

    # Rows are the shorter side; if both are equal, the targets, whose costs are contiguous. Either way the rest reads
    # the matrix through two strides. A problem that is too large counts as having no rows, and every loop skips it.
    swapped = targets > num_queries
    rows = tl.where(exists & (status == 0), tl.minimum(targets, num_queries), 0)
    cols = tl.maximum(targets, num_queries)
    stride_row = tl.where(swapped, 1, num_queries)
    stride_col = tl.where(swapped, num_queries, 1)
    cost_ptr += (layer * num_targets + start) * num_queries
    offs = tl.arange(0, BLOCK)[None, :]
    mask = (offs < cols[:, None]) & (rows > 0)[:, None]  # [GROUP, BLOCK]
    cost_ptrs = cost_ptr[:, None] + offs * stride_col[:, None]
    scratch = problem * BLOCK
    all_scratch = scratch[:, None] + offs
    all_exist = exists[:, None] & (offs < BLOCK)

    # Check every cost once, before the search: NaN would compare false everywhere and -inf give inf - inf.
    most_rows = tl.max(rows, axis=0)
    invalid = tl.full([GROUP, BLOCK], 0, dtype=tl.int32)
    for i in range(0, most_rows):
        cost = tl.load(cost_ptrs + i * stride_row[:, None], mask=mask & (i < rows)[:, None], other=0.0)
        invalid |= ((cost != cost) | (cost == float("-inf"))).to(tl.int32)
    status = tl.where(tl.max(invalid, axis=1) != 0, INVALID, status)

    # v and row_of live in registers; the scratch copies are for reads at a computed column.
    v = tl.full([GROUP, BLOCK], 0, dtype=tl.float64)
    row_of = tl.full([GROUP, BLOCK], -1, dtype=tl.int32)
    tl.store(dual_ptr + all_scratch, v, mask=all_exist)
    tl.store(row_of_ptr + all_scratch, row_of, mask=all_exist)
    tl.debug_barrier()

    for new_row in range(0, most_rows):
        # Dijkstra from the new row, whose u is still 0: close columns in order of distance until a free one is closed.
        distance = tl.full([GROUP, BLOCK], float("inf"), dtype=tl.float64)
        path = tl.full([GROUP, BLOCK], -1, dtype=tl.int32)
        is_open = mask
        row = tl.full([GROUP], 0, dtype=tl.int32) + new_row
        col = tl.full([GROUP], -1, dtype=tl.int32)
        nearest = tl.full([GROUP], 0, dtype=tl.float64)
        base = tl.full([GROUP], 0, dtype=tl.float64)  # distance of the row minus its u
        searching = (row < rows) & (status == 0)
        is_active = searching
        while tl.max(searching.to(tl.int32), axis=0) != 0:
            # Relax all open columns through the current row.
            row_mask = mask & searching[:, None]
            cost = tl.load(cost_ptrs + (row * stride_row)[:, None], mask=row_mask, other=float("inf")).to(tl.float64)
            through_row = base[:, None] + (cost - v)
            is_shorter = is_open & (through_row < distance)
            distance = tl.where(is_shorter, through_row, distance)
            path = tl.where(is_shorter, col[:, None], path)
            # The nearest open column is closed next.
            candidates = tl.where(is_open, distance, float("inf"))
            nearest = tl.where(searching, tl.min(candidates, axis=1), nearest)
            # Among equally near columns a free one ranks first, because it ends the search; `best` holds the column in
            # its low bits.
            rank = tl.where(row_of >= 0, BLOCK + offs, offs)
            best = tl.min(tl.where(is_open & (candidates == nearest[:, None]), rank, 2 * BLOCK), axis=1)
            col = tl.where(searching, best & (BLOCK - 1), col)
            is_open = is_open & (offs != col[:, None])
            # Go on from the row that has this column. A free column (row -1) or no path at all (inf) ends the search.
            row = tl.load(row_of_ptr + scratch + col, mask=searching, other=-1)
            searching = (row >= 0) & (nearest < float("inf"))
            # That row's u follows from its tight edge to its column.
            tight = tl.load(cost_ptr + row * stride_row + col * stride_col, mask=searching, other=0.0).to(tl.float64)
            base = nearest - (tight - tl.load(dual_ptr + scratch + col, mask=searching, other=0.0))
        status = tl.where(nearest < float("inf"), status, INFEASIBLE)

        # Lower v of the closed columns: the path's edges become tight and no reduced cost negative. The path goes to
        # scratch, because the walk back reads it at a computed column.
        is_active = is_active & (status == 0)
        v = tl.where(mask & (is_open == 0), v - (nearest[:, None] - distance), v)
        tl.store(path_ptr + all_scratch, path, mask=all_exist)
        tl.debug_barrier()
        # Walk back from the free column: each column takes the row of the column before it, the first the new row.
        while tl.max(is_active.to(tl.int32), axis=0) != 0:
            before = tl.load(path_ptr + scratch + col, mask=is_active, other=-1)
            moved = tl.load(row_of_ptr + scratch + before, mask=before >= 0, other=new_row)
            row_of = tl.where((offs == col[:, None]) & is_active[:, None], moved[:, None], row_of)
            is_active = before >= 0
            col = before
        # All reads of the old row_of are done before it is overwritten, and all writes before the next search reads it.
        tl.debug_barrier()
        tl.store(dual_ptr + all_scratch, v, mask=all_exist)
        tl.store(row_of_ptr + all_scratch, row_of, mask=all_exist)
        tl.debug_barrier()

    # Back from (row, column) to (target, query).
    target = tl.where(swapped[:, None], offs, row_of)
    query = tl.where(swapped[:, None], row_of, offs)
    is_pair = mask & (row_of >= 0) & (status == 0)[:, None]
    query_ptrs = query_ptr + (layer * num_targets + start)[:, None] + target
    tl.store(query_ptrs, query.to(tl.int64), mask=is_pair)
    tl.store(status_ptr + problem, status, mask=exists)


def assignment_forward(
    cost: torch.Tensor, offsets: torch.Tensor, largest: int, *, query: torch.Tensor, status: torch.Tensor
) -> None:
    """Launch the kernel.

    Args:
        cost: [layers, targets, queries] float32 or float64, contiguous.
        offsets: [images + 1] int64, contiguous, where each image's targets start.
        largest: most targets of an image. It and the number of queries are at most 4096, so that a problem's columns
            stay in registers.
        query: [layers, targets] int64, contiguous, -1 = unmatched; written.
        status: [layers, images] int32, contiguous; written.
    """
    query.fill_(-1)  # the kernel writes matched targets alone
    problems = status.numel()
    if problems == 0:
        return
    _, num_targets, num_queries = cost.shape
    num_images = offsets.shape[0] - 1
    block = max(triton.next_power_of_2(max(largest, num_queries)), 32)
    # The interpreter's time depends on the number of operations, not on their size. On a GPU, problems in lockstep
    # would wait for the slowest.
    group = min(triton.next_power_of_2(problems), 512) if triton.knobs.runtime.interpret else 1
    dual = torch.empty((problems, block), dtype=torch.float64, device=cost.device)
    row_of, path = torch.empty((2, problems, block), dtype=torch.int32, device=cost.device)
    with torch.cuda.device_of(cost):
        _assignment_kernel[(triton.cdiv(problems, group),)](
            cost_ptr=cost,
            offsets_ptr=offsets,
            query_ptr=query,
            status_ptr=status,
            dual_ptr=dual,
            row_of_ptr=row_of,
            path_ptr=path,
            problems=problems,
            num_images=num_images,
            num_targets=num_targets,
            num_queries=num_queries,
            GROUP=group,
            BLOCK=block,
            num_warps=1 if block <= 128 else min(block // 64, 16),
        )
