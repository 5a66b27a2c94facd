#include "thread_pool.h"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace kvfold {
namespace {

constexpr int kSpins = 2000;  // some 50 microseconds: the next layer's attention rarely comes sooner, its merge does

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

int64_t process() {
#if defined(__unix__) || defined(__APPLE__)
  return getpid();
#else
  return 0;
#endif
}

// Tasks that threads take one at a time. An exception (no memory, say) ends the loop; the caller gets the first one, whichever
// thread it came from.
class Loop {
 public:
  Loop(int num_tasks, const std::function<void(int)>& work) : num_tasks_(num_tasks), work_(work) {}

  void take() {
    try {
      for (int task; (task = next_.fetch_add(1)) < num_tasks_;) work_(task);
    } catch (...) {
      next_.store(num_tasks_);
      std::lock_guard<std::mutex> lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
    }
  }

  void end() const {
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  const int num_tasks_;
  const std::function<void(int)>& work_;
  std::atomic<int> next_{0};
  std::mutex mutex_;
  std::exception_ptr failure_;
};

class ThreadPool {
 public:
  void run(Loop& loop, int num_threads) {
    while (int(workers_.size()) < num_threads - 1) {
      workers_.emplace_back(&ThreadPool::serve, this, int(workers_.size()) + 1, generation_.load());
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      loop_ = &loop;
      num_threads_ = num_threads;
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    loop.take();
    {  // Who has not come by now need not: nothing is left to take.
      std::lock_guard<std::mutex> lock(mutex_);
      loop_ = nullptr;
    }
    // On a machine with more work than cores the last worker may not be running: then it needs this core.
    for (int i = 0; active_.load(std::memory_order_acquire) > 0; i++) i < kSpins ? pause() : std::this_thread::yield();
  }

 private:
  void serve(int thread, uint64_t seen) {
    for (;;) {
      for (int i = 0; i < kSpins && generation_.load(std::memory_order_acquire) == seen; i++) pause();
      Loop* loop;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load() != seen; });
        seen = generation_.load();
        if (!loop_ || thread >= num_threads_) continue;
        loop = loop_;
        active_.fetch_add(1);
      }
      loop->take();
      active_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  Loop* loop_ = nullptr;
  int num_threads_ = 0;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> active_{0};
};

std::mutex in_use;
ThreadPool* pool = nullptr;  // never deleted: its threads wait until the process ends
int64_t owner = 0;

// OpenMP's `parallel`, as compilers call it, of the library that torch has loaded; null where torch has none that can be seen.
using Parallel = void (*)(void (*work)(void*), void* data, unsigned num_threads, unsigned flags);

Parallel find_parallel() {
#if defined(__unix__) || defined(__APPLE__)
  return reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

const int64_t loaded_in = process();

// Not in a forked child: it has none of OpenMP's threads, and the library would wait for them.
Parallel torch_threads() {
  static const Parallel found = find_parallel();
  return process() == loaded_in ? found : nullptr;
}

}  // namespace

void parallel_for(int num_tasks, int num_threads, const std::function<void(int)>& work, Team team) {
  if (num_tasks <= 1 || num_threads <= 1) {
    for (int task = 0; task < num_tasks; task++) work(task);
    return;
  }
  Loop loop(num_tasks, work);
  if (const Parallel parallel = team == Team::TORCH ? torch_threads() : nullptr) {
    // As many threads as torch takes, whatever the number of tasks: other numbers would make OpenMP end some, and start them anew.
    parallel([](void* given) { static_cast<Loop*>(given)->take(); }, &loop, unsigned(num_threads), 0);
  } else {
    std::unique_lock<std::mutex> lock(in_use, std::try_to_lock);
    if (lock.owns_lock()) {
      if (!pool || owner != process()) {  // a forked child has none of the threads
        pool = new ThreadPool();
        owner = process();
      }
      pool->run(loop, num_tasks < num_threads ? num_tasks : num_threads);
    } else {
      loop.take();
    }
  }
  loop.end();
}

}  // namespace kvfold
