// InfoNCE: in-batch, batched, a queue, symmetric.
//
// Launches of a loss with its gradients: packing, sums, losses, gradients of rows; where keys need
// a gradient too, or the loss is symmetric, a pass for products before the last; one more each for
// the temperature's gradient and a second set of columns.
#include "info_nce.h"

#include "row_losses.h"
#include "rows_call.h"

namespace fastnce::cuda {
namespace {

struct Needs {
  bool query, key, negatives, temperature;
  bool rows() const { return query || temperature; }
  bool any() const { return rows() || key || negatives; }
};

// A set of columns of the similarities: the keys of the batch, or the queue.
struct Columns {
  bool of_keys;
  PackedRows* rows;
  int64_t problems, count;  // columns of a problem
  SumsPlan sums{};
  ProductsPlan products{};
  float* product = nullptr;  // (y_splits, C, P)
  void* workspace = nullptr;
};

class InfoNce {
 public:
  InfoNce(const RowsCall& call, const Tensor& query, const Tensor& key,
          const std::optional<Tensor>& negatives, bool symmetric, bool in_batch,
          std::optional<double> self_logit, Needs needs, bool forward)
      : c_(call),
        query_(query),
        key_(key),
        negatives_(negatives),
        symmetric_(symmetric),
        self_logit_(self_logit),
        needs_(needs),
        batch_(query.size(0)),
        rows_(query.size(1)),
        total_(batch_ * rows_),
        grad_query(new_gradient(query, needs.query)),
        grad_key(new_gradient(key, needs.key)),
        grad_negatives(new_gradient(negatives ? *negatives : query, needs.negatives)),
        grad_temperature(new_scalar(query, needs.temperature)) {
    if (in_batch) sets_.push_back({true, &packed_key_, batch_, rows_});
    if (negatives) sets_.push_back({false, &packed_queue_, 1, negatives->size(0)});
    plan(forward);
    want_memory(forward);
    workspace_.allocate(query);
  }

  void forward(const Tensor& loss, const Tensor& lse, float grad_scale) {
    pack();
    InfoNceLosses l = losses();
    l.columns = sum();
    l.rows = {largest_, sum_, sum_parts_};
    l.loss = loss.mutable_data_ptr<float>();
    l.lse = lse.mutable_data_ptr<float>();
    l.factor = factor_;
    l.factor_parts = fused_ ? product_parts_ : 0;
    launch_info_nce_losses(l, c_.machine.multiprocessors, c_.stream);
    if (needs_.any()) gradients({nullptr, grad_scale});
  }

  void backward(const Tensor& grad_loss, const Tensor& lse) {
    pack();
    InfoNceLosses l = losses();
    l.lse = const_cast<float*>(lse.const_data_ptr<float>());
    l.grad_loss = {grad_loss.const_data_ptr<float>(),
                   rows_,
                   {grad_loss.stride(0), grad_loss.stride(1)},
                   upstream_};
    launch_info_nce_losses(l, c_.machine.multiprocessors, c_.stream);
    gradients({upstream_, 0});
  }

 private:
  void plan(bool forward) {
    // Sums and the queries' product in one pass, where a row's sum is all that its gradient waits
    // for.
    fused_ = forward && needs_.rows() && !symmetric_;
    for (const Columns& set : sets_) {
      fused_ = fused_ && can_sum_with_product(pairs(set), c_.machine);
    }
    for (Columns& set : sets_) {
      const bool of_y = set.of_keys ? needs_.key : needs_.negatives;
      const bool of_x = needs_.rows() && !fused_;
      if (forward) set.sums = plan_sums(pairs(set), c_.machine, fused_);
      if (of_x || of_y) set.products = plan_products(pairs(set), c_.machine, of_x, of_y);
      sum_parts_ += set.sums.splits;
      product_parts_ += fused_ ? set.sums.splits : set.products.x_splits;
    }
  }

  void want_memory(bool forward) {
    Workspace& w = workspace_;
    const int64_t padded = c_.padded;
    const bool gradients = needs_.any();
    w.want(&packed_query_, total_, padded);
    w.want(&packed_key_, total_, padded);
    w.want(&pair_products_, total_);
    w.want(&largest_, sum_parts_ * total_);
    w.want(&sum_, sum_parts_ * total_);
    const int64_t column_parts = forward && symmetric_ ? sets_[0].sums.row_blocks : 0;
    w.want(&column_largest_, column_parts * total_);
    w.want(&column_sum_, column_parts * total_);
    w.want(&pair_logit_, gradients ? total_ : 0);
    w.want(&pair_weight_, gradients ? total_ : 0);
    w.want(&row_statistics_, gradients ? 3 * total_ : 0);
    w.want(&column_statistics_, gradients && symmetric_ ? 3 * total_ : 0);
    w.want(&factor_, fused_ ? product_parts_ * total_ : 0);
    w.want(&upstream_, forward ? 0 : 1);
    const int64_t parts = needs_.rows() ? product_parts_ : 0;
    w.want(&product_, parts * total_ * padded);
    w.want(&term_, needs_.temperature ? parts * total_ : 0);
    for (Columns& set : sets_) {
      if (!set.of_keys) w.want(&packed_queue_, set.count, padded);
      w.want(&set.product, set.products.y_splits * set.problems * set.count * padded);
      w.want(&set.workspace, set.products.workspace_bytes);
    }
  }

  // All rows of the call are one problem for the queue.
  Pairs pairs(const Columns& set) const {
    return c_.pairs(set.of_keys ? Kind::kInBatch : Kind::kQueue, set.problems,
                    total_ / set.problems, set.count, packed_query_, *set.rows);
  }

  void pack() {
    Pack packs[kMostPacks] = {
        {rows_of(c_.op, query_), packed_query_, rows_of(c_.op, key_), packed_key_, pair_products_}};
    int count = 1;
    if (negatives_) packs[count++] = {rows_of(c_.op, *negatives_), packed_queue_};
    launch_pack(packs, count, c_.pack_options(), c_.stream);
  }

  // Of a symmetric loss, whose columns are one set, those of columns as well.
  SumParts sum() {
    SumParts of_columns;
    int64_t part = 0;
    for (const Columns& set : sets_) {
      Sums out;
      out.largest = largest_ + part * total_;
      out.sum = sum_ + part * total_;
      if (fused_) out.product = product_ + part * total_ * c_.padded;
      if (fused_ && needs_.temperature) out.term = term_ + part * total_;
      if (symmetric_) {
        out.column_largest = column_largest_;
        out.column_sum = column_sum_;
        of_columns = {out.column_largest, out.column_sum, set.sums.row_blocks};
      }
      part += set.sums.splits;
      launch_sums(pairs(set), set.sums, out, c_.stream);
    }
    return of_columns;
  }

  InfoNceLosses losses() const {
    InfoNceLosses l{};
    l.op = c_.op;
    l.total = total_;
    l.temperature = c_.temperature;
    l.symmetric = symmetric_;
    l.has_self_logit = self_logit_.has_value();
    l.self_logit = static_cast<float>(self_logit_.value_or(0));
    l.positive = {pair_products_, packed_query_.scale, packed_key_.scale, pair_logit_,
                  pair_weight_};
    l.row_statistics = row_statistics_;
    l.column_statistics = column_statistics_;
    return l;
  }

  void gradients(const Upstream& upstream) {
    multiply();
    finish_rows(upstream);
    if (needs_.temperature) finish_temperature(upstream);
  }

  // G y^ for rows and G^T x^ for columns.
  void multiply() {
    int64_t part = 0;
    for (const Columns& set : sets_) {
      const ProductsPlan& plan = set.products;
      if (plan.x_splits == 0 && plan.y_splits == 0) continue;
      Products out;
      out.x_statistics = row_statistics_;
      out.y_statistics = column_statistics_;
      if (plan.x_splits > 0) {
        out.x_product = product_ + part * total_ * c_.padded;
        if (needs_.temperature) out.x_term = term_ + part * total_;
      }
      out.y_product = set.product;
      out.workspace = set.workspace;
      part += plan.x_splits;
      launch_products(pairs(set), plan, out, c_.stream);
    }
  }

  void finish_rows(const Upstream& upstream) {
    RowGradient all[kMostRowGradients];
    int count = 0;
    if (needs_.query) {
      RowGradient& g = all[count++] = {packed_query_, total_};
      g.product = product_;
      g.parts = product_parts_;
      g.factor = factor_;
      g.factor_parts = fused_ ? product_parts_ : 0;
      g.pair = packed_key_;
      g.pair_weight = pair_weight_;
      g.out = grad_query.mutable_data_ptr();
    }
    if (needs_.key) {
      RowGradient& g = all[count++] = {packed_key_, total_};
      g.pair = packed_query_;
      g.pair_weight = pair_weight_;
      g.out = grad_key.mutable_data_ptr();
    }
    for (const Columns& set : sets_) {
      if (set.products.y_splits == 0) continue;
      if (!set.of_keys) {
        all[count++] = {packed_queue_, set.count};
        all[count - 1].out = grad_negatives.mutable_data_ptr();
      }
      all[count - 1].product = set.product;
      all[count - 1].parts = set.products.y_splits;
    }
    if (count > 0) launch_row_gradients(all, count, c_.gradient_options(upstream), c_.stream);
  }

  void finish_temperature(const Upstream& upstream) {
    TemperatureGradient g{c_.op, total_, c_.temperature, upstream};
    g.pair_weight = pair_weight_;
    g.pair_logit = pair_logit_;
    g.term = term_;
    g.parts = product_parts_;
    g.factor = factor_;
    g.factor_parts = fused_ ? product_parts_ : 0;
    g.row_statistics = self_logit_ ? row_statistics_ : nullptr;
    g.self_logit = static_cast<float>(self_logit_.value_or(0));
    g.out = grad_temperature.mutable_data_ptr<float>();
    launch_temperature_gradient(g, c_.stream);
  }

  const RowsCall& c_;
  const Tensor &query_, &key_;
  const std::optional<Tensor>& negatives_;
  const bool symmetric_;
  const std::optional<double> self_logit_;
  const Needs needs_;
  const int64_t batch_, rows_, total_;
  bool fused_ = false;
  int64_t sum_parts_ = 0, product_parts_ = 0;  // those of the sets in order
  std::vector<Columns> sets_;
  PackedRows packed_query_, packed_key_, packed_queue_;
  float *pair_products_, *largest_, *sum_, *column_largest_, *column_sum_, *pair_logit_,
      *pair_weight_, *row_statistics_, *column_statistics_, *factor_, *upstream_, *product_, *term_;
  Workspace workspace_;

 public:
  const Tensor grad_query, grad_key, grad_negatives, grad_temperature;
};

void check(const char* op, const Tensor& query, const Tensor& key,
           const std::optional<Tensor>& negatives, bool symmetric, bool in_batch) {
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(query.dim() == 3, op, ": query must be (B, N, D).");
  const std::vector<int64_t> shape = {query.size(0), query.size(1), query.size(2)};
  check_tensor(op, "query", query, dtype, shape);
  check_tensor(op, "key", key, dtype, shape);
  STD_TORCH_CHECK(!symmetric || (in_batch && !negatives), op,
                  ": a symmetric loss has the keys of the batch as columns, and no others.");
  if (!negatives) return;
  STD_TORCH_CHECK(
      negatives->dim() == 2, op,
      ": the CUDA kernels take negatives (M, D) that all queries share, and none of each "
      "query's own. Use backend='blocks' for those.");
  check_tensor(op, "negatives", *negatives, dtype, {negatives->size(0), shape[2]});
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> info_nce_forward(
    const Tensor& query, const Tensor& key, const std::optional<Tensor>& negatives,
    const std::optional<Tensor>& temperature_tensor, double temperature, bool normalize,
    bool symmetric, bool in_batch, std::optional<double> self_logit, bool /*bfloat16_products*/,
    std::optional<double> grad_scale, bool mean, bool need_query, bool need_key,
    bool need_negatives, bool need_temperature) {
  const char* op = "info_nce_forward";
  check(op, query, key, negatives, symmetric, in_batch);
  if (grad_scale && mean) *grad_scale /= static_cast<double>(query.size(0) * query.size(1));
  const RowsCall call(op, query, temperature_tensor, temperature, normalize);
  const bool now = grad_scale.has_value();
  const Needs needs{now && need_query, now && need_key,
                    now && need_negatives && negatives.has_value(), now && need_temperature};
  InfoNce run(call, query, key, negatives, symmetric, in_batch, self_logit, needs, true);
  std::vector<int64_t> shape = {query.size(0), query.size(1)};
  const Tensor loss = new_tensor(query, shape, ScalarType::Float);
  if (symmetric) shape.insert(shape.begin(), 2);
  const Tensor lse = new_tensor(query, shape, ScalarType::Float);
  run.forward(loss, lse, static_cast<float>(grad_scale.value_or(1)));
  return {loss, lse, run.grad_query, run.grad_key, run.grad_negatives, run.grad_temperature};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_backward(
    const Tensor& grad_loss, const Tensor& query, const Tensor& key,
    const std::optional<Tensor>& negatives, const std::optional<Tensor>& temperature_tensor,
    double temperature, const Tensor& lse, bool normalize, bool symmetric, bool in_batch,
    std::optional<double> self_logit, bool /*bfloat16_products*/, bool need_query, bool need_key,
    bool need_negatives, bool need_temperature) {
  const char* op = "info_nce_backward";
  check(op, query, key, negatives, symmetric, in_batch);
  std::vector<int64_t> shape = {query.size(0), query.size(1)};
  check_tensor(op, "grad_loss", grad_loss, ScalarType::Float, shape);
  if (symmetric) shape.insert(shape.begin(), 2);
  check_tensor(op, "lse", lse, ScalarType::Float, shape);
  const RowsCall call(op, query, temperature_tensor, temperature, normalize);
  const Needs needs{need_query, need_key, need_negatives && negatives.has_value(),
                    need_temperature};
  InfoNce run(call, query, key, negatives, symmetric, in_batch, self_logit, needs, false);
  const Tensor sums = torch::stable::contiguous(lse);
  if (needs.any()) run.backward(grad_loss, sums);
  return {run.grad_query, run.grad_key, run.grad_negatives, run.grad_temperature};
}

FASTNCE_CUDA_LIBRARY_IMPL(m) {
  m.impl("info_nce_forward", FASTNCE_CUDA_BOX(&info_nce_forward));
  m.impl("info_nce_backward", FASTNCE_CUDA_BOX(&info_nce_backward));
}

}  // namespace fastnce::cuda
