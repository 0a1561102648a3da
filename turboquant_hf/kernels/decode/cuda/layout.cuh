// Sizes that follow from the constants of source.py, and the block's shared memory.

// A group follows a trellis if its level numbers have one bit more than its codes.
__host__ __device__ constexpr bool key_words(int group) { return KEY_LEVEL_BITS[group] > KEY_BITS[group]; }
constexpr bool VALUE_WORDS = VALUE_LEVEL_BITS > VALUE_BITS;

template <bool WORDS, class IN_WORDS, class IN_ROWS> struct Chosen { typedef IN_WORDS Type; };
template <class IN_WORDS, class IN_ROWS> struct Chosen<false, IN_WORDS, IN_ROWS> { typedef IN_ROWS Type; };
template <int G> using KeyRow =
    typename Chosen<key_words(G), TokenWords<KEY_SIZE[G], KEY_BITS[G]>, Row<KEY_SIZE[G], KEY_BITS[G]>>::Type;
__host__ __device__ constexpr int group_start(int group) { return group ? group_start(group - 1) + KEY_SIZE[group - 1] : 0; }
typedef Chosen<VALUE_WORDS, ChannelWords<VALUE_BITS, TEAM>, Row<128, VALUE_BITS, TEAM>>::Type ValueRow;

__host__ __device__ constexpr int key_align(int offset, int bytes) {
    int x = KEY_ROW_BYTES | offset | bytes | 16;
    return x & -x;
}

constexpr int NR = 4 * NT;  // query rows of a block; columns 2 t, 2 t + 1 of product nt: high, low bytes of row 4 nt + t
constexpr int UNITS = D / 16, CHANNEL_TILES = D / 16, VALUE_ROW_BYTES = 16 * VALUE_BITS;
constexpr int KEY_SCALE_BYTES = KEY_FORMAT ? 1 : 2, VALUE_SCALE_BYTES = VALUE_FORMAT ? 1 : 2;
// The tokens of an S product are the lane's first token, index(0, 2 (g & 1), g >> 1), plus a constant per unit and row half.
// Rows of keys that belong to one value of g >> 1 are followed by KEY_PAD bytes, so that lanes meet different banks.
constexpr int OWN_TOKENS = ValueRow::index(0, 0, 1);  // from the first token of a lane part to that of the next
__host__ __device__ constexpr int key_place(int token) { return token * KEY_ROW_BYTES + token / OWN_TOKENS * KEY_PAD; }
// Each team has room for the keys (codes, scales, mean) of one tile and for the values (codes, scales) of one tile.
// Key groups in words stand behind the rows of the other groups.
constexpr int KEY_ROWS = key_place(128), KEY_CODES = KEY_ROWS + KEY_WORD_BYTES;
constexpr int KEY_BLOCK = 128 * KEY_ROW_BYTES + KEY_WORD_BYTES, KEY_SCALES = 128 * KEY_GROUPS * KEY_SCALE_BYTES;
constexpr int VALUE_CODES = D * VALUE_ROW_BYTES, VALUE_SCALES = 128 * VALUE_SCALE_BYTES;
constexpr int KEY_ROOM = (KEY_CODES + KEY_SCALES + (HAS_MEAN ? 2 * D : 0) + 127) / 128 * 128;
constexpr int VALUE_ROOM = (VALUE_CODES + VALUE_SCALES + 127) / 128 * 128;
constexpr int ROOM = KEY_ROOM + VALUE_ROOM, THREADS = 32 * WARPS, TEAMS = WARPS / TEAM;
constexpr int OWN_UNITS = 8 / TEAM, KEY_UNROLL = 4;  // S products of a warp's tokens, and those of one turn of a loop

// One warp holds a whole row of queries or results, and each lane OWN neighbouring channels of it.
constexpr int OWN = D / 32, OUTPUT_ROW = D + 8;  // a row of a warp's output, padded so that lanes meet different banks
static_assert(OWN_UNITS % KEY_UNROLL == 0, "whole turns");
// Sums over the tokens of a tile, and over the channels of an unbiased key, must fit into the mantissa of MAGIC.
static_assert(128 * 128 * (twice_bias(VALUE_BITS, VALUE_WORDS) > 127 ? 255 : 127) < 1 << 22 && D * 128 * 128 <= 1 << 22, "15-bit operands");
static_assert(TEAM * 4 * NR * OUTPUT_ROW <= ROOM, "the output of a team's warps takes the place of its tiles");

struct Shared {
    __align__(128) u8 rooms[TEAMS][ROOM];  // tiles; at the end, the warps' outputs in the values' coded domain
    u16 halves[NR][D];                  // queries in half precision, times a power of two
    float scratch[NR][D];               // of the warp that has the row
    u32 books[KEY_GROUPS + 1][8];       // read by `Levels`: one per key group, then the values'
#if WAIT_IN_SHARED
    float waiting[WARPS][NR][D];        // sums over raw tokens
#endif
    u32 coded[2 * NR][4][UNITS];        // [2 n + {0, 1}][t]: high and low bytes of coded query n, lane part t
    u64 coded_rows;                     // an mbarrier that counts the lanes that have coded a query
    float query_unit[NR], half_unit[NR];
    float maximum[2][WARPS][NR], sum[2][WARPS][NR];  // over tiles, over raw tokens
};
static_assert(sizeof(Shared) == SHARED_BYTES, "source.py computes another size");
static_assert(WARPS % TEAM == 0 && WARPS >= 2 && WARPS <= 16, "whole teams, and a lane for every warp in each half of a warp");
