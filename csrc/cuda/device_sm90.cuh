// Hopper's own instructions, by name: tensor copies, barriers that count bytes, and the products of
// a warp group. The other half for the host is tests/cuda_kernels/emulator_sm90.h. Names and
// layouts are those of the PTX ISA, "Asynchronous warpgroup level matrix instructions" and
// "Swizzling modes".
//
// A tile in shared memory is `rows` lines of 128 bytes, 64 elements of 16 bits, that begins at a
// multiple of 1024 bytes; a tensor copy puts the 16-byte piece p of line r at piece p ^ (r % 8)
// (the swizzle of 128 bytes), so that neither eight lines at one piece nor one line meet in a bank.
// The products read the same tile both ways:
//   along its lines: element (r, k) is (row or column r, depth k)
//   transposed:      element (r, k) is (depth r, column k)
#pragma once

#include "arguments.h"
#include "launch.cuh"

#ifdef FASTNCE_EMULATED
#include "emulator_sm90.h"
#else
#include <cuda.h>
#endif

// The kernels' bodies exist for sm_90a alone: no other GPU has these instructions, later ones
// included.
#if defined(FASTNCE_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTNCE_SM90A 1
#endif

namespace fastnce::cuda {

constexpr int kWarpGroup = 128;
constexpr int kLineElements = 64;  // of 16 bits, in a line of a tile
constexpr int kLineBytes = 128;

#ifdef FASTNCE_EMULATED

using namespace emulator::sm90;

#else

using TensorMap = CUtensorMap;

// Packed rows (problems, rows, depth) of 16-bit elements, to be copied by boxes of 64 elements x
// box_rows rows of one problem. What a box has beyond the rows of the problem or the depth arrives
// as zeros. Throws LaunchError.
inline TensorMap make_tensor_map(const char* op, const void* data, Dtype dtype, int64_t depth,
                                 int64_t rows, int64_t problems, int box_rows) {
  // The driver's function by way of the runtime: nothing is linked with libcuda, so that the
  // library loads without a driver.
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    auto found = cudaDriverEntryPointSymbolNotFound;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                     &found);
    return found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  const auto extent = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  const cuuint64_t extents[3] = {extent(depth), extent(rows), extent(problems)};
  const cuuint64_t strides[2] = {extent(depth * 2), extent(rows * depth * 2)};
  const cuuint32_t box[3] = {kLineElements, static_cast<cuuint32_t>(box_rows), 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  TensorMap map;
  const CUresult result =
      encode == nullptr
          ? CUDA_ERROR_NOT_FOUND
          : encode(&map,
                   dtype == Dtype::kBfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                   3, const_cast<void*>(data), extents, strides, box, steps,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw LaunchError(std::string(op) + ": the driver refuses a tensor map of " +
                      std::to_string(problems) + " x " + std::to_string(rows) + " x " +
                      std::to_string(depth) + " elements (CUresult " + std::to_string(result) +
                      "). Use backend='triton' or backend='torch' for this call.");
  }
  return map;
}

// --- barriers in shared memory: a phase ends when `count` threads have arrived and all announced
// bytes with them ---

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}
// After the last init, before a barrier of the block: tensor copies, which are of the asynchronous
// proxy, see the barriers as well.
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Arrives, and announces bytes that a copy is going to bring.
__device__ __forceinline__ void barrier_arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Waits for the end of the phase of this parity: 0 for the first, 1 for the second, 0 for the
// third, ... Of the phase before the first (parity 1), the end is past.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, "
        "p; }"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// One thread copies a box (see make_tensor_map) from element `depth` of row `row` of problem
// `problem`; its bytes, all of them, zeros included, are counted by the barrier.
__device__ __forceinline__ void copy_tensor(void* shared, const TensorMap* map, uint64_t* barrier,
                                            int depth, int row, int problem) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%2, "
      "%3, %4}], [%5];" ::"r"(shared_address(shared)),
      "l"(map), "r"(depth), "r"(row), "r"(problem), "r"(shared_address(barrier))
      : "memory");
}

// --- registers: the warp groups of a kernel exchange what they do not need ---

template <int Count>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count>
__device__ __forceinline__ void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

// --- products of a warp group, in the background ---

// How a product finds a tile whose lines are in groups of eight, 1024 bytes from one to the next,
// from `start` on: a multiple of 1024, plus 32 bytes for each 16 elements of depth (along its
// lines), or 2048 for each 16 lines (transposed).
__device__ __forceinline__ uint64_t tile_descriptor(const void* start) {
  constexpr uint64_t kGroups = 1024 / 16, kSwizzle128 = 1;
  // The "leading" distance counts for more than 64 columns of a transposed tile alone, which do not
  // occur.
  return (shared_address(start) & 0x3ffff) / 16 | kGroups << 16 | kGroups << 32 | kSwizzle128 << 62;
}

// What this thread wrote to registers of a product is in them. Before the first product, and after
// any such write.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most the last Pending groups are on their way; their registers and their tiles are not
// to be touched.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// Holds the compiler from moving what reads or writes these registers across: an operand that is
// written after the fence makes it wait for each product in turn.
template <int Count>
__device__ __forceinline__ void pin(float (&d)[Count][4]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+f"(d[i][j])::"memory");
  }
}
template <int Count>
__device__ __forceinline__ void pin(uint32_t (&a)[Count][4]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+r"(a[i][j])::"memory");
  }
}

// Operands of 32 and of 64 registers.
#define FASTNCE_D32_NAMES                                                                       \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTNCE_D64_NAMES                                                                        \
  FASTNCE_D32_NAMES                                                                              \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTNCE_D4(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define FASTNCE_D32(d, i)                                                             \
  FASTNCE_D4(d[i]), FASTNCE_D4(d[i + 1]), FASTNCE_D4(d[i + 2]), FASTNCE_D4(d[i + 3]), \
      FASTNCE_D4(d[i + 4]), FASTNCE_D4(d[i + 5]), FASTNCE_D4(d[i + 6]), FASTNCE_D4(d[i + 7])

#define FASTNCE_WGMMA_SHARED_64(type)                                                            \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " FASTNCE_D32_NAMES \
               "}, %32, %33, 1, 1, 1, 0, 0;"                                                     \
               : FASTNCE_D32(d, 0)                                                               \
               : "l"(a), "l"(b))
#define FASTNCE_WGMMA_SHARED_128(type)                                                            \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " FASTNCE_D64_NAMES \
               "}, %64, %65, 1, 1, 1, 0, 0;"                                                      \
               : FASTNCE_D32(d, 0), FASTNCE_D32(d, 8)                                             \
               : "l"(a), "l"(b))
#define FASTNCE_WGMMA_REGISTERS_64(type)                                                         \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " FASTNCE_D32_NAMES \
               "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                       \
               : FASTNCE_D32(d, 0)                                                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// d (64 x Columns) += a b^T: a has 64 lines, b has Columns, both along their
// lines, from the descriptors on 16 elements deep. Warp w of the warp group has rows 16 w ... of d;
// with g = lane / 4, t = lane % 4:
//   d[i] = {(g, 8 i + 2 t), (g, 8 i + 2 t + 1), (g + 8, 8 i + 2 t), (g + 8, 8 i + 2 t + 1)}
template <class T, int Columns>
__device__ __forceinline__ void wgmma_tiles(float (&d)[Columns / 8][4], uint64_t a, uint64_t b) {
  static_assert(Columns == 64 || Columns == 128);
  constexpr bool kBfloat16 = sizeof(T) == 2 && std::is_same_v<T, bfloat16>;
#ifdef FASTNCE_SM90A
  if constexpr (Columns == 64) {
    if constexpr (kBfloat16) {
      FASTNCE_WGMMA_SHARED_64("bf16");
    } else {
      FASTNCE_WGMMA_SHARED_64("f16");
    }
  } else {
    if constexpr (kBfloat16) {
      FASTNCE_WGMMA_SHARED_128("bf16");
    } else {
      FASTNCE_WGMMA_SHARED_128("f16");
    }
  }
#endif
}

// d (64 x 64) += a b: a, 64 x 16, from registers, a = {(g, 2t ..), (g + 8, 2t ..), (g, 2t + 8 ..),
// (g + 8, 2t + 8 ..)} in the warp's 16 rows, two elements each; b is 16 lines of a tile,
// transposed.
template <class T>
__device__ __forceinline__ void wgmma_registers(float (&d)[8][4], const uint32_t (&a)[4],
                                                uint64_t b) {
#ifdef FASTNCE_SM90A
  if constexpr (std::is_same_v<T, bfloat16>) {
    FASTNCE_WGMMA_REGISTERS_64("bf16");
  } else {
    FASTNCE_WGMMA_REGISTERS_64("f16");
  }
#endif
}

#undef FASTNCE_D32_NAMES
#undef FASTNCE_D64_NAMES
#undef FASTNCE_D4
#undef FASTNCE_D32
#undef FASTNCE_WGMMA_SHARED_64
#undef FASTNCE_WGMMA_SHARED_128
#undef FASTNCE_WGMMA_REGISTERS_64

#endif  // FASTNCE_EMULATED

}  // namespace fastnce::cuda
