// Y = x W^T for many rows of x: NVFP4 weights decoded in registers, FP8 ones as they lie. No scratch copy.
//
// Walk: a work item is 64 * ROW_TILES * CLUSTER output features x N tokens over all of K; each cluster of
//   the grid takes every num_clusters-th, in an order that keeps about as many weights as tokens in
//   the cache. Within it the same roles as in linear.cu: one thread copies through a ring in shared
//   memory, each block of a cluster fetching its share of the tokens for all; GROUPS warpgroups decode
//   half a K block while the tensor core multiplies the other.
// Bytes: per item 0.5625 a weight (FP8 1) and 2 (NVFP4_FAST, FP8 1) an activation, from L2. FLOP: 2 T O I.
// Why: the library's product reads 1 or 2 bytes a weight that another kernel had to write, and the chip is
//   at its power limit, where bytes moved are speed lost (benchmarks/notes-kernels.md).
// Limits: output features whole tiles, TILES 1; `tokens` may be any number, activations padded to N.
//   FP8 sums stay in the tensor core, as the library's do in its fast mode.
//
// Set by the compiler's caller: FORMAT (NVFP4, NVFP4_FAST or FP8), N, GROUPS, TILES, STAGES, CLUSTER,
// CONSUMER_REGISTERS; wgmma_rs (FP8: wgmma_ss) is generated for N.

constexpr int CHUNK_BYTES = N * 16;                            // 16 bytes of N tokens
constexpr int NUM_CHUNKS = ACTIVATION_BYTES / CHUNK_BYTES;     // of a K block
constexpr int RASTER = 8;                                      // token tiles that go together

struct Item {
  int tile, token_tile;
};
// Items in groups of RASTER token tiles; in a group, the tiles of tokens change fastest.
DEVICE Item item_of(int index, int num_tiles, int num_token_tiles) {
  const int group = index / (RASTER * num_tiles), in_group = index - group * RASTER * num_tiles;
  const int width = min(RASTER, num_token_tiles - group * RASTER);
  return {in_group / width, group * RASTER + in_group % width};
}

struct Work {
  int num_tiles, num_token_tiles, k_blocks, first, step;

  DEVICE int num_items() const { return num_tiles * num_token_tiles; }
};

DEVICE void produce(const u8* weights, const u8* activations, i64 chunk_stride, const Work& work, u32 rank,
                    u32 ring, u32 full, u32 empty) {
  const u64 keep = policy_evict_last();
  int stage = 0, round = 0;
  wait_for_previous_kernels();
  for (int index = work.first; index < work.num_items(); index += work.step) {
    const Item item = item_of(index, work.num_tiles, work.num_token_tiles);
    const u8* rows = weights + static_cast<i64>(item.tile * CLUSTER + rank) * ROW_TILES * work.k_blocks * UNIT_BYTES;
    const u8* tokens = activations + static_cast<i64>(item.token_tile) * CHUNK_BYTES;
    for (int k_block = 0; k_block < work.k_blocks; ++k_block) {
      if (round > 0) barrier_wait(empty + 8 * stage, (round - 1) & 1);
      barrier_expect(full + 8 * stage, STAGE_BYTES);
      const u32 at = ring + stage * STAGE_BYTES;
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r)
        bulk_load(at + r * UNIT_BYTES, rows + (static_cast<i64>(r) * work.k_blocks + k_block) * UNIT_BYTES,
                  UNIT_BYTES, full + 8 * stage, keep);
#pragma unroll
      for (int i = 0; i < NUM_CHUNKS / CLUSTER; ++i) {
        const int chunk = rank * (NUM_CHUNKS / CLUSTER) + i;
        const u32 target = at + ROW_TILES * UNIT_BYTES + chunk * CHUNK_BYTES;
        const u8* source = tokens + (static_cast<i64>(k_block) * NUM_CHUNKS + chunk) * chunk_stride;
        if (CLUSTER == 1)
          bulk_load(target, source, CHUNK_BYTES, full + 8 * stage, keep);
        else
          bulk_load_all(target, source, CHUNK_BYTES, full + 8 * stage, (1 << CLUSTER) - 1, keep);
      }
      if (++stage == STAGES) stage = 0, ++round;
    }
  }
}

// One item's sums, scaled by row, as bf16 (tokens, stride).
DEVICE void store_item(u16* out, const float* row_scale, int stride, int num_tokens, int row_tile,
                       int token_tile, const float (&sums)[NUM_SUMS]) {
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  // Rows 2g and 2g + 1 of a 16-row strip sit in tile rows g and g + 8 (kernels/repack.py).
  const int feature = row_tile * 64 + warp * 16 + (lane >> 2) * 2;
  const float2 scale = *reinterpret_cast<const float2*>(row_scale + feature);
  const int token = token_tile * N + (lane & 3) * 2;
  u16* at = out + static_cast<i64>(token) * stride + feature;
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    const int ahead = i / 2 * 8 + i % 2;
    if (token + ahead < num_tokens)
      *reinterpret_cast<u32*>(at + static_cast<i64>(ahead) * stride) =
          pack_bf16(sums[i / 2 * 4 + i % 2] * scale.x, sums[i / 2 * 4 + 2 + i % 2] * scale.y);
  }
}

#if FORMAT == FP8

DEVICE void consume(u16* out, const float* row_scale, int stride, int num_tokens, const Work& work, u32 rank,
                    int group, u32 ring, u32 full, u32 empty) {
  const int lane = threadIdx.x % 32;
  const u32 empty_here = empty_of(empty, lane);
  float sums[NUM_SUMS];
  u32 release = 0;   // barrier of the stage that products in flight still read; 0 in lanes that have none
  int stage = 0, parity = 0;
  for (int index = work.first; index < work.num_items(); index += work.step) {
    const Item item = item_of(index, work.num_tiles, work.num_token_tiles);
    for (int k_block = 0; k_block < work.k_blocks; ++k_block) {
      const u32 at = ring + stage * STAGE_BYTES;
      const u64 weights = operand(at + group * UNIT_BYTES, 1024, 128);
      const u64 tokens = operand(at + ROW_TILES * UNIT_BYTES, N * 16, 128);
      barrier_wait(full + 8 * stage, parity);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step)
        wgmma_ss(sums, weights + step * 128, tokens + step * 2 * N, k_block > 0 || step > 0);
      wgmma_commit();
      wgmma_wait<1>();
      if (release != 0) release_stage(release);
      release = releases(lane) ? empty_here + 8 * stage : 0;
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    wgmma_wait<0>();
    if (release != 0) release_stage(release);   // before the store, so that copies go on during it
    release = 0;
    store_item(out, row_scale, stride, num_tokens, (item.tile * CLUSTER + rank) * ROW_TILES + group,
               item.token_tile, sums);
  }
}

#else

DEVICE void consume(u16* out, const float* row_scale, int stride, int num_tokens, const Work& work, u32 rank,
                    int group, u32 ring, u32 full, u32 empty) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  float sums[1][NUM_SUMS];
  const u32 weights = ring + group * UNIT_BYTES;
  Cursor at = {weights + warp * 512 + lane * 16, weights + scales_of(warp, lane),
               ((ring + ROW_TILES * UNIT_BYTES) & 0x3FFFF) / 16 | N << 16, full, empty_of(empty, lane), 0, STAGES};
  u32 release = 0;   // barrier of the stage that products in flight still read; 0 in lanes that have none
  for (int index = work.first; index < work.num_items(); index += work.step) {
    const Item item = item_of(index, work.num_tiles, work.num_token_tiles);
    bool is_fresh = true;   // the next product overwrites the sums
    for (int k_block = 0; k_block < work.k_blocks; ++k_block) {
      barrier_wait(at.full, at.parity);
      multiply_stage(at, is_fresh, release, sums);
      release = releases(lane) ? at.empty : 0;
      is_fresh = false;
      at.step();
    }
    wgmma_wait<0>();
    if (release != 0) release_stage(release);   // before the store, so that copies go on during it
    release = 0;
    store_item(out, row_scale, stride, num_tokens, (item.tile * CLUSTER + rank) * ROW_TILES + group,
               item.token_tile, sums[0]);
  }
}

#endif

extern "C" __global__ void __launch_bounds__(GROUPS * 128 + COPIERS, 1)
    prefill_linear(const u8* weights, const u8* activations, i64 chunk_stride, const float* row_scale, u16* out,
                   int out_features, int k_blocks, int num_tokens) {
  extern __shared__ __align__(1024) u8 ring_bytes[];
  __shared__ __align__(8) u64 barriers[2 * STAGES];
  const u32 ring = shared_address(ring_bytes);
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(full + 8 * stage, 1);
      barrier_init(empty + 8 * stage, GROUPS * 4 * RELEASES * CLUSTER);
    }
    barrier_init_fence();
  }
  // Before anything arrives from another block, its barriers must be ready.
  if (CLUSTER == 1) __syncthreads();
  else cluster_sync();
  let_next_kernel_start();
  const int rank = blockIdx.x % CLUSTER;
  const Work work = {out_features / (64 * ROW_TILES * CLUSTER), (num_tokens + N - 1) / N, k_blocks,
                     static_cast<int>(blockIdx.x / CLUSTER), static_cast<int>(gridDim.x / CLUSTER)};
  // Through a shuffle, so that the compiler knows it to be the same for a whole warp.
  const int group = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);
  if (group >= GROUPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == GROUPS * 128)
      produce(weights, activations, chunk_stride, work, rank, ring, full, empty);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
    consume(out, row_scale, out_features, num_tokens, work, rank, group, ring, full, empty);
  }
  // A block may not leave while others write to it.
  if (CLUSTER > 1) cluster_sync();
}
