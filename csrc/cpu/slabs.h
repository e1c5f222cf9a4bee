// Memory for the kernels: scratch that stays with the process, aligned buffers, and matrices in
// slabs (see tile_kernels.h).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "huge_pages.h"

namespace fastnce {

// Copies what will not be read before it has left the caches: a store that went through them would
// read each line first. Both are aligned as buffers are.
inline void stream(const float* x, int64_t count, float* out) {
#ifdef __SSE2__
  for (; count >= 4; count -= 4, x += 4, out += 4) _mm_stream_ps(out, _mm_load_ps(x));
  _mm_sfence();
#endif
  std::copy_n(x, count, out);
}
inline void stream(const double* x, int64_t count, double* out) {
#ifdef __SSE2__
  for (; count >= 2; count -= 2, x += 2, out += 2) _mm_stream_pd(out, _mm_load_pd(x));
  _mm_sfence();
#endif
  std::copy_n(x, count, out);
}

// The system takes back what a call frees, and hands it out again page by page, which costs small
// problems more than their arithmetic.
class ScratchPool {
 public:
  static constexpr std::align_val_t kAlignment{64};

  static ScratchPool& instance() {
    static auto* pool = new ScratchPool;  // never destroyed: buffers may outlive static objects
    return *pool;
  }

  void* take(size_t bytes) {
    if (pooled(bytes)) {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (size_t i = blocks_.size(); i-- > 0;) {
        if (blocks_[i].bytes != rounded(bytes)) continue;
        void* data = blocks_[i].data;
        blocks_[i] = blocks_.back();
        blocks_.pop_back();
        held_ -= rounded(bytes);
        return data;
      }
    }
    if (pooled(bytes)) bytes = rounded(bytes);
    // No more aligned than small ones: large arrays that all begin at a huge page meet in the
    // caches.
    void* data = ::operator new(bytes, kAlignment);
    if (bytes > kMost) ask_for_huge_pages(data, bytes);
    return data;
  }

  void give_back(void* data, size_t bytes) {
    if (pooled(bytes)) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (held_ + rounded(bytes) <= kMostHeld) {
        blocks_.push_back({rounded(bytes), data});
        held_ += rounded(bytes);
        return;
      }
    }
    ::operator delete(data, kAlignment);
  }

 private:
  // Smaller blocks are malloc's; larger ones are worth their pages.
  static constexpr size_t kLeast = size_t{64} << 10, kMost = size_t{4} << 20;
  static constexpr size_t kMostHeld = size_t{16} << 20;

  static bool pooled(size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
    return false;  // a block that is handed out again hides its misuse
#endif
    return bytes >= kLeast && bytes <= kMost;
  }
  // A few sizes, so that problems of slightly different sizes share blocks.
  static size_t rounded(size_t bytes) {
    size_t step = kLeast / 4;
    while (8 * step < bytes) step *= 2;
    return (bytes + step - 1) / step * step;
  }

  struct Block {
    size_t bytes;
    void* data;
  };
  std::mutex mutex_;
  std::vector<Block> blocks_;
  size_t held_ = 0;
};

// Uninitialised memory, aligned for the widest vectors.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(ScratchPool::instance().take(bytes_of(size))), Free{bytes_of(size)}),
        size_(size) {}
  Buffer(int64_t size, T value) : Buffer(size) { std::fill_n(data(), size, value); }

  T* data() const { return data_.get(); }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  static size_t bytes_of(int64_t size) { return static_cast<size_t>(size) * sizeof(T); }
  struct Free {
    size_t bytes = 0;
    void operator()(T* p) const { ScratchPool::instance().give_back(p, bytes); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;
};

inline int64_t slab_count(int64_t columns, int64_t width) { return (columns + width - 1) / width; }

// Columns of whole slabs.
inline int64_t padded(int64_t columns, int64_t width) { return slab_count(columns, width) * width; }

// A (rows, columns) matrix in slabs of `width` columns.
template <class T>
class SlabMatrix {
 public:
  SlabMatrix() = default;
  SlabMatrix(int64_t rows, int64_t columns, int64_t width)
      : rows_(rows),
        columns_(columns),
        width_(width),
        storage_(rows * width * slab_count(columns, width)) {}

  explicit operator bool() const { return storage_.size() != 0; }
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int64_t slabs() const { return slab_count(columns_, width_); }
  int64_t slab_size() const { return rows_ * width_; }
  // Columns that slab s really has.
  int64_t lanes(int64_t s) const { return std::min(width_, columns_ - s * width_); }
  T* at(int64_t row, int64_t slab) const {
    return storage_.data() + slab * slab_size() + row * width_;
  }

  void fill_zero() const { std::fill_n(storage_.data(), storage_.size(), T(0)); }

  // Row r as n = columns() neighbouring elements.
  void copy_row_out(int64_t row, T* out) const {
    for (int64_t s = 0; s < slabs(); ++s) std::copy_n(at(row, s), lanes(s), out + s * width_);
  }

  // The reverse; lanes beyond the last column become 0.
  void copy_row_in(int64_t row, const T* x) const {
    for (int64_t s = 0; s < slabs(); ++s) {
      std::copy_n(x + s * width_, lanes(s), at(row, s));
      std::fill_n(at(row, s) + lanes(s), width_ - lanes(s), T(0));
    }
  }

 private:
  int64_t rows_ = 0, columns_ = 0, width_ = 1;
  Buffer<T> storage_;
};

}  // namespace fastnce
