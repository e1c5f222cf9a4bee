// Small kernels of Hopper's instructions, right and wrong ones, for test_emulator_sm90.py.
#include <string>

#include "device_sm90.cuh"

namespace {

using namespace fastnce::cuda;

enum class Fault : int {
  kNone,
  kNoBarrier,       // does not wait for the copies
  kNoInit,          // of the barrier
  kTooManyBytes,    // are announced
  kTwoArrivals,     // where one is expected
  kNoFence,         // before the products
  kNoWait,          // for the products
  kDisagree,        // the warps of the group
  kTileChanged,     // before the products are made
  kOperandChanged,  // likewise, a register
};

constexpr int kLines = 128;
constexpr int kTile = kLines * kLineBytes;

// Two boxes of `in` (problems, rows, depth), lines from (problem, row, element) on: of 64 and of
// 128 rows. Then
//   from tiles: d (64, kColumns) = a b^T over 64 elements; out is every thread's d, in order
//   across:     d (64, 64) = r b over 64 lines of b, r from `registers` (4 steps, 128 threads, 4)
// and the tiles' bytes as they lie in shared memory.
struct Places {
  int element, row, problem;
};

template <class T, int kColumns>
__global__ void multiply(const __grid_constant__ TensorMap a_map,
                         const __grid_constant__ TensorMap b_map, Places at,
                         const uint32_t* registers, float* out, char* bytes, Fault fault) {
  char* a = shared_memory<char>();
  char* b = a + kTile / 2;
  auto* barrier = reinterpret_cast<uint64_t*>(b + kTile);
  const auto thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    if (fault != Fault::kNoInit) barrier_init(barrier, 1);
    barrier_init_done();
    const int extra = fault == Fault::kTooManyBytes ? 16 : 0;
    barrier_arrive_expecting(barrier, kTile + kTile / 2 + extra);
    copy_tensor(a, &a_map, barrier, at.element, at.row, at.problem);
    copy_tensor(b, &b_map, barrier, at.element, at.row, at.problem);
    if (fault == Fault::kTwoArrivals) barrier_arrive(barrier);
  }
  sync_threads();
  if (fault != Fault::kNoBarrier) barrier_wait(barrier, 0);
  for (int i = thread; i < kTile + kTile / 2; i += kWarpGroup) bytes[i] = a[i];

  float d[kColumns / 8][4] = {};
  uint32_t r[4][4] = {};
  for (int k = 0; registers != nullptr && k < 4; ++k) {
    for (int i = 0; i < 4; ++i) r[k][i] = registers[(k * kWarpGroup + thread) * 4 + i];
  }
  if (fault != Fault::kNoFence) wgmma_fence();
  for (int k = 0; k < 4; ++k) {
    if constexpr (kColumns == 64) {
      if (registers != nullptr) {
        wgmma_registers<T>(d, r[k], tile_descriptor(b + 2048 * k));
        continue;
      }
    }
    const char* mine = fault == Fault::kDisagree && thread / kWarp == 2 ? b + 1024 : b;
    wgmma_tiles<T, kColumns>(d, tile_descriptor(a + 32 * k), tile_descriptor(mine + 32 * k));
  }
  wgmma_commit();
  if (fault == Fault::kTileChanged && thread == 0) b[7] ^= 64;
  if (fault == Fault::kOperandChanged && thread == 9) r[2][1] = 0;
  if (fault != Fault::kNoWait) wgmma_wait<0>();
  pin(d);
  for (int i = 0; i < kColumns / 2; ++i) out[thread * (kColumns / 2) + i] = d[i / 4][i % 4];
}

template <class T>
void run(const Launch& l, Dtype dtype, const void* in, const int* sizes, Places at, int columns,
         const uint32_t* registers, float* out, char* bytes, Fault fault) {
  const auto map = [&](int rows) {
    return make_tensor_map(l.op, in, dtype, sizes[2], sizes[1], sizes[0], rows);
  };
  launch(l, columns == 64 ? multiply<T, 64> : multiply<T, 128>, map(64), map(kLines), at, registers,
         out, bytes, fault);
}

}  // namespace

#pragma GCC visibility push(default)

// "" or the error's message. `sizes` are those of `in`, `at` the boxes' element, row and problem.
extern "C" const char* run_case(int is_bfloat16, const void* in, const int* sizes, const int* at,
                                int columns, const uint32_t* registers, float* out, char* bytes,
                                int fault) {
  static std::string message;
  message.clear();
  try {
    const Launch l{"a test", 1, kWarpGroup, kTile + kTile / 2 + sizeof(uint64_t), nullptr};
    const Places places{at[0], at[1], at[2]};
    const auto f = static_cast<Fault>(fault);
    if (is_bfloat16 != 0) {
      run<bfloat16>(l, Dtype::kBfloat16, in, sizes, places, columns, registers, out, bytes, f);
    } else {
      run<float16>(l, Dtype::kFloat16, in, sizes, places, columns, registers, out, bytes, f);
    }
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  return message.c_str();
}
