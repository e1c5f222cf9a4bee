// The matrix of similarities of rows with themselves, z_ij = u_i . u_j / t, and products with a
// symmetric matrix made of it.
//
// z is symmetric, so only what lies on and right of its diagonal is computed. Unit rows bound it by
// 1 / t; with that one offset e_ij = exp(z_ij - 1 / t) serves row i and column j, the sums and the
// gradient alike. The gradient's matrix H is e times a weight, symmetric again, and each of its
// blocks is multiplied twice: H_ij u_j goes to row i and, transposed, H_ij u_i to row j.
//
// Blocks of H are kept up to a budget. Where the whole matrix fits it is computed once: half a
// product for z, one for H u. Else it is walked part by part, twice; the part that the first walk
// ends with is still there when the second begins.
//
// With pairs of bfloat16 z comes from these, and a part's blocks of H are rounded once they are
// whole, to pairs down their columns and along their rows: the two ways in which they are summed.
//
// The rows may be of two sides, u and v: then z_uv is computed once as well, the rows of a side
// need not meet one another, and what u gives to v and v to u may be kept apart.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "logit_blocks.h"
#include "op_arguments.h"
#include "unit_rows.h"

namespace fastnce {

// Below it, exp(z - 1 / t) of unit rows may leave the range of float: z >= -1 / t, and exp(-87) is
// the smallest normal number.
constexpr double kFixedOffsetTemperature = 0.023;

constexpr int64_t kBlockOperands = 144;  // of a block's side: a multiple of every table's width
constexpr int64_t kPartBytes = int64_t{20} << 20;  // of blocks kept at a time
constexpr int64_t kPartColumns = 16384;

// Calls run(rows, scheme, T{}) with a loss's rows and the scheme that the temperature allows.
template <template <class> class Rows, template <class> class FixedOffset,
          template <class> class RunningMaximum, class Arguments, class Run>
void with_scheme(const Arguments& a, const Run& run) {
  with_sums(a.acc(), [&](auto zero) {
    using T = decltype(zero);
    Rows<T> rows(a);
    if (a.temperature >= kFixedOffsetTemperature) {
      FixedOffset<T> scheme(rows);
      run(rows, scheme, zero);
    } else {
      RunningMaximum<T> scheme(rows);
      run(rows, scheme, zero);
    }
  });
}

// Part of a slab of the matrix: rows [r0, r0 + rows), lanes [0, lanes) of columns c0 and on. All of
// it lies right of the diagonal, or its rows are its columns (`diagonal`).
template <class T>
struct Tile {
  int64_t r0, rows, c0, lanes;
  T* values;  // (rows, width)
  bool diagonal;
};

// Rows of one side.
struct SimilaritySide {
  const TensorRows& source;
  int64_t first, count;  // rows of the source
  bool own = true;       // its rows meet one another
  bool wanted = true;    // so are products for its rows
};

template <class T>
class SelfSimilarity {
 public:
  static constexpr int kSums = 2;
  // Where a tile's sums go, for each kind of sum: (rows,) and (width,).
  struct TileSums {
    T *row[kSums], *column[kSums];
  };

  // `pairs`: the products are of pairs of bfloat16, where the processor has them.
  SelfSimilarity(const TileKernels<T>& kernels, const TensorRows& source, int64_t rows,
                 double temperature, bool pairs)
      : SelfSimilarity(kernels, {{source, 0, rows}}, temperature, false) {
    if constexpr (kMayPair) {
      if (pairs && kernels.pairs != nullptr) pack_pairs(source, temperature);
    }
  }

  // Sides begin with whole blocks; the rows between them are 0 and meet nobody. `apart`: products
  // of one side's rows with the other's go to cross_gradient().
  SelfSimilarity(const TileKernels<T>& kernels, const std::vector<SimilaritySide>& sides,
                 double temperature, bool apart)
      : kernels_(kernels),
        second_(whole_blocks(sides[0].count)),
        ends_{sides[0].count, sides.size() > 1 ? second_ + sides[1].count : 0},
        rows_(std::max(ends_[0], ends_[1])),
        depth_(sides[0].source.depth()),
        width_(kernels.width),
        apart_(apart) {
    inverse_norms = Buffer<double>(rows_, 0.0);
    for (size_t s = 0; s < sides.size(); ++s) {
      own_[s] = sides[s].own;
      wanted_[s] = sides[s].wanted;
      pack_unit_rows<T, T>(kernels, sides[s].source, sides[s].first, sides[s].count, true,
                           1 / std::sqrt(temperature),
                           {&units_, &transposed_, nullptr, inverse_norms.data(), nullptr,
                            s == 0 ? 0 : second_, rows_});
    }
    fill_between();
    cut_into_parts();
  }

  int64_t rows() const { return rows_; }
  // The first row of the second side.
  int64_t second() const { return second_; }
  bool of_second(int64_t row) const { return row >= second_; }
  bool cross(const Tile<T>& tile) const { return of_second(tile.r0) != of_second(tile.c0); }
  // Whether the rows of these rows' sides meet.
  bool meet(int64_t i, int64_t j) const {
    return of_second(i) != of_second(j) || own_[of_second(i)];
  }

  int64_t side_end(int64_t i) const { return ends_[of_second(i)]; }
  // Columns that the slab at c0 really has; none or less between sides.
  int64_t lanes(int64_t c0) const { return std::min(width_, side_end(c0) - c0); }

  // 1 / ||x|| of each row.
  Buffer<double> inverse_norms;

  // Unit rows / sqrt(t), (rows, D), and their transpose.
  const SlabMatrix<T>& units() const { return units_; }
  const SlabMatrix<T>& transposed() const { return transposed_; }

  // Calls exponentials(tile, sums) for every tile: z -> e and its row and column sums, of which
  // there are `kinds`. Adds up total[kind] (rows,), the diagonal left out.
  template <class Exponentials>
  void sum(int kinds, const Exponentials& exponentials, std::array<Buffer<double>, kSums>& total) {
    for (int k = 0; k < kinds; ++k) total[k] = Buffer<double>(rows_, 0.0);
    for (size_t p = 0; p < parts_.size(); ++p) sum_part(p, kinds, exponentials, total);
  }

  // Fills gradient() (rows, D) with H u, where weigh(tile) turns e into H. H's diagonal is e's,
  // which is 0.
  template <class Exponentials, class Weigh>
  void multiply(const Exponentials& exponentials, const Weigh& weigh) {
    for (SlabMatrix<T>* gradient : {&gradient_, &cross_gradient_}) {
      if (gradient == &cross_gradient_ && !apart_) continue;
      *gradient = SlabMatrix<T>(rows_, depth_, width_);
      run_blocks(gradient->slabs(), 1, rows_ * width_, [&](int64_t begin, int64_t end) {
        std::fill(gradient->at(0, begin), gradient->at(0, end), T(0));
      });
    }
    for (size_t p = parts_.size(); p-- > 0;) {
      const Part& part = parts_[p];
      if (kept_ == static_cast<int64_t>(p)) {
        weigh_part(part, weigh);
      } else {
        compute(part, true, [&](const Tile<T>& tile, const TileSums& sums, int64_t, int64_t) {
          exponentials(tile, sums);
          weigh(tile);
        });
      }
      kept_ = -1;
      mirror_diagonal(part);
      if constexpr (kMayPair) {
        if (paired_) round_part(part);
      }
      multiply_part(part);
    }
    if constexpr (kMayPair) {
      if (paired_) take_rests();
    }
  }

  const SlabMatrix<T>& gradient() const { return gradient_; }
  const SlabMatrix<T>& cross_gradient() const { return cross_gradient_; }

 private:
  // Rows [r0, r1) of columns [c0, c1) as far as they lie on or right of the diagonal, c0 >= r0. Its
  // bounds are whole blocks or the end of the matrix.
  struct Part {
    int64_t r0, r1, c0, c1;
    std::vector<int64_t> starts;       // of each block column in blocks_
    std::vector<int64_t> pair_starts;  // and in down_ and across_

    // Rows of the block column that begins with column c.
    int64_t height(int64_t c) const { return std::min(r1, c + kBlockOperands) - r0; }
  };

  static int64_t whole_blocks(int64_t rows) { return padded(rows, kBlockOperands); }
  int64_t block_end(int64_t i) const { return std::min(side_end(i), i + kBlockOperands); }
  // The same with the rows between sides.
  int64_t next_block(int64_t i) const { return std::min(rows_, i + kBlockOperands); }
  void fill_between() const {
    const int64_t begin = ends_[0], end = std::min(second_, rows_);
    for (int64_t s = 0; s < units_.slabs() && begin < end; ++s) {
      std::fill(units_.at(begin, s), units_.at(end, s), T(0));
    }
    for (int64_t c = padded(begin, width_); c < end; c += width_) {
      std::fill_n(transposed_.at(0, c / width_), transposed_.slab_size(), T(0));
    }
  }

  void cut_into_parts() {
    const int64_t limit = kPartBytes / static_cast<int64_t>(sizeof(T));
    int64_t most = 0;
    for (int64_t r0 = 0, r1; r0 < rows_; r0 = r1) {
      const int64_t columns = std::min(kPartColumns, rows_ - r0);
      r1 = next_block(r0);
      // Of these columns, those left of the diagonal take no room.
      while (r1 < rows_) {
        const int64_t height = next_block(r1) - r0;
        if (height * columns - height * (height - kBlockOperands) / 2 > limit) break;
        r1 = next_block(r1);
      }
      for (int64_t c0 = r0; c0 < rows_; c0 += kPartColumns / kBlockOperands * kBlockOperands) {
        Part part{
            r0, r1, c0, std::min(rows_, c0 + kPartColumns / kBlockOperands * kBlockOperands), {}};
        int64_t size = 0, pairs = 0;
        for (int64_t c = c0; c < part.c1; c += kBlockOperands) {
          const int64_t slabs = slab_count(next_block(c) - c, width_);
          part.starts.push_back(size);
          size += slabs * width_ * part.height(c);
          part.pair_starts.push_back(pairs);
          pairs += operands<Pair>(slabs) * width_ * even_height(part, c);
        }
        most = std::max(most, size);
        most_pairs_ = std::max(most_pairs_, pairs);
        parts_.push_back(std::move(part));
      }
    }
    blocks_ = Buffer<T>(most);
  }

  // Element (row, column), column the first of a slab; of the same block column, slabs lie
  // height() * width apart.
  T* at(const Part& part, int64_t row, int64_t column) const {
    const int64_t block = (column - part.c0) / kBlockOperands;
    const int64_t first = part.c0 + block * kBlockOperands;
    return blocks_.data() + part.starts[block] + (column - first) * part.height(first) +
           (row - part.r0) * width_;
  }

  int64_t even_height(const Part& part, int64_t c) const { return padded(part.height(c), 2); }
  // The same elements rounded, paired with the next row's, and with the next column's.
  Pair* down_at(const Part& part, int64_t row, int64_t column) const {
    const auto [start, slab, height] = pair_place(part, column);
    return down_.data() + start + slab * width_ * (height / 2) + (row - part.r0) / 2 * width_;
  }
  Pair* across_at(const Part& part, int64_t row, int64_t column) const {
    const auto [start, slab, height] = pair_place(part, column);
    return across_.data() + start + slab / 2 * width_ * height + (row - part.r0) * width_ +
           slab % 2 * (width_ / 2);
  }
  std::array<int64_t, 3> pair_place(const Part& part, int64_t column) const {
    const int64_t block = (column - part.c0) / kBlockOperands;
    const int64_t first = part.c0 + block * kBlockOperands;
    return {part.pair_starts[block], (column - first) / width_, even_height(part, first)};
  }

  void pack_pairs(const TensorRows& source, double temperature) {
    paired_ = true;
    rests_ = Buffer<float>(padded(rows_, width_), 0.0f);
    pack_unit_rows<float, Pair>(
        kernels_, source, 0, rows_, true, 1 / std::sqrt(temperature),
        {&paired_units_, &paired_transposed_, &summands_, nullptr, rests_.data()});
    down_ = Buffer<Pair>(most_pairs_);
    across_ = Buffer<Pair>(most_pairs_);
  }

  // Rounds H of a part. What its columns' rows still have to be multiplied by goes into it, and
  // what its rows' have too, so that both of a block's products find theirs.
  void round_part(const Part& part) {
    const int64_t first = part.c0 / width_, count = slab_count(part.c1, width_) - first;
    const int64_t cuts = (part.r1 - part.r0 + kBlockOperands - 1) / kBlockOperands;
    const Buffer<float> one(kBlockOperands, 1.0f);
    run_tasks(count * cuts, 4 * kBlockOperands * width_, [&](int64_t task) {
      const int64_t c0 = (first + task / cuts) * width_;
      const int64_t r0 = part.r0 + task % cuts * kBlockOperands;
      // Of blocks on the diagonal all rows, of those above it their own.
      const int64_t r1 = std::min(block_end(r0), part.r0 + part.height(block_of(part, c0)));
      if (r1 <= r0) return;
      float* z = at(part, r0, c0);
      kernels_.pairs->scale_block(r1 - r0, lanes(c0), z, &rests_[c0], &rests_[r0]);
      kernels_.pairs->round_block(r1 - r0, lanes(c0), z, one.data(), down_at(part, r0, c0),
                                  across_at(part, r0, c0));
    });
  }
  int64_t block_of(const Part& part, int64_t column) const {
    return column - (column - part.c0) % kBlockOperands;
  }

  // The rows' own rests, which round_part has put in.
  void take_rests() const {
    run_blocks(rows_, kTaskRows, gradient_.slabs() * width_, [&](int64_t begin, int64_t end) {
      for (int64_t s = 0; s < gradient_.slabs(); ++s) {
        float* row = gradient_.at(begin, s);
        for (int64_t i = begin; i < end; ++i, row += width_) {
          for (int64_t d = 0; d < width_; ++d) row[d] /= rests_[i];
        }
      }
    });
  }

  // z of rows [begin, end) with slab s.
  void multiply_logits(int64_t begin, int64_t end, int64_t s, T* z) const {
    const int64_t lanes = this->lanes(s * width_);
    if constexpr (kMayPair) {
      if (paired_) {
        fastnce::multiply(kernels_, end - begin, operands<Pair>(depth_), lanes,
                          paired_units_.at(begin, 0), paired_units_.slab_size(),
                          paired_transposed_.at(0, s), z, false);
        kernels_.pairs->scale_block(end - begin, lanes, z, &rests_[s * width_], &rests_[begin]);
        return;
      }
    }
    kernels_.multiply(end - begin, depth_, lanes, units_.at(begin, 0), units_.slab_size(),
                      transposed_.at(0, s), z, false);
  }

  // Rows of a tile. Few rows have lower ones, so that there is work for every thread.
  int64_t tile_rows() const {
    return rows_ >= 6 * kBlockOperands ? kBlockOperands : kBlockOperands / 3;
  }

  // Computes the part's logits tile by tile, and calls epilogue(tile, scratch for sums, number of
  // its slab, number of its rows). Where the values are not to be kept, they never leave the cache.
  template <class Epilogue>
  void compute(const Part& part, bool keep, const Epilogue& epilogue) {
    struct Task {
      int64_t begin, end, slab;
    };
    const int64_t step = tile_rows();
    std::vector<Task> tasks;
    for (int64_t s = part.c0 / width_; s < slab_count(part.c1, width_); ++s) {
      const int64_t below = std::min(part.r1, (s + 1) * width_);
      for (int64_t r = part.r0; r < below && lanes(s * width_) > 0; r += step) {
        const int64_t end = std::min({below, r + step, side_end(r)});
        if (r < end && meet(r, s * width_)) tasks.push_back({r, end, s});
      }
    }
    const auto count = static_cast<int64_t>(tasks.size());
    run_workers(count, step * width_ * depth_, [&](TaskQueue& queue) {
      Buffer<T> scratch(2 * kSums * kBlockOperands), values;
      if (!keep) values = Buffer<T>(step * width_);
      TileSums sums;
      for (int k = 0; k < kSums; ++k) {
        sums.row[k] = &scratch[2 * k * kBlockOperands];
        sums.column[k] = &scratch[(2 * k + 1) * kBlockOperands];
      }
      for (int64_t t; queue.next(t);) {
        const auto [begin, end, s] = tasks[t];
        const int64_t c0 = s * width_, lanes = this->lanes(c0);
        T* z = keep ? at(part, begin, c0) : values.data();
        multiply_logits(begin, end, s, z);
        const int64_t slab = s - part.c0 / width_, number = (begin - part.r0) / step;
        const int64_t above = std::clamp(c0, begin, end);  // rows before the slab's own
        if (above > begin) {
          epilogue(Tile<T>{begin, above - begin, c0, lanes, z, false}, sums, slab, number);
        }
        if (above == end) continue;
        z += (above - begin) * width_;
        for (int64_t r = above; r < end; ++r) {
          z[(r - above) * width_ + (r - c0)] = -std::numeric_limits<T>::infinity();
        }
        epilogue(Tile<T>{above, end - above, c0, lanes, z, true}, sums, slab, number);
      }
    });
  }

  template <class Exponentials>
  void sum_part(size_t p, int kinds, const Exponentials& exponentials,
                std::array<Buffer<double>, kSums>& total) {
    const Part& part = parts_[p];
    const int64_t height = part.r1 - part.r0, slabs = slab_count(part.c1 - part.c0, width_);
    const int64_t padded = slabs * width_, cuts = (height + tile_rows() - 1) / tile_rows();
    Buffer<T> across[kSums], down[kSums];
    for (int k = 0; k < kinds; ++k) {
      across[k] = Buffer<T>(slabs * height, T(0));
      down[k] = Buffer<T>(cuts * padded, T(0));
    }
    const bool last = p + 1 == parts_.size();
    compute(part, last,
            [&](const Tile<T>& tile, const TileSums& scratch, int64_t slab, int64_t number) {
              TileSums sums = scratch;
              for (int k = 0; k < kinds; ++k) {
                sums.row[k] = &across[k][slab * height + tile.r0 - part.r0];
                // The diagonal's tiles are whole: their rows have all that there is.
                if (!tile.diagonal) sums.column[k] = &down[k][number * padded + slab * width_];
              }
              exponentials(tile, sums);
            });
    run_blocks(height, kTaskRows, slabs * kinds, [&](int64_t begin, int64_t end) {
      for (int k = 0; k < kinds; ++k) {
        for (int64_t s = 0; s < slabs; ++s) {
          for (int64_t r = begin; r < end; ++r) {
            total[k][part.r0 + r] += across[k][s * height + r];
          }
        }
      }
    });
    for (int k = 0; k < kinds; ++k) {
      for (int64_t number = 0; number < cuts; ++number) {
        for (int64_t c = part.c0; c < part.c1; ++c) {
          total[k][c] += down[k][number * padded + c - part.c0];
        }
      }
    }
    if (last) kept_ = static_cast<int64_t>(p);
  }

  template <class Weigh>
  void weigh_part(const Part& part, const Weigh& weigh) {
    const int64_t first = part.c0 / width_, count = slab_count(part.c1, width_) - first;
    const int64_t cuts = (part.r1 - part.r0 + kBlockOperands - 1) / kBlockOperands;
    run_tasks(count * cuts, 4 * kBlockOperands * width_, [&](int64_t task) {
      const int64_t c0 = (first + task / cuts) * width_;
      const int64_t r0 = part.r0 + task % cuts * kBlockOperands;
      const int64_t r1 = std::min({part.r1, block_end(r0), c0 + width_});
      if (r1 <= r0 || lanes(c0) <= 0 || !meet(r0, c0)) return;
      weigh(Tile<T>{r0, r1 - r0, c0, lanes(c0), at(part, r0, c0), false});
    });
  }

  // Completes the blocks on the diagonal, so that all their rows can be multiplied.
  void mirror_diagonal(const Part& part) {
    if (part.c0 != part.r0) return;
    run_blocks(part.r1 - part.r0, kBlockOperands, kBlockOperands, [&](int64_t b, int64_t e) {
      const int64_t begin = part.r0 + b, end = std::min(part.r0 + e, block_end(begin));
      if (!meet(begin, begin)) return;
      for (int64_t c0 = begin + width_; c0 < end; c0 += width_) {
        for (int64_t r0 = begin; r0 < c0; r0 += width_) {
          const T* from = at(part, r0, c0);
          T* to = at(part, c0, r0);
          for (int64_t c = 0; c < std::min(width_, end - c0); ++c) {
            for (int64_t r = 0; r < width_; ++r) to[c * width_ + r] = from[r * width_ + c];
          }
        }
      }
    });
  }

  // Adds what the part's blocks give to the rows of their rows and, transposed, of their columns.
  void multiply_part(const Part& part) {
    std::vector<int64_t> outputs;  // first rows of the blocks that are added to
    for (int64_t i = part.r0; i < part.r1; i += kBlockOperands) outputs.push_back(i);
    for (int64_t i = std::max(part.c0, part.r1); i < part.c1; i += kBlockOperands) {
      outputs.push_back(i);
    }
    constexpr int64_t kManySlabs = 4, kManyTasks = 32;
    const int64_t slabs = gradient_.slabs(), count = static_cast<int64_t>(outputs.size());
    const int64_t chunk = std::clamp<int64_t>(slabs * count / kManyTasks, 1, kManySlabs);
    const int64_t chunks = (slabs + chunk - 1) / chunk;
    const int64_t work = kBlockOperands * (part.r1 - part.r0) * chunk * width_;
    run_tasks(count * chunks, work, [&](int64_t task) {
      const int64_t i = outputs[task / chunks], d0 = task % chunks * chunk;
      const int64_t d1 = std::min(slabs, d0 + chunk);
      if (!wanted_[of_second(i)]) return;
      if (i >= part.c0) {
        for (int64_t r = part.r0; r < std::min(part.r1, i); r += kBlockOperands) {
          if (meet(r, i)) add_transposed(part, r, i, d0, d1);
        }
      }
      if (i >= part.r1) return;
      for (int64_t c = std::max(part.c0, i); c < part.c1; c += kBlockOperands) {
        if (meet(i, c)) add_straight(part, i, c, d0, d1);
      }
    });
  }

  // Fetches what the next block needs while this one's products keep the arithmetic busy: slab
  // `slab` of the block at (row, column), if there is one.
  void fetch_slab(const Part& part, int64_t row, int64_t column, int64_t slab) const {
    if (row >= part.r1 || column >= part.c1) return;
    if (column + slab * width_ >= std::min(part.c1, block_end(column))) return;
    constexpr int64_t kLine = 64 / sizeof(T);
    const int64_t count = (std::min(part.r1, block_end(row)) - row) * width_;
    const T* values = at(part, row, column + slab * width_);
    for (int64_t k = 0; k < count; k += kLine) __builtin_prefetch(values + k, 0, 2);
  }

  // Where what blocks at (r, c) give goes.
  const SlabMatrix<T>& gradient_of(int64_t r, int64_t c) const {
    return apart_ && of_second(r) != of_second(c) ? cross_gradient_ : gradient_;
  }

  void add_straight(const Part& part, int64_t r, int64_t c, int64_t d0, int64_t d1) {
    const SlabMatrix<T>& gradient = gradient_of(r, c);
    if constexpr (kMayPair) {
      if (paired_) {
        for (int64_t d = d0; d < d1; ++d) {
          fastnce::multiply(kernels_, block_end(r) - r, operands<Pair>(block_end(c) - c),
                            gradient.lanes(d), across_at(part, r, c), even_height(part, c) * width_,
                            summands_.at(c / 2, d), gradient.at(r, d), true);
        }
        return;
      }
    }
    for (int64_t d = d0; d < d1; ++d) {
      fetch_slab(part, r, c + kBlockOperands, d - d0);
      kernels_.multiply(block_end(r) - r, block_end(c) - c, gradient.lanes(d), at(part, r, c),
                        part.height(c) * width_, units_.at(c, d), gradient.at(r, d), true);
    }
  }

  void add_transposed(const Part& part, int64_t r, int64_t c, int64_t d0, int64_t d1) {
    const int64_t rows = std::min(part.r1, block_end(r)) - r;
    const SlabMatrix<T>& gradient = gradient_of(r, c);
    if constexpr (kMayPair) {
      if (paired_) {
        for (int64_t d = d0; d < d1; ++d) {
          for (int64_t j = c; j < block_end(c); j += width_) {
            fastnce::multiply_transposed(kernels_, lanes(j), operands<Pair>(rows),
                                         gradient.lanes(d), down_at(part, r, j),
                                         summands_.at(r / 2, d), gradient.at(j, d));
          }
        }
        return;
      }
    }
    for (int64_t d = d0; d < d1; ++d) {
      if (r + kBlockOperands < c) fetch_slab(part, r + kBlockOperands, c, d - d0);
      for (int64_t j = c; j < block_end(c); j += width_) {
        kernels_.multiply_transposed(lanes(j), rows, gradient.lanes(d), at(part, r, j),
                                     units_.at(r, d), gradient.at(j, d));
      }
    }
  }

  static constexpr bool kMayPair = std::is_same_v<T, float>;

  const TileKernels<T>& kernels_;
  const int64_t second_;
  const std::array<int64_t, 2> ends_;  // of the sides' rows
  const int64_t rows_, depth_, width_;
  const bool apart_;
  std::array<bool, 2> own_{}, wanted_{};
  SlabMatrix<T> units_, transposed_, gradient_, cross_gradient_;
  std::vector<Part> parts_;
  Buffer<T> blocks_;
  bool paired_ = false;
  SlabMatrix<Pair> paired_units_, paired_transposed_, summands_;  // see PackedRows
  Buffer<float> rests_;
  int64_t most_pairs_ = 0;
  Buffer<Pair> down_, across_;  // blocks of H
  int64_t kept_ = -1;           // the part whose exponentials are in blocks_
};

}  // namespace fastnce
