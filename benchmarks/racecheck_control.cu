// Which rings of asynchronous copies does `compute-sanitizer --tool racecheck` follow? Controls for what
// it reports about linear.cu and prefill.cu: the smallest such ring.
//
//     nvcc -arch=sm_90a -std=c++17 -lineinfo -DLOOP=1 -DOWN=1 -DONE_A_WARP=1 -DTENSOR=0 -DBROKEN=0 \
//          -o control racecheck_control.cu
//     compute-sanitizer --tool racecheck ./control
//
// One thread copies, a warp reads; a stage is filled again when its readers have arrived at its barrier.
// LOOP 0: the compiler unrolls all rounds; 1: a loop whose length it does not know, as in our kernels.
// OWN 0: barriers and copies of NVIDIA's library (libcu++); 1: the instructions of primitives.cu.
// ONE_A_WARP 0: every reader arrives; 1: one lane for its warp behind __syncwarp(), as our kernels do it.
// TENSOR 0: copies by address (cp.async.bulk); 1: the same bytes by descriptor (cp.async.bulk.tensor).
// BROKEN 1: readers arrive ahead of reading. A real race, which a tool must report.

#include <cuda.h>

#include <cstdint>
#include <cstdio>
#include <cuda/barrier>

constexpr int STAGES = 2, ROUNDS = 8, WORDS = 256, BYTES = WORDS * 4;
constexpr int UNROLLED = LOOP ? 1 : STAGES * ROUNDS;   // of a loop
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
__device__ void arrive_for_all(Barrier& barrier) {
  if (ONE_A_WARP) __syncwarp();
  if (!ONE_A_WARP || threadIdx.x == 0) arrive(barrier);
}
__device__ void copy(int* target, const CUtensorMap& map, const int* source, int first, Barrier& barrier) {
  const uint32_t at = shared_address(&barrier);
  if (!OWN && !TENSOR) {
    cuda::device::memcpy_async_tx(target, source + first, cuda::aligned_size_t<16>(BYTES), barrier);
    (void)cuda::device::barrier_arrive_tx(barrier, 1, BYTES);
    return;
  }
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(BYTES) : "memory");
  if (TENSOR)
    asm volatile(
        "cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2}], [%3];" ::"r"(
            shared_address(target)),
        "l"(&map), "r"(first), "r"(at)
        : "memory");
  else
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(target)),
        "l"(source + first), "r"(BYTES), "r"(at)
        : "memory");
}

__global__ void ring(const __grid_constant__ CUtensorMap map, const int* source, int* sums, int given_rounds) {
  __shared__ alignas(128) int words[STAGES][WORDS];
  __shared__ Barrier full[STAGES], empty[STAGES];
  const int rounds = LOOP ? given_rounds : ROUNDS;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      init(&full[stage], 1);
      init(&empty[stage], ONE_A_WARP ? 1 : 32);
    }
    cuda::device::experimental::fence_proxy_async_shared_cta();
  }
  __syncthreads();
  if (threadIdx.x == 32) {
#pragma unroll UNROLLED
    for (int i = 0; i < STAGES * rounds; ++i) {
      const int stage = i % STAGES;
      if (i >= STAGES) wait(empty[stage], (i / STAGES - 1) & 1);
      copy(words[stage], map, source, i * WORDS, full[stage]);
    }
  } else if (threadIdx.x < 32) {
    int sum = 0;
#pragma unroll UNROLLED
    for (int i = 0; i < STAGES * rounds; ++i) {
      const int stage = i % STAGES;
      wait(full[stage], i / STAGES & 1);
      if (BROKEN) arrive_for_all(empty[stage]);
      for (int word = threadIdx.x; word < WORDS; word += 32) sum += words[stage][word];
      if (!BROKEN) arrive_for_all(empty[stage]);
    }
    sums[threadIdx.x] = sum;
  }
}

// The numbers as one row, a box a stage.
CUtensorMap map_of(int* source, int count) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult result;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
  CUtensorMap map{};
  const cuuint64_t sizes[1] = {static_cast<cuuint64_t>(count)}, strides[1] = {0};
  const cuuint32_t box[1] = {WORDS}, steps[1] = {1};
  const CUresult status = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
      &map, CU_TENSOR_MAP_DATA_TYPE_INT32, 1, source, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) std::printf("no tensor map: %d\n", static_cast<int>(status));
  return map;
}

int main() {
  const int count = STAGES * ROUNDS * WORDS;
  int *source, *sums;
  cudaMallocManaged(&source, count * sizeof(int));
  cudaMallocManaged(&sums, 32 * sizeof(int));
  long wanted = 0, found = 0;
  for (int i = 0; i < count; ++i) wanted += source[i] = i % 101;
  ring<<<1, 64>>>(map_of(source, count), source, sums, ROUNDS);
  const cudaError_t error = cudaDeviceSynchronize();
  for (int lane = 0; lane < 32; ++lane) found += sums[lane];
  std::printf("loop %d own %d one a warp %d tensor %d broken %d: %s: %ld, wanted %ld\n", LOOP, OWN, ONE_A_WARP, TENSOR,
              BROKEN, cudaGetErrorString(error), found, wanted);
  return !BROKEN && found != wanted;
}
