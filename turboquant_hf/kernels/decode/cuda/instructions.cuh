// Types, constants, and the instructions that CUDA C++ has no name for.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;
typedef unsigned long long u64;

// The score of a raw token that is not seen, and the maximum where no token is seen. It is finite, so that differences stay
// numbers. Packed tokens that are not seen score minus infinity, which is safe because no maximum is below NEVER.
constexpr float NEVER = -1e30f;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float MAGIC = 12582912.f;  // 1.5 * 2^23: adding a whole number below 2^22 puts it into the mantissa
constexpr int MAGIC_BITS = 0x4B400000;
constexpr u32 ONES = 0x01010101u;  // a product with these bytes is a sum
constexpr float QUERY_TOP = 16256.f, PROBABILITY_TOP = 32639.f;  // 127 * 128; 127 * 256 + 127

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xFF800000); }
__device__ __forceinline__ u32 permute(u32 low, u32 high, u32 selector) {
    u32 d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(low), "r"(high), "r"(selector));
    return d;
}
// As 1 times the high half and 0 times the low one: the pipe for shifts, masks and permutations has the most to do.
__device__ __forceinline__ u32 high_half(u32 x) {
    u32 y;
    asm("dp2a.lo.u32.u32 %0, %1, %2, 0;" : "=r"(y) : "r"(x), "r"(0x100));
    return y;
}
template <int TABLE>  // the truth table of a function of three bits; opaque, because compilers make more instructions of it
__device__ __forceinline__ u32 lop3(u32 x, u32 y, u32 z) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(x), "r"(y), "r"(z), "n"(TABLE));
    return d;
}
constexpr int SELECT = 0xCA, XOR3 = 0x96, XNOR = 0xC3, XNOR3 = 0x69;  // x ? y : z; x ^ y ^ z; ~(x ^ y); ~(x ^ y ^ z)
constexpr int AND_XNOR = 0x90, ALIKE = 0x81, MASKED_OR = 0xEA;  // x & ~(y ^ z); x = y = z; x & y | z
__device__ __forceinline__ float half_to_float(u16 x) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x));
    return f;
}
__device__ __forceinline__ u16 float_to_half(float x) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
}
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float larger_or_nan(float x, float y) {
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}
__device__ __forceinline__ u32 transpose8x8(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
__device__ __forceinline__ void mma32(int (&d)[4], const int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}
__device__ __forceinline__ void mma32(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    mma32(c, c, a0, a1, a2, a3, b0, b1);
}
__device__ __forceinline__ void mma16(int (&c)[4], u32 a0, u32 a1, u32 b0) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
}
__device__ __forceinline__ void mma_half(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_raw(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if RAW_BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    mma_half(c, a0, a1, a2, a3, b0, b1);
#endif
}
__device__ __forceinline__ u32 pack_raw(float low, float high) {
    u32 d;
#if RAW_BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#endif
    return d;
}
__device__ __forceinline__ float raw_to_float(u16 x) {
#if RAW_BF16
    return __uint_as_float((u32)x << 16);
#else
    return half_to_float(x);
#endif
}
__device__ __forceinline__ u16 float_to_raw(float x) {
#if RAW_BF16
    u32 bits = __float_as_uint(x);
    return x != x ? 0x7FFF : (u16)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
#else
    return float_to_half(x);
#endif
}
__device__ __forceinline__ u32 shared_address(const void* p) {
    u32 a;
    asm("{ .reg .u64 x; cvta.to.shared.u64 x, %1; cvt.u32.u64 %0, x; }" : "=r"(a) : "l"(p));
    return a;
}
// The kernel may start while the previous kernel ends (driver.py asks for that). Nothing that another kernel writes may be
// touched before this call.
__device__ __forceinline__ void previous_kernel_done() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_once(u32 barrier) {  // for the end of an mbarrier's first phase
    u32 done;
    do asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
                    : "=r"(done) : "r"(barrier) : "memory");
    while (!done);
    __syncwarp();
}
// Packed bytes are read once, so they leave the L2 cache first. What every block reads stays in it.
__device__ __forceinline__ u64 read_once_policy() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
template <int TO, int FROM>
__device__ __forceinline__ void copy16(u32 to, const u8* from, u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0+%2], [%1+%3], 16, %4;"
                 ::"r"(to), "l"(from), "n"(TO), "n"(FROM), "l"(policy) : "memory");
}

template <int I, int N, class Fn>
__device__ __forceinline__ void unrolled(Fn&& fn) {
    if constexpr (I < N) {
        fn.template operator()<I>();
        unrolled<I + 1, N>(fn);
    }
}
