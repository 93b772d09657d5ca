// A linear's result, partial sums and all, as one dense f32 matrix: logits for a sampler, or what the
// ranks of a tensor-parallel group add up.
//
// Walk: grid (slices, tokens); a thread takes eight features at a time.
// Bytes: slots * 4 read, 4 written a feature.

extern "C" __global__ void __launch_bounds__(256)
    gather_f32(LinearResult y, int num_features, float* dense, i64 token_stride) {
  let_next_kernel_start();
  wait_for_previous_kernels();
  float* row = dense + blockIdx.y * token_stride;
  for (int feature = (blockIdx.x * blockDim.x + threadIdx.x) * 8; feature < num_features;
       feature += gridDim.x * blockDim.x * 8) {
    float v[8];
    load_result<true>(y, blockIdx.y, feature, v);
    float4* at = reinterpret_cast<float4*>(row + feature);
    at[0] = make_float4(v[0], v[1], v[2], v[3]);
    at[1] = make_float4(v[4], v[5], v[6], v[7]);
  }
}
