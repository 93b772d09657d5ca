// y = x W^T for 1 to N rows of x, W streamed once: FP8, NVFP4 or bf16 weights in 64-row tiles.
//
// Walk: the work is (tile of 64 * ROW_TILES output features) x (K block) units in one long row; each
//   block of the grid takes an equal stretch of it (split over K where stretches end inside a tile).
//   One warp copies weights and activations through a ring in shared memory; GROUPS warpgroups
//   multiply with the weights as the left operand, so that the tokens fill the narrow side only.
//   Before waiting for the kernel ahead, the ring is filled with weights: they depend on nothing.
// Bytes: weights once (FP8 1, NVFP4 0.5625, bf16 2 a weight), activations once a block. FLOP: 2 T O I.
// Limits: output features a multiple of 64 * ROW_TILES, K whole blocks (the preparer pads), T <= N.
//
// Set by the compiler's caller: FORMAT, N, GROUPS, TILES, STAGES, GROUP_STEPS (k-steps of NVFP4 decoded
// before they are multiplied: 4 overlaps within a warpgroup, 8 among them), CONSUMER_REGISTERS (0: no register
// trade between the roles; else the copying role is a whole warpgroup); wgmma_* are generated for N.

#define FP8 0
#define NVFP4 1
#define BF16 2

constexpr int ROW_TILES = GROUPS * TILES;
constexpr int UNIT_BYTES = FORMAT == NVFP4 ? 4608 : 8192;  // 64 rows of one K block
constexpr int ACTIVATION_BYTES = FORMAT == NVFP4 ? N * 256 : N * 128;
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

struct Stretch {
  int begin, end;
};
DEVICE Stretch stretch_of(int block, int num_units, int num_blocks) {
  return {block * num_units / num_blocks, (block + 1) * num_units / num_blocks};
}

DEVICE void produce(const u8* weights, const u8* activations, int k_blocks, Stretch work, u32 ring,
                    u32 full, u32 empty) {
  const u64 once = policy_evict_first(), keep = policy_evict_last();
  auto load_weights = [&](int unit, int stage) {
    const int tile = unit / k_blocks, k_block = unit % k_blocks;
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      const u8* source =
          weights + (static_cast<i64>(tile * ROW_TILES + r) * k_blocks + k_block) * UNIT_BYTES;
      bulk_load(ring + stage * STAGE_BYTES + r * UNIT_BYTES, source, UNIT_BYTES, full + 8 * stage, once);
    }
  };
  auto load_activations = [&](int unit, int stage) {
    bulk_load(ring + stage * STAGE_BYTES + ROW_TILES * UNIT_BYTES,
              activations + static_cast<i64>(unit % k_blocks) * ACTIVATION_BYTES, ACTIVATION_BYTES,
              full + 8 * stage, keep);
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
  int stride, rows, k_blocks, num_units, num_blocks;
};

// Sums of one tile to `out` if this block saw all of K, else to this block's slot of `partial`.
DEVICE void store_tile(const Output& y, int tile, int group, float (&sums)[TILES][NUM_SUMS]) {
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const int first = owner_of(tile * y.k_blocks, y.num_units, y.num_blocks);
  const int last = owner_of(tile * y.k_blocks + y.k_blocks - 1, y.num_units, y.num_blocks);
  float* partial = y.partial + (static_cast<int>(blockIdx.x) - first) * y.slot_stride;
#pragma unroll
  for (int r = 0; r < TILES; ++r) {
    const int row_tile = tile * ROW_TILES + group * TILES + r;
    // Rows 2g and 2g + 1 of a 16-row strip sit in tile rows g and g + 8 (kernels/repack.py).
    const int feature = row_tile * 64 + warp * 16 + (lane >> 2) * 2;
    const float2 scale = *reinterpret_cast<const float2*>(y.row_scale + feature);
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int token = j * 8 + (lane & 3) * 2 + odd;
        if (token < y.rows) {
          const float low = sums[r][4 * j + odd] * scale.x, high = sums[r][4 * j + 2 + odd] * scale.y;
          const i64 at = static_cast<i64>(token) * y.stride + feature;
          if (first == last && y.out != nullptr)
            *reinterpret_cast<u32*>(y.out + at) = pack_bf16(low, high);
          else
            *reinterpret_cast<float2*>(partial + at) = make_float2(low, high);
        }
      }
    }
  }
}

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

#if N <= 16

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
  Cursor at = {weights + warp * 512 + lane * 16, weights + 4096 + (warp * 8 + (lane >> 2)) * 16,
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
            if (lane == 0) barrier_arrive(at.empty);
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

// One K block: decode half a row tile, multiply it while the next half is decoded.
DEVICE void multiply_stage(const Cursor& at, bool is_fresh, u32 release, float (&sums)[TILES][NUM_SUMS]) {
  u32 a[2][4][4];
#pragma unroll
  for (int r = 0; r < TILES; ++r) {
    const uint4 scales = load_shared_16(at.scales + r * UNIT_BYTES);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 codes = load_shared_16(at.codes + r * UNIT_BYTES + half * 2048);
      decode_half(codes, scales, half, a[half]);
#if GROUP_STEPS == 8
      if (half == 0) continue;
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 8; ++step) {
        const u64 tokens = static_cast<u64>(128 / 16) << 32 | (at.tokens + step * 2 * N);
        wgmma_rs(sums[r], a[step / 4][step % 4], tokens, !(is_fresh && step == 0));
      }
      wgmma_commit();
      wgmma_wait<0>();
#else
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const u64 tokens = static_cast<u64>(128 / 16) << 32 | (at.tokens + (half * 4 + step) * 2 * N);
        wgmma_rs(sums[r], a[half][step], tokens, !(is_fresh && half == 0 && step == 0));
      }
      wgmma_commit();
      // One group may stay in flight: it reads this half's registers, the next decodes the other.
      wgmma_wait<1>();
      if (r == 0 && half == 0 && release != 0) barrier_arrive(release);
#endif
    }
  }
}

DEVICE void consume(const Output& y, Stretch work, int group, u32 ring, u32 full, u32 empty) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  float sums[TILES][NUM_SUMS];
  const u32 weights = ring + group * TILES * UNIT_BYTES;
  Cursor at = {weights + warp * 512 + lane * 16, weights + 4096 + (warp * 8 + (lane >> 2)) * 16,
               (ring + ROW_TILES * UNIT_BYTES) / 16 | N << 16, full, empty, 0, STAGES};
  u32 release = 0;   // barrier of the stage that products in flight still read; 0 in all lanes but one
  for (int unit = work.begin; unit < work.end;) {
    const int tile = unit / y.k_blocks;
    const int tile_end = min((tile + 1) * y.k_blocks, work.end);
    bool is_fresh = true;   // the next product overwrites the sums
    for (; unit < tile_end; ++unit) {
      barrier_wait(at.full, at.parity);
      multiply_stage(at, is_fresh, release, sums);
#if GROUP_STEPS == 8
      if (lane == 0) barrier_arrive(at.empty);
#else
      release = lane == 0 ? at.empty : 0;
#endif
      is_fresh = false;
      at.step();
    }
    wgmma_wait<0>();
    store_tile(y, tile, group, sums);
  }
}

#endif

#else

// Hopper's e4m3 products add with about 14 bits, so FP8 sums 128 terms at most in the tensor core and
// the rest in f32; bf16 products add in f32 as they are.
DEVICE void multiply_stage(u64 weights, u64 tokens, bool is_fresh, float (&sums)[TILES][NUM_SUMS]) {
#if FORMAT == FP8
#pragma unroll
  for (int r = 0; r < TILES; ++r) {
    float terms[NUM_SUMS];
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step)
      wgmma_ss(terms, weights + r * (UNIT_BYTES / 16) + step * 128, tokens + step * 2 * N, step > 0);
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int j = 0; j < NUM_SUMS; ++j) sums[r][j] = is_fresh ? terms[j] : sums[r][j] + terms[j];
  }
#else
  wgmma_fence();
#pragma unroll
  for (int r = 0; r < TILES; ++r)
#pragma unroll
    for (int step = 0; step < 4; ++step)
      wgmma_ss(sums[r], weights + r * (UNIT_BYTES / 16) + step * 128, tokens + step * 2 * N,
               !(is_fresh && step == 0));
  wgmma_commit();
  wgmma_wait<0>();
#endif
}

DEVICE void consume(const Output& y, Stretch work, int group, u32 ring, u32 full, u32 empty) {
  const int lane = threadIdx.x % 32;
  float sums[TILES][NUM_SUMS];
  int stage = 0, parity = 0;
  for (int unit = work.begin; unit < work.end;) {
    const int tile = unit / y.k_blocks;
    const int tile_end = min((tile + 1) * y.k_blocks, work.end);
    bool is_fresh = true;   // the next product overwrites the sums
    for (; unit < tile_end; ++unit) {
      const u32 at = ring + stage * STAGE_BYTES;
      barrier_wait(full + 8 * stage, parity);
      multiply_stage(operand(at + group * TILES * UNIT_BYTES, 1024, 128),
                     operand(at + ROW_TILES * UNIT_BYTES, N * 16, 128), is_fresh, sums);
      if (lane == 0) barrier_arrive(empty + 8 * stage);
      is_fresh = false;
      if (++stage == STAGES) stage = 0, parity ^= 1;
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
  const int num_units = out_features / (64 * ROW_TILES) * k_blocks;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(full + 8 * stage, 1);
      barrier_init(empty + 8 * stage, GROUPS * 4);
    }
    barrier_init_fence();
  }
  __syncthreads();
  let_next_kernel_start();
  const Stretch work = stretch_of(blockIdx.x, num_units, gridDim.x);
  // Through a shuffle, so that the compiler knows it to be the same for a whole warp.
  const int group = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);
  if (group >= GROUPS) {
#if CONSUMER_REGISTERS > 0
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
#endif
    if (threadIdx.x == GROUPS * 128) produce(weights, activations, k_blocks, work, ring, full, empty);
  } else {
#if CONSUMER_REGISTERS > 0
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
#endif
    const Output y = {out, partial, row_scale, static_cast<i64>(rows) * out_features,
                      out_features, rows, k_blocks, num_units, static_cast<int>(gridDim.x)};
    consume(y, work, group, ring, full, empty);
  }
}
