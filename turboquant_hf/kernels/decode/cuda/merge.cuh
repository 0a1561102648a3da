// Phase 4: one warp assembles one row of results from the parts of the block's warps. Where several blocks share the tiles,
// the last block adds up the parts of all blocks.
//
//     top    = max over parts of maximum
//     result = (sum of 2^(maximum - top) output) / (sum of 2^(maximum - top) sum)
//
// A part has a maximum, a sum of probabilities, and an output that is not yet divided by the sum.

// The weight of a part, where `top` is the largest maximum. A part that saw no token has weight 0; a NaN stays a NaN.
__device__ __forceinline__ float part_weight(float maximum, float sum, float top) {
    return maximum == NEVER && sum == sum ? 0.f : exp2_fast(maximum - top);
}
// Count this warp, and return how many came before it. The last to arrive sees everything that the earlier ones wrote.
__device__ __forceinline__ int arrive(int* counter) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

// Add up the warps' parts of row n: those of tiles, which are then rotated back, and those of raw tokens.
__device__ __forceinline__ void add_warps(float (&x)[OWN], float& top, float& total, const Warp& w, int n,
                                          const float (&value_signs)[OWN], float value_lead) {
    const int lane = w.lane;
    Shared& shared = w.shared;
    float raw[OWN] = {};
#pragma unroll
    for (int i = 0; i < OWN; i++) x[i] = 0.f;
    constexpr int AHEAD = WARPS < 32 / OWN ? WARPS : 32 / OWN;  // parts that are loaded at once
    float packed[AHEAD][OWN];
    auto ask = [&](int first) {
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            if (first + j < WARPS) read_row(packed[j], w.tile_sums(first + j) + n * OUTPUT_ROW + OWN * lane);
    };
    ask(0);
    // Lane i has the maximum and sum of warp i over tiles, lane 16 + i those of warp i over raw tokens.
    const int kind = lane >> 4, of = lane & 15;
    const float part_maximum = of < WARPS ? shared.maximum[kind][of][n] : NEVER;
    const float part_sum = of < WARPS ? shared.sum[kind][of][n] : 0.f;
    top = warp_maximum(part_maximum);
    const float weight = part_weight(part_maximum, part_sum, top);
    total = warp_sum(weight * part_sum);
#pragma unroll
    for (int first = 0; first < WARPS; first += AHEAD) {
        if (first) ask(first);
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            if (first + j < WARPS) {
                const float mine = __shfl_sync(~0u, weight, first + j);
#pragma unroll
                for (int i = 0; i < OWN; i++) x[i] = fmaf(mine, packed[j][i], x[i]);
            }
    }
    for (u32 left = __ballot_sync(~0u, weight != 0.f) >> 16; left; left &= left - 1) {
        const int from = __ffs(left) - 1;
        const float mine = __shfl_sync(~0u, weight, 16 + from);
        float part[OWN];
        read_row(part, w.raw_sums(from, n) + OWN * lane);
#pragma unroll
        for (int i = 0; i < OWN; i++) raw[i] = fmaf(mine, part[i], raw[i]);
    }
#if HADAMARD
    hadamard(x, D, lane);
    constexpr float SHRINK = D == 64 ? .125f : D == 128 ? .08838834764831845f : .0625f;  // 1 / sqrt(D)
#pragma unroll
    for (int i = 0; i < OWN; i++) x[i] = fmaf(x[i], value_signs[i] * (value_lead * SHRINK), raw[i]);
#else
    multiply(x, w.a.value_turn + (i64)w.h * w.a.value_turn_stride, shared.scratch[n], lane);
#pragma unroll
    for (int i = 0; i < OWN; i++) x[i] = fmaf(x[i], value_lead, raw[i]);
#endif
}

// Write the block's row n to the workspace. The last block to do so adds up the rows of all blocks and returns true.
__device__ __forceinline__ bool add_blocks(float (&x)[OWN], float& top, float& total, const Warp& w, int n) {
    const int lane = w.lane, split = w.split, splits = w.splits;
    const i64 first_part = w.first_part() + n;
    float* all_sums = w.part_sums();
    write_row(w.a.work + (first_part + split * NR) * D + OWN * lane, x);
    if (lane == 0) *(float2*)(all_sums + 2 * (first_part + split * NR)) = make_float2(top, total);
    __syncwarp();
    int before = 0;
    int* arrival = w.a.arrivals + (i64)w.head_chunk * NR + n;
    if (lane == 0) before = arrive(arrival);
    if (__shfl_sync(~0u, before, 0) != splits - 1) return false;
    __syncwarp();
    if (lane == 0) *arrival = 0;
    constexpr int MANY = OWN <= 4 ? 16 : 8;  // parts that are loaded at once
    float part[MANY][OWN];
    const float* from = w.a.work + first_part * D + OWN * lane;
    auto ask = [&](int first) {
#pragma unroll
        for (int j = 0; j < MANY; j++)
            if (first + j < splits) read_row<true>(part[j], from + j * (NR * D));
        from += MANY * NR * D;
    };
    float2 sums[2];  // of the splits number lane and lane + 32
#pragma unroll
    for (int j = 0; j < 2; j++) {
        sums[j] = make_float2(NEVER, 0.f);
        if (lane + 32 * j < splits) sums[j] = __ldcg((const float2*)(all_sums + 2 * (first_part + (lane + 32 * j) * NR)));
    }
    ask(0);
    top = warp_maximum(fmaxf(sums[0].x, sums[1].x));
    float weights[2];
#pragma unroll
    for (int j = 0; j < 2; j++) weights[j] = part_weight(sums[j].x, sums[j].y, top);
    total = warp_sum(weights[0] * sums[0].y + weights[1] * sums[1].y);
#pragma unroll
    for (int i = 0; i < OWN; i++) x[i] = 0.f;
#pragma unroll 1
    for (int first = 0; first < splits; first += MANY) {
        if (first) ask(first);
#pragma unroll
        for (int j = 0; j < MANY; j++) {
            const float mine = __shfl_sync(~0u, first < 32 ? weights[0] : weights[1], (first & 31) + j);
            if (first + j < splits)
#pragma unroll
                for (int i = 0; i < OWN; i++) x[i] = fmaf(mine, part[j][i], x[i]);
        }
    }
    return true;
}

__device__ __forceinline__ void write_result(const float (&x)[OWN], float top, float total, const Warp& w, int n) {
    const Arguments& a = w.a;
    float shrink = 1.f;
    if (a.s_aux) {  // a logit that takes probability and carries no value
        const float logit = a.s_aux[w.h * (a.all_rows / a.queries) + (w.row0 + n) / a.queries] * LOG2E;
        const float larger = fmaxf(top, logit);
        shrink = exp2_fast(top - larger);
        total = total * shrink + exp2_fast(logit - larger);
    }
    u16 out[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) out[i] = float_to_raw(total == 0.f ? 0.f : x[i] * shrink / total);
    write_row(a.result + ((i64)w.bh * a.all_rows + w.row0 + n) * D + OWN * w.lane, out);
}
