// Small kernels, right and wrong, by which test_emulator.py sees that the emulator notices what a
// GPU would punish.
#include <cstdio>
#include <cstring>
#include <string>

#include "launch.cuh"

using namespace fastnce::cuda;

namespace {

enum class Fault {
  kNone,
  kNoBarrier,        // read before others have written
  kNoWait,           // read what a copy has not brought yet
  kCopyLeftBehind,   // end with a copy on its way
  kSomeSkipBarrier,  // a barrier that not all reach
  kBarrierSizes,     // a named barrier with two sizes
  kOverrun,          // write beyond the shared memory
  kHalfWarp,         // an operation of the warp that half of it takes part in
  kDivergentWarp,    // halves of a warp in different operations
  kMisalignedCopy,   // an asynchronous copy of 16 bytes to an address that is no multiple of 16
  kTooManyThreads,   // launches that no GPU accepts
  kTooMuchSharedMemory,
};

constexpr int kThreads = 128;

// out[t] = in[127 - t], through shared memory; or what is left of it.
__global__ void reverse(const float* in, float* out, Fault fault) {
  auto* shared = shared_memory<float>();
  const int t = static_cast<int>(threadIdx.x);
  shared[t] = in[t];
  if (fault == Fault::kOverrun && t == 0) shared[kThreads] = 0.0f;
  if (fault != Fault::kNoBarrier && !(fault == Fault::kSomeSkipBarrier && t >= 96)) sync_threads();
  if (fault == Fault::kBarrierSizes) sync_named(1, t < 64 ? 128 : 96);
  out[t] = shared[kThreads - 1 - t];
}

// out[t] = in[t], by copies of 16 bytes.
__global__ void copy(const float* in, float* out, Fault fault) {
  auto* shared = shared_memory<float>();
  const int t = static_cast<int>(threadIdx.x);
  const int shift = fault == Fault::kMisalignedCopy ? 1 : 0;
  if (t < kThreads / 4) copy_async<16>(shared + 4 * t + shift, in + 4 * t);
  copy_async_commit();
  if (fault != Fault::kNoWait && fault != Fault::kCopyLeftBehind) copy_async_wait<0>();
  sync_threads();
  out[t] = shared[t];
  if (fault == Fault::kNoWait) copy_async_wait<0>();
}

// out[t] = the sum of the warp's in.
__global__ void sum(const float* in, float* out, Fault fault) {
  const int t = static_cast<int>(threadIdx.x);
  const bool low = t % kWarp < kWarp / 2;
  float total = in[t];
  if (fault == Fault::kHalfWarp && !low) return;
  if (fault == Fault::kDivergentWarp && !low) {
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

void run(const std::string& kernel, Fault fault, const float* in, float* out) {
  Launch l{"a test", 1, kThreads, kThreads * sizeof(float), nullptr};
  if (fault == Fault::kTooManyThreads) l.block = 2048;
  if (fault == Fault::kTooMuchSharedMemory) l.shared_bytes = 300 * 1024;
  if (kernel == "reverse") return launch(l, reverse, in, out, fault);
  if (kernel == "copy") return launch(l, copy, in, out, fault);
  if (kernel == "sum") return launch(l, sum, in, out, fault);
  l.block = kWarp;
  l.shared_bytes = 32 * 16 * 2;
  if (kernel == "multiply_bfloat16") return launch(l, multiply<bfloat16>, in, out);
  launch(l, multiply<float16>, in, out);
}

}  // namespace

// "" or the error's message.
extern "C" const char* run_case(const char* kernel, int fault, const float* in, float* out) {
  static std::string message;
  message.clear();
  try {
    run(kernel, static_cast<Fault>(fault), in, out);
  } catch (const LaunchError& error) {
    message = error.what();
  }
  return message.c_str();
}
