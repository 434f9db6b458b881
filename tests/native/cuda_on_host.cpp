// The CUDA kernels as plain C++, for AddressSanitizer and UndefinedBehaviorSanitizer: the threads
// of a block run one after another, each as far as a barrier. One that waits there keeps its stack.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct uint2 {
  uint32_t x, y;
} __attribute__((aligned(8)));
struct uint4 {
  uint32_t x, y, z, w;
} __attribute__((aligned(16)));
struct dim3 {
  uint32_t x = 1, y = 1, z = 1;
};
static thread_local dim3 gridDim, blockDim, blockIdx, threadIdx;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
static cudaError_t cudaGetLastError() { return cudaSuccess; }
static const char* cudaGetErrorString(cudaError_t) { return "invalid configuration"; }

template <class T>
static T __ldcs(const T* from) {
  return *from;
}

static uint32_t atomicAdd(uint32_t* to, uint32_t value) {
  const uint32_t before = *to;
  *to += value;
  return before;
}

// The threads of one block. Some stack takes them one after another. When a thread waits at a
// barrier, its stack rests and another one goes on with the threads that have not begun. Once all
// wait, all go on.
class Block {
 public:
  template <class Kernel>
  Block(const dim3& threads, Kernel kernel) : threads_(threads), kernel_(kernel) {
    while (begun_ < size() || !resting_.empty()) {
      std::vector<Stack*> going;
      going.swap(resting_);
      if (!going.empty() && going.size() != size()) fail();
      for (Stack* stack : going) enter(*stack);
      while (begun_ < size()) {
        stacks_.push_back(std::make_unique<Stack>());
        start(*stacks_.back());
      }
    }
  }

  static void wait() {
    Stack& stack = *current_->running_;
    const dim3 thread = threadIdx;
    current_->resting_.push_back(&stack);
    swapcontext(&stack.context, &current_->outside_);
    threadIdx = thread;
  }

 private:
  static constexpr size_t BYTES = 128 << 10;
  struct Stack {
    ucontext_t context;
    std::unique_ptr<char[]> memory{new char[BYTES]};
  };

  uint32_t size() const { return threads_.x * threads_.y * threads_.z; }

  static void fail() {
    fprintf(stderr, "a barrier that not all threads of the block reach\n");
    abort();
  }

  static void run() {
    Block& block = *current_;
    while (block.begun_ < block.size()) {
      const uint32_t index = block.begun_++, x = block.threads_.x, y = block.threads_.y;
      threadIdx = {index % x, index / x % y, index / (x * y)};
      block.kernel_();
    }
  }

  void start(Stack& stack) {
    getcontext(&stack.context);
    stack.context.uc_stack.ss_sp = stack.memory.get();
    stack.context.uc_stack.ss_size = BYTES;
    stack.context.uc_link = &outside_;
    makecontext(&stack.context, run, 0);
    enter(stack);
  }

  void enter(Stack& stack) {
    current_ = this;
    running_ = &stack;
    swapcontext(&outside_, &stack.context);
  }

  static inline thread_local Block* current_ = nullptr;
  const dim3 threads_;
  const std::function<void()> kernel_;
  uint32_t begun_ = 0;
  ucontext_t outside_;
  Stack* running_ = nullptr;
  std::vector<Stack*> resting_;
  std::vector<std::unique_ptr<Stack>> stacks_;
};

static void __syncthreads() { Block::wait(); }

template <class Turn>
static void for_each_index(const dim3& sizes, dim3& index, Turn turn) {
  for (index.z = 0; index.z < sizes.z; ++index.z) {
    for (index.y = 0; index.y < sizes.y; ++index.y) {
      for (index.x = 0; index.x < sizes.x; ++index.x) turn();
    }
  }
}

template <class Kernel>
static void for_each_thread(const dim3& blocks, const dim3& threads, Kernel kernel) {
  gridDim = blocks, blockDim = threads;
  for_each_index(blocks, blockIdx, [&] { Block(threads, kernel); });
}

#define FASTDDIM_LAUNCH(kernel, extent, stream, ...) \
  (void)(stream), for_each_thread((extent).blocks, (extent).threads, [&] { kernel(__VA_ARGS__); })

#include "../../csrc/cuda/update.cu"
