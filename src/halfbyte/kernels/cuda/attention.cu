// One query token a sequence against its paged FP8 keys and values (decode).
//
// Walk: grid (splits, kv heads, sequences). A block takes an equal share of the context, each warp 16
//   keys at a time through a ring of its own in shared memory, filled by asynchronous copies: scores
//   and outputs are tensor-core products whose 16 rows are the query heads of one kv head, so that
//   every cached byte is loaded once. Warps merge in shared memory, splits through memory: the last
//   block to finish adds the others up in order, so that two runs give the same bits.
// Bytes: 2 * context * kv heads * HEAD_SIZE. FLOP: 4 * context * heads * HEAD_SIZE.
// Limits: at most 16 query heads a kv head, HEAD_SIZE 64 or 128, pages of a multiple of 16 slots.
//
// Set by the caller: HEAD_SIZE, NUM_HEADS, NUM_KV_HEADS, PAGE_SLOTS, OUT_KIND, WARPS (of a block: fewer
// when there are many sequences, which then fill the device by themselves).

constexpr int GROUP = NUM_HEADS / NUM_KV_HEADS;
constexpr int STAGES = 3;                    // 16-key blocks a warp has in its ring
constexpr int CHUNKS = HEAD_SIZE / 16;       // 16-byte pieces of a row
constexpr int STAGE_BYTES = 2 * 16 * HEAD_SIZE;
constexpr int WORDS = HEAD_SIZE / 16;        // 32-bit words of a key a thread holds
constexpr int VALUE_WORDS = HEAD_SIZE / 32;  // of a value
constexpr int TILES = HEAD_SIZE / 8;         // output tiles of 8 features
constexpr int PARTIAL = HEAD_SIZE + 2;       // output, largest score, sum of weights
constexpr float NOTHING = -1e30f;            // a score that no key has

DEVICE void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE u32 bf16_pair_to_f16(u32 pair) {
  return pack_f16(clamp_to(__uint_as_float(pair << 16), F16_MAX),
                  clamp_to(__uint_as_float(pair & 0xFFFF0000u), F16_MAX));
}

struct Weights {     // running softmax of rows g and g + 8 of a warp
  float largest[2], total[2];
};

// Query operand: k-step `s` of thread t covers four features of chunk s / 4 (see load_keys).
DEVICE void load_queries(const u16* q, int g, int t, u32 (&a)[WORDS][4]) {
#pragma unroll
  for (int s = 0; s < WORDS; ++s) {
    const int feature = s / 4 * 64 + t * 16 + s % 4 * 4;
    const uint2 none = make_uint2(0, 0);
    const uint2 low = g < GROUP ? *reinterpret_cast<const uint2*>(q + g * HEAD_SIZE + feature) : none;
    const uint2 high =
        g + 8 < GROUP ? *reinterpret_cast<const uint2*>(q + (g + 8) * HEAD_SIZE + feature) : none;
    a[s][0] = bf16_pair_to_f16(low.x);
    a[s][1] = bf16_pair_to_f16(high.x);
    a[s][2] = bf16_pair_to_f16(low.y);
    a[s][3] = bf16_pair_to_f16(high.y);
  }
}

DEVICE void copy_16(u32 destination, const u8* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(destination), "l"(source) : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
DEVICE uint2 load_shared_8(u32 address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}

// Where piece `chunk` of row `key` lies: permuted so that eight lanes that read pieces t of two
// neighbouring keys, or pieces g of four keys two apart, touch all banks once.
DEVICE u32 place(int key, int chunk) {
  const int permuted = CHUNKS == 8 ? chunk ^ (key & 6) ^ (key & 1) * 4 : chunk;
  return key * HEAD_SIZE + permuted * 16;
}

// Start copying 16 keys and values. Slots past the context repeat its last one, so that nothing
// unwritten is read.
DEVICE void start_block(u32 stage, const u8* keys, const u8* values, i64 first_slot, int num_valid,
                        int lane) {
  constexpr i64 STRIDE = NUM_KV_HEADS * HEAD_SIZE;
#pragma unroll
  for (int i = 0; i < CHUNKS / 2; ++i) {
    const int row = (i * 32 + lane) / CHUNKS, chunk = lane % CHUNKS;
    const i64 at = (first_slot + min(row, num_valid - 1)) * STRIDE + chunk * 16;
    copy_16(stage + place(row, chunk), keys + at);
    copy_16(stage + 16 * HEAD_SIZE + place(row, chunk), values + at);
  }
}

// Key 8 * tile + g, features {chunk * 64 + 16 t ...}.
DEVICE void load_key(u32 stage, int tile, int g, int t, u32 (&words)[WORDS]) {
#pragma unroll
  for (int chunk = 0; chunk < WORDS / 4; ++chunk) {
    const uint4 v = load_shared_16(stage + place(tile * 8 + g, chunk * 4 + t));
    words[chunk * 4] = v.x;
    words[chunk * 4 + 1] = v.y;
    words[chunk * 4 + 2] = v.z;
    words[chunk * 4 + 3] = v.w;
  }
}

// An eighth g of value `key`.
DEVICE void load_value(u32 stage, int key, int g, u32 (&words)[VALUE_WORDS]) {
  const u32 rows = stage + 16 * HEAD_SIZE;
  if (VALUE_WORDS == 4) {
    const uint4 v = load_shared_16(rows + place(key, g));
    words[0] = v.x;
    words[1] = v.y;
    words[VALUE_WORDS - 2] = v.z;
    words[VALUE_WORDS - 1] = v.w;
  } else {
    const uint2 v = load_shared_8(rows + place(key, g / 2) + (g & 1) * 8);
    words[0] = v.x;
    words[1] = v.y;
  }
}

// Adds 16 keys to the running softmax and output. `scale` includes log2(e).
DEVICE void attend_block(const u32 (&q)[WORDS][4], u32 stage, int num_valid, float scale, int g, int t,
                         Weights& w, float (&out)[TILES][4]) {
  float scores[2][4];
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    u32 key[WORDS];
    load_key(stage, tile, g, t, key);
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[tile][i] = 0.0f;
#pragma unroll
    for (int s = 0; s < WORDS; ++s)
      multiply(scores[tile], q[s], e4m3_to_f16(key[s]), e4m3_to_f16(key[s] >> 16));
#pragma unroll
    for (int i = 0; i < 4; ++i)
      scores[tile][i] = tile * 8 + t * 2 + (i & 1) < num_valid ? scores[tile][i] * scale : NOTHING;
  }
  u32 p[4];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float top = fmaxf(fmaxf(scores[0][2 * row], scores[0][2 * row + 1]),
                      fmaxf(scores[1][2 * row], scores[1][2 * row + 1]));
    top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2));
    const float largest = fmaxf(w.largest[row], top);
    const float shrink = exp2f(w.largest[row] - largest);
    w.largest[row] = largest;
    float sum = 0.0f;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const float x = exp2f(scores[tile][2 * row] - largest);
      const float y = exp2f(scores[tile][2 * row + 1] - largest);
      sum += x + y;
      p[tile * 2 + row] = pack_f16(x, y);
    }
    w.total[row] = w.total[row] * shrink + sum;   // of this thread's keys; lanes are added at the end
    if (__any_sync(0xFFFFFFFFu, shrink != 1.0f)) {
#pragma unroll
      for (int i = 0; i < TILES; ++i) out[i][2 * row] *= shrink, out[i][2 * row + 1] *= shrink;
    }
  }
  u32 values[2][2][VALUE_WORDS];
#pragma unroll
  for (int key = 0; key < 4; ++key) load_value(stage, key / 2 * 8 + t * 2 + key % 2, g, values[key / 2][key % 2]);
#pragma unroll
  for (int word = 0; word < VALUE_WORDS; ++word) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const u32 pick = pair == 0 ? 0x5140u : 0x7362u;   // bytes (x0 y0 x1 y1) or (x2 y2 x3 y3)
      const u32 first = __byte_perm(values[0][0][word], values[0][1][word], pick);
      const u32 second = __byte_perm(values[1][0][word], values[1][1][word], pick);
      multiply(out[word * 4 + pair * 2], p, e4m3_to_f16(first), e4m3_to_f16(second));
      multiply(out[word * 4 + pair * 2 + 1], p, e4m3_to_f16(first >> 16), e4m3_to_f16(second >> 16));
    }
  }
}

// Sums `count` partial results (each GROUP rows of PARTIAL floats) in order, for four features.
DEVICE void merge(const float* partials, int count, i64 stride, int row, int feature, float (&v)[4],
                  float& largest, float& total) {
  largest = NOTHING;
#pragma unroll 8
  for (int i = 0; i < count; ++i)
    largest = fmaxf(largest, partials[i * stride + row * PARTIAL + HEAD_SIZE]);
  total = 0.0f;
  v[0] = v[1] = v[2] = v[3] = 0.0f;
#pragma unroll 8
  for (int i = 0; i < count; ++i) {
    const float* p = partials + i * stride + row * PARTIAL;
    const float share = exp2f(p[HEAD_SIZE] - largest);
    total += p[HEAD_SIZE + 1] * share;
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] += p[feature + j] * share;
  }
}

DEVICE void store_output(u8* out, i64 chunk_stride, i64 token_stride, int token, int feature,
                         const float (&v)[4], float gain, float scale) {
  float x[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) x[j] = round_to_bf16(v[j] * gain);
  if (OUT_KIND == OUT_F16) {   // `scale` multiplies
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = clamp_to(x[j] * scale, F16_MAX);
    u8* at = out + (feature >> 3) * chunk_stride + token * token_stride + (feature & 7) * 2;
    *reinterpret_cast<uint2*>(at) = make_uint2(pack_f16(x[0], x[1]), pack_f16(x[2], x[3]));
  } else if (OUT_KIND == OUT_E4M3) {
    const u32 codes = pack_e4m3(x[0] / scale, x[1] / scale) | pack_e4m3(x[2] / scale, x[3] / scale) << 16;
    *reinterpret_cast<u32*>(out + (feature >> 4) * chunk_stride + token * token_stride + (feature & 15)) = codes;
  } else {
    u8* at = out + (feature >> 3) * chunk_stride + token * token_stride + (feature & 7) * 2;
    *reinterpret_cast<uint2*>(at) = make_uint2(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]));
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 16 / WARPS)
    decode_attention(const u16* q, const u8* k_cache, const u8* v_cache, const int* block_table,
                     int table_stride, const int* context_lengths, float scale, float v_scale,
                     float* workspace, u32* counters, u8* out, i64 chunk_stride, i64 token_stride,
                     float out_scale) {
  // The warps' rings; after the last key their partial outputs (WARPS, GROUP, PARTIAL).
  extern __shared__ __align__(128) float merged[];
  __shared__ u32 arrived;
  const int split = blockIdx.x, kv_head = blockIdx.y, sequence = blockIdx.z;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  let_next_kernel_start();
  wait_for_previous_kernels();
  const int context = context_lengths[sequence];
  const int num_blocks = (context + 15) / 16;
  // Whole rounds of the block's warps, two at least: a round costs less than merging splits.
  const int rounds = ((num_blocks + gridDim.x - 1) / gridDim.x + WARPS - 1) / WARPS;
  const int share = max(2, rounds) * WARPS;
  const int num_splits = (num_blocks + share - 1) / share;
  if (split >= num_splits) return;
  const int end = min(num_blocks, (split + 1) * share);
  Weights w = {{NOTHING, NOTHING}, {0.0f, 0.0f}};
  float sums[TILES][4];
#pragma unroll
  for (int i = 0; i < TILES; ++i) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0.0f;
  const int* pages = block_table + static_cast<i64>(sequence) * table_stride;
  const u8* keys = k_cache + kv_head * HEAD_SIZE;
  const u8* values = v_cache + kv_head * HEAD_SIZE;
  const u32 ring = shared_address(merged) + warp * STAGES * STAGE_BYTES;
  auto slot_of = [&](int b) {
    return static_cast<i64>(pages[b * 16 / PAGE_SLOTS]) * PAGE_SLOTS + b * 16 % PAGE_SLOTS;
  };
  const int first = split * share + warp;
  int ahead = first;   // next block to copy
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i, ahead += WARPS) {
    if (ahead < end)
      start_block(ring + i * STAGE_BYTES, keys, values, slot_of(ahead), min(16, context - ahead * 16), lane);
    commit_copies();
  }
  u32 queries[WORDS][4];   // while the first copies are under way
  load_queries(q + (static_cast<i64>(sequence) * NUM_HEADS + kv_head * GROUP) * HEAD_SIZE, g, t, queries);
  i64 slot_ahead = ahead < end ? slot_of(ahead) : 0;   // looked up one round early
  int stage = 0;
  for (int b = first; b < end; b += WARPS) {
    wait_copies<STAGES - 2>();
    __syncwarp();
    const int free_stage = stage == 0 ? STAGES - 1 : stage - 1;
    if (ahead < end)
      start_block(ring + free_stage * STAGE_BYTES, keys, values, slot_ahead, min(16, context - ahead * 16), lane);
    commit_copies();
    ahead += WARPS;
    if (ahead < end) slot_ahead = slot_of(ahead);
    attend_block(queries, ring + stage * STAGE_BYTES, min(16, context - b * 16), scale, g, t, w, sums);
    if (++stage == STAGES) stage = 0;
  }
  wait_copies<0>();
  __syncthreads();
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    w.total[row] += __shfl_xor_sync(0xFFFFFFFFu, w.total[row], 1);
    w.total[row] += __shfl_xor_sync(0xFFFFFFFFu, w.total[row], 2);
    const int head = g + 8 * row;
    if (head < GROUP) {
      float* mine = merged + (warp * GROUP + head) * PARTIAL;
      // Output tile j, column c is feature c * TILES + j; this thread holds columns 2 t and 2 t + 1.
#pragma unroll
      for (int j = 0; j < TILES; ++j) {
        mine[2 * t * TILES + j] = sums[j][2 * row];
        mine[(2 * t + 1) * TILES + j] = sums[j][2 * row + 1];
      }
      if (t == 0) {
        mine[HEAD_SIZE] = w.largest[row];
        mine[HEAD_SIZE + 1] = w.total[row];
      }
    }
  }
  __syncthreads();

  const i64 pair = static_cast<i64>(sequence) * NUM_KV_HEADS + kv_head;
  float* splits = workspace + pair * gridDim.x * GROUP * PARTIAL;
  constexpr int ITEMS = GROUP * HEAD_SIZE / 4;
  for (int item = threadIdx.x; item < ITEMS; item += WARPS * 32) {
    const int row = item / (HEAD_SIZE / 4), feature = item % (HEAD_SIZE / 4) * 4;
    float v[4], largest, total;
    merge(merged, WARPS, GROUP * PARTIAL, row, feature, v, largest, total);
    if (num_splits == 1) {
      store_output(out, chunk_stride, token_stride, sequence, (kv_head * GROUP + row) * HEAD_SIZE + feature,
                   v, v_scale / total, out_scale);
    } else {
      float* mine = splits + (split * GROUP + row) * PARTIAL;
#pragma unroll
      for (int j = 0; j < 4; ++j) mine[feature + j] = v[j];
      if (feature == 0) mine[HEAD_SIZE] = largest, mine[HEAD_SIZE + 1] = total;
    }
  }
  if (num_splits == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) arrived = atomicAdd(counters + pair, 1);
  __syncthreads();
  if (arrived != num_splits - 1) return;
  __threadfence();
  if (threadIdx.x == 0) counters[pair] = 0;
  for (int item = threadIdx.x; item < ITEMS; item += WARPS * 32) {
    const int row = item / (HEAD_SIZE / 4), feature = item % (HEAD_SIZE / 4) * 4;
    float v[4], largest, total;
    merge(splits, num_splits, GROUP * PARTIAL, row, feature, v, largest, total);
    store_output(out, chunk_stride, token_stride, sequence, (kv_head * GROUP + row) * HEAD_SIZE + feature,
                 v, v_scale / total, out_scale);
  }
}
