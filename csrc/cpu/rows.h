// Loops over one row of a matrix. Sums and scale factors are in double: rows of norm 1e-20 or 1e20
// neither underflow nor overflow in float, and each result is rounded once.
#pragma once

#include "vector.h"

namespace fastnce::FASTNCE_ISA {

// Independent partial sums, so that the loop is not one chain of dependent additions.
constexpr int kPartials = 16;

template <class T, class Term>
inline __attribute__((always_inline)) double sum_terms(int64_t n, Term term) {
  double partial[kPartials] = {};
  int64_t i = 0;
  for (; i + kPartials <= n; i += kPartials) {
    for (int j = 0; j < kPartials; ++j) partial[j] += term(i + j);
  }
  double total = 0;
  for (; i < n; ++i) total += term(i);
  for (int j = 0; j < kPartials; ++j) total += partial[j];
  return total;
}

template <class T>
double sum_squares(int64_t n, const T* x) {
  return sum_terms<T>(n, [=](int64_t i) { return static_cast<double>(x[i]) * x[i]; });
}

template <class T>
double dot(int64_t n, const T* x, const T* y) {
  return sum_terms<T>(n, [=](int64_t i) { return static_cast<double>(x[i]) * y[i]; });
}

template <class T>
void scale(int64_t n, const T* x, double factor, T* out) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(x[i] * factor);
}

template <class T>
void add_scaled(int64_t n, T alpha, const T* x, T* y) {
  for (int64_t i = 0; i < n; ++i) y[i] += alpha * x[i];
}

template <class T>
double mix_and_dot(int64_t n, double factor, const T* g, double alpha, const T* y, const T* x,
                   T* out) {
  // ivdep: out may be g or y, element for element.
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(factor * g[i] + alpha * y[i]);
  return dot(n, x, out);
}

template <class T>
void subtract_and_scale(int64_t n, const T* g, double back, const T* x, double factor, T* out) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>((g[i] - back * x[i]) * factor);
}

template <class T>
void store_rows(int64_t rows, int64_t n, const T* x, int64_t stride, T* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r, x += stride, out += out_stride) {
    int64_t i = 0;
    for (; i + kLanes<T> <= n; i += kLanes<T>) {
      const Vector<T> v = load(x + i);
      __builtin_memcpy(out + i, &v, sizeof(v));
    }
    for (; i < n; ++i) out[i] = x[i];
  }
}

}  // namespace fastnce::FASTNCE_ISA
