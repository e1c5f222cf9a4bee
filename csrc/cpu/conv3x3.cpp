// 3x3 convolutions with stride 1 that keep the size of the map, by Winograd's F(4x4, 3x3): a
// quarter of the multiply-adds. Sums are in float32, whatever the maps are.
//
// Forward and gradient of the input are the same walk: transform the patches of a block of tiles,
// multiply plane by plane, transform back. The gradient of the weights needs all tiles of a plane,
// so it goes row by row of planes, and adds block after block.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "huge_pages.h"
#include "maps.h"

namespace fastnce {
namespace {

// Tiles at a time, multiples of the rows of a product's tile. Transformed weights are read once per
// block, so more tiles need less of the third-level cache's bandwidth.
constexpr int64_t kTilesForward = 48, kTilesBackward = 48;
// Input channels of one task of the weights' gradient: the gradient is transformed anew for each
// task, so there are no more tasks than threads want. How many there are changes no sum.
constexpr int64_t kMostChannels = 256, kFewestChannels = 32;
// Numbers between two planes: beginnings that are powers of two apart would meet in one set of the
// first-level cache.
constexpr int64_t kGap = 16;

// Where the patches of tiles lie: rows and columns of the map, -1 for zero padding.
class TileGrid {
 public:
  // Tiles of (out_height, out_width) outputs whose patches begin `padding` before them.
  TileGrid(const MapSize& map, int64_t out_height, int64_t out_width, int64_t padding, bool reflect)
      : map_(map),
        out_height_(out_height),
        out_width_(out_width),
        down_((out_height + kOutputs - 1) / kOutputs),
        across_((out_width + kOutputs - 1) / kOutputs),
        rows_(indices(map.height, down_, padding, reflect)),
        columns_(indices(map.width, across_, padding, reflect)) {}

  int64_t tiles() const { return map_.images * down_ * across_; }

  // kPlanes pixels of the map per tile.
  template <class Element>
  void find_patches(int64_t begin, int64_t count, const Element* map, const Element* zeros,
                    const Element** pixels) const {
    for (int64_t tile = begin; tile < begin + count; ++tile) {
      const auto [image, top, left] = place(tile);
      for (int64_t y = top; y < top + kPatch; ++y) {
        for (int64_t x = left; x < left + kPatch; ++x) {
          const int64_t row = rows_[y], column = columns_[x];
          *pixels++ = row < 0 || column < 0 ? zeros : map + offset(map_, image, row, column);
        }
      }
    }
  }

  // kOutputs^2 pixels of the outputs (B, out_height, out_width, channels) per tile, `outside` where
  // there is none.
  template <class Pointer>
  void find_outputs(int64_t begin, int64_t count, Pointer outputs, int64_t channels,
                    Pointer outside, Pointer* pixels) const {
    for (int64_t tile = begin; tile < begin + count; ++tile) {
      const auto [image, top, left] = place(tile);
      for (int64_t y = top; y < top + kOutputs; ++y) {
        for (int64_t x = left; x < left + kOutputs; ++x) {
          const bool inside = y < out_height_ && x < out_width_;
          *pixels++ =
              inside ? outputs + ((image * out_height_ + y) * out_width_ + x) * channels : outside;
        }
      }
    }
  }

 private:
  static std::vector<int64_t> indices(int64_t size, int64_t tiles, int64_t padding, bool reflect) {
    std::vector<int64_t> out;
    for (int64_t i = -padding; i < tiles * kOutputs + 2 - padding; ++i) {
      int64_t index = i;
      if (reflect && index < 0) index = -index;
      if (reflect && index >= size) index = 2 * size - 2 - index;
      // What lies still further out belongs to outputs that nobody asks for.
      out.push_back(index < 0 || index >= size ? -1 : index);
    }
    return out;
  }
  std::tuple<int64_t, int64_t, int64_t> place(int64_t tile) const {
    const int64_t row = tile / across_;
    return {row / down_, row % down_ * kOutputs, tile % across_ * kOutputs};
  }
  static int64_t offset(const MapSize& map, int64_t image, int64_t row, int64_t column) {
    return ((image * map.height + row) * map.width + column) * map.channels;
  }

  MapSize map_;
  int64_t out_height_, out_width_, down_, across_;
  std::vector<int64_t> rows_, columns_;
};

// Weights (out, in, 3, 3), or of the adjoint: the roles of the channels exchanged and the taps
// reversed.
struct Filters {
  Filters(const Tensor& weight, bool adjoint)
      : data(weight.const_data_ptr<float>() + (adjoint ? 8 : 0)),
        outputs(weight.size(adjoint ? 1 : 0)),
        inputs(weight.size(adjoint ? 0 : 1)),
        output_stride(adjoint ? 9 : 9 * inputs),
        input_stride(adjoint ? 9 * outputs : 9),
        tap_step(adjoint ? -1 : 1) {}

  const float* data;
  int64_t outputs, inputs, output_stride, input_stride, tap_step;
};

int64_t block_lanes(int64_t channels, int64_t first) {
  return std::min(kChannelBlock, channels - first);
}

// G w G^T: for each block of output channels kPlanes matrices (inputs, kChannelBlock), in strips.
Buffer<float> transformed_filters(const Filters& filters) {
  const int64_t plane = filters.inputs * kChannelBlock + kGap;
  const int64_t blocks = (filters.outputs + kChannelBlock - 1) / kChannelBlock;
  Buffer<float> out(blocks * kPlanes * plane);
  const WinogradKernels& kernels = winograd_kernels();
  const int64_t steps = filters.outputs / kChannelStep;
  run_tasks(steps, filters.inputs * kChannelStep * kPlanes * 4, [&](int64_t step) {
    const int64_t channel = step * kChannelStep;
    const int64_t lane = channel % kChannelBlock, strip = kernels.strip;
    float* to = out.data() + channel / kChannelBlock * kPlanes * plane +
                lane / strip * filters.inputs * strip + lane % strip;
    const float* from = filters.data + channel * filters.output_stride;
    for (int64_t c = 0; c < filters.inputs; ++c) {
      kernels.transform_filters(from + c * filters.input_stride, filters.output_stride,
                                filters.tap_step, to + c * strip, plane);
    }
  });
  return out;
}

// The convolution of `map` with `filters` at all tiles of the grid, to `out`.
template <class Element>
void convolve(const Element* map, const TileGrid& grid, const Filters& filters, const float* bias,
              Element* out) {
  const Buffer<float> weights = transformed_filters(filters);
  const ImageKernels<Element>& kernels = image_kernels<Element>();
  const WinogradKernels& products = winograd_kernels();
  const int64_t inputs = filters.inputs, filter_plane = inputs * kChannelBlock + kGap;
  const Buffer<Element> zeros(inputs, Element{});
  const int64_t block = kTilesForward;
  const int64_t work = block * kPlanes * inputs * filters.outputs;
  run_workers((grid.tiles() + block - 1) / block, work, [&](TaskQueue& queue) {
    const Buffer<float> patches(kPlanes * (block * inputs + kGap));
    const Buffer<float> sums(kPlanes * (block * kChannelBlock + kGap));
    std::vector<const Element*> sources(block * kPlanes);
    std::vector<Element*> targets(block * kOutputs * kOutputs);
    for (int64_t task; queue.next(task);) {
      const int64_t begin = task * block, tiles = std::min(block, grid.tiles() - begin);
      grid.find_patches(begin, tiles, map, zeros.data(), sources.data());
      grid.find_outputs<Element*>(begin, tiles, out, filters.outputs, nullptr, targets.data());
      const int64_t plane = tiles * inputs + kGap, sum_plane = tiles * kChannelBlock + kGap;
      kernels.transform_patches(tiles, inputs, sources.data(), patches.data(), plane);
      for (int64_t first = 0; first < filters.outputs; first += kChannelBlock) {
        const int64_t lanes = block_lanes(filters.outputs, first);
        const float* weight = weights.data() + first / kChannelBlock * kPlanes * filter_plane;
        for (int64_t p = 0; p < kPlanes; ++p) {
          products.multiply(tiles, inputs, lanes, patches.data() + p * plane, inputs,
                            weight + p * filter_plane, sums.data() + p * sum_plane, kChannelBlock);
        }
        kernels.transform_products(tiles, first, lanes, sums.data(), sum_plane, bias,
                                   targets.data());
      }
    }
  });
}

// Adds what the mirrored border of `padded` (H + 2, W + 2) received to the pixels that it mirrors.
template <class Element>
void fold_border(const MapSize& size, const Element* padded, Element* out) {
  const int64_t width = size.width, channels = size.channels, row = (width + 2) * channels;
  const auto sources = [](int64_t i, int64_t n) {
    std::vector<int64_t> found = {i + 1};
    if (i == 1) found.push_back(0);
    if (i == n - 2) found.push_back(n + 1);
    return found;
  };
  run_tasks(size.images * size.height, width * channels, [&](int64_t task) {
    const int64_t image = task / size.height, y = task % size.height;
    const Element* base = padded + image * (size.height + 2) * row;
    Element* to = out + task * width * channels;
    const std::vector<int64_t> rows = sources(y, size.height);
    for (int64_t x = 0; x < width; ++x, to += channels) {
      const bool plain = rows.size() == 1 && x != 1 && x != width - 2;
      if (plain) {
        std::memcpy(to, base + (y + 1) * row + (x + 1) * channels, channels * sizeof(Element));
        continue;
      }
      const std::vector<int64_t> columns = sources(x, width);
      for (int64_t c = 0; c < channels; ++c) {
        float sum = 0;
        for (int64_t r : rows) {
          for (int64_t column : columns) sum += widened(base[r * row + column * channels + c]);
        }
        narrow(sum, to[c]);
      }
    }
  });
}

// d L / d w = G^T [sum over tiles of (A dy A^T) . (B^T d B)] G.
template <class Element>
void weight_gradient(const Element* map, const Element* gradient, const TileGrid& grid,
                     int64_t inputs, int64_t outputs, float* out) {
  const ImageKernels<Element>& kernels = image_kernels<Element>();
  const WinogradKernels& products = winograd_kernels();
  const Buffer<Element> zeros(std::max(inputs, outputs), Element{});
  const int64_t sum_plane = inputs * outputs + kGap;
  const Buffer<float> sums(kPlanes * sum_plane);
  const int64_t block = kTilesBackward;
  int64_t part = kMostChannels;
  const auto parts = [&] { return (inputs + part - 1) / part; };
  while (part > kFewestChannels && kPatch * parts() < torch::stable::get_num_threads()) part /= 2;
  const int64_t work = grid.tiles() * kPatch * std::min(inputs, part) * outputs;
  run_workers(kPatch * parts(), work, [&](TaskQueue& queue) {
    const Buffer<float> patches(kPatch * (block * part + kGap));
    const Buffer<float> gradients(kPatch * (block * padded(outputs, products.strip) + kGap));
    std::vector<const Element*> sources(block * kPlanes), targets(block * kOutputs * kOutputs);
    for (int64_t task; queue.next(task);) {
      const int row = static_cast<int>(task % kPatch);
      const int64_t first = task / kPatch * part;
      const int64_t channels = std::min(part, inputs - first);
      const auto sum = [&](int p) {
        return sums.data() + (row * kPatch + p) * sum_plane + first * outputs;
      };
      for (int p = 0; p < kPatch; ++p) std::fill_n(sum(p), channels * outputs, 0.0f);
      for (int64_t begin = 0; begin < grid.tiles(); begin += block) {
        const int64_t tiles = std::min(block, grid.tiles() - begin);
        grid.find_patches(begin, tiles, map, zeros.data(), sources.data());
        grid.find_outputs<const Element*>(begin, tiles, gradient, outputs, zeros.data(),
                                          targets.data());
        const int64_t patch_plane = tiles * channels + kGap;
        const int64_t gradient_plane = tiles * padded(outputs, products.strip) + kGap;
        kernels.transform_patch_row(row, tiles, first, channels, sources.data(), patches.data(),
                                    patch_plane);
        kernels.transform_gradient_row(row, tiles, outputs, targets.data(), gradients.data(),
                                       gradient_plane);
        for (int p = 0; p < kPatch; ++p) {
          products.multiply_transposed(channels, tiles, outputs, patches.data() + p * patch_plane,
                                       channels, gradients.data() + p * gradient_plane, sum(p),
                                       outputs);
        }
      }
    }
  });
  // Of so many inputs the taps are whole cache lines.
  run_blocks(inputs, kChannelStep, outputs * kPlanes * 4, [&](int64_t begin, int64_t end) {
    for (int64_t k = 0; k < outputs; k += kChannelStep) {
      for (int64_t c = begin; c < end; ++c) {
        products.transform_filter_gradients(sums.data() + c * outputs + k, sum_plane,
                                            out + (k * inputs + c) * 9, inputs * 9);
      }
    }
  });
}

void check_weight(const char* op, const Tensor& weight, int64_t outputs, int64_t inputs) {
  STD_TORCH_CHECK(outputs % kChannelStep == 0 && inputs % kChannelStep == 0, op,
                  ": the channels of weight must be multiples of 16.");
  check_rows(op, "weight", weight, ScalarType::Float, {outputs, inputs, 3, 3});
  STD_TORCH_CHECK(weight.is_contiguous(), op, ": weight must be contiguous.");
}

Tensor conv3x3_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       bool reflect) {
  const char* op = "conv3x3_forward";
  const MapSize size(op, "x", x);
  const int64_t outputs = weight.size(0);
  check_weight(op, weight, outputs, size.channels);
  if (bias.has_value()) {
    check_rows(op, "bias", *bias, ScalarType::Float, {outputs});
    STD_TORCH_CHECK(bias->is_contiguous(), op, ": bias must be contiguous.");
  }
  const Tensor out =
      new_tensor(x, {size.images, size.height, size.width, outputs}, x.scalar_type());
  ask_for_huge_pages(out);
  const TileGrid grid(size, size.height, size.width, 1, reflect);
  with_map_type(x, [&](auto zero) {
    using Element = decltype(zero);
    convolve<Element>(map_data<Element>(x), grid, Filters(weight, false),
                      bias.has_value() ? bias->const_data_ptr<float>() : nullptr,
                      new_map_data<Element>(out));
  });
  return out;
}

Tensor conv3x3_input_gradient(const Tensor& grad, const Tensor& weight, bool reflect) {
  const char* op = "conv3x3_input_gradient";
  const MapSize size(op, "grad", grad);
  const int64_t inputs = weight.size(1);
  check_weight(op, weight, size.channels, inputs);
  const int64_t border = reflect ? 2 : 0;
  const int64_t height = size.height + border, width = size.width + border;
  Tensor out = new_tensor(grad, {size.images, height, width, inputs}, grad.scalar_type());
  ask_for_huge_pages(out);
  const TileGrid grid(size, height, width, reflect ? 2 : 1, false);
  with_map_type(grad, [&](auto zero) {
    using Element = decltype(zero);
    convolve<Element>(map_data<Element>(grad), grid, Filters(weight, true), nullptr,
                      new_map_data<Element>(out));
    if (!reflect) return;
    MapSize folded = size;
    folded.channels = inputs;
    const Tensor padded = out;
    out = new_tensor(grad, {size.images, size.height, size.width, inputs}, grad.scalar_type());
    ask_for_huge_pages(out);
    fold_border(folded, map_data<Element>(padded), new_map_data<Element>(out));
  });
  return out;
}

Tensor conv3x3_weight_gradient(const Tensor& grad, const Tensor& x, bool reflect) {
  const char* op = "conv3x3_weight_gradient";
  const MapSize size(op, "x", x), out_size(op, "grad", grad);
  check_rows(op, "grad", grad, x.scalar_type(),
             {size.images, size.height, size.width, out_size.channels});
  const Tensor out = new_tensor(x, {out_size.channels, size.channels, 3, 3}, ScalarType::Float);
  const TileGrid grid(size, size.height, size.width, 1, reflect);
  with_map_type(x, [&](auto zero) {
    using Element = decltype(zero);
    weight_gradient<Element>(map_data<Element>(x), map_data<Element>(grad), grid, size.channels,
                             out_size.channels, out.mutable_data_ptr<float>());
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(fastnce, CPU, m) {
  m.impl("conv3x3_forward", TORCH_BOX(&conv3x3_forward));
  m.impl("conv3x3_input_gradient", TORCH_BOX(&conv3x3_input_gradient));
  m.impl("conv3x3_weight_gradient", TORCH_BOX(&conv3x3_weight_gradient));
}

}  // namespace
}  // namespace fastnce
