// Small kernels, right and with the fault that they are given, by which test_emulator.py sees that
// the emulator notices what a GPU would punish. The faults are described there.
#include <string>
#include <string_view>

#include "device_sm90.cuh"
#include "launch.cuh"

using namespace fastnce::cuda;

namespace {

using Fault = std::string_view;

constexpr int kThreads = 128;

// out[t] = in[127 - t], through shared memory; or what is left of it.
__global__ void reverse(const float* in, float* out, Fault fault) {
  auto* shared = shared_memory<float>();
  const int t = static_cast<int>(threadIdx.x);
  shared[t] = in[t];
  if (fault == "overrun" && t == 0) shared[kThreads] = 0.0f;
  if (fault != "no_barrier" && !(fault == "some_skip_barrier" && t >= 96)) sync_threads();
  if (fault == "barrier_sizes") sync_named(1, t < 64 ? 128 : 96);
  out[t] = shared[kThreads - 1 - t];
}

// out[t] = in[t], by copies of 16 bytes.
__global__ void copy(const float* in, float* out, Fault fault) {
  auto* shared = shared_memory<float>();
  const int t = static_cast<int>(threadIdx.x);
  const int shift = fault == "misaligned_copy" ? 1 : 0;
  shared[t] = 7.0f;
  sync_threads();
  if (t < kThreads / 4) copy_async<16>(shared + 4 * t + shift, in + 4 * t);
  copy_async_commit();
  if (fault != "no_wait" && fault != "copy_left_behind") copy_async_wait<0>();
  sync_threads();
  out[t] = shared[t];
  if (fault == "no_wait") copy_async_wait<0>();
}

// out[t] = the sum of the warp's in.
__global__ void sum(const float* in, float* out, Fault fault) {
  const int t = static_cast<int>(threadIdx.x);
  const bool low = t % kWarp < kWarp / 2;
  float total = in[t];
  if (fault == "half_warp" && !low) return;
  if (fault == "divergent_warp" && !low) {
    sync_warp();
  } else {
    total = warp_sum(total);
  }
  out[t] = total;
}

// out (16, 8) = a (16, 16) b (8, 16)^T, in (24, 16) the rows of both; one warp.
template <class T>
__global__ void multiply(const float* in, float* out) {
  auto* shared = shared_memory<T>();
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 32 * 16; i += kWarp) shared[i] = from_float<T>(i < 24 * 16 ? in[i] : 0.0f);
  sync_warp();
  uint32_t a[4], b[4];
  load_matrix_x4(a, shared + lane % 16 * 16 + lane / 16 * 8);
  load_matrix_x4(b, shared + 16 * 16 + lane % 8 * 16 + lane / 8 % 2 * 8);
  float c[4] = {};
  multiply_m16n8k16<T>(c, a, {b[0], b[1]});
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
}

// --- Hopper's instructions ---

constexpr int kLines = 128;
constexpr int kTile = kLines * kLineBytes;

struct Places {
  int element, row, problem;
};

// Two boxes of `in` (problems, rows, depth), lines from (problem, row, element) on: of 64 and of
// 128 rows. Then
//   from tiles: d (64, kColumns) = a b^T over 64 elements; out is every thread's d, in order
//   across:     d (64, 64) = r b over 64 lines of b, r from `registers` (4 steps, 128 threads, 4)
// and the tiles' bytes as they lie in shared memory.
template <class T, int kColumns>
__global__ void multiply_tiles(const __grid_constant__ TensorMap a_map,
                               const __grid_constant__ TensorMap b_map, Places at,
                               const uint32_t* registers, float* out, char* bytes, Fault fault) {
  char* a = shared_memory<char>();
  char* b = a + kTile / 2;
  auto* barrier = reinterpret_cast<uint64_t*>(b + kTile);
  const auto thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    if (fault != "no_init") barrier_init(barrier, 1);
    barrier_init_done();
    const int extra = fault == "too_many_bytes" ? 16 : 0;
    barrier_arrive_expecting(barrier, kTile + kTile / 2 + extra);
    copy_tensor(a, &a_map, barrier, at.element, at.row, at.problem);
    copy_tensor(b, &b_map, barrier, at.element, at.row, at.problem);
    if (fault == "two_arrivals") barrier_arrive(barrier);
  }
  sync_threads();
  if (fault != "no_barrier") barrier_wait(barrier, 0);
  for (int i = thread; i < kTile + kTile / 2; i += kWarpGroup) bytes[i] = a[i];

  float d[kColumns / 8][4] = {};
  uint32_t r[4][4] = {};
  for (int k = 0; registers != nullptr && k < 4; ++k) {
    for (int i = 0; i < 4; ++i) r[k][i] = registers[(k * kWarpGroup + thread) * 4 + i];
  }
  if (fault != "no_fence") wgmma_fence();
  for (int k = 0; k < 4; ++k) {
    if constexpr (kColumns == 64) {
      if (registers != nullptr) {
        wgmma_registers<T>(d, r[k], tile_descriptor(b + 2048 * k));
        continue;
      }
    }
    const char* mine = fault == "disagree" && thread / kWarp == 2 ? b + 1024 : b;
    wgmma_tiles<T, kColumns>(d, tile_descriptor(a + 32 * k), tile_descriptor(mine + 32 * k));
  }
  wgmma_commit();
  if (fault == "tile_changed" && thread == 0) b[7] ^= 64;
  if (fault == "operand_changed" && thread == 9) r[2][1] = 0;
  if (fault != "no_wait") wgmma_wait<0>();
  pin(d);
  for (int i = 0; i < kColumns / 2; ++i) out[thread * (kColumns / 2) + i] = d[i / 4][i % 4];
}

__global__ void asked(int) {}

// "" or the error's message.
template <class Run>
const char* message_of(Run run) {
  static std::string message;
  message.clear();
  try {
    run();
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  return message.c_str();
}

}  // namespace

#pragma GCC visibility push(default)

extern "C" const char* run_kernel(const char* name, const char* fault, const float* in,
                                  float* out) {
  const std::string_view kernel = name;
  const Fault f = fault;
  Launch l{"a test", 1, kThreads, kThreads * sizeof(float), nullptr};
  if (f == "too_many_threads") l.block = 2048;
  if (f == "too_much_shared_memory") l.shared_bytes = 300 * 1024;
  return message_of([&]() mutable {
    if (kernel == "reverse") return launch(l, reverse, in, out, f);
    if (kernel == "copy") return launch(l, copy, in, out, f);
    if (kernel == "sum") return launch(l, sum, in, out, f);
    l.block = kWarp;
    l.shared_bytes = 32 * 16 * 2;
    if (kernel == "multiply_bfloat16") return launch(l, multiply<bfloat16>, in, out);
    launch(l, multiply<float16>, in, out);
  });
}

// After launches with 60, 100 and 60 KiB: how often the limit of shared memory was set, and the
// last.
extern "C" void run_limits(int* found) {
  const int before = emulator::limits_set();
  for (const size_t kilobytes : {60, 100, 60}) {
    launch({"a test", 1, kWarp, kilobytes * 1024, nullptr}, asked, 0);
  }
  found[0] = emulator::limits_set() - before;
  found[1] = emulator::shared_limit(reinterpret_cast<const void*>(asked));
}

// `sizes` are those of `in`, `at` the boxes' element, row and problem.
extern "C" const char* run_tiles(int is_bfloat16, const void* in, const int* sizes, const int* at,
                                 int columns, const uint32_t* registers, float* out, char* bytes,
                                 const char* fault) {
  return message_of([=] {
    const Launch l{"a test", 1, kWarpGroup, kTile + kTile / 2 + sizeof(uint64_t), nullptr};
    const Dtype dtype = is_bfloat16 != 0 ? Dtype::kBfloat16 : Dtype::kFloat16;
    const auto map = [&](int rows) {
      return make_tensor_map(l.op, in, dtype, sizes[2], sizes[1], sizes[0], rows);
    };
    auto* kernel = columns == 64 ? multiply_tiles<float16, 64> : multiply_tiles<float16, 128>;
    if (is_bfloat16 != 0) {
      kernel = columns == 64 ? multiply_tiles<bfloat16, 64> : multiply_tiles<bfloat16, 128>;
    }
    launch(l, kernel, map(64), map(kLines), Places{at[0], at[1], at[2]}, registers, out, bytes,
           Fault(fault));
  });
}
