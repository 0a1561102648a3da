// Copies of tiles to shared memory. A team has room for the keys of one tile and for the values of one tile. The values of a
// tile arrive while its keys are in use, and the keys of the next tile arrive while these values are.

// A whole team copies a block of memory to shared memory, and leaves PAD bytes free behind every GROUP bytes.
template <int BYTES, int GROUP = BYTES, int PAD = 0>
__device__ __forceinline__ void copy_block(u32 to, const u8* from, int member, u64 policy) {
    static_assert(BYTES % 16 == 0 && GROUP % 16 == 0, "whole pieces");
    constexpr int STEP = 512 * TEAM;
    const int at = 16 * member;
    from += at;
    to += at + (PAD && STEP % GROUP == 0 ? at / GROUP * PAD : 0);
    unrolled<0, (BYTES + STEP - 1) / STEP>([&]<int I>() {
        if ((I + 1) * STEP > BYTES && I * STEP + at >= BYTES) return;
        if constexpr (PAD == 0 || STEP % GROUP == 0 || GROUP % STEP == 0)
            copy16<I * STEP + I * STEP / GROUP * PAD, I * STEP>(to, from, policy);
        else
            copy16<I * STEP, I * STEP>(to + (I * STEP + at) / GROUP * PAD, from, policy);
    });
}

struct TileCopies {
    const Warp& w;
    u32 key_room, value_room;
    u64 policy;
    int begin, stride;  // the team's tiles

    __device__ __forceinline__ TileCopies(const Warp& w) : w(w) {
        stride = w.splits * TEAMS, begin = w.team * w.splits + w.split;
        key_room = shared_address(w.shared.rooms[w.team]), value_room = key_room + KEY_ROOM;
        policy = read_once_policy();
    }
    // Each call commits one group of copies, even if the tile does not exist: waiting counts groups.
    __device__ __forceinline__ void keys(int tile) const {
        if (tile < w.tiles) {
            const i64 slot = (i64)w.bh * w.a.capacity + tile;
            const u8* codes = w.a.key_codes + slot * KEY_BLOCK;
            constexpr int ROWS = 128 * KEY_ROW_BYTES;
            if constexpr (ROWS > 0) copy_block<ROWS, OWN_TOKENS * KEY_ROW_BYTES, KEY_PAD>(key_room, codes, w.member, policy);
            if constexpr (KEY_WORD_BYTES > 0) copy_block<KEY_WORD_BYTES>(key_room + KEY_ROWS, codes + ROWS, w.member, policy);
            copy_block<KEY_SCALES>(key_room + KEY_CODES, w.a.key_scales + slot * KEY_SCALES, w.member, policy);
            if (HAS_MEAN) copy_block<2 * D>(key_room + KEY_CODES + KEY_SCALES, w.a.key_means + slot * 2 * D, w.member, policy);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    __device__ __forceinline__ void values(int tile) const {
        if (tile < w.tiles) {
            const i64 slot = (i64)w.bh * w.a.capacity + tile;
            copy_block<VALUE_CODES>(value_room, w.a.value_codes + slot * VALUE_CODES, w.member, policy);
            copy_block<VALUE_SCALES>(value_room + VALUE_CODES, w.a.value_scales + slot * VALUE_SCALES, w.member, policy);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    __device__ __forceinline__ void first_tile() const {
        keys(begin);
        if (!SPARSE) values(begin);
    }
    __device__ __forceinline__ void all_but_newest_arrived() const {
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        w.team_sync();
    }
    __device__ __forceinline__ void all_arrived() const {
        asm volatile("cp.async.wait_all;" ::: "memory");
        w.team_sync();
    }
};
