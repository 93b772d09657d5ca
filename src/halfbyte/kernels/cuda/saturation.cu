// How many e4m3 codes of each row are the largest, 448 (model/saturation.py). Launched behind a kernel that
// has written activations, where an engine was told to count; else never compiled.
//
// Walk: grid (slices, tokens); a thread takes chunks of 16 codes, a warp adds up, one atomic addition a warp
//   that found any. Rows without a slot of the cache are padding and are not counted.
// Bytes: 1 read a feature. No FLOP. Exact: integers, whatever the order.
// Limits: chunks of 16 codes are read whole: what pads the last one must not be a largest code (it is 0).

extern "C" __global__ void __launch_bounds__(128)
    count_largest(const u8* codes, i64 chunk_stride, i64 token_stride, int num_features, const i64* slots,
                  const u8* is_image, u64* counts) {   // (text or image, largest or all)
  let_next_kernel_start();
  wait_for_previous_kernels();
  const int token = blockIdx.y;
  if (slots[token] < 0) return;
  u32 found = 0;
  for (int chunk = blockIdx.x * blockDim.x + threadIdx.x; chunk * 16 < num_features;
       chunk += gridDim.x * blockDim.x) {
    const uint4 v = *reinterpret_cast<const uint4*>(codes + chunk * chunk_stride + token * token_stride);
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // A byte of `others` is 0 where a code is the largest; no carry leaves a byte of at most 0x7F.
      const u32 others = (words[i] & 0x7F7F7F7Fu) ^ 0x7E7E7E7Eu;
      found += __popc(~(others + 0x7F7F7F7Fu) & 0x80808080u);
    }
  }
  found = __reduce_add_sync(0xFFFFFFFFu, found);
  u64* mine = counts + (is_image[token] != 0 ? 2 : 0);
  if (threadIdx.x % 32 == 0 && found > 0) atomicAdd(mine, static_cast<u64>(found));
  if (blockIdx.x == 0 && threadIdx.x == 0) atomicAdd(mine + 1, static_cast<u64>(num_features));
}
