// Phase 3: attention over packed tiles. The picture in decode.cu shows which rows and columns a lane holds.

// What stays in registers for all tiles: the coded queries, which all warps share, and the tables of levels.
struct CodedQueries {
    u32 q[UNITS][NT];                 // of rows 4 nt + g / 2, byte g % 2
    int start_at[KEY_GROUPS][NT][4];  // what accumulators begin with: MAGIC_BITS less the levels' bias
    float unit[NT];                   // of row 4 nt + t
    Levels key_levels[KEY_GROUPS], value_levels;
#if HAS_MEAN
    // Columns 2 t and 2 t + 1 of a product with the mean are query rows t and 4 + t. With NT = 1, both are row t.
    static constexpr bool HELD = D <= 128;
    uint4 half_query[HELD ? D / 32 : 1];
    float half_unit[NT];
#endif

#if HAS_MEAN
    static __device__ __forceinline__ const uint4* half_row_of(const Warp& w) {
        return (const uint4*)w.shared.halves[(w.g >> 1) + (w.g & 1) * (NR - 4)] + w.t;
    }
#endif
    __device__ __forceinline__ CodedQueries(const Warp& w) {
        Shared& shared = w.shared;
        const int g = w.g, t = w.t;
#pragma unroll
        for (int nt = 0; nt < NT; nt++)
#pragma unroll
            for (int u = 0; u < UNITS; u += 2) {
                uint2 x = *(const uint2*)&shared.coded[8 * nt + g][t][u];
                q[u][nt] = x.x, q[u + 1][nt] = x.y;
            }
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
            unit[nt] = shared.query_unit[4 * nt + t];
#pragma unroll
            for (int group = 0, u = 0; group < KEY_GROUPS; u += KEY_SIZE[group++] / 16) {
                int c[4] = {0, 0, 0, 0};
#pragma unroll
                for (int i = 0; i < KEY_SIZE[group] / 16; i++) mma16(c, ONES, ONES, q[u + i][nt]);
                debias(start_at[group][nt], c, twice_bias(KEY_BITS[group], key_words(group)));
            }
        }
#pragma unroll
        for (int group = 0; group < KEY_GROUPS; group++) key_levels[group].read(shared_address(shared.books[group]));
        value_levels.read(shared_address(shared.books[KEY_GROUPS]));
#if HAS_MEAN
        const uint4* half_row = half_row_of(w);
        if (HELD)
#pragma unroll
            for (int i = 0; i < D / 32; i++) half_query[i] = half_row[4 * i];
#pragma unroll
        for (int nt = 0; nt < NT; nt++) half_unit[nt] = shared.half_unit[4 * nt + t];
#endif
    }

    // q . mean, the same for all scores that a query row has in a tile.
    __device__ __forceinline__ void meet_mean(float (&base)[NT], u32 key_room, const Warp& w) const {
#if HAS_MEAN
        const uint4* half_row = half_row_of(w);
        float c[2][4] = {};
        unrolled<0, D / 32>([&]<int I>() {
            u32 x[4];
            load_piece<16, 16, KEY_CODES + KEY_SCALES + 64 * I>(x, key_room + 16 * w.t);
            const uint4 y = HELD ? half_query[I] : half_row[4 * I];
            mma_half(c[0], x[0], x[1], x[2], x[3], y.x, y.y);  // x[0] and x[2] are rows 0 to 7, whose results are used
            mma_half(c[1], x[0], x[1], x[2], x[3], y.z, y.w);  // rows 8 to 15
        });
#pragma unroll
        for (int nt = 0; nt < NT; nt++) base[nt] = (c[0][nt] + c[1][2 + nt]) * half_unit[nt];
#endif
    }
};

// Which of a tile's 128 tokens the lane has scores of: token + ValueRow::index(u, r, 0) for unit u and row half r.
struct OwnTokens {
    int token;
    u32 keys, key_scales, values, value_scales;  // shared memory: the token's codes and scales, and the lane's rows of values
    KeyWords key_words;

    __device__ __forceinline__ OwnTokens(const Warp& w, const TileCopies& copies) {
        const int within = (w.g & 1) * ValueRow::index(0, 2, 0) + w.share * ValueRow::index(OWN_UNITS, 0, 0);
        token = (w.g >> 1) * OWN_TOKENS + within;
        keys = copies.key_room + key_place((w.g >> 1) * OWN_TOKENS) + within * KEY_ROW_BYTES;
        key_words = {copies.key_room + KEY_ROWS, w.lane, w.share};
        key_scales = copies.key_room + KEY_CODES + token * KEY_SCALE_BYTES;
        values = copies.value_room + w.g * VALUE_ROW_BYTES + w.share * ValueRow::LOADED;
        value_scales = copies.value_room + VALUE_CODES + token * VALUE_SCALE_BYTES;
    }
};

// The lane's scores of one tile: s * unit + base, or s alone once finish() has capped it (SOFTCAP).
struct Scores {
    float s[OWN_UNITS][NT][2], base[NT];

    __device__ __forceinline__ Scores(const Warp& w, const CodedQueries& queries, const OwnTokens& own, u32 key_room) {
#pragma unroll
        for (int nt = 0; nt < NT; nt++) base[nt] = 0.f;
        queries.meet_mean(base, key_room, w);
        u32 key_rows = own.keys, scales = own.key_scales;
        KeyWords words = own.key_words;
        // Not fully unrolled: in short contexts, code that runs for the first time costs more than it saves.
#pragma unroll 1
        for (int turn = 0; turn < OWN_UNITS / KEY_UNROLL; turn++) {
            float x[KEY_UNROLL][NT][2];
            unrolled<0, KEY_UNROLL>([&]<int U>() {
                score<0, U>(x[U], key_rows, words, scales, queries.q, queries.start_at, queries.key_levels, w.t);
            });
#pragma unroll
            for (int nt = 0; nt < NT; nt++)
#pragma unroll
                for (int r = 0; r < 2; r++) {  // shift: the newest scores go to the end
#pragma unroll
                    for (int u = 0; u < OWN_UNITS - KEY_UNROLL; u++) s[u][nt][r] = s[u + KEY_UNROLL][nt][r];
#pragma unroll
                    for (int u = 0; u < KEY_UNROLL; u++) s[OWN_UNITS - KEY_UNROLL + u][nt][r] = x[u][nt][r];
                }
            constexpr int NEXT = ValueRow::index(KEY_UNROLL, 0, 0);
            static_assert(KEY_UNROLL == OWN_UNITS || NEXT < OWN_TOKENS, "turns differ by whole rows of the lane's own tokens");
            key_rows += NEXT * KEY_ROW_BYTES;
            scales += NEXT * KEY_SCALE_BYTES;
            words.turn++;
        }
    }

    __device__ __forceinline__ float score_of(float x, int nt, float unit, float less) const {
        return SOFTCAP ? x - less : fmaf(x, unit, base[nt] - less);
    }

    // Apply the soft cap, and hide the tokens that the mask, the padding or the sinks take out.
    __device__ __forceinline__ void finish(const Warp& w, const CodedQueries& queries, const OwnTokens& own, i64 first) {
        if (MASKED || SOFTCAP || first < w.start + w.a.sinks) {
            unrolled<0, OWN_UNITS>([&]<int U>() {
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    i64 position = first + own.token + ValueRow::index(U, r, 0);
                    bool seen = position >= w.start + w.a.sinks;
#if MASKED
                    seen = seen && w.a.mask[(i64)w.b * w.a.mask_stride + position];
#endif
#pragma unroll
                    for (int nt = 0; nt < NT; nt++) {
                        if (SOFTCAP) s[U][nt][r] = cap(fmaf(s[U][nt][r], queries.unit[nt], base[nt]), w.a.softcap);
                        if (!seen) s[U][nt][r] = minus_infinity();
                    }
                }
            });
        }
    }

    // The lane's largest score of each row.
    __device__ __forceinline__ void find_highest(float (&highest)[NT], const CodedQueries& queries) const {
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
            highest[nt] = fmaxf(s[0][nt][0], s[0][nt][1]);
#pragma unroll
            for (int u = 1; u < OWN_UNITS; u++) highest[nt] = fmaxf(highest[nt], fmaxf(s[u][nt][0], s[u][nt][1]));
            highest[nt] = score_of(highest[nt], nt, queries.unit[nt], 0.f);
        }
    }
};

// A warp's sums over its tokens of the tiles so far. Its output is (o - p_sum * bias) * p_top / PROBABILITY_TOP.
struct TileSums {
    float o[CHANNEL_TILES][NT][2];  // P times the levels' bytes, where P is p * scale in units of p_top / PROBABILITY_TOP
    float p_sum[NT];                // P alone
    float p_top[NT];                // the latest tile's largest probability times scale, at least 1e-20 p_peak and 1e-30
    float p_peak[NT];               // the largest p_top so far, relative to the present maximum
    float maximum[NT], sum[NT];     // of scores; of probabilities without scales
    int zeros[NT][4];               // accumulators that stand for 0

    __device__ __forceinline__ TileSums() {
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
            maximum[nt] = NEVER;
            sum[nt] = p_sum[nt] = p_top[nt] = p_peak[nt] = 0.f;
#pragma unroll
            for (int i = 0; i < 4; i++) zeros[nt][i] = MAGIC_BITS;
#pragma unroll
            for (int m = 0; m < CHANNEL_TILES; m++) o[m][nt][0] = o[m][nt][1] = 0.f;
        }
    }

    // Whether a probability of this lane, relative to the largest so far, reaches the threshold.
    __device__ __forceinline__ bool wants(const Warp& w, const float (&highest)[NT]) const {
        bool wanted = false;
#pragma unroll
        for (int nt = 0; nt < NT; nt++)
            wanted = wanted || (4 * nt + w.t < w.rows && !(highest[nt] < maximum[nt] + w.a.sparse));
        return wanted;
    }
    // Add a tile whose values are not read. None of its scores is above the maximum.
    __device__ __forceinline__ void add_without_values(const Scores& x, const CodedQueries& queries) {
#pragma unroll
        for (int nt = 0; nt < NT; nt++)
#pragma unroll
            for (int u = 0; u < OWN_UNITS; u++)
                sum[nt] += exp2_fast(x.score_of(x.s[u][nt][0], nt, queries.unit[nt], maximum[nt])) +
                           exp2_fast(x.score_of(x.s[u][nt][1], nt, queries.unit[nt], maximum[nt]));
    }

    // Raise the maximum to this tile's largest scores. fade: the factor of the earlier sums from now on.
    __device__ __forceinline__ void raise(float (&highest)[NT], float (&fade)[NT]) {
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
            highest[nt] = fmaxf(largest_of_rows(highest[nt]), maximum[nt]);
            fade[nt] = exp2_fast(maximum[nt] - highest[nt]);
            maximum[nt] = highest[nt];
            sum[nt] *= fade[nt];
        }
    }

    // P, the right operand of the product with the values: probabilities times the values' scales, in fixed point. The
    // largest number of the tile becomes PROBABILITY_TOP.
    //   A NaN scale marks a token that was not finite. Fixed point would turn it into a number, so the unit must stay NaN.
    //   A tile of negligible scores keeps the larger unit of the earlier tiles: in its own, their sums would be infinite.
    __device__ __forceinline__ void code_probabilities(u32 (&p)[OWN_UNITS][NT], Scores& x, float (&fade)[NT],
                                                       const CodedQueries& queries, u32 value_scale) {
        float largest[NT];
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
            p_peak[nt] *= fade[nt];
            largest[nt] = fmaf(p_peak[nt], 1e-20f, 1e-30f);
        }
        unrolled<0, 2 * OWN_UNITS>([&]<int I>() {
            constexpr int U = I / 2, R = I % 2;
            float scale = load_scale<VALUE_FORMAT, ValueRow::index(U, R, 0) * VALUE_SCALE_BYTES>(value_scale);
#pragma unroll
            for (int nt = 0; nt < NT; nt++) {
                const float p = exp2_fast(x.score_of(x.s[U][nt][R], nt, queries.unit[nt], maximum[nt]));
                sum[nt] += p;
                x.s[U][nt][R] = p * scale;
                largest[nt] = larger_or_nan(largest[nt], x.s[U][nt][R]);
            }
        });
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
                // Adding 2^23 puts the whole number into the mantissa. Adding 128 more rounds the high byte. The low byte
                // with its top bit flipped is then the remainder, from -128 to 127.
                const u32 first = __float_as_uint(fmaf(x.s[u][nt][0], grow, 8388736.f));
                const u32 second = __float_as_uint(fmaf(x.s[u][nt][1], grow, 8388736.f));
                p[u][nt] = transpose8x8(permute(first, second, 0x4051) ^ 0x80800000u);
            }
        }
    }

    // Fade the sums and add P and P times the values.
    __device__ __forceinline__ void add(const u32 (&p)[OWN_UNITS][NT], const float (&fade)[NT],
                                        const CodedQueries& queries, u32 value_rows, const Warp& w) {
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {  // every row of this product is the sum of the column's bytes
            int c[4];
#pragma unroll
            for (int u = 0; u < OWN_UNITS; u += 2)
                mma32(c, u ? c : zeros[nt], ONES, ONES, ONES, ONES, p[u][nt], p[u + 1][nt]);
            p_sum[nt] = fmaf(p_sum[nt], fade[nt], join_bytes<256>(c[0], c[1]));
        }
        unrolled<0, CHANNEL_TILES>([&]<int M>() {
            ValueRow x, y;
            x.template load<16, 16 * M * VALUE_ROW_BYTES>(value_rows, w.t, w.share);
            y.template load<16, (16 * M + 8) * VALUE_ROW_BYTES>(value_rows, w.t, w.share);
            x.take_own_bits(w.t, w.share);
            y.take_own_bits(w.t, w.share);
            int c[NT][4];
            multiply_levels<OWN_UNITS / 2>(c, zeros, x, y, p, queries.value_levels);
#pragma unroll
            for (int nt = 0; nt < NT; nt++)
#pragma unroll
                for (int r = 0; r < 2; r++)
                    o[M][nt][r] = fmaf(o[M][nt][r], fade[nt], join_bytes<256>(c[nt][2 * r], c[nt][2 * r + 1]));
        });
    }

    // Leave maximum, sum and output (in the coded domain of the values) for the merge.
    __device__ __forceinline__ void leave(const Warp& w) {
        const int g = w.g, t = w.t;
        float* output = w.tile_sums(w.warp);
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
            sum[nt] = sum_of_rows(sum[nt]);
            if (g == 0) {
                w.shared.maximum[0][w.warp][4 * nt + t] = maximum[nt];
                w.shared.sum[0][w.warp][4 * nt + t] = sum[nt];
            }
            const float p_unit = p_top[nt] * (1.f / PROBABILITY_TOP);
#pragma unroll
            for (int m = 0; m < CHANNEL_TILES; m++)
#pragma unroll
                for (int r = 0; r < 2; r++)
                    output[(4 * nt + t) * OUTPUT_ROW + 16 * m + g + 8 * r] =
                        fmaf(p_sum[nt], -.5f * twice_bias(VALUE_BITS, VALUE_WORDS), o[m][nt][r]) * p_unit;
        }
    }
};
