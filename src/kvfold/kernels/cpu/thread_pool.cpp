#include "thread_pool.h"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
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

class ThreadPool {
 public:
  void run(int num_tasks, int num_threads, const std::function<void(int, int)>& work) {
    while (int(workers_.size()) < num_threads - 1) {
      workers_.emplace_back(&ThreadPool::serve, this, int(workers_.size()) + 1, generation_.load());
    }
    next_.store(0);
    failure_ = nullptr;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = {&work, num_tasks, num_threads};
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    take_tasks(job_, 0);
    {  // Who has not come by now need not: nothing is left to take.
      std::lock_guard<std::mutex> lock(mutex_);
      job_.work = nullptr;
    }
    // On a machine with more work than cores the last worker may not be running: then it needs this core.
    for (int i = 0; active_.load(std::memory_order_acquire) > 0; i++) i < kSpins ? pause() : std::this_thread::yield();
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  struct Job {
    const std::function<void(int, int)>* work = nullptr;
    int num_tasks = 0, num_threads = 0;
  };

  // An exception (no memory, say) ends the job; the caller gets the first one, whichever thread it came from.
  void take_tasks(Job job, int thread) {
    try {
      for (int task; (task = next_.fetch_add(1)) < job.num_tasks;) (*job.work)(task, thread);
    } catch (...) {
      next_.store(job.num_tasks);
      std::lock_guard<std::mutex> lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
    }
  }

  void serve(int thread, uint64_t seen) {
    for (;;) {
      for (int i = 0; i < kSpins && generation_.load(std::memory_order_acquire) == seen; i++) pause();
      Job job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load() != seen; });
        seen = generation_.load();
        if (!job_.work || thread >= job_.num_threads) continue;
        job = job_;
        active_.fetch_add(1);
      }
      take_tasks(job, thread);
      active_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  Job job_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> next_{0}, active_{0};
  std::exception_ptr failure_;
};

std::mutex in_use;
ThreadPool* pool = nullptr;  // never deleted: its threads wait until the process ends
int64_t owner = 0;

}  // namespace

void parallel_for(int num_tasks, int num_threads, const std::function<void(int, int)>& work) {
  std::unique_lock<std::mutex> lock(in_use, std::try_to_lock);
  num_threads = num_tasks < num_threads ? num_tasks : num_threads;
  if (num_threads <= 1 || !lock.owns_lock()) {
    for (int task = 0; task < num_tasks; task++) work(task, 0);
    return;
  }
  if (!pool || owner != process()) {  // a forked child has none of the threads
    pool = new ThreadPool();
    owner = process();
  }
  pool->run(num_tasks, num_threads, work);
}

}  // namespace kvfold
