// Between stored tiles and row-major matrices: a layer's weights decoded into a scratch buffer for a
// library's product (prefill), and random tiles for benchmarks.
//
// Walk: a block takes one unit (64 rows of a K block), through shared memory, so that it reads the unit
//   and writes rows in whole cache lines.
// Bytes: NVFP4 to bf16 2.56 a weight, to e4m3 1.56; FP8 2.

// Grid (k_blocks, row_tiles). Row p of a 16-row strip holds weight row 2 (p % 8) + p / 8.
extern "C" __global__ void __launch_bounds__(128)
    untile_8bit(const u8* tiles, u8* rows, int k_blocks, i64 row_bytes) {
  const uint4* unit = reinterpret_cast<const uint4*>(
      tiles + (static_cast<i64>(blockIdx.y) * k_blocks + blockIdx.x) * 8192);
  __shared__ uint4 tile[64][9];   // a chunk of padding against bank conflicts
  for (int i = threadIdx.x; i < 512; i += 128) {
    const int row = i % 64, chunk = i / 64;
    tile[(row & 48) + (row & 7) * 2 + (row >> 3 & 1)][chunk] = unit[i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 512; i += 128) {
    const int row = i / 8, chunk = i % 8;
    u8* at = rows + (blockIdx.y * 64 + row) * row_bytes + blockIdx.x * 128 + chunk * 16;
    *reinterpret_cast<uint4*>(at) = tile[row][chunk];
  }
}

DEVICE u32 f16_pair_to_bf16(u32 pair, float gain) {
  return pack_bf16(f16_low(pair) * gain, f16_high(pair) * gain);
}

// Decoded code * block scale, times `gain` (a power of two): exact in bf16.
extern "C" __global__ void __launch_bounds__(128)
    decode_nvfp4_bf16(const u8* tiles, u8* rows, int k_blocks, i64 row_bytes, float gain) {
  const u8* unit = tiles + (static_cast<i64>(blockIdx.y) * k_blocks + blockIdx.x) * 4608;
  constexpr int ROW = 256;
  __shared__ __align__(16) u8 tile[64][ROW + 16];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint4 scales = *reinterpret_cast<const uint4*>(unit + 4096 + (warp * 8 + g) * 16);
  const u32 scale_words[4] = {scales.x, scales.y, scales.z, scales.w};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 codes = *reinterpret_cast<const uint4*>(unit + (half * 4 + warp) * 512 + lane * 16);
    const u32 words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const u32 pair_word = scale_words[half * 2 + step / 2];
      const u32 scale = step % 2 == 0 ? scales_even(pair_word) : scales_odd(pair_word);
      u32 pairs[4];
      unpack_e2m1(words[step], pairs);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const u32 value = r % 2 == 0 ? scale_by_low(pairs[r], scale) : scale_by_high(pairs[r], scale);
        const int row = warp * 16 + g * 2 + r % 2, k = (half * 4 + step) * 16 + r / 2 * 8 + t * 2;
        *reinterpret_cast<u32*>(&tile[row][k * 2]) = f16_pair_to_bf16(value, gain);
      }
    }
  }
  __syncthreads();
  constexpr int CHUNKS = ROW / 16;
  for (int i = threadIdx.x; i < 64 * CHUNKS; i += 128) {
    const int row = i / CHUNKS, chunk = i % CHUNKS;
    u8* at = rows + (blockIdx.y * 64 + row) * row_bytes + static_cast<i64>(blockIdx.x) * ROW + chunk * 16;
    *reinterpret_cast<uint4*>(at) = *reinterpret_cast<const uint4*>(&tile[row][chunk * 16]);
  }
}

// Units of the fast product to rows of e4m3: a thread decodes its lane's blocks as the product does.
template <int HALF>
DEVICE void decode_fast_half(const u8* unit, u32 scales, u32 larger, u8* row, i64 row_bytes) {
  const Magnitudes of[2] = {magnitudes_of<HALF * 2>(scales, larger), magnitudes_of<HALF * 2 + 1>(scales, larger)};
  const uint4 codes = reinterpret_cast<const uint4*>(unit)[HALF * 128 + threadIdx.x];
  const u32 words[2][2] = {{codes.x, codes.y}, {codes.z, codes.w}};
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    u32 values[4];
    look_up(words[p][0], of[p], values[0], values[1]);
    look_up(words[p][1], of[p], values[2], values[3]);
    *reinterpret_cast<uint4*>(row + p * row_bytes + HALF * 64) =
        make_uint4(values[0], values[1], values[2], values[3]);
  }
}
extern "C" __global__ void __launch_bounds__(128)
    decode_nvfp4_e4m3(const u8* tiles, u8* rows, int k_blocks, i64 row_bytes) {
  const u8* unit = tiles + (static_cast<i64>(blockIdx.y) * k_blocks + blockIdx.x) * 4608;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u32 scales = reinterpret_cast<const u32*>(unit + 4096)[threadIdx.x], larger = three_halves(scales);
  u8* row = rows + (blockIdx.y * 64 + warp * 16 + lane / 4 * 2) * row_bytes + blockIdx.x * 128 + lane % 4 * 16;
  decode_fast_half<0>(unit, scales, larger, row, row_bytes);
  decode_fast_half<1>(unit, scales, larger, row, row_bytes);
}

DEVICE u32 mix(u32 x) {   // a finalizer with good avalanche (public domain constants of lowbias32)
  x ^= x >> 16; x *= 0x7FEB352Du; x ^= x >> 15; x *= 0x846CA68Bu; x ^= x >> 16;
  return x;
}

// Units of random weights for benchmarks. In every period of words the first `num_code_words` hold codes
// drawn from `codes` (256 equally likely ones), the rest bytes drawn from `bytes` (4096 equally likely
// ones): as NVFP4's operand and scale words if `has_operands`, else as nibbles and plain bytes.
extern "C" __global__ void __launch_bounds__(256)
    fill_random(u32* words, i64 num_words, const u8* codes, const u8* bytes, int period_words,
                int num_code_words, int has_operands, u32 seed) {
  __shared__ u8 code_table[256], byte_table[4096];
  for (int i = threadIdx.x; i < 4096; i += blockDim.x) byte_table[i] = bytes[i];
  code_table[threadIdx.x] = codes[threadIdx.x];
  __syncthreads();
  const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
  for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < num_words; i += step) {
    const u32 a = mix(static_cast<u32>(i) ^ mix(static_cast<u32>(i >> 32) + seed));
    const u32 b = mix(a ^ 0x9E3779B9u);
    u32 word = 0;
    if (static_cast<int>(i % period_words) < num_code_words) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const u32 source = half == 0 ? a : b;
        const u32 c0 = code_table[source & 255], c1 = code_table[source >> 8 & 255];
        const u32 c2 = code_table[source >> 16 & 255], c3 = code_table[source >> 24];
        if (!has_operands) {   // random signs stay random wherever they lie
          word |= (c0 | c1 << 4 | c2 << 8 | c3 << 12) << 16 * half;
          continue;
        }
        const u32 bits = (c0 >> 3) << 15 | (c0 & 7) << 9 | (c1 >> 3) << 12 | (c1 & 7) << 6 |
                         (c2 >> 3) << 14 | (c2 & 7) << 3 | (c3 >> 3) << 13 | (c3 & 7);
        word |= bits << 16 * half;
      }
    } else if (has_operands) {
      const u32 even = byte_table[a & 4095] << 7 | byte_table[a >> 12 & 4095] << 23;
      const u32 odd = byte_table[b & 4095] << 7 | byte_table[b >> 12 & 4095] << 23;
      word = even | __byte_perm(odd, odd, 0x0321);
    } else {
      word = byte_table[a & 4095] | byte_table[a >> 12 & 4095] << 8 |
             byte_table[b & 4095] << 16 | byte_table[b >> 12 & 4095] << 24;
    }
    words[i] = word;
  }
}
