// Attention of up to NR = 4 NT query rows of one KV head over its sinks, packed tiles and tail, in one launch.
// decode/reference.py defines the result. For each query row q:
//
//     q'     = unit * gain * R diag(1 / balance) q, channels sorted          query.cuh: the query in the keys' coded domain
//     s_i    = scaling * q . k_i                                             raw.cuh: raw token i, of sinks and tail
//     s_i    = scaling * (q' . levels_i * scale_i + q . mean)                tiles.cuh: packed token i, per group of channels
//     p_i    = exp(s_i - max_j s_j)
//     result = (sum_raw p_i v_i + unit * gain * R^T sum_packed p_i scale_i levels_i) / (sum_i p_i + exp(s_aux))      merge.cuh
//
// Who does what. The grid is (splits, H, B * chunks); a chunk is up to NR query rows of one KV head.
//
//     block (split, h, b * chunks + chunk)         WARPS warps
//       warp WARPS - 2, WARPS - 3, ...             one query row each, coded for the whole block
//       warp WARPS - 1, WARPS - 2, ...             16 raw tokens each; in turn over the blocks that share the head
//       team of TEAM warps                         whole tiles of 128 tokens: team * splits + split, then every splits * TEAMS
//         warp of a team                           128 / TEAM tokens of each tile, with a maximum and sums of its own
//       warp 0, 1, ...                             one row of results each, from the parts of all warps and all blocks
//
// Who holds what while a warp works on a tile: lane = 4 g + t, with g = 0..7 and t = 0..3.
//
//     S = K q'^T, unit u, product nt                         O^T = V^T P^T, channel tile m, product nt
//
//     query row 4 nt +  0    1    2    3                     query row 4 nt +  0    1    2    3
//     byte             h l  h l  h l  h l                    byte             h l  h l  h l  h l
//                      t=0  t=1  t=2  t=3                                     t=0  t=1  t=2  t=3
//     token of g       scores.s[u][nt][0]                    channel 16 m + g        sums.o[m][nt][0]
//     token of g + 8   scores.s[u][nt][1]                    channel 16 m + g + 8    sums.o[m][nt][1]
//     (left operand: the lane's part t of both rows of codes, as it was loaded; right operand: part t of column g)
//
// - Levels are bytes (codebooks with a unit), so both products run in the integer matrix units.
// - No code is converted: one byte permutation looks four levels up. Codes of a trellis become level numbers first, 32 at
//   a time (words.cuh).
// - Queries and probabilities are 15-bit fixed point. The high and low byte fill neighbouring columns of a product.
// - Accumulators start at the bit pattern of 1.5 * 2^23, so that sums come back as floats.
// - K (16 tokens x 32 channels) and V^T (16 channels x 32 tokens) are the left operands.
// - The order of channels (tokens) in a product is free if both operands agree, so a lane keeps the bytes it loaded.
// - The tokens of an S product are those that the V product wants next. P changes lanes once, by movmatrix.
// - A team copies its tiles together. Values arrive while the keys are in use, and the next keys while the values are.
// - A warp leaves its sums in memory of its own. The block has three barriers: two __syncthreads() in this file, and the
//   mbarrier coded_rows, which says that all queries are coded.
// - Loads are issued in the order in which they are needed: queries, raw tokens, tiles.
// - SPARSE: the values of a tile are copied after its scores are known, and only if a probability reaches 2^sparse in any
//   warp of the team. The probability is relative to the largest that the warp has seen in that query row.

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_attention(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(128) char memory[];
    Shared& shared = *(Shared*)memory;
    Warp w(a, shared);
    if (threadIdx.x == 0) asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(w.coded_rows()), "r"(32 * NR) : "memory");
    if (w.warp == 1)
        unrolled<0, KEY_GROUPS + 1>([&]<int I>() {
            if (w.lane == I)
#pragma unroll
                for (int i = 0; i < 8; i++) shared.books[I][i] = i == 6 ? 0x88888888u : i == 7 ? 0x7F7F7F7Fu : LEVELS[I][i];
        });
    __syncthreads();
    previous_kernel_done();
    w.read_lengths();

    // The last warps take queries and raw tokens. If there are few tiles, the first warps take them.
    TileCopies copies(w);
    QueryLoads own_query;
    const int first_query = (2 * WARPS - 2 - w.warp) % WARPS;
    const int seats = w.splits * WARPS, first_raw = 16 * (seats - 1 - (w.warp * w.splits + w.split));
    const bool idle = first_query >= NR && first_raw >= a.sinks + w.tail;  // nothing to do before its first tile
    if (first_query < NR) ask_for_query(w, own_query, first_query);
    if (idle) copies.first_tile();
    const RawTokens raw(w);
    RawLoads raw_loads;
    if (first_raw < raw.count) raw.ask(raw_loads, first_raw);
#pragma unroll
    for (int n = 0; n < NR; n += WARPS) {
        if (n + first_query >= NR) break;
        if (n) ask_for_query(w, own_query, n + first_query);
        code_query(w, own_query, n + first_query);
    }
    if (!idle) {
        // Idle warps have started copies already, which keep the memory busy. More copies would delay the loads of queries.
        if (first_query >= NR) wait_once(w.coded_rows());
        copies.first_tile();
    }
    raw.attend(raw_loads, first_raw, 16 * seats);

    TileSums sums;
#if SPARSE
    // The first raw tokens, above all the sinks, score high. Once their maximum is known, most tiles are below the threshold.
    raw.first_maximum(sums.maximum);
    int unread = 0;
#endif
    wait_once(w.coded_rows());
    const CodedQueries queries(w);
    const OwnTokens own(w, copies);
    for (int tile = copies.begin; tile < w.tiles; tile += copies.stride) {
        if (SPARSE)
            copies.all_arrived();
        else
            copies.all_but_newest_arrived();
        Scores scores(w, queries, own, copies.key_room);
        scores.finish(w, queries, own, (i64)tile * 128);
        float highest[NT], fade[NT];
        scores.find_highest(highest, queries);
#if SPARSE
        const bool wanted = w.team_any(sums.wants(w, highest));
        if (wanted) copies.values(tile);
#else
        w.team_sync();  // all warps of the team have read the keys, which the next copy overwrites
#endif
        copies.keys(tile + copies.stride);
#if SPARSE
        if (!wanted) {
            sums.add_without_values(scores, queries);
            unread++;
            continue;
        }
#endif
        sums.raise(highest, fade);
        copies.all_but_newest_arrived();
        u32 p[OWN_UNITS][NT];
        sums.code_probabilities(p, scores, fade, queries, own.value_scales);
        sums.add(p, fade, queries, own.values, w);
        w.team_sync();
        if (!SPARSE) copies.values(tile + copies.stride);
    }
#if SPARSE
    if (w.member == 0 && unread) atomicAdd(a.arrivals + ARRIVALS - 1, unread);
#endif
    copies.all_arrived();  // the sums overwrite the team's tiles
    sums.leave(w);

    float value_signs[OWN];
    if (HADAMARD && w.warp < NR) read_row(value_signs, a.value_turn + (i64)w.h * a.value_turn_stride + OWN * w.lane);
    const float value_lead = VALUE_UNIT * (a.value_gain ? a.value_gain[w.bh] : 1.f);
    __syncthreads();
    for (int n = w.warp; n < w.rows; n += WARPS) {
        float x[OWN], top, total;
        add_warps(x, top, total, w, n, value_signs, value_lead);
        if (w.splits > 1 && !add_blocks(x, top, total, w, n)) continue;
        write_result(x, top, total, w, n);
    }
}
