// Feature maps and the positions in them, and the cutting of all layers of a call into tasks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "op_arguments.h"
#include "parallel.h"

namespace fastnce::sample_patches {

using Tensors = std::vector<Tensor>;

// A task handles this many positions by this many channels, or the other way round where the
// channels of a position are neighbours in memory. Then 16 channels of a patch are at most two
// cache lines, and a tile of them stays in the first-level cache.
constexpr int64_t kLong = 256, kShort = 16;
constexpr int64_t kRowsPerTask = 16;

// A cache miss costs about as much as this many multiply-adds.
constexpr int64_t kWorkPerElement = 8;

// Positions in a map, checked to lie inside it.
inline std::vector<int64_t> read_ids(const char* op, const Tensor& ids, int64_t positions) {
  STD_TORCH_CHECK(ids.is_cpu() && ids.scalar_type() == ScalarType::Long && ids.dim() == 1, op,
                  ": patch_ids must be int64 tensors of one dimension on the CPU.");
  const int64_t* data = ids.const_data_ptr<int64_t>();
  std::vector<int64_t> out(ids.size(0));
  for (size_t s = 0; s < out.size(); ++s) {
    out[s] = data[static_cast<int64_t>(s) * ids.stride(0)];
    STD_TORCH_CHECK(out[s] >= 0 && out[s] < positions, op, ": patch id ", out[s],
                    " lies outside a map of ", positions, " positions.");
  }
  return out;
}

inline void check_feature(const char* op, const Tensor& feature) {
  STD_TORCH_CHECK(feature.is_cpu() && feature.dim() == 4 && is_supported(feature.scalar_type()), op,
                  ": features must be (B, C, H, W) floating tensors on the CPU.");
}

// A map and the positions in it: where a task finds its elements.
struct Layer {
  Layer(const Tensor& map, const std::vector<int64_t>& ids)
      : dtype(map.scalar_type()),
        item(static_cast<int64_t>(map.element_size())),
        images(map.size(0)),
        channels(map.size(1)),
        image_stride(map.stride(0)),
        channel_stride(map.stride(1)) {
    const int64_t width = map.size(3), down = map.stride(2), right = map.stride(3);
    offsets.reserve(ids.size());
    for (int64_t id : ids) offsets.push_back(id / width * down + id % width * right);
  }

  int64_t positions() const { return static_cast<int64_t>(offsets.size()); }

  ScalarType dtype;
  int64_t item, images, channels, image_stride, channel_stride;
  std::vector<int64_t> offsets;  // of each position, in elements
};

// Some positions and channels of one image.
struct Block {
  size_t layer;
  int64_t image, position, positions, channel, channels;
};

// Runs body(block) over all blocks of all layers.
template <class Body>
void run_layers(const std::vector<Layer>& layers, const Body& body) {
  std::vector<Block> blocks;
  int64_t elements = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    const Layer& layer = layers[l];
    const int64_t positions = layer.positions(), channels = layer.channels;
    const bool rows = layer.channel_stride == 1;
    const int64_t tall = rows ? kShort : kLong, wide = rows ? kLong : kShort;
    for (int64_t image = 0; image < layer.images; ++image) {
      for (int64_t p = 0; p < positions; p += tall) {
        for (int64_t c = 0; c < channels; c += wide) {
          blocks.push_back(
              {l, image, p, std::min(tall, positions - p), c, std::min(wide, channels - c)});
        }
      }
    }
    elements += layer.images * positions * channels;
  }
  const auto tasks = static_cast<int64_t>(blocks.size());
  run_tasks(tasks, kWorkPerElement * elements / std::max<int64_t>(tasks, 1),
            [&](int64_t task) { body(blocks[task]); });
}

// Runs body(layer, begin, end) over the patches (images * positions) of all layers.
template <class Body>
void run_patches(const std::vector<Layer>& layers, const Body& body) {
  std::vector<std::pair<size_t, int64_t>> blocks;
  int64_t elements = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    const int64_t rows = layers[l].images * layers[l].positions();
    for (int64_t r = 0; r < rows; r += kRowsPerTask) blocks.emplace_back(l, r);
    elements += rows * layers[l].channels;
  }
  const auto tasks = static_cast<int64_t>(blocks.size());
  run_tasks(tasks, kWorkPerElement * elements / std::max<int64_t>(tasks, 1), [&](int64_t task) {
    const auto [l, begin] = blocks[task];
    const int64_t rows = layers[l].images * layers[l].positions();
    body(l, begin, std::min(rows, begin + kRowsPerTask));
  });
}

}  // namespace fastnce::sample_patches
