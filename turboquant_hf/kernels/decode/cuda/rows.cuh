// A row of channels that belongs to one warp, OWN neighbouring channels per lane: a query, or a result.

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

template <bool SHARED_BY_BLOCKS = false>  // bypasses the L1 cache, which does not see the writes of other blocks
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
// Multiply every block of `size` channels by Sylvester's Hadamard matrix. `size` is a power of two, at least OWN, and blocks
// begin at multiples of their size.
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

// A float's bits as a whole number, such that numbers compare as the floats do; and back.
__device__ __forceinline__ int in_order(int bits) { return bits ^ (bits >> 31 & 0x7FFFFFFF); }
__device__ __forceinline__ float warp_maximum(float x) {
    int highest, mine = in_order(__float_as_int(x));
    asm volatile("redux.sync.max.s32 %0, %1, 0xffffffff;" : "=r"(highest) : "r"(mine));
    return __int_as_float(in_order(highest));
}
// The bits of the largest |x| of a warp. A NaN counts as larger than all numbers.
__device__ __forceinline__ u32 warp_largest(const float (&x)[OWN]) {
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
