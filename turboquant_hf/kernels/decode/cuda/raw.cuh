// Phase 2: attention over raw tokens (sinks and tail) in the model's dtype, 16 tokens at a time:
//
//     S = K q^T        O^T = V^T P^T        with keys and values as the left operands
//
// Raw token i is sink i, or token i - sinks of the tail. Lane 4 g + t holds
//   keys of tokens first + g and first + g + 8, channels 32 i + 8 t + 0..7;
//   values of tokens first + 2 t + {0, 1, 8, 9}, channels g CHANNELS + 0..CHANNELS - 1;
//   scores of tokens first + g and first + g + 8, query rows 2 t and 2 t + 1.

constexpr int BLOCKS = D / 32, CHANNELS = D / 8;

struct RawLoads {
    uint4 query[BLOCKS], keys[2][BLOCKS];
    u32 values[4][CHANNELS / 2];
};

struct RawTokens {
    const Warp& w;
    const u16 *sink_keys, *sink_values, *new_keys, *new_values;
    u16 *tail_keys, *tail_values;
    int sinks, fresh, ring, stride, count;
    int oldest_fresh, oldest;  // the first raw token that is new; the slot of the tail's first token

    __device__ __forceinline__ RawTokens(const Warp& w) : w(w) {
        const Arguments& a = w.a;
        sink_keys = a.sink_keys, sink_values = a.sink_values, new_keys = a.new_keys, new_values = a.new_values;
        tail_keys = a.tail_keys, tail_values = a.tail_values;
        sinks = a.sinks, fresh = a.fresh, ring = a.ring, stride = a.tail_stride;
        count = sinks + w.tail;
        oldest_fresh = count - fresh;
        oldest = ring ? w.packed % ring : 0;
    }

    __device__ __forceinline__ int slot_of(int i) const {  // of the tail, for token i
        const int slot = oldest + i - sinks;
        return slot - (ring && slot >= ring ? ring : 0);
    }
    // The address of token i in the tail.
    __device__ __forceinline__ u16* kept(int i, u16* recent) const { return recent + ((i64)w.bh * stride + slot_of(i)) * D; }
    // The address from which token i is read. New tokens are so far only in new_keys and new_values. Behind the last token,
    // the last one is read again.
    __device__ __forceinline__ const u16* place(int i, const u16* sink, const u16* recent, const u16* newest) const {
        i = i < count ? i : count - 1;
        const bool is_sink = i < sinks, is_new = i >= oldest_fresh;
        const u16* from = is_sink ? sink : is_new ? newest : recent;
        const int tokens = is_sink ? sinks : is_new ? fresh : stride, at = is_sink ? i : is_new ? i - oldest_fresh : slot_of(i);
        return from + ((i64)w.bh * tokens + at) * D;
    }

    __device__ __forceinline__ int value_token(int first, int r) const { return first + 2 * w.t + r % 2 + r / 2 * 8; }

    __device__ __forceinline__ void ask_for_keys(RawLoads& x, int first) const {
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            x.query[i] = make_uint4(0, 0, 0, 0);
            const u16* row = w.a.query + ((i64)w.bh * w.a.all_rows + w.row0 + w.g) * D;
            if (w.g < w.rows) x.query[i] = *(const uint4*)(row + 32 * i + 8 * w.t);
        }
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int i = 0; i < BLOCKS; i++)
                x.keys[r][i] = *(const uint4*)(place(first + w.g + 8 * r, sink_keys, tail_keys, new_keys) + 32 * i + 8 * w.t);
    }
    __device__ __forceinline__ void ask(RawLoads& x, int first) const {
        ask_for_keys(x, first);
#pragma unroll
        for (int r = 0; r < 4; r++)
            load_words(x.values[r], place(value_token(first, r), sink_values, tail_values, new_values) + w.g * CHANNELS);
    }

    __device__ __forceinline__ bool is_fresh(int i) const { return i >= sinks && i >= oldest_fresh && i < count; }
    // Write those of the 16 tokens from `first` on that are new to the tail.
    __device__ __forceinline__ void keep_fresh(const RawLoads& x, int first) const {
#pragma unroll
        for (int r = 0; r < 2; r++)
            if (is_fresh(first + w.g + 8 * r))
#pragma unroll
                for (int i = 0; i < BLOCKS; i++)
                    *(uint4*)(kept(first + w.g + 8 * r, tail_keys) + 32 * i + 8 * w.t) = x.keys[r][i];
#pragma unroll
        for (int r = 0; r < 4; r++)
            if (is_fresh(value_token(first, r)))
                store_words(kept(value_token(first, r), tail_values) + w.g * CHANNELS, x.values[r]);
    }

    // s[r]: of token first + g + r / 2 * 8 and row 2 t + r % 2.
    __device__ __forceinline__ void score(float (&s)[4], const RawLoads& x, int first) const {
        s[0] = s[1] = s[2] = s[3] = 0.f;
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            const uint4 q = x.query[i];
            mma_raw(s, x.keys[0][i].x, x.keys[1][i].x, x.keys[0][i].y, x.keys[1][i].y, q.x, q.y);
            mma_raw(s, x.keys[0][i].z, x.keys[1][i].z, x.keys[0][i].w, x.keys[1][i].w, q.z, q.w);
        }
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int i = first + w.g + r / 2 * 8;
            bool sink = i < sinks;
            i64 position = sink ? w.start + i : (i64)w.packed + i - sinks;
            bool seen = i < count && (sink ? position < w.packed : position >= w.start);
#if MASKED
            seen = seen && w.a.mask[(i64)w.b * w.a.mask_stride + position];
#endif
            // Query row n is token n % queries of the newest `queries`.
            const int queries = w.a.queries;
            seen = seen && (sink || i - sinks <= w.tail - queries + (w.row0 + 2 * w.t + r % 2) % queries);
            s[r] = seen ? cap(s[r] * w.factor, w.a.softcap) : NEVER;
        }
    }

    // Attention over 16 tokens from first_raw on, which are loaded already, then 16 from first_raw + step on, and so forth.
    // The sums are left for the merge.
    __device__ __forceinline__ void attend(RawLoads& x, const int first_raw, int step) const {
        float o[CHANNELS / 2][4];  // [j][r]: channel g CHANNELS + 2 j + r / 2 of row 2 t + r % 2
        float maximum[2] = {NEVER, NEVER}, sum[2] = {0.f, 0.f};
        bool has_raw = false;
#pragma unroll 1
        for (int first = first_raw; first < count; first += step) {
            if (first != first_raw) ask(x, first);
            if (first + 16 > oldest_fresh && w.chunk == 0) keep_fresh(x, first);
            float s[4], p[4], fade[2];
            score(s, x, first);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float top = largest_of_rows(fmaxf(maximum[r], fmaxf(s[r], s[r + 2])));
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
                const u32 (&v)[4][CHANNELS / 2] = x.values;
                mma_raw(o[j], permute(v[0][j], v[1][j], 0x5410), permute(v[0][j], v[1][j], 0x7632),
                        permute(v[2][j], v[3][j], 0x5410), permute(v[2][j], v[3][j], 0x7632), b0, b1);
            }
            has_raw = true;
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            sum[r] = sum_of_rows(sum[r]);
            if (w.g == 0 && 2 * w.t + r < NR) {
                w.shared.maximum[1][w.warp][2 * w.t + r] = maximum[r];
                w.shared.sum[1][w.warp][2 * w.t + r] = sum[r];
            }
        }
        if (has_raw)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                if (2 * w.t + r >= NR) break;
                float* mine = w.raw_sums(w.warp, 2 * w.t + r) + w.g * CHANNELS;
#pragma unroll
                for (int j = 0; j < CHANNELS / 2; j++) *(float2*)(mine + 2 * j) = make_float2(o[j][r], o[j][2 + r]);
            }
    }

#if SPARSE
    // Per query row 4 nt + t, the largest score of the first 16 raw tokens.
    __device__ __forceinline__ void first_maximum(float (&maximum)[NT]) const {
        RawLoads x;
        float s[4] = {NEVER, NEVER, NEVER, NEVER};
        if (count) {
            ask_for_keys(x, 0);
            score(s, x, 0);
        }
#pragma unroll
        for (int r = 0; r < 2; r++) s[r] = largest_of_rows(fmaxf(s[r], s[r + 2]));
#pragma unroll
        for (int nt = 0; nt < NT; nt++) {
            const float even = __shfl_sync(~0u, s[0], 2 * nt + (w.t >> 1)), odd = __shfl_sync(~0u, s[1], 2 * nt + (w.t >> 1));
            maximum[nt] = w.t & 1 ? odd : even;
        }
    }
#endif
};
