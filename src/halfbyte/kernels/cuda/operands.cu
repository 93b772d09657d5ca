// What the streaming and the prefill linear share: their operands in shared memory, and NVFP4 weights
// decoded into registers as the left operand of a tensor-core product. The loader puts this file
// in front of theirs; the definitions they are compiled with are explained there.

#define FP8 0
#define NVFP4 1
#define BF16 2
#define NVFP4_FAST 3

constexpr bool IS_NVFP4 = FORMAT == NVFP4 || FORMAT == NVFP4_FAST;
constexpr int ROW_TILES = GROUPS * TILES;
constexpr int UNIT_BYTES = IS_NVFP4 ? 4608 : 8192;  // 64 rows of one K block
constexpr int ACTIVATION_BYTES = FORMAT == NVFP4 ? N * 256 : N * 128;
constexpr int SHARE_BYTES = ACTIVATION_BYTES / CLUSTER;   // that one block fetches for its cluster
constexpr int STAGE_BYTES = ROW_TILES * UNIT_BYTES + ACTIVATION_BYTES;
constexpr int NUM_SUMS = N / 2;   // accumulators a thread holds of a 64 x N tile
constexpr int COPIERS = CONSUMER_REGISTERS > 0 ? 128 : 32;

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Unswizzled operand: 8x16-byte core matrices; strides in bytes along K and along rows.
DEVICE u64 operand(u32 address, u32 k_stride, u32 row_stride) {
  return static_cast<u64>((address & 0x3FFFF) >> 4) | static_cast<u64>(k_stride >> 4) << 16 |
         static_cast<u64>(row_stride >> 4) << 32;
}

// Where a lane's scales lie in a unit.
DEVICE u32 scales_of(int warp, int lane) {
  return 4096 + (FORMAT == NVFP4_FAST ? (warp * 32 + lane) * 4 : (warp * 8 + (lane >> 2)) * 16);
}

// A stage is free when every block of the cluster has read it: lane i tells block i.
#ifdef EVERY_LANE_RELEASES
// For compute-sanitizer's racecheck, which takes an arrival as that of one lane's reads, though a warp
// came together ahead of it (benchmarks/racecheck_control.cu): every reader arrives at every block.
constexpr int RELEASES = 32;
DEVICE bool releases(int) { return true; }
DEVICE u32 empty_of(u32 empty, int) { return empty; }
DEVICE void release_stage(u32 barrier) {
  if (CLUSTER == 1) barrier_arrive(barrier);
  else
    for (u32 rank = 0; rank < CLUSTER; ++rank) barrier_arrive_remote(address_in_block(barrier, rank));
}
#else
constexpr int RELEASES = 1;   // arrivals of a warp at a stage's barrier
DEVICE bool releases(int lane) { return lane < CLUSTER; }
DEVICE u32 empty_of(u32 empty, int lane) {
  return CLUSTER == 1 ? empty : address_in_block(empty, lane % CLUSTER);
}
DEVICE void release_stage(u32 barrier) {
  if (CLUSTER == 1)
    barrier_arrive(barrier);
  else
    barrier_arrive_remote(barrier);
}
#endif

#if FORMAT == NVFP4 || FORMAT == NVFP4_FAST

#if FORMAT == NVFP4
DEVICE void decode_half(const uint4& codes, const uint4& scales, int half, u32 (&a)[4][4]) {
  const u32 words[4] = {codes.x, codes.y, codes.z, codes.w};
  const u32 pair0 = half == 0 ? scales.x : scales.z, pair1 = half == 0 ? scales.y : scales.w;
  const u32 scale[4] = {scales_even(pair0), scales_odd(pair0), scales_even(pair1), scales_odd(pair1)};
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    u32 pairs[4];
    unpack_e2m1(words[step], pairs);
    a[step][0] = scale_by_low(pairs[0], scale[step]);
    a[step][1] = scale_by_high(pairs[1], scale[step]);
    a[step][2] = scale_by_low(pairs[2], scale[step]);
    a[step][3] = scale_by_high(pairs[3], scale[step]);
  }
}
#else
// Half a K block, 64 inputs: two k-steps of 32. A lane has a whole 16-block of each of its two rows, row 2g's
// in x and y of `codes`, and looks its codes up among the magnitudes of that block's scale.
template <int HALF>
DEVICE void decode_half(const uint4& codes, u32 scales, u32 larger, u32 (&a)[2][4]) {
  const Magnitudes even = magnitudes_of<HALF * 2>(scales, larger);
  const Magnitudes odd = magnitudes_of<HALF * 2 + 1>(scales, larger);
  look_up(codes.x, even, a[0][0], a[0][2]);
  look_up(codes.z, odd, a[0][1], a[0][3]);
  look_up(codes.y, even, a[1][0], a[1][2]);
  look_up(codes.w, odd, a[1][1], a[1][3]);
}
#endif

// Addresses of the current stage; they step through the ring together.
struct Cursor {
  u32 codes, scales, tokens, full, empty, parity;
  int left;   // stages to the end of the ring

  DEVICE void step() {
    const bool wraps = --left == 0;
    const int by = wraps ? -(STAGES - 1) * STAGE_BYTES : STAGE_BYTES;
    codes += by;
    scales += by;
    tokens += by / 16;
    full += wraps ? -(STAGES - 1) * 8 : 8;
    empty += wraps ? -(STAGES - 1) * 8 : 8;
    if (wraps) left = STAGES, parity ^= 1;
  }
};

#if N > 16 || FORMAT != NVFP4

#if FORMAT == NVFP4
// One K block: decode half a row tile, multiply it while the next half is decoded.
DEVICE void multiply_half(u32 tokens, int half, const u32 (&a)[4][4], bool is_fresh, float (&sums)[NUM_SUMS]) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step)
    wgmma_rs(sums, a[step], static_cast<u64>(128 / 16) << 32 | (tokens + (half * 4 + step) * 2 * N),
             !(is_fresh && half == 0 && step == 0));
  wgmma_commit();
}
DEVICE void multiply_stage(const Cursor& at, bool is_fresh, u32 release, float (&sums)[TILES][NUM_SUMS]) {
  u32 a[2][4][4];
#pragma unroll
  for (int r = 0; r < TILES; ++r) {
    const uint4 scales = load_shared_16(at.scales + r * UNIT_BYTES);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Loaded behind the products ahead, or the compiler would decode it between them.
      const uint4 codes = load_shared_16(at.codes + r * UNIT_BYTES + half * 2048);
      // One group may stay in flight: it reads the other half's registers.
      wgmma_wait<1>();
      if (r == 0 && half == 1 && release != 0) release_stage(release);
      decode_half(codes, scales, half, a[half]);
      multiply_half(at.tokens, half, a[half], is_fresh, sums[r]);
    }
  }
}
#else
// One K block in e4m3, likewise.
template <int HALF>
DEVICE void multiply_half(u32 tokens, const u32 (&a)[2][4], bool is_fresh, float (&sums)[NUM_SUMS]) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 2; ++step)
    wgmma_rs(sums, a[step], static_cast<u64>(128 / 16) << 32 | (tokens + (HALF * 2 + step) * 2 * N),
             !(is_fresh && HALF == 0 && step == 0));
  wgmma_commit();
}
DEVICE void multiply_stage(const Cursor& at, bool is_fresh, u32 release, float (&sums)[TILES][NUM_SUMS]) {
  u32 a[2][2][4];
#pragma unroll
  for (int r = 0; r < TILES; ++r) {
    const u32 scales = load_shared_4(at.scales + r * UNIT_BYTES), larger = three_halves(scales);
    const uint4 first = load_shared_16(at.codes + r * UNIT_BYTES);
    wgmma_wait<1>();
    decode_half<0>(first, scales, larger, a[0]);
    multiply_half<0>(at.tokens, a[0], is_fresh, sums[r]);
    const uint4 second = load_shared_16(at.codes + r * UNIT_BYTES + 2048);
    wgmma_wait<1>();
    if (r == 0 && release != 0) release_stage(release);
    decode_half<1>(second, scales, larger, a[1]);
    multiply_half<1>(at.tokens, a[1], is_fresh, sums[r]);
  }
}
#endif

#endif

#endif
