// What happens between the products of a decoder layer, each kernel one pass over its tensors:
// residual + RMSNorm (+ quantize), SiLU * up (+ quantize), rotary embedding + KV store, embedding.
//
// They read a linear's result as `LinearResult` (primitives.cu), which also sums what was split over
// K, round where a bf16 operation would round, and write the next linear's activations in its format.
//
// Set by the caller: WIDTH, MLP_WIDTH, NORM_BLOCKS, HEAD_SIZE, NUM_HEADS, NUM_KV_HEADS.

// One block a token: prefill, whose products come whole. More: a decode step.
constexpr bool MAY_SPLIT = NORM_BLOCKS > 1;
constexpr int NORM_THREADS = NORM_BLOCKS == 1 ? 512 : 256;
constexpr int NORM_CHUNKS = WIDTH / 8 / NORM_BLOCKS;      // 8 features each, of one block
constexpr int NORM_ROUNDS = (NORM_CHUNKS + NORM_THREADS - 1) / NORM_THREADS;

DEVICE u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }
// Says that this block runs, so that others may write to it; nothing written before is made visible.
DEVICE void cluster_arrive_running() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
DEVICE void store_to_block(u32 address, u32 rank, float value) {
  u32 remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
}

// Sum over a token's NORM_BLOCKS blocks (one cluster), in the same order everywhere. Nobody writes to a
// block any more once it is through the last one, so that it may end. Arriving waits for what the block
// has stored: stores to global memory belong behind it.
template <bool IS_MAX, int THREADS = NORM_THREADS>
DEVICE float row_reduce(float value) {
  __shared__ float warps[THREADS / 32];
  __shared__ float blocks[16];
  value = IS_MAX ? warp_max(value) : warp_sum(value);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < THREADS / 32; ++i) total = IS_MAX ? fmaxf(total, warps[i]) : total + warps[i];
  if (NORM_BLOCKS > 1) {
    if (threadIdx.x < NORM_BLOCKS) store_to_block(shared_address(&blocks[cluster_rank()]), threadIdx.x, total);
    cluster_arrive();
    cluster_wait();
    total = 0.0f;
#pragma unroll
    for (int i = 0; i < NORM_BLOCKS; ++i) total = IS_MAX ? fmaxf(total, blocks[i]) : total + blocks[i];
  }
  return total;
}

DEVICE void unpack_bf16(const uint4& raw, float (&v)[8]) {
  const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = __uint_as_float(words[i] << 16);
    v[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
  }
}
DEVICE uint4 pack_8_bf16(const float (&v)[8]) {
  return make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
                    pack_bf16(v[6], v[7]));
}
DEVICE void store_bf16(u16* at, const float (&v)[8]) { *reinterpret_cast<uint4*>(at) = pack_8_bf16(v); }

// residual += bf16(result) (if any); normed = bf16(residual / rms * weight), stored as KIND.
// Grid (NORM_BLOCKS, tokens). With `token_scale_out` each token is quantized by its own largest value.
template <int KIND, bool HAS_RESULT, bool PER_TOKEN>
DEVICE void norm(LinearResult y, u16* residual, const u16* weight, float epsilon, u8* out,
                 i64 chunk_stride, i64 token_stride, float scale, float* token_scale_out) {
  const int token = blockIdx.y;
  // bf16 values stay packed: two blocks fit a multiprocessor then.
  uint4 gain[NORM_ROUNDS], x[NORM_ROUNDS];
  float squares = 0.0f;
  let_next_kernel_start();
  if (NORM_BLOCKS > 1) cluster_arrive_running();
#pragma unroll
  for (int round = 0; round < NORM_ROUNDS; ++round) {
    const int chunk = round * NORM_THREADS + threadIdx.x;
    if (chunk < NORM_CHUNKS)
      gain[round] = *reinterpret_cast<const uint4*>(weight + (blockIdx.x * NORM_CHUNKS + chunk) * 8);
  }
  wait_for_previous_kernels();
  // All loads before the first sum and store, so that they are in flight together.
  Pending<MAY_SPLIT, MAY_SPLIT ? 3 : 1> delta[NORM_ROUNDS];
#pragma unroll
  for (int round = 0; round < NORM_ROUNDS; ++round) {
    const int chunk = round * NORM_THREADS + threadIdx.x;
    if (chunk < NORM_CHUNKS) {
      const int feature = (blockIdx.x * NORM_CHUNKS + chunk) * 8;
      x[round] = *reinterpret_cast<const uint4*>(residual + static_cast<i64>(token) * WIDTH + feature);
      if (HAS_RESULT) delta[round].fetch(y, token, feature);
    }
  }
#pragma unroll
  for (int round = 0; round < NORM_ROUNDS; ++round) {
    const int chunk = round * NORM_THREADS + threadIdx.x;
    if (chunk < NORM_CHUNKS) {
      const int feature = (blockIdx.x * NORM_CHUNKS + chunk) * 8;
      float v[8];
      unpack_bf16(x[round], v);
      if (HAS_RESULT) {
        float by[8];
        delta[round].sum(y, token, feature, by);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = round_to_bf16(v[i] + round_to_bf16(by[i]));
        x[round] = pack_8_bf16(v);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) squares += v[i] * v[i];
    }
  }
  if (NORM_BLOCKS > 1) cluster_wait();
  const float inverse = rsqrtf(row_reduce<false>(squares) / WIDTH + epsilon);
  float largest = 0.0f;
#pragma unroll
  for (int round = 0; round < NORM_ROUNDS; ++round) {
    const int chunk = round * NORM_THREADS + threadIdx.x;
    if (chunk < NORM_CHUNKS) {
      if (HAS_RESULT) {
        const int feature = (blockIdx.x * NORM_CHUNKS + chunk) * 8;
        *reinterpret_cast<uint4*>(residual + static_cast<i64>(token) * WIDTH + feature) = x[round];
      }
      float v[8], by[8];
      unpack_bf16(x[round], v);
      unpack_bf16(gain[round], by);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        v[i] = round_to_bf16(v[i] * inverse * by[i]);
        largest = fmaxf(largest, fabsf(v[i]));
      }
      x[round] = pack_8_bf16(v);
    }
  }
  if (PER_TOKEN) {
    __syncthreads();
    scale = fmaxf(row_reduce<true>(largest), 1e-12f) / E4M3_MAX;
    if (blockIdx.x == 0 && threadIdx.x == 0) token_scale_out[token] = scale;
  }
#pragma unroll
  for (int round = 0; round < NORM_ROUNDS; ++round) {
    const int chunk = round * NORM_THREADS + threadIdx.x;
    if (chunk < NORM_CHUNKS) {
      const int feature = (blockIdx.x * NORM_CHUNKS + chunk) * 8;
      float v[8];
      unpack_bf16(x[round], v);
      store_activation<KIND>(out, chunk_stride, token_stride, token, feature, v, scale);
    }
  }
}

#define NORM_KERNEL(NAME, KIND, HAS_RESULT, PER_TOKEN)                                               \
  extern "C" __global__ void __launch_bounds__(NORM_THREADS, NORM_BLOCKS == 1 ? 2 : 1)             \
      NAME(LinearResult y, u16* residual, const u16* weight, float epsilon, u8* out,                \
           i64 chunk_stride, i64 token_stride, float scale, float* token_scale_out) {               \
    norm<KIND, HAS_RESULT, PER_TOKEN>(y, residual, weight, epsilon, out, chunk_stride, token_stride, \
                                      scale, token_scale_out);                                      \
  }
NORM_KERNEL(norm_f16, OUT_F16, false, false)
NORM_KERNEL(norm_e4m3, OUT_E4M3, false, false)
NORM_KERNEL(norm_bf16, OUT_BF16, false, false)
NORM_KERNEL(norm_e4m3_token, OUT_E4M3, false, true)
NORM_KERNEL(add_norm_f16, OUT_F16, true, false)
NORM_KERNEL(add_norm_e4m3, OUT_E4M3, true, false)
NORM_KERNEL(add_norm_bf16, OUT_BF16, true, false)
NORM_KERNEL(add_norm_e4m3_token, OUT_E4M3, true, true)
NORM_KERNEL(norm_e4m3_paired, OUT_E4M3_PAIRED, false, true)
NORM_KERNEL(add_norm_e4m3_paired, OUT_E4M3_PAIRED, true, true)

// silu(gate) * up of eight features, of results rounded to bf16, rounded to bf16 itself. Most tiles of
// these linears come whole: one slot ahead.
struct Gated {
  Pending<MAY_SPLIT, 1> gate, up;

  DEVICE void fetch(const LinearResult& y, int token, int feature, int mlp_width) {
    gate.fetch(y, token, feature);
    up.fetch(y, token, mlp_width + feature);
  }
  DEVICE void product(const LinearResult& y, int token, int feature, int mlp_width, float (&v)[8]) const {
    float by[8];
    gate.sum(y, token, feature, v);
    up.sum(y, token, mlp_width + feature, by);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float x = round_to_bf16(v[i]);
      v[i] = round_to_bf16(__fdividef(x, 1.0f + __expf(-x)) * round_to_bf16(by[i]));
    }
  }
};

// Grid (ceil(mlp_width / 8 / threads), tokens); `up` starts at feature mlp_width of the result.
// Of many tokens (MAY_SPLIT false: grid (ceil(mlp_width / 256), ceil(tokens / 8))) a warp takes four
// times eight features of eight tokens: whole sectors are read, and written in either order.
template <int KIND>
DEVICE void silu_mul(const LinearResult& y, int mlp_width, u8* out, i64 chunk_stride,
                     i64 token_stride, float scale, int num_tokens) {
  let_next_kernel_start();
  wait_for_previous_kernels();
  const int token = MAY_SPLIT ? blockIdx.y : blockIdx.y * 8 + threadIdx.x % 8;
  const int feature = (MAY_SPLIT ? blockIdx.x * blockDim.x + threadIdx.x : blockIdx.x * 32 + threadIdx.x / 8) * 8;
  if (feature >= mlp_width || token >= num_tokens) return;
  Gated gated;
  gated.fetch(y, token, feature, mlp_width);
  float v[8];
  gated.product(y, token, feature, mlp_width, v);
  store_activation<KIND>(out, chunk_stride, token_stride, token, feature, v, scale);
}
#define SILU_KERNEL(NAME, KIND)                                                              \
  extern "C" __global__ void __launch_bounds__(256, 6)                                      \
      NAME(LinearResult y, int mlp_width, u8* out, i64 chunk_stride, i64 token_stride,       \
           float scale, int num_tokens) {                                                   \
    silu_mul<KIND>(y, mlp_width, out, chunk_stride, token_stride, scale, num_tokens);        \
  }
SILU_KERNEL(silu_mul_f16, OUT_F16)
SILU_KERNEL(silu_mul_e4m3, OUT_E4M3)
SILU_KERNEL(silu_mul_bf16, OUT_BF16)

// The same with each token quantized by its own largest value, its features kept in registers between.
// Grid (NORM_BLOCKS, tokens), a cluster a token.
constexpr int SILU_THREADS = 512;
constexpr int SILU_CHUNKS = (MLP_WIDTH / 8 + NORM_BLOCKS - 1) / NORM_BLOCKS;   // 8 features each, of one block
constexpr int SILU_ROUNDS = (SILU_CHUNKS + SILU_THREADS - 1) / SILU_THREADS;
template <int KIND>
DEVICE void silu_mul_token(const LinearResult& y, u8* out, i64 chunk_stride, i64 token_stride,
                           float* token_scale_out) {
  let_next_kernel_start();
  if (NORM_BLOCKS > 1) cluster_arrive_running();
  wait_for_previous_kernels();
  uint4 kept[SILU_ROUNDS];
  float largest = 0.0f;
  constexpr int TOGETHER = 2;   // rounds whose loads are in flight at a time
#pragma unroll
  for (int start = 0; start < SILU_ROUNDS; start += TOGETHER) {
    Gated gated[TOGETHER];
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i) {
      const int in_block = (start + i) * SILU_THREADS + threadIdx.x;
      const int feature = (blockIdx.x * SILU_CHUNKS + in_block) * 8;
      if (start + i < SILU_ROUNDS && in_block < SILU_CHUNKS && feature < MLP_WIDTH)
        gated[i].fetch(y, blockIdx.y, feature, MLP_WIDTH);
    }
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i) {
      const int in_block = (start + i) * SILU_THREADS + threadIdx.x;
      const int feature = (blockIdx.x * SILU_CHUNKS + in_block) * 8;
      if (start + i < SILU_ROUNDS && in_block < SILU_CHUNKS && feature < MLP_WIDTH) {
        float v[8];
        gated[i].product(y, blockIdx.y, feature, MLP_WIDTH, v);
#pragma unroll
        for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fabsf(v[j]));
        kept[start + i] = pack_8_bf16(v);
      }
    }
  }
  if (NORM_BLOCKS > 1) cluster_wait();
  const float scale = fmaxf(row_reduce<true, SILU_THREADS>(largest), 1e-12f) / E4M3_MAX;
  if (blockIdx.x == 0 && threadIdx.x == 0) token_scale_out[blockIdx.y] = scale;
#pragma unroll
  for (int round = 0; round < SILU_ROUNDS; ++round) {
    const int in_block = round * SILU_THREADS + threadIdx.x;
    const int feature = (blockIdx.x * SILU_CHUNKS + in_block) * 8;
    if (in_block < SILU_CHUNKS && feature < MLP_WIDTH) {
      float v[8];
      unpack_bf16(kept[round], v);
      store_activation<KIND>(out, chunk_stride, token_stride, blockIdx.y, feature, v, scale);
    }
  }
}
#define SILU_TOKEN_KERNEL(NAME, KIND)                                                            \
  extern "C" __global__ void __launch_bounds__(SILU_THREADS, SILU_ROUNDS > 1 ? 2 : 3)           \
      NAME(LinearResult y, int mlp_width, u8* out, i64 chunk_stride, i64 token_stride, float,    \
           float* token_scale_out) {                                                            \
    silu_mul_token<KIND>(y, out, chunk_stride, token_stride, token_scale_out);                   \
  }
SILU_TOKEN_KERNEL(silu_mul_e4m3_token, OUT_E4M3)
SILU_TOKEN_KERNEL(silu_mul_e4m3_paired, OUT_E4M3_PAIRED)

// Attention output (tokens, width) bf16 to the activations of an `o`; `gain` is v_scale.
// Grid (ceil(width / 8 / threads), tokens). Bytes: 2 read, 1 or 2 written a feature.
template <int KIND>
DEVICE void quantize(const u16* x, int width, float gain, u8* out, i64 chunk_stride, i64 token_stride,
                     float scale) {
  let_next_kernel_start();
  wait_for_previous_kernels();
  const int feature = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (feature >= width) return;
  float v[8];
  load_8_bf16(x + static_cast<i64>(blockIdx.y) * width + feature, v);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = round_to_bf16(v[i] * gain);
  store_activation<KIND>(out, chunk_stride, token_stride, blockIdx.y, feature, v, scale);
}
#define QUANTIZE_KERNEL(NAME, KIND)                                                                  \
  extern "C" __global__ void __launch_bounds__(256)                                                 \
      NAME(const u16* x, int width, float gain, u8* out, i64 chunk_stride, i64 token_stride,         \
           float scale) {                                                                           \
    quantize<KIND>(x, width, gain, out, chunk_stride, token_stride, scale);                          \
  }
QUANTIZE_KERNEL(quantize_f16, OUT_F16)
QUANTIZE_KERNEL(quantize_e4m3, OUT_E4M3)

// The same with each token quantized by its own largest value, its features kept in registers between.
// Grid (NORM_BLOCKS, tokens), a cluster a token. Bytes: 2 read, 1 written a feature; no FLOP to speak of.
// Limits: x has the width of all heads. At one token 8 blocks of 192 threads' work (96 heads of 128): a
// launch and a cluster's two barriers are nearly all of its time.
constexpr int HEADS_WIDTH = NUM_HEADS * HEAD_SIZE;
constexpr int HEADS_CHUNKS = (HEADS_WIDTH / 8 + NORM_BLOCKS - 1) / NORM_BLOCKS;   // 8 features each, of one block
constexpr int HEADS_ROUNDS = (HEADS_CHUNKS + NORM_THREADS - 1) / NORM_THREADS;
template <int KIND>
DEVICE void quantize_token(const u16* x, float gain, u8* out, i64 chunk_stride, i64 token_stride,
                           float* token_scale_out) {
  let_next_kernel_start();
  if (NORM_BLOCKS > 1) cluster_arrive_running();
  wait_for_previous_kernels();
  uint4 kept[HEADS_ROUNDS];
  float largest = 0.0f;
#pragma unroll
  for (int round = 0; round < HEADS_ROUNDS; ++round) {
    const int in_block = round * NORM_THREADS + threadIdx.x;
    const int feature = (blockIdx.x * HEADS_CHUNKS + in_block) * 8;
    if (in_block < HEADS_CHUNKS && feature < HEADS_WIDTH)
      kept[round] = *reinterpret_cast<const uint4*>(x + static_cast<i64>(blockIdx.y) * HEADS_WIDTH + feature);
  }
#pragma unroll
  for (int round = 0; round < HEADS_ROUNDS; ++round) {
    const int in_block = round * NORM_THREADS + threadIdx.x;
    const int feature = (blockIdx.x * HEADS_CHUNKS + in_block) * 8;
    if (in_block < HEADS_CHUNKS && feature < HEADS_WIDTH) {
      float v[8];
      unpack_bf16(kept[round], v);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        v[i] = round_to_bf16(v[i] * gain);
        largest = fmaxf(largest, fabsf(v[i]));
      }
      kept[round] = pack_8_bf16(v);
    }
  }
  if (NORM_BLOCKS > 1) cluster_wait();
  const float scale = fmaxf(row_reduce<true>(largest), 1e-12f) / E4M3_MAX;
  if (blockIdx.x == 0 && threadIdx.x == 0) token_scale_out[blockIdx.y] = scale;
#pragma unroll
  for (int round = 0; round < HEADS_ROUNDS; ++round) {
    const int in_block = round * NORM_THREADS + threadIdx.x;
    const int feature = (blockIdx.x * HEADS_CHUNKS + in_block) * 8;
    if (in_block < HEADS_CHUNKS && feature < HEADS_WIDTH) {
      float v[8];
      unpack_bf16(kept[round], v);
      store_activation<KIND>(out, chunk_stride, token_stride, blockIdx.y, feature, v, scale);
    }
  }
}
#define QUANTIZE_TOKEN_KERNEL(NAME, KIND)                                                            \
  extern "C" __global__ void __launch_bounds__(NORM_THREADS)                                        \
      NAME(const u16* x, float gain, u8* out, i64 chunk_stride, i64 token_stride, float,             \
           float* token_scale_out) {                                                                \
    quantize_token<KIND>(x, gain, out, chunk_stride, token_stride, token_scale_out);                 \
  }
QUANTIZE_TOKEN_KERNEL(quantize_e4m3_token, OUT_E4M3)
QUANTIZE_TOKEN_KERNEL(quantize_e4m3_paired, OUT_E4M3_PAIRED)

DEVICE void load_8_f32(const float* at, float (&v)[8]) {
  const float4 low = reinterpret_cast<const float4*>(at)[0], high = reinterpret_cast<const float4*>(at)[1];
  v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
  v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

// q, k, v of each token: rotate q and k, scale q, store k and v as e4m3 in their page slot.
// Grid (tokens, ceil(heads / 32)), 8 lanes a head of 128; heads in the order q, k, v. Rotation pairs feature i
// with i + HEAD_SIZE / 2. q leaves as bf16 (tokens, heads, size).
extern "C" __global__ void __launch_bounds__(256)
    rotate_and_store(LinearResult y, const float* cosines, const float* sines,
                     const float* query_scale, u16* q_out, u8* k_cache, u8* v_cache,
                     const i64* slots, float k_scale, float v_scale) {
  constexpr int HALF = HEAD_SIZE / 2;
  constexpr int LANES = HALF / 8;            // lanes that carry 8 pairs each
  let_next_kernel_start();
  wait_for_previous_kernels();
  const int heads_per_block = blockDim.x / LANES;
  const int head = blockIdx.y * heads_per_block + threadIdx.x / LANES;
  if (head >= NUM_HEADS + 2 * NUM_KV_HEADS) return;
  const int token = blockIdx.x, i0 = threadIdx.x % LANES * 8;
  Pending<MAY_SPLIT, MAY_SPLIT ? 2 : 1> first, second;
  first.fetch(y, token, head * HEAD_SIZE + i0);
  second.fetch(y, token, head * HEAD_SIZE + HALF + i0);
  float low[8], high[8], cosine[8], sine[8];
  load_8_f32(cosines + token * HALF + i0, cosine);
  load_8_f32(sines + token * HALF + i0, sine);
  first.sum(y, token, head * HEAD_SIZE + i0, low);
  second.sum(y, token, head * HEAD_SIZE + HALF + i0, high);
  const bool is_value = head >= NUM_HEADS + NUM_KV_HEADS;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float a = round_to_bf16(low[i]), b = round_to_bf16(high[i]);
    low[i] = a;
    high[i] = b;
    if (!is_value) {
      const float c = cosine[i], s = sine[i];
      low[i] = a * c - b * s;
      high[i] = b * c + a * s;
    }
  }
  if (head < NUM_HEADS) {
    const float scale = query_scale == nullptr ? 1.0f : query_scale[token];
#pragma unroll
    for (int i = 0; i < 8; ++i) low[i] *= scale, high[i] *= scale;
    u16* at = q_out + (static_cast<i64>(token) * NUM_HEADS + head) * HEAD_SIZE + i0;
    store_bf16(at, low);
    store_bf16(at + HALF, high);
    return;
  }
  const int kv_head = (head - NUM_HEADS) % NUM_KV_HEADS;
  const float scale = is_value ? v_scale : k_scale;
  u32 codes[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    codes[i] = pack_e4m3(round_to_bf16(low[2 * i]) / scale, round_to_bf16(low[2 * i + 1]) / scale);
    codes[4 + i] = pack_e4m3(round_to_bf16(high[2 * i]) / scale, round_to_bf16(high[2 * i + 1]) / scale);
  }
  const i64 slot = slots[token];
  if (slot >= 0) {
    u8* at = (is_value ? v_cache : k_cache) + (slot * NUM_KV_HEADS + kv_head) * HEAD_SIZE + i0;
    *reinterpret_cast<uint2*>(at) = make_uint2(codes[0] | codes[1] << 16, codes[2] | codes[3] << 16);
    *reinterpret_cast<uint2*>(at + HALF) = make_uint2(codes[4] | codes[5] << 16, codes[6] | codes[7] << 16);
  }
}

// Rows of the embedding table become the residual stream. Grid (tokens).
extern "C" __global__ void __launch_bounds__(256)
    embed(const u16* table, const i64* token_ids, u16* residual) {
  let_next_kernel_start();
  wait_for_previous_kernels();
  const uint4* from = reinterpret_cast<const uint4*>(table + token_ids[blockIdx.x] * WIDTH);
  uint4* to = reinterpret_cast<uint4*>(residual + static_cast<i64>(blockIdx.x) * WIDTH);
  for (int i = threadIdx.x; i < WIDTH / 8; i += blockDim.x) to[i] = from[i];
}
