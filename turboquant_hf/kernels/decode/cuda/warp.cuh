// A warp's place in the launch, the work of its block, and the block's part of the workspace.

struct Warp {
    const Arguments& a;
    Shared& shared;
    int lane, warp, g, t;                     // lane = 4 g + t
    int team, share, member;                  // share: which of the team's warps; member: which of the team's lanes
    int h, b, chunk, bh, head_chunk;          // KV head, sequence, chunk of query rows; numbers of (b, h), (b, h, chunk)
    int row0, rows;                           // the chunk's first query row, and how many it has
    int split, splits;                        // of the blocks that share the tiles
    int tiles, tail, packed;                  // filled tiles, raw tokens behind them, tokens in tiles
    i64 start;                                // the sequence's first position
    float factor, key_gain;                   // of a score; of the keys' scales

    __device__ __forceinline__ Warp(const Arguments& a, Shared& shared) : a(a), shared(shared) {
        lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
        team = warp / TEAM, share = warp % TEAM, member = 32 * share + lane;
        h = blockIdx.y, split = blockIdx.x, splits = gridDim.x;
        const int chunks = a.all_rows <= NR ? 1 : (a.all_rows + NR - 1) / NR;
        b = a.all_rows <= NR ? blockIdx.z : blockIdx.z / chunks;
        chunk = blockIdx.z - b * chunks, bh = b * a.heads + h, head_chunk = bh * chunks + chunk;
        row0 = chunk * NR, rows = a.all_rows - row0 < NR ? a.all_rows - row0 : NR;
        factor = a.scaling * (SOFTCAP ? 1.f : LOG2E);
    }

    // Call previous_kernel_done() first: this reads what earlier kernels wrote.
    __device__ __forceinline__ void read_lengths() {
        tiles = a.tiles, tail = a.tail;
        if (a.counts) {
            tiles = a.counts[0];
            tail = a.counts[1] - 128 * tiles;
        }
        start = a.starts[b];
        packed = 128 * tiles;
        key_gain = a.key_gain ? a.key_gain[bh] : 1.f;
    }

    __device__ __forceinline__ u32 coded_rows() const { return shared_address(&shared.coded_rows); }

    __device__ __forceinline__ void team_sync() const {
        if constexpr (TEAM == 1)
            __syncwarp();
        else
            asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "n"(32 * TEAM) : "memory");
    }
    // Whether `mine` is true in any lane of the team. Includes a team_sync().
    __device__ __forceinline__ bool team_any(bool mine) const {
        u32 any = mine;
        if constexpr (TEAM == 1)
            any = __any_sync(~0u, mine), __syncwarp();
        else
            asm volatile("{ .reg .pred p, q; setp.ne.u32 p, %0, 0; bar.red.or.pred q, %1, %2, p; selp.u32 %0, 1, 0, q; }"
                         : "+r"(any) : "r"(1 + team), "n"(32 * TEAM) : "memory");
        return any;
    }

    // Sums over the tiles of warp w, [NR][OUTPUT_ROW]. They overwrite its team's tiles.
    __device__ __forceinline__ float* tile_sums(int w) const {
        return (float*)shared.rooms[w / TEAM] + w % TEAM * (NR * OUTPUT_ROW);
    }
    // The workspace: the blocks' results [blocks][NR][D], their maxima and sums [blocks][NR][2], and the warps' sums over raw
    // tokens [blocks][WARPS][NR][D].
    __device__ __forceinline__ i64 first_part() const { return (i64)head_chunk * splits * NR; }  // the row of the first split
    __device__ __forceinline__ i64 blocks() const { return (i64)gridDim.z * gridDim.y * splits; }
    __device__ __forceinline__ float* part_sums() const { return a.work + blocks() * (NR * D); }
    // Sums over raw tokens of warp w and row n, [D].
    __device__ __forceinline__ float* raw_sums(int w, int n) const {
#if WAIT_IN_SHARED
        float* waiting = &shared.waiting[0][0][0];
#else
        float* waiting = part_sums() + blocks() * (2 * NR) + ((i64)head_chunk * splits + split) * WARPS * (NR * D);
#endif
        return waiting + (w * NR + n) * D;
    }
};

// The largest x of the lanes that hold the same query rows, which are the lanes with the same t.
__device__ __forceinline__ float largest_of_rows(float x) {
#pragma unroll
    for (int d = 4; d < 32; d <<= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
    return x;
}
__device__ __forceinline__ float sum_of_rows(float x) {
#pragma unroll
    for (int d = 4; d < 32; d <<= 1) x += __shfl_xor_sync(~0u, x, d);
    return x;
}

__device__ __forceinline__ float cap(float s, float softcap) {
#if SOFTCAP
    // The hardware's tanh has an error of 2^-11. With a cap of 50, that would be .02 of a score.
    const float x = s / softcap, z = exp2_fast(2.f * LOG2E * fabsf(x));
    return softcap * LOG2E * copysignf(1.f - __fdividef(2.f, z + 1.f), x);
#else
    return s;
#endif
}
