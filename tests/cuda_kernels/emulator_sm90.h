// Hopper's instructions on the host: the other half of csrc/cuda/device_sm90.cuh, written from the
// PTX ISA.
//
// Copies arrive and products are made as late as they may: a product when its warp waits for it,
// with what the tiles and registers hold then. Addresses in descriptors are relative to the block's
// shared memory, which begins at a multiple of 1024. What the emulator cannot see is the order
// between ordinary accesses and those of copies and products (proxies).
#pragma once

#include <array>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../../csrc/cuda/arguments.h"
#include "emulator.h"

namespace emulator::sm90 {

using device::add_truncated;
using device::element;
using device::expect_aligned;
using device::sync_warp;
using device::to_float;

// --- tensor copies ---

struct TensorMap {
  const char* data;
  int64_t extents[3];  // elements of 2 bytes, from the innermost
  int box_rows;
};

inline TensorMap make_tensor_map(const char* op, const void* data, fastnce::cuda::Dtype dtype,
                                 int64_t depth, int64_t rows, int64_t problems, int box_rows) {
  const bool fits = dtype != fastnce::cuda::Dtype::kFloat32 && depth * 2 % 16 == 0 && depth > 0 &&
                    rows > 0 && problems > 0 && depth <= 0xffffffff && rows <= 0xffffffff &&
                    problems <= 0xffffffff && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
                    rows * depth * 2 < int64_t{1} << 40 && box_rows > 0 && box_rows <= 256;
  if (!fits) throw std::runtime_error(std::string(op) + ": no such tensor map");
  return {static_cast<const char*>(data), {depth, rows, problems}, box_rows};
}

// The swizzle of 128 bytes: bits 4-6 of an address are combined with bits 7-9.
inline uint32_t swizzle_128(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline uint32_t shared_offset(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - place().shared);
}

// A barrier's 64 bits: the phase, the bytes that are due, arrivals that are due, and their number
// in a phase.
struct BarrierState {
  uint32_t phase : 1, set : 7;
  int32_t bytes : 24;
  uint16_t due, count;
};
static_assert(sizeof(BarrierState) == 8);

inline BarrierState* barrier_state(uint64_t* barrier) {
  expect_aligned(barrier, 8, "a barrier is not aligned");
  auto* state = reinterpret_cast<BarrierState*>(barrier);
  if (state->set != 42) fail("a barrier is used before its init");
  return state;
}
inline void barrier_advance(BarrierState* state) {
  if (state->due != 0 || state->bytes != 0) return;
  state->phase ^= 1;
  state->due = state->count;
}
inline void barrier_init(uint64_t* barrier, int count) {
  expect_aligned(barrier, 8, "a barrier is not aligned");
  auto* state = reinterpret_cast<BarrierState*>(barrier);
  state->phase = 0;
  state->set = 42;
  state->bytes = 0;
  state->due = state->count = static_cast<uint16_t>(count);
}
inline void barrier_init_done() {}
inline void barrier_arrive_expecting(uint64_t* barrier, int bytes) {
  BarrierState* state = barrier_state(barrier);
  if (state->due == 0) fail("more arrivals at a barrier than it waits for");
  state->bytes += bytes;
  --state->due;
  barrier_advance(state);
}
inline void barrier_arrive(uint64_t* barrier) { barrier_arrive_expecting(barrier, 0); }
inline void barrier_wait(uint64_t* barrier, int parity) {
  barrier_state(barrier);
  wait_until([=] { return barrier_state(barrier)->phase != static_cast<uint32_t>(parity); });
}

inline void copy_box(char* base, uint32_t to, const TensorMap& map, int depth, int row,
                     int problem) {
  const int64_t first[3] = {depth, row, problem};
  for (int r = 0; r < map.box_rows; ++r) {
    for (int k = 0; k < 64; ++k) {
      const int64_t at[3] = {first[0] + k, first[1] + r, first[2]};
      bool inside = true;
      for (int i = 0; i < 3; ++i) inside = inside && at[i] >= 0 && at[i] < map.extents[i];
      char* out = base + swizzle_128(to + static_cast<uint32_t>(r * 128 + k * 2));
      const int64_t from = (at[2] * map.extents[1] + at[1]) * map.extents[0] + at[0];
      if (inside) {
        std::memcpy(out, map.data + 2 * from, 2);
      } else {
        std::memset(out, 0, 2);
      }
    }
  }
}
// Once the scheduler has come to it `patience` times, or nobody can go on without it.
inline void much_later(int patience, const std::function<void()>& work) {
  if (patience == 0) return work();
  later([=] { much_later(patience - 1, work); });
}

inline void copy_tensor(void* shared, const TensorMap* map, uint64_t* barrier, int depth, int row,
                        int problem) {
  expect_aligned(shared, 128, "copy_tensor: shared address is not aligned");
  barrier_state(barrier);
  char* base = place().shared;
  static unsigned number = 0;
  number = number * 1664525 + 1013904223;
  const int patience = 1 << (number >> 24) % 8;
  much_later(patience, [=, to = shared_offset(shared), map = *map] {
    copy_box(base, to, map, depth, row, problem);
    BarrierState* state = barrier_state(barrier);
    state->bytes -= map.box_rows * 128;
    barrier_advance(state);
  });
}

template <int Count>
inline void release_registers() {
  static_assert(Count >= 24 && Count <= 256 && Count % 8 == 0);
}
template <int Count>
inline void claim_registers() {
  static_assert(Count >= 24 && Count <= 256 && Count % 8 == 0);
}

// --- products of a warp group ---

// Address, distances and swizzle in 16-byte units, at bits 0, 16, 32 and 62.
inline uint64_t tile_descriptor(const void* start) {
  const uint64_t address = shared_offset(start);
  if (address % 16 != 0 || address >= 1 << 18) fail("tile_descriptor: no such address");
  return address / 16 | uint64_t{64} << 16 | uint64_t{64} << 32 | uint64_t{1} << 62;
}

// Element (line, k) of the matrix behind a descriptor with the swizzle of 128 bytes, in the terms
// of the PTX ISA: along the lines ("K-major"), lines are in groups of eight, `stride` apart; across
// ("MN-major"), the lines are the depth, 64 columns to a line, and groups of eight are `stride`
// apart, further columns `leading`.
template <class T>
inline float operand(const char* shared, uint64_t descriptor, int line, int k, bool across) {
  const auto field = [=](int bit) {
    return static_cast<uint32_t>(descriptor >> bit & 0x3fff) * 16;
  };
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) fail("wgmma: no such descriptor");
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  uint32_t address = start;
  if (across) {
    const auto column = static_cast<uint32_t>(line), depth = static_cast<uint32_t>(k);
    address += depth / 8 * stride + depth % 8 * 128 + column / 64 * leading + column % 64 * 2;
  } else {
    const auto row = static_cast<uint32_t>(line);
    address += row / 8 * stride + row % 8 * 128 + static_cast<uint32_t>(k) * 2;
  }
  T value;
  std::memcpy(&value, shared + swizzle_128(address), sizeof value);
  return to_float(value);
}

struct Product {
  uint64_t a, b;                        // descriptors; a is 0 if the first factor is in registers
  const uint32_t* registers;            // this lane's, in the instruction's order
  std::array<const uint32_t*, 4> quad;  // those of the four lanes with this lane's rows
  float* d;
};

// All four warps issue the same product.
inline void meet_for_product(void* const* threads) {
  const auto& first = *static_cast<Product*>(threads[0]);
  for (int i = 0; i < 128; ++i) {
    auto& mine = *static_cast<Product*>(threads[i]);
    if (mine.a != first.a || mine.b != first.b) {
      fail("wgmma: the threads of a warp group disagree");
    }
    for (int t = 0; t < 4; ++t) {
      mine.quad[static_cast<size_t>(t)] = static_cast<Product*>(threads[i / 4 * 4 + t])->registers;
    }
  }
}

template <class T, int Columns, bool FromRegisters>
inline void run_product(const Product& p, const char* shared, int rank) {
  const int warp = rank / 32, g = rank % 32 / 4, t = rank % 4;
  double a[2][16];
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < 16; ++k) {
      a[half][k] = FromRegisters
                       ? to_float(element<T>(
                             p.quad[static_cast<size_t>(k % 8 / 2)][half + k / 8 * 2], k % 2))
                       : operand<T>(shared, p.a, 16 * warp + g + 8 * half, k, false);
    }
  }
  for (int i = 0; i < Columns / 8; ++i) {
    for (int r = 0; r < 2; ++r) {
      double b[16];
      for (int k = 0; k < 16; ++k)
        b[k] = operand<T>(shared, p.b, 8 * i + 2 * t + r, k, FromRegisters);
      for (int half = 0; half < 2; ++half) {
        float& d = p.d[4 * i + 2 * half + r];  // d[i][2 * half + r]
        double products[16];
        for (int k = 0; k < 16; ++k) products[k] = a[half][k] * b[k];
        d = add_truncated(d, products);
      }
    }
  }
}

template <class T, int Columns, bool FromRegisters>
inline void issue_product(Product p) {
  if (!place().fenced) fail("wgmma: no fence after the last wait");
  collective(128, meet_for_product, &p);
  const int rank = (place().warp * 32 + place().lane) % 128;
  defer([=, shared = place().shared] { run_product<T, Columns, FromRegisters>(p, shared, rank); });
}

inline void wgmma_fence() {
  place().fenced = true;
  sync_warp();
}
inline void wgmma_commit() { close_group(); }
template <int Pending>
inline void wgmma_wait() {
  sync_warp();  // the warp waits as one: no lane goes on and changes what another's product still
                // reads
  finish_groups(Pending);
  place().fenced = false;
  sync_warp();
}
template <class Value, int Count>
inline void pin(Value (&)[Count][4]) {}

template <class T, int Columns>
inline void wgmma_tiles(float (&d)[Columns / 8][4], uint64_t a, uint64_t b) {
  issue_product<T, Columns, false>({a, b, nullptr, {}, d[0]});
}
template <class T>
inline void wgmma_registers(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
  issue_product<T, 64, true>({0, b, a, {}, d[0]});
}

}  // namespace emulator::sm90
