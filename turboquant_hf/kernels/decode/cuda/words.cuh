// Groups of a trellis (primitives/trellis.py): words of 32 codes, and the lane that owns each word (kernels/codes.py).
//
// The level number of a value is (BITS - 1 plain bits, z1, z0). Rotations of the path p give
//
//     z1 = p ^ rot(p, 1) ^ rot(p, 4)        z0 = rot(p, 2)                     of all 32 values at once
//
// A word is 8 units of four values, whose levels are the bytes of a register. Bit 16 (u % 2) + 4 j + PHASE belongs to
// byte j of unit u, with PHASE = 2 (u / 2 % 2) + u / 4. A plane of two bits has the fields of units 0..3 in its first word
// and those of units 4..7 in its second word. `Word` keeps the bits of a unit in pairs of neighbouring bits, two pairs in
// each four bits of a register:
//
//     units of PHASE 0 and 2    their (z1, z0) are the low and the high pair of each four bits of parities[0];
//                               their plain bits are the same pairs of plain[0]
//     units of PHASE 1 and 3    the same in parities[1] and plain[1]
//
// A pair of parities and a pair of plain bits, put side by side, are one selector of a byte permutation.
//
// With 4 bits a level is the sum of two bytes (primitives/addends.py): one for the plain bits p2, p1, p0, and one for
// z1, z0 and whether the plain bits are all equal. A selector is then a pair of `plain` or `parities`, and a third bit:
//
//     agree, beside `plain`        bits 0 and 2 of each four: whether p2 = p1. The table is ordered by (agree, p1, p0)
//                                  instead of (p2, p1, p0)
//     equal, beside `parities`     bits 0 and 2 of each four: whether p2 = p1 = p0
//
// With 5 bits, the four plain bits of a unit of phase P are a half of w[P], four bits per value. The first byte is one of
// 16, which all have their top bit set: of two permutations, one gives the byte and the other 255; they are ANDed. The
// second byte is for z1, z0 and whether p3 = p2 = p1.

__device__ __forceinline__ u32 rotate_left(u32 x, int count) {
    u32 y;
    asm("shf.l.wrap.b32 %0, %1, %1, %2;" : "=r"(y) : "r"(x), "r"(count));
    return y;
}

// One word. With SHARES = 2, a lane needs half of it: units 4 share to 4 share + 3, which it then calls units 0 to 3.
template <int BITS, int SHARES = 1>
struct Word {
    static constexpr int BYTES = 4 * BITS, PATH = BITS - 1, LEVEL_BITS = BITS + 1, UNITS = 8 / SHARES;
    static constexpr u32 EVEN = 0x55555555u;
    static constexpr int ADDENDS = BITS > 2 ? 2 : 1;
    static_assert(BITS <= 5, "the widest codes whose levels are looked up");
    u32 w[BITS], parities[2 / SHARES], plain[2 / SHARES], agree[2 / SHARES], equal[2 / SHARES];  // the last two: 4 bits

    // Load only the words of planes that the wanted units have bits in.
    template <bool FIRST_HALF, bool SECOND_HALF, int OFFSET>
    __device__ __forceinline__ void load(u32 at) {
        if constexpr (BITS == 3 && !(FIRST_HALF && SECOND_HALF)) {
            load_piece<4, 4, OFFSET + (FIRST_HALF ? 0 : 4)>(w + (FIRST_HALF ? 0 : 1), at);
            load_piece<4, 4, OFFSET + 4 * PATH>(w + PATH, at);
        } else
            load_piece<BYTES, BYTES, OFFSET>(w, at);
    }
    template <int OFFSET>
    __device__ __forceinline__ void load_share(u32 at, int share) {
        if constexpr (BITS == 3 && SHARES > 1) {
            load_piece<4, 4, OFFSET>(w, at + 4 * share);
            load_piece<4, 4, OFFSET + 4 * PATH>(w + PATH, at);
        } else
            load<true, true, OFFSET>(at);
    }
    // Call this once after a load.
    __device__ __forceinline__ void take_parities(int share) {
        const u32 path = w[PATH], z1 = lop3<XOR3>(path, rotate_left(path, 1), rotate_left(path, 4));
        if constexpr (SHARES > 1) {  // the bits of the second half move to the place of the first half
            parities[0] = lop3<SELECT>(EVEN, rotate_left(path, 2 - share), z1 * (2 - share));
            if constexpr (BITS >= 4) w[0] = share ? w[1] : w[0];
            if constexpr (BITS == 5) w[2] = share ? w[3] : w[2];
            if constexpr (BITS % 2 == 0) w[PATH - 1] >>= share;
        } else {
            const u32 z0 = rotate_left(path, 2);
            parities[0] = lop3<SELECT>(EVEN, z0, z1 << 1);
            parities[1] = lop3<SELECT>(EVEN, z0 >> 1, z1);
        }
#pragma unroll
        for (int i = 0; i < 2 / SHARES; i++) {
            plain[i] = BITS > 2 ? w[i] : BITS == 2 ? w[0] >> i & EVEN : 0;
            if constexpr (BITS == 4) {
                const u32 upper = plain[i] >> 1;
                agree[i] = lop3<AND_XNOR>(EVEN, upper, w[2] >> i);
                equal[i] = lop3<AND_XNOR>(agree[i], upper, plain[i]);
            }
        }
    }

    template <int U, int ADDEND>
    __device__ __forceinline__ u32 levels(const Levels& book) const {
        constexpr u32 FIELD = 0x33333333u;
        constexpr int HALF = U / 4, PHASE = 2 * (U / 2 % 2) + HALF;
        if constexpr (BITS == 5 && ADDEND == 0) {
            const u32 own = w[PHASE], other = own ^ book.top_bits;
            return permute(book.table[0], book.table[1], U % 2 ? high_half(own) : own) &
                   permute(book.table[2], book.table[3], U % 2 ? high_half(other) : other);
        } else if constexpr (BITS == 5) {
            const u32 outer = lop3<ALIKE>(w[PHASE] >> 1, w[PHASE], w[PHASE] << 1) & 0x44444444u;
            const u32 code = lop3<MASKED_OR>(PHASE < 2 ? parities[HALF] : parities[HALF] >> 2, FIELD, outer);
            return permute(book.table[4], book.table[5], U % 2 ? high_half(code) : code);
        } else {
            const u32 low = BITS == 4 && ADDEND == 0 ? plain[HALF] : parities[HALF];
            const u32 high = BITS < 4 ? plain[HALF] : ADDEND ? equal[HALF] : agree[HALF];
            const u32 code = PHASE < 2 ? lop3<SELECT>(FIELD, low, high << 2) : lop3<SELECT>(FIELD, low >> 2, high);
            if constexpr (BITS == 4)
                return permute(book.table[2 * ADDEND], book.table[2 * ADDEND + 1], U % 2 ? high_half(code) : code);
            else
                return look_up<LEVEL_BITS, ADDEND, U % 2>(book, code, 0);
        }
    }
};

// The 128 codes of one channel of values: a word for each lane part.
template <int BITS, int SHARES>
struct ChannelWords {
    typedef Word<BITS, SHARES> W;
    static constexpr int UNITS = 8, ADDENDS = W::ADDENDS;
    static constexpr int LOADED = 0;  // every share begins where the word does
    W word;

    template <int ALIGN, int OFFSET>
    __device__ __forceinline__ void load(u32 row, int t, int share) {
        word.template load_share<OFFSET>(row + t * W::BYTES, share);
    }
    __device__ __forceinline__ void take_own_bits(int, int share) { word.take_parities(share); }
    template <int U, int ADDEND = 0>
    __device__ __forceinline__ u32 levels(const Levels& book) const { return word.template levels<U, ADDEND>(book); }
    // Index in the row of byte j of unit u in lane part t.
    static __host__ __device__ __forceinline__ constexpr int index(int u, int j, int t) { return 32 * t + 4 * u + j; }
};

// The codes of N channels of keys that a lane multiplies for a pair of tokens, rows 0 and 1. A turn of the loop handles four
// pairs of tokens. Pair I has units 2 UNITS I to 2 UNITS (I + 1) - 1 of the lane's words.
template <int N, int BITS>
struct TokenWords {
    static constexpr int UNITS = N / 16, ADDENDS = Word<BITS>::ADDENDS;
    static constexpr int TURN = 32 * UNITS * Word<BITS>::BYTES;  // of all lanes, for four pairs of tokens
    static_assert(N % 16 == 0, "whole units");

    // Channel of byte j of unit u in lane part t, and back.
    static __host__ __device__ __forceinline__ constexpr int index(int u, int j, int t) { return t * N / 4 + 4 * u + j; }
    static __host__ __device__ __forceinline__ constexpr void find(int index, int& u, int& j, int& t) {
        t = index / (N / 4), u = index % (N / 4) / 4, j = index % 4;
    }

    template <int I>
    struct Pair {
        static constexpr int FIRST = 2 * UNITS * I, END = FIRST + 2 * UNITS;
        static constexpr int BEGIN = FIRST / 8, WORDS = (END + 7) / 8 - BEGIN;
        Word<BITS> words[WORDS];

        // `at` + OFFSET is the address of the lane's first word of the turn.
        template <int OFFSET>
        __device__ __forceinline__ void load(u32 at) {
            unrolled<0, WORDS>([&]<int J>() {
                constexpr int UNIT = 8 * (BEGIN + J);
                constexpr bool FIRST_HALF = FIRST < UNIT + 4 && END > UNIT, SECOND_HALF = FIRST < UNIT + 8 && END > UNIT + 4;
                words[J].template load<FIRST_HALF, SECOND_HALF, OFFSET + 32 * (BEGIN + J) * Word<BITS>::BYTES>(at);
            });
#pragma unroll
            for (int i = 0; i < WORDS; i++) words[i].take_parities(0);
        }
    };
    // One row of a pair, with the levels() of `Row`.
    template <int I, int R>
    struct Token {
        static constexpr int UNITS = TokenWords::UNITS, ADDENDS = TokenWords::ADDENDS;
        const Pair<I>& pair;
        template <int U, int ADDEND = 0>
        __device__ __forceinline__ u32 levels(const Levels& book) const {
            constexpr int AT = Pair<I>::FIRST + R * UNITS + U;
            return pair.words[AT / 8 - Pair<I>::BEGIN].template levels<AT % 8, ADDEND>(book);
        }
    };
};
