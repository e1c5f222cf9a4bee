// CUDA kernels on the host, for tests: the other half of csrc/cuda/device.cuh.
//
// The threads of a block are fibers of one thread of the host. One runs until it meets others (a
// barrier, an operation of its warp) or ends; who runs next is drawn at random, from the seed in
// FASTNCE_EMULATOR_SEED. So do blocks follow one another, in random order. Work in the background
// is done when somebody waits for it; a copy, at random, at once.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct CUstream_st;
using cudaStream_t = CUstream_st*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
constexpr int cudaDevAttrMaxSharedMemoryPerBlockOptin = 97;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, int attribute, int bytes);

inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __float_as_int(float x) {
  int out;
  std::memcpy(&out, &x, 4);
  return out;
}
inline float __int_as_float(int x) {
  float out;
  std::memcpy(&out, &x, 4);
  return out;
}
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(__float_as_int(x)); }
inline float __uint_as_float(unsigned x) { return __int_as_float(static_cast<int>(x)); }
template <class A, class B>
inline std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
inline std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

namespace emulator {

// --- the machine ---

// Runs body(), which calls the kernel, once for every thread of every block. Throws
// std::runtime_error where threads wait for ever, meet in different operations, or write beyond the
// shared memory.
void launch(const char* op, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
            const std::function<void()>& body);

// How often a limit of shared memory was set, and a kernel's.
int limits_set();
int shared_limit(const void* kernel);

struct Place {
  uint3 thread, block;
  dim3 threads, blocks;
  int lane, warp;
  char* shared;
  mutable bool fenced = false;  // see emulator_sm90.h
};
const Place& place();

[[noreturn]] void fail(const char* what);

// Barrier `id` of `threads` threads; without `wait` the thread only arrives.
void barrier(int id, int threads, bool wait = true);
int block_threads();

// Whoever arrives last runs operation(operands of all `size` threads of the group, by rank); then
// all go on. The group is the warp, or the four warps of a warp group.
using Operation = void (*)(void* const* operands);
void collective(int size, Operation operation, void* mine);

// Waits until condition() holds; others run meanwhile.
void wait_until(const std::function<bool()>& condition);
// To be done at some time, at random, at the latest when nobody can go on without.
void later(std::function<void()> work);

// Work of this thread, done in groups: `close` ends one, `finish` does all but the last `pending`
// groups. Work `at_some_time` is done when the group is, or at once.
void at_some_time(std::function<void()> work);
void defer(std::function<void()> work);
void close_group();
void finish_groups(int pending);

}  // namespace emulator

#define threadIdx (emulator::place().thread)
#define blockIdx (emulator::place().block)
#define blockDim (emulator::place().threads)
#define gridDim (emulator::place().blocks)

// --- csrc/cuda/device.cuh, instruction by instruction ---
namespace emulator::device {

struct bfloat16 {
  uint16_t bits;
};
using float16 = _Float16;

inline float to_float(float x) { return x; }
inline float to_float(float16 x) { return static_cast<float>(x); }
inline float to_float(bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline float16 from_float<float16>(float x) {
  return static_cast<float16>(x);
}
template <>
inline bfloat16 from_float<bfloat16>(float x) {
  if (x != x) return {0x7fff};
  const uint32_t bits = __float_as_uint(x);
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <class T>
inline T element(uint32_t pair, int index) {
  const auto bits = static_cast<uint16_t>(pair >> (16 * index));
  T out;
  std::memcpy(&out, &bits, 2);
  return out;
}
template <class T>
inline uint32_t pack_pair(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t out;
  std::memcpy(&out, pair, 4);
  return out;
}

inline float exp2_fast(float x) {
  const float out = std::exp2(x);
  return std::fabs(out) < 1.17549435e-38f ? 0.0f : out;  // subnormal results are flushed
}

template <class T>
inline T* shared_memory() {
  return reinterpret_cast<T*>(place().shared);
}

inline void sync_threads() { barrier(0, block_threads()); }
inline void sync_named(int id, int threads) { barrier(id, threads); }
inline void sync_warp() {
  collective(32, [](void* const*) {}, nullptr);
}
template <class T>
struct Shuffle {
  T in, out;
  int from;
};
template <class T>
inline void exchange(void* const* lanes) {
  for (int l = 0; l < 32; ++l) {
    auto* to = static_cast<Shuffle<T>*>(lanes[l]);
    to->out = static_cast<Shuffle<T>*>(lanes[to->from])->in;
  }
}
template <class T>
inline T shuffle_xor(T value, int mask) {
  Shuffle<T> s{value, {}, (place().lane ^ mask) & 31};
  collective(32, exchange<T>, &s);
  return s.out;
}

struct Ballot {
  bool in;
  uint32_t out;
};
inline void count_votes(void* const* lanes) {
  uint32_t votes = 0;
  for (int l = 0; l < 32; ++l) votes |= uint32_t{static_cast<Ballot*>(lanes[l])->in} << l;
  for (int l = 0; l < 32; ++l) static_cast<Ballot*>(lanes[l])->out = votes;
}
inline uint32_t ballot(bool predicate) {
  Ballot b{predicate, 0};
  collective(32, count_votes, &b);
  return b.out;
}

inline void expect_aligned(const void* p, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail(what);
}

template <int Bytes>
inline void copy_async(void* shared, const void* global, bool valid = true) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  expect_aligned(shared, Bytes, "copy_async: shared address is not aligned");
  if (valid) expect_aligned(global, Bytes, "copy_async: global address is not aligned");
  at_some_time([=] {
    if (valid) {
      std::memcpy(shared, global, Bytes);
    } else {
      std::memset(shared, 0, Bytes);
    }
  });
}
inline void copy_async_commit() { close_group(); }
template <int Pending>
inline void copy_async_wait() {
  finish_groups(Pending);
}

struct MatrixLoad {
  uint32_t* r;
  const void* row;
};
template <bool Transposed>
inline void load_matrices(void* const* lanes) {
  uint16_t m[4][8][8];
  for (int l = 0; l < 32; ++l) {
    std::memcpy(m[l / 8][l % 8], static_cast<MatrixLoad*>(lanes[l])->row, 16);
  }
  for (int l = 0; l < 32; ++l) {
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4, column = 2 * (l % 4);
      const uint32_t low = Transposed ? m[i][column][row] : m[i][row][column];
      const uint32_t high = Transposed ? m[i][column + 1][row] : m[i][row][column + 1];
      static_cast<MatrixLoad*>(lanes[l])->r[i] = low | high << 16;
    }
  }
}
inline void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  expect_aligned(row, 16, "load_matrix: address is not aligned");
  MatrixLoad load{r, row};
  collective(32, load_matrices<false>, &load);
}
inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  expect_aligned(row, 16, "load_matrix: address is not aligned");
  MatrixLoad load{r, row};
  collective(32, load_matrices<true>, &load);
}

// c plus the products of one instruction, as tensor cores add them up: the products are exact; they
// and c are aligned to the largest of them, and lose what lies below its last bit as a float; so
// does the sum. Nothing is rounded to the nearest: what is lost always makes numbers smaller.
// Measured on GPUs by Fasi et al. 2021 ("Numerical behavior of NVIDIA tensor cores") and Li et al.
// 2024 (arXiv:2403.00232), where those since Ampere align one to three bits finer.
constexpr int kFractionBits = 23;
template <int Depth>
inline float add_truncated(float c, const double (&products)[Depth]) {
  double largest = std::fabs(c), plain = c;
  for (const double x : products) {
    largest = std::max(largest, std::fabs(x));
    plain += x;
  }
  if (largest == 0 || !std::isfinite(plain)) return static_cast<float>(plain);
  const int lowest = std::ilogb(largest) - kFractionBits;
  const double to_units = std::ldexp(1.0, -lowest);
  double units = std::trunc(c * to_units);
  for (const double x : products) units += std::trunc(x * to_units);
  const double sum = units * std::ldexp(1.0, lowest);
  const auto near = static_cast<float>(sum);
  return std::fabs(near) > std::fabs(sum) ? std::nextafter(near, 0.0f) : near;
}

struct Multiply {
  float* c;
  const uint32_t *a, *b;
};
template <class Element, int Depth>
inline void multiply_16x8(void* const* lanes, Element element_of) {
  double a[16][Depth], b[Depth][8];
  for (int l = 0; l < 32; ++l) {
    const auto& m = *static_cast<Multiply*>(lanes[l]);
    element_of(m, l / 4, l % 4, a, b);
  }
  for (int l = 0; l < 32; ++l) {
    float* c = static_cast<Multiply*>(lanes[l])->c;
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4 + 8 * (i / 2), column = 2 * (l % 4) + i % 2;
      double products[Depth];
      for (int k = 0; k < Depth; ++k) products[k] = a[row][k] * b[k][column];
      c[i] = add_truncated(c[i], products);
    }
  }
}
template <class T>
inline void multiply_half(void* const* lanes) {
  const auto place_elements = [](const Multiply& m, int g, int t, double (&a)[16][16],
                                 double (&b)[16][8]) {
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 4; ++j) {
        a[g + 8 * (j % 2)][2 * t + 8 * (j / 2) + i] = to_float(element<T>(m.a[j], i));
      }
      for (int j = 0; j < 2; ++j) b[2 * t + 8 * j + i][g] = to_float(element<T>(m.b[j], i));
    }
  };
  multiply_16x8<decltype(place_elements), 16>(lanes, place_elements);
}
template <class T>
inline void multiply_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Multiply m{c, a, b};
  collective(32, multiply_half<T>, &m);
}
inline void multiply_tf32(void* const* lanes) {
  const auto place_elements = [](const Multiply& m, int g, int t, double (&a)[16][8],
                                 double (&b)[8][8]) {
    // The lowest bits of a register are not looked at.
    const auto value = [](uint32_t bits) { return __uint_as_float(bits & ~0x1fffu); };
    for (int j = 0; j < 4; ++j) a[g + 8 * (j % 2)][t + 4 * (j / 2)] = value(m.a[j]);
    for (int j = 0; j < 2; ++j) b[t + 4 * j][g] = value(m.b[j]);
  };
  multiply_16x8<decltype(place_elements), 8>(lanes, place_elements);
}
inline void multiply_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Multiply m{c, a, b};
  collective(32, multiply_tf32, &m);
}

}  // namespace emulator::device
