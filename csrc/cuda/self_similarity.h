// What SupCon and 2C share: rows against one another, each but itself, with positives by label.
//
// The gradient of a unit row gathers its own loss and those in which it is a column, sum_j (G_ij +
// G_ji) x^_j / t. The matrix of similarities is symmetric, so one pass finds both; sum_ij G_ij z_ij
// is half of what that pass sums up.
#pragma once

#include "row_losses.h"
#include "rows_call.h"
#include "workspace.h"

namespace fastnce::cuda {

class SelfSimilarity {
 public:
  // labels (N,), contiguous. Forward: sums are wanted.
  SelfSimilarity(const RowsCall& call, Kind kind, const Tensor& rows, const Tensor& labels,
                 bool forward, bool need_rows, bool need_temperature)
      : c_(call),
        kind_(kind),
        total_(rows.size(0)),
        labels_(labels.const_data_ptr<int64_t>()),
        need_temperature_(need_temperature) {
    if (forward) sums_ = plan_sums(pairs(), c_.machine, false);
    if (need_rows || need_temperature) {
      products_ = plan_products(pairs(), c_.machine, true, false);
    }
  }

  void want_memory(Workspace* w) {
    const int64_t sums = sums_.splits * total_, products = products_.x_splits * total_;
    w->want(&rows_, total_, c_.padded, c_.packed);
    w->want(&out_.largest, sums);
    w->want(&out_.sum, sums);
    w->want(&out_.label_a, sums);
    w->want(&out_.label_b, sums);
    w->want(&statistics_, products > 0 ? 3 * total_ : 0);
    w->want(&product_, products * c_.padded);
    w->want(&term_, need_temperature_ ? products : 0);
    w->want(&workspace_, products_.workspace_bytes);
  }

  const PackedRows& rows() const { return rows_; }
  int64_t total() const { return total_; }
  const int64_t* labels() const { return labels_; }
  float* statistics() const { return statistics_; }

  Sums sum() const {
    launch_sums(pairs(), sums_, out_, c_.stream);
    return out_;
  }
  int64_t parts() const { return sums_.splits; }

  void multiply() const {
    if (products_.x_splits == 0) return;
    Products out;
    out.x_statistics = out.y_statistics = statistics_;
    out.x_product = product_;
    out.x_term = term_;
    out.workspace = workspace_;
    launch_products(pairs(), products_, out, c_.stream);
  }

  RowGradient row_gradient(const Tensor& out) const {
    RowGradient g{rows_, total_};
    g.product = product_;
    g.parts = products_.x_splits;
    g.out = out.mutable_data_ptr();
    return g;
  }
  TemperatureGradient temperature_gradient(const Upstream& upstream, const Tensor& out) const {
    TemperatureGradient g{c_.op, total_, c_.temperature, upstream};
    g.term = term_;
    g.parts = products_.x_splits;
    g.scale = 0.5f;
    g.out = out.mutable_data_ptr<float>();
    return g;
  }

 private:
  Pairs pairs() const { return c_.pairs(kind_, 1, total_, total_, rows_, rows_, labels_); }

  const RowsCall& c_;
  const Kind kind_;
  const int64_t total_;
  const int64_t* labels_;
  const bool need_temperature_;
  SumsPlan sums_{};
  ProductsPlan products_{};
  PackedRows rows_;
  Sums out_;
  float *statistics_ = nullptr, *product_ = nullptr, *term_ = nullptr;
  void* workspace_ = nullptr;
};

}  // namespace fastnce::cuda
