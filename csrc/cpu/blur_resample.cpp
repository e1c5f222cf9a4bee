// Halving and doubling a map with CUT's blurs, and their adjoints: rows first, then pixels.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>

#include "huge_pages.h"
#include "maps.h"

namespace fastnce {
namespace {

void add_tap(Taps& taps, int64_t index, float weight) {
  for (int t = 0; t < taps.count; ++t) {
    if (taps.index[t] == index) {
      taps.weight[t] += weight;
      return;
    }
  }
  taps.index[taps.count] = index;
  taps.weight[taps.count++] = weight;
}

// Half the size: (1, 2, 1) / 4 around every second element, mirrored at the ends.
std::vector<Taps> halving(int64_t size) {
  std::vector<Taps> out((size + 1) / 2);
  for (int64_t i = 0; i < static_cast<int64_t>(out.size()); ++i) {
    const int64_t left = 2 * i - 1, right = 2 * i + 1;
    add_tap(out[i], left < 0 ? 1 : left, 0.25f);
    add_tap(out[i], 2 * i, 0.5f);
    add_tap(out[i], right < size ? right : size - 2, 0.25f);
  }
  return out;
}

// Twice the size: between two elements, at (3, 1) / 4 and (1, 3) / 4, the ends repeated.
std::vector<Taps> doubling(int64_t size) {
  std::vector<Taps> out(2 * size);
  for (int64_t i = 0; i < size; ++i) {
    add_tap(out[2 * i], std::max<int64_t>(i - 1, 0), 0.25f);
    add_tap(out[2 * i], i, 0.75f);
    add_tap(out[2 * i + 1], i, 0.75f);
    add_tap(out[2 * i + 1], std::min(i + 1, size - 1), 0.25f);
  }
  return out;
}

std::vector<Taps> transposed(const std::vector<Taps>& taps, int64_t inputs) {
  std::vector<Taps> out(inputs);
  for (size_t o = 0; o < taps.size(); ++o) {
    for (int t = 0; t < taps[o].count; ++t) {
      add_tap(out[taps[o].index[t]], static_cast<int64_t>(o), taps[o].weight[t]);
    }
  }
  return out;
}

template <class Element>
void resample(const MapSize& size, const Element* x, const std::vector<Taps>& rows,
              const std::vector<Taps>& columns, Element* out) {
  const ImageKernels<Element>& kernels = image_kernels<Element>();
  const auto height = static_cast<int64_t>(rows.size());
  const auto width = static_cast<int64_t>(columns.size());
  const int64_t row_size = size.width * size.channels;
  run_workers(size.images * height, 4 * row_size, [&](TaskQueue& queue) {
    const Buffer<float> blended(row_size);
    for (int64_t task; queue.next(task);) {
      const Taps& taps = rows[task % height];
      const Element* image = x + task / height * size.height * row_size;
      const Element* sources[Taps::kMost];
      for (int t = 0; t < taps.count; ++t) sources[t] = image + taps.index[t] * row_size;
      kernels.blend_rows(row_size, taps, sources, blended.data());
      kernels.blend_pixels(width, size.channels, columns.data(), blended.data(),
                           out + task * width * size.channels);
    }
  });
}

Tensor blur_resample(const Tensor& x, bool halve, bool adjoint, int64_t height, int64_t width) {
  const char* op = "blur_resample";
  const MapSize size(op, "x", x);
  const auto along = [&](int64_t from, int64_t to) {
    const int64_t plain = adjoint ? to : from;  // the size before the blur
    STD_TORCH_CHECK(plain >= (halve ? 2 : 1), op, ": the map is too small.");
    std::vector<Taps> taps = halve ? halving(plain) : doubling(plain);
    STD_TORCH_CHECK(static_cast<int64_t>(taps.size()) == (adjoint ? from : to), op,
                    ": the sizes do not fit together.");
    return adjoint ? transposed(taps, to) : taps;
  };
  const std::vector<Taps> rows = along(size.height, height), columns = along(size.width, width);
  const Tensor out = new_tensor(x, {size.images, height, width, size.channels}, x.scalar_type());
  ask_for_huge_pages(out);
  with_map_type(x, [&](auto zero) {
    using Element = decltype(zero);
    resample<Element>(size, map_data<Element>(x), rows, columns, new_map_data<Element>(out));
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(fastnce, CPU, m) { m.impl("blur_resample", TORCH_BOX(&blur_resample)); }

}  // namespace
}  // namespace fastnce
