// Gathering patches from feature maps on the CPU, straight from any strides, and scattering their
// gradients. One call serves all layers.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <tuple>
#include <vector>

#include "../common/op_arguments.h"
#include "../common/unit_rows.h"

namespace fastnce {
namespace {

using Tensors = std::vector<Tensor>;

constexpr int64_t kPatchesPerTask = 16;

// Positions in a map, checked to lie inside it.
std::vector<int64_t> read_ids(const char* op, const Tensor& ids, int64_t positions) {
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

void check_feature(const char* op, const Tensor& feature) {
  STD_TORCH_CHECK(feature.is_cpu() && feature.dim() == 4 && is_supported(feature.scalar_type()), op,
                  ": features must be (B, C, H, W) floating tensors on the CPU.");
}

int64_t offset_of(const Tensor& map, int64_t image, int64_t id) {
  return image * map.stride(0) + id / map.size(3) * map.stride(2) +
         id % map.size(3) * map.stride(3);
}

template <class T>
void gather(const Tensor& feature, const std::vector<int64_t>& ids, bool normalize,
            const Tensor& patches, T* inverse_norms) {
  const TileKernels<T>& kernels = tile_kernels<T>();
  const auto count = static_cast<int64_t>(ids.size()), channels = feature.size(1);
  const auto item = static_cast<int64_t>(feature.element_size());
  const char* data = static_cast<const char*>(feature.const_data_ptr());
  const OutputRows out(patches);
  run_blocks(feature.size(0) * count, kPatchesPerTask, 8 * channels,
             [&](int64_t begin, int64_t end) {
               Buffer<T> row(channels);
               for (int64_t r = begin; r < end; ++r) {
                 const int64_t offset = offset_of(feature, r / count, ids[r % count]);
                 load_elements(feature.scalar_type(), data + offset * item, feature.stride(1),
                               channels, row.data());
                 if (normalize) {
                   const double norm = row_norm(kernels, channels, row.data());
                   const double inverse = norm == 0 ? 0.0 : 1 / norm;
                   kernels.scale(channels, row.data(), inverse, row.data());
                   inverse_norms[r] = static_cast<T>(inverse);
                 }
                 out.store(r, row.data());
               }
             });
}

// d L / d x = (g - y (y . g)) / ||x|| for y = x / ||x||.
template <class T>
void project_normalized(const TileKernels<T>& kernels, int64_t channels, const T* patch,
                        double inverse_norm, T* gradient) {
  const double along = kernels.dot(channels, patch, gradient);
  for (int64_t c = 0; c < channels; ++c) {
    gradient[c] = static_cast<T>((gradient[c] - patch[c] * along) * inverse_norm);
  }
}

template <class T>
void scatter(const Tensor& grad_patches, const Tensor* patches, const Tensor* inverse_norms,
             const std::vector<int64_t>& ids, const Tensor& grad_feature) {
  const bool normalized = patches != nullptr;
  const TileKernels<T>& kernels = tile_kernels<T>();
  const auto count = static_cast<int64_t>(ids.size()), channels = grad_feature.size(1);
  const auto item = static_cast<int64_t>(grad_feature.element_size());
  char* data = static_cast<char*>(grad_feature.mutable_data_ptr());
  const int64_t bytes = grad_feature.numel() * item;
  run_blocks(bytes, int64_t{1} << 18, 1, [&](int64_t begin, int64_t end) {
    std::memset(data + begin, 0, static_cast<size_t>(end - begin));
  });

  // Samples of one position stand together, in order; one task adds them and writes once.
  std::vector<int64_t> order(ids.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return ids[a] < ids[b]; });
  std::vector<int64_t> starts;
  for (int64_t s = 0; s < count; ++s) {
    if (s == 0 || ids[order[s]] != ids[order[s - 1]]) starts.push_back(s);
  }
  starts.push_back(count);
  const auto positions = static_cast<int64_t>(starts.size()) - 1;

  const TensorRows gradient_rows(grad_patches);
  const TensorRows patch_rows = normalized ? TensorRows(*patches) : TensorRows();
  const std::vector<double> inverse =
      normalized ? to_vector<double>(*inverse_norms) : std::vector<double>();
  run_blocks(grad_feature.size(0) * positions, kPatchesPerTask, 8 * channels,
             [&](int64_t begin, int64_t end) {
               Buffer<T> sum(channels), row(channels), patch(channels);
               for (int64_t r = begin; r < end; ++r) {
                 const int64_t image = r / positions, p = r % positions;
                 std::fill_n(sum.data(), channels, T(0));
                 for (int64_t s = starts[p]; s < starts[p + 1]; ++s) {
                   const int64_t sample = image * count + order[s];
                   gradient_rows.load(sample, row.data());
                   if (normalized) {
                     patch_rows.load(sample, patch.data());
                     project_normalized(kernels, channels, patch.data(), inverse[sample],
                                        row.data());
                   }
                   kernels.add_scaled(channels, T(1), row.data(), sum.data());
                 }
                 const int64_t offset = offset_of(grad_feature, image, ids[order[starts[p]]]);
                 store_elements(grad_feature.scalar_type(), sum.data(), channels,
                                grad_feature.stride(1), data + offset * item);
               }
             });
}

std::tuple<Tensors, Tensors> sample_patches_forward(const Tensors& features,
                                                    const Tensors& patch_ids, bool normalize) {
  const char* op = "sample_patches_forward";
  STD_TORCH_CHECK(features.size() == patch_ids.size(), op, ": got ", features.size(),
                  " features, but ", patch_ids.size(), " patch_ids.");
  Tensors patches, inverse_norms;
  for (size_t l = 0; l < features.size(); ++l) {
    const Tensor& feature = features[l];
    check_feature(op, feature);
    const std::vector<int64_t> ids = read_ids(op, patch_ids[l], feature.size(2) * feature.size(3));
    const int64_t batch = feature.size(0), count = static_cast<int64_t>(ids.size());
    const ScalarType acc = accumulation_type(feature.scalar_type());
    patches.push_back(new_tensor(feature, {batch, count, feature.size(1)}, feature.scalar_type()));
    if (normalize) inverse_norms.push_back(new_tensor(feature, {batch, count}, acc));
    const auto run = [&](auto zero) {
      using T = decltype(zero);
      gather<T>(feature, ids, normalize, patches[l],
                normalize ? inverse_norms[l].mutable_data_ptr<T>() : nullptr);
    };
    acc == ScalarType::Double ? run(double{}) : run(float{});
  }
  return {patches, inverse_norms};
}

Tensors sample_patches_backward(const Tensors& grad_patches, const Tensors& patches,
                                const Tensors& inverse_norms, const Tensors& patch_ids,
                                const Tensors& feature_likes, bool normalize) {
  const char* op = "sample_patches_backward";
  const size_t layers = feature_likes.size();
  STD_TORCH_CHECK(grad_patches.size() == layers && patch_ids.size() == layers &&
                      (!normalize || (patches.size() == layers && inverse_norms.size() == layers)),
                  op, ": the lists differ in length.");
  Tensors gradients;
  for (size_t l = 0; l < layers; ++l) {
    const Tensor& like = feature_likes[l];
    check_feature(op, like);
    const std::vector<int64_t> ids = read_ids(op, patch_ids[l], like.size(2) * like.size(3));
    const ScalarType dtype = like.scalar_type(), acc = accumulation_type(dtype);
    const int64_t batch = like.size(0), count = static_cast<int64_t>(ids.size());
    check_rows(op, "grad_patches", grad_patches[l], dtype, {batch, count, like.size(1)});
    if (normalize) {
      check_rows(op, "patches", patches[l], dtype, {batch, count, like.size(1)});
      check_rows(op, "inverse_norms", inverse_norms[l], acc, {batch, count});
    }
    gradients.push_back(torch::stable::empty_like(like));
    const auto run = [&](auto zero) {
      using T = decltype(zero);
      scatter<T>(grad_patches[l], normalize ? &patches[l] : nullptr,
                 normalize ? &inverse_norms[l] : nullptr, ids, gradients[l]);
    };
    acc == ScalarType::Double ? run(double{}) : run(float{});
  }
  return gradients;
}

STABLE_TORCH_LIBRARY_IMPL(fastnce, CPU, m) {
  m.impl("sample_patches_forward", TORCH_BOX(&sample_patches_forward));
  m.impl("sample_patches_backward", TORCH_BOX(&sample_patches_backward));
}

}  // namespace
}  // namespace fastnce
