// Sharing tasks among torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace fastnce {

// Hands out 0 .. count - 1 to the workers that ask.
class TaskQueue {
 public:
  explicit TaskQueue(int64_t count) : count_(count) {}
  bool next(int64_t& task) {
    task = next_.fetch_add(1, std::memory_order_relaxed);
    return task < count_;
  }

 private:
  const int64_t count_;
  std::atomic<int64_t> next_{0};
};

// Waking a thread costs about as much as this many multiply-adds.
constexpr int64_t kWorkPerThread = 200'000;

// Runs worker(queue) on as many threads as the tasks, of `work` multiply-adds each, are worth.
// Inside another parallel region it runs on the calling thread alone. Which thread gets which task
// varies, so a task must write only what no other task writes; then the result does not depend on
// the number of threads.
template <class Worker>
void run_workers(int64_t tasks, int64_t work, const Worker& worker) {
  TaskQueue queue(tasks);
  const int64_t worth = tasks * std::min(work, kWorkPerThread) / kWorkPerThread + 1;
  const int64_t threads =
      std::min({tasks, worth, static_cast<int64_t>(torch::stable::get_num_threads())});
  if (threads <= 1) {
    worker(queue);
    return;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { worker(queue); });
}

template <class Body>
void run_tasks(int64_t tasks, int64_t work, const Body& body) {
  run_workers(tasks, work, [&](TaskQueue& queue) {
    for (int64_t task; queue.next(task);) body(task);
  });
}

// Runs body(begin, end) over blocks of `block` indices that take `work` multiply-adds each.
template <class Body>
void run_blocks(int64_t count, int64_t block, int64_t work, const Body& body) {
  run_tasks((count + block - 1) / block, block * work,
            [&](int64_t task) { body(task * block, std::min(count, (task + 1) * block)); });
}

}  // namespace fastnce
