// A warp takes a row: neighbouring lanes read neighbouring elements, and where instead neighbouring
// rows lie side by side (a transposed view), the warps of a block use the same sectors of the L1
// cache. A row is read twice, first for its largest element, and is in that cache the second time.
#include "rows.h"

#include "launch.cuh"
#include "scalars.cuh"

namespace fastnce::cuda {
namespace {

constexpr int kWarps = 8;

struct PackTable {
  Pack packs[kMostPacks];
  bool x_whole[kMostPacks], y_whole[kMostPacks];
  int64_t first_rows;  // of the first set
  int64_t total;
  int64_t depth, padded;
  bool normalize;
};

template <class T>
__device__ const T* row_of(const RowsView& view, int64_t row) {
  const int64_t batch = row / view.rows;
  return static_cast<const T*>(view.data) + batch * view.strides[0] +
         (row - batch * view.rows) * view.strides[1];
}

template <class T>
__device__ float row_power(const T* row, int64_t depth, int64_t stride, bool whole) {
  float largest = 0;
  for (int64_t d = 4 * (threadIdx.x % kWarp); d < depth; d += 4 * kWarp) {
    largest = fmaxf(largest, largest_of(load_four(row, d, depth, stride, whole)));
  }
  return power_of_two(warp_max(largest));
}

template <class T, class U>
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

  U* x_out = static_cast<U*>(pack.x_packed.data) + row * padded;
  U* y_out = static_cast<U*>(pack.y_packed.data) + (pair ? row * padded : 0);
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

// g of a row at d ... d + 3, but for the factor of all of it.
template <class U>
__device__ float4 unit_gradient(const RowGradient& of, int64_t row, int64_t d, int64_t padded,
                                float pair_factor) {
  float4 g = make_float4(0, 0, 0, 0);
#pragma unroll 4
  for (int64_t part = 0; part < of.parts; ++part) {
    const int64_t at = part * of.count + row;
    const float factor = part < of.factor_parts ? of.factor[at] : 1.0f;
    add_product(g, factor, *reinterpret_cast<const float4*>(of.product + at * padded + d));
  }
  if (of.pair.data != nullptr) {
    const U* pair = static_cast<const U*>(of.pair.data) + row * padded;
    add_product(g, pair_factor, load_four(pair, d, padded, 1, true));
  }
  return g;
}

template <class T, class U>
__global__ void row_gradients_kernel(const __grid_constant__ RowGradientTable table) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + warp;
  if (row >= table.total) return;
  int which = 0;
  while (row >= table.gradients[which].count) row -= table.gradients[which++].count;
  const RowGradient& of = table.gradients[which];
  const int64_t depth = table.depth, padded = table.padded;
  const float upstream = table.upstream.tensor ? *table.upstream.tensor : table.upstream.value;
  const float to_input = static_cast<float>(upstream / value_of(table.temperature));
  const float pair_factor = of.pair.data ? of.pair_weight[row] * of.pair.scale[row] : 0.0f;
  const U* x = static_cast<const U*>(of.rows.data) + row * padded;
  const float unit = of.rows.scale[row];

  // Of each lane its own elements, written and read by it alone.
  float4* own = shared_memory<float4>() + warp * (padded / 4);
  float along = 0;  // x^ . g
  for (int64_t d = 4 * lane; d < padded; d += 4 * kWarp) {
    const float4 g = unit_gradient<U>(of, row, d, padded, pair_factor) * to_input;
    own[d / 4] = g;
    if (table.normalize) along += dot(load_four(x, d, padded, 1, true) * unit, g);
  }
  along = warp_sum(along);
  const float inverse = of.rows.inverse[row];
  T* out = static_cast<T*>(of.out) + row * depth;
  for (int64_t d = 4 * lane; d < padded; d += 4 * kWarp) {
    float4 g = own[d / 4];
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
    table.x_whole[i] = lie_in_fours(x.data, x.dtype, x.depth, x.strides, 3);
    table.y_whole[i] = y.data && lie_in_fours(y.data, y.dtype, y.depth, y.strides, 3);
    table.total += x.batch * x.rows;
    if (i == 0) table.first_rows = table.total;
  }
  table.depth = packs[0].x.depth;
  table.padded = o.padded_depth;
  table.normalize = o.normalize;
  const auto blocks = static_cast<unsigned>((table.total + kWarps - 1) / kWarps);
  const Launch l{o.op, dim3(blocks), dim3(kWarp * kWarps), 0, stream};
  with_types(packs[0].x.dtype, o.packed,
             [&](auto t, auto u) { launch(l, pack_kernel<decltype(t), decltype(u)>, table); });
}

void launch_row_gradients(const RowGradient* gradients, int count, const RowGradientOptions& o,
                          Stream stream) {
  RowGradientTable table{};
  table.whole = o.depth % 4 == 0;
  const int64_t bytes = o.dtype == Dtype::kFloat32 ? 16 : 8;
  for (int i = 0; i < count; ++i) {
    table.gradients[i] = gradients[i];
    table.total += gradients[i].count;
    table.whole = table.whole && reinterpret_cast<uintptr_t>(gradients[i].out) % bytes == 0;
  }
  table.depth = o.depth;
  table.padded = o.padded_depth;
  table.normalize = o.normalize;
  table.temperature = o.temperature;
  table.upstream = o.upstream;
  // As many rows in a block as 48 KiB hold, which every GPU gives unasked: all 8 up to a depth of
  // 1536.
  const size_t row_bytes = static_cast<size_t>(o.padded_depth) * sizeof(float);
  const size_t fit = 48 * 1024 / row_bytes;
  const int warps = fit < 1 ? 1 : fit > kWarps ? kWarps : static_cast<int>(fit);
  const auto blocks = static_cast<unsigned>((table.total + warps - 1) / warps);
  const Launch l{o.op, dim3(blocks), dim3(static_cast<unsigned>(kWarp * warps)), warps * row_bytes,
                 stream};
  with_types(o.dtype, o.packed, [&](auto t, auto u) {
    launch(l, row_gradients_kernel<decltype(t), decltype(u)>, table);
  });
}

}  // namespace fastnce::cuda
