// Attention of up to 4 NT query rows over packed tiles, sinks and tail, in one launch. decode/reference.py defines the
// result; source.py puts constants, instructions.cuh and levels.cuh above this text, cuda.py launches it.
//
// Levels are bytes (codebooks with a unit), so both products of attention run in the integer matrix units and no
// code is ever converted: a byte permutation looks four levels up at once. Queries and probabilities are 15-bit
// fixed-point numbers, split into a high and a low byte that fill neighbouring columns of the product; sums come back
// as floats because the accumulators start at the bit pattern of 1.5 * 2^23.
//
// A row of queries is coded, and a row of results put together, by one warp, which answers to no other: what a warp
// leaves for later goes to its own room. Three barriers of the block are all.
//
// A team of TEAM warps takes whole tiles of 128 tokens and copies them together; of their tokens each warp has its own
// 128 / TEAM, with a maximum and sums of its own. K is the big operand of S = K q^T (16 tokens x 32 channels), V^T that of
// O^T = V^T P^T (16 channels x 32 tokens). Which channel (token) stands where in a product does not matter as long as
// both operands agree, so lane = 4 g + t keeps the bytes that it loaded: its part of rows g and g + 8. The tokens of an
// S product are chosen as the V product that follows wants them; between the two P changes hands by movmatrix.

template <int G> using KeyRow = Row<KEY_SIZE[G], KEY_BITS[G]>;
__host__ __device__ constexpr int group_start(int group) { return group ? group_start(group - 1) + KEY_SIZE[group - 1] : 0; }
typedef Row<128, VALUE_BITS, TEAM> ValueRow;

__host__ __device__ constexpr int key_align(int offset, int bytes) {
    int x = KEY_ROW_BYTES | offset | bytes | 16;
    return x & -x;
}

constexpr int NR = 4 * NT;  // query rows of a block; column 2 t + {0, 1} of product nt holds row 4 nt + t, high and low
constexpr int UNITS = D / 16, CHANNEL_TILES = D / 16, VALUE_ROW_BYTES = 16 * VALUE_BITS;
constexpr int KEY_SCALE_BYTES = KEY_FORMAT ? 1 : 2, VALUE_SCALE_BYTES = VALUE_FORMAT ? 1 : 2;
// The tokens of an S product: the lane's own, index(0, 2 (g & 1), g >> 1), and a constant for the unit and the row half.
// Rows of keys that stand for one value of g >> 1 are followed by KEY_PAD bytes, so that lanes meet different banks.
constexpr int OWN_TOKENS = ValueRow::BYTES;
__host__ __device__ constexpr int key_place(int token) { return token * KEY_ROW_BYTES + token / OWN_TOKENS * KEY_PAD; }
// Every team has room for one tile's keys (codes, scales, mean) and one tile's values (codes, scales).
constexpr int KEY_BLOCK = 128 * KEY_ROW_BYTES, KEY_CODES = key_place(128), KEY_SCALES = 128 * KEY_GROUPS * KEY_SCALE_BYTES;
constexpr int VALUE_CODES = D * VALUE_ROW_BYTES, VALUE_SCALES = 128 * VALUE_SCALE_BYTES;
constexpr int KEY_ROOM = (KEY_CODES + KEY_SCALES + (HAS_MEAN ? 2 * D : 0) + 127) / 128 * 128;
constexpr int VALUE_ROOM = (VALUE_CODES + VALUE_SCALES + 127) / 128 * 128;
constexpr int ROOM = KEY_ROOM + VALUE_ROOM, THREADS = 32 * WARPS, TEAMS = WARPS / TEAM;
constexpr int OWN_UNITS = 8 / TEAM, KEY_UNROLL = 4;  // S products of a warp's tokens, and those of one turn of a loop

// A row of queries or of results belongs to one warp, OWN neighbouring channels to a lane.
constexpr int OWN = D / 32, OUTPUT_ROW = D + 8;  // a row of a warp's output, so that lanes meet different banks
static_assert(OWN_UNITS % KEY_UNROLL == 0, "whole turns");
// Sums over a tile's tokens, and over the channels of a key less its bias, stay in the mantissa of MAGIC.
static_assert(128 * 128 * (twice_bias(VALUE_BITS) > 127 ? 255 : 127) < 1 << 22 && D * 128 * 128 <= 1 << 22, "15-bit operands");
static_assert(TEAM * 4 * NR * OUTPUT_ROW <= ROOM, "the output of a team's warps takes the place of its tiles");

struct Shared {
    __align__(128) u8 rooms[TEAMS][ROOM];  // at the end: its warps' outputs in the values' coded domain
    u16 halves[NR][D];                  // queries times a power of two, in half precision
    float scratch[NR][D];               // of the warp that has the row
    u32 books[KEY_GROUPS + 1][8];       // what `Levels` reads, the values' last
#if WAIT_IN_SHARED
    float waiting[WARPS][NR][D];        // sums over raw tokens
#endif
    u32 coded[2 * NR][4][UNITS];        // 2 n + {0, 1}: high and low bytes of coded query n, as the lane parts want them
    u64 coded_rows;                     // a barrier that counts the lanes that have coded a query
    float query_unit[NR], half_unit[NR];
    float maximum[2][WARPS][NR], sum[2][WARPS][NR];  // over tiles, over raw tokens
};
static_assert(sizeof(Shared) == SHARED_BYTES, "source.py computes another size");
static_assert(WARPS % TEAM == 0 && WARPS >= 2 && WARPS <= 16, "whole teams, and a lane for every warp in each half of a warp");

__device__ __forceinline__ float cap(float s, float softcap) {
#if SOFTCAP
    // The hardware's tanh is good to 2^-11, which a cap of 50 makes .02 of a score.
    const float x = s / softcap, z = exp2_fast(2.f * LOG2E * fabsf(x));
    return softcap * LOG2E * copysignf(1.f - __fdividef(2.f, z + 1.f), x);
#else
    return s;
#endif
}

template <int FORMAT, int OFFSET>
__device__ __forceinline__ float load_scale(u32 lane) {  // FORMAT 0: halves; else the shift from byte to half
    u32 x[1];
    load_piece<FORMAT ? 1 : 2, 1, OFFSET>(x, lane);
    return half_to_float((u16)(x[0] << FORMAT));
}

// A block of memory to shared memory, by a whole team; every GROUP bytes are followed by PAD.
template <int BYTES, int GROUP = BYTES, int PAD = 0>
__device__ __forceinline__ void copy_block(u32 to, const u8* from, int member, u64 policy) {
    static_assert(BYTES % 16 == 0 && GROUP % 16 == 0, "whole pieces");
    constexpr int STEP = 512 * TEAM;
    const int at = 16 * member;
    from += at;
    to += at + (PAD && STEP % GROUP == 0 ? at / GROUP * PAD : 0);
    unrolled<0, (BYTES + STEP - 1) / STEP>([&]<int I>() {
        if ((I + 1) * STEP > BYTES && I * STEP + at >= BYTES) return;
        if constexpr (PAD == 0 || STEP % GROUP == 0 || GROUP % STEP == 0)
            copy16<I * STEP + I * STEP / GROUP * PAD, I * STEP>(to, from, policy);
        else
            copy16<I * STEP, I * STEP>(to + (I * STEP + at) / GROUP * PAD, from, policy);
    });
}

// N words of global memory, N even.
template <int N>
__device__ __forceinline__ void load_words(u32 (&x)[N], const u16* from) {
    if constexpr (N % 4 == 0)
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            uint4 v = ((const uint4*)from)[i / 4];
            x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
        }
    else
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            uint2 v = ((const uint2*)from)[i / 2];
            x[i] = v.x, x[i + 1] = v.y;
        }
}
template <int N>
__device__ __forceinline__ void store_words(u16* to, const u32 (&x)[N]) {
    if constexpr (N % 4 == 0)
#pragma unroll
        for (int i = 0; i < N; i += 4) ((uint4*)to)[i / 4] = make_uint4(x[i], x[i + 1], x[i + 2], x[i + 3]);
    else
#pragma unroll
        for (int i = 0; i < N; i += 2) ((uint2*)to)[i / 2] = make_uint2(x[i], x[i + 1]);
}

// ---------------------------------------------------------------- rows, OWN channels a lane

template <bool SHARED_BY_BLOCKS = false>  // past the first cache, which does not see what other blocks wrote
__device__ __forceinline__ void read_row(float (&x)[OWN], const float* from) {
    if constexpr (OWN == 2) {
        float2 v = SHARED_BY_BLOCKS ? __ldcg((const float2*)from) : *(const float2*)from;
        x[0] = v.x, x[1] = v.y;
    } else if constexpr (OWN == 3) {
#pragma unroll
        for (int i = 0; i < OWN; i++) x[i] = SHARED_BY_BLOCKS ? __ldcg(from + i) : from[i];
    } else {
#pragma unroll
        for (int i = 0; i < OWN; i += 4) {
            float4 v = SHARED_BY_BLOCKS ? __ldcg((const float4*)(from + i)) : *(const float4*)(from + i);
            x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
        }
    }
}
__device__ __forceinline__ void write_row(float* to, const float (&x)[OWN]) {
    if constexpr (OWN == 2)
        *(float2*)to = make_float2(x[0], x[1]);
    else if constexpr (OWN == 3)
#pragma unroll
        for (int i = 0; i < OWN; i++) to[i] = x[i];
    else
#pragma unroll
        for (int i = 0; i < OWN; i += 4) *(float4*)(to + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
}
__device__ __forceinline__ void read_row(u16 (&x)[OWN], const u16* from) {
    if constexpr (OWN == 3) {
#pragma unroll
        for (int i = 0; i < OWN; i++) x[i] = from[i];
    } else {
        u32 w[OWN / 2];
        if constexpr (OWN == 2)
            w[0] = *(const u32*)from;
        else
            load_words(w, from);
#pragma unroll
        for (int i = 0; i < OWN; i++) x[i] = (u16)(w[i / 2] >> 16 * (i % 2));
    }
}
__device__ __forceinline__ void write_row(u16* to, const u16 (&x)[OWN]) {
    if constexpr (OWN == 3)
#pragma unroll
        for (int i = 0; i < OWN; i++) to[i] = x[i];
    else
#pragma unroll
        for (int i = 0; i < OWN; i += 2) ((u32*)to)[i / 2] = x[i] | (u32)x[i + 1] << 16;
}

#if HADAMARD
// Sylvester's Hadamard matrix times every block of `size` channels, a power of two from OWN on; blocks begin at
// multiples of their size.
__device__ __forceinline__ void hadamard(float (&x)[OWN], int size, int lane) {
#pragma unroll
    for (int d = 1; d < OWN; d *= 2)
#pragma unroll
        for (int i = 0; i < OWN; i++)
            if (!(i & d)) {
                float a = x[i], b = x[i + d];
                x[i] = a + b;
                x[i + d] = a - b;
            }
#pragma unroll
    for (int d = 1; d < 32; d *= 2)
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            float other = __shfl_xor_sync(~0u, x[i], d);
            if (d * OWN < size) x[i] = lane & d ? other - x[i] : other + x[i];
        }
}
#endif

// Where the queries that meet the mean have a channel: of eight, one product takes 0, 1, 4, 5 and another 2, 3, 6, 7.
__device__ __forceinline__ int half_place(int channel) { return (channel & ~6) | (channel & 2) << 1 | (channel & 4) >> 1; }

// sum over j of x[j] matrix[j][own channel]; `room` is a row of shared memory.
__device__ __forceinline__ void multiply(float (&x)[OWN], const float* matrix, float* room, int lane) {
    __syncwarp();
    write_row(room + OWN * lane, x);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < OWN; i++) x[i] = 0.f;
#pragma unroll 8
    for (int j = 0; j < D; j++) {
        float column[OWN];
        read_row(column, matrix + j * D + OWN * lane);
#pragma unroll
        for (int i = 0; i < OWN; i++) x[i] = fmaf(room[j], column[i], x[i]);
    }
}

__device__ __forceinline__ int in_order(int bits) { return bits ^ (bits >> 31 & 0x7FFFFFFF); }  // of the floats
__device__ __forceinline__ float warp_maximum(float x) {
    int highest, mine = in_order(__float_as_int(x));
    asm volatile("redux.sync.max.s32 %0, %1, 0xffffffff;" : "=r"(highest) : "r"(mine));
    return __int_as_float(in_order(highest));
}
__device__ __forceinline__ u32 warp_largest(const float (&x)[OWN]) {  // as bits without a sign: a NaN is above all
    u32 mine = 0, largest;
#pragma unroll
    for (int i = 0; i < OWN; i++) mine = max(mine, __float_as_uint(fabsf(x[i])));
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(largest) : "r"(mine));
    return largest;
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
    return x;
}
// What a part with this maximum counts beside others; one that saw nothing counts nothing, but a NaN stays.
__device__ __forceinline__ float part_weight(float maximum, float sum, float top) {
    return maximum == NEVER && sum == sum ? 0.f : exp2_fast(maximum - top);
}
__device__ __forceinline__ int arrive(int* counter) {  // what was written before is seen by whoever sees this
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

// What accumulators of scores begin with, to be without the levels' bias: from the sums of a query's high and low bytes.
__device__ __forceinline__ void debias(int (&start)[4], const int (&sums)[4], int twice) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {  // both halves the same: four registers that a product can begin with as they are
        const int high = twice * sums[i], low = twice * sums[i + 1];
        start[i] = MAGIC_BITS - (high >> 1);
        start[i + 1] = MAGIC_BITS - (low >> 1) - 64 * (high & 1);  // a high unit is 128 low ones
    }
}
// BASE high + low, of whole numbers that stand in the mantissa of MAGIC; rounded once, since the first step is exact.
template <int BASE>
__device__ __forceinline__ float join_bytes(int high, int low) {
    return fmaf(__int_as_float(high), BASE, -(BASE + 1) * MAGIC) + __int_as_float(low);
}

// c = start + the first 2 PAIRS units of rows a and b (g and g + 8 of the big operand) times as many columns.
template <int PAIRS, class R>
__device__ __forceinline__ void multiply_levels(int (&c)[NT][4], const int (&start)[NT][4], const R& a, const R& b,
                                                const u32 (*columns)[NT], const Levels& book) {
    unrolled<0, R::ADDENDS * PAIRS>([&]<int J>() {
        constexpr int U = J / R::ADDENDS * 2, ADDEND = J % R::ADDENDS;
        u32 a0 = a.template levels<U, ADDEND>(book), a1 = b.template levels<U, ADDEND>(book);
        u32 a2 = a.template levels<U + 1, ADDEND>(book), a3 = b.template levels<U + 1, ADDEND>(book);
#pragma unroll
        for (int nt = 0; nt < NT; nt++)
            if constexpr (J == 0)
                mma32(c[nt], start[nt], a0, a1, a2, a3, columns[U][nt], columns[U + 1][nt]);
            else
                mma32(c[nt], a0, a1, a2, a3, columns[U][nt], columns[U + 1][nt]);
    });
}

// Scores of the two tokens that unit U of the values wants from this lane, without unit and mean. `rows` and `scales`:
// the lane's own token's in the slot.
template <int G, int U>
__device__ __forceinline__ void score(float (&s)[NT][2], u32 rows, u32 scales, const u32 (*q)[NT],
                                      const int (*start_at)[NT][4], const Levels* books, int t) {
    if constexpr (G < KEY_GROUPS) {
        typedef KeyRow<G> R;
        constexpr int ALIGN = key_align(KEY_OFFSET[G], R::BYTES);
        constexpr int LOW = ValueRow::index(U, 0, 0), HIGH = ValueRow::index(U, 1, 0);
        constexpr bool JOINED = R::WIDTH == 2 && R::BYTES == 2 && !R::PIECES;  // the parts of two rows fill a word
        R a, b;
        a.template load<ALIGN, key_place(LOW) + KEY_OFFSET[G]>(rows, t);
        b.template load<ALIGN, key_place(HIGH) + KEY_OFFSET[G]>(rows, t);
        int c[NT][4];
        if constexpr (JOINED) {
            Row<2 * R::UNITS * 16, KEY_BITS[G]> both;
            both.w[0] = a.w[0] + b.w[0] * 65536u;
            if constexpr (R::EXTRA) both.e[0] = a.e[0] + b.e[0] * 65536u;
            both.take_own_bits(t);
            u32 a0 = both.template levels<0>(books[G]), a1 = both.template levels<2>(books[G]);
            u32 a2 = both.template levels<1>(books[G]), a3 = both.template levels<3>(books[G]);
#pragma unroll
            for (int nt = 0; nt < NT; nt++) mma32(c[nt], start_at[G][nt], a0, a1, a2, a3, q[0][nt], q[1][nt]);
        } else {
            a.take_own_bits(t);
            b.take_own_bits(t);
            multiply_levels<R::UNITS / 2>(c, start_at[G], a, b, q, books[G]);
            if constexpr (R::UNITS % 2)
                unrolled<0, R::ADDENDS>([&]<int ADDEND>() {
                    constexpr int LAST = R::UNITS - 1;
                    u32 a0 = a.template levels<LAST, ADDEND>(books[G]), a1 = b.template levels<LAST, ADDEND>(books[G]);
#pragma unroll
                    for (int nt = 0; nt < NT; nt++) {
                        if constexpr (R::UNITS == 1 && ADDEND == 0)
#pragma unroll
                            for (int i = 0; i < 4; i++) c[nt][i] = start_at[G][nt][i];
                        mma16(c[nt], a0, a1, q[LAST][nt]);
                    }
                });
        }
        float first = load_scale<KEY_FORMAT, (128 * G + LOW) * KEY_SCALE_BYTES>(scales);
        float second = load_scale<KEY_FORMAT, (128 * G + HIGH) * KEY_SCALE_BYTES>(scales);
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
            const float x = join_bytes<128>(c[nt][0], c[nt][1]), y = join_bytes<128>(c[nt][2], c[nt][3]);
            s[nt][0] = G ? fmaf(x, first, s[nt][0]) : x * first;
            s[nt][1] = G ? fmaf(y, second, s[nt][1]) : y * second;
        }
        score<G + 1, U>(s, rows, scales, q + R::UNITS, start_at, books, t);
    }
}

// grid (splits, H, B * ceil(rows / NR)). The tail's newest `fresh` tokens are in new_keys and new_values, [B * H, fresh, D],
// and are written to the tail here. `counts`, where it is not null, holds {tiles, length} on the device and the tail
// is a ring of `ring` tokens; `work` takes the blocks' parts, `arrivals` (zeros, left as zeros) counts the blocks that are
// done with a row. A rotation is its signs [D] (HADAMARD), or a matrix [D, D], the keys' transposed.
// SPARSE: values of a tile are asked for when its scores are known, and only if one of its probabilities, relative to the
// largest that its warp has seen of that row, reaches 2^sparse, for any warp of the team; the last of the `arrivals` counts
// tiles that were not read.
extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_attention(const __grid_constant__ Arguments a) {
    const int sinks = a.sinks, fresh = a.fresh, ring = a.ring, tail_stride = a.tail_stride, queries = a.queries, all_rows = a.all_rows;
    const u16 *sink_keys = a.sink_keys, *sink_values = a.sink_values, *new_keys = a.new_keys, *new_values = a.new_values;
    u16 *tail_keys = a.tail_keys, *tail_values = a.tail_values;
    extern __shared__ __align__(128) char memory[];
    Shared& shared = *(Shared*)memory;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int h = blockIdx.y, split = blockIdx.x, splits = gridDim.x;
    const int chunks = all_rows <= NR ? 1 : (all_rows + NR - 1) / NR, b = all_rows <= NR ? blockIdx.z : blockIdx.z / chunks;
    const int chunk = blockIdx.z - b * chunks, bh = b * a.heads + h, head_chunk = bh * chunks + chunk;
    const int row0 = chunk * NR, rows = all_rows - row0 < NR ? all_rows - row0 : NR;
    const float softcap = a.softcap;
    int tiles = a.tiles, tail = a.tail;
    const u32 coded_rows = shared_address(&shared.coded_rows);
    if (threadIdx.x == 0) asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(coded_rows), "r"(32 * NR) : "memory");
    if (warp == 1)
        unrolled<0, KEY_GROUPS + 1>([&]<int I>() {
            if (lane == I)
#pragma unroll
                for (int i = 0; i < 6; i++) shared.books[I][i] = i == 4 ? 0x88888888u : i == 5 ? 0x7F7F7F7Fu : LEVELS[I][i];
        });
    __syncthreads();
    previous_kernel_done();
    if (a.counts) {
        tiles = a.counts[0];
        tail = a.counts[1] - 128 * tiles;
    }
    const i64 start = a.starts[b];
    const int packed = 128 * tiles;
    // `work`: the rows of every block, their maxima and sums, and what waits of every warp's raw tokens.
    const i64 parts = (i64)head_chunk * splits, blocks = (i64)gridDim.z * gridDim.y * splits;
    float* all_sums = a.work + blocks * (NR * D);
#if WAIT_IN_SHARED
    float* waiting = &shared.waiting[0][0][0];
#else
    float* waiting = all_sums + blocks * (2 * NR) + (parts + split) * WARPS * (NR * D);
#endif

    auto warp_output = [&](int w) { return (float*)shared.rooms[w / TEAM] + w % TEAM * (NR * OUTPUT_ROW); };

    // -------- copies ahead: a tile's values arrive while its keys are at work, the next tile's keys while they are
    const int team = warp / TEAM, share = warp % TEAM, member = 32 * share + lane;
    const int stride = splits * TEAMS, begin = team * splits + split;
    auto team_sync = [&] {
        if constexpr (TEAM == 1)
            __syncwarp();
        else
            asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "n"(32 * TEAM) : "memory");
    };
    auto team_any = [&](bool mine) -> bool {  // which is a team_sync() too
        u32 any = mine;
        if constexpr (TEAM == 1)
            any = __any_sync(~0u, mine), __syncwarp();
        else
            asm volatile("{ .reg .pred p, q; setp.ne.u32 p, %0, 0; bar.red.or.pred q, %1, %2, p; selp.u32 %0, 1, 0, q; }"
                         : "+r"(any) : "r"(1 + team), "n"(32 * TEAM) : "memory");
        return any;
    };
    const u32 key_room = shared_address(shared.rooms[team]), value_room = key_room + KEY_ROOM;
    const u64 policy = read_once_policy();
    auto copy_keys = [&](int tile) {
        if (tile < tiles) {
            const i64 slot = (i64)bh * a.capacity + tile;
            copy_block<KEY_BLOCK, OWN_TOKENS * KEY_ROW_BYTES, KEY_PAD>(key_room, a.key_codes + slot * KEY_BLOCK, member, policy);
            copy_block<KEY_SCALES>(key_room + KEY_CODES, a.key_scales + slot * KEY_SCALES, member, policy);
            if (HAS_MEAN) copy_block<2 * D>(key_room + KEY_CODES + KEY_SCALES, a.key_means + slot * 2 * D, member, policy);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    auto copy_values = [&](int tile) {
        if (tile < tiles) {
            const i64 slot = (i64)bh * a.capacity + tile;
            copy_block<VALUE_CODES>(value_room, a.value_codes + slot * VALUE_CODES, member, policy);
            copy_block<VALUE_SCALES>(value_room + VALUE_CODES, a.value_scales + slot * VALUE_SCALES, member, policy);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    auto copy_first_tile = [&] {
        copy_keys(begin);
        if (!SPARSE) copy_values(begin);
    };
    auto all_but_newest_arrived = [&] {
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        team_sync();
    };

    // -------- what is needed first is asked for first: queries, raw tokens, tiles
    const float factor = a.scaling * (SOFTCAP ? 1.f : LOG2E);
    const float gain = a.key_gain ? a.key_gain[bh] : 1.f;
    u16 own_query[OWN], own_order[OWN];
    float own_balance[OWN], own_signs[OWN];
    auto ask_for_query = [&](int n) {
        if (n < rows) read_row(own_query, a.query + ((i64)bh * all_rows + row0 + n) * D + OWN * lane);
        if (a.balance) read_row(own_balance, a.balance + (i64)bh * D + OWN * lane);
        if (a.order) read_row(own_order, a.order + (i64)bh * D + OWN * lane);
        if (HADAMARD) read_row(own_signs, a.key_turn + (i64)h * a.key_turn_stride + OWN * lane);
    };
    // Up to the rows of a block, the warps before the last code queries; raw tokens go to the last warps and few tiles to
    // the first, so that with enough of them nobody has two of these tasks.
    const int first_query = (2 * WARPS - 2 - warp) % WARPS;
    const int seats = splits * WARPS, first_raw = 16 * (seats - 1 - (warp * splits + split));
    const bool idle = first_query >= NR && first_raw >= sinks + tail;  // until a tile comes
    if (first_query < NR) ask_for_query(first_query);
    if (idle) copy_first_tile();
    const int oldest_fresh = sinks + tail - fresh;
    const int oldest = ring ? packed % ring : 0;  // where the tail's first token is
    auto kept = [&](int i, u16* recent) {
        int slot = oldest + i - sinks;
        if (ring && slot >= ring) slot -= ring;
        return recent + ((i64)bh * tail_stride + slot) * D;
    };
    auto place = [&](int i, const u16* sink, u16* recent, const u16* newest) -> const u16* {
        i = i < sinks + tail ? i : sinks + tail - 1;  // past the end: the last token again
        if (i < sinks) return sink + ((i64)bh * sinks + i) * D;
        return i < oldest_fresh ? kept(i, recent) : newest + ((i64)bh * fresh + i - oldest_fresh) * D;
    };
    constexpr int BLOCKS = D / 32, CHANNELS = D / 8;
    uint4 raw_query[BLOCKS], raw_keys[2][BLOCKS];
    u32 raw_values[4][CHANNELS / 2];
    auto ask_for_raw_keys = [&](int first) {
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            raw_query[i] = make_uint4(0, 0, 0, 0);
            if (g < rows) raw_query[i] = *(const uint4*)(a.query + ((i64)bh * all_rows + row0 + g) * D + 32 * i + 8 * t);
        }
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int i = 0; i < BLOCKS; i++)
                raw_keys[r][i] = *(const uint4*)(place(first + g + 8 * r, sink_keys, tail_keys, new_keys) + 32 * i + 8 * t);
    };
    auto ask_for_raw = [&](int first) {
        ask_for_raw_keys(first);
#pragma unroll
        for (int r = 0; r < 4; r++)
            load_words(raw_values[r], place(first + 2 * t + r % 2 + r / 2 * 8, sink_values, tail_values, new_values) + g * CHANNELS);
    };

    // -------- a query in the coded domain: q' = gain * unit * R diag(1 / balance) q, sorted, in 15 bits
    auto group_of = [](int c, int& size, float& unit) {  // the rotation is block-diagonal
#pragma unroll
        for (int group = 0, edge = 0; group < KEY_GROUPS; group++) {
            if (c >= edge) {
                size = KEY_SIZE[group];
                unit = KEY_UNIT[group];
            }
            edge += KEY_SIZE[group];
        }
    };
    auto code_query = [&](int n) {
        float x[OWN];
#pragma unroll
        for (int i = 0; i < OWN; i++) x[i] = n < rows ? raw_to_float(own_query[i]) : 0.f;
        if (HAS_MEAN) {
            // Times the power of two that takes the largest to 2^14 or more: as halves they lose nothing that counts beside it.
            constexpr u32 ONE = 1u << 23;  // of an exponent in a float's bits
            const u32 exponent = max(warp_largest(x) & 0x7F800000u, 15 * ONE);
            const float grow = __uint_as_float(268 * ONE - exponent);
#pragma unroll
            for (int i = 0; i < OWN; i++) shared.halves[n][half_place(OWN * lane + i)] = float_to_half(x[i] * grow);
            if (lane == 0) shared.half_unit[n] = __uint_as_float(exponent - 14 * ONE) * factor;
        }
#pragma unroll
        for (int i = 0; i < OWN; i++) x[i] *= factor;
        if (a.balance)
#pragma unroll
            for (int i = 0; i < OWN; i++) x[i] /= own_balance[i];
        if (a.order) {
            __syncwarp();
            write_row(&shared.scratch[n][OWN * lane], x);
            __syncwarp();
#pragma unroll
            for (int i = 0; i < OWN; i++) x[i] = shared.scratch[n][own_order[i]];
        }
        int size;
        float lead;
        group_of(OWN * lane, size, lead);
#if HADAMARD
#pragma unroll
        for (int i = 0; i < OWN; i++) x[i] *= own_signs[i];
        hadamard(x, size, lane);
        lead *= rsqrtf((float)size);
#else
        multiply(x, a.key_turn + (i64)h * a.key_turn_stride, shared.scratch[n], lane);
#endif
#pragma unroll
        for (int i = 0; i < OWN; i++) x[i] *= lead * gain;
        const float top = __uint_as_float(warp_largest(x));
        const float query_unit = (top < 1e-30f ? 1e-30f : top) / QUERY_TOP;  // unlike fmaxf, this keeps a NaN
        if (lane == 0) shared.query_unit[n] = query_unit;
        const float grow = 1.f / query_unit;
        unrolled<0, KEY_GROUPS>([&]<int G>() {
            static_assert(KeyRow<G>::found(), "find inverts index");
            constexpr int FIRST = group_start(G);
            if (OWN * lane < FIRST || OWN * lane >= FIRST + KEY_SIZE[G]) return;
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                int u, j, part;
                KeyRow<G>::find(OWN * lane + i - FIRST, u, j, part);
                const int v = __float2int_rn(x[i] * grow), high = (v + 64) >> 7;
                ((u8*)&shared.coded[2 * n][part][FIRST / 16 + u])[j] = (u8)high;
                ((u8*)&shared.coded[2 * n + 1][part][FIRST / 16 + u])[j] = (u8)(v - 128 * high);
            }
        });
        // Every lane for what it wrote itself, which compute-sanitizer's racecheck can follow.
        asm volatile("{ .reg .b64 x; mbarrier.arrive.shared.b64 x, [%0]; }" ::"r"(coded_rows) : "memory");
    };

    // -------- sinks and tail, 16 tokens at a time: S = K q^T, O^T = V^T P^T in the model's dtype
    auto score_raw = [&](float (&s)[4], int first) {  // of token first + g + r / 2 * 8 and row 2 t + r % 2
        s[0] = s[1] = s[2] = s[3] = 0.f;
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            const uint4 x = raw_query[i];
            mma_raw(s, raw_keys[0][i].x, raw_keys[1][i].x, raw_keys[0][i].y, raw_keys[1][i].y, x.x, x.y);
            mma_raw(s, raw_keys[0][i].z, raw_keys[1][i].z, raw_keys[0][i].w, raw_keys[1][i].w, x.z, x.w);
        }
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int i = first + g + r / 2 * 8;
            bool sink = i < sinks;
            i64 position = sink ? start + i : (i64)packed + i - sinks;
            bool seen = i < sinks + tail && (sink ? position < packed : position >= start);
#if MASKED
            seen = seen && a.mask[(i64)b * a.mask_stride + position];
#endif
            // Query row n is token n % queries of the newest `queries`.
            seen = seen && (sink || i - sinks <= tail - queries + (row0 + 2 * t + r % 2) % queries);
            s[r] = seen ? cap(s[r] * factor, softcap) : NEVER;
        }
    };
    if (first_raw < sinks + tail) ask_for_raw(first_raw);
#pragma unroll
    for (int n = 0; n < NR; n += WARPS) {
        if (n + first_query >= NR) break;
        if (n) ask_for_query(n + first_query);
        code_query(n + first_query);
    }
    if (!idle) {
        // Others' copies keep the memory busy until then; more of them would hold up the queries.
        if (first_query >= NR) wait_once(coded_rows);
        copy_first_tile();
    }
    bool has_raw = false;
    {
        float o[CHANNELS / 2][4];  // [j][r]: channel g * CHANNELS + 2 j + r / 2 of row 2 t + r % 2
        float maximum[2] = {NEVER, NEVER}, sum[2] = {0.f, 0.f};
        for (int first = first_raw; first < sinks + tail; first += 16 * seats) {
            if (first != first_raw) ask_for_raw(first);
            auto is_fresh = [&](int i) { return i >= sinks && i >= oldest_fresh && i < sinks + tail; };
            if (first + 16 > oldest_fresh && chunk == 0) {
#pragma unroll
                for (int r = 0; r < 2; r++)
                    if (is_fresh(first + g + 8 * r))
#pragma unroll
                        for (int i = 0; i < BLOCKS; i++) *(uint4*)(kept(first + g + 8 * r, tail_keys) + 32 * i + 8 * t) = raw_keys[r][i];
#pragma unroll
                for (int r = 0; r < 4; r++)
                    if (is_fresh(first + 2 * t + r % 2 + r / 2 * 8))
                        store_words(kept(first + 2 * t + r % 2 + r / 2 * 8, tail_values) + g * CHANNELS, raw_values[r]);
            }
            float s[4], p[4], fade[2];
            score_raw(s, first);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float top = fmaxf(maximum[r], fmaxf(s[r], s[r + 2]));
#pragma unroll
                for (int d = 4; d < 32; d <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
                fade[r] = exp2_fast(maximum[r] - top);
                maximum[r] = top;
                p[r] = s[r] == NEVER ? 0.f : exp2_fast(s[r] - top);
                p[r + 2] = s[r + 2] == NEVER ? 0.f : exp2_fast(s[r + 2] - top);
                sum[r] = sum[r] * fade[r] + p[r] + p[r + 2];
            }
            const u32 b0 = transpose8x8(pack_raw(p[0], p[1])), b1 = transpose8x8(pack_raw(p[2], p[3]));
#pragma unroll
            for (int j = 0; j < CHANNELS / 2; j++) {
#pragma unroll
                for (int r = 0; r < 4; r++) o[j][r] = has_raw ? o[j][r] * fade[r % 2] : 0.f;
                const u32 (&v)[4][CHANNELS / 2] = raw_values;
                mma_raw(o[j], permute(v[0][j], v[1][j], 0x5410), permute(v[0][j], v[1][j], 0x7632),
                        permute(v[2][j], v[3][j], 0x5410), permute(v[2][j], v[3][j], 0x7632), b0, b1);
            }
            has_raw = true;
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
#pragma unroll
            for (int d = 4; d < 32; d <<= 1) sum[r] += __shfl_xor_sync(~0u, sum[r], d);
            if (g == 0 && 2 * t + r < NR) {
                shared.maximum[1][warp][2 * t + r] = maximum[r];
                shared.sum[1][warp][2 * t + r] = sum[r];
            }
        }
        if (has_raw)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                if (2 * t + r >= NR) break;
                float* mine = waiting + (warp * NR + 2 * t + r) * D + g * CHANNELS;
#pragma unroll
                for (int j = 0; j < CHANNELS / 2; j++) *(float2*)(mine + 2 * j) = make_float2(o[j][r], o[j][2 + r]);
            }
    }

    // Over tiles: o is P times the levels' bytes and p_sum P alone, times the values' scales and in units of
    // p_top / PROBABILITY_TOP. p_peak is the largest p_top so far, beside the present maximum, and no p_top is below 1e-20 of
    // it or 1e-30. sum is P without scales.
    float o[CHANNEL_TILES][NT][2], p_sum[NT], p_top[NT], p_peak[NT], maximum[NT], sum[NT];
    int zeros[NT][4];  // a product's accumulators that stand for 0
#pragma unroll
    for (int nt = 0; nt < NT; nt++) {
        maximum[nt] = NEVER;
        sum[nt] = p_sum[nt] = p_top[nt] = p_peak[nt] = 0.f;
#pragma unroll
        for (int i = 0; i < 4; i++) zeros[nt][i] = MAGIC_BITS;
#pragma unroll
        for (int m = 0; m < CHANNEL_TILES; m++) o[m][nt][0] = o[m][nt][1] = 0.f;
    }
#if SPARSE
    // What the first raw tokens score, sinks above all, is known before the first tile: most tiles are then below it.
    const float sparse = a.sparse;
    int unread = 0;
    {
        float s[4] = {NEVER, NEVER, NEVER, NEVER};
        if (sinks + tail) {
            ask_for_raw_keys(0);
            score_raw(s, 0);
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            s[r] = fmaxf(s[r], s[r + 2]);
#pragma unroll
            for (int d = 4; d < 32; d <<= 1) s[r] = fmaxf(s[r], __shfl_xor_sync(~0u, s[r], d));
        }
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
            const float even = __shfl_sync(~0u, s[0], 2 * nt + (t >> 1)), odd = __shfl_sync(~0u, s[1], 2 * nt + (t >> 1));
            maximum[nt] = t & 1 ? odd : even;
        }
    }
#endif

    wait_once(coded_rows);

    // -------- tiles
    u32 q[UNITS][NT];
#pragma unroll
    for (int nt = 0; nt < NT; nt++)  // rows 4 nt + g / 2, byte g % 2
#pragma unroll
        for (int u = 0; u < UNITS; u += 2) {
            uint2 x = *(const uint2*)&shared.coded[8 * nt + g][t][u];
            q[u][nt] = x.x, q[u + 1][nt] = x.y;
        }
    int start_at[KEY_GROUPS][NT][4];  // what accumulators begin with: MAGIC_BITS less the levels' bias
    float unit[NT];
#pragma unroll
    for (int nt = 0; nt < NT; nt++) {
        unit[nt] = shared.query_unit[4 * nt + t];
#pragma unroll
        for (int group = 0, u = 0; group < KEY_GROUPS; u += KEY_SIZE[group++] / 16) {
            int c[4] = {0, 0, 0, 0};
#pragma unroll
            for (int i = 0; i < KEY_SIZE[group] / 16; i++) mma16(c, ONES, ONES, q[u + i][nt]);
            debias(start_at[group][nt], c, twice_bias(KEY_BITS[group]));
        }
    }
    Levels key_levels[KEY_GROUPS], value_levels;
#pragma unroll
    for (int group = 0; group < KEY_GROUPS; group++) key_levels[group].read(shared_address(shared.books[group]));
    value_levels.read(shared_address(shared.books[KEY_GROUPS]));
#if HAS_MEAN
    // Columns 2 t and 2 t + 1 of a product with the mean are query rows t and 4 + t; with NT = 1, both are row t.
    constexpr bool HELD = D <= 128;
    const uint4* half_row = (const uint4*)shared.halves[(g >> 1) + (g & 1) * (NR - 4)] + t;
    uint4 half_query[HELD ? D / 32 : 1];
    if (HELD)
#pragma unroll
        for (int i = 0; i < D / 32; i++) half_query[i] = half_row[4 * i];
    float half_unit[NT];
#pragma unroll
    for (int nt = 0; nt < NT; nt++) half_unit[nt] = shared.half_unit[4 * nt + t];
#endif
    constexpr int OWN_STEP = ValueRow::index(0, 2, 0);
    const int within = (g & 1) * OWN_STEP + share * ValueRow::index(OWN_UNITS, 0, 0);
    const int own_token = (g >> 1) * OWN_TOKENS + within;
    for (int tile = begin; tile < tiles; tile += stride) {
#if SPARSE
        asm volatile("cp.async.wait_all;" ::: "memory");
        team_sync();
#else
        all_but_newest_arrived();
#endif
        float base[NT] = {};  // of all scores of a row: q . mean
#if HAS_MEAN
        {
            float c[2][4] = {};
            unrolled<0, D / 32>([&]<int I>() {
                u32 x[4];
                load_piece<16, 16, KEY_CODES + KEY_SCALES + 64 * I>(x, key_room + 16 * t);
                const uint4 y = HELD ? half_query[I] : half_row[4 * I];
                mma_half(c[0], x[0], x[1], x[2], x[3], y.x, y.y);  // rows 0 to 7, in which x[0] and x[2] stand, are wanted
                mma_half(c[1], x[0], x[1], x[2], x[3], y.z, y.w);  // rows 8 to 15
            });
#pragma unroll
            for (int nt = 0; nt < NT; nt++) base[nt] = (c[0][nt] + c[1][2 + nt]) * half_unit[nt];
        }
#endif
        float s[OWN_UNITS][NT][2];
        u32 key_rows = key_room + key_place((g >> 1) * OWN_TOKENS) + within * KEY_ROW_BYTES;
        u32 scales = key_room + KEY_CODES + own_token * KEY_SCALE_BYTES;
        // Not unrolled whole: short contexts wait for code that is run for the first time.
#pragma unroll 1
        for (int turn = 0; turn < OWN_UNITS / KEY_UNROLL; turn++) {
            float x[KEY_UNROLL][NT][2];
            unrolled<0, KEY_UNROLL>([&]<int U>() { score<0, U>(x[U], key_rows, scales, q, start_at, key_levels, t); });
#pragma unroll
            for (int nt = 0; nt < NT; nt++)
#pragma unroll
                for (int r = 0; r < 2; r++) {  // the newest scores enter behind the others
#pragma unroll
                    for (int u = 0; u < OWN_UNITS - KEY_UNROLL; u++) s[u][nt][r] = s[u + KEY_UNROLL][nt][r];
#pragma unroll
                    for (int u = 0; u < KEY_UNROLL; u++) s[OWN_UNITS - KEY_UNROLL + u][nt][r] = x[u][nt][r];
                }
            constexpr int NEXT = ValueRow::index(KEY_UNROLL, 0, 0);
            static_assert(KEY_UNROLL == OWN_UNITS || NEXT < OWN_TOKENS, "turns differ by whole rows of the lane's own tokens");
            key_rows += NEXT * KEY_ROW_BYTES;
            scales += NEXT * KEY_SCALE_BYTES;
        }
        // A score is s * unit + base; with SOFTCAP it is s, once the next lines have made it one.
        auto score_of = [&](float x, int nt, float less) { return SOFTCAP ? x - less : fmaf(x, unit[nt], base[nt] - less); };
        const i64 first = (i64)tile * 128;
        if (MASKED || SOFTCAP || first < start + sinks) {
            unrolled<0, OWN_UNITS>([&]<int U>() {
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    i64 position = first + own_token + ValueRow::index(U, r, 0);
                    bool seen = position >= start + sinks;
#if MASKED
                    seen = seen && a.mask[(i64)b * a.mask_stride + position];
#endif
#pragma unroll
                    for (int nt = 0; nt < NT; nt++) {
                        if (SOFTCAP) s[U][nt][r] = cap(fmaf(s[U][nt][r], unit[nt], base[nt]), softcap);
                        if (!seen) s[U][nt][r] = minus_infinity();
                    }
                }
            });
        }
        float highest[NT];
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
            highest[nt] = fmaxf(s[0][nt][0], s[0][nt][1]);
#pragma unroll
            for (int u = 1; u < OWN_UNITS; u++) highest[nt] = fmaxf(highest[nt], fmaxf(s[u][nt][0], s[u][nt][1]));
            highest[nt] = score_of(highest[nt], nt, 0.f);
        }
#if SPARSE
        bool wanted = false;
#pragma unroll
        for (int nt = 0; nt < NT; nt++) wanted = wanted || (4 * nt + t < rows && !(highest[nt] < maximum[nt] + sparse));
        wanted = team_any(wanted);
        if (wanted) copy_values(tile);
#else
        team_sync();  // a copy ahead writes to the slot that was read last
#endif
        copy_keys(tile + stride);
#if SPARSE
        if (!wanted) {  // no maximum has changed
#pragma unroll
            for (int nt = 0; nt < NT; nt++)
#pragma unroll
                for (int u = 0; u < OWN_UNITS; u++)
                    sum[nt] += exp2_fast(score_of(s[u][nt][0], nt, maximum[nt])) + exp2_fast(score_of(s[u][nt][1], nt, maximum[nt]));
            unread++;
            continue;
        }
#endif
        float fade[NT];
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
#pragma unroll
            for (int d = 4; d < 32; d <<= 1) highest[nt] = fmaxf(highest[nt], __shfl_xor_sync(~0u, highest[nt], d));
            highest[nt] = fmaxf(highest[nt], maximum[nt]);
            fade[nt] = exp2_fast(maximum[nt] - highest[nt]);
            maximum[nt] = highest[nt];
            sum[nt] *= fade[nt];
        }
        all_but_newest_arrived();
        // Probabilities times the values' scales, in units of 1 / PROBABILITY_TOP of the tile's largest. A scale that is NaN
        // marks a token that was not finite: fixed point would make a number of it, so that the unit must stay NaN. What
        // is nothing beside earlier tiles gets no finer unit: their sums, which are in it too, would be infinite.
        float largest[NT];
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
            p_peak[nt] *= fade[nt];
            largest[nt] = fmaf(p_peak[nt], 1e-20f, 1e-30f);
        }
        const u32 value_scale = value_room + VALUE_CODES + own_token * VALUE_SCALE_BYTES;
        unrolled<0, 2 * OWN_UNITS>([&]<int I>() {
            constexpr int U = I / 2, R = I % 2;
            float scale = load_scale<VALUE_FORMAT, ValueRow::index(U, R, 0) * VALUE_SCALE_BYTES>(value_scale);
#pragma unroll
            for (int nt = 0; nt < NT; nt++) {
                const float p = exp2_fast(score_of(s[U][nt][R], nt, maximum[nt]));
                sum[nt] += p;
                s[U][nt][R] = p * scale;
                largest[nt] = larger_or_nan(largest[nt], s[U][nt][R]);
            }
        });
        u32 p[OWN_UNITS][NT];
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
#pragma unroll
            for (int d = 4; d < 32; d <<= 1) largest[nt] = larger_or_nan(largest[nt], __shfl_xor_sync(~0u, largest[nt], d));
            const float inverse = __fdividef(1.f, largest[nt]), grow = PROBABILITY_TOP * inverse;
            fade[nt] *= p_top[nt] * inverse;
            p_top[nt] = largest[nt];
            p_peak[nt] = larger_or_nan(p_peak[nt], largest[nt]);
#pragma unroll
            for (int u = 0; u < OWN_UNITS; u++) {
                // Half a high byte more, so that the low one, with its top bit turned, is what is left of a rounded high one.
                u32 x = __float_as_uint(fmaf(s[u][nt][0], grow, 8388736.f)), y = __float_as_uint(fmaf(s[u][nt][1], grow, 8388736.f));
                p[u][nt] = transpose8x8(permute(x, y, 0x4051) ^ 0x80800000u);
            }
        }
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {  // every row of this product: the sum of the column's bytes
            int c[4];
#pragma unroll
            for (int u = 0; u < OWN_UNITS; u += 2)
                mma32(c, u ? c : zeros[nt], ONES, ONES, ONES, ONES, p[u][nt], p[u + 1][nt]);
            p_sum[nt] = fmaf(p_sum[nt], fade[nt], join_bytes<256>(c[0], c[1]));
        }
        const u32 value_rows = value_room + g * VALUE_ROW_BYTES + share * ValueRow::LOADED;
        unrolled<0, CHANNEL_TILES>([&]<int M>() {
            ValueRow x, y;
            x.template load<16, 16 * M * VALUE_ROW_BYTES>(value_rows, t);
            y.template load<16, (16 * M + 8) * VALUE_ROW_BYTES>(value_rows, t);
            x.take_own_bits(t);
            y.take_own_bits(t);
            int c[NT][4];
            multiply_levels<OWN_UNITS / 2>(c, zeros, x, y, p, value_levels);
#pragma unroll
            for (int nt = 0; nt < NT; nt++)
#pragma unroll
                for (int r = 0; r < 2; r++)
                    o[M][nt][r] = fmaf(o[M][nt][r], fade[nt], join_bytes<256>(c[nt][2 * r], c[nt][2 * r + 1]));
        });
        team_sync();
        if (!SPARSE) copy_values(tile + stride);
    }
#if SPARSE
    if (member == 0 && unread) atomicAdd(a.arrivals + ARRIVALS - 1, unread);
#endif
    asm volatile("cp.async.wait_all;" ::: "memory");
    team_sync();  // of the team's tiles nothing is needed any more
    float* output = warp_output(warp);
#pragma unroll
    for (int nt = 0; nt < NT; nt++) {
#pragma unroll
        for (int d = 4; d < 32; d <<= 1) sum[nt] += __shfl_xor_sync(~0u, sum[nt], d);
        if (g == 0) {
            shared.maximum[0][warp][4 * nt + t] = maximum[nt];
            shared.sum[0][warp][4 * nt + t] = sum[nt];
        }
        const float p_unit = p_top[nt] * (1.f / PROBABILITY_TOP);
#pragma unroll
        for (int m = 0; m < CHANNEL_TILES; m++)
#pragma unroll
            for (int r = 0; r < 2; r++)
                output[(4 * nt + t) * OUTPUT_ROW + 16 * m + g + 8 * r] =
                    fmaf(p_sum[nt], -.5f * twice_bias(VALUE_BITS), o[m][nt][r]) * p_unit;
    }
    float value_signs[OWN];
    if (HADAMARD && warp < NR) read_row(value_signs, a.value_turn + (i64)h * a.value_turn_stride + OWN * lane);
    const float value_lead = VALUE_UNIT * (a.value_gain ? a.value_gain[bh] : 1.f);
    __syncthreads();

    // -------- a row of the block: the warps' parts added up, the packed ones turned back
    for (int n = warp; n < rows; n += WARPS) {
        float x[OWN] = {}, raw[OWN] = {};
        constexpr int AHEAD = WARPS < 32 / OWN ? WARPS : 32 / OWN;  // parts that are asked for at once
        float packed[AHEAD][OWN];
        auto ask_for_packed = [&](int first) {
#pragma unroll
            for (int j = 0; j < AHEAD; j++)
                if (first + j < WARPS) read_row(packed[j], warp_output(first + j) + n * OUTPUT_ROW + OWN * lane);
        };
        ask_for_packed(0);
        // Lane w stands for what warp w had of the tiles, lane 16 + w for its raw tokens.
        const int kind = lane >> 4, of = lane & 15;
        const float part_maximum = of < WARPS ? shared.maximum[kind][of][n] : NEVER;
        const float part_sum = of < WARPS ? shared.sum[kind][of][n] : 0.f;
        float top = warp_maximum(part_maximum);
        float weight = part_weight(part_maximum, part_sum, top);
        float total = warp_sum(weight * part_sum);
#pragma unroll
        for (int first = 0; first < WARPS; first += AHEAD) {
            if (first) ask_for_packed(first);
#pragma unroll
            for (int j = 0; j < AHEAD; j++)
                if (first + j < WARPS) {
                    const float mine = __shfl_sync(~0u, weight, first + j);
#pragma unroll
                    for (int i = 0; i < OWN; i++) x[i] = fmaf(mine, packed[j][i], x[i]);
                }
        }
        for (u32 left = __ballot_sync(~0u, weight != 0.f) >> 16; left; left &= left - 1) {
            const int w = __ffs(left) - 1;
            const float mine = __shfl_sync(~0u, weight, 16 + w);
            float part[OWN];
            read_row(part, waiting + (w * NR + n) * D + OWN * lane);
#pragma unroll
            for (int i = 0; i < OWN; i++) raw[i] = fmaf(mine, part[i], raw[i]);
        }
#if HADAMARD
        hadamard(x, D, lane);
        constexpr float SHRINK = D == 64 ? .125f : D == 128 ? .08838834764831845f : .0625f;  // 1 / sqrt(D)
#pragma unroll
        for (int i = 0; i < OWN; i++) x[i] = fmaf(x[i], value_signs[i] * (value_lead * SHRINK), raw[i]);
#else
        multiply(x, a.value_turn + (i64)h * a.value_turn_stride, shared.scratch[n], lane);
#pragma unroll
        for (int i = 0; i < OWN; i++) x[i] = fmaf(x[i], value_lead, raw[i]);
#endif
        if (splits > 1) {  // the last block to have this row adds up what all have
            const i64 first_part = parts * NR + n;
            write_row(a.work + (first_part + split * NR) * D + OWN * lane, x);
            if (lane == 0) *(float2*)(all_sums + 2 * (first_part + split * NR)) = make_float2(top, total);
            __syncwarp();
            int before = 0;
            int* arrival = a.arrivals + (i64)head_chunk * NR + n;
            if (lane == 0) before = arrive(arrival);
            if (__shfl_sync(~0u, before, 0) != splits - 1) continue;
            __syncwarp();
            if (lane == 0) *arrival = 0;
            constexpr int MANY = OWN <= 4 ? 16 : 8;
            float part[MANY][OWN];
            const float* from = a.work + first_part * D + OWN * lane;
            auto ask_for_parts = [&](int first) {
#pragma unroll
                for (int j = 0; j < MANY; j++)
                    if (first + j < splits) read_row<true>(part[j], from + j * (NR * D));
                from += MANY * NR * D;
            };
            float2 sums[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                sums[j] = make_float2(NEVER, 0.f);
                if (lane + 32 * j < splits) sums[j] = __ldcg((const float2*)(all_sums + 2 * (first_part + (lane + 32 * j) * NR)));
            }
            ask_for_parts(0);
            top = warp_maximum(fmaxf(sums[0].x, sums[1].x));
            float weights[2];
#pragma unroll
            for (int j = 0; j < 2; j++) weights[j] = part_weight(sums[j].x, sums[j].y, top);
            total = warp_sum(weights[0] * sums[0].y + weights[1] * sums[1].y);
#pragma unroll
            for (int i = 0; i < OWN; i++) x[i] = 0.f;
#pragma unroll 1
            for (int first = 0; first < splits; first += MANY) {
                if (first) ask_for_parts(first);
#pragma unroll
                for (int j = 0; j < MANY; j++) {
                    const float mine = __shfl_sync(~0u, first < 32 ? weights[0] : weights[1], (first & 31) + j);
                    if (first + j < splits)
#pragma unroll
                        for (int i = 0; i < OWN; i++) x[i] = fmaf(mine, part[j][i], x[i]);
                }
            }
        }
        float shrink = 1.f;
        if (a.s_aux) {  // a logit that takes probability and carries no value
            const float logit = a.s_aux[h * (all_rows / queries) + (row0 + n) / queries] * LOG2E, larger = fmaxf(top, logit);
            shrink = exp2_fast(top - larger);
            total = total * shrink + exp2_fast(logit - larger);
        }
        u16 out[OWN];
#pragma unroll
        for (int i = 0; i < OWN; i++) out[i] = float_to_raw(total == 0.f ? 0.f : x[i] * shrink / total);
        write_row(a.result + ((i64)bh * all_rows + row0 + n) * D + OWN * lane, out);
    }
}
