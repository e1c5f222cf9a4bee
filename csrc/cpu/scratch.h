// Scratch memory that stays with the process: the system takes back what a call frees, and hands it
// out again page by page, which costs small problems more than their arithmetic.
#pragma once

#include <cstddef>
#include <mutex>
#include <new>
#include <vector>

namespace fastnce {

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
    return ::operator new(pooled(bytes) ? rounded(bytes) : bytes, kAlignment);
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

}  // namespace fastnce
