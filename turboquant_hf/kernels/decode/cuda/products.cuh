// Products of packed levels with coded queries or probabilities.

template <int FORMAT, int OFFSET>
__device__ __forceinline__ float load_scale(u32 lane) {  // FORMAT 0: halves; others: the shift from a byte to a half
    u32 x[1];
    load_piece<FORMAT ? 1 : 2, 1, OFFSET>(x, lane);
    return half_to_float((u16)(x[0] << FORMAT));
}

// The start of the accumulators of scores, which subtracts the levels' bias. `sums`: of a query's high and of its low bytes.
__device__ __forceinline__ void debias(int (&start)[4], const int (&sums)[4], int twice) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {  // both halves are the same, so a product can start from these four registers directly
        const int high = twice * sums[i], low = twice * sums[i + 1];
        start[i] = MAGIC_BITS - (high >> 1);
        start[i + 1] = MAGIC_BITS - (low >> 1) - 64 * (high & 1);  // a high unit is 128 low ones
    }
}
// BASE * high + low, for whole numbers in the mantissa of MAGIC. The first step is exact, so the result is rounded once.
template <int BASE>
__device__ __forceinline__ float join_bytes(int high, int low) {
    return fmaf(__int_as_float(high), BASE, -(BASE + 1) * MAGIC) + __int_as_float(low);
}

// c = start + (the first 2 PAIRS units of rows a and b) * columns, where a and b are rows g and g + 8 of the left operand.
template <int PAIRS, class A, class B>
__device__ __forceinline__ void multiply_levels(int (&c)[NT][4], const int (&start)[NT][4], const A& a, const B& b,
                                                const u32 (*columns)[NT], const Levels& book) {
    unrolled<0, A::ADDENDS * PAIRS>([&]<int J>() {
        constexpr int U = J / A::ADDENDS * 2, ADDEND = J % A::ADDENDS;
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

// c = start + (all units of rows a and b) * q, where a and b are the keys of two tokens.
template <class A, class B>
__device__ __forceinline__ void multiply_tokens(int (&c)[NT][4], const int (&start)[NT][4], const A& a, const B& b,
                                                const u32 (*q)[NT], const Levels& book) {
    multiply_levels<A::UNITS / 2>(c, start, a, b, q, book);
    if constexpr (A::UNITS % 2)
        unrolled<0, A::ADDENDS>([&]<int ADDEND>() {
            constexpr int LAST = A::UNITS - 1;
            u32 a0 = a.template levels<LAST, ADDEND>(book), a1 = b.template levels<LAST, ADDEND>(book);
#pragma unroll
            for (int nt = 0; nt < NT; nt++) {
                if constexpr (A::UNITS == 1 && ADDEND == 0)
#pragma unroll
                    for (int i = 0; i < 4; i++) c[nt][i] = start[nt][i];
                mma16(c[nt], a0, a1, q[LAST][nt]);
            }
        });
}

// Where a lane's words of keys lie. `room` is the address of all words of the tile in shared memory. The first words of all
// lanes stand side by side, then their second words, and so on. A turn of the loop reads the words of four pairs of tokens.
struct KeyWords {
    u32 room;
    int lane, turn;
};

// Products of one group of keys in rows, for the two tokens that unit U of the values needs.
template <int G, int U>
__device__ __forceinline__ void multiply_rows(int (&c)[NT][4], u32 rows, const u32 (*q)[NT], const int (&start)[NT][4],
                                              const Levels& book, int t) {
    typedef KeyRow<G> R;
    constexpr int ALIGN = key_align(KEY_OFFSET[G], R::BYTES);
    constexpr bool JOINED = R::WIDTH == 2 && R::BYTES == 2 && !R::PIECES;  // the parts of two rows fill a word
    R a, b;
    a.template load<ALIGN, key_place(ValueRow::index(U, 0, 0)) + KEY_OFFSET[G]>(rows, t);
    b.template load<ALIGN, key_place(ValueRow::index(U, 1, 0)) + KEY_OFFSET[G]>(rows, t);
    if constexpr (JOINED) {
        Row<2 * R::UNITS * 16, KEY_BITS[G]> both;
        both.w[0] = a.w[0] + b.w[0] * 65536u;
        if constexpr (R::EXTRA) both.e[0] = a.e[0] + b.e[0] * 65536u;
        both.take_own_bits(t);
        u32 a0 = both.template levels<0>(book), a1 = both.template levels<2>(book);
        u32 a2 = both.template levels<1>(book), a3 = both.template levels<3>(book);
#pragma unroll
        for (int nt = 0; nt < NT; nt++) mma32(c[nt], start[nt], a0, a1, a2, a3, q[0][nt], q[1][nt]);
    } else {
        a.take_own_bits(t);
        b.take_own_bits(t);
        multiply_tokens(c, start, a, b, q, book);
    }
}

// Scores of the two tokens that unit U of the values needs from this lane, over the key groups from G on. The query's unit
// and the mean are not included. `rows` and `scales`: addresses in shared memory of the lane's first token.
template <int G, int U>
__device__ __forceinline__ void score(float (&s)[NT][2], u32 rows, const KeyWords& words, u32 scales, const u32 (*q)[NT],
                                      const int (*start_at)[NT][4], const Levels* books, int t) {
    if constexpr (G < KEY_GROUPS) {
        typedef KeyRow<G> R;
        constexpr int LOW = ValueRow::index(U, 0, 0), HIGH = ValueRow::index(U, 1, 0);
        int c[NT][4];
        if constexpr (key_words(G)) {
            static_assert(!key_words(G) || VALUE_WORDS, "words of keys are for the tokens that words of values have");
            typename R::template Pair<U> pair;
            pair.template load<KEY_OFFSET[G]>(words.room + words.lane * (4 * KEY_BITS[G]) + words.turn * R::TURN);
            typename R::template Token<U, 0> a{pair};
            typename R::template Token<U, 1> b{pair};
            multiply_tokens(c, start_at[G], a, b, q, books[G]);
        } else
            multiply_rows<G, U>(c, rows, q, start_at[G], books[G], t);
        float first = load_scale<KEY_FORMAT, (128 * G + LOW) * KEY_SCALE_BYTES>(scales);
        float second = load_scale<KEY_FORMAT, (128 * G + HIGH) * KEY_SCALE_BYTES>(scales);
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
            const float x = join_bytes<128>(c[nt][0], c[nt][1]), y = join_bytes<128>(c[nt][2], c[nt][3]);
            s[nt][0] = G ? fmaf(x, first, s[nt][0]) : x * first;
            s[nt][1] = G ? fmaf(y, second, s[nt][1]) : y * second;
        }
        score<G + 1, U>(s, rows, words, scales, q + R::UNITS, start_at, books, t);
    }
}
