// Which rings of asynchronous copies does `compute-sanitizer --tool racecheck` follow? Controls for what
// it reports about linear.cu and prefill.cu: the smallest such ring, right in every variant.
//
//     nvcc -arch=sm_90 -std=c++17 -lineinfo -DVARIANT=0 -o control racecheck_control.cu
//     compute-sanitizer --tool racecheck ./control
//
// One thread copies, a warp reads; a stage is filled again when its readers have arrived at its barrier.
// VARIANT 0: NVIDIA's own barriers (libcu++), every reader arrives. 1: those, one lane arrives for its
// warp behind __syncwarp(). 2: the instructions that primitives.cu uses, every reader arrives. 3: those,
// one lane for its warp, as our kernels do it.

#include <cstdint>
#include <cstdio>
#include <cuda/barrier>

constexpr int STAGES = 2, ROUNDS = 8, WORDS = 256, BYTES = WORDS * 4;
constexpr bool OWN = VARIANT >= 2, ONE_A_WARP = VARIANT % 2 == 1;
#pragma nv_diag_suppress static_var_with_dynamic_init  // `init` below
using Barrier = cuda::barrier<cuda::thread_scope_block>;

__device__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
__device__ void wait(Barrier& barrier, int parity) {
  if (!OWN) {
    barrier.wait_parity(parity);
    return;
  }
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra.uni out;\nbra.uni again;\nout:\n}\n" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}
__device__ void arrive(Barrier& barrier) {
  if (OWN)
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
  else
    (void)barrier.arrive();
}
__device__ void copy(int* target, const int* source, Barrier& barrier) {
  if (!OWN) {
    cuda::device::memcpy_async_tx(target, source, cuda::aligned_size_t<16>(BYTES), barrier);
    (void)cuda::device::barrier_arrive_tx(barrier, 1, BYTES);
    return;
  }
  const uint32_t at = shared_address(&barrier);
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(BYTES) : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(target)),
      "l"(source), "r"(BYTES), "r"(at)
      : "memory");
}

__global__ void ring(const int* source, int* sums) {
  __shared__ alignas(128) int words[STAGES][WORDS];
  __shared__ Barrier full[STAGES], empty[STAGES];
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      init(&full[stage], 1);
      init(&empty[stage], ONE_A_WARP ? 1 : 32);
    }
    cuda::device::experimental::fence_proxy_async_shared_cta();
  }
  __syncthreads();
  if (threadIdx.x == 32) {
    for (int i = 0; i < STAGES * ROUNDS; ++i) {
      const int stage = i % STAGES;
      if (i >= STAGES) wait(empty[stage], (i / STAGES - 1) & 1);
      copy(words[stage], source + i * WORDS, full[stage]);
    }
  } else if (threadIdx.x < 32) {
    int sum = 0;
    for (int i = 0; i < STAGES * ROUNDS; ++i) {
      const int stage = i % STAGES;
      wait(full[stage], i / STAGES & 1);
      for (int word = threadIdx.x; word < WORDS; word += 32) sum += words[stage][word];
      if (ONE_A_WARP) __syncwarp();
      if (!ONE_A_WARP || threadIdx.x == 0) arrive(empty[stage]);
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
  std::printf("variant %d: %s: %ld, wanted %ld\n", VARIANT, cudaGetErrorString(error), found, wanted);
  return found != wanted;
}
