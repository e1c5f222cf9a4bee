// Instance norm with what follows it, leaky ReLU or a sum with another map: one pass over the map
// for the moments and one for the result; backward the same, from the map that was normalised.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "huge_pages.h"
#include "maps.h"

namespace fastnce {
namespace {

// Pixels that are summed in float32; sums of such chunks are in double.
constexpr int64_t kChunk = 256;
// A pass over memory costs about as much per element as this many multiply-adds.
constexpr int64_t kWorkPerElement = 8;

// Runs body(image, first pixel, pixels, chunk) over chunks of pixels.
template <class Body>
void run_chunks(const MapSize& size, const Body& body) {
  const int64_t chunks = (size.pixels() + kChunk - 1) / kChunk;
  run_tasks(size.images * chunks, kWorkPerElement * kChunk * size.channels, [&](int64_t task) {
    const int64_t image = task / chunks, first = task % chunks * kChunk;
    body(image, image * size.pixels() + first, std::min(kChunk, size.pixels() - first), task);
  });
}

// The sums of two quantities over the pixels of every image: sums(image, channel, first, second).
template <class Sum, class Use>
void reduce_chunks(const MapSize& size, const Sum& sum, const Use& use) {
  const int64_t chunks = (size.pixels() + kChunk - 1) / kChunk, channels = size.channels;
  const Buffer<float> first(size.images * chunks * channels), second(first.size());
  run_chunks(size, [&](int64_t image, int64_t pixel, int64_t pixels, int64_t chunk) {
    sum(image, pixel, pixels, first.data() + chunk * channels, second.data() + chunk * channels);
  });
  for (int64_t image = 0; image < size.images; ++image) {
    std::vector<double> a(channels, 0.0), b(channels, 0.0);
    for (int64_t chunk = image * chunks; chunk < (image + 1) * chunks; ++chunk) {
      for (int64_t c = 0; c < channels; ++c) {
        a[c] += first[chunk * channels + c];
        b[c] += second[chunk * channels + c];
      }
    }
    for (int64_t c = 0; c < channels; ++c) use(image * channels + c, a[c], b[c]);
  }
}

// Moments (2, B, C): scale and shift of x -> (x - mean) / sqrt(variance + eps).
template <class Element>
void find_moments(const MapSize& size, const Element* x, double eps, float* moments) {
  const ImageKernels<Element>& kernels = image_kernels<Element>();
  // Sums are of differences to the first pixel: squares of numbers far from 0 would cancel.
  const int64_t count = size.images * size.channels;
  const Buffer<float> near(count);
  for (int64_t i = 0; i < count; ++i) {
    near[i] = widened(x[i / size.channels * size.pixels() * size.channels + i % size.channels]);
  }
  reduce_chunks(
      size,
      [&](int64_t image, int64_t pixel, int64_t pixels, float* sum, float* squares) {
        kernels.channel_sums(pixels, size.channels, x + pixel * size.channels,
                             near.data() + image * size.channels, sum, squares);
      },
      [&](int64_t i, double sum, double squares) {
        const auto pixels = static_cast<double>(size.pixels());
        const double offset = sum / pixels;
        const double variance = std::max(squares / pixels - offset * offset, 0.0);
        const double scale = 1 / std::sqrt(variance + eps);
        moments[i] = static_cast<float>(scale);
        moments[count + i] = static_cast<float>(-(near[i] + offset) * scale);
      });
}

void check_moments(const char* op, const Tensor& moments, const MapSize& size) {
  check_rows(op, "moments", moments, ScalarType::Float, {2, size.images, size.channels});
  STD_TORCH_CHECK(moments.is_contiguous(), op, ": moments must be contiguous.");
}

Normalization normalization(const Tensor& moments, const MapSize& size, int64_t image,
                            double slope) {
  const float* scale = moments.const_data_ptr<float>() + image * size.channels;
  return {scale, scale + size.images * size.channels, static_cast<float>(slope)};
}

Tensor like(const Tensor& x, const MapSize& size) {
  const Tensor out =
      new_tensor(x, {size.images, size.height, size.width, size.channels}, x.scalar_type());
  ask_for_huge_pages(out);
  return out;
}

std::tuple<Tensor, Tensor> instance_norm_forward(const Tensor& x,
                                                 const std::optional<Tensor>& residual, double eps,
                                                 double slope) {
  const char* op = "instance_norm_forward";
  const MapSize size(op, "x", x);
  if (residual.has_value()) {
    const MapSize other(op, "residual", *residual);
    check_rows(op, "residual", *residual, x.scalar_type(),
               {size.images, size.height, size.width, size.channels});
  }
  const Tensor moments = new_tensor(x, {2, size.images, size.channels}, ScalarType::Float);
  const Tensor out = like(x, size);
  with_map_type(x, [&](auto zero) {
    using Element = decltype(zero);
    const auto* from = map_data<Element>(x);
    const auto* other = residual.has_value() ? map_data<Element>(*residual) : nullptr;
    auto* to = new_map_data<Element>(out);
    find_moments<Element>(size, from, eps, moments.mutable_data_ptr<float>());
    run_chunks(size, [&](int64_t image, int64_t pixel, int64_t pixels, int64_t) {
      const int64_t start = pixel * size.channels;
      image_kernels<Element>().normalize(pixels, size.channels, from + start,
                                         normalization(moments, size, image, slope),
                                         other == nullptr ? nullptr : other + start, to + start);
    });
  });
  return {out, moments};
}

Tensor instance_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& moments,
                              double slope) {
  const char* op = "instance_norm_backward";
  const MapSize size(op, "x", x), grad_size(op, "grad", grad);
  check_rows(op, "grad", grad, x.scalar_type(),
             {size.images, size.height, size.width, size.channels});
  check_moments(op, moments, size);
  const Tensor out = like(x, size);
  const int64_t count = size.images * size.channels;
  const Buffer<float> mean_e(count), mean_ez(count);
  with_map_type(x, [&](auto zero) {
    using Element = decltype(zero);
    const ImageKernels<Element>& kernels = image_kernels<Element>();
    const auto* from = map_data<Element>(x);
    const auto* arriving = map_data<Element>(grad);
    auto* to = new_map_data<Element>(out);
    reduce_chunks(
        size,
        [&](int64_t image, int64_t pixel, int64_t pixels, float* sum, float* product) {
          const int64_t start = pixel * size.channels;
          kernels.normalize_sums(pixels, size.channels, from + start, arriving + start,
                                 normalization(moments, size, image, slope), sum, product);
        },
        [&](int64_t i, double sum, double product) {
          mean_e[i] = static_cast<float>(sum / static_cast<double>(size.pixels()));
          mean_ez[i] = static_cast<float>(product / static_cast<double>(size.pixels()));
        });
    run_chunks(size, [&](int64_t image, int64_t pixel, int64_t pixels, int64_t) {
      const int64_t start = pixel * size.channels, channel = image * size.channels;
      kernels.normalize_gradient(pixels, size.channels, from + start, arriving + start,
                                 normalization(moments, size, image, slope),
                                 mean_e.data() + channel, mean_ez.data() + channel, to + start);
    });
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(fastnce, CPU, m) {
  m.impl("instance_norm_forward", TORCH_BOX(&instance_norm_forward));
  m.impl("instance_norm_backward", TORCH_BOX(&instance_norm_backward));
}

}  // namespace
}  // namespace fastnce
