// The queries of a chunk of one sequence against its paged FP8 keys and values, causal (prefill).
//
// Walk: first `lay_out_context`, a block for 128 keys or values of one kv head: it turns them into fp16, which
//   holds every e4m3 value, in the order in which the tensor core reads them, once for all queries.
//   Then `chunk_attention`, grid (row tiles, kv heads, splits). The query heads of one kv head and the
//   chunk's tokens make rows, row r = token r / GROUP, head r % GROUP, so that all of them share what
//   is read. A block holds 128 rows and walks over its share of the context, 128 keys at a time, through
//   rings in shared memory that one thread fills; two warpgroups of 64 rows multiply. While the tensor
//   core multiplies weights and values of one tile, the weights of the next are made. Splits merge through memory: the last block to finish adds the others
//   up in order, so that two runs give the same bits.
// Bytes: laying out 6 a cached element; then 4 * context * HEAD_SIZE a row tile, from L2.
//   FLOP: 4 * rows * context * HEAD_SIZE.
// Why: turning elements into fp16 where they are multiplied, once a row tile, held the products up: 430
//   TFLOP/s instead of 700 (benchmarks/notes-kernels.md).
// Source: online softmax over tiles (Milakov and Gimelshein 2018; Dao et al. 2022), products and softmax
//   of neighbouring tiles overlapped (Shah et al. 2024).
// Limits: HEAD_SIZE 64 or 128, pages of a multiple of 8 slots.
//
// Set by the caller: HEAD_SIZE, NUM_HEADS, NUM_KV_HEADS, PAGE_SLOTS; wgmma_ss multiplies 64 queries and 128 keys,
// wgmma_rs 64 rows of weights and 16 values (the compiler's caller generates both).

constexpr int GROUP = NUM_HEADS / NUM_KV_HEADS;
constexpr int ROWS = 128, KEYS = 128, STAGES = 3;
constexpr int CHUNKS = HEAD_SIZE / 8;                  // 16-byte pieces of a row of fp16
constexpr int EIGHT_ROWS = CHUNKS * 128;               // bytes of eight rows: pieces of eight rows together
constexpr int TILE_BYTES = KEYS * HEAD_SIZE * 2;
constexpr int QUERY_BYTES = ROWS * HEAD_SIZE * 2;
constexpr int HALVES = HEAD_SIZE / 64;                 // 64-byte halves of a cached row
constexpr int PARTIAL = HEAD_SIZE + 2;                 // output, largest score, sum of weights
constexpr float NOTHING = -1e30f;                      // a score that no key has

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
DEVICE void fence_async_reads() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void meet(int barrier, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}
DEVICE void store_shared_16(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
DEVICE float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE u32 bf16_pair_to_f16(u32 pair) {
  return pack_f16(clamp_to(__uint_as_float(pair << 16), F16_MAX),
                  clamp_to(__uint_as_float(pair & 0xFFFF0000u), F16_MAX));
}
// Unswizzled operand of 8 x 16-byte pieces: the pieces of a row lie 128 bytes apart, eight rows EIGHT_ROWS.
// With rows along the sum (values, read transposed) the two strides change places.
DEVICE u64 by_features(u32 address) {
  return static_cast<u64>((address & 0x3FFFF) >> 4) | static_cast<u64>(128 >> 4) << 16 |
         static_cast<u64>(EIGHT_ROWS >> 4) << 32;
}
DEVICE u64 by_rows(u32 address) {
  return static_cast<u64>((address & 0x3FFFF) >> 4) | static_cast<u64>(EIGHT_ROWS >> 4) << 16 |
         static_cast<u64>(128 >> 4) << 32;
}

// ---- laying out ---------------------------------------------------------------------------------------

// Grid (tiles, kv heads, 2: keys, values), 128 threads. Keys behind the context's last repeat it, so that
// nothing unwritten is read. Tile t of kv head h lies at (h * tiles + t) of the half of `out` that
// keys, or values, have.
extern "C" __global__ void __launch_bounds__(128)
    lay_out_context(const u8* k_cache, const u8* v_cache, const int* pages, int num_keys, uint4* out) {
  const int tile = blockIdx.x, kv_head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u8* cache = blockIdx.z == 0 ? k_cache : v_cache;
  const i64 place = (static_cast<i64>(blockIdx.z) * NUM_KV_HEADS + kv_head) * gridDim.x + tile;
  uint4* target = out + place * (TILE_BYTES / 16);
  let_next_kernel_start();
  wait_for_previous_kernels();
#pragma unroll
  for (int i = 0; i < KEYS / 8 / 4; ++i) {
    // Eight lanes write the same piece of eight rows: 128 bytes in a row.
    const int eight = i * 4 + warp, key = min(tile * KEYS + eight * 8 + lane % 8, num_keys - 1);
    const i64 slot = static_cast<i64>(pages[key / PAGE_SLOTS]) * PAGE_SLOTS + key % PAGE_SLOTS;
    const u8* row = cache + (slot * NUM_KV_HEADS + kv_head) * HEAD_SIZE + lane / 8 * 16;
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      const uint4 w = *reinterpret_cast<const uint4*>(row + half * 64);
      uint4* at = target + eight * (EIGHT_ROWS / 16) + (half * 4 + lane / 8) * 16 + lane % 8;
      at[0] = make_uint4(e4m3_to_f16(w.x), e4m3_to_f16(w.x >> 16), e4m3_to_f16(w.y), e4m3_to_f16(w.y >> 16));
      at[8] = make_uint4(e4m3_to_f16(w.z), e4m3_to_f16(w.z >> 16), e4m3_to_f16(w.w), e4m3_to_f16(w.w >> 16));
    }
  }
}

// ---- the loading thread ---------------------------------------------------------------------------------

struct Ring {
  u32 data, full, empty;

  DEVICE u32 stage(int i) const { return data + (i % STAGES) * TILE_BYTES; }
  DEVICE u32 full_at(int i) const { return full + i % STAGES * 8; }
  DEVICE u32 empty_at(int i) const { return empty + i % STAGES * 8; }

  DEVICE void load(int i, const u8* tile, u64 policy) const {
    if (i >= STAGES) barrier_wait(empty_at(i), (i / STAGES - 1) & 1);
    barrier_expect(full_at(i), TILE_BYTES);
    bulk_load(stage(i), tile, TILE_BYTES, full_at(i), policy);
  }
};

// ---- the multiplying warpgroups ---------------------------------------------------------------------

struct Softmax {   // of rows g and g + 8 of a warp's 16; `scale` includes log2(e)
  float largest[2], total[2], scale;

  // Turns a tile's scores into weights; how much all before them shrinks.
  DEVICE void add(float (&s)[KEYS / 2], float (&shrink)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float top = s[2 * row];
#pragma unroll
      for (int i = 0; i < KEYS / 8; ++i) top = fmaxf(top, fmaxf(s[4 * i + 2 * row], s[4 * i + 2 * row + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2));
      top = fmaxf(top, largest[row]);
      shrink[row] = power_of_two((largest[row] - top) * scale);
      largest[row] = top;
      // Where there is no key yet, weights are 0, not 1.
      const float offset = top == NOTHING ? 0.0f : top * scale;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < KEYS / 8; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = s[4 * i + 2 * row + j];
          x = power_of_two(x * scale - offset);
          sum += x;
        }
      total[row] = total[row] * shrink[row] + sum;   // of this thread's keys; lanes are added at the end
    }
  }
};

DEVICE void score(u32 queries, u32 keys, float (&s)[KEYS / 2]) {
  wgmma_fence();
  const u64 a = by_features(queries), b = by_features(keys);
#pragma unroll
  for (int step = 0; step < HEAD_SIZE / 16; ++step)
    wgmma_ss(s, a + step * (256 / 16), b + step * (256 / 16), step > 0);
  wgmma_commit();
}

DEVICE void gather_values(const u32 (&p)[KEYS / 16][4], u32 values, float (&out)[HEAD_SIZE / 2]) {
  wgmma_fence();
  const u64 b = by_rows(values);
#pragma unroll
  for (int step = 0; step < KEYS / 16; ++step)
    wgmma_rs(out, p[step], b + step * (2 * EIGHT_ROWS / 16), 1);
  wgmma_commit();
}

DEVICE void pack_weights(const float (&s)[KEYS / 2], u32 (&p)[KEYS / 16][4]) {
#pragma unroll
  for (int step = 0; step < KEYS / 16; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) p[step][i] = pack_f16(s[8 * step + 2 * i], s[8 * step + 2 * i + 1]);
}

// Scores of keys behind a row's own token become NOTHING. `limits`: the last key of rows g and g + 8.
DEVICE void mask(int tile, const int (&limits)[2], float (&s)[KEYS / 2]) {
  const int first = tile * KEYS + threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < KEYS / 8; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (first + i * 8 + j % 2 > limits[j / 2]) s[4 * i + j] = NOTHING;
}

// 64 rows of queries as fp16 into shared memory; rows behind the last are zero.
DEVICE void load_queries(const u16* q, int first_row, int num_rows, int kv_head, u32 queries) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int eight = 0; eight < 2; ++eight) {
    const int group = eight * 4 + warp, row = first_row + group * 8 + lane % 8;
    const u16* from = q + (static_cast<i64>(row / GROUP) * NUM_HEADS + kv_head * GROUP + row % GROUP) * HEAD_SIZE;
#pragma unroll
    for (int i = 0; i < CHUNKS / 4; ++i) {
      const int chunk = i * 4 + lane / 8;
      uint4 w = make_uint4(0, 0, 0, 0);
      if (row < num_rows) w = *reinterpret_cast<const uint4*>(from + chunk * 8);
      store_shared_16(queries + group * EIGHT_ROWS + chunk * 128 + lane % 8 * 16, bf16_pair_to_f16(w.x),
                      bf16_pair_to_f16(w.y), bf16_pair_to_f16(w.z), bf16_pair_to_f16(w.w));
    }
  }
  fence_async_reads();
}

// Sums `count` partial results of one row in order, for two features, and stores them.
DEVICE void merge_row(const float* partials, int count, i64 stride, int feature, u16* out) {
  float largest = NOTHING;
  for (int i = 0; i < count; ++i) largest = fmaxf(largest, partials[i * stride + HEAD_SIZE]);
  float total = 0.0f, x = 0.0f, y = 0.0f;
  for (int i = 0; i < count; ++i) {
    const float* p = partials + i * stride;
    const float share = power_of_two(p[HEAD_SIZE] - largest);
    total += p[HEAD_SIZE + 1] * share;
    x += p[feature] * share;
    y += p[feature + 1] * share;
  }
  *reinterpret_cast<u32*>(out) = pack_bf16(x / total, y / total);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    chunk_attention(const u16* q, const u8* context, int start, int num_tokens, float scale, float* workspace,
                    u32* counters, u16* out) {
  extern __shared__ __align__(1024) u8 shared[];
  __shared__ __align__(8) u64 barriers[4 * STAGES];
  __shared__ u32 arrived;
  const u32 base = shared_address(shared), first_barrier = shared_address(barriers);
  const Ring keys = {base + QUERY_BYTES, first_barrier, first_barrier + 8 * STAGES};
  const Ring values = {keys.data + STAGES * TILE_BYTES, first_barrier + 16 * STAGES, first_barrier + 24 * STAGES};
  // The tiles with most keys begin first.
  const int row_tile = gridDim.x - 1 - blockIdx.x, kv_head = blockIdx.y;
  const int first_row = row_tile * ROWS, num_rows = num_tokens * GROUP;
  const int last_token = min(num_tokens - 1, (first_row + ROWS - 1) / GROUP);
  const int num_tiles = (start + last_token) / KEYS + 1;
  const int share = (num_tiles + gridDim.z - 1) / gridDim.z, num_splits = (num_tiles + share - 1) / share;
  const int begin = blockIdx.z * share, end = min(num_tiles, begin + share);
  let_next_kernel_start();
  if (begin >= end) return;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(keys.full + 8 * i, 1);
      barrier_init(values.full + 8 * i, 1);
      barrier_init(keys.empty + 8 * i, 8);
      barrier_init(values.empty + 8 * i, 8);
    }
    barrier_init_fence();
  }
  __syncthreads();
  wait_for_previous_kernels();
  // Through a shuffle, so that the compiler knows it to be the same for a whole warp.
  const int group = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0);
  if (group == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x > 256) return;
    const i64 laid_out = (start + num_tokens + KEYS - 1) / KEYS;   // tiles of a kv head
    const u8* key = context + (kv_head * laid_out + begin) * TILE_BYTES;
    const u8* value = key + NUM_KV_HEADS * laid_out * TILE_BYTES;
    const u64 keep = policy_evict_last();
    for (int i = 0; i < end - begin; ++i) {
      keys.load(i, key + static_cast<i64>(i) * TILE_BYTES, keep);
      values.load(i, value + static_cast<i64>(i) * TILE_BYTES, keep);
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const int my_row = first_row + group * 64 + warp * 16 + lane / 4;   // and the eighth behind it
  const u32 queries = base + group * 64 * HEAD_SIZE * 2;
  load_queries(q, first_row + group * 64, num_rows, kv_head, queries);
  meet(1 + group, 128);
  const int limits[2] = {start + my_row / GROUP, start + (my_row + 8) / GROUP};
  const int seen_by_all = start + (first_row + group * 64) / GROUP;   // the last key of this warpgroup's first row
  Softmax softmax = {{NOTHING, NOTHING}, {0.0f, 0.0f}, scale};
  float s[KEYS / 2], o[HEAD_SIZE / 2], shrink[2];
  u32 p[KEYS / 16][4];
#pragma unroll
  for (int j = 0; j < HEAD_SIZE / 2; ++j) o[j] = 0.0f;
  // A stage of keys is freed behind the softmax, at an address that the assembler must take to depend on it: it
  // would move the wait for the products of values ahead of the softmax, and nothing would overlap.
  const auto weigh = [&](int tile) {
    if ((tile + 1) * KEYS - 1 > seen_by_all) mask(tile, limits, s);
    softmax.add(s, shrink);
    const u32 offset = fminf(softmax.total[0], softmax.total[1]) < 0.0f ? 4 : 0;   // never: they are sums of powers
    if (lane == 0) barrier_arrive(keys.empty_at(tile - begin) + offset);
  };
  barrier_wait(keys.full_at(0), 0);
  score(queries, keys.stage(0), s);
  wgmma_wait<0>();
  weigh(begin);
  pack_weights(s, p);
  for (int tile = begin + 1; tile < end; ++tile) {
    const int i = tile - begin;
    barrier_wait(keys.full_at(i), i / STAGES & 1);
    score(queries, keys.stage(i), s);
    barrier_wait(values.full_at(i - 1), (i - 1) / STAGES & 1);
    gather_values(p, values.stage(i - 1), o);
    wgmma_wait<1>();
    weigh(tile);
    wgmma_wait<0>();
    if (lane == 0) barrier_arrive(values.empty_at(i - 1));
#pragma unroll
    for (int j = 0; j < HEAD_SIZE / 2; ++j) o[j] *= shrink[j / 2 % 2];
    pack_weights(s, p);
  }
  const int last = end - begin - 1;
  barrier_wait(values.full_at(last), last / STAGES & 1);
  gather_values(p, values.stage(last), o);
  wgmma_wait<0>();

  const i64 pair = static_cast<i64>(row_tile) * NUM_KV_HEADS + kv_head;
  float* partials = workspace + pair * gridDim.z * ROWS * PARTIAL;
  const auto place = [&](int row) {
    return out + (static_cast<i64>(row / GROUP) * NUM_HEADS + kv_head * GROUP + row % GROUP) * HEAD_SIZE;
  };
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float total = softmax.total[row];
    total += __shfl_xor_sync(0xFFFFFFFFu, total, 1);
    total += __shfl_xor_sync(0xFFFFFFFFu, total, 2);
    const int at = my_row + 8 * row;
    if (num_splits > 1) {
      float* mine = partials + (static_cast<i64>(blockIdx.z) * ROWS + at - first_row) * PARTIAL;
#pragma unroll
      for (int j = 0; j < HEAD_SIZE / 8; ++j)
        *reinterpret_cast<float2*>(mine + j * 8 + lane % 4 * 2) = make_float2(o[4 * j + 2 * row], o[4 * j + 2 * row + 1]);
      if (lane % 4 == 0) {
        mine[HEAD_SIZE] = softmax.largest[row] == NOTHING ? NOTHING : softmax.largest[row] * scale;
        mine[HEAD_SIZE + 1] = total;
      }
    } else if (at < num_rows) {
      const float gain = 1.0f / total;
#pragma unroll
      for (int j = 0; j < HEAD_SIZE / 8; ++j)
        *reinterpret_cast<u32*>(place(at) + j * 8 + lane % 4 * 2) =
            pack_bf16(o[4 * j + 2 * row] * gain, o[4 * j + 2 * row + 1] * gain);
    }
  }
  if (num_splits == 1) return;
  __threadfence();
  meet(3, 256);
  if (threadIdx.x == 0) arrived = atomicAdd(counters + pair, 1);
  meet(3, 256);
  if (arrived != num_splits - 1) return;
  __threadfence();
  if (threadIdx.x == 0) counters[pair] = 0;
  for (int item = threadIdx.x; item < ROWS * HEAD_SIZE / 2; item += 256) {
    const int row = item / (HEAD_SIZE / 2), feature = item % (HEAD_SIZE / 2) * 2;
    if (first_row + row < num_rows)
      merge_row(partials + static_cast<i64>(row) * PARTIAL, num_splits, static_cast<i64>(ROWS) * PARTIAL, feature,
                place(first_row + row) + feature);
  }
}
