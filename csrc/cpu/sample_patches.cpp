// Gathering patches from feature maps on the CPU, straight from any strides, and scattering their
// gradients. One call serves all layers.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "huge_pages.h"
#include "sample_patches_scatter.h"
#include "unit_rows.h"

namespace fastnce::sample_patches {
namespace {

// Copies a block of the map to its patches (images, positions, channels). Bits is an integer of the
// elements' size.
template <class Bits>
void gather_block(const Layer& layer, const Block& block, const char* data, char* patches) {
  const Bits* map = reinterpret_cast<const Bits*>(data) + block.image * layer.image_stride +
                    block.channel * layer.channel_stride;
  const int64_t* offsets = layer.offsets.data() + block.position;
  Bits* out = reinterpret_cast<Bits*>(patches) +
              (block.image * layer.positions() + block.position) * layer.channels + block.channel;
  if (layer.channel_stride == 1) {
    for (int64_t p = 0; p < block.positions; ++p) {
      std::memcpy(out + p * layer.channels, map + offsets[p],
                  static_cast<size_t>(block.channels) * sizeof(Bits));
    }
    return;
  }
  // Plane after plane: the misses do not wait for one another, and the positions of a plane share
  // pages and cache lines, which neighbouring channels of a position do not.
  Bits tile[kLong][kShort];
  for (int64_t c = 0; c < block.channels; ++c) {
    const Bits* plane = map + c * layer.channel_stride;
    for (int64_t p = 0; p < block.positions; ++p) tile[p][c] = plane[offsets[p]];
  }
  for (int64_t p = 0; p < block.positions; ++p) {
    std::copy_n(tile[p], block.channels, out + p * layer.channels);
  }
}

void gather(const std::vector<Layer>& layers, const Tensors& features, const Tensors& patches) {
  std::vector<const char*> maps;
  std::vector<char*> outs;
  for (size_t l = 0; l < layers.size(); ++l) {
    maps.push_back(static_cast<const char*>(features[l].const_data_ptr()));
    outs.push_back(static_cast<char*>(patches[l].mutable_data_ptr()));
  }
  run_layers(layers, [&](const Block& block) {
    const Layer& layer = layers[block.layer];
    const auto copy = layer.item == 2   ? gather_block<uint16_t>
                      : layer.item == 4 ? gather_block<uint32_t>
                                        : gather_block<uint64_t>;
    copy(layer, block, maps[block.layer], outs[block.layer]);
  });
}

// Divides the patches by their norms, in place.
template <class T>
void normalize_rows(const Layer& layer, int64_t begin, int64_t end, const Tensor& patches,
                    T* inverse_norms) {
  const TileKernels<T>& kernels = tile_kernels<T>();
  const OutputRows out(patches);
  const char* data = static_cast<const char*>(patches.const_data_ptr());
  Buffer<T> row(layer.channels);
  for (int64_t r = begin; r < end; ++r) {
    load_elements(layer.dtype, data + r * layer.channels * layer.item, 1, layer.channels,
                  row.data());
    const double inverse = inverse_norm(kernels, layer.channels, row.data());
    kernels.scale(layer.channels, row.data(), inverse, row.data());
    inverse_norms[r] = static_cast<T>(inverse);
    out.store(r, row.data());
  }
}

std::tuple<Tensors, Tensors> sample_patches_forward(const Tensors& features,
                                                    const Tensors& patch_ids, bool normalize) {
  const char* op = "sample_patches_forward";
  STD_TORCH_CHECK(features.size() == patch_ids.size(), op, ": got ", features.size(),
                  " features, but ", patch_ids.size(), " patch_ids.");
  Tensors patches, inverse_norms;
  std::vector<Layer> layers;
  for (size_t l = 0; l < features.size(); ++l) {
    const Tensor& feature = features[l];
    check_feature(op, feature);
    layers.emplace_back(feature, read_ids(op, patch_ids[l], feature.size(2) * feature.size(3)));
    const int64_t batch = feature.size(0), count = layers[l].positions();
    const ScalarType dtype = feature.scalar_type();
    patches.push_back(new_tensor(feature, {batch, count, feature.size(1)}, dtype));
    if (normalize) {
      inverse_norms.push_back(new_tensor(feature, {batch, count}, accumulation_type(dtype)));
    }
  }
  gather(layers, features, patches);
  if (normalize) {
    run_patches(layers, [&](size_t l, int64_t begin, int64_t end) {
      const auto run = [&](auto zero) {
        using T = decltype(zero);
        normalize_rows<T>(layers[l], begin, end, patches[l],
                          inverse_norms[l].mutable_data_ptr<T>());
      };
      accumulation_type(layers[l].dtype) == ScalarType::Double ? run(double{}) : run(float{});
    });
  }
  return {patches, inverse_norms};
}

void fill_zero(const Tensors& tensors) {
  // Pieces end where huge pages do: two threads that touch one first would both make it.
  constexpr int64_t kPiece = int64_t{1} << 21;
  std::vector<std::pair<char*, int64_t>> pieces;
  for (const Tensor& tensor : tensors) {
    ask_for_huge_pages(tensor);
    char* data = static_cast<char*>(tensor.mutable_data_ptr());
    const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size());
    const int64_t head = -reinterpret_cast<intptr_t>(data) & (kPiece - 1);
    for (int64_t b = 0, e = std::min(head, bytes); b < bytes;) {
      if (e > b) pieces.emplace_back(data + b, e - b);
      b = e;
      e = std::min(bytes, e + kPiece);
    }
  }
  run_tasks(static_cast<int64_t>(pieces.size()), kPiece, [&](int64_t task) {
    std::memset(pieces[task].first, 0, static_cast<size_t>(pieces[task].second));
  });
}

Tensors sample_patches_backward(const Tensors& grad_patches, const Tensors& patches,
                                const Tensors& inverse_norms, const Tensors& patch_ids,
                                const Tensors& feature_likes, bool normalize) {
  const char* op = "sample_patches_backward";
  Tensors gradients;
  for (const Tensor& like : feature_likes) {
    check_feature(op, like);
    gradients.push_back(torch::stable::empty_like(like));
  }
  fill_zero(gradients);
  scatter(op, gradients, grad_patches, patches, inverse_norms, patch_ids, normalize);
  return gradients;
}

void sample_patches_add_(const Tensors& maps, const Tensors& grad_patches, const Tensors& patches,
                         const Tensors& inverse_norms, const Tensors& patch_ids, bool normalize) {
  scatter("sample_patches_add_", maps, grad_patches, patches, inverse_norms, patch_ids, normalize);
}

STABLE_TORCH_LIBRARY_IMPL(fastnce, CPU, m) {
  m.impl("sample_patches_forward", TORCH_BOX(&sample_patches_forward));
  m.impl("sample_patches_backward", TORCH_BOX(&sample_patches_backward));
  m.impl("sample_patches_add_", TORCH_BOX(&sample_patches_add_));
}

}  // namespace
}  // namespace fastnce::sample_patches
