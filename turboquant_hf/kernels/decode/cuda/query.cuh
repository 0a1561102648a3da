// Phase 1: a warp turns a row of queries into the coded domain of the keys, q' = unit * gain * R diag(1 / balance) q with
// the channels sorted, as 15-bit numbers whose high and low bytes go to shared memory.

// The place of a channel in `halves`. Of eight channels, one product with the mean takes channels 0, 1, 4, 5 and another 2, 3,
// 6, 7. The four channels of a product therefore stand side by side.
__device__ __forceinline__ int half_place(int channel) { return (channel & ~6) | (channel & 2) << 1 | (channel & 4) >> 1; }

// Whether all channels of a lane belong to one group.
__host__ __device__ constexpr bool lanes_are_whole(int group = 0) {
    return group == KEY_GROUPS || (group_start(group) % OWN == 0 && lanes_are_whole(group + 1));
}
static_assert(lanes_are_whole() || !HADAMARD, "a lane needs one size for its additions");

// Size and unit of the key group that holds coded channel c. The rotation is block-diagonal over the groups.
__device__ __forceinline__ void group_of(int c, int& size, float& unit) {
#pragma unroll
    for (int group = 0, edge = 0; group < KEY_GROUPS; group++) {
        if (c >= edge) {
            size = KEY_SIZE[group];
            unit = KEY_UNIT[group];
        }
        edge += KEY_SIZE[group];
    }
}

// What a lane loads for its channels of one row. These arrays are not members of `Warp`: a compiler keeps a structure with an
// array in one piece until all loops are unrolled, and then generates more code.
struct QueryLoads {
    u16 query[OWN], order[OWN];
    float balance[OWN], signs[OWN];
};

// Load row n of the chunk, and the transform of its head.
__device__ __forceinline__ void ask_for_query(const Warp& w, QueryLoads& own, int n) {
    const Arguments& a = w.a;
    const int first = OWN * w.lane;
    if (n < w.rows) read_row(own.query, a.query + ((i64)w.bh * a.all_rows + w.row0 + n) * D + first);
    if (a.balance) read_row(own.balance, a.balance + (i64)w.bh * D + first);
    if (a.order) read_row(own.order, a.order + (i64)w.bh * D + first);
    if (HADAMARD) read_row(own.signs, a.key_turn + (i64)w.h * a.key_turn_stride + first);
}

// The row in half precision, for the products with the mean. It is multiplied by the power of two that brings its largest
// number between 2^14 and 2^15 (or below, if that number is less than 2^-112). What half precision then loses is negligible
// beside the largest number.
__device__ __forceinline__ void keep_halves(const Warp& w, int n, const float (&x)[OWN]) {
    constexpr u32 ONE = 1u << 23;  // one step of the exponent in a float's bits
    const u32 exponent = max(warp_largest(x) & 0x7F800000u, 15 * ONE);
    const float grow = __uint_as_float(268 * ONE - exponent);
#pragma unroll
    for (int i = 0; i < OWN; i++) w.shared.halves[n][half_place(OWN * w.lane + i)] = float_to_half(x[i] * grow);
    if (w.lane == 0) w.shared.half_unit[n] = __uint_as_float(exponent - 14 * ONE) * w.factor;
}

// Scale x, divide it by the balance, sort its channels, rotate it, and multiply it by unit and gain.
__device__ __forceinline__ void transform_query(const Warp& w, const QueryLoads& own, int n, float (&x)[OWN]) {
    Shared& shared = w.shared;
#pragma unroll
    for (int i = 0; i < OWN; i++) x[i] *= w.factor;
    if (w.a.balance)
#pragma unroll
        for (int i = 0; i < OWN; i++) x[i] /= own.balance[i];
    if (w.a.order) {
        __syncwarp();
        write_row(&shared.scratch[n][OWN * w.lane], x);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < OWN; i++) x[i] = shared.scratch[n][own.order[i]];
    }
    int size;
    float lead;
    group_of(OWN * w.lane, size, lead);
#if HADAMARD
#pragma unroll
    for (int i = 0; i < OWN; i++) x[i] *= own.signs[i];
    hadamard(x, size, w.lane);
    lead *= rsqrtf((float)size);
#else
    multiply(x, w.a.key_turn + (i64)w.h * w.a.key_turn_stride, shared.scratch[n], w.lane);
#endif
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        if (!lanes_are_whole()) group_of(OWN * w.lane + i, size, lead);
        x[i] *= lead * w.key_gain;
    }
}

// Code row n, which was loaded before. Rows behind the last row of the chunk are zeros.
__device__ __forceinline__ void code_query(const Warp& w, const QueryLoads& own, int n) {
    Shared& shared = w.shared;
    const int lane = w.lane;
    float x[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) x[i] = n < w.rows ? raw_to_float(own.query[i]) : 0.f;
    if (HAS_MEAN) keep_halves(w, n, x);
    transform_query(w, own, n, x);
    const float top = __uint_as_float(warp_largest(x));
    const float query_unit = (top < 1e-30f ? 1e-30f : top) / QUERY_TOP;  // unlike fmaxf, this keeps a NaN
    if (lane == 0) shared.query_unit[n] = query_unit;
    const float grow = 1.f / query_unit;
    unrolled<0, KEY_GROUPS>([&]<int G>() {
        static_assert(find_inverts_index<KeyRow<G>, KEY_SIZE[G]>(), "a code is found where index puts it");
        constexpr int FIRST = group_start(G), BEFORE = lanes_are_whole() ? 0 : OWN - 1;
        if (OWN * lane + BEFORE < FIRST || OWN * lane >= FIRST + KEY_SIZE[G]) return;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            int u, j, part;
            const int index = OWN * lane + i - FIRST;
            if (!lanes_are_whole() && (index < 0 || index >= KEY_SIZE[G])) continue;
            KeyRow<G>::find(index, u, j, part);
            const int v = __float2int_rn(x[i] * grow), high = (v + 64) >> 7;
            ((u8*)&shared.coded[2 * n][part][FIRST / 16 + u])[j] = (u8)high;
            ((u8*)&shared.coded[2 * n + 1][part][FIRST / 16 + u])[j] = (u8)(v - 128 * high);
        }
    });
    // Every lane arrives, not one per warp: compute-sanitizer's racecheck can then see which writes come before the barrier.
    asm volatile("{ .reg .b64 x; mbarrier.arrive.shared.b64 x, [%0]; }" ::"r"(w.coded_rows()) : "memory");
}
