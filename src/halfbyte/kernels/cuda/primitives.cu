// Small wrappers around PTX shared by every kernel here; no CUDA headers, so that NVRTC needs none.
// Everything is inline; the loader puts this file in front of each kernel source.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE __device__ __forceinline__

constexpr float E4M3_MAX = 448.0f;    // largest e4m3
constexpr float F16_MAX = 65504.0f;   // largest fp16

DEVICE u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// ---- dependent launches: a kernel may start before the one ahead of it has finished -------------

// From here on everything written by the kernels ahead in the stream is visible.
DEVICE void wait_for_previous_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;"); }

// ---- transaction barriers and bulk copies -------------------------------------------------------

DEVICE void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
DEVICE void barrier_expect(u32 barrier, u32 num_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
               "r"(num_bytes)
               : "memory");
}
DEVICE void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
DEVICE void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra.uni out;\n"
      "bra.uni again;\n"
      "out:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

DEVICE u64 policy_evict_first() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
DEVICE u64 policy_evict_last() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
DEVICE void bulk_load(u32 destination, const void* source, u32 num_bytes, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], %4;" ::"r"(destination),
      "l"(source), "r"(num_bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// ---- clusters: blocks that see each other's shared memory ---------------------------------------

// Not .aligned: lanes of a warp may come from different branches.
DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
DEVICE u32 address_in_block(u32 address, u32 rank) {
  u32 remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}
DEVICE void barrier_arrive_remote(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// To the same place in every block of `blocks`, each of whose barriers counts the bytes.
DEVICE void bulk_load_all(u32 destination, const void* source, u32 num_bytes, u32 barrier, u16 blocks,
                          u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      ".L2::cache_hint [%0], [%1], %2, [%3], %4, %5;" ::"r"(destination),
      "l"(source), "r"(num_bytes), "r"(barrier), "h"(blocks), "l"(policy)
      : "memory");
}

DEVICE u32 load_shared_4(u32 address) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}
DEVICE uint4 load_shared_16(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}

// ---- number formats ------------------------------------------------------------------------------

DEVICE float bf16_to_f32(u16 x) { return __uint_as_float(static_cast<u32>(x) << 16); }
DEVICE u16 f32_to_bf16(float x) {
  u16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
DEVICE float round_to_bf16(float x) { return bf16_to_f32(f32_to_bf16(x)); }
DEVICE u32 pack_bf16(float low, float high) {
  u32 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
DEVICE u32 pack_f16(float low, float high) {
  u32 y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
DEVICE float clamp_to(float x, float limit) { return fminf(fmaxf(x, -limit), limit); }
// Two e4m3 codes, `low` in the low byte; nearest even, saturating at 448.
DEVICE u32 pack_e4m3(float low, float high) {
  u16 y;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(y) : "f"(high), "f"(low));
  return y;
}
DEVICE u32 e4m3_to_f16(u32 two_codes) {
  u32 y;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(y) : "h"(static_cast<u16>(two_codes)));
  return y;
}
DEVICE float f16_low(u32 pair) {
  float y;
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(y) : "r"(pair));
  return y;
}
DEVICE float f16_high(u32 pair) {
  float y;
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(y) : "r"(pair));
  return y;
}
// pair * {scale.low, scale.low} and pair * {scale.high, scale.high}
DEVICE u32 scale_by_low(u32 pair, u32 scale) {
  u32 y;
  asm("{.reg .f16 l, h; .reg .b32 b; mov.b32 {l, h}, %2; mov.b32 b, {l, l}; mul.f16x2 %0, %1, b;}"
      : "=r"(y)
      : "r"(pair), "r"(scale));
  return y;
}
DEVICE u32 scale_by_high(u32 pair, u32 scale) {
  u32 y;
  asm("{.reg .f16 l, h; .reg .b32 b; mov.b32 {l, h}, %2; mov.b32 b, {h, h}; mul.f16x2 %0, %1, b;}"
      : "=r"(y)
      : "r"(pair), "r"(scale));
  return y;
}

// Eight e2m1 codes of one word (see kernels/repack.py) as four fp16 pairs, each value times 2^-14.
// A product with two powers of two does two shifts; what it leaves outside the mask does not matter,
// and no carry reaches a kept bit.
DEVICE void unpack_e2m1(u32 word, u32 (&pairs)[4]) {
  pairs[0] = word & 0x8E008E00u;
  pairs[1] = (word << 3) & 0x8E008E00u;
  pairs[2] = ((word & 0x40384038u) * 66u) & 0x8E008E00u;    // << 1 and << 6
  pairs[3] = ((word & 0x20072007u) * 516u) & 0x8E008E00u;   // << 2 and << 9
}
// The four scales of two k-steps: fp16 pairs (row 2g, row 2g+1), each scale times 2^6.
DEVICE u32 scales_even(u32 word) { return word & 0x7F807F80u; }
DEVICE u32 scales_odd(u32 word) { return __byte_perm(word, word, 0x2103) & 0x7F807F80u; }

// Bytes of two words by the low four nibbles of `selector`: bits 0-2 choose, bit 3 takes eight copies of
// the chosen byte's sign instead.
DEVICE u32 select_bytes(u32 low, u32 high, u32 selector) {
  u32 y;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(low), "r"(high), "r"(selector));
  return y;
}
// The eight magnitudes 0, 1/2, 1, 3/2, 2, 3, 4, 6 of e2m1 times a block scale, rounded to e4m3.
struct Magnitudes {
  u32 low, high;
};
// Four e4m3 scales times 3/2, nearest even: the byte grows by 5 where the mantissa is 1 to 5, else by 4.
DEVICE u32 three_halves(u32 scales) {
  const u32 mantissas = scales & 0x07070707u;
  const u32 grows = (mantissas + 0x07070707u) & ~(mantissas + 0x02020202u) & 0x08080808u;
  return scales + 0x04040404u + (grows >> 3);
}
// Of scale I of four, each from 2^-5 to 60 (kernels/repack.py): doubling adds 8 to the byte.
template <int I>
DEVICE Magnitudes magnitudes_of(u32 scales, u32 larger) {
  constexpr u32 ONE = I, THREE_HALVES = 4 + I, ZERO = 8 | I;   // a scale's sign bit is 0
  return {select_bytes(scales, larger, THREE_HALVES << 12 | ONE << 8 | ONE << 4 | ZERO) - 0x00000800u,
          select_bytes(scales, larger, THREE_HALVES << 12 | ONE << 8 | THREE_HALVES << 4 | ONE) + 0x10100808u};
}
// A word of eight codes of one block (`pack_fast_codes` of kernels/repack.py) as two times four e4m3 values:
// magnitudes are selectors, signs lie where the values' signs go, the second four's four bits lower.
DEVICE void look_up(u32 codes, const Magnitudes& of, u32& first, u32& second) {
  const u32 selectors = codes & 0x77777777u;
  first = select_bytes(of.low, of.high, selectors) | (codes & 0x80808080u);
  second = select_bytes(of.low, of.high, selectors >> 16) | (codes * 16 & 0x80808080u);
}

// ---- reductions -----------------------------------------------------------------------------------

DEVICE float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
  return x;
}
DEVICE float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, step));
  return x;
}

// ---- the result of a linear, as the kernel after it reads it ---------------------------------------

// Tiles of 2^tile_shift output features whose K blocks all went to one cluster of the grid lie in `out`
// (bf16); the others as f32 partial sums, one slot a contributor. No slot counts: everything is in `out`.
struct LinearResult {
  const u16* out;         // (tokens, stride) bf16, or null: everything is in `partial`
  const float* partial;   // (slots, tokens, stride) f32
  const float* row_scale; // per output feature, or null: already applied
  const float* token_scale;  // per token, or null
  const u8* slot_counts;  // contributors of each tile
  i64 slot_stride;        // tokens * stride
  int stride;
  int tile_shift;
};

DEVICE int owner_of(int unit, int num_units, int num_blocks) {
  return ((unit + 1) * num_blocks - 1) / num_units;
}

DEVICE void load_8_bf16(const u16* at, float (&v)[8]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(at);
  const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = __uint_as_float(words[i] << 16);
    v[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
  }
}

// Eight consecutive output features of one token, on their way. Loads are issued by `fetch` without a
// branch, so that those of several chunks are in flight together; `sum` waits for them. AHEAD slots are
// fetched ahead, for eight registers each; further ones are read one after another. A caller that knows
// that everything is in `out` says so with MAY_SPLIT false.
template <bool MAY_SPLIT, int AHEAD>
struct Pending {
  float4 slots[AHEAD][2];   // of a result in `out` the first holds its eight bf16
  int count;                // contributors; 0: in `out`

  DEVICE void fetch(const LinearResult& y, int token, int feature) {
    const i64 at = static_cast<i64>(token) * y.stride + feature;
    count = MAY_SPLIT && y.slot_counts != nullptr ? y.slot_counts[feature >> y.tile_shift] : 1;
    if (!MAY_SPLIT || (count == 1 && y.out != nullptr)) count = 0;
    const float4* first = reinterpret_cast<const float4*>(
        count == 0 ? reinterpret_cast<const u8*>(y.out + at) : reinterpret_cast<const u8*>(y.partial + at));
    slots[0][0] = first[0];
    if (MAY_SPLIT) {
      if (count > 0) slots[0][1] = first[1];
#pragma unroll
      for (int i = 1; i < AHEAD; ++i) {
        if (i < count) {
          const float4* slot = reinterpret_cast<const float4*>(y.partial + at + i * y.slot_stride);
          slots[i][0] = slot[0];
          slots[i][1] = slot[1];
        }
      }
    }
  }

  static DEVICE void add(const float4 (&slot)[2], float (&v)[8]) {
    v[0] += slot[0].x; v[1] += slot[0].y; v[2] += slot[0].z; v[3] += slot[0].w;
    v[4] += slot[1].x; v[5] += slot[1].y; v[6] += slot[1].z; v[7] += slot[1].w;
  }

  // Summed over the slots in order, scaled, not rounded.
  DEVICE void sum(const LinearResult& y, int token, int feature, float (&v)[8]) const {
    if (!MAY_SPLIT || count == 0) {
      const float4 raw = slots[0][0];
      const u32 words[4] = {__float_as_uint(raw.x), __float_as_uint(raw.y), __float_as_uint(raw.z),
                            __float_as_uint(raw.w)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[2 * i] = __uint_as_float(words[i] << 16);
        v[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = 0.0f;
#pragma unroll
      for (int i = 0; i < AHEAD; ++i)
        if (i < count) add(slots[i], v);
      const float* partial = y.partial + static_cast<i64>(token) * y.stride + feature;
#pragma unroll 1
      for (int i = AHEAD; i < count; ++i) {
        const float4* more = reinterpret_cast<const float4*>(partial + i * y.slot_stride);
        const float4 slot[2] = {more[0], more[1]};
        add(slot, v);
      }
    }
    if (y.row_scale != nullptr) {
      const float4* scales = reinterpret_cast<const float4*>(y.row_scale + feature);
      const float4 low = scales[0], high = scales[1];
      v[0] *= low.x; v[1] *= low.y; v[2] *= low.z; v[3] *= low.w;
      v[4] *= high.x; v[5] *= high.y; v[6] *= high.z; v[7] *= high.w;
    }
    if (y.token_scale != nullptr) {
      const float scale = y.token_scale[token];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] *= scale;
    }
  }
};

// The same at once.
template <bool MAY_SPLIT>
DEVICE void load_result(const LinearResult& y, int token, int feature, float (&v)[8]) {
  Pending<MAY_SPLIT, 4> result;
  result.fetch(y, token, feature);
  result.sum(y, token, feature, v);
}

// ---- activations of the next linear ----------------------------------------------------------------

// Address of a 16-byte chunk of features is base + chunk * chunk_stride + token * token_stride:
// tiled for the streaming linears (chunk_stride = 16 * padded tokens), row-major for libraries.
// OUT_E4M3_PAIRED permutes 64 features as NVFP4_FAST of linear.cu holds its weights: 16 t + 4 c to
// 16 t + 4 c + 3 lie at bytes 4t to 4t + 3 of chunk c.
enum { OUT_F16 = 0, OUT_E4M3 = 1, OUT_BF16 = 2, OUT_E4M3_PAIRED = 3 };

// Eight features, already rounded to bf16. `scale` divides for e4m3 and multiplies for fp16.
template <int KIND>
DEVICE void store_activation(u8* base, i64 chunk_stride, i64 token_stride, int token, int feature,
                             const float (&v)[8], float scale) {
  if (KIND == OUT_E4M3_PAIRED) {
    u8* at = base + (feature >> 6 << 2 | (feature & 8) >> 2) * chunk_stride + token * token_stride +
             (feature >> 4 & 3) * 4;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      *reinterpret_cast<u32*>(at + i * chunk_stride) = pack_e4m3(v[4 * i] / scale, v[4 * i + 1] / scale) |
                                                       pack_e4m3(v[4 * i + 2] / scale, v[4 * i + 3] / scale) << 16;
  } else if (KIND == OUT_E4M3) {
    uint2 codes;
    codes.x = pack_e4m3(v[0] / scale, v[1] / scale) | pack_e4m3(v[2] / scale, v[3] / scale) << 16;
    codes.y = pack_e4m3(v[4] / scale, v[5] / scale) | pack_e4m3(v[6] / scale, v[7] / scale) << 16;
    u8* at = base + (feature >> 4) * chunk_stride + token * token_stride + (feature & 8);
    *reinterpret_cast<uint2*>(at) = codes;
  } else {
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (KIND == OUT_F16)
        words[i] = pack_f16(clamp_to(v[2 * i] * scale, F16_MAX), clamp_to(v[2 * i + 1] * scale, F16_MAX));
      else
        words[i] = pack_bf16(v[2 * i], v[2 * i + 1]);
    }
    u8* at = base + (feature >> 3) * chunk_stride + token * token_stride;
    *reinterpret_cast<uint4*>(at) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}
