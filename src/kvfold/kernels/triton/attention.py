"""Attention over one segment, packed or dense: a span of its blocks a program.

A program takes one row (KV head of a sequence), a tile of its queries and a span of its blocks. It reads codes as they lie and
keeps an online softmax (FlashAttention, arXiv 2205.14135); the spans of a row are joined by log-sum-exp afterwards
(Flash-Decoding, Dao et al. 2023), together with those of other segments.

For few queries the products stand on their side (`FLIPPED`): scores are K Qᵀ, `[tokens, queries]`, and the output is Vᵀ Pᵀ,
`[channels, queries]`. So the long axes are those of which tensor cores take 64 at a time, and query heads of a group, all in
one product, need be padded to 8 and not to 16 or 64. For many queries sums over tokens are cheaper along a register's own axis.
"""

import triton.language as tl

from kvfold.kernels.triton.layout import code_of_column, fetch, numbers
from kvfold.kernels.triton.tiles import LOG2_E, kernel, line_of, place_of, product, query_tile, score_tile, token_order, visible


@kernel
def attend_kernel(
    q,
    partial_out,
    partial_lse,
    table,
    slots,
    starts,
    lengths,
    query_slots,
    first_visible,
    k_codes,
    k_scale,
    k_zero,
    k_base,
    k_levels,
    v_codes,
    v_scale,
    v_zero,
    v_base,
    v_levels,
    kept,
    k_row_stride,
    k_line_stride,
    v_row_stride,
    v_line_stride,
    uniform_start,
    uniform_length,
    num_blocks,
    num_vectors,
    num_queries,
    num_rows,
    first_split,
    blocks_per_split,
    kept_row_stride,
    kept_vector_stride,
    kept_width,
    softcap,
    K: tl.constexpr,
    V: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAGED: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    UNIFORM: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FLIPPED: tl.constexpr,
    KEEPS: tl.constexpr,
):
    """Attention of a tile of a row's queries over one span of its blocks.

    Grid: query tiles, rows, splits. Writes `partial_out [S, R, M, D] float32`, normalised, and `partial_lse [S, R, M] float32`,
    to the base of 2, from split `first_split` on. With KEEPS the scores as well, times log2 e, to `kept [R, M, width] float32`.
    """
    row = tl.program_id(1)
    split = tl.program_id(2)
    vector = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    query = vector % num_queries
    x = query_tile(K, q, row, vector, num_vectors, HEAD_DIM)
    token = token_order(K, V, TOKENS)
    BLOCK_V: tl.constexpr = V.block_lines if V.by_channel else V.block_width * V.per_word
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_V, BLOCK_M] if FLIPPED else [BLOCK_M, BLOCK_V], tl.float32)
    OVER_TOKENS: tl.constexpr = 0 if FLIPPED else 1  # the axis of tokens in scores, and that of channels in the output
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, num_blocks)
    if CONTIGUOUS:
        if UNIFORM:
            last = tl.minimum(last, tl.cdiv(uniform_length, TOKENS))
        else:
            last = tl.minimum(last, tl.cdiv(tl.load(lengths + row), TOKENS).to(tl.int32))
    # The next block's place is asked for one round ahead, so that the loads of codes don't wait for it.
    if PAGED:
        upcoming = tl.load(table + row * num_blocks + first, mask=first < last, other=0)
    else:
        upcoming = row.to(tl.int64)
    for column in tl.range(first, last):
        if PAGED:
            present = upcoming >= 0
            block = tl.maximum(upcoming, 0)
            upcoming = tl.load(table + row * num_blocks + column + 1, mask=column + 1 < last, other=0)
        else:
            present = True
            block = upcoming
        line = token if PAGED else tl.minimum(token, uniform_length - 1 - column * TOKENS)  # a run ends with its last token
        k_line, v_line = line_of(K, line), line_of(V, line)
        k_start, k_stride = place_of(K, block, column * TOKENS, k_row_stride, k_line_stride, PAGED)
        v_start, v_stride = place_of(V, block, column * TOKENS, v_row_stride, v_line_stride, PAGED)
        k_raw, k_factor, k_offset = fetch(K, k_start, k_stride, block, k_line, k_codes, k_scale, k_zero, k_base)
        v_raw, v_factor, v_offset = fetch(V, v_start, v_stride, block, v_line, v_codes, v_scale, v_zero, v_base)
        scores = score_tile(K, x, k_line, k_raw, k_factor, k_offset, k_levels, softcap, BLOCK_M, TOKENS, SOFTCAP, FLIPPED)
        seen = visible(
            row,
            block,
            column,
            token,
            query,
            slots,
            starts,
            lengths,
            uniform_start,
            uniform_length,
            query_slots,
            first_visible,
            num_queries,
            TOKENS,
            PAGED,
            CONTIGUOUS,
            UNIFORM,
            WINDOWED,
            FLIPPED,
        )
        scores = tl.where(seen & present, scores, -float("inf"))
        if KEEPS:
            place = tl.expand_dims(column * TOKENS + token, 1 - OVER_TOKENS)
            of_vector = row.to(tl.int64) * kept_row_stride + vector.to(tl.int64) * kept_vector_stride
            of_vector = tl.expand_dims(of_vector, OVER_TOKENS)
            wanted = tl.expand_dims(vector < num_vectors, OVER_TOKENS) & (place < kept_width)
            tl.store(kept + of_vector + place, scores, mask=wanted)
        new_top = tl.maximum(top, tl.max(scores, OVER_TOKENS))
        anchor = tl.where(new_top == -float("inf"), 0.0, new_top)
        p = tl.exp2(scores - tl.expand_dims(anchor, OVER_TOKENS))
        shrink = tl.exp2(top - anchor)
        total = total * shrink + tl.sum(p, OVER_TOKENS)
        v = numbers(V, v_line, v_raw, v_factor, v_offset, v_levels)
        if V.by_channel:
            v = tl.trans(v)
        if FLIPPED:
            p = tl.trans(p)
        out = product(p.to(v.dtype), v, out * tl.expand_dims(shrink, OVER_TOKENS), FLIPPED)
        top = new_top
    channel = tl.arange(0, BLOCK_V)
    if not V.by_channel:
        channel = code_of_column(V, channel)
    at = ((first_split + split).to(tl.int64) * num_rows + row) * num_vectors + vector
    inside = vector < num_vectors
    tl.store(partial_lse + at, tl.where(total > 0, top + tl.log2(total), -float("inf")), mask=inside)
    out /= tl.expand_dims(tl.where(total > 0, total, 1.0), OVER_TOKENS)
    where = tl.expand_dims(at * HEAD_DIM, OVER_TOKENS) + tl.expand_dims(channel, 1 - OVER_TOKENS)
    stored = tl.expand_dims(inside, OVER_TOKENS) & tl.expand_dims(channel < HEAD_DIM, 1 - OVER_TOKENS)
    tl.store(partial_out + where, out, mask=stored)


@kernel
def merge_kernel(
    partial_out,
    partial_lse,
    out,
    lse,
    first_split,
    num_splits,
    num_all_splits,
    num_vectors,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """out = Σ_s 2^(lse_s - lse) out_s over the splits `first_split …` of a vector, with lse over all splits, to the base of e.

    Grid: all vectors of all rows. What no split has seen is zero.
    """
    vector = tl.program_id(0)
    top = -float("inf")
    for start in range(0, num_all_splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        part = tl.load(partial_lse + split * num_vectors + vector, mask=split < num_all_splits, other=-float("inf"))
        top = tl.maximum(top, tl.max(part, 0))
    anchor = tl.where(top == -float("inf"), 0.0, top)
    total = 0.0
    for start in range(0, num_all_splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        part = tl.load(partial_lse + split * num_vectors + vector, mask=split < num_all_splits, other=-float("inf"))
        total += tl.sum(tl.exp2(part - anchor), 0)
    channel = tl.arange(0, BLOCK_D)
    merged = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first_split, first_split + num_splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        inside = split < first_split + num_splits
        part = tl.load(partial_lse + split * num_vectors + vector, mask=inside, other=-float("inf"))
        at = (split * num_vectors + vector).to(tl.int64)[:, None] * HEAD_DIM + channel[None, :]
        x = tl.load(partial_out + at, mask=inside[:, None] & (channel[None, :] < HEAD_DIM), other=0.0)
        merged += tl.sum(x * tl.exp2(part - anchor)[:, None], 0)
    merged /= tl.where(total > 0, total, 1.0)
    tl.store(out + vector.to(tl.int64) * HEAD_DIM + channel, merged, mask=channel < HEAD_DIM)
    if first_split == 0:
        natural = tl.where(total > 0, (top + tl.log2(total)) / LOG2_E, -float("inf"))
        tl.store(lse + vector, natural)


@kernel
def mass_kernel(
    q,
    lse,
    received,
    table,
    slots,
    starts,
    lengths,
    query_slots,
    first_visible,
    k_codes,
    k_scale,
    k_zero,
    k_base,
    k_levels,
    k_row_stride,
    k_line_stride,
    uniform_start,
    uniform_length,
    num_blocks,
    num_groups,
    num_queries,
    width,
    softcap,
    K: tl.constexpr,
    V: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAGED: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    UNIFORM: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FLIPPED: tl.constexpr,
):
    """`received [R, G, width] float32`: Σ over queries of exp(score - lse), for the tokens of one block of one row.

    Grid: blocks, rows. Reads K only, and each code once: half the bytes of attention itself.
    """
    column = tl.program_id(0)
    row = tl.program_id(1)
    token = token_order(K, V, TOKENS)
    if PAGED:
        block = tl.load(table + row * num_blocks + column)
        present = block >= 0
        block = tl.maximum(block, 0)
    else:
        present = True
        block = row.to(tl.int64)
    line = token if PAGED else tl.minimum(token, uniform_length - 1 - column * TOKENS)
    k_line = line_of(K, line)
    k_start, k_stride = place_of(K, block, column * TOKENS, k_row_stride, k_line_stride, PAGED)
    raw, factor, offset = fetch(K, k_start, k_stride, block, k_line, k_codes, k_scale, k_zero, k_base)
    place = column * TOKENS + token
    num_vectors = num_groups * num_queries
    OVER_TOKENS: tl.constexpr = 0 if FLIPPED else 1
    for group in range(num_groups):
        gained = tl.zeros([TOKENS], tl.float32)
        for start in range(0, num_queries, BLOCK_M):
            query = start + tl.arange(0, BLOCK_M)
            asks = query < num_queries
            vector = tl.where(asks, group * num_queries + query, num_vectors)
            query = tl.minimum(query, num_queries - 1)
            x = query_tile(K, q, row, vector, num_vectors, HEAD_DIM)
            scores = score_tile(K, x, k_line, raw, factor, offset, k_levels, softcap, BLOCK_M, TOKENS, SOFTCAP, FLIPPED)
            seen = visible(
                row,
                block,
                column,
                token,
                query,
                slots,
                starts,
                lengths,
                uniform_start,
                uniform_length,
                query_slots,
                first_visible,
                num_queries,
                TOKENS,
                PAGED,
                CONTIGUOUS,
                UNIFORM,
                WINDOWED,
                FLIPPED,
            )
            whole = tl.load(lse + row * num_vectors + vector, mask=asks, other=float("inf")) * LOG2_E
            # Where a query saw nothing, its lse is -inf, and no score is visible either.
            p = tl.exp2(scores - tl.expand_dims(tl.maximum(whole, -3.0e38), OVER_TOKENS))
            counted = seen & present & tl.expand_dims(asks, OVER_TOKENS)
            gained += tl.sum(tl.where(counted, p, 0.0), 1 - OVER_TOKENS)
        at = (row * num_groups + group).to(tl.int64) * width + place
        tl.store(received + at, gained, mask=place < width)


@kernel
def received_kernel(scores, lse, received, num_vectors, width, LARGEST: tl.constexpr, BLOCK_N: tl.constexpr):
    """`received [R, N] float32`: the mean (LARGEST: the largest) over a row's queries of exp(score - lse).

    Grid: tiles of tokens, rows. `scores [R, M, N] float32` are what `attend_kernel` has kept: 4 bytes a query and token are
    read instead of a key.
    """
    row = tl.program_id(1)
    place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = place < width
    gained = tl.zeros([BLOCK_N], tl.float32)
    for vector in range(num_vectors):
        at = row * num_vectors + vector
        whole = tl.maximum(tl.load(lse + at) * LOG2_E, -3.0e38)  # a query that saw nothing has -inf, and so has every score
        score = tl.load(scores + at.to(tl.int64) * width + place, mask=inside, other=-float("inf"))
        p = tl.exp2(score - whole)
        if LARGEST:
            gained = tl.maximum(gained, p)
        else:
            gained += p
    if not LARGEST:
        gained /= num_vectors
    tl.store(received + row.to(tl.int64) * width + place, gained, mask=inside)
