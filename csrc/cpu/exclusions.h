// Pairs that are left out by ids: the ids as numbers narrow enough to be compared in a logit's
// lane.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "op_arguments.h"
#include "parallel.h"

namespace fastnce {

// The id of a key that is left out for every query.
constexpr int64_t kLeftOut = std::numeric_limits<int64_t>::min();

// (...) int64 of any strides, in order.
class Ids {
 public:
  explicit Ids(const Tensor& ids) : ids_(torch::stable::contiguous(ids)) {}
  int64_t size() const { return ids_.numel(); }
  const int64_t* data() const { return ids_.const_data_ptr<int64_t>(); }

 private:
  Tensor ids_;
};

// Numbers for block_exclude_equal: the same for the same ids, kEveryId for kLeftOut.
template <class Label>
class IdNumbers {
 public:
  // Of `count` queries; without ids none has that of a key.
  IdNumbers(const std::optional<Tensor>& query_ids, int64_t count) : queries_(count, kNoId) {
    if (!query_ids.has_value()) return;
    const Ids ids(*query_ids);
    known_.assign(ids.data(), ids.data() + count);
    std::sort(known_.begin(), known_.end());
    known_.erase(std::unique(known_.begin(), known_.end()), known_.end());
    for (int64_t i = 0; i < count; ++i) queries_[i] = number(ids.data()[i]);
  }

  const std::vector<Label>& queries() const { return queries_; }

  std::vector<Label> of_keys(const Tensor& key_ids) const {
    const Ids ids(key_ids);
    std::vector<Label> out(ids.size());
    run_blocks(ids.size(), 4096, 64, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        const int64_t id = ids.data()[j];
        out[j] = id == kLeftOut ? Label(kEveryId) : number(id);
      }
    });
    return out;
  }

  static constexpr Label kNoId = -2;  // of queries without ids, and of lanes without a query

 private:
  static constexpr Label kNoQuery = -3;  // of keys

  Label number(int64_t id) const {
    const auto at = std::lower_bound(known_.begin(), known_.end(), id);
    if (at == known_.end() || *at != id) return kNoQuery;
    return static_cast<Label>(at - known_.begin());
  }

  std::vector<int64_t> known_;  // sorted
  std::vector<Label> queries_;
};

}  // namespace fastnce
