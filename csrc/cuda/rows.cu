// A warp takes a row: neighbouring lanes read neighbouring elements, and where instead neighbouring
// rows lie side by side (a transposed view), the warps of a block use the same sectors of the L1
// cache. A row is read twice, first for its largest element, and is in that cache the second time.
#include "rows.h"

#include "launch.cuh"
#include "scalars.cuh"

namespace fastnce::cuda {
namespace {

constexpr int kWarps = 8;
// As many as a thread asks for at a time; the warps of a block share a row of more.
constexpr int kManyParts = 4;

// Of all batches' rows, numbered in order.
template <class T>
__device__ const T* row_of(const RowsView& x, int64_t row) {
  const int64_t batch = row / x.rows;
  return static_cast<const T*>(x.data) + batch * x.strides[0] +
         (row - batch * x.rows) * x.strides[1];
}

// Elements d ... d + 3 of a row, zeros from `depth` on. `whole`: they lie side by side, aligned to
// their size, and the depth is a multiple of 4.
template <class T>
__device__ float4 load_four(const T* row, int64_t d, int64_t depth, int64_t stride, bool whole) {
  if (whole) {
    if (d >= depth) return make_float4(0, 0, 0, 0);
    union {
      uint2 bits;
      T elements[4];
    } four;
    four.bits = *reinterpret_cast<const uint2*>(row + d);
    return make_float4(to_float(four.elements[0]), to_float(four.elements[1]),
                       to_float(four.elements[2]), to_float(four.elements[3]));
  }
  float out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = d + i < depth ? to_float(row[(d + i) * stride]) : 0.0f;
  return make_float4(out[0], out[1], out[2], out[3]);
}

template <class T>
__device__ void store_four(T* row, int64_t d, int64_t depth, float4 x, bool whole) {
  const T out[4] = {from_float<T>(x.x), from_float<T>(x.y), from_float<T>(x.z), from_float<T>(x.w)};
  if (whole) {
    if (d >= depth) return;
    union {
      uint2 bits;
      T elements[4];
    } four = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) four.elements[i] = out[i];
    *reinterpret_cast<uint2*>(row + d) = four.bits;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (d + i < depth) row[d + i] = out[i];
  }
}

__device__ float4 operator*(float4 a, float b) {
  return make_float4(a.x * b, a.y * b, a.z * b, a.w * b);
}
__device__ void add_product(float4& sum, float a, float4 b) {
  sum.x += a * b.x;
  sum.y += a * b.y;
  sum.z += a * b.z;
  sum.w += a * b.w;
}
__device__ float dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }
__device__ float largest_of(float4 a) {
  return fmaxf(fmaxf(fabsf(a.x), fabsf(a.y)), fmaxf(fabsf(a.z), fabsf(a.w)));
}
__device__ double dot_double(float4 a, float4 b) {
  const double low = static_cast<double>(a.x) * b.x + static_cast<double>(a.y) * b.y;
  return low + static_cast<double>(a.z) * b.z + static_cast<double>(a.w) * b.w;
}

// Whether load_four may take the elements as they lie.
bool lie_in_fours(const RowsView& x) {
  return x.strides[2] == 1 && x.depth % 4 == 0 && x.strides[0] % 4 == 0 && x.strides[1] % 4 == 0 &&
         reinterpret_cast<uintptr_t>(x.data) % 8 == 0;
}

struct PackTable {
  Pack packs[kMostPacks];
  bool x_whole[kMostPacks], y_whole[kMostPacks];
  int64_t first_rows;  // of the first set
  int64_t total;
  int64_t depth, padded;
  bool normalize;
};

template <class T>
__device__ float row_power(const T* row, int64_t depth, int64_t stride, bool whole) {
  float largest = 0;
  for (int64_t d = 4 * (threadIdx.x % kWarp); d < depth; d += 4 * kWarp) {
    largest = fmaxf(largest, largest_of(load_four(row, d, depth, stride, whole)));
  }
  return power_of_two(warp_max(largest));
}

template <class T>
__global__ void __launch_bounds__(kWarp* kWarps)
    pack_kernel(const __grid_constant__ PackTable table) {
  int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= table.total) return;
  const int which = row < table.first_rows ? 0 : 1;
  if (which == 1) row -= table.first_rows;
  const Pack& pack = table.packs[which];
  const bool pair = pack.y.data != nullptr;
  const int64_t depth = table.depth, padded = table.padded;
  const T* x = row_of<T>(pack.x, row);
  const T* y = pair ? row_of<T>(pack.y, row) : nullptr;
  const int64_t x_stride = pack.x.strides[2], y_stride = pack.y.strides[2];
  const bool x_whole = table.x_whole[which], y_whole = table.y_whole[which];
  float x_power = 1, y_power = 1;
  if (table.normalize) {
    x_power = row_power(x, depth, x_stride, x_whole);
    if (pair) y_power = row_power(y, depth, y_stride, y_whole);
  }

  T* x_out = static_cast<T*>(pack.x_packed.data) + row * padded;
  T* y_out = static_cast<T*>(pack.y_packed.data) + (pair ? row * padded : 0);
  double x_squares = 0, y_squares = 0, product = 0;
  for (int64_t d = 4 * (threadIdx.x % kWarp); d < padded; d += 4 * kWarp) {
    const float4 a = load_four(x, d, depth, x_stride, x_whole) * x_power;
    store_four(x_out, d, padded, a, true);
    x_squares += dot_double(a, a);
    if (!pair) continue;
    const float4 b = load_four(y, d, depth, y_stride, y_whole) * y_power;
    store_four(y_out, d, padded, b, true);
    y_squares += dot_double(b, b);
    product += dot_double(a, b);
  }

  const float x_unit = table.normalize ? inverse_root(warp_sum_double(x_squares)) : 1;
  const float y_unit = table.normalize && pair ? inverse_root(warp_sum_double(y_squares)) : 1;
  if (pair) product = warp_sum_double(product);
  if (threadIdx.x % kWarp != 0) return;
  pack.x_packed.scale[row] = x_unit;
  pack.x_packed.inverse[row] = x_unit * x_power;
  if (!pair) return;
  pack.y_packed.scale[row] = y_unit;
  pack.y_packed.inverse[row] = y_unit * y_power;
  pack.products[row] = static_cast<float>(product);
}

struct RowGradientTable {
  RowGradient gradients[kMostRowGradients];
  int64_t total;
  int64_t depth, padded;
  bool normalize, whole;
  Temperature temperature;
  Upstream upstream;
};

// sum_p factor_p product_p at d ... d + 3, over every `step`-th part.
__device__ float4 parts_sum(const RowGradient& of, int64_t row, int64_t d, int64_t padded,
                            int first, int step) {
  float4 g = make_float4(0, 0, 0, 0);
#pragma unroll 4
  for (int64_t part = first; part < of.parts; part += step) {
    const int64_t at = part * of.count + row;
    const float factor = part < of.factor_parts ? of.factor[at] : 1.0f;
    add_product(g, factor, *reinterpret_cast<const float4*>(of.product + at * padded + d));
  }
  return g;
}

// A row is taken by `sharers` warps, one or all of the block, which first sum up parts of their
// own.
template <class T>
__global__ void __launch_bounds__(kWarp* kWarps)
    row_gradients_kernel(const __grid_constant__ RowGradientTable table, int sharers) {
  const int warps = static_cast<int>(blockDim.x) / kWarp, lane = threadIdx.x % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, sharer = warp % sharers;
  int64_t row = static_cast<int64_t>(blockIdx.x) * (warps / sharers) + warp / sharers;
  const bool there = row < table.total;
  if (!there) row = table.total - 1;  // once more, for the barriers, and not stored
  int which = 0;
  while (row >= table.gradients[which].count) row -= table.gradients[which++].count;
  const RowGradient& of = table.gradients[which];
  const int64_t depth = table.depth, padded = table.padded;
  const int64_t begin = 4 * (sharer * kWarp + lane), step = 4 * kWarp * sharers;

  float4* sums = shared_memory<float4>() + (warp - sharer) * (padded / 4);  // (sharers, P / 4)
  float* alongs = reinterpret_cast<float*>(shared_memory<float4>() + warps * (padded / 4));
  for (int64_t d = 4 * lane; d < padded; d += 4 * kWarp) {
    sums[(sharer * padded + d) / 4] = parts_sum(of, row, d, padded, sharer, sharers);
  }
  sync_threads();

  const float upstream = table.upstream.tensor ? *table.upstream.tensor : table.upstream.value;
  const float to_input = static_cast<float>(upstream / value_of(table.temperature));
  const T* x = static_cast<const T*>(of.rows.data) + row * padded;
  const T* pair = static_cast<const T*>(of.pair.data) + (of.pair.data ? row * padded : 0);
  const float pair_factor = of.pair.data ? of.pair_weight[row] * of.pair.scale[row] : 0.0f;
  const float unit = of.rows.scale[row];
  float along = 0;  // x^ . g
  for (int64_t d = begin; d < padded; d += step) {
    float4 g = sums[d / 4];
    for (int other = 1; other < sharers; ++other) {
      add_product(g, 1, sums[(other * padded + d) / 4]);
    }
    if (of.pair.data) add_product(g, pair_factor, load_four(pair, d, padded, 1, true));
    g = g * to_input;
    sums[d / 4] = g;
    if (table.normalize) along += dot(load_four(x, d, padded, 1, true) * unit, g);
  }
  along = warp_sum(along);
  if (lane == 0) alongs[warp] = along;
  sync_threads();
  along = 0;
  for (int other = 0; other < sharers; ++other) along += alongs[warp - sharer + other];

  if (!there) return;
  const float inverse = of.rows.inverse[row];
  T* out = static_cast<T*>(of.out) + row * depth;
  for (int64_t d = begin; d < padded; d += step) {
    float4 g = sums[d / 4];
    if (table.normalize) {
      add_product(g, -along, load_four(x, d, padded, 1, true) * unit);
      g = g * inverse;
    }
    store_four(out, d, depth, g, table.whole);
  }
}

}  // namespace

void launch_pack(const Pack* packs, int count, const PackOptions& o, Stream stream) {
  PackTable table{};
  for (int i = 0; i < count; ++i) {
    const RowsView &x = packs[i].x, &y = packs[i].y;
    table.packs[i] = packs[i];
    table.x_whole[i] = lie_in_fours(x);
    table.y_whole[i] = y.data && lie_in_fours(y);
    table.total += x.batch * x.rows;
    if (i == 0) table.first_rows = table.total;
  }
  table.depth = packs[0].x.depth;
  table.padded = o.padded_depth;
  table.normalize = o.normalize;
  const auto blocks = static_cast<unsigned>((table.total + kWarps - 1) / kWarps);
  const Launch l{o.op, dim3(blocks), dim3(kWarp * kWarps), 0, stream};
  launch(l, o.dtype == Dtype::kBfloat16 ? pack_kernel<bfloat16> : pack_kernel<float16>, table);
}

void launch_row_gradients(const RowGradient* gradients, int count, const RowGradientOptions& o,
                          Stream stream) {
  RowGradientTable table{};
  table.whole = o.depth % 4 == 0;
  int64_t parts = 0;
  for (int i = 0; i < count; ++i) {
    table.gradients[i] = gradients[i];
    table.total += gradients[i].count;
    parts = gradients[i].parts > parts ? gradients[i].parts : parts;
    table.whole = table.whole && reinterpret_cast<uintptr_t>(gradients[i].out) % 8 == 0;
  }
  table.depth = o.depth;
  table.padded = o.padded_depth;
  table.normalize = o.normalize;
  table.temperature = o.temperature;
  table.upstream = o.upstream;
  // As many warps in a block as 48 KiB hold, which every GPU gives unasked: all 8 up to a depth of
  // 1520.
  const size_t warp_bytes = (static_cast<size_t>(o.padded_depth) + 1) * sizeof(float);
  const size_t fit = 48 * 1024 / warp_bytes;
  const int warps = fit < 1 ? 1 : fit > kWarps ? kWarps : static_cast<int>(fit);
  const int sharers = parts > kManyParts ? warps : 1;
  const int rows = warps / sharers;
  const auto blocks = static_cast<unsigned>((table.total + rows - 1) / rows);
  const Launch l{o.op, dim3(blocks), dim3(static_cast<unsigned>(kWarp * warps)), warps * warp_bytes,
                 stream};
  const bool brain = o.dtype == Dtype::kBfloat16;
  launch(l, brain ? row_gradients_kernel<bfloat16> : row_gradients_kernel<float16>, table, sharers);
}

}  // namespace fastnce::cuda
