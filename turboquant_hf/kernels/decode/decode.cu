// Attention of up to 8 query rows over packed tiles, sinks and tail. decode/reference.py defines the result,
// cuda.py writes the constants above this text and launches it.
//
// A warp takes whole tiles of 128 tokens. Codes go from global memory straight into the registers of a matrix
// product: K is the big operand of S = K q^T (16 tokens x 16 channels), V^T that of O^T = V^T P^T (16 channels x 16
// tokens). Which channel (token) stands where in a product does not matter as long as both operands agree, so a
// lane keeps what it loaded: lane = 4 g + t owns bytes [t nb, (t + 1) nb) of rows g and g + 8. The tokens of an S
// product are chosen as the V product that follows wants them; between the two P changes hands once, by movmatrix.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

// ---------------------------------------------------------------- half2 arithmetic without headers

__device__ __forceinline__ u32 hfma2(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
__device__ __forceinline__ u32 hmul2(u32 a, u32 b) {
    u32 d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
__device__ __forceinline__ u32 pack_half2(float low, float high) {
    u32 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
__device__ __forceinline__ float half_to_float(u16 x) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x));
    return f;
}
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ u32 transpose8x8(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ float raw_to_float(const void* p, i64 i) {
#if RAW_BF16
    return __uint_as_float((u32)((const u16*)p)[i] << 16);
#else
    return half_to_float(((const u16*)p)[i]);
#endif
}

constexpr float NEVER = -1e30f;  // a score that is not seen; finite, so that differences stay numbers
constexpr float LOG2E = 1.4426950408889634f;

// ---------------------------------------------------------------- from bytes to half2

__host__ __device__ constexpr int main_width(int bits) { return bits >= 8 ? 8 : bits >= 4 ? 4 : bits >= 2 ? 2 : 1; }
__host__ __device__ constexpr int extra_width(int bits) { return bits - main_width(bits); }  // 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2

template <int SIZE>
__device__ __forceinline__ void copy_ahead(u32 to, const void* from) {
    if constexpr (SIZE == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(SIZE) : "memory");
}

// A lane's piece of BYTES (2, or a multiple of 4) at an address that is a multiple of ALIGN. In shared memory the 32
// lanes' pieces lie side by side, chunk by chunk; two bytes travel in the aligned word around them.
template <int BYTES, int ALIGN>
struct Piece {
    static constexpr int CHUNK = BYTES % 16 == 0 && ALIGN % 16 == 0 ? 16 : BYTES % 8 == 0 && ALIGN % 8 == 0 ? 8 : 4;
    static constexpr int WORDS = BYTES >= 4 ? BYTES / 4 : 1;
    static constexpr int STAGED = 32 * 4 * WORDS;  // bytes of shared memory
    static_assert(BYTES == 2 || BYTES % 4 == 0, "a lane owns 2 bytes or whole words");

    static __device__ __forceinline__ void stage(u32 to, const u8* from, int lane) {
        if (BYTES < 4) from = (const u8*)((i64)from & ~3ll);
#pragma unroll
        for (int i = 0; i < 4 * WORDS / CHUNK; i++) copy_ahead<CHUNK>(to + i * 32 * CHUNK + lane * CHUNK, from + i * CHUNK);
    }
    static __device__ __forceinline__ void fetch(u32 (&out)[WORDS], u32 at, const u8* from, int lane) {
#pragma unroll
        for (int i = 0; i < 4 * WORDS / CHUNK; i++) {
            u32 x = at + i * 32 * CHUNK + lane * CHUNK;
            if constexpr (CHUNK == 16)
                asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                    : "=r"(out[4 * i]), "=r"(out[4 * i + 1]), "=r"(out[4 * i + 2]), "=r"(out[4 * i + 3]) : "r"(x));
            else if constexpr (CHUNK == 8)
                asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(out[2 * i]), "=r"(out[2 * i + 1]) : "r"(x));
            else
                asm volatile("ld.shared.u32 %0, [%1];" : "=r"(out[i]) : "r"(x));
        }
        if constexpr (BYTES < 4) out[0] = out[0] >> (8 * ((i64)from & 3)) & 0xFFFFu;
    }
};

// Codes of field F in the low byte of each half of `w`, as (2 code + 1) / 2^(bits - 1) - 2, exactly: with the
// exponent of 1024 the field is 1024 + (code << S) + (1 << S - 1), and one fused multiply-add takes it home. `e` holds
// the high bits of the codes, P0 places further up.
template <int P0, int P1, int F>
__device__ __forceinline__ u32 centred_codes(u32 w, u32 e) {
    constexpr int B = P0 + P1, S = F == 0 ? 1 : P0 * F;
    if (F == 0) {
        w <<= 1;
        e <<= 1;
    }
    constexpr u32 M = (((1u << P0) - 1) << S) * 0x10001u;
    u32 h = (w & M) | (0x64006400u | (1u << (S - 1)) * 0x10001u);
    if constexpr (P1 > 0) {
        constexpr u32 E = (((1u << P1) - 1) << (S + P0)) * 0x10001u;
        h |= e & E;
    }
    constexpr u32 factor = (u32)(15 + 2 - S - B) << 10;
    constexpr u32 offset = 0x8000u | (u32)(15 + 12 - S - B) << 10 | 1u << (S + B - 1);
    return hfma2(h, factor * 0x10001u, offset * 0x10001u);
}

// x (1 + c3 x^2 + c5 x^4); the leading coefficient is in the query or the output.
template <int TERMS>
__device__ __forceinline__ u32 levels(u32 x, u32 c3, u32 c5) {
    if constexpr (TERMS <= 1) return x;
    u32 square = hmul2(x, x);
    u32 factor = TERMS == 2 ? hfma2(square, c3, 0x3C003C00u) : hfma2(square, hfma2(square, c5, c3), 0x3C003C00u);
    return hmul2(x, factor);
}

// One row of N codes: what a lane owns of it, and its k-steps of two half2 each.
template <int N, int BITS, int TERMS>
struct Row {
    static constexpr int P0 = main_width(BITS), P1 = extra_width(BITS);
    static constexpr int BYTES = N * P0 / 32;  // a lane's part of the main plane
    static constexpr int MAIN = N * P0 / 8, EXTRA = N * P1 / 8;
    static constexpr int WORDS = BYTES >= 4 ? BYTES / 4 : 1;
    static constexpr int FIELDS = 8 / P0;
    static constexpr int STEPS = N / 16;
    static constexpr int RATIO = P1 ? P0 / P1 : 1;  // bytes of the main plane for one of the extra plane
    static_assert(BYTES >= 2 && N % 16 == 0, "a lane owns at least two bytes of a row");
    u32 w[WORDS], e[WORDS];

    // ALIGN: what the address of the row's first byte is a multiple of.
    template <int ALIGN> using Part = Piece<BYTES, (BYTES < ALIGN ? BYTES : ALIGN)>;
    static constexpr int STAGED = 32 * 4 * WORDS * (P1 ? 2 : 1);
    static constexpr int PARTS = 4 / RATIO;  // the extra plane is this many lane parts long

    template <int ALIGN>
    static __device__ __forceinline__ void stage(u32 to, const u8* row, int lane) {
        int t = lane & 3;
        Part<ALIGN>::stage(to, row + t * BYTES, lane);
        if constexpr (P1 > 0) Part<ALIGN>::stage(to + STAGED / 2, row + MAIN + (t % PARTS) * BYTES, lane);
    }
    template <int ALIGN>
    __device__ __forceinline__ void fetch(u32 at, const u8* row, int lane) {
        int t = lane & 3;
        Part<ALIGN>::fetch(w, at, row + t * BYTES, lane);
        if constexpr (P1 > 0) {
            Part<ALIGN>::fetch(e, at + STAGED / 2, row + MAIN + (t % PARTS) * BYTES, lane);
#pragma unroll
            for (int i = 0; i < WORDS; i++) {
                if (BYTES < 4) e[i] = spread(e[i]);
                e[i] >>= P1 * (t / PARTS);  // now field f stands where the main one does
            }
        }
        if (BYTES < 4) w[0] = spread(w[0]);
    }
    // Two bytes, one to each half.
    static __device__ __forceinline__ u32 spread(u32 x) { return (x & 0xFFu) | (x & 0xFF00u) << 8; }

    // The two half2 of k-step `step` (a compile-time constant after unrolling).
    template <int STEP>
    __device__ __forceinline__ void get(u32& first, u32& second, u32 c3, u32 c5) const {
        if constexpr (BYTES >= 4) {
            constexpr int I = STEP / FIELDS, F = STEP % FIELDS;
            u32 extra = P1 ? e[I] : 0;
            first = levels<TERMS>(centred_codes<P0, P1, F>(w[I], extra << P0), c3, c5);
            second = levels<TERMS>(centred_codes<P0, P1, F>(w[I] >> 8, extra >> (8 - P0)), c3, c5);
        } else {
            u32 extra = P1 ? e[0] << P0 : 0;
            first = levels<TERMS>(centred_codes<P0, P1, 2 * STEP>(w[0], extra), c3, c5);
            second = levels<TERMS>(centred_codes<P0, P1, 2 * STEP + 1>(w[0], extra), c3, c5);
        }
    }

    // Index in the row of element `i` (0..3: first.low, first.high, second.low, second.high) of k-step STEP.
    static __host__ __device__ __forceinline__ constexpr int index(int step, int i, int t) {
        if (BYTES >= 4) {
            int byte = i == 0 ? 0 : i == 1 ? 2 : i == 2 ? 1 : 3;
            return t * BYTES + 4 * (step / FIELDS) + byte + (step % FIELDS) * MAIN;
        }
        return t * BYTES + (i & 1) + (2 * step + (i >> 1)) * MAIN;
    }
};

template <int I, int N, class Fn>
__device__ __forceinline__ void unrolled(Fn&& fn) {
    if constexpr (I < N) {
        fn.template operator()<I>();
        unrolled<I + 1, N>(fn);
    }
}

// ---------------------------------------------------------------- keys: a tuple of groups

template <int G> using KeyRow = Row<KEY_SIZE[G], KEY_BITS[G], KEY_TERMS[G]>;

template <int G>
struct KeyRows {
    KeyRow<G> row;
    KeyRows<G + 1> rest;
};
template <>
struct KeyRows<KEY_GROUPS> {};

__host__ __device__ constexpr int key_align(int offset) {
    int x = KEY_ROW_BYTES | offset | 32;
    return x & -x;
}
__host__ __device__ constexpr int key_staged(int groups) {  // bytes of shared memory of the first groups of 32 lanes' rows
    int sum = 0;
    for (int i = 0; i < groups; i++) {
        int bytes = KEY_SIZE[i] * main_width(KEY_BITS[i]) / 32;
        sum += 32 * (bytes < 4 ? 4 : bytes) * (extra_width(KEY_BITS[i]) ? 2 : 1);
    }
    return sum;
}
template <int G>
__device__ __forceinline__ void stage_keys(u32 to, const u8* token, int lane) {
    if constexpr (G < KEY_GROUPS) {
        KeyRow<G>::template stage<key_align(KEY_OFFSET[G])>(to + key_staged(G), token + KEY_OFFSET[G], lane);
        stage_keys<G + 1>(to, token, lane);
    }
}
template <int G>
__device__ __forceinline__ void fetch_keys(KeyRows<G>& rows, u32 at, const u8* token, int lane) {
    if constexpr (G < KEY_GROUPS) {
        rows.row.template fetch<key_align(KEY_OFFSET[G])>(at + key_staged(G), token + KEY_OFFSET[G], lane);
        fetch_keys<G + 1>(rows.rest, at, token, lane);
    }
}

// S += scale * K q^T for 16 tokens: `a` holds the rows g, `b` the rows g + 8 of the product.
template <int G>
__device__ __forceinline__ void score(float (&s)[4], const KeyRows<G>& a, const KeyRows<G>& b, const u32 (*q)[2],
                                      const float (*scale)[2]) {
    if constexpr (G < KEY_GROUPS) {
        float c[4] = {0.f, 0.f, 0.f, 0.f};
        unrolled<0, KeyRow<G>::STEPS>([&]<int STEP>() {
            u32 a0, a1, a2, a3;
            a.row.template get<STEP>(a0, a2, KEY_C3[G], KEY_C5[G]);
            b.row.template get<STEP>(a1, a3, KEY_C3[G], KEY_C5[G]);
            mma(c, a0, a1, a2, a3, q[STEP][0], q[STEP][1]);
        });
        s[0] += c[0] * scale[0][0];
        s[1] += c[1] * scale[0][0];
        s[2] += c[2] * scale[0][1];
        s[3] += c[3] * scale[0][1];
        score<G + 1>(s, a.rest, b.rest, q + KeyRow<G>::STEPS, scale + 1);
    }
}

template <int G>
__device__ __forceinline__ void load_query(u32 (*q)[2], const u16 (*rotated)[D + 8], int g, int t, int base) {
    if constexpr (G < KEY_GROUPS) {
#pragma unroll
        for (int step = 0; step < KeyRow<G>::STEPS; step++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 low = rotated[g][base + KeyRow<G>::index(step, 2 * half, t)];
                u32 high = rotated[g][base + KeyRow<G>::index(step, 2 * half + 1, t)];
                q[step][half] = low | high << 16;
            }
        load_query<G + 1>(q + KeyRow<G>::STEPS, rotated, g, t, base + KEY_SIZE[G]);
    }
}

// Scales of two neighbouring tokens. FORMAT 0: halves; otherwise the left shift that makes a byte a half.
template <int FORMAT>
using ScalePair = Piece<FORMAT ? 2 : 4, FORMAT ? 2 : 4>;

template <int FORMAT>
__device__ __forceinline__ void fetch_scales(float (&out)[2], u32 at, const u8* from, int lane) {
    u32 x[1];
    ScalePair<FORMAT>::fetch(x, at, from, lane);
    out[0] = half_to_float(FORMAT ? (u16)((x[0] & 0xFF) << FORMAT) : (u16)x[0]);
    out[1] = half_to_float(FORMAT ? (u16)((x[0] >> 8) << FORMAT) : (u16)(x[0] >> 16));
}

typedef Row<128, VALUE_BITS, VALUE_TERMS> ValueRow;
constexpr int VALUE_ROW_BYTES = 16 * VALUE_BITS;
constexpr int QUERY_STEPS = D / 16, CHANNEL_TILES = D / 16;

// Layout of a slot: a tile's keys (16 rows, scales, mean) or its values (rows, scales).
constexpr int SCALE_PAIR = 128, MEAN_WORDS = (D + 63) / 64;
constexpr int KEY_ROWS = key_staged(KEY_GROUPS), KEY_SCALES = 16 * KEY_ROWS;
constexpr int KEY_MEAN = KEY_SCALES + 8 * KEY_GROUPS * SCALE_PAIR;
constexpr int KEY_SLOT = KEY_MEAN + (HAS_MEAN ? 128 * MEAN_WORDS : 0);
constexpr int VALUE_SCALES = 2 * CHANNEL_TILES * ValueRow::STAGED, VALUE_SLOT = VALUE_SCALES + 8 * SCALE_PAIR;
constexpr int SLOT = KEY_SLOT > VALUE_SLOT ? KEY_SLOT : VALUE_SLOT;
constexpr int KEY_SCALE_BYTES = KEY_FORMAT ? 1 : 2, VALUE_SCALE_BYTES = VALUE_FORMAT ? 1 : 2;

// First of the two neighbouring tokens that lane group g holds in the S product of V's k-step `step`.
__device__ __forceinline__ int token_of(int step, int g) {
    return ValueRow::index(step, g & 1, g >> 1);
}

struct Shared {
    float raw[8][D];        // queries times scaling * log2(e)
    u16 rotated[8][D + 8];  // the same in the coded domain, halves
    float maximum[WARPS][8], sum[WARPS][8];
    union {
        float sorted[D][8];
        float output[WARPS][8][D + 1];
        __align__(16) u8 slots[WARPS][SLOTS][SLOT];
    };
};
static_assert(sizeof(Shared) == SHARED_BYTES, "cuda.py computes another size");


__device__ __forceinline__ float cap(float s, float softcap) {
#if SOFTCAP
    return softcap * LOG2E * tanhf(s / softcap);
#else
    return s;
#endif
}

// ---------------------------------------------------------------- the split kernel
//
// grid (splits, B * H). The first `raw_splits` attend to sinks and tail, the others share the tiles.
// Leaves for each split and query row: output[D] (raw splits: in the model's domain, others: the values' coded one),
// maximum, sum.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) decode_split(
    const void* query, const float* rotation_t, const u16* order, const float* balance, const float* key_gain,
    const u8* key_codes, const u8* key_scales, const u16* key_means, const u8* value_codes, const u8* value_scales,
    const void* sink_keys, const void* sink_values, const void* tail_keys, const void* tail_values,
    const i64* starts, const u8* mask, float* part_output, float* part_sums,
    int heads, int rows, int queries, int tiles, int capacity, int sinks, int tail, int tail_stride, int rotation_stride,
    int mask_stride, int raw_splits, int scaling_bits, int softcap_bits) {
    extern __shared__ __align__(16) char memory[];
    Shared& shared = *(Shared*)memory;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int bh = blockIdx.y, b = bh / heads, h = bh % heads;
    const int split = blockIdx.x, splits = gridDim.x;
    const float scaling = __int_as_float(scaling_bits), softcap = __int_as_float(softcap_bits);
    const float factor = scaling * (SOFTCAP ? 1.f : LOG2E);
    const i64 start = starts[b];

    for (int i = threadIdx.x; i < 8 * D; i += blockDim.x) {
        int n = i / D, c = i % D;
        shared.raw[n][c] = n < rows ? raw_to_float(query, ((i64)bh * rows + n) * D + c) * factor : 0.f;
    }
    __syncthreads();

    float* out = part_output + ((i64)bh * splits + split) * rows * D;
    float* sums = part_sums + ((i64)bh * splits + split) * rows * 2;

    if (split < raw_splits) {  // sinks and tail: a warp a token, lanes over channels
        constexpr int C = (D + 31) / 32;
        float maximum[8], sum[8], o[8][C];
#pragma unroll
        for (int n = 0; n < 8; n++) {
            maximum[n] = NEVER;
            sum[n] = 0.f;
#pragma unroll
            for (int c = 0; c < C; c++) o[n][c] = 0.f;
        }
        const int packed = tiles * 128;
        for (int i = split * WARPS + warp; i < sinks + tail; i += raw_splits * WARPS) {
            bool sink = i < sinks;
            i64 position = sink ? start + i : (i64)packed + i - sinks;
            bool seen = sink ? position < packed : position >= start;
#if MASKED
            seen = seen && mask[(i64)b * mask_stride + position];
#endif
            if (!seen) continue;
            const void* keys = sink ? sink_keys : tail_keys;
            const void* values = sink ? sink_values : tail_values;
            i64 base = sink ? ((i64)bh * sinks + i) * D : ((i64)bh * tail_stride + i - sinks) * D;
            float k[C], v[C];
#pragma unroll
            for (int c = 0; c < C; c++) {
                int channel = lane + 32 * c;
                k[c] = channel < D ? raw_to_float(keys, base + channel) : 0.f;
                v[c] = channel < D ? raw_to_float(values, base + channel) : 0.f;
            }
#pragma unroll
            for (int n = 0; n < 8; n++) {
                if (n >= ROWS) break;
                float s = 0.f;
#pragma unroll
                for (int c = 0; c < C; c++) s += k[c] * (lane + 32 * c < D ? shared.raw[n][lane + 32 * c] : 0.f);
#pragma unroll
                for (int d = 16; d; d >>= 1) s += __shfl_xor_sync(~0u, s, d);
                // Query row n is token n % queries of the newest `queries`.
                if (!sink && i - sinks > tail - queries + n % queries) continue;
                s = cap(s, softcap);
                float larger = fmaxf(maximum[n], s), fade = exp2_fast(maximum[n] - larger), p = exp2_fast(s - larger);
                maximum[n] = larger;
                sum[n] = sum[n] * fade + p;
#pragma unroll
                for (int c = 0; c < C; c++) o[n][c] = o[n][c] * fade + p * v[c];
            }
        }
#pragma unroll
        for (int n = 0; n < 8; n++) {
            if (lane == 0) {
                shared.maximum[warp][n] = maximum[n];
                shared.sum[warp][n] = sum[n];
            }
#pragma unroll
            for (int c = 0; c < C; c++)
                if (lane + 32 * c < D) shared.output[warp][n][lane + 32 * c] = o[n][c];
        }
    } else {
        // q' = gain * R diag(1 / balance) q, sorted; the leading coefficient of each group's levels comes with it.
        const float gain = key_gain ? key_gain[bh] : 1.f;
        for (int j = threadIdx.x; j < D; j += blockDim.x) {
            int source = order ? order[(i64)bh * D + j] : j;
            float r = balance ? 1.f / balance[(i64)bh * D + source] : 1.f;
#pragma unroll
            for (int n = 0; n < 8; n++) shared.sorted[j][n] = r * shared.raw[n][source];
        }
        __syncthreads();
        for (int c = threadIdx.x; c < D; c += blockDim.x) {
            float acc[8] = {};
            const float* column = rotation_t + (i64)h * rotation_stride + c;
#pragma unroll 32
            for (int j = 0; j < D; j++) {
                float r = column[j * D];
#pragma unroll
                for (int n = 0; n < 8; n++) acc[n] += r * shared.sorted[j][n];
            }
            float lead = gain;
            int edge = 0;
#pragma unroll
            for (int group = 0; group < KEY_GROUPS; group++) {
                if (c >= edge) lead = gain * KEY_LEAD[group];
                edge += KEY_SIZE[group];
            }
#pragma unroll
            for (int n = 0; n < 8; n++) shared.rotated[n][c] = (u16)pack_half2(acc[n] * lead, 0.f);
        }
        __syncthreads();
        u32 q[QUERY_STEPS][2];
        load_query<0>(q, shared.rotated, g, t, 0);

        float o[CHANNEL_TILES][4];
#pragma unroll
        for (int m = 0; m < CHANNEL_TILES; m++) o[m][0] = o[m][1] = o[m][2] = o[m][3] = 0.f;
        float maximum[2] = {NEVER, NEVER}, sum[2] = {0.f, 0.f};
        const int stride = (splits - raw_splits) * WARPS, begin = (split - raw_splits) * WARPS + warp;
        u32 ring;
        asm("{ .reg .u64 x; cvta.to.shared.u64 x, %1; cvt.u32.u64 %0, x; }" : "=r"(ring) : "l"(&shared.slots[warp][0][0]));

        auto stage = [&](int job) {  // an even job is a tile's keys, the next its values
            const int tile = begin + (job >> 1) * stride;
            if (tile < tiles) {
                const i64 slot = (i64)bh * capacity + tile;
                const u32 to = ring + (u32)(job % SLOTS) * SLOT;
                if (job & 1) {
                    const u8* codes = value_codes + slot * (D * VALUE_ROW_BYTES);
                    const u8* scales = value_scales + slot * (128 * VALUE_SCALE_BYTES);
#pragma unroll
                    for (int row = 0; row < 2 * CHANNEL_TILES; row++)
                        ValueRow::template stage<16>(to + row * ValueRow::STAGED, codes + (8 * row + g) * VALUE_ROW_BYTES, lane);
#pragma unroll
                    for (int step = 0; step < 8; step++)
                        ScalePair<VALUE_FORMAT>::stage(to + VALUE_SCALES + step * SCALE_PAIR,
                                                       scales + token_of(step, g) * VALUE_SCALE_BYTES, lane);
                } else {
                    const u8* codes = key_codes + slot * (128 * KEY_ROW_BYTES);
                    const u8* scales = key_scales + slot * (128 * KEY_GROUPS * KEY_SCALE_BYTES);
#pragma unroll
                    for (int step = 0; step < 8; step++) {
                        const u8* token = codes + token_of(step, g) * KEY_ROW_BYTES;
                        stage_keys<0>(to + 2 * step * KEY_ROWS, token, lane);
                        stage_keys<0>(to + (2 * step + 1) * KEY_ROWS, token + KEY_ROW_BYTES, lane);
#pragma unroll
                        for (int group = 0; group < KEY_GROUPS; group++)
                            ScalePair<KEY_FORMAT>::stage(to + KEY_SCALES + (step * KEY_GROUPS + group) * SCALE_PAIR,
                                                         scales + (group * 128 + token_of(step, g)) * KEY_SCALE_BYTES, lane);
                    }
                    if (HAS_MEAN)
#pragma unroll
                        for (int c = 0; c < MEAN_WORDS; c++)
                            if (2 * lane + 64 * c < D)
                                copy_ahead<4>(to + KEY_MEAN + c * 128 + lane * 4, key_means + slot * D + 2 * lane + 64 * c);
                }
            }
            asm volatile("cp.async.commit_group;" ::: "memory");
        };
        auto arrived = [] { asm volatile("cp.async.wait_group %0;" ::"n"(SLOTS - 1) : "memory"); };

        __syncthreads();  // the slots lie over `sorted`
#pragma unroll
        for (int job = 0; job < SLOTS - 1; job++) stage(job);
        int job = 0;
        for (int tile = begin; tile < tiles; tile += stride) {
            stage(job + SLOTS - 1);
            arrived();
            u32 at = ring + (u32)(job % SLOTS) * SLOT;
            job++;
            const i64 slot = (i64)bh * capacity + tile;
            const u8* codes = key_codes + slot * (128 * KEY_ROW_BYTES);
            const u8* scales = key_scales + slot * (128 * KEY_GROUPS * KEY_SCALE_BYTES);

            float base[2] = {0.f, 0.f};
#if HAS_MEAN
            {  // q . mean: lanes over channels, then 8 sums folded over the warp at once
                float acc[8] = {};
#pragma unroll
                for (int c = 0; c < MEAN_WORDS; c++) {
                    int channel = 2 * lane + 64 * c;
                    if (channel < D) {
                        u32 x;
                        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(at + KEY_MEAN + c * 128 + lane * 4));
                        float low = half_to_float((u16)x), high = half_to_float((u16)(x >> 16));
#pragma unroll
                        for (int n = 0; n < ROWS; n++) acc[n] += low * shared.raw[n][channel] + high * shared.raw[n][channel + 1];
                    }
                }
#pragma unroll
                for (int width = 4, bit = 16; width; width >>= 1, bit >>= 1)
#pragma unroll
                    for (int n = 0; n < width; n++) {
                        float mine = lane & bit ? acc[n + width] : acc[n], other = lane & bit ? acc[n] : acc[n + width];
                        acc[n] = mine + __shfl_xor_sync(~0u, other, bit);
                    }
                acc[0] += __shfl_xor_sync(~0u, acc[0], 2);
                acc[0] += __shfl_xor_sync(~0u, acc[0], 1);
                // Row n now lies in the lanes whose bits 4, 3, 2 are n's bits 2, 1, 0.
                base[0] = __shfl_sync(~0u, acc[0], (2 * t) << 2);
                base[1] = __shfl_sync(~0u, acc[0], (2 * t + 1) << 2);
            }
#endif
            float s[8][4];
#pragma unroll
            for (int step = 0; step < 8; step++) {
                KeyRows<0> a, c;
                const u8* token = codes + token_of(step, g) * KEY_ROW_BYTES;
                fetch_keys<0>(a, at + 2 * step * KEY_ROWS, token, lane);
                fetch_keys<0>(c, at + (2 * step + 1) * KEY_ROWS, token + KEY_ROW_BYTES, lane);
                float scale[KEY_GROUPS][2];
#pragma unroll
                for (int group = 0; group < KEY_GROUPS; group++)
                    fetch_scales<KEY_FORMAT>(scale[group], at + KEY_SCALES + (step * KEY_GROUPS + group) * SCALE_PAIR,
                                             scales + (group * 128 + token_of(step, g)) * KEY_SCALE_BYTES, lane);
                s[step][0] = s[step][2] = base[0];
                s[step][1] = s[step][3] = base[1];
                score<0>(s[step], a, c, q, scale);
            }
            const i64 first = (i64)tile * 128;
            if (MASKED || SOFTCAP || first < start + sinks) {
#pragma unroll
                for (int step = 0; step < 8; step++)
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        i64 position = first + token_of(step, g) + r;
                        bool seen = position >= start + sinks;
#if MASKED
                        seen = seen && mask[(i64)b * mask_stride + position];
#endif
                        s[step][2 * r] = seen ? cap(s[step][2 * r], softcap) : NEVER;
                        s[step][2 * r + 1] = seen ? cap(s[step][2 * r + 1], softcap) : NEVER;
                    }
            }
            // Online softmax over the tile; a thread holds rows 2t and 2t + 1 of the queries.
            float fade[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float top = maximum[r];
#pragma unroll
                for (int step = 0; step < 8; step++) top = fmaxf(top, fmaxf(s[step][r], s[step][r + 2]));
#pragma unroll
                for (int d = 4; d < 32; d <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
                fade[r] = exp2_fast(maximum[r] - top);
                maximum[r] = top;
                sum[r] *= fade[r];
            }
            stage(job + SLOTS - 1);
            arrived();
            at = ring + (u32)(job % SLOTS) * SLOT;
            job++;
            u32 p[8][2];
            const u8* vscales = value_scales + slot * (128 * VALUE_SCALE_BYTES);
#pragma unroll
            for (int step = 0; step < 8; step++) {
                float scale[2];
                fetch_scales<VALUE_FORMAT>(scale, at + VALUE_SCALES + step * SCALE_PAIR,
                                           vscales + token_of(step, g) * VALUE_SCALE_BYTES, lane);
                float e0 = exp2_fast(s[step][0] - maximum[0]), e1 = exp2_fast(s[step][1] - maximum[1]);
                float e2 = exp2_fast(s[step][2] - maximum[0]), e3 = exp2_fast(s[step][3] - maximum[1]);
                sum[0] += e0 + e2;
                sum[1] += e1 + e3;
                p[step][0] = transpose8x8(pack_half2(e0 * scale[0], e1 * scale[0]));
                p[step][1] = transpose8x8(pack_half2(e2 * scale[1], e3 * scale[1]));
            }
#pragma unroll
            for (int m = 0; m < CHANNEL_TILES; m++) {
                ValueRow a, c;
                a.template fetch<16>(at + 2 * m * ValueRow::STAGED, nullptr, lane);
                c.template fetch<16>(at + (2 * m + 1) * ValueRow::STAGED, nullptr, lane);
                o[m][0] *= fade[0];
                o[m][1] *= fade[1];
                o[m][2] *= fade[0];
                o[m][3] *= fade[1];
                unrolled<0, 8>([&]<int STEP>() {
                    u32 a0, a1, a2, a3;
                    a.template get<STEP>(a0, a2, VALUE_C3, VALUE_C5);
                    c.template get<STEP>(a1, a3, VALUE_C3, VALUE_C5);
                    mma(o[m], a0, a1, a2, a3, p[STEP][0], p[STEP][1]);
                });
            }
        }
        asm volatile("cp.async.wait_all;" ::: "memory");
        __syncthreads();  // `output` lies over everybody's slots
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int d = 4; d < 32; d <<= 1) sum[r] += __shfl_xor_sync(~0u, sum[r], d);
        if (g == 0)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                shared.maximum[warp][2 * t + r] = maximum[r];
                shared.sum[warp][2 * t + r] = sum[r];
            }
#pragma unroll
        for (int m = 0; m < CHANNEL_TILES; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) shared.output[warp][2 * t + (i & 1)][16 * m + g + 8 * (i >> 1)] = o[m][i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * D; i += blockDim.x) {
        int n = i / D, c = i % D;
        float top = NEVER, sum = 0.f, o = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, shared.maximum[w][n]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float weight = exp2_fast(shared.maximum[w][n] - top);
            sum += weight * shared.sum[w][n];
            o += weight * shared.output[w][n][c];
        }
        out[i] = o;
        if (c == 0) {
            sums[2 * n] = top;
            sums[2 * n + 1] = top == NEVER ? 0.f : sum;
        }
    }
}

// ---------------------------------------------------------------- the merge kernel
//
// grid (rows, B * H), D threads: weigh the splits, turn the packed part back, add sinks and tail, write the result.
extern "C" __global__ void __launch_bounds__(D) decode_merge(
    const float* part_output, const float* part_sums, const float* rotation, const float* value_gain, const float* s_aux,
    void* result, int heads, int rows, int queries, int splits, int raw_splits, int rotation_stride) {
    __shared__ float coded[D];
    const int n = blockIdx.x, bh = blockIdx.y, h = bh % heads, c = threadIdx.x;
    const float* sums = part_sums + ((i64)bh * splits * rows + n) * 2;
    const float* parts = part_output + ((i64)bh * splits * rows + n) * D + c;
    float top = NEVER;
    for (int i = 0; i < splits; i++)
        if (sums[(i64)i * rows * 2 + 1] > 0.f) top = fmaxf(top, sums[(i64)i * rows * 2]);
    float aux = 0.f;
    if (s_aux) {
        float logit = s_aux[h * (rows / queries) + n / queries] * LOG2E;
        top = fmaxf(top, logit);
        aux = exp2f(logit - top);
    }
    float total = aux, packed = 0.f, raw = 0.f;
#pragma unroll 4
    for (int i = 0; i < splits; i++) {
        float sum = sums[(i64)i * rows * 2 + 1];
        float weight = sum > 0.f ? exp2f(sums[(i64)i * rows * 2] - top) : 0.f;
        total += weight * sum;
        float o = sum > 0.f ? parts[(i64)i * rows * D] : 0.f;
        if (i < raw_splits)
            raw += weight * o;
        else
            packed += weight * o;
    }
    coded[c] = packed * VALUE_LEAD * (value_gain ? value_gain[bh] : 1.f);
    __syncthreads();
    const float* matrix = rotation + (i64)h * rotation_stride + c;
    float x = 0.f;
#pragma unroll 8
    for (int i = 0; i < D; i++) x += coded[i] * matrix[i * D];
    x = total > 0.f ? (x + raw) / total : 0.f;
    i64 where = ((i64)bh * rows + n) * D + c;
#if RAW_BF16
    u32 bits = __float_as_uint(x);
    ((u16*)result)[where] = x != x ? 0x7FFF : (u16)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
#else
    ((u16*)result)[where] = (u16)pack_half2(x, 0.f);
#endif
}
