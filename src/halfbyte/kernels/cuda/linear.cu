// y = x W^T for 1 to N rows of x, W streamed once: FP8, NVFP4 or bf16 weights in 64-row tiles.
//
// Walk: the work is (tile of 64 * ROW_TILES * CLUSTER output features) x (K block) units in one long row;
//   each cluster of the grid takes an equal stretch of it (split over K where stretches end inside a
//   tile), each of its blocks ROW_TILES of a tile's 64-row strips.
//   One warp copies weights and activations through a ring in shared memory; GROUPS warpgroups
//   multiply with the weights as the left operand, so that the tokens fill the narrow side only.
//   The blocks of a cluster read the same activations: each fetches a share for all of them.
//   Before waiting for the kernel ahead, the ring is filled with weights: they depend on nothing.
// Bytes: weights once (FP8 1, NVFP4 0.5625, bf16 2 a weight), activations once a cluster. FLOP: 2 T O I.
// Limits: output features whole tiles, K whole blocks (the preparer pads), T <= N.
//
// NVFP4_FAST looks up code times scale rounded to e4m3, in units of their own order, and multiplies e4m3
// activations, at twice the rate. Its activations are permuted in groups of 64 (OUT_E4M3_PAIRED).
//
// Set by the compiler's caller: FORMAT, N, GROUPS, TILES, STAGES, CLUSTER, PROMOTE (K blocks of e4m3 terms
// the tensor core adds up by itself; NVFP4_FAST: 0 = all), CONSUMER_REGISTERS (0: no register trade
// between the roles; else the copying role is a whole warpgroup); wgmma_* are generated for N.

struct Stretch {
  int begin, end;
};
DEVICE Stretch stretch_of(int block, int num_units, int num_blocks) {
  return {block * num_units / num_blocks, (block + 1) * num_units / num_blocks};
}

DEVICE void produce(const u8* weights, const u8* activations, int k_blocks, Stretch work, u32 rank,
                    u32 ring, u32 full, u32 empty) {
  const u64 once = policy_evict_first(), keep = policy_evict_last();
  auto load_weights = [&](int unit, int stage) {
    const int tile = unit / k_blocks, k_block = unit % k_blocks;
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      const u8* source =
          weights + (static_cast<i64>((tile * CLUSTER + rank) * ROW_TILES + r) * k_blocks + k_block) * UNIT_BYTES;
      bulk_load(ring + stage * STAGE_BYTES + r * UNIT_BYTES, source, UNIT_BYTES, full + 8 * stage, once);
    }
  };
  auto load_activations = [&](int unit, int stage) {
    const u32 target = ring + stage * STAGE_BYTES + ROW_TILES * UNIT_BYTES + rank * SHARE_BYTES;
    const u8* source =
        activations + static_cast<i64>(unit % k_blocks) * ACTIVATION_BYTES + rank * SHARE_BYTES;
    if (CLUSTER == 1)
      bulk_load(target, source, SHARE_BYTES, full + 8 * stage, keep);
    else
      bulk_load_all(target, source, SHARE_BYTES, full + 8 * stage, (1 << CLUSTER) - 1, keep);
  };
  const int num_units = work.end - work.begin;
  const int primed = num_units < STAGES ? num_units : STAGES;
  for (int i = 0; i < primed; ++i) {
    barrier_expect(full + 8 * i, STAGE_BYTES);
    load_weights(work.begin + i, i);
  }
  wait_for_previous_kernels();
  for (int i = 0; i < primed; ++i) load_activations(work.begin + i, i);
  for (int i = primed; i < num_units; ++i) {
    const int stage = i % STAGES;
    barrier_wait(empty + 8 * stage, (i / STAGES - 1) & 1);
    barrier_expect(full + 8 * stage, STAGE_BYTES);
    load_weights(work.begin + i, stage);
    load_activations(work.begin + i, stage);
  }
}

struct Output {
  u16* out;
  float* partial;
  const float* row_scale;
  i64 slot_stride;
  int stride, rows, k_blocks, num_units;
  int num_blocks, block, rank;   // clusters of the grid, this one, this block in it
};

// Sums of one tile to `out` if this cluster saw all of K, else to its slot of `partial`.
DEVICE void store_tile(const Output& y, int tile, int group, float (&sums)[TILES][NUM_SUMS]) {
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const int first = owner_of(tile * y.k_blocks, y.num_units, y.num_blocks);
  const int last = owner_of(tile * y.k_blocks + y.k_blocks - 1, y.num_units, y.num_blocks);
  const bool is_whole = first == last && y.out != nullptr;
  float* partial = y.partial + (y.block - first) * y.slot_stride;
#pragma unroll
  for (int r = 0; r < TILES; ++r) {
    const int row_tile = (tile * CLUSTER + y.rank) * ROW_TILES + group * TILES + r;
    // Rows 2g and 2g + 1 of a 16-row strip sit in tile rows g and g + 8 (kernels/repack.py).
    const int feature = row_tile * 64 + warp * 16 + (lane >> 2) * 2;
    const float2 scale = *reinterpret_cast<const float2*>(y.row_scale + feature);
    const int token = (lane & 3) * 2;
    const i64 at = static_cast<i64>(token) * y.stride + feature;
    // Apart, so that no products wait in registers for the branch.
    if (is_whole) {
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {   // token + 8 (i / 2) + i % 2
        if (token + i / 2 * 8 + i % 2 < y.rows)
          *reinterpret_cast<u32*>(y.out + at + static_cast<i64>(i / 2 * 8 + i % 2) * y.stride) =
              pack_bf16(sums[r][i / 2 * 4 + i % 2] * scale.x, sums[r][i / 2 * 4 + 2 + i % 2] * scale.y);
      }
    } else {
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {
        if (token + i / 2 * 8 + i % 2 < y.rows)
          *reinterpret_cast<float2*>(partial + at + static_cast<i64>(i / 2 * 8 + i % 2) * y.stride) =
              make_float2(sums[r][i / 2 * 4 + i % 2] * scale.x, sums[r][i / 2 * 4 + 2 + i % 2] * scale.y);
      }
    }
  }
}

// Hopper's e4m3 products add with about 14 bits, so that the tensor core sums 128 * PROMOTE terms at most
// and f32 additions the rest.
DEVICE void clear(float (&sums)[TILES][NUM_SUMS]) {
#pragma unroll
  for (int r = 0; r < TILES; ++r)
#pragma unroll
    for (int j = 0; j < NUM_SUMS; ++j) sums[r][j] = 0.0f;
}
DEVICE void add_terms(const float (&terms)[TILES][NUM_SUMS], float (&sums)[TILES][NUM_SUMS]) {
#pragma unroll
  for (int r = 0; r < TILES; ++r)
#pragma unroll
    for (int j = 0; j < NUM_SUMS; ++j) sums[r][j] += terms[r][j];
}

#if FORMAT == NVFP4 || FORMAT == NVFP4_FAST

#if N <= 16 && FORMAT == NVFP4

// Few tokens: the warp's own tensor-core instruction, which needs no agreement among four warps. The
// weights bind it to the memory, not to the tensor core's rate.
DEVICE void multiply(float* d, const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Four 8 x 16-byte core matrices, one row's address a lane: the tokens of two k-steps.
DEVICE void load_matrices(u32 address, u32 (&b)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(address));
}

DEVICE void consume(const Output& y, Stretch work, int group, u32 ring, u32 full, u32 empty) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const u32 weights = ring + group * TILES * UNIT_BYTES;
  const u32 rows = lane / 8 * (N * 16) + lane % 8 * 16;
  Cursor at = {weights + warp * 512 + lane * 16, weights + scales_of(warp, lane),
               0, full, empty, 0, STAGES};
  u32 tokens = ring + ROW_TILES * UNIT_BYTES + rows - at.codes;   // from the codes, which step
  for (int unit = work.begin; unit < work.end;) {
    const int tile = unit / y.k_blocks;
    const int tile_end = min((tile + 1) * y.k_blocks, work.end);
    // Even and odd k-steps apart: two chains of dependent products.
    float sums[TILES][NUM_SUMS], odd_sums[TILES][NUM_SUMS];
#pragma unroll
    for (int r = 0; r < TILES; ++r)
#pragma unroll
      for (int j = 0; j < NUM_SUMS; ++j) sums[r][j] = odd_sums[r][j] = 0.0f;
    for (; unit < tile_end; ++unit) {
      barrier_wait(at.full, at.parity);
#pragma unroll
      for (int r = 0; r < TILES; ++r) {
        const uint4 scales = load_shared_16(at.scales + r * UNIT_BYTES);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4 codes = load_shared_16(at.codes + r * UNIT_BYTES + half * 2048);
          u32 b[N / 8][2][4], a[4][4];
#pragma unroll
          for (int j = 0; j < N / 8; ++j)
#pragma unroll
            for (int pair = 0; pair < 2; ++pair)
              load_matrices(at.codes + tokens + (half * 8 + pair * 4) * (N * 16) + j * 128, b[j][pair]);
          if (r == TILES - 1 && half == 1) {
            __syncwarp();
            if (releases(lane)) release_stage(at.empty);
          }
          decode_half(codes, scales, half, a);
#pragma unroll
          for (int pair = 0; pair < 2; ++pair)
#pragma unroll
            for (int j = 0; j < N / 8; ++j) {
              multiply(&sums[r][4 * j], a[pair * 2], b[j][pair][0], b[j][pair][1]);
              multiply(&odd_sums[r][4 * j], a[pair * 2 + 1], b[j][pair][2], b[j][pair][3]);
            }
        }
      }
      at.step();
    }
#pragma unroll
    for (int r = 0; r < TILES; ++r)
#pragma unroll
      for (int j = 0; j < NUM_SUMS; ++j) sums[r][j] += odd_sums[r][j];
    store_tile(y, tile, group, sums);
  }
}

#else

DEVICE void consume(const Output& y, Stretch work, int group, u32 ring, u32 full, u32 empty) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  float sums[TILES][NUM_SUMS];
  const u32 weights = ring + group * TILES * UNIT_BYTES;
  Cursor at = {weights + warp * 512 + lane * 16, weights + scales_of(warp, lane),
               ((ring + ROW_TILES * UNIT_BYTES) & 0x3FFFF) / 16 | N << 16, full, empty_of(empty, lane), 0, STAGES};
  u32 release = 0;   // barrier of the stage that products in flight still read; 0 in lanes that have none
  for (int unit = work.begin; unit < work.end;) {
    const int tile = unit / y.k_blocks;
    const int tile_end = min((tile + 1) * y.k_blocks, work.end);
#if FORMAT == NVFP4_FAST && PROMOTE > 0
    float terms[TILES][NUM_SUMS];
    clear(sums);
    for (; unit < tile_end;) {
      const int window_end = min(unit + PROMOTE, tile_end);
      bool is_fresh = true;
      for (; unit < window_end; ++unit) {
        barrier_wait(at.full, at.parity);
        multiply_stage(at, is_fresh, release, terms);
        release = releases(lane) ? at.empty : 0;
        is_fresh = false;
        at.step();
      }
      wgmma_wait<0>();
      add_terms(terms, sums);
    }
#else
    bool is_fresh = true;   // the next product overwrites the sums
    for (; unit < tile_end; ++unit) {
      barrier_wait(at.full, at.parity);
      multiply_stage(at, is_fresh, release, sums);
      release = releases(lane) ? at.empty : 0;
      is_fresh = false;
      at.step();
    }
    wgmma_wait<0>();
#endif
    store_tile(y, tile, group, sums);
  }
}

#endif

#else

// The products of one K block, in flight when it returns.
DEVICE void multiply_stage(u64 weights, u64 tokens, bool is_fresh, float (&sums)[TILES][NUM_SUMS]) {
  wgmma_fence();
#pragma unroll
  for (int r = 0; r < TILES; ++r)
#pragma unroll
    for (int step = 0; step < 4; ++step)
      wgmma_ss(sums[r], weights + r * (UNIT_BYTES / 16) + step * 128, tokens + step * 2 * N,
               !(is_fresh && step == 0));
  wgmma_commit();
}

DEVICE void consume(const Output& y, Stretch work, int group, u32 ring, u32 full, u32 empty) {
  const int lane = threadIdx.x % 32;
  const u32 empty_here = empty_of(empty, lane);
  float sums[TILES][NUM_SUMS];
  u32 release = 0;   // barrier of the stage that products in flight still read; 0 in lanes that have none
  int stage = 0, parity = 0;
  for (int unit = work.begin; unit < work.end;) {
    const int tile = unit / y.k_blocks;
    const int tile_end = min((tile + 1) * y.k_blocks, work.end);
#if FORMAT == FP8
    float terms[TILES][NUM_SUMS];
    clear(sums);
    float (&target)[TILES][NUM_SUMS] = terms;
    constexpr int WINDOW = PROMOTE;
#else
    float (&target)[TILES][NUM_SUMS] = sums;
    constexpr int WINDOW = 1 << 30;
#endif
    for (; unit < tile_end;) {
      const int window_end = min(WINDOW, tile_end - unit) + unit;
      bool is_fresh = true;   // the next product overwrites the sums
      for (; unit < window_end; ++unit) {
        const u32 at = ring + stage * STAGE_BYTES;
        barrier_wait(full + 8 * stage, parity);
        multiply_stage(operand(at + group * TILES * UNIT_BYTES, 1024, 128),
                       operand(at + ROW_TILES * UNIT_BYTES, N * 16, 128), is_fresh, target);
        wgmma_wait<1>();
        if (release != 0) release_stage(release);
        release = releases(lane) ? empty_here + 8 * stage : 0;
        is_fresh = false;
        if (++stage == STAGES) stage = 0, parity ^= 1;
      }
      wgmma_wait<0>();
#if FORMAT == FP8
      add_terms(terms, sums);
#endif
    }
    store_tile(y, tile, group, sums);
  }
}

#endif

extern "C" __global__ void __launch_bounds__(GROUPS * 128 + COPIERS, 1)
    stream_linear(const u8* weights, const u8* activations, const float* row_scale, u16* out,
                  float* partial, int out_features, int k_blocks, int rows) {
  extern __shared__ __align__(1024) u8 ring_bytes[];
  __shared__ __align__(8) u64 barriers[2 * STAGES];
  const u32 ring = shared_address(ring_bytes);
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
  const int num_units = out_features / (64 * ROW_TILES * CLUSTER) * k_blocks;
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
  const int num_blocks = gridDim.x / CLUSTER, block = blockIdx.x / CLUSTER, rank = blockIdx.x % CLUSTER;
  const Stretch work = stretch_of(block, num_units, num_blocks);
  // Through a shuffle, so that the compiler knows it to be the same for a whole warp.
  const int group = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);
  if (group >= GROUPS) {
#if CONSUMER_REGISTERS > 0
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
#endif
    if (threadIdx.x == GROUPS * 128)
      produce(weights, activations, k_blocks, work, rank, ring, full, empty);
  } else {
#if CONSUMER_REGISTERS > 0
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
#endif
    const Output y = {out, partial, row_scale, static_cast<i64>(rows) * out_features,
                      out_features, rows, k_blocks, num_units, num_blocks, block, rank};
    consume(y, work, group, ring, full, empty);
  }
  // A block may not leave while others write to it.
  if (CLUSTER > 1) cluster_sync();
}
