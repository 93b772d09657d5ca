// Does `compute-sanitizer --tool racecheck` follow a ring of asynchronous copies at all? A control for
// its reports about prefill.cu: the smallest such ring, on NVIDIA's own barriers (libcu++).
//
//     nvcc -arch=sm_90 -std=c++17 -DIS_ORDERED=1 -o control racecheck_control.cu
//     compute-sanitizer --tool racecheck ./control
//
// One thread copies, a warp reads; IS_ORDERED 1: a stage is filled again when its readers have arrived
// at its barrier, so that nothing can be read and written at once. IS_ORDERED 0 leaves that out: a race.

#include <cstdio>
#include <cuda/barrier>

constexpr int STAGES = 2, ROUNDS = 8, WORDS = 256;
using Barrier = cuda::barrier<cuda::thread_scope_block>;

__global__ void ring(const int* source, int* sums) {
  __shared__ alignas(128) int words[STAGES][WORDS];
  __shared__ Barrier full[STAGES], empty[STAGES];
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      init(&full[stage], 1);
      init(&empty[stage], 32);
    }
    cuda::device::experimental::fence_proxy_async_shared_cta();
  }
  __syncthreads();
  if (threadIdx.x == 32) {
    for (int i = 0; i < STAGES * ROUNDS; ++i) {
      const int stage = i % STAGES;
      if (IS_ORDERED && i >= STAGES) empty[stage].wait_parity((i / STAGES - 1) & 1);
      cuda::device::memcpy_async_tx(words[stage], source + i * WORDS,
                                    cuda::aligned_size_t<16>(sizeof(words[0])), full[stage]);
      (void)cuda::device::barrier_arrive_tx(full[stage], 1, sizeof(words[0]));
    }
  } else if (threadIdx.x < 32) {
    int sum = 0;
    for (int i = 0; i < STAGES * ROUNDS; ++i) {
      const int stage = i % STAGES;
      full[stage].wait_parity(i / STAGES & 1);
      for (int word = threadIdx.x; word < WORDS; word += 32) sum += words[stage][word];
      (void)empty[stage].arrive();
    }
    sums[threadIdx.x] = sum;
  }
}

int main() {
  const int count = STAGES * ROUNDS * WORDS;
  int *source, *sums;
  cudaMallocManaged(&source, count * sizeof(int));
  cudaMallocManaged(&sums, 32 * sizeof(int));
  long wanted = 0, found = 0;
  for (int i = 0; i < count; ++i) wanted += source[i] = i % 101;
  ring<<<1, 64>>>(source, sums);
  const cudaError_t error = cudaDeviceSynchronize();
  for (int lane = 0; lane < 32; ++lane) found += sums[lane];
  std::printf("%s: %ld, wanted %ld\n", cudaGetErrorString(error), found, wanted);
  return found != wanted;
}
