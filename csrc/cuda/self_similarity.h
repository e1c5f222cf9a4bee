// What SupCon and 2C share: rows against one another, each but itself, with positives by label.
//
// The gradient of a unit row gathers its own loss and those in which it is a column, sum_j (G_ij +
// G_ji) x^_j / t. The matrix of similarities is symmetric, so one pass finds both; sum_ij G_ij z_ij
// is half of what that pass sums up.
#pragma once

#include "row_losses.h"
#include "rows_call.h"

namespace fastnce::cuda {

class SelfSimilarity {
 public:
  const Tensor grad_rows, grad_temperature;

 protected:
  // labels (N,), contiguous. Forward: sums are wanted. Who derives from it may want more memory,
  // then calls workspace_.allocate.
  SelfSimilarity(const RowsCall& call, Kind kind, const Tensor& rows, const Tensor& labels,
                 bool forward, bool need_rows, bool need_temperature)
      : grad_rows(new_gradient(rows, need_rows)),
        grad_temperature(new_scalar(rows, need_temperature)),
        c_(call),
        kind_(kind),
        need_rows_(need_rows),
        need_temperature_(need_temperature),
        total_(rows.size(0)),
        labels_(labels.const_data_ptr<int64_t>()) {
    if (forward) sums_ = plan_sums(pairs(), c_.machine, false);
    if (need_rows || need_temperature) {
      products_ = plan_products(pairs(), c_.machine, true, false);
    }
    const int64_t sums = sums_.splits * total_, products = products_.x_splits * total_;
    workspace_.want(&rows_, total_, c_.padded);
    workspace_.want(&out_.largest, sums);
    workspace_.want(&out_.sum, sums);
    workspace_.want(&out_.label_a, sums);
    workspace_.want(&out_.label_b, sums);
    workspace_.want(&statistics_, products > 0 ? 3 * total_ : 0);
    workspace_.want(&product_, products * c_.padded);
    workspace_.want(&term_, need_temperature ? products : 0);
    workspace_.want(&products_workspace_, products_.workspace_bytes);
    workspace_.want(&upstream_, 1);
  }

  // Sums into out_, in sums_.splits parts.
  void sum() const { launch_sums(pairs(), sums_, out_, c_.stream); }

  void multiply() const {
    if (products_.x_splits == 0) return;
    Products out;
    out.x_statistics = out.y_statistics = statistics_;
    out.x_product = product_;
    out.x_term = term_;
    out.workspace = products_workspace_;
    launch_products(pairs(), products_, out, c_.stream);
  }

  LossGradient arriving(const Tensor& grad_loss) const {
    return {grad_loss.const_data_ptr<float>(), total_, {0, grad_loss.stride(0)}, upstream_};
  }
  RowGradient row_gradient() const {
    RowGradient g{rows_, total_};
    g.product = product_;
    g.parts = products_.x_splits;
    g.out = grad_rows.mutable_data_ptr();
    return g;
  }
  TemperatureGradient temperature_gradient(const Upstream& upstream) const {
    TemperatureGradient g{c_.op, total_, c_.temperature, upstream};
    g.term = term_;
    g.parts = products_.x_splits;
    g.scale = 0.5f;
    g.out = grad_temperature.mutable_data_ptr<float>();
    return g;
  }

  const RowsCall& c_;
  const Kind kind_;
  const bool need_rows_, need_temperature_;
  const int64_t total_;
  const int64_t* labels_;
  SumsPlan sums_{};
  ProductsPlan products_{};
  PackedRows rows_;
  Sums out_;
  float *statistics_ = nullptr, *product_ = nullptr, *term_ = nullptr, *upstream_ = nullptr;
  void* products_workspace_ = nullptr;
  Workspace workspace_;

 private:
  Pairs pairs() const { return c_.pairs(kind_, 1, total_, total_, rows_, rows_, labels_); }
};

}  // namespace fastnce::cuda
