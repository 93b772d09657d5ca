// Y = x W^T for many rows of x: NVFP4 weights decoded in registers, FP8 ones as they lie. No scratch copy.
//
// Walk: a work item is 64 * ROW_TILES * CLUSTER output features x N tokens over all of K; each cluster of
//   the grid takes every num_clusters-th, in an order that keeps about as many weights as tokens in
//   the cache. Where that would leave many idle in the last round (`splits`), all items' K blocks
//   stand in one long row instead, and each cluster takes an equal stretch of it: of an item that is
//   cut, everyone stores its sums, and who comes last adds them up in order. Within a cluster the same
//   roles as in linear.cu: one thread copies through a ring in shared memory, each block fetching its
//   share of the tokens for all; GROUPS warpgroups decode half a K block while the tensor core
//   multiplies the other.
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
  int num_tiles, num_token_tiles, k_blocks;
  int begin, end;     // units, an item's K blocks in a row, of this cluster
  int step;           // items from one to the next
  int cluster, num_clusters;

  DEVICE int num_units() const { return num_tiles * num_token_tiles * k_blocks; }
  DEVICE int stretch(int of) const {
    return static_cast<int>(static_cast<i64>(of) * num_units() / num_clusters);
  }
  DEVICE int next(int unit) const { return (unit / k_blocks + step) * k_blocks; }
  // Behind the last K block that this cluster multiplies of the item that `unit` lies in.
  DEVICE int stop(int unit) const { return min(k_blocks, unit % k_blocks + end - unit); }
};

DEVICE void produce(const u8* weights, const u8* activations, i64 chunk_stride, const Work& work, u32 rank,
                    u32 ring, u32 full, u32 empty) {
  const u64 keep = policy_evict_last();
  int stage = 0, round = 0;
  wait_for_previous_kernels();
  for (int unit = work.begin; unit < work.end; unit = work.next(unit)) {
    const Item item = item_of(unit / work.k_blocks, work.num_tiles, work.num_token_tiles);
    const int stop = work.stop(unit);
    const u8* rows = weights + static_cast<i64>(item.tile * CLUSTER + rank) * ROW_TILES * work.k_blocks * UNIT_BYTES;
    const u8* tokens = activations + static_cast<i64>(item.token_tile) * CHUNK_BYTES;
    for (int k_block = unit % work.k_blocks; k_block < stop; ++k_block) {
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

struct Output {
  u16* out;
  const float* row_scale;
  int stride, num_tokens;
  float4* partial;   // of each cluster's first and last item, a warpgroup's sums as its threads hold them
  u32* counters;     // of each item, one a warpgroup: how many have stored theirs; zero between kernels
};

// Four sums of a thread: two features of two tokens, scaled by row, as bf16 (tokens, stride).
struct Place {
  u16* at;
  float2 scale;
  int token, num_tokens, stride;

  DEVICE Place(const Output& y, int row_tile, int token_tile) {
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    // Rows 2g and 2g + 1 of a 16-row strip sit in tile rows g and g + 8 (kernels/repack.py).
    const int feature = row_tile * 64 + warp * 16 + (lane >> 2) * 2;
    scale = *reinterpret_cast<const float2*>(y.row_scale + feature);
    token = token_tile * N + (lane & 3) * 2;
    at = y.out + static_cast<i64>(token) * y.stride + feature;
    num_tokens = y.num_tokens;
    stride = y.stride;
  }
  DEVICE void store(int eight, float4 v) const {   // of the tile's tokens, counted in eights
    if (token + eight * 8 < num_tokens)
      *reinterpret_cast<u32*>(at + static_cast<i64>(eight * 8) * stride) = pack_bf16(v.x * scale.x, v.z * scale.y);
    if (token + eight * 8 + 1 < num_tokens)
      *reinterpret_cast<u32*>(at + static_cast<i64>(eight * 8 + 1) * stride) =
          pack_bf16(v.y * scale.x, v.w * scale.y);
  }
};

DEVICE float4 four(const float (&sums)[NUM_SUMS], int i) {
  return make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
}

DEVICE void meet_group(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }

// Sums of an item of which this cluster multiplied a part; who comes last adds up all of them.
DEVICE void merge_item(const Output& y, const Work& work, int index, const Place& place, u32 rank, int group,
                       u32* arrived, const float (&sums)[NUM_SUMS]) {
  const int thread = threadIdx.x % 128, first_unit = index * work.k_blocks;
  const auto slot = [&](int cluster) {
    // A cluster cuts an item where its stretch begins or where it ends.
    const int which = work.stretch(cluster) >= first_unit ? 0 : 1;
    return y.partial + (static_cast<i64>((cluster * 2 + which) * CLUSTER + rank) * GROUPS + group) * (N / 8) * 128 + thread;
  };
  float4* mine = slot(work.cluster);
#pragma unroll
  for (int i = 0; i < N / 8; ++i) mine[i * 128] = four(sums, i);
  __threadfence();
  meet_group(group);
  u32* counter = y.counters + (index * CLUSTER + rank) * GROUPS + group;
  if (thread == 0) arrived[group] = atomicAdd(counter, 1);
  meet_group(group);
  int first = work.cluster, last = work.cluster;
  while (work.stretch(first) > first_unit) --first;
  while (work.stretch(last + 1) < first_unit + work.k_blocks) ++last;
  if (arrived[group] != last - first) return;
  __threadfence();
  if (thread == 0) *counter = 0;
#pragma unroll 4
  for (int i = 0; i < N / 8; ++i) {
    float4 total = slot(first)[i * 128];
    for (int cluster = first + 1; cluster <= last; ++cluster) {
      const float4 v = slot(cluster)[i * 128];
      total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
    }
    place.store(i, total);
  }
}

DEVICE void store_item(const Output& y, const Work& work, int unit, int stop, u32 rank, int group, u32* arrived,
                       const float (&sums)[NUM_SUMS]) {
  const int index = unit / work.k_blocks;
  const Item item = item_of(index, work.num_tiles, work.num_token_tiles);
  const Place place(y, (item.tile * CLUSTER + rank) * ROW_TILES + group, item.token_tile);
  if (unit % work.k_blocks > 0 || stop < work.k_blocks) {
    merge_item(y, work, index, place, rank, group, arrived, sums);
    return;
  }
#pragma unroll
  for (int i = 0; i < N / 8; ++i) place.store(i, four(sums, i));
}

#if FORMAT == FP8

DEVICE void consume(const Output& y, const Work& work, u32 rank, int group, u32* arrived, u32 ring, u32 full,
                    u32 empty) {
  const int lane = threadIdx.x % 32;
  const u32 empty_here = empty_of(empty, lane);
  float sums[NUM_SUMS];
  u32 release = 0;   // barrier of the stage that products in flight still read; 0 in lanes that have none
  int stage = 0, parity = 0;
  for (int unit = work.begin; unit < work.end; unit = work.next(unit)) {
    const int first = unit % work.k_blocks, stop = work.stop(unit);
    for (int k_block = first; k_block < stop; ++k_block) {
      const u32 at = ring + stage * STAGE_BYTES;
      const u64 weights = operand(at + group * UNIT_BYTES, 1024, 128);
      const u64 tokens = operand(at + ROW_TILES * UNIT_BYTES, N * 16, 128);
      barrier_wait(full + 8 * stage, parity);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step)
        wgmma_ss(sums, weights + step * 128, tokens + step * 2 * N, k_block > first || step > 0);
      wgmma_commit();
      wgmma_wait<1>();
      if (release != 0) release_stage(release);
      release = releases(lane) ? empty_here + 8 * stage : 0;
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    wgmma_wait<0>();
    if (release != 0) release_stage(release);   // before the store, so that copies go on during it
    release = 0;
    store_item(y, work, unit, stop, rank, group, arrived, sums);
  }
}

#else

DEVICE void consume(const Output& y, const Work& work, u32 rank, int group, u32* arrived, u32 ring, u32 full,
                    u32 empty) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  float sums[1][NUM_SUMS];
  const u32 weights = ring + group * UNIT_BYTES;
  Cursor at = {weights + warp * 512 + lane * 16, weights + scales_of(warp, lane),
               ((ring + ROW_TILES * UNIT_BYTES) & 0x3FFFF) / 16 | N << 16, full, empty_of(empty, lane), 0, STAGES};
  u32 release = 0;   // barrier of the stage that products in flight still read; 0 in lanes that have none
  for (int unit = work.begin; unit < work.end; unit = work.next(unit)) {
    const int stop = work.stop(unit);
    bool is_fresh = true;   // the next product overwrites the sums
    for (int k_block = unit % work.k_blocks; k_block < stop; ++k_block) {
      barrier_wait(at.full, at.parity);
      multiply_stage(at, is_fresh, release, sums);
      release = releases(lane) ? at.empty : 0;
      is_fresh = false;
      at.step();
    }
    wgmma_wait<0>();
    if (release != 0) release_stage(release);   // before the store, so that copies go on during it
    release = 0;
    store_item(y, work, unit, stop, rank, group, arrived, sums[0]);
  }
}

#endif

extern "C" __global__ void __launch_bounds__(GROUPS * 128 + COPIERS, 1)
    prefill_linear(const u8* weights, const u8* activations, i64 chunk_stride, const float* row_scale, u16* out,
                   int out_features, int k_blocks, int num_tokens, int splits, float4* partial, u32* counters) {
  extern __shared__ __align__(1024) u8 ring_bytes[];
  __shared__ __align__(8) u64 barriers[2 * STAGES];
  __shared__ u32 arrived[GROUPS];
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
  Work work = {out_features / (64 * ROW_TILES * CLUSTER), (num_tokens + N - 1) / N, k_blocks};
  work.cluster = blockIdx.x / CLUSTER;
  work.num_clusters = gridDim.x / CLUSTER;
  work.step = splits ? 1 : work.num_clusters;
  work.begin = splits ? work.stretch(work.cluster) : work.cluster * k_blocks;
  work.end = splits ? work.stretch(work.cluster + 1) : work.num_units();
  // Through a shuffle, so that the compiler knows it to be the same for a whole warp.
  const int group = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);
  if (group >= GROUPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == GROUPS * 128)
      produce(weights, activations, chunk_stride, work, rank, ring, full, empty);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
    const Output y = {out, row_scale, out_features, num_tokens, partial, counters};
    consume(y, work, rank, group, arrived, ring, full, empty);
  }
  // A block may not leave while others write to it.
  if (CLUSTER > 1) cluster_sync();
}
