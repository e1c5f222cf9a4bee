// What a call of an op over rows knows before it begins, and the arguments that its launches share.
#pragma once

#include "op.h"
#include "pairs.h"
#include "rows.h"

namespace fastnce::cuda {

struct RowsCall {
  const char* op;
  Dtype dtype, packed;  // of the rows, of the packed rows
  Precision precision;
  int64_t depth, padded;
  bool normalize;
  Temperature temperature;
  Machine machine;
  Stream stream;

  // rows (N, D) or (B, N, D).
  RowsCall(const char* op, const Tensor& rows, const std::optional<Tensor>& temperature_tensor,
           double temperature, bool normalize, bool bfloat16_products)
      : op(op),
        dtype(dtype_of(op, rows)),
        packed(dtype),
        precision(Precision::kFloat32),
        depth(rows.size(rows.dim() - 1)),
        padded(padded_depth(depth)),
        normalize(normalize),
        temperature(temperature_of(op, temperature_tensor, temperature)),
        machine{compute_capability(rows), multiprocessors(rows)},
        stream(current_stream(rows)) {
    if (dtype == Dtype::kFloat32 && bfloat16_products) {
      packed = Dtype::kBfloat16;
      precision = Precision::kBfloat16;
    }
  }

  PackOptions pack_options() const { return {op, padded, packed, normalize}; }
  RowGradientOptions gradient_options(const Upstream& upstream) const {
    return {op, depth, padded, packed, dtype, normalize, temperature, upstream};
  }
  // Addresses are null where a plan alone is wanted.
  Pairs pairs(Kind kind, int64_t problems, int64_t rows, int64_t columns, const PackedRows& x,
              const PackedRows& y, const int64_t* labels = nullptr) const {
    return {op,     x.data, x.scale,   y.data,    y.scale, problems, rows,   columns,
            padded, packed, precision, normalize, kind,    labels,   labels, temperature};
  }
};

}  // namespace fastnce::cuda
