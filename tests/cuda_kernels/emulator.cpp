#include "emulator.h"

#include <sys/mman.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

// Saves the registers that a function must keep and the stack's place in *save, and goes on with
// those of `load`.
#ifdef __x86_64__
extern "C" void fastnce_emulator_switch(void** save, void* load);
asm(R"(
.text
.type fastnce_emulator_switch, @function
fastnce_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastnce_emulator_switch, .-fastnce_emulator_switch
)");
#endif

namespace emulator {
namespace {

constexpr size_t kStack = 256 * 1024;  // of a fiber; only touched pages take memory
constexpr size_t kMostThreads = 1024;
constexpr size_t kMostShared = 227 * 1024, kUnaskedShared = 48 * 1024;
constexpr int kBarriers = 16;

struct Fiber {
#ifdef __x86_64__
  void* stack = nullptr;
#else
  ucontext_t context;
#endif
  Place place;
  std::vector<std::function<void()>> open;                // work that no group holds yet
  std::deque<std::vector<std::function<void()>>> groups;  // of deferred work, oldest first
};

struct Barrier {
  int expected = 0, arrived = 0;
  std::vector<int> waiting;
};

struct Meeting {  // of a warp, or of a warp group
  Operation operation = nullptr;
  std::vector<void*> operands;
  int arrived = 0;
};

struct Waiting {
  int fiber;
  std::function<bool()> condition;
};

struct Block {
  const std::function<void()>* body;
  std::vector<Fiber> fibers;
  std::vector<int> ready;
  std::vector<Waiting> waiting;
  std::vector<std::function<void()>> background;
  Barrier barriers[kBarriers];
  std::vector<Meeting> warps, groups;
  std::vector<unsigned> haste;  // of the warps
  int ended = 0, steps = 0;
  std::exception_ptr error;
};

Block* block = nullptr;
int current = -1;
std::mt19937 generator;
#ifdef __x86_64__
void* scheduler = nullptr;
#else
ucontext_t scheduler;
#endif

std::map<const void*, size_t> shared_limits;  // of kernels that asked
int times_set = 0;

size_t draw(size_t count) { return generator() % count; }

// Some warps are slow for a while: what they should have waited for, or been waited for, shows.
size_t draw_ready() {
  std::vector<unsigned>& haste = block->haste;
  if (block->steps++ % 500 == 0) {
    haste.resize(block->warps.size());
    for (unsigned& h : haste) h = generator();
  }
  const auto haste_of = [&](size_t i) { return haste[static_cast<size_t>(block->ready[i]) / 32]; };
  size_t best = draw(block->ready.size());
  for (int i = 0; i < 8; ++i) {
    const size_t other = draw(block->ready.size());
    if (haste_of(other) > haste_of(best)) best = other;
  }
  return best;
}

char* stack_of(size_t fiber) {
  static char* const all = [] {
    void* memory = mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulator: no memory for the fibers");
    for (size_t i = 0; i < kMostThreads; ++i) {
      mprotect(static_cast<char*>(memory) + i * kStack, 4096, PROT_NONE);
    }
    return static_cast<char*>(memory);
  }();
  return all + fiber * kStack;
}

void to_scheduler() {
#ifdef __x86_64__
  fastnce_emulator_switch(&block->fibers[current].stack, scheduler);
#else
  swapcontext(&block->fibers[current].context, &scheduler);
#endif
}

void to_fiber(int fiber) {
  current = fiber;
#ifdef __x86_64__
  fastnce_emulator_switch(&scheduler, block->fibers[fiber].stack);
#else
  swapcontext(&scheduler, &block->fibers[fiber].context);
#endif
}

void fiber_main() {
  try {
    (*block->body)();
    if (!block->fibers[current].open.empty() || !block->fibers[current].groups.empty()) {
      finish_groups(0);
      fail("a thread ended with copies on their way");
    }
  } catch (...) {
    if (!block->error) block->error = std::current_exception();
  }
  ++block->ended;
  to_scheduler();
  std::abort();
}

void prepare(int fiber) {
  char* top = stack_of(static_cast<size_t>(fiber)) + kStack;
#ifdef __SANITIZE_ADDRESS__
  // Whoever ran here before never returned, and so left its frames' borders behind.
  __asan_unpoison_memory_region(top - kStack + 4096, kStack - 4096);
#endif
#ifdef __x86_64__
  auto** words = reinterpret_cast<void**>(top);
  words[-1] = nullptr;  // where fiber_main would return to
  words[-2] = reinterpret_cast<void*>(&fiber_main);
  for (int i = 3; i <= 8; ++i) words[-i] = nullptr;
  block->fibers[static_cast<size_t>(fiber)].stack = words - 8;
#else
  ucontext_t& context = block->fibers[fiber].context;
  getcontext(&context);
  context.uc_stack.ss_sp = top - kStack;
  context.uc_stack.ss_size = kStack;
  makecontext(&context, &fiber_main, 0);
#endif
}

bool one_background() {
  if (block->background.empty()) return false;
  const size_t i = draw(block->background.size());
  std::swap(block->background[i], block->background.back());
  const auto work = std::move(block->background.back());
  block->background.pop_back();
  work();
  return true;
}

void wake() {
  auto& waiting = block->waiting;
  for (size_t i = 0; i < waiting.size();) {
    if (waiting[i].condition()) {
      block->ready.push_back(waiting[i].fiber);
      waiting[i] = std::move(waiting.back());
      waiting.pop_back();
    } else {
      ++i;
    }
  }
}

void run_block() {
  const int count = static_cast<int>(block->fibers.size());
  for (int i = 0; i < count; ++i) {
    prepare(i);
    block->ready.push_back(i);
  }
  while (block->ended < count) {
    if (block->ready.empty()) {
      wake();
      if (block->ready.empty() && !one_background()) {
        fail(("threads wait for ever: " + std::to_string(count - block->ended) + " of " +
              std::to_string(count) + " have not ended")
                 .c_str());
      }
      continue;
    }
    if (!block->background.empty() && draw(8) == 0) one_background();
    const size_t i = draw_ready();
    const int next = block->ready[i];
    block->ready[i] = block->ready.back();
    block->ready.pop_back();
    to_fiber(next);
    if (block->error) std::rethrow_exception(block->error);
  }
  while (one_background()) {
  }
}

}  // namespace

void fail(const char* what) { throw std::runtime_error(std::string("emulator: ") + what); }

const Place& place() { return block->fibers[static_cast<size_t>(current)].place; }

int limits_set() { return times_set; }

int shared_limit(const void* kernel) { return static_cast<int>(shared_limits[kernel]); }

int block_threads() { return static_cast<int>(block->fibers.size()); }

void barrier(int id, int threads, bool wait) {
  if (id < 0 || id >= kBarriers || threads % 32 != 0) fail("no such barrier");
  Barrier& b = block->barriers[id];
  if (b.arrived == 0) b.expected = threads;
  if (b.expected != threads) fail("threads disagree about a barrier's number of threads");
  ++b.arrived;
  const bool last = b.arrived == b.expected;
  if (wait && !last) b.waiting.push_back(current);
  if (last) {
    block->ready.insert(block->ready.end(), b.waiting.begin(), b.waiting.end());
    b.waiting.clear();
    b.arrived = 0;
  } else if (wait) {
    to_scheduler();
  }
}

void collective(int size, Operation operation, void* mine) {
  const Place& here = place();
  const int number = here.warp * 32 / size, rank = (here.warp * 32 + here.lane) % size;
  Meeting& m = (size == 32 ? block->warps : block->groups)[static_cast<size_t>(number)];
  if (m.arrived == 0) m.operation = operation;
  if (m.operation != operation) fail("threads of a group meet in different operations");
  m.operands[static_cast<size_t>(rank)] = mine;
  if (++m.arrived < size) return to_scheduler();
  m.arrived = 0;
  operation(m.operands.data());
  for (int i = 0; i < size; ++i) {
    if (i != rank) block->ready.push_back(number * size + i);
  }
}

void wait_until(const std::function<bool()>& condition) {
  if (condition()) return;
  block->waiting.push_back({current, condition});
  to_scheduler();
}

void later(std::function<void()> work) { block->background.push_back(std::move(work)); }

void at_some_time(std::function<void()> work) { draw(2) == 0 ? work() : defer(std::move(work)); }

void defer(std::function<void()> work) {
  block->fibers[static_cast<size_t>(current)].open.push_back(std::move(work));
}

void close_group() {
  Fiber& fiber = block->fibers[static_cast<size_t>(current)];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void finish_groups(int pending) {
  Fiber& fiber = block->fibers[static_cast<size_t>(current)];
  while (static_cast<int>(fiber.groups.size()) > pending) {
    for (const auto& work : fiber.groups.front()) work();
    fiber.groups.pop_front();
  }
}

void launch(const char* op, const void* kernel, dim3 grid, dim3 threads, size_t shared_bytes,
            const std::function<void()>& body) {
  const size_t count = size_t{threads.x} * threads.y * threads.z;
  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  const auto refuse = [&](const std::string& what) {
    throw std::runtime_error(std::string(op) + ": " + what);
  };
  if (count == 0 || count > kMostThreads || count % 32 != 0)
    refuse("a block cannot have this size");
  if (blocks == 0 || grid.y > 65535 || grid.z > 65535) refuse("a grid cannot have this size");
  if (shared_bytes > kMostShared) refuse("more shared memory than a block can have");
  const auto allowed = shared_limits.find(kernel);
  if (shared_bytes > (allowed == shared_limits.end() ? kUnaskedShared : allowed->second))
    refuse("more shared memory than the kernel may have");
  const char* seed = std::getenv("FASTNCE_EMULATOR_SEED");
  generator.seed(seed ? static_cast<unsigned>(std::atoi(seed)) : 0);

  constexpr size_t kCanary = 64;
  std::unique_ptr<char, decltype(&std::free)> shared(
      static_cast<char*>(std::aligned_alloc(1024, (shared_bytes + kCanary + 1023) / 1024 * 1024)),
      &std::free);
  std::vector<size_t> order(blocks);
  for (size_t i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), generator);
  for (const size_t index : order) {
    std::memset(shared.get(), 0xff, shared_bytes + kCanary);  // NaN in every float type
    Block b;
    b.body = &body;
    b.fibers = std::vector<Fiber>(count);
    b.warps = std::vector<Meeting>(count / 32, Meeting{nullptr, std::vector<void*>(32), 0});
    b.groups =
        std::vector<Meeting>((count + 127) / 128, Meeting{nullptr, std::vector<void*>(128), 0});
    for (size_t i = 0; i < count; ++i) {
      Place& p = b.fibers[i].place;
      p.thread = {static_cast<unsigned>(i % threads.x),
                  static_cast<unsigned>(i / threads.x % threads.y),
                  static_cast<unsigned>(i / threads.x / threads.y)};
      p.block = {static_cast<unsigned>(index % grid.x),
                 static_cast<unsigned>(index / grid.x % grid.y),
                 static_cast<unsigned>(index / grid.x / grid.y)};
      p.threads = threads;
      p.blocks = grid;
      p.lane = static_cast<int>(i % 32);
      p.warp = static_cast<int>(i / 32);
      p.shared = shared.get();
    }
    block = &b;
    try {
      run_block();
    } catch (const std::exception& error) {
      block = nullptr;
      refuse(error.what());
    }
    block = nullptr;
    for (size_t i = 0; i < kCanary; ++i) {
      if (shared.get()[shared_bytes + i] != '\xff')
        refuse("emulator: written beyond the shared memory");
    }
  }
}

}  // namespace emulator

cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
  if (attribute != cudaDevAttrMaxSharedMemoryPerBlockOptin) return 1;
  *value = static_cast<int>(emulator::kMostShared);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, int attribute, int bytes) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return 1;
  emulator::shared_limits[kernel] = static_cast<size_t>(bytes);
  ++emulator::times_set;
  return cudaSuccess;
}
