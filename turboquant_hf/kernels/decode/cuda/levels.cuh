// From packed bytes to levels: rows of codes, the lane that owns each code, and the look-up of four levels at a time.

__host__ __device__ constexpr int main_width(int bits) { return bits >= 8 ? 8 : bits >= 4 ? 4 : bits >= 2 ? 2 : 1; }
// Twice the bias of a level's byte: byte - bias is the centred level. With 4 or 5 bits in words, the byte is a sum of two.
__host__ __device__ constexpr int twice_bias(int bits, bool in_words) {
    return bits == 8 && !in_words ? 255 : bits == 5 ? 383 : 127;
}

// Load BYTES from shared memory at `lane` + OFFSET, an address that is a multiple of ALIGN.
template <int BYTES, int ALIGN, int OFFSET>
__device__ __forceinline__ void load_piece(u32* out, u32 lane) {
    if constexpr (BYTES == 1)
        asm volatile("ld.shared.u8 %0, [%1+%2];" : "=r"(out[0]) : "r"(lane), "n"(OFFSET));
    else if constexpr (BYTES == 2)
        asm volatile("ld.shared.u16 %0, [%1+%2];" : "=r"(out[0]) : "r"(lane), "n"(OFFSET));
    else {
        constexpr int STEP = BYTES % 16 == 0 && ALIGN % 16 == 0 ? 16 : BYTES % 8 == 0 && ALIGN % 8 == 0 ? 8 : 4;
        unrolled<0, BYTES / STEP>([&]<int I>() {
            if constexpr (STEP == 16)
                asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4+%5];"
                    : "=r"(out[4 * I]), "=r"(out[4 * I + 1]), "=r"(out[4 * I + 2]), "=r"(out[4 * I + 3])
                    : "r"(lane), "n"(OFFSET + 16 * I));
            else if constexpr (STEP == 8)
                asm volatile("ld.shared.v2.u32 {%0,%1}, [%2+%3];"
                    : "=r"(out[2 * I]), "=r"(out[2 * I + 1]) : "r"(lane), "n"(OFFSET + 8 * I));
            else
                asm volatile("ld.shared.u32 %0, [%1+%2];" : "=r"(out[I]) : "r"(lane), "n"(OFFSET + 4 * I));
        });
    }
}

// The table of one codebook, with two constants. They are read from shared memory so that they stay in registers: the
// compiler copies values that it knows to be the same in all lanes before every permutation.
struct Levels {
    u32 table[6], top_bits, mirror;
    __device__ __forceinline__ void read(u32 at) {
        load_piece<24, 8, 0>(table, at);
        load_piece<4, 4, 24>(&top_bits, at);
        load_piece<4, 4, 28>(&mirror, at);
    }
};

// One of at most 16 levels is the sum of this many bytes, of which all but one are zero.
__host__ __device__ constexpr int addends(int bits) { return bits == 4 ? 2 : 1; }

// Four levels of `bits` bits, or one addend of each, from the low half of the selectors in `code`, or from the high half.
// `extra`: the fifth bit of each code, in the lowest bit of its field.
template <int BITS, int ADDEND, bool HIGH>
__device__ __forceinline__ u32 look_up(const Levels& book, u32 code, u32 extra) {
    // A selector with its top bit set gives eight copies of the byte's sign bit.
    if constexpr (BITS < 4) {
        return permute(book.table[0], book.table[1], HIGH ? high_half(code) : code);
    } else if constexpr (BITS == 4) {
        if (ADDEND) code ^= book.top_bits;
        return permute(book.table[2 * ADDEND], book.table[2 * ADDEND + 1], HIGH ? high_half(code) : code);
    } else {
        // Levels of a 5-bit code are symmetric. The extra bit is the sign; where it is 0, the other bits are inverted.
        u32 turned = (extra & 0x11111111u) * 15u, sign = extra << 3;
        u32 other = lop3<XNOR3>(code, turned, book.top_bits);
        code = lop3<XNOR>(code, turned, 0);
        u32 level = permute(book.table[0], book.table[1], HIGH ? high_half(code) : code);
        level &= permute(book.table[2], book.table[3], HIGH ? high_half(other) : other);
        return level ^ permute(book.mirror, book.mirror, HIGH ? high_half(sign) : sign);
    }
}

// Whether R::find inverts R::index for all N codes of a row.
template <class R, int N>
__host__ __device__ constexpr bool find_inverts_index() {
    for (int index = 0; index < N; index++) {
        int u = 0, j = 0, t = 0;
        R::find(index, u, j, t);
        if (R::index(u, j, t) != index || u >= R::UNITS || j >= 4 || t >= 4) return false;
    }
    return true;
}

// A lane's part of one packed row of N codes, as UNITS words of four levels. With SHARES > 1, one equal share of that part.
template <int N, int BITS, int SHARES = 1>
struct Row {
    static constexpr int WIDTH = main_width(BITS);
    static constexpr bool EXTRA = BITS != WIDTH;         // one more bit, in a plane of its own: 5 = 4 + 1, 3 = 2 + 1
    static constexpr int BYTES = N * WIDTH / 32;         // a lane's part of the main plane
    // Parts that are not whole words are loaded in pieces of one unit (two with 1 bit), each to a word of its own.
    static constexpr bool PIECES = WIDTH == 1 || (BYTES % 4 != 0 && !(WIDTH == 2 && BYTES == 2));
    static constexpr int LOADED = BYTES / SHARES;
    static constexpr int PIECE = !PIECES ? LOADED : WIDTH == 4 ? 2 : 1;
    static constexpr int WORDS = PIECES ? LOADED / PIECE : (LOADED + 3) / 4;
    static constexpr int UNITS = N / 16;
    static constexpr int PLANE = N * WIDTH / 8;
    static constexpr int PARTS = EXTRA ? 4 / WIDTH : 1;  // the extra plane is this many lane parts long
    static_assert(N % 16 == 0 && N * WIDTH % 32 == 0, "whole units, and the same number of bytes for every lane");
    static_assert(SHARES == 1 || (!PIECES && LOADED % 4 == 0), "shares of whole words");
    u32 w[WORDS], e[WORDS];

    template <int ALIGN, int OFFSET>
    static __device__ __forceinline__ void load_part(u32* out, u32 part) {
        unrolled<0, LOADED / PIECE>([&]<int I>() { load_piece<PIECE, ALIGN, OFFSET + I * PIECE>(out + I, part); });
    }
    // The row begins at `row` + OFFSET.
    template <int ALIGN, int OFFSET>
    __device__ __forceinline__ void load(u32 row, int t, int = 0) {
        load_part<ALIGN, OFFSET>(w, row + t * BYTES);
        if constexpr (EXTRA) {
            load_part<ALIGN, OFFSET + PLANE>(e, row + t % PARTS * BYTES);
        }
    }
    // Call this once after `load`. It moves the extra bit of field f to bit WIDTH * f of its byte.
    __device__ __forceinline__ void take_own_bits(int t, int = 0) {
        if constexpr (EXTRA)
#pragma unroll
            for (int i = 0; i < WORDS; i++) {
                e[i] >>= t / PARTS;
                if (WIDTH == 2) e[i] = lop3<SELECT>(0x55555555u, e[i], 0);
            }
    }

    static constexpr int ADDENDS = addends(BITS);

    template <int U, int ADDEND = 0>
    __device__ __forceinline__ u32 levels(const Levels& book) const {
        if constexpr (BITS == 8) {
            return w[U];
        } else if constexpr (WIDTH == 4) {
            constexpr int I = PIECES ? U : U / 2;
            constexpr bool HIGH = !PIECES && U % 2;
            return look_up<BITS, ADDEND, HIGH>(book, w[I], EXTRA ? e[I] : 0);
        } else if constexpr (WIDTH == 1) {
            u32 code = w[U / 2] >> 2 * (U % 2);
            return permute(book.table[0], book.table[1], (code & 0x11u) | (code << 7 & 0x1100u));
        } else {
            constexpr int I = PIECES ? U : U / 4;
            constexpr u32 FIELD = 0x33333333u;
            u32 even = EXTRA ? lop3<SELECT>(FIELD, w[I], e[I] << 2) : w[I] & FIELD;
            u32 odd = EXTRA ? lop3<SELECT>(FIELD, w[I] >> 2, e[I]) : w[I] >> 2 & FIELD;
            u32 selector = PIECES ? even | odd << 8 : U % 2 ? odd : even;
            return look_up<BITS, 0, !PIECES && U % 4 / 2>(book, selector, 0);
        }
    }

    // Index in the row of byte j of unit u in lane part t.
    static __host__ __device__ __forceinline__ constexpr int index(int u, int j, int t) {
        if (WIDTH == 8) return t * BYTES + 4 * u + j;
        if (WIDTH == 4) return t * BYTES + 2 * u + (j >> 1) + (j & 1) * PLANE;
        if (WIDTH == 1) return t * BYTES + u / 2 + (2 * (u & 1) + (j >> 1) + 4 * (j & 1)) * PLANE;
        if (PIECES) return t * BYTES + u + ((j >> 1) + 2 * (j & 1)) * PLANE;
        return t * BYTES + 4 * (u / 4) + 2 * (u % 4 / 2) + (j >> 1) + ((u & 1) + 2 * (j & 1)) * PLANE;
    }

    // The inverse of `index`: the unit, byte and lane part of the code at `index`.
    static __host__ __device__ __forceinline__ constexpr void find(int index, int& u, int& j, int& t) {
        const int field = WIDTH == 8 ? 0 : index / PLANE, rest = WIDTH == 8 ? index : index % PLANE, byte = rest % BYTES;
        t = rest / BYTES;
        if (WIDTH == 8) {
            u = byte / 4;
            j = byte % 4;
        } else if (WIDTH == 4) {
            u = byte / 2;
            j = field + 2 * (byte & 1);
        } else if (WIDTH == 1) {
            u = 2 * byte + (field >> 1 & 1);
            j = (field >> 2) + 2 * (field & 1);
        } else if (PIECES) {
            u = byte;
            j = (field >> 1) + 2 * (field & 1);
        } else {
            u = 4 * (byte / 4) + 2 * (byte % 4 / 2) + (field & 1);
            j = (field >> 1) + 2 * (byte & 1);
        }
    }
};
