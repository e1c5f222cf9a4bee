// Which kernels make a pass, and how it is cut up.
#include "pairs.h"

#include <algorithm>
#include <climits>
#include <stdexcept>
#include <string>

#include "pairs_kernels.h"

namespace fastnce::cuda {
namespace {

// Coefficients of a panel, in elements: 256 MiB in 16 bits. Emulated, small problems have several.
#ifdef FASTNCE_EMULATED
constexpr int64_t kPanelElements = int64_t{1} << 11;
#else
constexpr int64_t kPanelElements = int64_t{1} << 27;
#endif
constexpr int64_t kMostRowsOfBlock = 128;  // 8 warps of 16
constexpr int64_t kLeastRowsOfBlock = 16;

void check(const Pairs& p) {
  const auto refuse = [&](const char* what, int64_t got) {
    throw std::invalid_argument(std::string(p.op) + ": " + what + ", got " + std::to_string(got));
  };
  if (p.depth != padded_depth(p.depth))
    refuse("the packed depth must be a multiple of 16", p.depth);
  // Rows and columns of a problem are int32 in the kernels, with room for a tile.
  for (const int64_t count : {p.rows, p.columns}) {
    if (count < 1 || count > INT_MAX - 1024) refuse("a problem has 1 to 2^31 - 1025 rows", count);
  }
}

bool resident(const Pairs& p) { return p.depth <= kResidentDepth; }

int64_t resident_columns(const Pairs& p) {
  return kTileBytes / (resident_out(p.depth) * kElementBytes);
}

// Into how many blocks of rows and parts of columns: the largest blocks of rows that fill the
// device together with parts of at least one tile of columns, one block for each multiprocessor.
struct Cut {
  int64_t row_block, splits;
};
Cut cut(int64_t problems, int64_t rows, int64_t columns, int64_t tile, int64_t multiprocessors) {
  const int64_t tiles = blocks_of(columns, tile);
  int64_t block = kMostRowsOfBlock;
  const auto row_blocks = [&] { return problems * blocks_of(rows, block); };
  while (block > kLeastRowsOfBlock &&
         (block / 2 >= rows || row_blocks() * tiles < multiprocessors)) {
    block /= 2;
  }
  return {block, splits_that_fill(row_blocks(), tiles, multiprocessors)};
}

Cut resident_cut(const Pairs& p, int64_t rows, int64_t columns, const Machine& machine) {
  return cut(p.problems, rows, columns, resident_columns(p), machine.multiprocessors);
}

Cut streamed_cut(const Pairs& p, const Machine& machine) {
  return cut(p.problems, p.rows, p.columns, kStreamedColumns, machine.multiprocessors);
}

// Parts of the depth k of a panel's products, so that they fill the device.
int64_t panel_splits(int64_t problems, int64_t m, int64_t k, const Pairs& p,
                     const Machine& machine) {
  const int64_t step = 128 / kElementBytes;
  const int64_t blocks = problems * blocks_of(m, kPanelTile) * blocks_of(p.depth, kPanelTile);
  // A part of fewer than 8 steps would mostly write.
  const int64_t most = blocks_of(k, 8 * step);
  return std::clamp<int64_t>(machine.multiprocessors / blocks, 1, most);
}

ProductsPlan plan_panels(const Pairs& p, const Machine& machine, bool of_x, bool of_y) {
  const Cut coefficients = streamed_cut(p, machine);
  const int64_t pitch = blocks_of(p.columns, 16) * 16, block = coefficients.row_block;
  int64_t height = std::max(block, kPanelElements / pitch / block * block), together = 1;
  if (height >= p.rows) {
    height = p.rows;
    // The products' grids have at most 65535 problems times parts; parts only while problems are
    // few.
    together = std::clamp<int64_t>(kPanelElements / (pitch * p.rows), 1,
                                   std::min<int64_t>(p.problems, 16384));
  }
  ProductsPlan plan{};
  plan.x_splits = of_x ? panel_splits(together, height, p.columns, p, machine) : 0;
  plan.y_splits = of_y ? panel_splits(together, p.columns, height, p, machine) : 0;
  plan.panel_splits = coefficients.splits;
  plan.workspace_bytes =
      term_bytes(p, coefficients.splits) + together * height * pitch * kElementBytes;
  plan.x_row_block = block;
  plan.panel_rows = height;
  plan.panel_problems = together;
  return plan;
}

}  // namespace

bool can_sum_with_product(const Pairs& pairs, const Machine& machine) {
  return (resident(pairs) || sm90::runs(pairs, machine)) && !labelled(pairs.kind);
}

SumsPlan plan_sums(const Pairs& pairs, const Machine& machine, bool with_product) {
  check(pairs);
  if (sm90::runs(pairs, machine)) return sm90::plan_sums(pairs, machine, with_product);
  if (with_product) {
    const Cut c = resident_cut(pairs, pairs.rows, pairs.columns, machine);
    return {c.splits, c.row_block, blocks_of(pairs.rows, c.row_block)};
  }
  // Where there are more blocks of rows than multiprocessors, they follow one another in groups.
  const Cut c = streamed_cut(pairs, machine);
  const int64_t blocks = blocks_of(pairs.rows, c.row_block);
  const int64_t each = blocks_of(pairs.problems * blocks, machine.multiprocessors);
  return {c.splits, c.row_block, blocks_of(blocks, std::min(each, blocks))};
}

void launch_sums(const Pairs& pairs, const SumsPlan& plan, const Sums& out, Stream stream) {
  if (plan.blocks > 0) return sm90::launch_sums(pairs, plan, out, stream);
  launch_sums_sm80(pairs, plan, out, stream);
}

ProductsPlan plan_products(const Pairs& pairs, const Machine& machine, bool of_x, bool of_y) {
  check(pairs);
  if (sm90::runs(pairs, machine)) return sm90::plan_products(pairs, machine, of_x, of_y);
  if (!resident(pairs)) return plan_panels(pairs, machine, of_x, of_y);
  ProductsPlan plan{};
  if (of_x) {
    const Cut c = resident_cut(pairs, pairs.rows, pairs.columns, machine);
    plan.x_splits = c.splits;
    plan.x_row_block = c.row_block;
  }
  if (of_y) {
    const Cut c = resident_cut(pairs, pairs.columns, pairs.rows, machine);
    plan.y_splits = c.splits;
    plan.y_row_block = c.row_block;
  }
  return plan;
}

void launch_products(const Pairs& pairs, const ProductsPlan& plan, const Products& out,
                     Stream stream) {
  if (plan.blocks > 0) return sm90::launch_products(pairs, plan, out, stream);
  launch_products_sm80(pairs, plan, out, stream);
}

}  // namespace fastnce::cuda
