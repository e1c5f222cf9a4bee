// The kernels that make the passes of pairs.h: those by mma.sync and cp.async, for every GPU since
// Ampere; and those by Hopper's own instructions.
#pragma once

#include <utility>

#include "pairs.h"

namespace fastnce::cuda {

constexpr int kElementBytes = 2;

// Up to here a block keeps whole rows in shared memory, and a gradient's product is made where the
// similarities are: two products for a gradient, four for both. Beyond, each block could keep but a
// part of the product's depth and would make the similarities once for every 256 of it: 1 + P / 256
// products instead. There the coefficients of a panel of rows go through memory: two products for a
// gradient, three for both.
constexpr int kResidentDepth = 256;
constexpr int kTileBytes = 16 * 1024;  // of a tile of y, or of a step of an operand
constexpr int kStreamedColumns = 128;  // of a tile of similarities without a product
constexpr int kPanelTile = 128;        // rows and columns of a tile of a panel's products

// Of a workspace for panels: parts of the rows' terms.
inline int64_t term_bytes(const Pairs& pairs, int64_t parts) {
  return (parts * pairs.problems * pairs.rows * 4 + 15) / 16 * 16;
}

// Instances of the resident kernels: the product's depth is at most this.
inline int64_t resident_out(int64_t depth) { return depth <= 128 ? 128 : 256; }

void launch_sums_sm80(const Pairs& pairs, const SumsPlan& plan, const Sums& out, Stream stream);
void launch_products_sm80(const Pairs& pairs, const ProductsPlan& plan, const Products& out,
                          Stream stream);

inline int64_t blocks_of(int64_t count, int64_t block) { return (count + block - 1) / block; }

// Into how many parts to cut `tiles` of columns for `blocks` of rows: as few as keep the
// multiprocessors busy 7/8 of the time, a block being on each, or else as busy as they can be.
inline int64_t splits_that_fill(int64_t blocks, int64_t tiles, int64_t multiprocessors) {
  int64_t best = 1;
  double busiest = 0;
  for (int64_t splits = 1; splits <= tiles && splits <= 65535 && busiest < 0.875; ++splits) {
    const int64_t each = blocks_of(tiles, splits), parts = blocks_of(tiles, each);  // none is empty
    const int64_t time = blocks_of(blocks * parts, multiprocessors) * each;
    const double busy =
        static_cast<double>(blocks * tiles) / static_cast<double>(time * multiprocessors);
    if (busy > busiest) {
      busiest = busy;
      best = parts;
    }
  }
  return best;
}

// The same pairs with rows and columns in each other's place.
inline Pairs exchanged(Pairs pairs) {
  std::swap(pairs.x, pairs.y);
  std::swap(pairs.x_scale, pairs.y_scale);
  std::swap(pairs.x_labels, pairs.y_labels);
  std::swap(pairs.rows, pairs.columns);
  return pairs;
}
// Of those, what `out` asks for the columns.
inline Products exchanged(const Products& out) {
  Products back;
  back.x_statistics = out.y_statistics;
  back.y_statistics = out.x_statistics;
  back.x_product = out.y_product;
  return back;
}

}  // namespace fastnce::cuda

namespace fastnce::cuda::sm90 {

// Of rows of 64 to 512 elements: whether the passes over these pairs can be made here.
inline bool runs(const Pairs& pairs, const Machine& machine) {
  constexpr int64_t kMost = int64_t{1} << 30;  // columns, and a tile more, are counted by an int
  return machine.capability == 90 && pairs.depth >= 64 && pairs.depth <= 512 &&
         pairs.rows <= kMost && pairs.columns <= kMost;
}

SumsPlan plan_sums(const Pairs& pairs, const Machine& machine, bool with_product);
void launch_sums(const Pairs& pairs, const SumsPlan& plan, const Sums& out, Stream stream);

ProductsPlan plan_products(const Pairs& pairs, const Machine& machine, bool of_x, bool of_y);
void launch_products(const Pairs& pairs, const ProductsPlan& plan, const Products& out,
                     Stream stream);

}  // namespace fastnce::cuda::sm90
